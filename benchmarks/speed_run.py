"""Measuring step rows: every side set up, timed and torn down in turn, A B A B, in one process.

Library of `python -m benchmarks.speed`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import signal
import statistics
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import speed_ours, speed_stats
from benchmarks.speed_limits import distance, step_bytes, step_flops
from benchmarks.speed_peers import COMPILED, Run, run_peer, silence
from benchmarks.speed_targets import OURS, Row, Side
from benchmarks.speed_workloads import Workload
from pipeline.measure.clock import Stopwatch
from pipeline.measure.memory import PeakMemory

BUSY = 1.5
"""Median over fastest step of a side on a CPU above which other processes were in the way, and there is no ratio."""


class OutOfTime(Exception):
    """The time limit of a benchmark is over."""


@dataclass
class Settings:
    """What a run of the command shares."""

    device: Any
    repeats: int
    limit_s: float
    """Of one id; ids that are measured together share the sum."""
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    """Measured rates by dtype."""


@dataclass
class Measured:
    """What a side's runs gave; `error` says why there are no more of them."""

    side: Side
    runs: list[Run] = field(default_factory=list)
    error: str | None = None

    def figure(self, name: str) -> list[float]:
        """step_s (the timed steps' mean; on a CPU, which others may use too, their median) or peak_bytes of every run."""
        if name == "step_s":
            return [statistics.median(run.times_s) if run.times_s else run.timed_s / self.side.workload.steps for run in self.runs]
        return [float(run.peak_bytes) for run in self.runs if run.peak_bytes]


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside once the seconds are over (in a main thread, where the system has timers)."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def clear(device: Any) -> None:
    """Give back what a side held."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def run_ours(workload: Workload, device: Any) -> Run:
    """Train once with our engine."""
    silence()
    watch = Stopwatch(device)
    ours = speed_ours.Ours(workload, device)
    setup_s = watch.lap()
    peak = PeakMemory(device)
    peak.start()
    watch.lap()
    ours.warm()
    losses = ours.steps(workload.warmup)
    warmup_s = watch.lap()
    times = []
    if device.type == "cpu":
        lap = Stopwatch()
        for _ in range(workload.steps):
            losses += ours.steps(1)
            times.append(lap.lap())
    else:
        losses += ours.steps(workload.steps)
    timed_s = watch.lap()
    memory = peak.stop()
    return Run(setup_s, warmup_s, timed_s, losses, memory.peak_bytes, memory.baseline_bytes, memory.peak_allocated_bytes, times, ours.close())


def run_side(side: Side, device: Any) -> Run:
    """One run of one side, its memory given back at the end."""
    try:
        return run_ours(side.workload, device) if side.kind == OURS else run_peer(side.workload, side.kind, device)
    finally:
        clear(device)
        if side.kind in COMPILED:
            import torch

            torch._dynamo.reset()


def failure(error: BaseException) -> str:
    """What went wrong, for the record; its trace goes to stderr unless it is a full device or the time limit."""
    if isinstance(error, OutOfTime):
        return "time limit"
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {str(error).splitlines()[0]}"
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def measure(rows: Sequence[Row], settings: Settings) -> dict[Side, Measured]:
    """Run the sides of these rows in turn, `repeats` times; a side that fails is left out from then on."""
    sides = {side: Measured(side) for row in rows for side in (row.over, row.under)}
    whole, limit = Stopwatch(), settings.limit_s * len(rows)
    for repeat in range(settings.repeats):
        lap = Stopwatch()
        for measured in sides.values():
            if measured.error is None:
                with _noting(measured):
                    with limited(limit - whole.peek()):
                        run = run_side(measured.side, settings.device)
                    measured.runs.append(run)
                    print(f"  {repeat + 1}/{settings.repeats} {measured.side.name}: {_told(measured.side.workload, run)}", flush=True)
        if whole.peek() + lap.peek() > limit:
            break
    return sides


@contextlib.contextmanager
def _noting(measured: Measured) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # one lost side must not lose the others: it is recorded, and shown
        measured.error = failure(error)
        print(f"  {measured.side.name}: {measured.error}", flush=True)


def _told(workload: Workload, run: Run) -> str:
    peak = f", peak {run.peak_bytes / 2**30:.2f} GiB" if run.peak_bytes else ""
    step = statistics.median(run.times_s) if run.times_s else run.timed_s / workload.steps
    return f"{step * 1e3:.2f} ms/step, {workload.tokens / step:,.0f} tokens/s, warm-up {run.warmup_s:.1f} s{peak}, loss {run.losses[-1]:.4f}"


def record(row: Row, sides: dict[Side, Measured], settings: Settings) -> dict[str, Any]:
    """The row's result: ratio and spread, loss match, and both sides raw; `error` instead of a ratio where one is missing."""
    over, under = sides[row.over], sides[row.under]
    row_record: dict[str, Any] = {"id": row.id, "what": row.what, "required": row.required, "aim": row.aim, "figure": row.figure}
    values = over.figure(row.figure), under.figure(row.figure)
    if all(values):
        row_record |= undisturbed(over, under, speed_stats.ratio(*values))
        if row.over.workload == row.under.workload:
            row_record["loss"] = speed_stats.curves(under.runs[0].losses, over.runs[0].losses, row.under.workload.dtype)
    else:
        row_record["error"] = "; ".join(f"{m.side.name}: {m.error or 'not measured'}" for m, v in zip((over, under), values, strict=True) if not v)
    return {**row_record, "over": described(over, settings), "under": described(under, settings)}


def undisturbed(over: Measured, under: Measured, found: dict[str, Any]) -> dict[str, Any]:
    """The ratio as it is on a GPU. On a CPU with that of the fastest steps, or an error and no ratio where the machine was busy."""
    steps = [[t for run in side.runs for t in run.times_s] for side in (over, under)]
    if not all(steps):
        return found
    best = {"best_ratio": min(steps[0]) / min(steps[1])}
    worst = max(statistics.median(times) / min(times) for times in steps)
    if worst <= BUSY:
        return found | best
    return best | {"disturbed": found, "error": f"the machine was busy: a side's median step took {worst:.1f} times its fastest; measure again"}


def described(measured: Measured, settings: Settings) -> dict[str, Any]:
    """A side as the result file holds it."""
    workload = measured.side.workload
    description: dict[str, Any] = {"kind": measured.side.kind, "name": workload.name, "workload": dataclasses.asdict(workload), "error": measured.error}
    if measured.runs:
        steps = measured.figure("step_s")
        step = speed_stats.summary(steps)
        description |= {
            "step_s": step, "tokens_per_s": workload.tokens / step["median"],
            "warmup_s": speed_stats.summary([r.warmup_s for r in measured.runs]),
            "peak_bytes": speed_stats.summary(measured.figure("peak_bytes")) if measured.figure("peak_bytes") else None,
            "memory_kind": "gpu_reserved" if settings.device.type == "cuda" else "cpu_rss",
            "limit": distance(step_flops(workload), step_bytes(workload), step["median"], settings.rates[workload.dtype]),
        }
    return {**description, "runs": [dataclasses.asdict(run) for run in measured.runs]}
