"""How far measured accuracies may be from a technique's own: draws of the error of every (technique, size) mean.

Library of learning_curve.py. A cell's accuracy differs from what the technique gives on average for two reasons, which are drawn apart:

- The test rows. All cells answer the same ones, so their errors are alike: a normal draw whose covariance is that of the answers
  over the rows (between different seeds, so that what differs from seed to seed is not counted here). Without predictions: binomial,
  shared by a technique's sizes.
- The seed: training rows drawn, their order, initial weights. Its standard deviation is sigma · n^(-slope), sigma a technique's own, the slope
  common to all; a share of its variance may be common to all sizes of a seed. Three seeds tell little of a spread, so each draw takes
  another one that the data allow: sigma² · df / chi²(df) (what makes an interval of means Student's t), the common share likewise, and a
  slope with a chance proportional to its likelihood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SLOPES = tuple(i / 50 for i in range(26))
"""The slopes tried; 0.5 is a spread that falls with the square root of the rows."""
MOST_COMMON = 0.95


@dataclass(frozen=True)
class Measured:
    """One cell's result on the test rows."""

    technique: str
    rows: int
    """Labelled rows that the cell had: training and validation rows."""
    seed: int
    accuracy: float
    """A fraction, as are all accuracies here."""
    test_rows: int
    right: Mapping[str, bool] | None = None
    """Whether each test row, by id, was answered right; None: not known."""


Key = tuple[str, int]
"""Technique and labelled rows."""


@dataclass(frozen=True)
class Spread:
    """The spread of one technique over seeds."""

    slope: float
    parts: tuple[tuple[int, int, float], ...] = ()
    """(rows, degrees of freedom, variance) of every size with several seeds; none: one seed, nothing is known of it, and it counts as 0."""

    @property
    def df(self) -> int:
        """Degrees of freedom that it is known with."""
        return sum(df for _, df, _ in self.parts)

    def sigma(self, slope: float | None = None) -> float:
        """The factor of the spread, by maximum likelihood for a slope (its own if none is given)."""
        slope = self.slope if slope is None else slope
        return (sum(df * v * n ** (2 * slope) for n, df, v in self.parts) / self.df) ** 0.5 if self.df else 0.0

    def sd(self, rows: float, slope: float | None = None) -> float:
        """Standard deviation of a cell's accuracy over seeds, at a number of labelled rows."""
        return self.sigma(slope) * rows ** -(self.slope if slope is None else slope)


def spreads(cells: Mapping[Key, Sequence[Measured]]) -> dict[str, Spread]:
    """Every technique's spread, from the cells of a size that differ in the seed alone; the slope by maximum likelihood over all of them."""
    parts: dict[str, list[tuple[int, int, float]]] = {technique: [] for technique, _ in cells}
    for (technique, rows), group in cells.items():
        if len(group) > 1:
            parts[technique].append((rows, len(group) - 1, float(np.var([c.accuracy for c in group], ddof=1))))
    by_technique = {technique: Spread(0.0, tuple(p)) for technique, p in parts.items()}
    slope = SLOPES[int(np.argmax(_likelihoods(by_technique)))]
    return {technique: Spread(slope, one.parts) for technique, one in by_technique.items()}


def _likelihoods(spread: Mapping[str, Spread]) -> np.ndarray:
    """The likelihood of every slope over that of the likeliest, all techniques taken together."""
    known = [s for s in spread.values() if s.sigma()]
    logs = [-sum(s.df * np.log(s.sigma(g)) - g * sum(df * np.log(n) for n, df, _ in s.parts) for s in known) for g in SLOPES]
    return np.exp(np.array(logs, dtype=float) - max(logs))


def common_share(cells: Mapping[Key, Sequence[Measured]], spread: Mapping[str, Spread]) -> tuple[float, int, int]:
    """(Q, df, sizes): Q, with df degrees of freedom, expects 1 + (sizes - 1) · the share of the seed variance that all sizes of a seed have in common."""
    total, df, most = 0.0, 0, 1
    for technique, one in spread.items():
        groups = {n: {c.seed: c.accuracy for c in group} for (t, n), group in cells.items() if t == technique}
        seeds = sorted(set.intersection(*(set(g) for g in groups.values())))
        if one.sigma() and len(seeds) > 1 and len(groups) > 1:
            table = np.array([[g[s] for s in seeds] for g in groups.values()])
            table = (table - table.mean(1, keepdims=True)) / np.array([[one.sd(n)] for n in groups])
            total += len(groups) * float((table.mean(0) ** 2).sum())
            df, most = df + len(seeds) - 1, max(most, len(groups))
    return (total / df if df else 1.0), df, most


def row_covariance(cells: Mapping[Key, Sequence[Measured]]) -> np.ndarray:
    """[M, M] covariance that the choice of test rows gives to the means of the M groups of cells, in their order."""
    keys = list(cells)
    known = [c for group in cells.values() for c in group]
    ids = sorted(set.intersection(*(set(c.right or ()) for c in known)))
    if len(ids) < 2:
        sd = np.array([_binomial_sd(cells[k]) for k in keys])
        same = np.array([[a[0] == b[0] for b in keys] for a in keys])
        return np.outer(sd, sd) * same
    each = [np.array([[(c.right or {})[i] for i in ids] for c in cells[k]], dtype=float) for k in keys]
    cov = np.atleast_2d(np.cov(np.stack([e.mean(0) for e in each]))) / len(ids)
    for i, answers in enumerate(each):
        if (seeds := len(answers)) > 1:
            by_seed = float(np.var(answers, axis=1, ddof=1).sum()) / len(ids) / seeds**2
            cov[i, i] = max(0.0, (cov[i, i] - by_seed) * seeds / (seeds - 1))
    return cov


def _binomial_sd(group: Sequence[Measured]) -> float:
    p = sum(c.accuracy for c in group) / len(group)
    return float((p * (1 - p) / min(c.test_rows for c in group)) ** 0.5)


def errors(cells: Mapping[Key, Sequence[Measured]], spread: Mapping[str, Spread], inflation: Mapping[str, float], draws: int, seed: int) -> np.ndarray:
    """[draws, M] draws of the error of every group's mean accuracy, the same draw of rows for all techniques.

    Args:
        inflation: what a technique's seed error is multiplied by (1 where its curve fits).
    """
    rng = np.random.default_rng(seed)
    keys = list(cells)
    values, vectors = np.linalg.eigh(row_covariance(cells))
    drawn = rng.standard_normal((draws, len(keys))) @ (vectors * np.sqrt(np.clip(values, 0, None))).T
    q, df, sizes = common_share(cells, spread)
    common = np.clip((q * df / rng.chisquare(df, draws) - 1) / (sizes - 1), 0, MOST_COMMON) if df and sizes > 1 else np.zeros(draws)
    chances = _likelihoods(spread)
    slopes = rng.choice(len(SLOPES), draws, p=chances / chances.sum())
    for technique, one in spread.items():
        if not one.sigma():
            continue
        scale = np.sqrt(one.df / rng.chisquare(one.df, draws)) * inflation.get(technique, 1.0)
        shared = rng.standard_normal(draws)
        for i, (name, rows) in enumerate(keys):
            if name == technique:
                z = np.sqrt(common) * shared + np.sqrt(1 - common) * rng.standard_normal(draws)
                sd = np.array([one.sd(rows, g) for g in SLOPES])[slopes]
                drawn[:, i] += scale * z * sd / len(cells[name, rows]) ** 0.5
    return drawn
