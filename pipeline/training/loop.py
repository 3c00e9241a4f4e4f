"""The one training loop. It names no technique: a method says what is trained, an objective what is minimised.

Library. Data order, dropout and schedule are functions of the seed and the step, and a checkpoint holds parameters,
optimiser state, random generators and the best weights so far, so a run that was killed and started again ends with
the weights of one that was not (bitwise on the CPU). Several ranks (training/ranks.py) go through it in step: each does its part of every optimiser
step, all know the same losses, and the first validates and writes checkpoints.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.core import progress, signals
from pipeline.core.files import atomic_path
from pipeline.core.settings import Train
from pipeline.data.rows import steps_in_epoch
from pipeline.measure import turns
from pipeline.measure.clock import Meter, Stopwatch
from pipeline.measure.energy import Energy
from pipeline.measure.memory import Memory, PeakMemory
from pipeline.records.parallel import Parallel
from pipeline.records.results import Teacher, Work, rank_key
from pipeline.training import sharded
from pipeline.training.checkpoint import check_kind, load_state
from pipeline.training.sharded import Sharded
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
        torch.manual_seed(run.ranks.seed(run.seed))
        self.memory.start()
        with self.meter.phase("warmup"):
            self.stepping = Sharded(run) if run.settings.parallel == "fsdp" and run.ranks.joined else choose(run)
        self.notes += self.stepping.notes
        self.trainable = self.stepping.shards or self.trainable
        self._ready()
        self._resume()
        marks, state, saved = validation_steps(run.total, run.settings.validations), self.state, Stopwatch()
        times: list[float] = []
        progress.stage("train")
        with turns.alone(), signals.handled(self._request_stop), self._bar() as bar, self.meter.phase("train"):
            self.energy.start()
            lap = Stopwatch(run.device)
            for step in range(state.step, run.total):
                loss, tokens, padding = self.stepping.step(step, self._factor(step))
                stops, saves, tokens, padding = self._agreed(saved.peek() >= run.settings.checkpoint_every_s, tokens, padding)
                state.step, state.tokens, state.padding = step + 1, state.tokens + tokens, state.padding + padding
                self._pending.append((state.step, loss))
                times.append(lap.lap(wait=not on_gpu))
                if not on_gpu or state.step % LOSS_EVERY == 0 or state.step in marks:
                    self._read_losses(bar)
                    if self.diverged_at is not None:
                        break
                if state.step in marks:
                    self._validate()
                if stops or saves:
                    self._save()
                    saved.lap()
                if stops:
                    raise KeyboardInterrupt
                bar.update()
                progress.part(state.step, run.total)
                self.energy.tick()
                lap.lap(wait=False)
            self._read_losses(bar)
            self.energy.stop()
            if run.ranks.from_first(self._worth_keeping()):  # scoring may take longer still, and be interrupted
                self._save()
        memory = self.memory.stop()
        self.stepping.gather()
        self._put(state.best_weights)  # without validation the last ones stand
        self.stepping.close()
        work = self._work(times)
        peaks = run.ranks.gathered(memory.peak_bytes)
        if run.ranks.joined:
            work = self._shared_work(work, peaks)
        return Trained(work, replace(memory, peak_bytes=max(peaks) if None not in peaks else None), state.history, self.notes)

    def _ready(self) -> None:
        """What is done once before the first step, when steps can be made."""

    def _worth_keeping(self) -> bool:
        """Whether the end of a training is written down, too: where it took long, and is not large."""
        size = sum(p.numel() * p.element_size() for p in self.trainable.values())
        return self.diverged_at is None and self.state.train_s + self.meter.seconds("train") >= LONG_S and size <= LARGE_BYTES

    def _agreed(self, saves: bool, tokens: int, padding: int) -> tuple[bool, bool, int, int]:
        """(whether a rank was told to stop, whether the first one wants a checkpoint, the step's tokens and padding on all ranks)."""
        ranks = self.run.ranks
        told, wants, tokens_sum, padding_sum = ranks.totals([self._stop, saves and ranks.leads, tokens, padding])
        return bool(told), bool(wants), int(tokens_sum), int(padding_sum)

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
        ends = self.state.step == self.run.total  # nothing is timed any more then
        with turns.between(again=not ends), self.meter.phase("validate"):
            with self.stepping.whole():
                scored = self.validate() if self.run.ranks.leads else None
            metric, nll = self.run.ranks.from_first(scored)
            progress.validated(metric)
            self.state.history[-1].update({"validation_metric": metric, "validation_nll": nll})
            if self.state.best is None or rank_key(metric, nll) > self.state.best:
                self.state.best = rank_key(metric, nll)
                own = self.run.ranks.leads or self.stepping.shards is not None
                self.state.best_weights = self._weights() if own and self.state.step < self.run.total else {}
        self.memory.resume()
        if not ends:
            self.energy.resume()

    def _weights(self) -> dict[str, Any]:
        weights = {}
        for name, p in self.trainable.items():
            turns.point()
            weights[name] = p.detach().to("cpu", copy=True)
        return weights

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

    def _shared_work(self, work: Work, peaks: list[int | None]) -> Work:
        """The work with what was measured on every rank. Energy: of all GPUs; the CPUs' counters are the machine's, and the first rank's count."""
        ranks = self.run.ranks
        joules = ranks.gathered(work.energy_j)
        if self.run.device.type == "cuda":
            work = replace(work, energy_j=None if None in joules else sum(joules))
        a_gpu = work.tokens_per_s / ranks.count if work.tokens_per_s else None
        return replace(work, parallel=Parallel(self.run.settings.parallel, ranks.count, peaks, a_gpu))

    def _engine(self) -> dict[str, Any]:
        """The fields of Work that say how steps were made."""
        return {"engine": self.stepping.engine, "engine_reason": self.stepping.reason, "widths": self.stepping.widths, "streams": self.stepping.streams}

    def _save(self) -> None:
        """Write a checkpoint atomically; booked as `save`, out of the training memory. With shards all ranks write their own, else the first rank all."""
        if not self.checkpoint:
            return
        self.memory.pause()
        self.energy.pause()
        with self.meter.phase("save"):
            if isinstance(self.stepping, Sharded):
                sharded.save(self.checkpoint, self.stepping, {"state": self._stated({}), "rng": self._rng()}, self.state.best_weights)
            else:
                self.stepping.gather()
                if self.run.ranks.leads:
                    self._save_whole(self.checkpoint)
                self.run.ranks.from_first(None)  # none ends, and is waited for, while it is written
        self.memory.resume()
        self.energy.resume()

    def _save_whole(self, path: Path) -> None:
        import torch

        state = self._stated(self.state.best_weights)
        with atomic_path(path) as beside:
            torch.save({"state": state, "weights": self._weights(), "optimizer": self.stepping.state_dict(), "rng": self._rng()}, beside)

    def _stated(self, best_weights: dict[str, Any]) -> dict[str, Any]:
        """The State's fields as a checkpoint has them."""
        return {**vars(self.state), **self.energy.joules(), "train_s": self.meter.seconds("train"), "best_weights": best_weights}

    def _rng(self) -> dict[str, Any]:
        import torch

        device = self.run.device
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}

    def _resume(self) -> None:
        with self.meter.phase("load"):
            if not self.checkpoint:
                return
            check_kind(self.checkpoint, isinstance(self.stepping, Sharded))
            checkpoint = sharded.load(self.checkpoint, self.stepping) if isinstance(self.stepping, Sharded) else self._load_whole(self.checkpoint)
            if checkpoint is None:
                return
            self.state = State(**{**checkpoint["state"], "resumed": True})
            self._set_rng(checkpoint["rng"])
        self.meter.add("train", self.state.train_s)
        if self.run.ranks.leads:
            self.energy.add(self.state.energy_j, self.state.host_energy_j)
            print(f"resuming at step {self.state.step} of {self.run.total}", file=sys.stderr)
        self.notes.append(f"resumed at step {self.state.step} of {self.run.total}")

    def _load_whole(self, path: Path) -> dict[str, Any] | None:
        """The checkpoint, its weights and its optimiser's state taken over. The first rank sets aside a damaged one before the others look."""
        ranks = self.run.ranks
        checkpoint = load_state(path) if ranks.leads else None
        if not ranks.from_first(checkpoint is not None):
            return None
        checkpoint = checkpoint or load_state(path)
        assert checkpoint is not None
        self._put(checkpoint["weights"])
        self.stepping.load_state_dict(checkpoint["optimizer"])
        return checkpoint

    def _set_rng(self, states: dict[str, Any]) -> None:
        """The generators as the first rank left them; the others' begin anew, which a run on another number of GPUs has to anyway."""
        import torch

        if not self.run.ranks.leads:
            torch.manual_seed(self.run.ranks.seed(self.run.seed, self.state.step))
            return
        torch.set_rng_state(states["cpu"])
        if states["cuda"] is not None:
            torch.cuda.set_rng_state(states["cuda"], self.run.device)

    def _request_stop(self, _: int) -> None:
        self._stop = True

    def _bar(self) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self.run.total, initial=self.state.step, unit="step", disable=not (self.run.settings.progress and self.run.ranks.leads), leave=False,
            mininterval=0.5 if sys.stderr.isatty() else 20, desc="train",
        )
