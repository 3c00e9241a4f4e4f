"""Joules: the counters of GPUs (NVML) and CPUs (RAPL, where zeus is installed), read over a stretch of work."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.measure import turns
from pipeline.measure.clock import synchronise
from pipeline.measure.machine import nvml

RAPL = ("/sys/class/powercap/intel-rapl", "/zeus_sys/class/powercap/intel-rapl")
READ_COUNTERS_EVERY_S = 60.0  # a RAPL counter wraps at 262 kJ on most machines: after minutes at the soonest


@dataclass(frozen=True)
class Counter:
    """An energy counter. joules: reads it, from an unknown zero on. range_j: after so many it begins anew; None: it never does."""

    joules: Callable[[], float]
    range_j: float | None = None


class Joules:
    """What counters book between `resume` and `pause`, summed. total is None, and note says why, where one cannot be read.

    Args:
        counters: finds them; an exception is the reason why there are none.
    """

    def __init__(self, counters: Callable[[], list[Counter]]) -> None:
        self.total: float | None = 0.0
        self.note: str | None = None
        self._counters: list[Counter] = []
        self._last: list[float] = []
        try:
            self._counters = counters()
        except Exception as error:  # no library, no counter, no permission: the figure is then null
            self._give_up(error)

    def resume(self) -> None:
        if self.total is not None:
            try:
                self._last = [c.joules() for c in self._counters]
            except Exception as error:
                self._give_up(error)

    def book(self) -> None:
        """Add what the counters went on by since they were last read."""
        before = self._last
        self.resume()
        if self.total is None:
            return
        back = [c for c, was, now in zip(self._counters, before, self._last, strict=True) if now < was]
        if any(c.range_j is None for c in back):
            self._give_up(ValueError("a counter went back, and its range is not known"))
        else:
            self.total += math.fsum(self._last) - math.fsum(before) + math.fsum(c.range_j or 0.0 for c in back)

    def add(self, joules: float | None) -> None:
        """Count what an earlier process spent (a resumed training)."""
        if joules is None:
            self._give_up(ValueError("the part before it was resumed was not measured"))
        elif self.total is not None:
            self.total += joules

    def _give_up(self, error: Exception) -> None:
        self.total, self.note, self._counters = None, self.note or " ".join(str(error).split()) or type(error).__name__, []
        self._last = []


class Energy:
    """Energy between `start` and `stop`, without what happens between `pause` and `resume`.

    device: the GPU's counter (NVML, through NVIDIA's library for it), or on the CPU its packages and their memory (RAPL, found by
    zeus); host: the latter beside a GPU, else None. Counters are the machine's: they include what other processes do.
    """

    def __init__(self, device: Any) -> None:
        gpu = getattr(device, "type", device) == "cuda"
        self.on = device
        self.device = Joules(_not_alone if turns.crowded() else (lambda: _gpu_counters(device)) if gpu else _cpu_counters)
        self.host = Joules(_not_alone if turns.shared() else _cpu_counters) if gpu else None
        self._parts = [self.device, *([self.host] if self.host else [])]
        self._read_at: float | None = None

    def start(self) -> None:
        self.resume()

    def resume(self) -> None:
        synchronise(self.on)
        for part in self._parts:
            part.resume()
        self._read_at = time.perf_counter()

    def tick(self) -> None:
        """To be called between steps: reads the counters now and then, so that none wraps unseen."""
        if self._read_at is not None and time.perf_counter() - self._read_at >= READ_COUNTERS_EVERY_S:
            self._book()

    def _book(self) -> None:
        for part in self._parts:
            part.book()
        self._read_at = time.perf_counter()

    def pause(self) -> None:
        if self._read_at is not None:
            synchronise(self.on)
            self._book()
        self._read_at = None

    stop = pause

    def joules(self) -> dict[str, float | None]:
        """energy_j and host_energy_j, rounded to the microjoule."""
        totals = {"energy_j": self.device.total, "host_energy_j": self.host.total if self.host else None}
        return {name: None if total is None else round(total, 6) for name, total in totals.items()}

    def add(self, device_j: float | None, host_j: float | None) -> None:
        """Count what an earlier process spent on this training."""
        self.device.add(device_j)
        if self.host:
            self.host.add(host_j)

    @property
    def note(self) -> str | None:
        where = {"GPU": self.device, "CPU": self.host} if self.host else {"CPU": self.device}
        return "; ".join(f"{name} energy was not measured: {part.note}" for name, part in where.items() if part.note) or None


def _not_alone() -> list[Counter]:
    raise LookupError("other cells ran beside this one")


def _gpu_counters(device: Any) -> list[Counter]:
    gpu = nvml(device)
    if gpu is None:
        raise LookupError("no NVML driver answers for this GPU")
    library, handle = gpu
    library.nvmlDeviceGetTotalEnergyConsumption(handle)
    return [Counter(lambda: library.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000)]


def _cpu_counters() -> list[Counter]:
    """RAPL's counters of every CPU package and its memory.

    zeus finds them and knows their range; they are read here, because zeus's reading starts a process that watches for a counter
    to begin anew, which would outlive a forked cell.
    """
    if not any(Path(place).exists() for place in RAPL):
        raise LookupError("this machine shows no RAPL counter")
    try:
        from zeus.device import get_cpus
    except ImportError as error:
        raise LookupError("zeus, which reads RAPL counters, is not installed: pip install zeus") from error
    zones = [zone for cpu in get_cpus().cpus for zone in (cpu.rapl_file, cpu.dram) if zone is not None]
    return [Counter(functools.partial(_rapl_joules, zone.energy_uj_path), zone.max_energy_range_uj / 1e6 or None) for zone in zones]


def _rapl_joules(path: str) -> float:
    return int(Path(path).read_text()) / 1e6
