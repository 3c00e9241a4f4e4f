"""Several runs at once over one frozen base: each has a slot of its own, and one that ends leaves it to the next.

Library of pipeline/search/trials.py and of packed cells. The shapes hold any row of the data, so nothing is captured anew when runs
come and go. A run's rows, learning rate, clipping and adapter are its own; what another slot holds does not reach it.
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
from pipeline.engine.score import reader
from pipeline.engine.steps import ByHand, Stepper
from pipeline.measure.clock import Stopwatch
from pipeline.measure.memory import PeakMemory
from pipeline.training.loop import LOSS_EVERY, lr_factor, validation_steps
from pipeline.training.starts import Slots, Start, Weights

THREADS = 8  # that draw adapters


@dataclass(frozen=True)
class Job:
    """One run for a slot.

    name: the caller's; step: the examples of optimiser step n (from 0); start: gives the adapter; total: steps; settings: learning rate, schedule,
    weight decay, clipping and validations are the run's own.
    """

    name: Any
    step: Callable[[int], Sequence[Encoded]]
    start: Callable[[], Start]
    total: int
    settings: Train


@dataclass(eq=False)
class Running:
    """A run in its slot, and what is left of it."""

    job: Job
    slot: int
    start: Start
    step: int = 0
    tokens: int = 0
    padding: float = 0.0
    """Its share of the pack's padding."""
    seconds: float = 0.0
    """Its share of the pack's time in steps."""
    history: list[dict[str, float]] = field(default_factory=list)
    best: tuple[float, float] | None = None
    """(metric, -nll) of the best validation so far."""
    found: Any = None
    """What `score` gave there."""
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
    """Of a validation: the metric and nll that choose among weights, and what the caller keeps of it."""

    metric: float
    nll: float
    found: Any = None


class Pack:
    """K runs at once.

    Args:
        template: a PEFT model with room for every run (starts.Starts.template); its base stays bound until `close`.
        slots, rank: K, and the highest rank.
        score: validates the runs that it is given, in one go.
        prune: told of every validation; True ends the run there.
        keep: whether a run's best weights are wanted.

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
        """Set (by a signal, say) to end `run` after the step at hand with KeyboardInterrupt."""
        self._pending: list[tuple[torch.Tensor, list[tuple[Running, int]]]] = []
        for slot in range(slots):
            self.bound.flat.clear(slot)

    def warm(self) -> None:
        """Capture the steps."""
        self.stepper.warm()

    def run(self, take: Callable[[int], list[Job]], done: Callable[[Running], None]) -> None:
        """Run jobs until none is left. take(n): at most n further jobs, for the slots that are free; done: told of each that ended."""
        watch = Stopwatch(self.device)
        while True:
            self._fill(take)
            if not self.active:
                return
            watch.lap(wait=False)
            self._step()
            running = list(self.active.values())
            if self.device.type != "cuda" or self.steps % LOSS_EVERY == 0 or any(self._due(r) or r.ended for r in running):
                self._read()
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
        """By run: what pipeline.scoring.scorer.choice_log_likelihoods gives for it. batch_tokens: most tokens of a pass, all runs together."""
        with torch.no_grad():
            return reader(self.bound.llama, [r.slot for r in running], self.slots, batch_tokens, self.pad_id).scores(items)

    def close(self) -> None:
        """Free the graphs and give the base its weights back."""
        self.stepper.close()
        self.bound.release()

    def _fill(self, take: Callable[[int], list[Job]]) -> None:
        free = [slot for slot in range(self.slots) if slot not in self.active]
        jobs = take(len(free)) if free else []
        with ThreadPoolExecutor(min(THREADS, max(1, len(jobs)))) as pool:
            starts = list(pool.map(lambda job: job.start(), jobs))
        flat = self.bound.flat
        for slot, job, start in zip(free, jobs, starts, strict=False):
            self.adapters.put(slot, start)
            flat.weight_decay[slot], flat.max_norm[slot] = job.settings.weight_decay, job.settings.max_grad_norm
            self.active[slot] = Running(job, slot, start)

    def _step(self) -> None:
        parts: list[Sequence[Encoded]] = [()] * self.slots
        rates = [0.0] * self.slots
        for slot, run in self.active.items():
            parts[slot] = run.job.step(run.step)
            rates[slot] = run.job.settings.lr * run.factor(run.step)
        loss, _, padding = self.stepper.step(parts, rates)
        self.steps += 1
        for slot, run in self.active.items():
            run.step += 1
            run.tokens += sum(map(length, parts[slot]))
            run.padding += padding / len(self.active)
        self._pending.append((loss, [(run, run.step) for run in self.active.values()]))

    def _read(self) -> None:
        """Losses to the runs' histories; one that is not finite ends its run, as it ends a run of its own."""
        losses = torch.stack([loss for loss, _ in self._pending]).tolist()
        for values, (_, runs) in zip(losses, self._pending, strict=True):
            for run, step in runs:
                value = values[run.slot]
                if run.diverged:
                    continue
                if math.isfinite(value):
                    run.history.append({"step": step, "loss": value, "lr": run.job.settings.lr * run.factor(step - 1)})
                else:
                    run.diverged_at = step
                    run.notes.append(f"training diverged: the loss was not finite at step {step} of {run.job.total}")
        self._pending.clear()

    def _due(self, run: Running) -> bool:
        return run.step in validation_steps(run.job.total, run.job.settings.validations)

    def _validate(self, due: list[Running]) -> None:
        for run, scored in zip(due, self.score(self, due) if due else [], strict=True):
            run.history[-1].update({"validation_metric": scored.metric, "validation_nll": scored.nll})
            if run.best is None or (scored.metric, -scored.nll) > run.best:
                run.best, run.found = (scored.metric, -scored.nll), scored.found
                run.weights = self.adapters.take(run.slot, run.start.weights) if self.keep else {}
            run.pruned = run.step < run.job.total and self.prune(run)

    def _score(self, ended: list[Running]) -> None:
        """Runs that were never validated stand with their last weights."""
        for run, scored in zip(ended, self.score(self, ended) if ended else [], strict=True):
            run.found = scored.found
            run.weights = self.adapters.take(run.slot, run.start.weights) if self.keep else {}

    def _end(self, run: Running) -> None:
        self.bound.flat.clear(run.slot)
        del self.active[run.slot]


def slot_bytes(template: Any, rank: int, shapes: OpenShapes, pad_id: int, device: Any, dtype: Any) -> int:
    """Bytes that one slot takes: its numbers, and its part of a step over the widest shape (`shapes`: of two slots)."""
    program = ByHand(bind(template, dtype, slots=shapes.slots, rank=rank, accumulate=shapes.accumulates))
    flat, memory = program.flat, PeakMemory(device)
    memory.start()
    stepper = Stepper(program, shapes, pad_id, device)
    widest = stepper.inputs[max(stepper.inputs)]
    program.prepare(shapes.slots * widest.shape.rows, widest.shape.width + program.virtual, False)
    program.run(widest)
    step = memory.stop()
    stepper.close()
    program.release()
    numbers = sum(x.numel() * x.element_size() for x in (flat.master, *flat.moments, flat.compute, flat.raw, flat.sum) if x is not None)
    return (numbers + max(0, (step.peak_bytes or 0) - (step.baseline_bytes or 0))) // shapes.slots
