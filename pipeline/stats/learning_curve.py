"""Learning curves: a technique's accuracy against labelled rows, and what the measured sizes can and cannot show.

Library. `fit` takes cells' results and gives a curve a technique; a curve gives its accuracy at any number of rows (`at`) and the rows that an
accuracy takes (`rows_for`), two curves where one overtakes the other (`crossover`), all with 95% intervals. docs/data_dependency.md says
how often these hold the truth.

A curve is acc(n) = a - b · n^(-c) (a power law that saturates, e.g. Hestness et al., 2017), a <= 1, b >= 0, 0.1 <= c <= 2; a technique
that takes no more rows than it has at the smallest size is a constant. Weighted least squares over the sizes' means, weights from the
spread over seeds; intervals from a parametric bootstrap: errors drawn as described below are added to the fitted
curve, and it is fitted again. Where the means lie farther from the curve than their spread lets them, the seeds' errors are drawn larger by that
ratio (Birge's): a power law is never quite right.

A cell's accuracy differs from what the technique gives on average for two reasons, which are drawn apart (`errors`):

- The test rows. All cells answer the same ones, so their errors are alike: a normal draw whose covariance is that of the answers
  over the rows (between different seeds, so that what differs from seed to seed is not counted here). Without predictions: binomial,
  shared by a technique's sizes.
- The seed: training rows drawn, their order, initial weights. Its standard deviation is sigma · n^(-slope), sigma a technique's own, the slope
  common to all; a share of its variance may be common to all sizes of a seed. Three seeds say little about a spread, so each draw takes
  another one that the data allow: sigma² · df / chi²(df) (what makes an interval of means Student's t), the common share likewise, and a
  slope with a chance proportional to its likelihood.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    right: Mapping[str, float] | None = None
    """By id, whether each test row was answered right, or what a metric that is a mean over rows makes of it; None: not known."""


Key = tuple[str, int]
"""Technique and labelled rows."""


@dataclass(frozen=True)
class Spread:
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


SMALLEST, LARGEST, SHAPES = 0.1, 2.0, 40
"""Range of the exponent c and how many values of it are tried first, evenly in its logarithm."""
FEWEST_SIZES = 3
TAIL = 2.5
"""Percent on either side of an interval."""
MISFIT = 0.01
"""Below this p-value of the lack-of-fit test a curve is said not to fit."""
STEPS = 240


@dataclass(frozen=True)
class Estimate:
    """An accuracy with its 95% interval, fractions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class RowsFor:
    """Labelled rows that an accuracy takes, with a 95% interval, within the sizes measured.

    A number equal to `smallest` stands for that many or fewer; None for not reached at `largest`.
    """

    target: float
    rows: float | None
    low: float | None
    high: float | None
    smallest: int
    largest: int


@dataclass(frozen=True)
class Curve:
    technique: str
    kind: str
    """power, or constant."""
    a: float
    b: float
    c: float
    sizes: tuple[int, ...]
    """Labelled rows of the cells that it was fitted to."""
    seeds: int
    """Most seeds at a size; with one, the intervals leave the spread of training out (unless it is constant over sizes measured)."""
    misfit_p: float | None
    """p-value of the lack-of-fit test of the sizes' means against the spread over seeds; None where there is no such spread."""
    spread: Spread
    draws: Any = dataclasses.field(repr=False, compare=False)
    """[draws, 3]: a, b · smallest^(-c) and c of every bootstrap draw; draw i has the same test rows in all curves of one fit."""

    @property
    def fits(self) -> bool:
        """Whether the sizes' means lie on the curve as well as their spread lets them."""
        return self.misfit_p is None or self.misfit_p >= MISFIT

    def value(self, rows: float) -> float:
        return min(1.0, max(0.0, self.a - self.b * rows**-self.c))

    def at(self, rows: float) -> Estimate:
        """The technique's expected accuracy at a number of labelled rows."""
        low, high = np.percentile(self.drawn([rows])[:, 0], [TAIL, 100 - TAIL])
        return Estimate(self.value(rows), float(low), float(high))

    def rows_for(self, target: float) -> RowsFor:
        """The labelled rows at which the curve reaches an accuracy."""
        grid = _grid(self.sizes[0], self.sizes[-1])
        crossings = np.array([_last_crossing(grid, self._values(grid)[None] - target)[0], *_last_crossing(grid, self.drawn(grid) - target)])
        ends = [None if np.isinf(v) else float(v) for v in (crossings[0], *_quantiles(crossings[1:]))]
        return RowsFor(target, ends[0], ends[1], ends[2], self.sizes[0], self.sizes[-1])

    def drawn(self, rows: Sequence[float] | np.ndarray) -> np.ndarray:
        """[draws, len(rows)] accuracies of the bootstrap draws."""
        a, drop, c = self.draws.T[:, :, None]
        return np.clip(a - drop * (np.asarray(rows, dtype=float) / self.sizes[0]) ** -c, 0, 1)

    def _values(self, rows: np.ndarray) -> np.ndarray:
        return np.array([self.value(n) for n in rows])


@dataclass(frozen=True)
class Crossover:
    """Where one technique overtakes another, within the sizes that both were measured at."""

    ahead: str
    """The technique whose curve is the higher one at `largest`."""
    behind: str
    verdict: str
    """crosses: it overtakes at `rows`; ahead: it is ahead at every size; ahead_from: it is ahead from `high` rows on, below that the data cannot
    tell; unclear: the data do not show which is ahead at `largest`."""
    rows: float | None
    """From here to `largest` it is ahead; None unless it crosses."""
    low: float | None
    high: float | None
    """The 95% interval of `rows`, in an unclear case None; `smallest` stands for that many or fewer."""
    behind_until: float | None
    """Up to here the other one is ahead with as much certainty; None: nowhere."""
    smallest: int
    largest: int


def fit(measured: Sequence[Measured], constant: Collection[str] = (), draws: int = 2000, seed: int = 0) -> dict[str, Curve]:
    """The curve of every technique with at least three sizes, and of every one in `constant`, whatever its sizes.

    Args:
        constant: techniques that use no more rows than they have at the smallest size (zero-shot, few-shot).
        draws: bootstrap draws; the same `seed` gives the same curves.
    """
    cells: dict[Key, list[Measured]] = {}
    for one in sorted(measured, key=lambda m: (m.technique, m.rows, m.seed)):
        cells.setdefault((one.technique, one.rows), []).append(one)
    sizes: dict[str, tuple[int, ...]] = {}
    for technique, rows in cells:
        sizes[technique] = (*sizes.get(technique, ()), rows)
    sizes = {t: rows for t, rows in sizes.items() if t in constant or len(rows) >= FEWEST_SIZES}
    cells = {key: group for key, group in cells.items() if key[0] in sizes}
    spread = spreads(cells)
    fits = {t: _Fit(cells, t, sizes[t], spread[t], t in constant) for t in sizes}
    drawn = errors(cells, spread, {t: f.inflation for t, f in fits.items()}, draws, seed) if cells else None
    keys = list(cells)
    return {t: f.curve(drawn[:, [keys.index((t, n)) for n in f.sizes]]) for t, f in fits.items() if drawn is not None}


class _Fit:
    """One technique's means, weights and fitted curve."""

    def __init__(self, cells: Mapping[Key, Sequence[Measured]], technique: str, sizes: tuple[int, ...], spread: Spread, constant: bool) -> None:
        groups = [cells[technique, n] for n in sizes]
        self.technique, self.sizes, self.spread, self.constant = technique, sizes, spread, constant
        self.seeds = max(map(len, groups))
        self.means = np.array([sum(c.accuracy for c in g) / len(g) for g in groups])
        sd = np.array([spread.sd(n) or 1.0 for n in sizes])
        self.weights = np.array([len(g) for g in groups]) / sd**2
        self.fitted = self._fitted(self.means[None])[0]
        self.misfit_p, self.inflation = self._misfit()

    def _fitted(self, means: np.ndarray) -> np.ndarray:
        if not self.constant:
            return fit_power(self.sizes, means, self.weights)
        return np.stack([means @ self.weights / self.weights.sum(), np.zeros(len(means)), np.ones(len(means))], 1)

    def _values(self) -> np.ndarray:
        a, drop, c = self.fitted
        return a - drop * (np.array(self.sizes) / self.sizes[0]) ** -c

    def _misfit(self) -> tuple[float | None, float]:
        free = len(self.sizes) - (1 if self.constant else 3)
        if not self.spread.sigma() or free < 1:
            return None, 1.0
        from scipy.special import fdtrc

        ratio = float((self.weights * (self.means - self._values()) ** 2).sum()) / free
        return float(fdtrc(free, self.spread.df, ratio)), max(1.0, ratio) ** 0.5

    def curve(self, errors: np.ndarray) -> Curve:
        a, drop, c = map(float, self.fitted)
        draws = self._fitted(self._values() + errors)
        return Curve(self.technique, "constant" if self.constant else "power", a, drop * self.sizes[0] ** c, c, self.sizes, self.seeds,
                     self.misfit_p, self.spread, draws)


def fit_power(sizes: Sequence[int], means: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[B, K] means at K sizes to [B, 3]: a, b · sizes[0]^(-c), c of the least weighted squares.

    For a given c the curve is linear in a and b, and with two bounds the best pair is in closed form. Values of c are tried over their
    range, then the lowest point of the parabola through the best and its neighbours.
    """
    n, w = np.asarray(sizes, dtype=float) / sizes[0], weights / weights.sum()
    logs = np.linspace(np.log(SMALLEST), np.log(LARGEST), SHAPES)
    missed = np.stack([_pair(np.array([np.exp(v)]), n, means, w)[2] for v in logs], 1)
    at, rows = np.clip(missed.argmin(1), 1, SHAPES - 2), np.arange(len(means))
    left, middle, right = (missed[rows, at + k] for k in (-1, 0, 1))
    bend = left - 2 * middle + right
    turn = np.clip(np.where(bend > 0, (left - right) / np.where(bend > 0, 2 * bend, 1), np.where(left < right, -1, 1)), -1, 1)
    c = np.exp(logs[at] + turn * (logs[1] - logs[0]))
    a, drop, least = _pair(c, n, means, w)
    tried = np.exp(logs[missed.argmin(1)])
    worse = least > missed.min(1)
    if worse.any():
        a[worse], drop[worse], _ = _pair(tried[worse], n, means[worse], w)
        c = np.where(worse, tried, c)
    return np.stack([a, drop, c], 1)


def _pair(c: np.ndarray, n: np.ndarray, means: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best a and drop, 0 <= drop and a <= 1, for exponents c [B] or [1], and the weighted squares that they leave."""
    x = n ** -c[:, None]
    mean = (x @ w)[:, None]
    drop = np.maximum(0.0, -(means * (w * (x - mean))).sum(1) / ((x - mean) ** 2 @ w))
    a = means @ w + drop * mean[:, 0]
    drop = np.where(a > 1, np.maximum(0.0, ((1 - means) * (w * x)).sum(1) / (x**2 @ w)), drop)
    a = np.minimum(a, 1.0)
    return a, drop, (means - a[:, None] + drop[:, None] * x) ** 2 @ w


def crossover(one: Curve, other: Curve) -> Crossover:
    """Where one of two curves of the same fit overtakes the other for good, within the sizes that both were measured at."""
    ranged = [c for c in (one, other) if c.kind == "power"] or [one, other]
    smallest, largest = max(c.sizes[0] for c in ranged), min(c.sizes[-1] for c in ranged)
    ahead, behind = (one, other) if one.value(largest) >= other.value(largest) else (other, one)
    grid = _grid(smallest, largest)
    gaps = ahead.drawn(grid) - behind.drawn(grid)
    low, high = _quantiles(_last_crossing(grid, gaps))
    until, _ = _quantiles(_first_crossing(grid, gaps))
    point = float(_last_crossing(grid, (ahead._values(grid) - behind._values(grid))[None])[0])
    verdict = "unclear" if np.isinf(high) else "crosses" if low > smallest else "ahead_from" if high > smallest else "ahead"
    known = verdict != "unclear"
    return Crossover(
        ahead.technique, behind.technique, verdict, min(max(point, low), high) if verdict == "crosses" else None, low if known else None,
        high if known else None, until if until > smallest else None, smallest, largest,
    )


def _grid(smallest: float, largest: float) -> np.ndarray:
    return np.geomspace(smallest, largest, STEPS) if largest > smallest else np.array([float(smallest)])


def _last_crossing(grid: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """[B]: from where to the grid's end each row of gaps [B, G] stays at or above 0; its start if everywhere, infinite if not at its end."""
    under = gaps < 0
    last = len(grid) - 1 - np.argmax(under[:, ::-1], 1)
    edge = np.where(under.any(1), np.inf, grid[0])
    inside = under.any(1) & (last < len(grid) - 1)
    return _between(grid, gaps, last, inside, edge)


def _first_crossing(grid: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """[B]: up to where from the grid's start each row of gaps stays below 0; its start if nowhere, its end if everywhere."""
    over = gaps >= 0
    first = np.argmax(over, 1)
    edge = np.where(over.any(1), grid[0], grid[-1])
    return _between(grid, gaps, np.maximum(first - 1, 0), over.any(1) & (first > 0), edge)


def _between(grid: np.ndarray, gaps: np.ndarray, index: np.ndarray, inside: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """`otherwise`; where `inside`, the zero between grid[index] and the next point, in the logarithm of the rows."""
    rows, at = np.nonzero(inside)[0], index[inside]
    before, after = gaps[rows, at], gaps[rows, at + 1]
    share = before / np.where(before == after, 1, before - after)
    otherwise = otherwise.copy()
    otherwise[rows] = grid[at] * (grid[at + 1] / grid[at]) ** share
    return otherwise


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    """The 95% interval's ends; an end among infinite values is infinite."""
    low, high = np.percentile(values, [TAIL, 100 - TAIL], method="closest_observation")
    return float(low), float(high)
