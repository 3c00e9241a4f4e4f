"""How fast this machine multiplies, in a fifth of a second and without torch: what a forecast of time begins with where nothing was timed."""

from __future__ import annotations

import time

SIDE, REPEATS = 768, 6


def matmul_flops() -> float:
    """Floating-point operations a second of a product of fp32 matrices on this machine's processors, the best of a few."""
    import numpy as np

    a = np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32)
    best = float("inf")
    for _ in range(REPEATS):
        at = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - at)
    return 2 * SIDE**3 / best
