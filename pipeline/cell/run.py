"""One cell: a technique is trained and evaluated in this process, and its result, predictions and artefact written.

Library; the entries are `python -m pipeline.train` (one cell) and `python -m pipeline.cells` (an experiment's). `run` is the table of contents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell import record
from pipeline.cell.evaluation import evaluate, score_answers, validate
from pipeline.cell.identity import answers_of, checkpoint_of, discard_training, packed_of
from pipeline.cell.inputs import Inputs, Parts, Shared, build_parts, check, encoded, load_inputs, named, rounds_nothing
from pipeline.cell.waking import woken
from pipeline.core.collector import uncollected
from pipeline.core.imports import import_peft, import_transformers
from pipeline.measure import machine, turns
from pipeline.measure.clock import Meter
from pipeline.measure.memory import Memory, out_of_memory
from pipeline.models.base import attention_of, memory_bytes, parameters
from pipeline.models.reach import block_weights, has_experts, quantised_weights, share
from pipeline.objectives.base import TrainingContext
from pipeline.records.results import Result, Size, Work
from pipeline.scoring import answers, per_row, rewards
from pipeline.scoring.scorer import Scorer
from pipeline.serving.artefact import reward_reader, scorer_of, selecting
from pipeline.training.checkpoint import load_state
from pipeline.training.loop import Loop, Trained, total_steps
from pipeline.training.online import OnlineLoop
from pipeline.training.ranks import ALONE, Ranks
from pipeline.training.stepping import Run

MEASURED_WITH_IMPORTS = ("cpu",)
"""Devices whose memory is the process's: what is imported while they train would count as training's."""
WHOLE = 0.95
"""Of the weights of the blocks, a share above it needs no note."""
LOOPS: dict[str, type[Loop]] = {"loop": Loop, "online": OnlineLoop}
"""By what an objective declares as its `trainer`."""


class Through(Exception):
    """A rank other than the first has done its part: the first one evaluates and writes."""


def run(cfg: DictConfig, *, shared: Shared | None = None, splits: tuple[str, ...] | None = None, folder: Path | None = None,
        started: float | None = None, ranks: Ranks = ALONE) -> Result:
    """Train and evaluate one cell.

    Args:
        splits: the splits to score; None: validation, test and what the evaluate settings ask for.
        folder: where result.json, predictions.jsonl, history.csv and artefact/ go; None: nothing is written.
        started: Unix time from which start-up is counted (the process's start).
        ranks: the processes that train this cell together, each in a call of its own.

    Returns:
        The result; out of memory is one, with status oom, and a training that diverged, with status diverged.

    Raises:
        UserError: bad input. KeyboardInterrupt: ended by a signal, a checkpoint was written. Through: of a rank that is not the first. Of several ranks
            one that is out of memory raises that: none writes a result then.
    """
    meter, shared = Meter(started), shared or Shared()
    meter.waited = turns.waited_s
    try:
        # turns start the GPU in one process at a time, and a rank has its own
        with meter.phase("startup"), uncollected(), woken("cpu" if shared.turns or ranks.joined else cfg.device):
            if rounds_nothing(cfg):
                import_peft()
            parts = build_parts(cfg, splits)
            check(parts)
            if not (ranks.leads or parts.method.trains):
                raise Through
            about = set_up(parts, shared)
            if shared.at_once > 1:
                turns.join(shared.turns, parts.device)
        with meter.phase("load"):
            inputs = load_inputs(parts, shared, meter)
        if parts.method.answers_without_model:
            turns.passed()
            trained, size = Trained(Work(), None, [], []), Size(0, 0, 0)
            import_scoring(parts, meter)
            scored = score_answers(parts, inputs.rows, meter)
        else:
            with meter.phase("load"):
                wrapped = wrap(parts, inputs, meter)
            turns.point()
            trained = train(parts, inputs, wrapped, folder, meter, ranks)
            size = save(parts, wrapped, folder, meter)
            import_scoring(parts, meter)
            scored = evaluate(parts, inputs, wrapped.scorer, meter, answers_of(cfg) if folder is not None else None)
        result, predictions = record.assemble(parts, inputs, trained, size, scored, meter, about, shared), scored.predictions
    except (MemoryError, RuntimeError) as error:
        if ranks.joined or not out_of_memory(error):
            raise
        turns.passed()
        result, predictions = record.oom_result(cfg, str(error).splitlines()[0], machine.hardware(meter.device)), []
    finally:
        turns.leave()
    if folder is not None:
        record.write(folder, cfg, result, predictions)
        discard_training(cfg)
    return result


def set_up(parts: Parts, shared: Shared) -> dict[str, Any]:
    """Import and set up what the cell needs before its first step, so that it is booked to start-up. Returns the process's provenance."""
    about = machine.provenance()
    if not parts.method.answers_without_model:
        import_transformers()
    per_row.of(parts.settings.task)  # it may be refused
    if shared.at_once > 1 or parts.device.type in MEASURED_WITH_IMPORTS:
        answers.preload(parts.settings.task)
    if shared.threads:
        import torch

        torch.set_num_threads(shared.threads)
    return about


def import_scoring(parts: Parts, meter: Meter) -> None:
    """Import what scores answers, before the first are scored: a second or more, which no step waits for. Booked to start-up, as all imports are."""
    with meter.phase("startup"):
        answers.preload(parts.settings.task)


@dataclass(frozen=True)
class Wrapped:
    """A base with what the method adds to it.

    scorer: answers with the model as it stands (`scorer.model`), and takes the cell's notes. state: what the method keeps besides weights.
    dtype: of the base's weights. size: of what was wrapped; nothing is served yet.
    """

    scorer: Scorer
    state: Any
    dtype: Any
    size: Size


def wrap(parts: Parts, inputs: Inputs, meter: Meter) -> Wrapped:
    """The base as training begins with it, and how it answers. Raises UserError where a text that is to be answered is too long."""
    method, settings, rows, base = parts.method, parts.settings, inputs.rows, inputs.base
    model_bytes, attention, whole = memory_bytes(base), attention_of(base), block_weights(base)
    dtype = base.dtype
    with named(parts):
        with _learning(meter) if method.prepares else contextlib.nullcontext():
            state = method.prepare([parts.objective.label_example(row, settings.task) for row in rows.train], parts.cfg.seed, base)
            model = method.wrap(base)
        if parts.objective.scalar_head:
            rewards.attach(model)
    trainable, total = parameters(model)
    size = Size(trainable if method.trains else 0, total, 0, model_bytes, attention=attention, quantised_share=share(quantised_weights(model), whole),
                reached_share=share(method.reached_weights(model), whole))
    scorer = Scorer(model, inputs.encoder, settings.task, _prompt(parts, state), settings.evaluate.batch_tokens, parts.device, parts.dtype,
                    [*inputs.notes, *passed_over(base, size)], parts.objective.reasoning)

    def validated(candidate: Any) -> tuple[float, float | None]:
        import_scoring(parts, meter)
        scorer.prompt = _prompt(parts, candidate)
        return validate(scorer, rows.validation)

    with meter.phase("validate"):
        state = method.choose(state, validated)
    scorer.prompt = _prompt(parts, state)
    if parts.objective.selection:
        scorer = selecting(scorer, parts.objective.selection, parts.cfg)
    with turns.away():
        scorer.notes += scorer.check({split: asked for split, asked in rows.scored.items() if parts.wants(split.partition("/")[0])})
    return Wrapped(scorer, state, dtype, size)


@contextlib.contextmanager
def _learning(meter: Meter) -> Iterator[None]:
    """What is made of training rows before the first step (EVA's directions, calibrated ranks) is training, and is timed as it is."""
    turns.passed()
    with turns.alone(), meter.phase("train"):
        yield


def passed_over(base: Any, size: Size) -> list[str]:
    """Notes on the shares of a mixture of experts, whose experts most methods pass over: they are one tensor and no linear layers; and on layers that
    transformers does not round (T5's)."""
    kept, experts = getattr(base, "_keep_in_fp32_modules", None), has_experts(base)
    if kept and not experts and size.quantised_share is not None and size.quantised_share < WHOLE:
        return [f"{size.quantised_share:.0%} of the weights of the blocks is rounded to 8 or 4 bits; transformers keeps {', '.join(sorted(kept))} in fp32"]
    shares = {"is rounded to 8 or 4 bits": size.quantised_share, "is what the method reaches": size.reached_share}
    return [f"{part:.0%} of the weights of the blocks, those of their experts counted in, {what}"
            for what, part in shares.items() if part is not None and part < WHOLE and experts]


def _prompt(parts: Parts, state: Any) -> Callable[[str], str]:
    """What the technique makes of a row's prompt."""
    return lambda prompt: parts.method.prompt(parts.objective.prompt(prompt), state)


def train(parts: Parts, inputs: Inputs, wrapped: Wrapped, folder: Path | None, meter: Meter, ranks: Ranks = ALONE) -> Trained:
    """Train what there is to train. When this returns, nothing holds the optimiser's state or what the objective prepared."""
    method, objective, scorer, rows = parts.method, parts.objective, wrapped.scorer, inputs.rows
    if not method.trains:
        turns.passed()
        return Trained(Work(), None, [], [])
    with meter.phase("load"):
        with turns.away():
            examples = encoded(parts, inputs.encoder, rows.train, rows.rationales)
        turns.passed()
        scorer.notes += filter(None, [inputs.encoder.check("the training rows")])
        total = total_steps(parts.settings.train, len(examples))
        method.before_training(scorer.model, total)
        with meter.phase("warmup"), named(parts):
            prepared = objective.prepared(examples, TrainingContext(
                parts.cfg, parts.settings, scorer.model, inputs.encoder, rows.train, parts.device, parts.dtype, scorer_of, reward_reader))
        scorer.notes += prepared.notes
    def validated() -> tuple[float, float | None]:
        import_scoring(parts, meter)
        return validate(scorer, rows.validation)

    trained = take_packed(parts, scorer.model, meter) if folder is not None else None
    if trained is None:
        with meter.phase("load"):
            loop = LOOPS[objective.trainer](
                Run(scorer.model, method, objective, prepared.examples, parts.settings.train, parts.cfg.seed, total, parts.device, parts.dtype,
                    inputs.encoder.pad_id, ranks, prepared.online),
                validated, checkpoint_of(parts.cfg) if folder is not None else None, meter)
        trained = loop.train()
    ranks.leave()
    if not ranks.leads:
        raise Through
    scorer.notes += trained.notes
    work = trained.work
    if work.diverged_at is None and not _finite(scorer.model):  # the last step's loss is of the weights before it
        scorer.notes.append(f"training diverged: the weights were not finite after step {work.steps} of {total}")
        work = dataclasses.replace(work, diverged_at=work.steps)
    return dataclasses.replace(trained, teacher=prepared.teacher, work=work)


def _finite(model: Any) -> bool:
    return all(bool(p.detach().isfinite().all()) for p in model.parameters() if p.requires_grad)


def take_packed(parts: Parts, model: Any, meter: Meter) -> Trained | None:
    """Give the model what a training that was packed with others (cell/packing.py) left for it; None where none waits, or it is damaged."""
    import torch

    with meter.phase("load"), torch.no_grad():
        packed = load_state(packed_of(parts.cfg)) if parts.cfg.pack else None
        if packed is None:
            return None
        for name, parameter in model.named_parameters():
            if name in packed["weights"]:
                parameter.copy_(packed["weights"][name])
    for phase in ("warmup", "train"):
        meter.add(phase, packed[f"{phase}_s"])
    slots = packed["slots"]
    notes = [*packed["notes"], f"trained packed, {slots} cells at once: training time is a share of theirs, memory was not measured"]
    kind = "gpu_reserved" if parts.device.type == "cuda" else "cpu_rss"
    return Trained(Work(**packed["work"]), Memory(kind, None), packed["history"], notes, slots)


def _write(parts: Parts, wrapped: Wrapped, folder: Path) -> None:
    """What serving needs besides the base."""
    model = wrapped.scorer.model
    rest = functools.partial(parts.method.save, model, wrapped.state, folder)
    rewards.save(model, folder, rest) if parts.objective.scalar_head else rest()


def save(parts: Parts, wrapped: Wrapped, folder: Path | None, meter: Meter) -> Size:
    """Make of the trained model the one that is served, and write its artefact."""
    method, scorer = parts.method, wrapped.scorer
    if method.trains:
        with meter.phase("save"):
            scorer.model = method.served(scorer.model, wrapped.dtype)
    scorer.notes += method.notes(scorer.model)
    artefact_bytes = 0
    if folder is not None:
        with meter.phase("save"):
            artefact_bytes = record.write_artefact(folder, parts.cfg, functools.partial(_write, parts, wrapped))
    return dataclasses.replace(wrapped.size, artefact_bytes=artefact_bytes, served_bytes=memory_bytes(scorer.model))
