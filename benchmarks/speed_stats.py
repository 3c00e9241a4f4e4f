"""Medians, spreads, ratios with what they decide, and the match of loss curves.

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
    """Repeat by repeat over / under: `ratio` is the geometric mean of these `ratios`, and so the ratio of the sides' geometric means, `means`.

    `spread` is [lowest, highest], `interval` Student's 95% of the mean of the ratios' logarithms. Repeats that one side alone has do not count; a side
    that ran once stands for every repeat of the other. Then, as with one repeat, `interval` is null: nothing is known of how much that side varies.
    """
    once = min(len(over), len(under)) == 1
    over, under = ([*side] * (max(len(over), len(under)) if once and len(side) == 1 else 1) for side in (over, under))
    paired = [a / b for a, b in zip(over, under, strict=False)]
    interval = None if once else [math.exp(bound) for bound in _student([math.log(r) for r in paired])]
    means = [geometric_mean(side[: len(paired)]) for side in (over, under)]
    return {"ratio": geometric_mean(paired), "means": means, "spread": [min(paired), max(paired)], "interval": interval, "ratios": paired}


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(statistics.fmean(map(math.log, values)))


def _student(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a mean of at least two numbers."""
    from scipy.stats import t

    middle, half = statistics.fmean(values), t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return middle - half, middle + half


def verdict(found: dict[str, Any], required: float | None) -> str:
    """The one rule for what a ratio says: "reached" or "not reached" where its interval leaves nothing else, otherwise "not decided"; and whether it is slower.

    found: what `ratio` gives. required: null: no requirement, and the interval speaks of 1.
    """
    low, high = found["interval"] or (0.0, math.inf)
    slower = "slower" if high < 1 else "slower in these repeats" if found["ratio"] < 1 else ""
    if required is None:
        return slower
    return ", ".join(filter(None, ["reached" if low >= required else "not reached" if high < required else "not decided", slower]))


def curves(ours: Sequence[float], peer: Sequence[float], dtype: str) -> dict[str, Any]:
    """How far two loss curves are apart over the first steps; `fell` is how far the peer's own fell in that time, as a share."""
    steps = min(COMPARED, len(ours), len(peer))
    apart = [abs(a - b) / abs(b) if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in zip(ours[:steps], peer[:steps], strict=True)]
    worst = max(apart, default=math.inf)
    return {
        "matched": worst <= BOUND[dtype], "max_relative": worst if math.isfinite(worst) else None, "bound": BOUND[dtype], "steps": steps,
        "fell": 1 - peer[steps - 1] / peer[0] if steps else None,
    }
