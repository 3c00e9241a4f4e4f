"""A cell's result put together, and its files: result.json, predictions.jsonl, history.csv and artefact/."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell import identity
from pipeline.cell.evaluation import Evaluation
from pipeline.cell.inputs import Inputs, Parts, Shared
from pipeline.core.compose import build, plain
from pipeline.core.files import atomic_folder, folder_bytes, read_json, sha256, write_json, write_jsonl, write_text
from pipeline.core.settings import Settings
from pipeline.measure import machine, turns
from pipeline.measure.clock import Meter
from pipeline.methods.base import Method
from pipeline.models import rates
from pipeline.models.base import device_of, manifest
from pipeline.objectives.base import Objective
from pipeline.records import results, tuned
from pipeline.records.finished import cell_at, name
from pipeline.records.origins import Before, PairScore
from pipeline.records.results import HISTORY, Neighbours, Result, Size, Teacher, Work, csv_text, price
from pipeline.scoring import best_of, rewards
from pipeline.training.loop import Trained


def assemble(parts: Parts, inputs: Inputs, trained: Trained, size: Size, scored: Evaluation, meter: Meter, about: dict[str, Any],
             shared: Shared) -> Result:
    """The result of a cell that went through. about: the process's provenance; shared: what its process had from the one that forked it."""
    cfg, phases, tuning, error = parts.cfg, meter.phases(), tuned.effort(parts.cfg), diverged(trained.work, scored.finite)
    made_of = before(cfg, parts.objective)
    return Result(
        **{**_named(cfg, parts.settings, parts.method, parts.objective), "train_rows": inputs.labelled}, precision=parts.precision,
        status="diverged" if error else "ok", error=error,
        validation_rows=len(inputs.rows.validation), scores=scored.scores, memory=trained.memory or scored.memory, work=trained.work,
        size=dataclasses.replace(size, artefact_bytes=0) if error else size,
        inference=scored.inference, forgetting=scored.forgetting, teacher=_teacher(parts, inputs, trained), synthetic=inputs.synthetic,
        history=trained.history, unmeasured=scored.unmeasured, notes=scored.notes, hardware=machine.hardware(parts.device) | machine.arithmetic(),
        provenance={**about, **_origin(parts)}, phases=phases,
        packed=trained.slots is not None, slots=trained.slots, tuning=tuning, cost=price(cfg, phases.wall_s), shared_process=bool(shared.threads),
        neighbours=neighbours(shared, meter),
        labelled_rows=labels_used(parts, inputs, bool(tuning)) + sum(one.other_rows for one in made_of.values()), before=made_of, pairs=_pairs(parts, scored),
        best_of=best_of.curve([p for p in scored.predictions if p["split"] == "test"]),
    )


def before(cfg: DictConfig, objective: Objective) -> dict[str, Before]:
    """The finished cells that this one is made of, and those that they are made of."""
    found: dict[str, Before] = {}
    for part, word in (({"start": cfg.start} if cfg.start else {}) | objective.made_of).items():
        result = results.read(cell_at(word, cfg))
        seconds = result.phases.warmup_s + result.phases.train_s if result.phases else None
        found |= result.before | {f"{result.experiment}/{result.cell}": Before(part, seconds, _other_rows(result, cfg))}
    return found


def _other_rows(result: Result, cfg: DictConfig) -> int:
    """Labelled rows of another cell that are none of this one's: all of another draw, and pairs of a file."""
    if (result.task, result.seed, result.config.get("train_rows")) != (cfg.task.name, cfg.seed, cfg.train_rows):
        return result.labelled_rows or 0
    return result.train_rows if result.config["objective"].get("pairs") else 0


def _pairs(parts: Parts, scored: Evaluation) -> dict[str, PairScore]:
    """Of a reward model, by split."""
    if not parts.objective.scalar_head:
        return {}
    by_split = {split: rewards.pair_score([p for p in scored.predictions if p["split"] == split]) for split in scored.scores}
    return {split: one for split, one in by_split.items() if one}


def neighbours(shared: Shared, meter: Meter) -> Neighbours | None:
    """Of a cell that may have had some; those that share the device without turns are timed with all that the others do."""
    if shared.at_once == 1:
        return None
    taken = shared.turns is not None
    waited_s, alone_s = (round(meter.waited_s, 4), round(turns.alone_s(), 4)) if taken else (None, None)
    return Neighbours(shared.at_once, taken, waited_s, alone_s, machine.is_mps_client(meter.device))


def diverged(work: Work, finite: bool) -> str | None:
    """Why a cell that went through has status diverged; None: it has not. finite: whether the model's scores are."""
    if work.diverged_at is not None:
        return f"training diverged at step {work.diverged_at}"
    return None if finite else "the model's scores are not finite"


def bare_result(cfg: DictConfig, **measured: Any) -> Result:
    """A result with what names the cell, and these fields. No device is asked for, so that the process can still fork."""
    return Result(**_named(cfg, rates.read_if_there(cfg), build(cfg.method, "method"), build(cfg.objective, "objective")) | measured)


def oom_result(cfg: DictConfig, error: str, hardware: dict[str, Any]) -> Result:
    """The row of a cell that ran out of memory."""
    return bare_result(cfg, status="oom", error=error, hardware=hardware, precision=cfg.precision.name,
                       provenance={**machine.provenance(), **identity.provenance(cfg)})


def _named(cfg: DictConfig, settings: Settings, method: Method, objective: Objective) -> dict[str, Any]:
    train = settings.train
    shown = {**method.hyperparameters(), **objective.hyperparameters(), **({"start": cfg.start} if cfg.start else {})}
    if method.trains:
        shown |= {"lr": train.lr, "epochs": train.epochs, "batch_size": train.batch_size, "optimizer": train.optimizer, "schedule": train.schedule}
        shown |= {key: steps for key, steps in (("steps", train.steps), ("min_steps", train.min_steps)) if steps is not None}
    return {
        "experiment": cfg.experiment, "cell": name(cfg), "technique": cfg.technique.name, "family": settings.technique.family,
        "kind": _kind(method, objective), "start": cfg.start, "takes_rows": method.takes_rows or bool(cfg.start),
        "method": method.name, "objective": objective.name if method.trains or objective.selection else "none", "task": cfg.task.name, "model": cfg.model.name,
        "seed": cfg.seed, "train_rows": cfg.train_rows or 0, "hyperparameters": shown, "metric": settings.task.metric_name, "config": plain(cfg),
    }


def kind_of(cfg: DictConfig) -> str:
    """One of results.KINDS, of a cell that may not have run."""
    return _kind(build(cfg.method, "method"), build(cfg.objective, "objective"))


def _kind(method: Method, objective: Objective) -> str:
    """One of results.KINDS."""
    if method.answers_without_model:
        return "teacher"
    return "trained" if method.trains else "base" if method.name == "none" and not objective.selection else "untrained"


def labels_used(parts: Parts, inputs: Inputs, tuned: bool) -> int:
    """How many labels the cell uses, those of a taxonomy's examples that synthetic rows were written from among them."""
    beside = inputs.synthetic.examples if inputs.synthetic else 0
    searched = tuned and (parts.objective.reads_labels or not parts.method.trains)  # else each trial has read what the cell reads, and no more
    return beside + labelled_rows(parts.method, parts.objective, inputs.labelled, len(inputs.rows.validation), searched or bool(parts.cfg.start))


def labelled_rows(method: Method, objective: Objective, train: int, validation: int, seen: bool) -> int:
    """Of so many training and validation rows, how many labels a cell uses. seen: all were read before it, by a search or the cell it begins at."""
    if seen or (method.trains and objective.reads_labels):
        return train + validation
    return validation if method.trains else method.labelled_rows(train, validation)


def _teacher(parts: Parts, inputs: Inputs, trained: Trained) -> Teacher | None:
    rationales = inputs.rows.rationales
    if not rationales:
        return trained.teacher
    used = [r for r in inputs.rows.train if r["id"] in rationales]
    right = sum(bool(rationales[r["id"]]["correct"]) for r in used)
    seconds = read_json(parts.rationales / "manifest.json").get("seconds")
    return Teacher(parts.cfg.teacher.name, len(used), right / len(used) if used else None, seconds)


def _origin(parts: Parts) -> dict[str, Any]:
    """What a result keeps of its identity and of what it was made of."""
    model = None if parts.method.answers_without_model else manifest(parts.model)["sha256"]
    return {**identity.provenance(parts.cfg), "data_sha256": sha256(parts.data / "manifest.json"), "model_sha256": model}


def write(folder: Path, cfg: DictConfig, result: Result, predictions: Sequence[dict]) -> None:
    """All files of the cell but an artefact that `write_artefact` has written; result.json comes last, so that it stands for a whole cell."""
    (folder / "result.json").unlink(missing_ok=True)
    if result.status != "ok" or result.kind == "teacher":  # nothing to serve: of a diverged cell, weights that answer nothing
        write_artefact(folder, cfg)
    write_jsonl(folder / "predictions.jsonl", predictions)
    write_text(folder / "history.csv", csv_text(HISTORY, result.history))
    results.write(folder, result)


def write_artefact(folder: Path, cfg: DictConfig, save: Callable[[Path], None] | None = None) -> int:
    """The artefact and artefact.json, which says what it belongs to. Returns its bytes without that file. save: writes what is served."""
    with atomic_folder(folder / "artefact", "artefact.json", "cell") as beside:
        beside.mkdir()
        if save:
            save(beside)
        size = folder_bytes(beside)
        write_json(beside / "artefact.json", {"technique": cfg.technique.name, "model": cfg.model.name, "task": cfg.task.name, "cell": name(cfg)})
    return size


def write_oom(cfg: DictConfig, error: str, device: str = "cpu") -> Result:
    """Write the files of a cell whose process was ended for lack of memory. device: whose."""
    result = oom_result(cfg, error, machine.hardware(device_of(device)))
    write(identity.folder_of(cfg), cfg, result, [])
    return result
