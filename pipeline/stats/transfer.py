"""What techniques are expected to score on a task and a base where they were not measured, from where they were.

Library of `python -m pipeline.advise`; docs/advice.md states the rule, and `python -m benchmarks.advice` measures what its intervals promise.

A place is a task on a base. The expected metric of technique k on task t and base b is

    level + task_t + base_b + place_tb + scale_tb · (technique_k + with_task_tk + with_base_bk + rest_tbk),

each part normal around 0 with a variance of its own (crossed random effects): a part that two places share carries over, the others do not. scale_tb is
log-normal with SCALE: how far apart techniques lie on a place. Tasks differ in that (an easy one tells them apart little), and one that is not known makes the
tails heavy. Measured values have a known variance around it (seeds, test rows). A handful of tasks and two bases tell a variance badly, so none is put in as if
it were known: they are drawn from what the measurements allow (a random walk, one number at a time; the same draws every time) under wide priors, Student's t
with 3 degrees of freedom around 0 with the scales of PRIOR (Gelman 2006). A prediction is the mixture over these draws of the conditional normal distributions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PRIOR = {"task": 0.25, "base": 0.25, "place": 0.15, "technique": 0.10, "with_task": 0.05, "with_base": 0.05, "rest": 0.05}
"""The scale that a part's standard deviation is thought to have before anything is measured, a fraction."""
FREEDOM = 3
SPREADS = FREEDOM * np.array(list(PRIOR.values())) ** 2
"""What a variance is divided by in that prior's density."""
SCALE = 0.5
"""The standard deviation of the logarithm of a place's scale."""
LEVEL = 0.3
"""That of the mean over everything, around a half."""
WARM, DRAWS, EVERY = 60, 100, 3
"""Rounds that settle the walk's steps; draws that are kept; rounds from one to the next."""
JITTER = 1e-8
"""Added to variances, which keeps the matrices regular: a hundredth of a point, squared."""
MOST = 1.0
"""No part's standard deviation is above this: a metric is a fraction."""
SHARED = 3
"""The first parts of PRIOR, which all techniques on a place have in common."""

Target = tuple[str, str, str]
"""(task, base, technique)."""


@dataclass(frozen=True)
class Level:
    """What was measured. value: a fraction; variance: its own around what is expected of the technique there (seeds, test rows)."""

    task: str
    base: str
    technique: str
    value: float
    variance: float


@dataclass(frozen=True)
class Transfer:
    """Targets' expected metrics: means [D, T] and covariances [D, T, T] of D draws."""

    targets: tuple[Target, ...]
    means: np.ndarray
    covariances: np.ndarray

    def value(self, target: Target) -> float:
        return float(self.means[:, self.targets.index(target)].mean())

    def interval(self, target: Target, variance: float, level: float = 0.95) -> tuple[float, float]:
        """Of a measured value with `variance` (a fraction squared) of its own around what is expected there."""
        at = self.targets.index(target)
        return _quantiles(self.means[:, at], self.covariances[:, at, at] + variance, level)

    def gap(self, one: Target, other: Target, level: float = 0.95) -> tuple[float, float, float]:
        """(mean, low, high) of what is expected of one beyond the other."""
        at, to = self.targets.index(one), self.targets.index(other)
        spread = self.covariances[:, at, at] + self.covariances[:, to, to] - 2 * self.covariances[:, at, to]
        return self.value(one) - self.value(other), *_quantiles(self.means[:, at] - self.means[:, to], spread, level)


def transfer(levels: Sequence[Level], targets: Sequence[Target]) -> Transfer:
    """What the levels say of the targets. Raises ValueError where there is no level."""
    if not levels:
        raise ValueError("nothing was measured")
    known: list[Target] = [(one.task, one.base, one.technique) for one in levels]
    places = sorted({value[:2] for value in (*known, *targets)})
    y, noise = (np.array(values) for values in zip(*((one.value - 0.5, one.variance) for one in levels), strict=True))
    whole = _Model([*known, *targets], places)
    draws = _draws(_Model(known, places), len(places), y, noise)
    means, covariances = zip(*(_conditional(whole.covariance(draw), y, noise) for draw in draws), strict=True)
    return Transfer(tuple(targets), np.array(means), np.array(covariances))


class _Model:
    """The covariance [n, n] of values by a vector: the logarithms of the parts' standard deviations, then the places' scales (of all `places`)."""

    def __init__(self, values: Sequence[Target], places: Sequence[tuple[str, str]]) -> None:
        task, base, technique = (np.unique(names, return_inverse=True)[1] for names in zip(*values, strict=True))
        t, b, k = ((codes[:, None] == codes).ravel() for codes in (task, base, technique))
        self.shared = np.array([t, b, t & b], float)
        self.own = np.array([k, t & k, b & k, t & b & k], float)
        self.place = np.array([places.index(value[:2]) for value in values])
        self.count = len(values)

    def covariance(self, at: np.ndarray) -> np.ndarray:
        variances, scale = np.exp(2 * at[: len(PRIOR)]), np.exp(SCALE * at[len(PRIOR) :])[self.place]
        whole: np.ndarray = (variances[SHARED:] @ self.own).reshape(self.count, self.count)
        whole *= scale[:, None]
        whole *= scale
        whole += (variances[:SHARED] @ self.shared).reshape(self.count, self.count)
        whole += LEVEL**2
        return whole

    def log_density(self, at: np.ndarray, y: np.ndarray, noise: np.ndarray) -> float:
        """Of the vector, given the values y with the covariance `noise` of their own; without the constant."""
        from scipy.linalg.lapack import dpotrf, dtrtrs

        logs, scales = at[: len(PRIOR)], at[len(PRIOR) :]
        if logs.max() > math.log(MOST):
            return -math.inf
        lower, failed = dpotrf((self.covariance(at) + noise).T, lower=1, overwrite_a=1)
        if failed:
            raise ValueError(f"the covariance is singular at {at}")
        z, _ = dtrtrs(lower, y, lower=1)
        prior = (logs - (FREEDOM + 1) / 2 * np.log1p(np.exp(2 * logs) / SPREADS)).sum() - 0.5 * scales @ scales
        return float(prior - 0.5 * z @ z - np.log(lower.diagonal()).sum())


def _draws(model: _Model, places: int, y: np.ndarray, noise: np.ndarray) -> list[np.ndarray]:
    """Vectors drawn from what the measurements allow; the scale of a place without any, from its prior."""
    rng = np.random.default_rng(0)
    at = np.concatenate([np.log(list(PRIOR.values())) - 0.7, np.zeros(places)])
    walked = [*range(len(PRIOR)), *(len(PRIOR) + np.unique(model.place))]
    free = np.setdiff1d(np.arange(len(PRIOR), len(at)), walked)
    own = np.diag(noise + JITTER)
    step, density, kept = np.full(len(at), 0.6), model.log_density(at, y, own), []
    for turn in range(WARM + DRAWS * EVERY):
        for j in walked:
            trial = at.copy()
            trial[j] += step[j] * rng.standard_normal()
            there = model.log_density(trial, y, own)
            taken = math.log(rng.random()) < there - density
            if taken:
                at, density = trial, there
            if turn < WARM:
                step[j] *= math.exp(0.3 * (taken - 0.4))
        if turn >= WARM and (turn - WARM) % EVERY == EVERY - 1:
            drawn = at.copy()
            drawn[free] = rng.standard_normal(len(free))
            kept.append(drawn)
    return kept


def _conditional(whole: np.ndarray, y: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, covariance) of the values behind the measured ones."""
    n = len(y)
    gain = np.linalg.solve(whole[:n, :n] + np.diag(noise + JITTER), whole[:n, n:]).T
    return 0.5 + gain @ y, whole[n:, n:] - gain @ whole[:n, n:]


def _quantiles(means: np.ndarray, variances: np.ndarray, level: float) -> tuple[float, float]:
    """The ends of the middle `level` of a mixture of normal distributions."""
    from scipy.special import ndtr

    sds = np.sqrt(np.maximum(variances, 1e-12))

    def at(share: float) -> float:
        low, high = float((means - 9 * sds).min()), float((means + 9 * sds).max())
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if ndtr((middle - means) / sds).mean() < share else (low, middle)
        return (low + high) / 2

    return at((1 - level) / 2), at((1 + level) / 2)
