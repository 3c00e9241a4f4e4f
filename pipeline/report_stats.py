"""The few statistics of the report: paired comparison, correction for many comparisons, Pareto front.

Library of `python -m pipeline.report`. Intervals themselves (Wilson's) come with the results.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Paired:
    """One technique against another on the same rows."""

    difference: float
    """Share of rows that it answers right beyond the other (mean over seeds): a fraction, positive if it is better."""
    p: float
    """Two-sided exact sign-flip test over the rows; with one seed each that is McNemar's exact test."""
    rows: int


def paired(ours: Sequence[Mapping[str, bool]], theirs: Sequence[Mapping[str, bool]]) -> Paired | None:
    """Compare right and wrong answers row by row; None where a side has none or no row is in all.

    Args:
        ours, theirs: one {row id: answered right} a seed. A row counts with its mean over the seeds.
    """
    if not ours or not theirs:
        return None
    both = set.intersection(*(set(answers) for answers in (*ours, *theirs)))
    if not both:
        return None
    differences = [len(theirs) * sum(a[i] for a in ours) - len(ours) * sum(a[i] for a in theirs) for i in both]
    return Paired(sum(differences) / (len(ours) * len(theirs) * len(both)), sign_flip(differences), len(both))


def sign_flip(differences: Sequence[int]) -> float:
    """Chance that a sum as far from 0 arises if every difference had a random sign (Fisher's randomisation test, two-sided).

    Differences of -1, 0 and 1 make it McNemar's exact test (McNemar 1947). Exact up to rounding (1e-12).
    """
    chances = {0: 1.0}
    for size, count in Counter(abs(d) for d in differences if d).items():
        parts = {size * (2 * heads - count): p for heads, p in _tosses(count)}
        sums: dict[int, float] = defaultdict(float)
        for total, chance in chances.items():
            for part, p in parts.items():
                sums[total + part] += chance * p
        chances = sums
    far = abs(sum(differences))
    return min(1.0, math.fsum(p for total, p in chances.items() if abs(total) >= far))


def _tosses(count: int) -> list[tuple[int, float]]:
    """(heads, chance) of a fair coin's tosses, chances below 1e-16 left out."""
    every = math.lgamma(count + 1) - count * math.log(2)
    found = [(k, math.exp(every - math.lgamma(k + 1) - math.lgamma(count - k + 1))) for k in range(count + 1)]
    return [(k, p) for k, p in found if p > 1e-16]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being many (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, value) points that no other point beats: none costs at most as much and is worth at least
    as much, one of the two strictly. Sorted by cost."""
    front = [
        i for i, (cost, value) in enumerate(points)
        if not any(c <= cost and v >= value and (c < cost or v > value) for c, v in points)
    ]
    return sorted(front, key=lambda i: points[i])
