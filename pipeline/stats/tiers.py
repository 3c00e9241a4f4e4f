"""Which techniques differ significantly: differences over seeds and test rows, corrected for being many, and letters.

Library of `python -m pipeline.report` and `python -m pipeline.compare`; docs/statistics.md says why this test, and `python -m benchmarks.tiers`
measures what it promises.

Model: the answer of technique t, seed s to row i has a random effect of the row, which is shared by all techniques (so they are compared paired),
of the row under this technique, and of the seed under this technique. The difference of two techniques' means over seeds is normal with variance

    Var_i(d_i) / n  +  sigma_a² / S_a  +  sigma_b² / S_b

where d_i is the difference on row i (means over seeds), n the rows, and sigma_t² the variance of the seeds' effect. A few seeds say
little about sigma_t, so it is not put in as if it were known: the p-value is averaged over the sigmas that the seeds of all techniques
allow (a hierarchical model: sigma_t is log-normal around a spread that all techniques share, with a heterogeneity of its own; TILT and
HETEROGENEITIES are their priors). Averaging over what is not known is Behrens' and Fisher's answer to unequal variances; sharing it over
techniques is Smyth's (2004). All pairs are corrected: comparisons with a best that the same data chose, corrected for those alone, find too
much. Up to FEW techniques the chance of any false difference is bounded (family-wise, Holm 1979); beyond, pairs are so many that nothing would
be significant at all, and the share of false ones among the significant differences is bounded (false discovery rate, Benjamini and Hochberg 1995).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.stats.bootstrap import Statistic, resampled

SIGNIFICANT = 0.05
FEW = 10
"""Techniques up to which at most one experiment in twenty has any false difference; beyond, at most one in twenty of the significant ones is false."""
SPREADS = (0.0015, 0.1, 20)
"""The shared spreads over seeds that are tried: lowest, highest (fractions), how many, evenly in the logarithm."""
TILT = 0.5
"""Before anything is seen a spread counts as its TILT-th power: flat in the logarithm (0) separates the same technique in up to 7%, flat (1) separates few."""
HETEROGENEITIES = (0.0, 0.35, 0.7, 1.05, 1.4, 1.8)
"""Standard deviations of a technique's log spread around the shared one that are tried."""
MOST = 0.15
"""No technique's spread over seeds is taken to be wider (a fraction)."""
NODES = 9  # of the quadrature over a technique's own log spread
NEGLIGIBLE = 1e-10  # of the largest weight of a mixture: what is lighter is left out, together less than 1e-6

Runs = Mapping[int, Mapping[str, float]]
"""{seed: {row id: answered right, or what a metric makes of the row}} of one technique."""


@dataclass(frozen=True)
class Difference:
    """One technique's accuracy beyond another's, fractions."""

    difference: float
    low: float
    high: float
    """95% interval, for this pair alone."""
    p: float
    """Two-sided, for this pair alone."""
    corrected: float
    """Corrected for all pairs (`correct`)."""
    row_variance: float = 0.0
    """Var_i(d_i), of the difference on one row: the rows' part of the variance is this over their number."""
    seed_variance: float | None = None
    """What the seeds add to the difference's variance, expected over what is known of their spread; None: nothing is (one seed)."""
    seeds: int = 1
    """The more of the two techniques' seeds, of those with any: `seed_variance` shrinks in proportion to them."""

    @property
    def significant(self) -> bool:
        return self.corrected < SIGNIFICANT


@dataclass(frozen=True)
class Comparison:
    """Techniques compared on the rows that all of them answered."""

    means: dict[str, float]
    """The metric over seeds and rows, the highest first."""
    pairs: dict[tuple[str, str], Difference]
    """By (technique, other), the better one first."""
    letters: dict[str, str]
    """Techniques that share a letter cannot be told apart; a is the highest one's (Piepho 2004)."""
    rows: int
    covers_seeds: bool
    """False: no technique here has several seeds, so nothing is known of their spread and the test is over rows alone."""

    @property
    def best(self) -> str:
        return next(iter(self.means))

    def between(self, one: str, other: str) -> Difference:
        """`one` beyond `other`."""
        if (one, other) in self.pairs:
            return self.pairs[one, other]
        reverse = self.pairs[other, one]
        return dataclasses.replace(reverse, difference=-reverse.difference, low=-reverse.high, high=-reverse.low)


def compare(answers: Mapping[str, Runs], fixed: Collection[str] = (), statistic: Statistic | None = None) -> Comparison | None:
    """Compare techniques; those without answers are left out. None where none is left or no row was answered by all.

    Args:
        statistic: makes the metric of rows' values; the rows' part of a difference's variance is then the paired bootstrap's. None: the mean of
            right and wrong answers, which needs no draws.
        fixed: techniques with nothing random in them, for which one run says all. Several runs with the same answers are taken as that, too.
    """
    right = on_common_rows({name: [by_row for by_row in seeds.values() if by_row] for name, seeds in answers.items()})
    if not right:
        return None
    techniques = {name: Technique.of(values, name in fixed, statistic) for name, values in right.items()}
    order = sorted(techniques, key=lambda name: (-techniques[name].level, name))
    ranked = [techniques[name] for name in order]
    compared = pairs_of(ranked)
    raw = [pair.p for pair in compared]
    pairs = {
        names: Difference(pair.point, pair.point - pair.half, pair.point + pair.half, p, corrected, *pair.planning)
        for names, pair, p, corrected in zip(itertools.combinations(order, 2), compared, raw, correct(raw, len(order)), strict=True)
    }
    apart = [names for names, one in pairs.items() if one.significant]
    means = {name: techniques[name].level for name in order}
    return Comparison(means, pairs, letters(order, apart), right[order[0]].shape[1], any(t.seeds > 1 for t in ranked))


def by_shares(shares: Mapping[str, float], rows: int) -> Comparison:
    """Compare means over so many rows of which the single answers are not known, as if each had rows of its own.

    Args:
        shares: means of values from 0 to 1 over the rows, whose variance is then at most share · (1 - share). Answers to the same rows agree more
            than those to other rows, so what differs here differs; little does.
    """
    order = sorted(shares, key=lambda name: -shares[name])
    names = list(itertools.combinations(order, 2))
    variances = [sum(shares[name] * (1 - shares[name]) for name in pair) for pair in names]
    gaps = [shares[one] - shares[other] for one, other in names]
    raw = [chance(gap, np.array([math.sqrt(v / rows)]), np.ones(1)) for gap, v in zip(gaps, variances, strict=True)]
    pairs = {}
    for pair, gap, variance, p, corrected in zip(names, gaps, variances, raw, correct(raw, len(order)) if raw else [], strict=True):
        half = 1.959964 * math.sqrt(variance / rows)
        pairs[pair] = Difference(gap, gap - half, gap + half, p, corrected, variance)
    apart = [pair for pair, one in pairs.items() if one.significant]
    return Comparison({name: shares[name] for name in order}, pairs, letters(order, apart), rows, covers_seeds=False)


def on_common_rows(answers: Mapping[Any, Sequence[Mapping[str, float]]]) -> dict[Any, np.ndarray]:
    """[S, n] values (of answers 0 and 1) on the rows that all runs answered, of every key that has runs; empty where there is no such row."""
    runs = {key: some for key, some in answers.items() if some}
    common = sorted(set.intersection(*(set(by_row) for some in runs.values() for by_row in some))) if runs else []
    return {key: np.array([[by_row[i] for i in common] for by_row in some], dtype=float) for key, some in runs.items()} if common else {}


@dataclass(frozen=True)
class Technique:
    """Answers [S, n]; seeds: S, or 0 where nothing is random; variance: of the seeds' means, 0 with less than two; flips: what of it comes
    from single rows that are answered now so, now so (it is in the rows' variance already)."""

    right: np.ndarray
    seeds: int
    variance: float
    flips: float
    draws: np.ndarray | None = None
    """[1 + R] the metric, mean over the seeds, on the rows as they are and on those of every draw; None: it is the mean of `right`."""

    @property
    def level(self) -> float:
        """The metric, mean over the seeds."""
        return float(self.right.mean() if self.draws is None else self.draws[0])

    @classmethod
    def of(cls, right: np.ndarray, fixed: bool = False, statistic: Statistic | None = None) -> Technique:
        """From answers [S, n] of 0 and 1, or the values that statistic makes the metric of; fixed: there is nothing random in it."""
        if fixed or (len(right) > 1 and (right == right[0]).all()):
            return cls(right[:1], 0, 0.0, 0.0, None if statistic is None else resampled(right[:1], statistic)[0])
        if statistic is not None:
            return cls._drawn(right, resampled(right, statistic))
        if len(right) == 1:
            return cls(right, 1, 0.0, 0.0)
        centred = right - right.mean(1, keepdims=True)
        return cls(right, len(right), float(right.mean(1).var(ddof=1)), float(centred.var(0, ddof=1).mean()) / right.shape[1])

    @classmethod
    def _drawn(cls, right: np.ndarray, draws: np.ndarray) -> Technique:
        """draws [S, 1 + R]. What of the seeds' variance comes from single rows is how the seeds' distances from their mean vary over the draws."""
        if len(right) == 1:
            return cls(right, 1, 0.0, 0.0, draws[0])
        apart = draws - draws.mean(0)
        flips = float(apart[:, 1:].var(1).sum()) / (len(right) - 1)
        return cls(right, len(right), float(draws[:, 0].var(ddof=1)), flips, draws.mean(0))


@dataclass(frozen=True)
class Spreads:
    """What the seeds of all techniques say of each one's spread: a mixture over shared spread x heterogeneity x own deviation.

    variances [G, H, Z]; shared [G, H]: weights of the first two; deviation [T, G, H, Z]: of the third, conditional on them. known: whether any technique
    has several seeds.
    """

    variances: Any
    shared: Any
    deviation: Any
    known: bool

    @classmethod
    def of(cls, ranked: Sequence[Technique]) -> Spreads:
        """From every technique's seeds."""
        return cls.from_variances([t.variance for t in ranked], [max(0, t.seeds - 1) for t in ranked], [t.flips for t in ranked])

    @classmethod
    def from_variances(cls, sample: Sequence[float], freedom: Sequence[float], flips: Sequence[float]) -> Spreads:
        """From the sample variances of the seeds' means, their degrees of freedom (0: one seed) and the part that single rows' flips have in them."""
        tried, weights = _tried(SPREADS, HETEROGENEITIES, NODES, MOST)
        df, v, beside = (np.array(values, dtype=float)[:, None, None, None] for values in (freedom, sample, flips))
        expected = tried**2 + beside
        fits = -0.5 * df * (np.log(expected) + v / expected) + np.log(weights)
        top = fits.max(-1, keepdims=True)
        evidence = top[..., 0] + np.log(np.exp(fits - top).sum(-1))
        together = evidence.sum(0) + TILT * np.log(np.geomspace(*SPREADS))[:, None]
        shared = np.exp(together - together.max())
        return cls(tried**2, shared / shared.sum(), np.exp(fits - evidence[..., None]), bool(sum(freedom)))

    def mixture(self, a: int, b: int, seeds_a: int, seeds_b: int) -> tuple[np.ndarray, np.ndarray]:
        """(variances that the seeds add to the difference of techniques a and b, their weights), flat. seeds: 0 for one without any."""
        def part(variance: np.ndarray, seeds: int, axis: int) -> np.ndarray:
            return np.expand_dims(variance / seeds if seeds else np.zeros_like(variance), axis)

        added = part(self.variances, seeds_a, 3) + part(self.variances, seeds_b, 2)
        weights = self.shared[..., None, None] * self.deviation[a][..., :, None] * self.deviation[b][..., None, :]
        return added.reshape(-1), weights.reshape(-1)


@functools.lru_cache(maxsize=4)
def _tried(spreads: tuple[float, float, int], heterogeneities: tuple[float, ...], count: int, most: float) -> tuple[np.ndarray, np.ndarray]:
    """(the own spreads [G, H, Z] that are tried, weights [Z] of the quadrature)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    tried = np.minimum(np.geomspace(*spreads)[:, None, None] * np.exp(np.array(heterogeneities)[None, :, None] * nodes), most)
    return tried, weights / weights.sum()


@dataclass(frozen=True)
class Pair:
    """Technique number a against number b: the point difference, and what its distance from 0 is measured with (None: rows alone)."""

    by_row: np.ndarray
    weight: int
    """by_row times this are whole numbers, where answers are right or wrong."""
    spread: np.ndarray | None
    weights: np.ndarray | None
    seeds: int = 1
    draws: np.ndarray | None = None
    """[1 + R] the difference on the rows as they are and on every draw; None: it is the mean of by_row."""
    known: bool = False
    """Whether anything is known of the spread over seeds."""

    @classmethod
    def of(cls, ranked: Sequence[Technique], spreads: Spreads, a: int, b: int) -> Pair:
        one, other = ranked[a], ranked[b]
        by_row, weight = one.right.mean(0) - other.right.mean(0), len(one.right) * len(other.right)
        draws = None if one.draws is None or other.draws is None else one.draws - other.draws
        by_rows = _mean_variance(by_row) if draws is None else float(draws[1:].var())
        if not spreads.known:
            return cls(by_row, weight, None, None) if draws is None else cls(by_row, weight, np.array([math.sqrt(by_rows)]), np.ones(1), 1, draws)
        added, weights = spreads.mixture(a, b, one.seeds, other.seeds)
        heavy = weights > NEGLIGIBLE * weights.max()
        spread, weights = np.sqrt(by_rows + added[heavy]), weights[heavy] / weights[heavy].sum()
        return cls(by_row, weight, spread, weights, max(1, one.seeds, other.seeds), draws, known=True)

    @property
    def point(self) -> float:
        return float(self.by_row.mean() if self.draws is None else self.draws[0])

    @property
    def p(self) -> float:
        """Two-sided."""
        if self.spread is None or self.weights is None:
            return sign_flip([round(self.weight * float(d)) for d in self.by_row])
        return chance(abs(self.point), self.spread, self.weights)

    @property
    def planning(self) -> tuple[float, float | None, int]:
        """The last three fields of its Difference."""
        by_rows = _mean_variance(self.by_row) if self.draws is None else float(self.draws[1:].var())
        known = self.known and self.spread is not None and self.weights is not None
        added = max(0.0, float((self.spread**2 * self.weights).sum()) - by_rows) if known else None  # type: ignore[operator]
        return by_rows * len(self.by_row), added, self.seeds

    @property
    def half(self) -> float:
        """Half the 95% interval's width."""
        spread, weights = self.spread, self.weights
        if spread is None or weights is None:
            return 1.959964 * math.sqrt(_mean_variance(self.by_row))
        from scipy.optimize import brentq

        def beyond(distance: float) -> float:
            return chance(distance, spread, weights) - SIGNIFICANT

        if not spread.any():
            return 0.0
        return 1.0 if beyond(1.0) > 0 else float(brentq(beyond, 0.0, 1.0, xtol=1e-9))


def _mean_variance(by_row: np.ndarray) -> float:
    return float(by_row.var(ddof=1)) / len(by_row) if len(by_row) > 1 else 0.0


def pairs_of(ranked: Sequence[Technique], numbers: Sequence[tuple[int, int]] | None = None) -> list[Pair]:
    """Pairs of techniques on the same rows, by their numbers (None: all pairs), uncorrected. Spreads are estimated from the seeds of all techniques."""
    spreads = Spreads.of(ranked)
    return [Pair.of(ranked, spreads, a, b) for a, b in (itertools.combinations(range(len(ranked)), 2) if numbers is None else numbers)]


def correct(raw: Sequence[float], techniques: int) -> list[float]:
    """The p-values of all pairs of so many techniques, corrected: Holm (1979) up to FEW, Benjamini and Hochberg (1995) beyond."""
    if techniques <= FEW:
        return holm(raw)
    from scipy.stats import false_discovery_control

    return [float(p) for p in false_discovery_control(raw, method="bh")]


def chance(distance: float, spread: np.ndarray, weights: np.ndarray) -> float:
    """How probable a normal as far from 0 as this is, two-sided, over standard deviations `spread` [M] with `weights` [M]."""
    from scipy.special import ndtr

    live = spread > 0
    return min(1.0, float((weights[live] * 2 * ndtr(-distance / spread[live])).sum() + weights[~live].sum() * float(distance == 0)))


def letters(order: Sequence[str], apart: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Compact letters (Piepho 2004, insert and absorb): two share one exactly if they are not in `apart`. order: the best first."""
    groups = [set(order)]
    for one, other in apart:
        split = []
        for group in groups:
            split += [group - {one}, group - {other}] if {one, other} <= group else [group]
        groups = [g for i, g in enumerate(split) if not any(g < h or (g == h and i > j) for j, h in enumerate(split))]
    groups.sort(key=lambda g: sorted(map(order.index, g)))
    return {name: "".join(chr(ord("a") + i % 26) + "'" * (i // 26) for i, group in enumerate(groups) if name in group) for name in order}


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
    chances = [(k, math.exp(every - math.lgamma(k + 1) - math.lgamma(count - k + 1))) for k in range(count + 1)]
    return [(k, p) for k, p in chances if p > 1e-16]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being many (Holm 1979), in the order given."""
    raw, corrected = np.array(p_values, dtype=float), np.empty(len(p_values))
    order = raw.argsort(kind="stable")
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(raw), 0, -1) * raw[order]))
    return corrected.tolist()
