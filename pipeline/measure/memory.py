"""Bytes: `PeakMemory` reads the peak of a stretch of work without interruptions (validation); what the machine has left; out of memory."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.measure.clock import synchronise
from pipeline.measure.machine import control_group, nvml


class PeakMemory:
    """Peak memory between `start` and `stop`; what happens between `pause` and `resume` is excluded.

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
        free = min(free, int(control_group("memory.max")) - int(control_group("memory.current")))
    return max(0, int(free))


def child_rss(pid: int) -> int | None:
    """Resident bytes of a process, None when it is gone or the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return None


def kernel_oom_kills() -> int | None:
    """How many processes of this control group the kernel ended for lack of memory, None if it does not say."""
    for read in (lambda: control_group("memory.events"), Path("/proc/vmstat").read_text):
        with contextlib.suppress(OSError, ValueError):
            for line in read().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return None


def _nvml_used(device: Any) -> int | None:
    gpu = nvml(device)
    return int(gpu[0].nvmlDeviceGetMemoryInfo(gpu[1]).used) if gpu else None


@dataclass(frozen=True)
class Memory:
    """Peaks while training (or evaluating, for a technique that trains nothing), validation excluded."""

    kind: str
    """gpu_reserved (the allocator's peak) or cpu_rss (peak resident set)."""
    peak_bytes: int | None
    baseline_bytes: int | None = None
    """The same counter just before the first step, model loaded."""
    peak_allocated_bytes: int | None = None
    device_used_bytes: int | None = None
    """The device's own view (NVML) right after training; includes the driver's context."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, a GPU's or the machine's, did not suffice."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
