"""A sweep's Optuna study: opened or resumed, what it still lacks, and its files trials.csv and best.json.

Library of `python -m pipeline.sweep`.
"""

from __future__ import annotations

import csv
import io
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from pipeline.files import UserError, sha256, write_json, write_text
from pipeline.measure import provenance
from pipeline.results import Result
from pipeline.sweep_space import Point, Sweep, identity, overrides

if TYPE_CHECKING:
    import optuna

NUMBERS = ("train_s", "tokens_per_s", "peak_bytes", "memory_kind", "packed", "slots", "nll", "diverged", "hardware", "spent_s")
"""What a trial keeps of its result besides its objectives, as Optuna user attributes and columns of trials.csv.

packed: `slots` trials trained at once; train_s is then the trial's share of the time of their steps, and its memory is not measured.
nll: of the right answers of the validation rows. spent_s: wall clock since the trial before it had ended (packed: since some other one had),
so that their sum is what the search took.
"""


def open_study(folder: Path, cfg: DictConfig, sweep: Sweep) -> optuna.Study:
    """The study in folder/study.db, made if need be.

    Raises:
        UserError: the file cannot be written, is no study, or belongs to another config, space, data or model.
    """
    import optuna
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = folder / "study.db"
    name = f"{cfg.experiment}/{folder.name}"
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name=name,
            directions=sweep.directions,
            pruner=_pruner(sweep),
            load_if_exists=True,
        )
    except OperationalError as error:  # of the place, not of what the file holds
        raise UserError(f"cannot write {path} ({str(error).splitlines()[0]}); free space or mend paths.sweeps, then run again") from error
    except (SQLAlchemyError, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be opened as an Optuna study ({str(error).splitlines()[0]}); delete {folder} to start anew"
        ) from error
    # A seeded sampler starts over in every process, so a resumed search would draw the points it has already tried.
    seed = sweep.seed + len(study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=seed) if sweep.sampler == "tpe" else optuna.samplers.RandomSampler(seed=seed)
    _check_same(study, _identity(cfg, sweep), folder)
    if not study.trials or not (folder / "sweep.json").exists():
        write_json(folder / "sweep.json", _description(cfg, sweep))
    return study


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    import optuna

    kinds: dict[str | None, type[optuna.pruners.BasePruner]] = {
        None: optuna.pruners.NopPruner, "median": optuna.pruners.MedianPruner, "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
    }
    return kinds[sweep.pruner]()


def _identity(cfg: DictConfig, sweep: Sweep) -> dict[str, Any]:
    inputs = {"data": Path(cfg.paths.data) / cfg.task.name, "model": Path(cfg.paths.models) / cfg.model.name}
    manifests = {kind: folder / "manifest.json" for kind, folder in inputs.items()}
    digests = {f"the {kind} (sha256)": sha256(path) if path.exists() else None for kind, path in manifests.items()}
    found: dict[str, Any] = json.loads(json.dumps(identity(cfg, sweep) | digests, default=str))
    return found


def _check_same(study: optuna.Study, wanted: dict[str, Any], folder: Path) -> None:
    found = study.user_attrs.get("identity")
    if found is None:
        study.set_user_attr("identity", wanted)
        return
    for key in [*found, *wanted]:
        if found.get(key) != wanted.get(key):
            raise UserError(
                f"{folder / 'study.db'} was made with {key}={found.get(key)}, now it is {wanted.get(key)}; "
                f"delete {folder} to start anew, or set paths.sweeps to another folder"
            )


def _description(cfg: DictConfig, sweep: Sweep) -> dict[str, Any]:
    about = provenance()
    return {
        "experiment": cfg.experiment,
        "technique": cfg.technique.name,
        "task": cfg.task.name,
        "model": cfg.model.name,
        "seed": cfg.seed,
        "train_rows": cfg.train_rows,
        "metric": cfg.task.get("metric", "accuracy"),
        "sampler": sweep.sampler,
        "space": sweep.space,
        "link": sweep.link,
        "objectives": list(sweep.objectives),
        "settings": sweep.settings,
        "provenance": {key: about[key] for key in ("started", "git_commit", "git_dirty")},
    }


def answered(study: optuna.Study) -> int:
    """Trials that completed, were pruned, ran out of memory or ended with an error that counts. One that died has no answer."""
    return sum(_has_answer(trial) for trial in study.trials)


def _has_answer(trial: optuna.trial.FrozenTrial) -> bool:
    return trial.state.name in ("COMPLETE", "PRUNED") or trial.user_attrs.get("status") in ("oom", "error")


def revive(study: optuna.Study, sweep: Sweep) -> None:
    """Fail the trials that a dead process left running, and enqueue what has no answer yet.

    Brute force enqueues every point here: Optuna's BruteForceSampler would never try one again that died.
    """
    for trial in study.trials:
        if trial.state.name == "RUNNING":
            fail(study, trial.number)
    points = sweep.points()
    if points is None:
        dead = [_point(t) for t in study.trials if t.state.name == "FAIL" and not _has_answer(t)]
        points = [point for point in dead if set(point) == set(sweep.space)]
    known = [_point(t) for t in study.trials if t.state.name == "WAITING" or _has_answer(t)]
    for point in points:
        if point not in known:
            study.enqueue_trial(point)
            known.append(point)


def _point(trial: optuna.trial.FrozenTrial) -> Point:
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def fail(study: optuna.Study, number: int) -> None:
    import optuna

    study.tell(number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)


def tell_pruned(study: optuna.Study, trial: optuna.Trial, result: Result, spent_s: float) -> None:
    """A trial that the pruner ended: its value is the last that it reported."""
    import optuna

    _keep(trial, "pruned", numbers(result) | {"spent_s": spent_s})
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)


def _keep(trial: optuna.Trial, status: str, found: dict[str, Any]) -> None:
    for key, value in {"status": status, **found}.items():
        trial.set_user_attr(key, value)


def tell(study: optuna.Study, trial: optuna.Trial, sweep: Sweep, result: Result, spent_s: float) -> None:
    found = numbers(result) | {"spent_s": spent_s}
    _keep(trial, result.status, found)
    if result.status != "ok":
        trial.set_user_attr("error", result.error)
        fail(study, trial.number)
        return
    values = {"validation": getattr(result.scores["validation"], result.metric), "peak_memory": found["peak_bytes"]}
    for name in sweep.objectives:
        if values[name] is None:
            raise UserError(f"the objective {name} was not measured on this machine; leave it out of sweep.objectives")
    study.tell(trial, [values[name] for name in sweep.objectives])


def numbers(result: Result) -> dict[str, Any]:
    nll = result.scores["validation"].nll if "validation" in result.scores else None
    return {
        "train_s": result.phases.train_s if result.phases else None,
        "tokens_per_s": result.work.tokens_per_s if result.work else None,
        "peak_bytes": result.memory.peak_bytes if result.memory else None,
        "memory_kind": result.memory.kind if result.memory else None,
        "packed": result.packed,
        "slots": result.slots,
        "nll": nll if nll is not None and math.isfinite(nll) else None,
        "hardware": result.hardware.get("gpu") or result.hardware.get("cpu"),
        "diverged": result.work is not None and result.work.diverged_at is not None,
    }


def short(values: Point) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={_number(value)}" for key, value in values.items())


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def trial_rows(study: optuna.Study, sweep: Sweep) -> list[dict[str, Any]]:
    """Finished trials as rows: number, state, status (ok, oom, died), settings, objectives, seconds, started, numbers."""
    rows = []
    for trial in study.trials:
        point = _point(trial)
        if not trial.state.is_finished() or set(point) != set(sweep.space):
            continue
        has_answer = _has_answer(trial)
        row = {"number": trial.number, "state": trial.state.name, "status": trial.user_attrs["status"] if has_answer else "died"}
        row |= sweep.complete(point)
        row |= dict(zip(sweep.objectives, trial.values or [None] * len(sweep.objectives), strict=True))
        seconds = trial.duration.total_seconds() if has_answer and trial.duration else None
        row |= {"seconds": seconds, "started": _utc(trial.datetime_start)}
        rows.append(row | {key: trial.user_attrs.get(key) for key in NUMBERS})
    return rows


def _utc(moment: datetime | None) -> str | None:
    """Optuna's times are local and carry no offset."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds") if moment else None


def _columns(sweep: Sweep) -> list[str]:
    return ["number", "state", "status", *sweep.settings, *sweep.objectives, "seconds", "started", *NUMBERS]


def write_trials(folder: Path, study: optuna.Study, sweep: Sweep) -> None:
    out = io.StringIO()
    writer = csv.DictWriter(out, _columns(sweep), lineterminator="\n")
    writer.writeheader()
    writer.writerows(trial_rows(study, sweep))
    write_text(folder / "trials.csv", out.getvalue())


def table(study: optuna.Study, sweep: Sweep) -> str:
    shown = ["number", "status", *sweep.settings, *sweep.objectives, "seconds"]
    rows = [[key.rpartition(".")[2] for key in shown]]
    rows += [["" if row[key] is None else _number(row[key]) for key in shown] for row in trial_rows(study, sweep)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(shown))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows)


def write_best(folder: Path, study: optuna.Study, sweep: Sweep) -> dict[str, Any]:
    """best.json: the highest validation score (ties: the smaller memory objective, then the choice listed first); and the front."""
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    if not complete:
        raise UserError(f"no trial of {folder} completed (see {folder / 'trials.csv'}); choose smaller settings or a bigger machine")
    several = len(sweep.objectives) > 1
    front = sorted(study.best_trials if several else complete, key=lambda t: (-t.values[0], *t.values[1:], sweep.order(t.params)))
    last = max(t.datetime_complete for t in study.trials if _has_answer(t) and t.datetime_complete)
    best = {
        **_choice(front[0], sweep),
        "variant": "best",
        "front": [_choice(t, sweep) for t in front] if several else None,
        "finished": _utc(last),
    }
    write_json(folder / "best.json", best)
    return best


def _choice(trial: optuna.trial.FrozenTrial, sweep: Sweep) -> dict[str, Any]:
    chosen = sweep.complete(trial.params)
    return {
        "params": trial.params,
        "value": trial.values[0],
        "values": dict(zip(sweep.objectives, trial.values, strict=True)),
        "trial": trial.number,
        "overrides": overrides(chosen),
        "settings": chosen,
        "variant": short(trial.params).replace("=", "").replace(" ", "-"),
    }
