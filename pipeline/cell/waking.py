"""What a GPU's cell would wait for before its first step and Python need not, begun in threads while Python imports.

Library of run.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def woken(device: str) -> Iterator[None]:
    """Start the GPU, and have Triton know itself, beside the imports that are made inside; both are done when it ends. Nothing on the CPU."""
    import torch

    if torch.version.cuda is None or device == "cpu":
        yield
        return
    works = [_start_gpu, *filter(None, [_identity_of_triton()])]
    threads = [threading.Thread(target=_quietly, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


def _quietly(work: Callable[[], Any]) -> None:
    with contextlib.suppress(Exception):  # whatever is wrong, whoever needs it will say
        work()


def _start_gpu() -> None:
    """A second or more. The driver and the first GPU's primary context, the one that CUDA's runtime takes, are started through ctypes, which lets Python
    go on meanwhile: torch keeps Python waiting while it starts the driver, and finds it started here."""
    import torch

    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # which torch sets before it starts the driver
    driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
    if not (driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)):
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    torch.zeros(1, device="cuda")


def _identity_of_triton() -> Callable[[], object] | None:
    """The function by which Triton, once a process, reads its own files (libtriton.so has 400 MB) for the keys of its cache of compiled kernels: before the
    first kernel's launch, if not earlier. None where there is none. Triton is imported here: two threads that import the same may meet half of it."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    homes = ("triton.runtime.cache", "triton.compiler.compiler")  # of 3.4 and later, and before
    return next(filter(None, (getattr(sys.modules.get(home), "triton_key", None) for home in homes)), None)
