"""An exact test over rows, and p-values corrected for being many.

Library of tiers.py.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence


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
