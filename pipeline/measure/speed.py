"""How fast this machine multiplies, in a fifth of a second and without torch: what a forecast of time begins with where nothing was timed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

SIDE, REPEATS = 768, 15
MOST_THREADS = 8
"""Beyond so many, the small products of a small model gain little."""


def matmul_flops(clock: Callable[[], float] = time.perf_counter) -> float:
    """Floating-point operations a second of a product of fp32 matrices on this machine's processors: those of one thread, the median of a few, times threads.

    Several threads at once would be timed by the slowest of them, which on a busy machine is several times slower from one moment to the next.

    Args:
        clock: gives the seconds; of the processor's time, the operations are those of one thread.
    """
    import numpy as np
    from threadpoolctl import threadpool_limits

    a = np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32)
    taken = []
    with threadpool_limits(1):
        for _ in range(REPEATS):
            at = clock()
            a @ a
            taken.append(clock() - at)
    return 2 * SIDE**3 / statistics.median(taken) * (threads() if clock is time.perf_counter else 1)


def threads() -> int:
    """How many torch takes: as OMP_NUM_THREADS says, else a processor each that this process may run on."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    count = int(said) if said.isdigit() and int(said) else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, MOST_THREADS)
