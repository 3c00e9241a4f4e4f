"""The few statistics of the report itself: spreads and the Pareto front. Techniques are told apart in tiers.py.

Library of `python -m pipeline.report`. Intervals themselves (Wilson's) come with the results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A figure over seeds. The mean is of the seeds that have it."""

    mean: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean, smallest and largest of the values that are there; None where there is none."""
    known = [v for v in values if v is not None]
    return Spread(math.fsum(known) / len(known), min(known), max(known), len(known)) if known else None


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, value) points that no other point beats: none costs at most as much and is worth at least
    as much, one of the two strictly. Sorted by cost."""
    front = [
        i for i, (cost, value) in enumerate(points)
        if not any(c <= cost and v >= value and (c < cost or v > value) for c, v in points)
    ]
    return sorted(front, key=lambda i: points[i])
