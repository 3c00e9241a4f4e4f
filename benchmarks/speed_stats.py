"""Medians, spreads, ratios and the match of loss curves.

Library of `python -m benchmarks.speed`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

BOUND = {"bf16": 0.02, "fp32": 1e-3}
"""Largest relative difference of two losses at a step, over the first COMPARED steps, for the curves to match."""
COMPARED = 10


def summary(values: Sequence[float]) -> dict[str, Any]:
    """median, min, max, and the interquartile range [q1, q3] from four values on (null below)."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) >= 4 else None
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "iqr": [quartiles[0], quartiles[2]] if quartiles else None}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """Repeat by repeat over / under: `ratio` is their median, `spread` [lowest, highest], `iqr` from four repeats on.

    Where one side ran more often than the other, its extra repeats are divided by the other side's median.
    """
    paired = [a / b for a, b in zip(over, under, strict=False)]
    paired += [a / statistics.median(under) for a in over[len(under) :]]
    paired += [statistics.median(over) / b for b in under[len(over) :]]
    ratios = summary(paired)
    return {"ratio": ratios["median"], "spread": [ratios["min"], ratios["max"]], "iqr": ratios["iqr"], "ratios": paired}


def curves(ours: Sequence[float], peer: Sequence[float], dtype: str) -> dict[str, Any]:
    """How far two loss curves are apart over the first steps; `fell` is how far the peer's own fell in that time, as a share."""
    steps = min(COMPARED, len(ours), len(peer))
    apart = [abs(a - b) / abs(b) if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in zip(ours[:steps], peer[:steps], strict=True)]
    worst = max(apart, default=math.inf)
    return {
        "matched": worst <= BOUND[dtype], "max_relative": worst if math.isfinite(worst) else None, "bound": BOUND[dtype], "steps": steps,
        "fell": 1 - peer[steps - 1] / peer[0] if steps else None,
    }
