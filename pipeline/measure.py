"""The only file that reads a clock, a memory counter or an energy counter.

Library. `Meter` splits a process's wall clock into phases that add up; `PeakMemory` reads the peak of a stretch of
work with others (validation) kept out; `hardware` and `provenance` say where a number was measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.results import Memory, Phases

PHASES = ("startup", "load", "warmup", "train", "validate", "save", "evaluate")
RAPL = ("/sys/class/powercap/intel-rapl", "/zeus_sys/class/powercap/intel-rapl")
READ_COUNTERS_EVERY_S = 60.0  # a RAPL counter goes round in 262 kJ on most machines, so no sooner than in minutes
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "evaluate", "numpy")


def synchronise(device: Any) -> None:
    """Wait until the device has done what it was given (nothing to do on the CPU)."""
    if getattr(device, "type", device) == "cuda":
        import torch

        torch.cuda.synchronize(device)


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
        at = time.perf_counter()
        self._seconds[self._stack[-1] if self._stack else "other"] += at - self._mark
        self._mark = at

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


class PeakMemory:
    """Peak memory between `start` and `stop`; what happens between `pause` and `resume` is kept out.

    GPU: the allocator's peaks. CPU: the peak resident set, after `malloc_trim` and a reset through
    /proc/self/clear_refs (without the trim the peak would include what was freed before). None where the
    system has no such counter.
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        self._gpu = getattr(device, "type", device) == "cuda"
        self._peak = self._allocated = 0
        self._baseline: int | None = None
        self._readable = True

    def start(self) -> None:
        self._peak = self._allocated = 0
        self.resume()
        self._baseline = _gpu_reserved(self.device) if self._gpu else _status("VmRSS")

    def pause(self) -> None:
        if self._gpu:
            import torch

            synchronise(self.device)
            self._peak = max(self._peak, torch.cuda.max_memory_reserved(self.device))
            self._allocated = max(self._allocated, torch.cuda.max_memory_allocated(self.device))
        else:
            self._peak = max(self._peak, _status("VmHWM") or 0)

    def resume(self) -> None:
        if self._gpu:
            import torch

            synchronise(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._readable = _reset_peak_rss() and self._readable

    def stop(self) -> Memory:
        self.pause()
        if self._gpu:
            return Memory("gpu_reserved", self._peak, self._baseline, self._allocated, _nvml_used(self.device))
        return Memory("cpu_rss", self._peak if self._readable else None, self._baseline)


def _gpu_reserved(device: Any) -> int:
    import torch

    return torch.cuda.memory_reserved(device)


def _reset_peak_rss() -> bool:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status("VmHWM") is not None


def _status(key: str) -> int | None:
    """A kB figure of /proc/self/status in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def free_bytes(device: Any) -> int:
    """Memory that may still be taken: of the GPU, or of the machine and this process's control group."""
    if getattr(device, "type", device) == "cuda":
        import torch

        synchronise(device)
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, most - used)
    return max(0, int(free))


def child_rss(pid: int) -> int | None:
    """Resident bytes of a process, None when it is gone or the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return None


def kernel_oom_kills() -> int | None:
    """How many processes of this control group the kernel ended for lack of memory, None if it does not tell."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        for line in (Path("/sys/fs/cgroup") / group / "memory.events").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    except (OSError, ValueError):
        pass
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return None


def _nvml(device: Any) -> Any:
    """(pynvml, handle) or None where there is no driver to ask."""
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:  # no driver, no library, a virtual device: the figure is then null
        return None


def _nvml_used(device: Any) -> int | None:
    found = _nvml(device)
    return int(found[0].nvmlDeviceGetMemoryInfo(found[1]).used) if found else None


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
    """Energy between `start` and `stop`, with what happens between `pause` and `resume` kept out.

    device: the GPU's counter (NVML, through NVIDIA's library for it), or on the CPU its packages and their memory (RAPL, found by
    zeus); host: the latter beside a GPU, else None. Counters are the machine's: they include what other processes do.
    """

    def __init__(self, device: Any) -> None:
        gpu = getattr(device, "type", device) == "cuda"
        self.on = device
        self.device = Joules(lambda: _gpu_counters(device)) if gpu else Joules(_cpu_counters)
        self.host = Joules(_cpu_counters) if gpu else None
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
        """To be called between steps: reads the counters now and then, so that none goes round unseen."""
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
        """Why a figure is missing."""
        where = {"GPU": self.device, "CPU": self.host} if self.host else {"CPU": self.device}
        return "; ".join(f"{name} energy was not measured: {part.note}" for name, part in where.items() if part.note) or None


def _gpu_counters(device: Any) -> list[Counter]:
    found = _nvml(device)
    if found is None:
        raise LookupError("no NVML driver answers for this GPU")
    library, handle = found
    library.nvmlDeviceGetTotalEnergyConsumption(handle)
    return [Counter(lambda: library.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000)]


def _cpu_counters() -> list[Counter]:
    """RAPL's counters of every CPU package and its memory.

    zeus finds them and knows their range; they are read here, because its own reading starts a process that watches for a counter
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


def latency_s(call: Callable[[Any], Any], items: list[Any], device: Any) -> float | None:
    """Median seconds of `call(item)`, one item at a time, after one call to warm up. None without items."""
    if not items:
        return None
    call(items[0])
    times = []
    for item in items:
        synchronise(device)
        at = time.perf_counter()
        call(item)
        synchronise(device)
        times.append(time.perf_counter() - at)
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


def card() -> tuple[str, int] | None:
    """(name, bytes) of the first GPU that this process may use, asked of the driver without torch; None where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(visible)) if visible.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(visible)
        name = pynvml.nvmlDeviceGetName(handle)
        return name.decode() if isinstance(name, bytes) else name, int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except Exception:  # no driver or no library
        return None


def machine_bytes() -> int:
    """Memory of the machine, or of this process's control group where that is less."""
    import psutil

    whole = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        whole = min(whole, int((group / "memory.max").read_text()))
    return whole


def hardware(device: Any) -> dict[str, Any]:
    """What the cell ran on; also the key under which an out-of-memory result stays valid."""
    import psutil

    gpu = memory = None
    if getattr(device, "type", device) == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(device)
        gpu, memory = properties.name, properties.total_memory
    return {
        "device": getattr(device, "type", device),
        "gpu": gpu,
        "gpu_memory_bytes": memory,
        "cpu": cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def cpu_name() -> str:
    """The processor's model."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """Package versions, code version, start time and command of this process."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "packages": versions,
        "python": platform.python_version(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": (lambda out: None if out is None else bool(out))(_git("status", "--porcelain", "--untracked-files=no")),
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
    }


def _module() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
