"""Several runs at once over one frozen base, each in a slot; one that ends leaves its slot to the next.

Library of pipeline/search/trials.py and of packed cells. The shapes fit any row of the data, so nothing is captured again when runs
come and go. Every run has its own rows, learning rate, clipping and adapter; no number of another slot affects it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.core.settings import Train
from pipeline.data.choices import Items
from pipeline.data.rows import Encoded
from pipeline.engine.bind import Bound, bind
from pipeline.engine.layout import OpenShapes, length
from pipeline.engine.score import choice_scorer
from pipeline.engine.steps import ByHand, Stepper
from pipeline.measure.clock import Stopwatch
from pipeline.measure.memory import PeakMemory
from pipeline.records.results import rank_key
from pipeline.training.adapter_init import AdapterInit, Slots, Weights
from pipeline.training.loop import LOSS_EVERY, lr_factor, validation_steps

THREADS = 8  # that draw adapters


@dataclass(frozen=True)
class Job:
    """One run for a slot.

    name: for the caller; step: the examples of optimiser step n (from 0); init: makes the initial adapter; total: steps; settings: learning rate,
    schedule, weight decay, clipping and validations of this run.
    """

    name: Any
    step: Callable[[int], Sequence[Encoded]]
    init: Callable[[], AdapterInit]
    total: int
    settings: Train


@dataclass(eq=False)
class Running:
    """A run in its slot, and its results so far."""

    job: Job
    slot: int
    init: AdapterInit
    step: int = 0
    tokens: int = 0
    padding: float = 0.0
    """Its share of the pack's padding."""
    seconds: float = 0.0
    """Its share of the pack's time in steps."""
    history: list[dict[str, Any]] = field(default_factory=list)
    best: tuple[float, float] | None = None
    """results.rank_key of the best validation so far."""
    scores: Any = None
    """What `score` returned there."""
    weights: Weights = field(default_factory=dict)
    """Those of the best validation (if `keep`)."""
    notes: list[str] = field(default_factory=list)
    diverged_at: int | None = None
    pruned: bool = False

    def factor(self, step: int) -> float:
        settings = self.job.settings
        return lr_factor(step, self.job.total, settings.schedule, settings.warmup_share)

    @property
    def diverged(self) -> bool:
        return self.diverged_at is not None

    @property
    def ended(self) -> bool:
        return self.step >= self.job.total or self.diverged or self.pruned


@dataclass(frozen=True)
class Scored:
    """A validation: the metric and nll that choose among weights, and scores for the caller."""

    metric: float
    nll: float | None
    scores: Any = None


class Pack:
    """K runs at once.

    Args:
        template: a PEFT model that fits every run (AdapterInitializer.template); its base stays bound until `close`.
        slots, rank: K, and the highest rank.
        score: validates several runs at once.
        prune: called after every validation of a run; True ends the run there.
        keep: whether to keep a run's best weights.

    Raises:
        Unsupported: the model or adapter has no hand-written step. RuntimeError: out of memory, or it cannot be captured.
    """

    def __init__(self, template: Any, slots: int, rank: int, shapes: OpenShapes, pad_id: int, device: Any, dtype: Any,
                 score: Callable[[Pack, list[Running]], list[Scored]], prune: Callable[[Running], bool] = lambda _: False, keep: bool = False) -> None:
        self.bound: Bound = bind(template, dtype, slots=slots, rank=rank, accumulate=shapes.accumulates)
        self.slots, self.pad_id, self.device, self.score, self.prune, self.keep = slots, pad_id, device, score, prune, keep
        self.adapters = Slots(self.bound)
        self.stepper = Stepper(ByHand(self.bound), shapes, pad_id, device)
        self.active: dict[int, Running] = {}
        self.steps = 0
        self.stopped = False
        self._pending: list[tuple[torch.Tensor, list[tuple[Running, int]]]] = []
        for slot in range(slots):
            self.bound.buffer.clear(slot)

    def stop(self, _: int) -> None:
        """On a signal: `run` ends after the step at hand, with KeyboardInterrupt."""
        self.stopped = True

    def warm(self) -> None:
        self.stepper.warm()

    def run(self, take: Callable[[int], list[Job]], done: Callable[[Running], None]) -> None:
        """Run jobs until none is left. take(n): at most n more jobs, for the free slots; done: called with each run that ended."""
        watch = Stopwatch(self.device)
        while True:
            self._fill(take)
            if not self.active:
                return
            watch.lap(wait=False)
            self._step()
            running = list(self.active.values())
            if self.device.type != "cuda" or self.steps % LOSS_EVERY == 0 or any(self._due(r) or r.ended for r in running):
                self._record_losses()
            seconds = watch.lap(wait=False)
            for each in running:
                each.seconds += seconds / len(running)
            if self.stopped:
                raise KeyboardInterrupt
            self._validate([r for r in running if self._due(r) and not r.diverged])
            ended = [r for r in running if r.ended]
            self._score([r for r in ended if r.best is None])
            for each in ended:
                self._end(each)
                done(each)

    def choice_log_likelihoods(self, running: Sequence[Running], items: Items, batch_tokens: int) -> list[list[list[float]]]:
        """By run: as pipeline.scoring.scorer.choice_log_likelihoods. batch_tokens: most tokens of a pass, all runs together."""
        with torch.no_grad():
            return choice_scorer(self.bound.llama, [r.slot for r in running], self.slots, batch_tokens, self.pad_id).scores(items)

    def close(self) -> None:
        """Free the graphs and give the base its weights back."""
        self.stepper.close()
        self.bound.release()

    def _fill(self, take: Callable[[int], list[Job]]) -> None:
        free = [slot for slot in range(self.slots) if slot not in self.active]
        jobs = take(len(free)) if free else []
        with ThreadPoolExecutor(min(THREADS, max(1, len(jobs)))) as pool:
            inits = list(pool.map(lambda job: job.init(), jobs))
        buffer = self.bound.buffer
        for slot, job, init in zip(free, jobs, inits, strict=False):
            self.adapters.put(slot, init)
            buffer.weight_decay[slot], buffer.max_norm[slot] = job.settings.weight_decay, job.settings.max_grad_norm
            self.active[slot] = Running(job, slot, init)

    def _step(self) -> None:
        parts: list[Sequence[Encoded]] = [()] * self.slots
        rates = [0.0] * self.slots
        for slot, run in self.active.items():
            parts[slot] = run.job.step(run.step)
            rates[slot] = run.job.settings.learning_rate * run.factor(run.step)
        loss, _, padding = self.stepper.step(parts, rates)
        self.steps += 1
        for slot, run in self.active.items():
            run.step += 1
            run.tokens += sum(map(length, parts[slot]))
            run.padding += padding / len(self.active)
        self._pending.append((loss, [(run, run.step) for run in self.active.values()]))

    def _record_losses(self) -> None:
        """Add the losses to the runs' histories; one that is not finite ends its run, as in a single run."""
        losses = torch.stack([loss for loss, _ in self._pending]).tolist()
        for values, (_, runs) in zip(losses, self._pending, strict=True):
            for run, step in runs:
                value = values[run.slot]
                if run.diverged:
                    continue
                if math.isfinite(value):
                    run.history.append({"step": step, "loss": value, "lr": run.job.settings.learning_rate * run.factor(step - 1)})
                else:
                    run.diverged_at = step
                    run.notes.append(f"training diverged: the loss was not finite at step {step} of {run.job.total}")
        self._pending.clear()

    def _due(self, run: Running) -> bool:
        return run.step in validation_steps(run.job.total, run.job.settings.validations)

    def _validate(self, due: list[Running]) -> None:
        for run, scored in zip(due, self.score(self, due) if due else [], strict=True):
            run.history[-1].update({"validation_metric": scored.metric, "validation_nll": scored.nll})
            if run.best is None or rank_key(scored.metric, scored.nll) > run.best:
                run.best, run.scores = rank_key(scored.metric, scored.nll), scored.scores
                run.weights = self.adapters.take(run.slot, run.init.weights) if self.keep else {}
            run.pruned = run.step < run.job.total and self.prune(run)

    def _score(self, ended: list[Running]) -> None:
        """Score runs that were never validated with their last weights."""
        for run, scored in zip(ended, self.score(self, ended) if ended else [], strict=True):
            run.scores = scored.scores
            run.weights = self.adapters.take(run.slot, run.init.weights) if self.keep else {}

    def _end(self, run: Running) -> None:
        self.bound.buffer.clear(run.slot)
        del self.active[run.slot]


def slot_bytes(template: Any, rank: int, shapes: OpenShapes, pad_id: int, device: Any, dtype: Any) -> int:
    """Bytes that one slot takes: its parameters and optimiser state, and its part of a step over the widest shape (`shapes`: of two slots)."""
    program = ByHand(bind(template, dtype, slots=shapes.slots, rank=rank, accumulate=shapes.accumulates))
    buffer, memory = program.buffer, PeakMemory(device)
    memory.start()
    stepper = Stepper(program, shapes, pad_id, device)
    widest = stepper.inputs[max(stepper.inputs)]
    program.set_up(shapes.slots * widest.shape.rows, widest.shape.width + program.virtual, False)
    program.run(widest)
    step = memory.stop()
    stepper.close()
    program.release()
    numbers = sum(x.numel() * x.element_size() for x in (buffer.master, *buffer.moments, buffer.compute, buffer.raw, buffer.sum) if x is not None)
    return (numbers + max(0, (step.peak_bytes or 0) - (step.baseline_bytes or 0))) // shapes.slots
