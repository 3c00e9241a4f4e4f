"""Where a number was measured: `hardware`, and `provenance` with package versions, commit and command."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "evaluate", "numpy")
CPU_MODEL = ("cpu family", "model", "stepping")
OPENMP = re.compile(r"/lib[gi]omp[^/]*$")
PAUSE_HARD = 2
"""omp_pause_hard of OpenMP 5.0 (3.6.1): the runtime keeps nothing."""
BLAS_VARIABLES = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


def nvml(device: Any) -> Any:
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


def card() -> tuple[str, int] | None:
    """(name, bytes) of the first GPU that this process may use, asked of the driver without torch; None where there is none."""
    try:
        library, handle = _first_gpu()
        name = library.nvmlDeviceGetName(handle)
        return name.decode() if isinstance(name, bytes) else name, int(library.nvmlDeviceGetMemoryInfo(handle).total)
    except Exception:  # no driver or no library
        return None


def _first_gpu() -> Any:
    """(pynvml, handle) of the first GPU that this process may use. Raises whatever says that there is none."""
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(visible)) if visible.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(visible)


def busy_share() -> float | None:
    """The share of the last moments in which the first GPU that this process may use ran a kernel, as NVML samples it; None where there is none."""
    try:
        library, handle = _first_gpu()
        return float(library.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except Exception:  # no driver or no library
        return None


def is_mps_client(device: Any) -> bool:
    """Whether this process shares the device, a GPU, through NVIDIA's MPS, as the folder that it was given for that says (benchmarks/lease.py begins the daemon
    first). One of the default folder, which nobody has to name, is not seen."""
    return getattr(device, "type", None) == "cuda" and bool(os.environ.get("CUDA_MPS_PIPE_DIRECTORY"))


def visible_gpus() -> int:
    """GPUs that this process may use, asked of the driver without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        import pynvml

        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
    except Exception:  # no driver or no library
        return 0
    return count if visible is None else min(count, len([word for word in visible.split(",") if word.strip() and word.strip() != "-1"]))


def control_group(name: str) -> str:
    """A file of this process's control group. Raises OSError where there is none."""
    return (Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/") / name).read_text()


def machine_bytes() -> int:
    """Memory of the machine, or of this process's control group where that is less."""
    import psutil

    whole = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):
        whole = min(whole, int(control_group("memory.max")))
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
        "device": getattr(device, "type", device), "gpu": gpu, "gpu_memory_bytes": memory, "cpu": cpu_name(), "cpu_count": cpu_count(),
        "memory_bytes": psutil.virtual_memory().total, "platform": f"{platform.system()} {platform.machine()}",
    }


def cpu_count() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def arithmetic() -> dict[str, Any]:
    """What decides in which order this process adds on the CPU, and so the last bits of its figures (docs/statistics.md); no part of a cell's identity.

    cpu_model: family, model and stepping, which a name such as "AMD EPYC" does not tell; cpu_capability: the vector code that torch chose;
    blas: the library of the matrix products, with the variables that choose its code.
    """
    import torch

    config = torch.__config__.show()
    name, version = re.search(r"BLAS_INFO=(\w+)", config), re.search(r"Math Kernel Library Version (\S+?)-", config)
    chosen = [f"{key}={os.environ[key]}" for key in BLAS_VARIABLES if key in os.environ]
    return {
        "cpu_model": ", ".join(f"{key.split()[-1]} {value}" for key in CPU_MODEL if (value := _cpuinfo(key))) or None,
        "threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "blas": " ".join([*(match[1] for match in (name, version) if match), *chosen]) or None,
    }


def cpu_name() -> str:
    """The processor's model."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str | None:
    """The first processor's value in /proc/cpuinfo; None where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.partition(":")[0].strip() == key:
                return line.partition(":")[2].strip()
    return None


def versions(packages: Sequence[str]) -> dict[str, str]:
    installed = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def provenance() -> dict[str, Any]:
    """Package versions, code version, start time and command of this process.

    git_dirty: whether tracked files differ from the commit; dvc.lock files record results and are no part of what made them.
    """
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)*dvc.lock")
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return {
        "packages": versions(PACKAGES), "python": platform.python_version(), "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changed is None else bool(changed), "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "command": " ".join(["python -m", spec.name if spec else Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def end_openmp_threads() -> None:
    """End the worker threads that OpenMP has in this process, of whichever libraries; they come again when they are needed."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        libraries = {line.split(maxsplit=5)[-1].strip() for line in maps if OPENMP.search(line)}
    for library in libraries:
        with contextlib.suppress(OSError, AttributeError):  # a file replaced since, or an OpenMP older than 5.0
            ctypes.CDLL(library).omp_pause_resource_all(PAUSE_HARD)


def hardware_here(device: str) -> dict[str, Any]:
    """measure.hardware, asked in a child where it is a GPU's: a process that has used one cannot fork cells that use it."""
    if device == "cpu":
        return hardware(device)
    from multiprocessing import get_context

    fork = get_context("fork")
    theirs, ours = fork.Pipe()
    child = fork.Process(target=_tell_hardware, args=(ours, device))
    child.start()
    ours.close()
    try:
        return theirs.recv()
    except EOFError:
        return {}
    finally:
        child.join()


def _tell_hardware(to: Any, device: str) -> None:
    with contextlib.suppress(Exception):  # no such device here
        to.send(hardware(device))
