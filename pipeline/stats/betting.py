"""A confidence sequence without a model: bounds on the mean of bounded values that hold at every moment together, however often one looks.

Library of the race (`python -m pipeline.race`); docs/race.md says what it is used for. Values are independent draws from any distribution on [-1, 1].

A gambler who starts with 1 and puts a share of his capital on the mean being above m has, after values x_1 … x_t, the capital

    E_t(m) = mean over shares l of  prod_s (1 + l (x_s - m) / (1 + m)),   0 < l < 1

If the mean is m or less, no strategy makes E_t grow on average, so that the chance that it ever reaches 1/a is at most a (Ville 1939); this holds for
every rule of when to stop. All m with E_t(m) < 1/a are what the data allow: a confidence sequence (Waudby-Smith and Ramdas 2024, "Estimating
means of bounded random variables by betting"). The mean over many fixed shares (SHARES) is their mixture; the best share for the spread need not be known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHARES = tuple(1 - 0.5 ** (i / 4) for i in range(1, 33)) + tuple(0.15 * 0.6**i for i in range(1, 8))
"""Shares of the capital that are put on the mean being above m, of what can be lost at most; a mixture with equal weights."""


def ever(values: Sequence[float] | np.ndarray, mean: float) -> float:
    """The largest log E_s(mean) of s = 1 … t, for values in [-1, 1] and a mean above -1: the evidence at the best moment, which Ville's inequality is about."""
    bets = np.array(SHARES)[:, None] * (np.asarray(values, dtype=float)[None, :] - mean) / (1 + mean)
    logs = np.log1p(bets).cumsum(1)
    top = logs.max(0, initial=0.0)
    return max(0.0, float((top + np.log(np.exp(logs - top).mean(0))).max(initial=0.0)))


def lower(values: Sequence[float] | np.ndarray, error: float) -> float:
    """The bound that the mean is below at no moment up to now, except with chance `error` (over all moments together); -1 without values."""
    enough, low, high = float(np.log(1 / error)), -1.0, float(np.mean(values)) if len(values) else -1.0
    if high <= -1.0 or ever(values, -1 + 1e-9) < enough:
        return -1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if ever(values, middle) >= enough else (low, middle)
    return low


def seeds_for(gap: float, spread: float, error: float, most: int = 100_000) -> int | None:
    """About how many values it takes until evidence is there that a mean of `gap` is above 0, values spread by `spread`; None: more than `most`."""
    if gap <= 0:
        return None
    shares = np.array(SHARES)
    growth = float((shares * gap - shares**2 * (gap**2 + spread**2) / 2).max())
    needed = (np.log(1 / error) + np.log(len(SHARES)) / 2) / growth if growth > 0 else np.inf
    return int(np.ceil(needed)) if needed <= most else None
