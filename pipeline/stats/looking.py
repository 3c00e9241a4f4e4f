"""The two-level model of tiers.py for a race: techniques compared at looks fixed beforehand, valid however one stops and whoever runs next.

Library of `python -m pipeline.race`; docs/race.md derives it, and `python -m benchmarks.race simulate` measures what it promises.

Techniques a and b have answered the same n test rows with the same seeds 1 … S. The mean difference D of their metrics is normal around the true one, with
variance

    c + v / S,   c = the rows' part (which stays the same at every look: the rows do not change),   v = the seeds' part, of a seed

A pair is looked at when both have S of LOOKS seeds, and what is computed then depends on the first S seeds alone, so that it does not matter what made
the race go on or stop. `ever_crossed` is the chance that D, less its truth, comes to lie z standard deviations above 0 at any look: given the rows' error, a
sum over looks; averaged over that error, which all looks share. Where the rows dominate it is the chance at one look, where seeds do, at most the sum.

The seeds' spread is not known: the chance is averaged over what the seeds of all techniques allow (tiers.Spreads: a shared spread, and a technique's own around
it). Seeds are the same for all techniques, so what a seed does to all of them cancels: spreads are those around the seed's mean.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.stats.tiers import Spreads

LOOKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Seeds at which a pair is looked at."""
PSEUDO = 5.0
"""Squared disagreements added to those on the rows: where two techniques disagree on no row of a few, their difference is still not known exactly."""
STEPS, NODES = (0.02, 0.1), 8
"""Of the integrals that a table is made of."""
RATIOS = np.geomspace(1e-3, 1e5, 33)
SCORES = np.arange(0.0, 9.01, 0.1)
"""The ratios v/c and the z that `ever_crossed` is tabulated at; a ratio outside is taken as the nearest, a z beyond as the last."""
BINS = np.geomspace(1e-8, 0.1, 57)
"""Variances of the seeds' part that a mixture is collected at."""
NONE = 1e-12
"""The rows' part of the variance where the rows are no sample."""
LIGHT = 1e-5  # of the heaviest of the shared spreads: what is lighter is left out


@functools.lru_cache(maxsize=8)
def _table(looks: tuple[int, ...]) -> np.ndarray:
    """[len(RATIOS), len(SCORES)] logs of `ever_crossed`."""
    from scipy.special import ndtr

    table = np.empty((len(RATIOS), len(SCORES)))
    for row, ratio in enumerate(RATIOS):
        step = float(np.clip(np.sqrt(ratio / looks[-1]), *STEPS))
        shared = np.arange(-6.5, 10.0, step)
        bounds = [(SCORES[:, None] * np.sqrt(1 + ratio / seeds) - shared) / np.sqrt(ratio / seeds) for seeds in looks]
        crossed = sum(ndtr(-bound) for bound in bounds)
        for (seeds, bound), (more, later) in itertools.pairwise(zip(looks, bounds, strict=True)):
            crossed -= _both(bound, later, np.sqrt(seeds / more))
        table[row] = np.log((np.clip(crossed, 0.0, 1.0) * np.exp(-(shared**2) / 2)).sum(-1) * step / np.sqrt(2 * np.pi))
    return table


def _both(h: np.ndarray, k: np.ndarray, correlation: float) -> np.ndarray:
    """P(X > h and Y > k) of standard normal X and Y (Plackett 1954: an integral over the correlation, here by Gauss and Legendre's rule)."""
    from scipy.special import ndtr

    nodes, parts = np.polynomial.legendre.leggauss(NODES)
    end = np.arcsin(correlation)
    added = np.zeros_like(h)
    for angle, part in zip(end * (nodes + 1) / 2, parts * end / 2, strict=True):
        added += part * np.exp(-(h**2 + k**2 - 2 * h * k * np.sin(angle)) / (2 * np.cos(angle) ** 2))
    return ndtr(-h) * ndtr(-k) + added / (2 * np.pi)


def log_ever_crossed(z: np.ndarray, ratio: np.ndarray, looks: tuple[int, ...] = LOOKS) -> np.ndarray:
    """Log chance that the difference lies z or more of its standard deviations above its truth at any of the looks.

    Args:
        z: at least 0; below 0 the chance counts as 1. ratio: v / c, of the same shape.
    """
    table = _table(looks)
    down = np.clip(np.log(np.maximum(ratio, RATIOS[0]) / RATIOS[0]) / np.log(RATIOS[1] / RATIOS[0]), 0, len(RATIOS) - 1.001)
    across = np.clip(z / SCORES[1], 0, len(SCORES) - 1.001)
    i, j = down.astype(int), across.astype(int)
    f, g = down - i, across - j
    logs = (1 - f) * ((1 - g) * table[i, j] + g * table[i, j + 1]) + f * ((1 - g) * table[i + 1, j] + g * table[i + 1, j + 1])
    result: np.ndarray = np.where(z < 0, 0.0, np.minimum(0.0, logs))
    return result


def critical(chance: float, ratios: np.ndarray, looks: tuple[int, ...] = LOOKS) -> np.ndarray:
    """[B] The z that is crossed at any look with at most this chance, for each of these ratios [B]."""
    logs = log_ever_crossed(np.broadcast_to(SCORES, (len(ratios), len(SCORES))), ratios[:, None], looks)
    return np.array([np.interp(-np.log(chance), -row, SCORES) for row in logs])


@dataclass(frozen=True)
class Gap:
    """Technique a beyond each of others, on the first `seeds` seeds: arrays [B]."""

    point: np.ndarray
    common: np.ndarray
    """The rows' part of the variance."""
    weights: np.ndarray
    """[B, V] of the seeds' part, of one seed, being BINS[V]."""
    flips: np.ndarray
    """What single rows' flips from seed to seed add to that, known."""
    seeds: int
    looks: tuple[int, ...]

    @property
    def by_seed(self) -> np.ndarray:
        """[B] the seeds' part of the variance of one seed, expected."""
        expected: np.ndarray = (self.weights * BINS).sum(1) + self.flips
        return expected

    def chance_below(self, margin: float) -> np.ndarray:
        """[B] How probable such a difference is, at any look, if a's true metric were `margin` below the other's (or more): small means it is not."""
        own = BINS[None, :] + self.flips[:, None]
        z = (self.point + margin)[:, None] / np.sqrt(self.common[:, None] + own / self.seeds)
        logs = log_ever_crossed(z, own / self.common[:, None], self.looks)
        chance: np.ndarray = np.minimum(1.0, (self.weights * np.exp(logs)).sum(1))
        return chance


class Answers:
    """What techniques answered so far, arm by arm and seed by seed.

    Args:
        arms: how many techniques. rows: test rows. looks: seeds at which pairs may be looked at.
        these: the truth is what the techniques would answer to these very rows; False: to all rows that these are a sample of.
    """

    def __init__(self, arms: int, rows: int, looks: tuple[int, ...] = LOOKS, these: bool = False) -> None:
        self.rows, self.looks, self.these = rows, looks, these
        self.runs: list[list[np.ndarray]] = [[] for _ in range(arms)]
        self.means: list[list[float]] = [[] for _ in range(arms)]
        self.sums: list[dict[int, np.ndarray]] = [{} for _ in range(arms)]
        self.fixed = [False] * arms
        self.flips = [0.0] * arms
        self._spreads: Spreads | None = None

    def add(self, arm: int, right: np.ndarray, fixed: bool = False) -> None:
        """The answers [n] of the arm's next seed, right (1) or wrong (0) or a metric of the row. fixed: nothing is random in this arm, one run says all."""
        self.runs[arm].append(right)
        self.means[arm].append(float(right.mean()))
        self.fixed[arm] = fixed
        done = len(self.runs[arm])
        self.sums[arm][done] = right.astype(float) + (self.sums[arm][done - 1] if done > 1 else 0.0)
        if done > 1:
            values = np.array(self.runs[arm])
            self.flips[arm] = float((values - values.mean(1, keepdims=True)).var(0, ddof=1).mean()) / self.rows
        self._spreads = None

    def seeds(self, arm: int) -> int:
        """How many an arm has; of one with nothing random, as many as the last look asks for."""
        return self.looks[-1] if self.fixed[arm] and self.runs[arm] else len(self.runs[arm])

    def by_row(self, arm: int, seeds: int) -> np.ndarray:
        """[n] means over the first seeds."""
        mean: np.ndarray = self.sums[arm][1] if self.fixed[arm] else self.sums[arm][seeds] / seeds
        return mean

    def level(self, arm: int) -> float:
        """The metric, mean over all seeds."""
        return sum(self.means[arm]) / len(self.means[arm])

    def by_seed(self, arm: int, other: int) -> np.ndarray:
        """[S] differences of the seeds that both have: arm beyond other."""
        seeds = min(self.seeds(arm), self.seeds(other))
        means = [np.array(self.means[k] * seeds if self.fixed[k] else self.means[k][:seeds]) for k in (arm, other)]
        difference: np.ndarray = means[0] - means[1]
        return difference

    @property
    def spreads(self) -> Spreads:
        """What all seeds say of each arm's spread around the seeds' means."""
        if self._spreads is None:
            counts = [0 if self.fixed[k] else len(self.runs[k]) for k in range(len(self.runs))]
            sample, freedom = [0.0] * len(counts), [0.0] * len(counts)
            for seeds in {c for c in counts if c > 1}:
                group = [k for k, c in enumerate(counts) if c >= seeds]
                means = np.array([self.means[k][:seeds] for k in group])
                share = (len(group) - 1) / len(group) if len(group) > 1 else 1.0
                centred = means - means.mean(0) if len(group) > 1 else means
                for k, variance in zip(group, centred.var(1, ddof=1), strict=True):
                    if counts[k] == seeds:
                        sample[k], freedom[k] = float(variance) / share, (seeds - 1) * share
            self._spreads = Spreads.from_variances(sample, freedom, self.all_flips)
        return self._spreads

    def variances(self, arms: Sequence[int]) -> np.ndarray:
        """[B] what is expected of the variance of one seed's metric, of each of these arms."""
        spreads, flips = self.spreads, self.all_flips
        expected = [0.0 if self.fixed[k] else float((spreads.shared[..., None] * spreads.deviation[k] * spreads.variances).sum()) + flips[k] for k in arms]
        return np.array(expected)

    @property
    def all_flips(self) -> list[float]:
        """Every arm's flips; of an arm with one seed those that others have on average."""
        known = [f for f, runs in zip(self.flips, self.runs, strict=True) if len(runs) > 1 and f > 0]
        usual = float(np.mean(known)) if known else 0.0
        return [0.0 if fixed else f if len(runs) > 1 else usual for f, runs, fixed in zip(self.flips, self.runs, self.fixed, strict=True)]

    def gap(self, arm: int, others: Sequence[int], seeds: int) -> Gap:
        """The arm beyond each of others on the first so many seeds, which all of them have."""
        by_row = self.by_row(arm, seeds)[None] - np.array([self.by_row(k, seeds) for k in others])
        flips = self.all_flips
        moved = np.array([flips[arm] + flips[k] for k in others])
        mixtures = self._mixtures(arm, others)
        if self.these:
            return Gap(by_row.mean(1), np.full(len(others), NONE), mixtures, moved, seeds, self.looks)
        squares = ((by_row - by_row.mean(1, keepdims=True)) ** 2).sum(1)
        floor = PSEUDO / self.rows**2
        common = np.maximum(squares / (self.rows - 1) / self.rows - moved / seeds, 0.0) + floor
        return Gap(by_row.mean(1), common, mixtures, moved, seeds, self.looks)

    def _mixtures(self, arm: int, others: Sequence[int]) -> np.ndarray:
        """[B, V] weights of the seeds' part of the differences' variance, of one seed, collected at BINS (each variance at the next larger one)."""
        spreads = self.spreads
        heavy = spreads.shared > LIGHT * spreads.shared.max()
        shared, cells = spreads.shared[heavy], int(heavy.sum())
        at = _places(self.fixed[arm])[heavy]  # [C, Z of the arm, Z of the other]
        own = shared[:, None] * spreads.deviation[arm][heavy]
        number = np.arange(cells * at.shape[2]).reshape(cells, 1, -1) * len(BINS) + at
        spread = np.bincount(number.ravel(), np.repeat(own, at.shape[2], axis=1).ravel(), cells * at.shape[2] * len(BINS)).reshape(-1, len(BINS))
        collected = np.array([spreads.deviation[k][heavy].ravel() for k in others]) @ spread
        for row in (row for row, k in enumerate(others) if self.fixed[k]):
            places = np.zeros_like(own, dtype=int) if self.fixed[arm] else _alone()[heavy]
            collected[row] = np.bincount(places.ravel(), own.ravel(), len(BINS))
        weights: np.ndarray = collected / collected.sum(1, keepdims=True)
        return weights


@functools.lru_cache(maxsize=2)
def _places(fixed: bool) -> np.ndarray:
    """[G, H, Z, Z] where in BINS the sum of two arms' variances lies. fixed: the first arm has none."""
    variances = Spreads.from_variances([0.0], [0], [0.0]).variances
    added = (np.zeros_like(variances) if fixed else variances)[..., :, None] + variances[..., None, :]
    return np.minimum(np.searchsorted(BINS, added), len(BINS) - 1)


@functools.lru_cache(maxsize=1)
def _alone() -> np.ndarray:
    """[G, H, Z] where in BINS one arm's variance lies."""
    return np.minimum(np.searchsorted(BINS, Spreads.from_variances([0.0], [0], [0.0]).variances), len(BINS) - 1)
