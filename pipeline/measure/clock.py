"""Seconds: `Meter` splits a process's wall clock into phases that add up, `Stopwatch` times a stretch of work."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = ("startup", "load", "warmup", "train", "validate", "save", "evaluate")


def synchronise(device: Any) -> None:
    """Wait until the device has done its work (nothing to do on the CPU)."""
    if getattr(device, "type", device) == "cuda":
        import torch

        torch.cuda.synchronize(device)


def marked(device: Any) -> Any:
    """A mark behind all that the device was given to do, whose `synchronize` waits for it without computing; None on the CPU, which is through."""
    if getattr(device, "type", device) != "cuda":
        return None
    import torch

    mark = torch.cuda.Event(blocking=True)
    mark.record(torch.cuda.current_stream(device))
    return mark


def process_start() -> float:
    """Unix time, in seconds, at which this process started (10 ms steps).

    On Linux: now less the process's age by the boot clock. psutil's create_time rests on a boot time in whole seconds.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        import psutil

        return psutil.Process().create_time()


def cpu_s() -> float:
    """Seconds that this process has computed so far, on all cores together: what a wall clock would say on a machine that does nothing else."""
    return time.process_time()


def now() -> float:
    """Unix time in seconds."""
    return time.time()


class Meter:
    """Wall clock by phase. A phase entered inside another one pauses it, so the phases are disjoint.

    Args:
        started: Unix time at which the first phase, startup, began: the process's start, or now where several
            cells share a process (startup_s is then what this cell alone imported).
    """

    def __init__(self, started: float | None = None) -> None:
        self.device: Any = "cpu"
        self.waited: Callable[[], float] = lambda: 0.0
        """Seconds that this process has waited for others to let it work (measure/turns.py): of no phase, and not of the wall clock."""
        self.waited_s = 0.0
        self._seconds = dict.fromkeys((*PHASES, "other"), 0.0)
        self._stack: list[str] = []
        offset = time.time() - started if started is not None else 0.0
        self._mark = time.perf_counter()
        self._seconds["startup"] = offset
        self._begin = self._mark - offset

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book what happens inside to this phase; the device is synchronised at both borders."""
        assert name in PHASES, name
        self._book()
        self._stack.append(name)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def _book(self) -> None:
        synchronise(self.device)
        at, waited = time.perf_counter(), self.waited()
        idle, self.waited_s = waited - self.waited_s, waited
        self._seconds[self._stack[-1] if self._stack else "other"] += at - self._mark - idle
        self._mark, self._begin = at, self._begin + idle

    def seconds(self, name: str) -> float:
        """Seconds booked to a phase until now."""
        self._book()
        return self._seconds[name]

    def add(self, name: str, seconds: float) -> None:
        """Book seconds that an earlier process spent on this cell (a resumed training)."""
        self._seconds[name] += seconds
        self._begin -= seconds

    def phases(self) -> Phases:
        """The phases until now; they add up to wall_s."""
        self._book()
        values = {f"{name}_s": round(value, 4) for name, value in self._seconds.items()}
        return Phases(wall_s=round(self._mark - self._begin, 4), **values)


def latency_s(call: Callable[[Any], Any], items: list[Any], device: Any, enough_s: float = math.inf,
              untimed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
              timed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext) -> float | None:
    """Median seconds of `call(item)`, one item at a time, once warm: a GPU has had each item before (the first request of a length takes three times as
    long, while kernels are loaded and chosen for it), a CPU the first. None without items.

    Args:
        enough_s: no more items are timed once those that were took so long.
        untimed, timed: the contexts in which they are made warm, and timed.
    """
    if not items:
        return None
    distinct = {id(item): item for item in items}.values() if str(device).startswith("cuda") else items[:1]
    with untimed():
        for item in distinct:
            call(item)
    times: list[float] = []
    with timed():
        for item in items:
            synchronise(device)
            at = time.perf_counter()
            call(item)
            synchronise(device)
            times.append(time.perf_counter() - at)
            if sum(times) >= enough_s:
                break
    return statistics.median(times)


def device_seconds(call: Callable[[], Any], device: Any, repeats: int = 20) -> float:
    """Seconds of a call on a GPU, back to back, after three to warm up."""
    for _ in range(3):
        call()
    synchronise(device)
    at = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise(device)
    return (time.perf_counter() - at) / repeats


class Stopwatch:
    """Seconds since it was made or last read, device synchronised."""

    def __init__(self, device: Any = "cpu") -> None:
        self.device = device
        self._at = time.perf_counter()

    def lap(self, wait: bool = True) -> float:
        if wait:
            synchronise(self.device)
        at = time.perf_counter()
        seconds, self._at = at - self._at, at
        return seconds

    def peek(self) -> float:
        """Seconds since the last lap, without waiting for the device."""
        return time.perf_counter() - self._at


@dataclass(frozen=True)
class Phases:
    """Seconds of wall clock, disjoint; they add up to `wall_s`.

    startup: imports and checks; load: rows, base, encoding; warmup: compilation, captures, what an objective computes once; train: optimiser
    steps alone; validate: inside and right after training; save: checkpoints and artefact; evaluate: test, latency, probes; other: the rest.
    """

    wall_s: float
    startup_s: float
    load_s: float
    warmup_s: float
    train_s: float
    validate_s: float
    save_s: float
    evaluate_s: float
    other_s: float
