"""The one training loop. It names no technique: a method says what is trained, an objective what is minimised.

Library. Data order, dropout and schedule are functions of the seed and the step, and a checkpoint holds parameters,
optimiser state, random generators and the best weights so far, so a run that was killed and started again ends with
the weights of one that was not (bitwise on the CPU).
"""

from __future__ import annotations

import contextlib
import math
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core import progress
from pipeline.core.files import atomic_path
from pipeline.core.settings import Train
from pipeline.data.rows import steps_in_epoch
from pipeline.measure import turns
from pipeline.measure.clock import Meter, Stopwatch
from pipeline.measure.energy import Energy
from pipeline.measure.memory import Memory, PeakMemory, out_of_memory
from pipeline.records.results import Teacher, Work, rank_key
from pipeline.training.stepping import Run, Stepping, choose

LONG_S, LARGE_BYTES = 20, 1 << 30
LOSS_EVERY = 10  # steps between readings of the loss on a GPU, where each reading waits for the device


@dataclass
class State:
    """What a checkpoint holds besides parameters, optimiser and generators."""

    step: int = 0
    tokens: int = 0
    padding: int = 0
    train_s: float = 0.0
    energy_j: float | None = None
    host_energy_j: float | None = None
    resumed: bool = False
    best: tuple[float, float] | None = None
    """results.rank_key of the best validation so far."""
    best_weights: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Trained:
    """What a training leaves; the model holds the selected weights. memory: None where nothing was trained."""

    work: Work
    memory: Memory | None
    history: list[dict[str, Any]]
    notes: list[str]
    slots: int | None = None
    """How many cells were trained at once; None: this one alone."""
    teacher: Teacher | None = None
    """Of an objective that asks a model before the first step."""


def total_steps(settings: Train, rows: int) -> int:
    """Optimiser steps of a run: `steps`, or as many as the epochs take, at least `min_steps` (none if there are 0 epochs)."""
    if settings.steps is not None:
        return settings.steps
    steps = math.ceil(settings.epochs * steps_in_epoch(rows, settings.batch_size))
    return max(steps, settings.min_steps or 0) if steps else 0


def lr_factor(step: int, total: int, schedule: str, warmup_share: float) -> float:
    """The learning rate's factor at optimiser step `step` (from 0): linear warm-up, then cosine or linear to 0, or constant."""
    warmup = round(total * warmup_share)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    left = (total - step) / max(1, total - warmup)
    return left if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))


def validation_steps(total: int, validations: int) -> set[int]:
    """After which optimiser steps (counted from 1) validation runs: evenly spread, the last after the last step."""
    return {math.ceil(total * (i + 1) / validations) for i in range(validations)} if total else set()


def load_state(path: Path) -> dict[str, Any] | None:
    """What torch.save wrote at `path`; None where nothing is there, or what is there is damaged: that is set aside, with a warning."""
    import torch

    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
        if out_of_memory(error) or isinstance(error, PermissionError):
            raise
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        print(f"warning: {path} is damaged ({type(error).__name__}) and was set aside as {aside.name}; the training begins anew", file=sys.stderr)
        return None
    return state


class Loop:
    """Trains a run's model on its examples.

    Args:
        validate: gives (metric, nll) of the model as it stands; runs outside training's time and memory.
        checkpoint: where to keep the state to resume from; None: nowhere.
    """

    def __init__(self, run: Run, validate: Callable[[], tuple[float, float | None]], checkpoint: Path | None, meter: Meter) -> None:
        self.run, self.validate, self.checkpoint, self.meter = run, validate, checkpoint, meter
        self.notes: list[str] = []
        self.diverged_at: int | None = None
        self.state = State()
        self.trainable = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
        self.stepping: Stepping
        self.memory, self.energy = PeakMemory(run.device), Energy(run.device)
        self._stop = False
        self._pending: list[tuple[int, Any]] = []

    def train(self) -> Trained:
        """Train from the checkpoint, or from the start, to the end. Raises KeyboardInterrupt after SIGTERM or SIGINT."""
        import torch

        run, on_gpu = self.run, self.run.device.type == "cuda"
        torch.manual_seed(run.seed)
        self.memory.start()
        with self.meter.phase("warmup"):
            self.stepping = choose(run)
        self.notes += self.stepping.notes
        self._resume()
        marks, state, saved = validation_steps(run.total, run.settings.validations), self.state, Stopwatch()
        times: list[float] = []
        progress.stage("train")
        with turns.alone(), stop_on_signals(self._request_stop), self._bar() as bar, self.meter.phase("train"):
            self.energy.start()
            lap = Stopwatch(run.device)
            for step in range(state.step, run.total):
                loss, tokens, padding = self.stepping.step(step, self._factor(step))
                state.step, state.tokens, state.padding = step + 1, state.tokens + tokens, state.padding + padding
                self._pending.append((state.step, loss))
                times.append(lap.lap(wait=not on_gpu))
                if not on_gpu or state.step % LOSS_EVERY == 0 or state.step in marks:
                    self._read_losses(bar)
                    if self.diverged_at is not None:
                        break
                if state.step in marks:
                    self._validate()
                if self._stop or saved.peek() >= run.settings.checkpoint_every_s:
                    self._save()
                    saved.lap()
                if self._stop:
                    raise KeyboardInterrupt
                bar.update()
                progress.part(state.step, run.total)
                self.energy.tick()
                lap.lap(wait=False)
            self._read_losses(bar)
            self.energy.stop()
            if self._worth_keeping():  # scoring may take longer still, and be interrupted
                self._save()
        memory = self.memory.stop()
        self.stepping.close()
        self._put(state.best_weights)  # without validation the last ones stand
        return Trained(self._work(times), memory, state.history, self.notes)

    def _worth_keeping(self) -> bool:
        """Whether the end of a training is written down, too: where it took long, and is not large."""
        size = sum(p.numel() * p.element_size() for p in self.trainable.values())
        return self.diverged_at is None and self.state.train_s + self.meter.seconds("train") >= LONG_S and size <= LARGE_BYTES

    def _factor(self, step: int) -> float:
        """What the learning rate is multiplied by at optimiser step `step` (from 0)."""
        return lr_factor(step, self.run.total, self.run.settings.schedule, self.run.settings.warmup_share)

    def _mark_diverged(self, what: str, step: int) -> None:
        """Mark the run as ended by `what` not being finite at a step."""
        self.diverged_at = step
        self.notes.append(f"training diverged: {what} was not finite at step {step} of {self.run.total}")

    def _read_losses(self, bar: Any) -> None:
        """Add the losses to the history, up to one that is not finite."""
        for step, loss in self._pending:
            if not math.isfinite(value := float(loss)):
                self._mark_diverged("the loss", step)
                break
            self.state.history.append({"step": step, "loss": value, "lr": self.run.settings.learning_rate * self._factor(step - 1)})
        self._pending.clear()
        if self.state.history:
            seconds = self.state.train_s + self.meter.seconds("train")
            bar.set_postfix(loss=f"{self.state.history[-1]['loss']:.3f}", tokens_per_s=f"{self.state.tokens / max(seconds, 1e-9):.0f}", refresh=False)

    def _validate(self) -> None:
        """Score validation and keep the weights if they are the best so far (ties: the lower nll)."""
        self.memory.pause()
        self.energy.pause()
        with self.meter.phase("validate"):
            metric, nll = self.validate()
            self.state.history[-1].update({"validation_metric": metric, "validation_nll": nll})
            if self.state.best is None or rank_key(metric, nll) > self.state.best:
                self.state.best = rank_key(metric, nll)
                self.state.best_weights = self._weights() if self.state.step < self.run.total else {}
        self.memory.resume()
        self.energy.resume()

    def _weights(self) -> dict[str, Any]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self.trainable.items()}

    def _put(self, weights: dict[str, Any]) -> None:
        """Give the trained parameters these values."""
        import torch

        with torch.no_grad():
            for name, value in weights.items():
                self.trainable[name].copy_(value)

    def _work(self, times: list[float]) -> Work:
        seconds = self.meter.seconds("train")
        seen = self.state.tokens + self.state.padding
        median = sorted(times)[len(times) // 2] if times and self.run.device.type != "cuda" else None
        return Work(
            steps=self.state.step, tokens=self.state.tokens, tokens_per_s=self.state.tokens / seconds if seconds and self.state.tokens else None,
            padding_share=self.state.padding / seen if seen else None, step_s_median=median,
            resumed=self.state.resumed, energy_note=self.energy.note, diverged_at=self.diverged_at, **{**self._engine(), **self.energy.joules()},
        )

    def _engine(self) -> dict[str, Any]:
        """The fields of Work that say how steps were made."""
        return {"engine": self.stepping.engine, "engine_reason": self.stepping.reason, "widths": self.stepping.widths, "streams": self.stepping.streams}

    def _save(self) -> None:
        """Write a checkpoint atomically; booked as `save`, out of the training memory."""
        import torch

        if not self.checkpoint:
            return
        self.memory.pause()
        self.energy.pause()
        device = self.run.device
        with self.meter.phase("save"):
            state = {**vars(self.state), **self.energy.joules(), "train_s": self.meter.seconds("train"), "best_weights": self.state.best_weights}
            rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}
            with atomic_path(self.checkpoint) as beside:
                torch.save({"state": state, "weights": self._weights(), "optimizer": self.stepping.state_dict(), "rng": rng}, beside)
        self.memory.resume()
        self.energy.resume()

    def _resume(self) -> None:
        import torch

        with self.meter.phase("load"):
            checkpoint = load_state(self.checkpoint) if self.checkpoint else None
            if checkpoint is None:
                return
            self._put(checkpoint["weights"])
            self.stepping.load_state_dict(checkpoint["optimizer"])
            torch.set_rng_state(checkpoint["rng"]["cpu"])
            if checkpoint["rng"]["cuda"] is not None:
                torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], self.run.device)
            self.state = State(**{**checkpoint["state"], "resumed": True})
        self.meter.add("train", self.state.train_s)
        self.energy.add(self.state.energy_j, self.state.host_energy_j)
        self.notes.append(f"resumed at step {self.state.step} of {self.run.total}")
        print(f"resuming at step {self.state.step} of {self.run.total}", file=sys.stderr)

    def _request_stop(self) -> None:
        self._stop = True

    def _bar(self) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self.run.total, initial=self.state.step, unit="step", disable=not self.run.settings.progress, leave=False,
            mininterval=0.5 if sys.stderr.isatty() else 20, desc="train",
        )


@contextlib.contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call `stop`, which ends a run after the step at hand; outside the main thread, where Python has no handlers, they do not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, lambda *_: stop()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
