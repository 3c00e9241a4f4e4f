"""The runs of the race's cache: seeds of a technique on a task and a base, packed, or one after another through one capture of the step.

Library of benchmarks/race_fill.py. Nothing is written here, and no cell's result made: a run's line is its validation curve, which test rows it answered
right, and its seconds.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.race_cache import packed
from benchmarks.set_up import right_rows
from pipeline.methods.base import QUANTISED
from pipeline.training.stepping import Run

CHECKS = 4
"""Validations of a run, evenly spread."""


class Bases:
    """The last base that a process has used, on its device as its precision wants it; jobs are given copies."""

    def __init__(self, shared: Any) -> None:
        self.shared = shared
        self._held: tuple[Any, Any] | None = None

    def copy(self, parts: Any) -> Any:
        """The untouched base of a cell."""
        from pipeline.cell.inputs import load_base

        key = parts.model, parts.precision
        if self._held is None or self._held[0] != key:
            self._held = None
            own = dataclasses.replace(self.shared, stored={parts.model: copy.deepcopy(self.shared.stored[parts.model])})
            self._held = key, load_base(parts, own)
        return copy.deepcopy(self._held[1])

    @staticmethod
    def clean() -> None:
        """Free the device's memory."""
        import torch

        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def runs(words: Sequence[str], seeds: Sequence[int], bases: Bases, most: int) -> Iterator[dict[str, Any]]:
    """The lines of a technique's seeds, at most `most` of them at once where they are packed."""
    from pipeline.core.compose import compose
    from pipeline.engine.parts import Unsupported
    from pipeline.search.space import at

    cfg = compose([*words, f"seed={seeds[0]}"])
    cells = [at(cfg, {"seed": seed}) for seed in seeds]
    with contextlib.suppress(Unsupported):
        yield from at_once(cells, bases, most)
        return
    with contextlib.closing(Captured(cells, bases)) as captured:
        for number in range(len(cells)):
            yield captured.line(number)


def at_once(cells: Sequence[Any], bases: Bases, most: int) -> list[dict[str, Any]]:
    """Seeds of an adapter, trained at once; each is scored on the test rows after its last step. Raises Unsupported."""
    from pipeline.cell.packing import Packing
    from pipeline.measure.clock import Stopwatch

    packing = Packing(cells, bases.shared)
    if packing.parts.precision not in QUANTISED:  # which are read from the disk
        packing.shared = dataclasses.replace(bases.shared, stored={packing.parts.model: bases.copy(packing.parts)})
    packing.parts = dataclasses.replace(packing.parts, splits=("validation", "test"))
    tests: dict[int, dict[str, Any]] = {}
    own = packing.score

    def score(pack: Any, running: list[Any]) -> list[Any]:
        ending = [run for run in running if run.step >= run.job.total]
        asked = [_asks_test(run) for run in ending]
        for run, predictions in zip(ending, packing._predict(pack, asked) if asked else [], strict=True):
            tests[run.job.name.cfg.seed] = _counted(predictions, packing.parts.settings.task)
        return own(pack, running)

    packing.score = score  # type: ignore[method-assign]
    made: list[Any] = []
    watch = Stopwatch(packing.parts.device)
    slots = min(most, packing.slots(len(cells)))
    pack = packing.open(slots, len(cells))
    setup_s = watch.lap()
    left = [packing.job(cfg) for cfg in cells]

    def take(free: int) -> list[Any]:
        taken, left[:] = left[:free], left[free:]
        return taken

    try:
        pack.run(take, made.append)
    finally:
        pack.close()
    each = watch.lap() / len(cells)
    return [line_of(run.job.name.cfg, run.history, run.job.total, run.diverged_at, tests.get(run.job.name.cfg.seed), each, setup_s, slots) for run in made]


def _asks_test(run: Any) -> Any:
    """The run with test rows in the place of the validation rows, for `Packing._predict`."""
    member = run.job.name
    rows = dataclasses.replace(member.rows, validation=member.rows.test)
    return SimpleNamespace(slot=run.slot, init=run.init, job=SimpleNamespace(name=dataclasses.replace(member, rows=rows)))


def _counted(predictions: Sequence[dict], task: Any) -> dict[str, Any]:
    from pipeline.scoring import answers

    score, right = answers.score(predictions, task), np.array([bool(p["correct"]) for p in predictions])
    return {"rows": len(right), "right": int(right.sum()), "nll": None if score.nll is None else round(score.nll, 4), "bits": packed(right)}


@dataclass(frozen=True)
class Seeds(Run):
    """The runs of several seeds, one after another, as one run to the engine, which makes its shapes for the rows of all.

    rows_of: each seed's examples; numbers: the seeds; total: steps of all of them.
    """

    rows_of: Sequence[Sequence[Sequence[Any]]] = ()
    numbers: Sequence[int] = ()

    def step_examples(self, step: int) -> list[Any]:
        from pipeline.data.rows import step_rows

        at, step = divmod(step, self.total // len(self.rows_of))
        rows = self.rows_of[at]
        return [example for r in step_rows(len(rows), self.settings.batch_size, self.numbers[at], step) for example in rows[r]]


class Captured:
    """Seeds of a technique one after another, through one capture of the step where the technique allows it, else each built anew.

    Args:
        cells: configs that differ in the seed alone.
    """

    def __init__(self, cells: Sequence[Any], bases: Bases) -> None:
        from pipeline.measure.clock import Stopwatch

        self.cells, self.bases, self.watch = cells, bases, Stopwatch()
        self.stepping: Any = None
        self.anew = True
        """Whether each seed has to be built from the base on."""
        self.same_start: bool | None = None
        """Whether seeds begin at the same weights; None: not known yet."""
        self.setup_s = 0.0
        self.fixed: dict[str, Any] | None = None
        """The line of every seed, where all answer the same."""

    def line(self, number: int) -> dict[str, Any]:
        """Train the seed and score it."""
        if self.fixed is not None:
            return self.fixed | {"seed": self.cells[number].seed}
        self.watch.lap()
        if number == 0 or self.anew:
            self._build(range(number, len(self.cells)))
            self.first, self.setup_s = number, self.watch.lap()
        else:
            self._begin(number)
        cfg, marks, history = self.cells[number], self._marks(), []
        losses: list[Any] = []
        if self.run is None:
            seen = right_rows(self.scorer, self.rows.validation)
            history = [_check(step, seen) for step in marks]
        else:
            import torch

            from pipeline.training.loop import lr_factor

            settings = self.run.settings
            for step in range(self.total):
                factor = lr_factor(step, self.total, settings.schedule, settings.warmup_share)
                losses.append(self.stepping.step((number - self.first) * self.total + step, factor)[0])
                if step + 1 in marks:
                    values = torch.stack(losses).tolist()
                    if bad := next((at for at, value in enumerate(values, 1) if not math.isfinite(value)), None):
                        return line_of(cfg, history, self.total, bad, None, self.watch.lap(), self.setup_s, 1)
                    history.append(_check(step + 1, right_rows(self.scorer, self.rows.validation)))
        line = line_of(cfg, history, self.total, None, right_rows(self.scorer, self.rows.test), self.watch.lap(), self.setup_s, 1)
        self.fixed = line if line.get("fixed") else None
        return line

    def _marks(self) -> list[int]:
        from pipeline.training.loop import validation_steps

        return sorted(validation_steps(self.total, CHECKS)) if self.run is not None else list(range(1, CHECKS + 1))

    def _parts(self, number: int, splits: tuple[str, ...] = ("validation", "test")) -> tuple[Any, Any]:
        """(parts, rows as the objective wants them) of a seed; the same test rows for all seeds, so that they need not be read for each."""
        from pipeline.cell.inputs import build_parts, check, load_task, load_taught, training_rows

        parts = build_parts(self.cells[number], splits)
        check(parts)
        rows = dataclasses.replace(load_task(parts, parts.cfg.seed, parts.cfg.train_rows), rationales=load_taught(parts))
        return parts, training_rows(parts, rows)[0]

    def _build(self, numbers: Sequence[int]) -> None:
        """The first of these seeds, and a run over all of them."""
        import torch

        from pipeline.cell.inputs import Inputs, load_encoder
        from pipeline.cell.run import wrap
        from pipeline.measure.clock import Meter
        from pipeline.training.loop import total_steps
        from pipeline.training.stepping import choose

        self.close()
        parts, self.rows = self._parts(numbers[0])
        base = self.bases.copy(parts)
        self.encoder = load_encoder(parts, self.bases.shared, base)
        torch.manual_seed(parts.cfg.seed)
        self.scorer = _reading_once(wrap(parts, Inputs(self.rows, len(self.rows.train), None, base, self.encoder), Meter(None)).scorer)
        self.run, self.total = None, CHECKS
        if not parts.method.trains:
            return
        reuse = not (parts.method.prepares or parts.method.chooses or parts.method.acts_between_steps)
        train, numbers = parts.settings.train, numbers if reuse else numbers[:1]
        every = [self._examples(number) for number in numbers]
        self.total = total_steps(train, len(every[0]))
        parts.method.before_training(self.scorer.model, self.total)
        seeds = [self.cells[number].seed for number in numbers]
        self.run = Seeds(self.scorer.model, parts.method, parts.objective, [], train, parts.cfg.seed, self.total * len(every), parts.device, parts.dtype,
                         self.encoder.pad_id, rows_of=every, numbers=seeds)
        torch.manual_seed(parts.cfg.seed)
        self.stepping = choose(self.run)
        self.anew = not reuse or self.stepping.engine == "eager"
        if not self.anew:
            self.start, self.same_start = self.stepping.program.buffer.master.clone(), True if parts.cfg.technique.name in DECOMPOSED else None

    def _examples(self, number: int) -> list[list[Any]]:
        """A seed's examples, prepared."""
        from pipeline.cell.inputs import encoded
        from pipeline.objectives.base import TrainingContext
        from pipeline.serving.artefact import scorer_of

        parts, rows = self._parts(number, ())
        examples = encoded(parts, self.encoder, rows.train, rows.rationales)
        context = TrainingContext(parts.cfg, parts.settings, self.scorer.model, self.encoder, rows.train, parts.device, parts.dtype, scorer_of)
        prepared: list[list[Any]] = parts.objective.prepared(examples, context).examples
        return prepared

    def _begin(self, number: int) -> None:
        """The state of a run that has not begun, at the weights that this seed begins at."""
        buffer = self.stepping.program.buffer
        for tensor in (*buffer.moments, buffer.count, buffer.raw, *([buffer.sum] if buffer.sum is not None else [])):
            tensor.zero_()
        buffer.seed.fill_(self.cells[number].seed)
        buffer.master.copy_(self.start)
        if not self.same_start:
            self._put(self._initial(number))
            self.same_start = self.same_start is None and bool((buffer.master == self.start).all())
        buffer.sync()

    def _initial(self, number: int) -> dict[str, Any]:
        """The trained weights that a seed begins at, by name."""
        import torch

        from pipeline.cell.inputs import build_parts

        parts = build_parts(self.cells[number])
        base = self.bases.copy(parts)
        torch.manual_seed(parts.cfg.seed)
        model = parts.method.wrap(base)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def _put(self, weights: dict[str, Any]) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in self.scorer.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(weights[name])

    def close(self) -> None:
        """Free what only steps need, and the model."""
        if self.stepping is not None:
            self.stepping.close()
        self.stepping = self.run = self.scorer = self.start = None
        self.bases.clean()


DECOMPOSED = ("pissa", "loftq")
"""Techniques that begin at a decomposition of the base, whatever the seed: to see that another seed begins there takes as long as the first, a minute."""
FIXED = ("zero_shot",)
"""Techniques of which every seed answers the same."""


def _reading_once(scorer: Any) -> Any:
    """The scorer, which keeps the tokens of rows that it has read."""
    read_rows: dict[int, tuple[Any, Any]] = {}
    own: Callable[[Any], Any] = scorer.items

    def items(rows: Any) -> Any:
        if id(rows) not in read_rows:
            read_rows[id(rows)] = rows, own(rows)
        return read_rows[id(rows)][1]

    scorer.items = items
    return scorer


def _check(step: int, seen: dict[str, Any]) -> dict[str, Any]:
    return {"step": step, "validation_metric": seen["right"] / seen["rows"], "validation_nll": seen["nll"]}


def line_of(cfg: Any, history: Sequence[dict[str, Any]], steps: int, diverged_at: int | None, test: dict[str, Any] | None, seconds: float,
            setup_s: float, slots: int) -> dict[str, Any]:
    """A run's line; one that diverged has no test rows."""
    from pipeline.models import rates

    checked = [point for point in history if point.get("validation_metric") is not None]
    curve = [[round(point["step"] / steps, 4), round(point["validation_metric"], 5), point["validation_nll"] and round(point["validation_nll"], 4)]
             for point in checked]
    line = {"seed": cfg.seed, "lr": rates.read(cfg).train.learning_rate, "train_rows": cfg.train_rows, "steps": steps, "diverged_at": diverged_at,
            "seconds": round(seconds, 3), "setup_s": round(setup_s, 3), "slots": slots, "source": "measured", "curve": curve}
    if cfg.technique.name in FIXED:
        line["fixed"] = True
    if diverged_at is None and (test is None or len(curve) < CHECKS):
        return line | {"diverged_at": steps}
    return line if diverged_at is not None else line | {"test": test}
