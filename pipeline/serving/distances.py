"""How far a merged model's answers lie from those of the adapter beside its base, and whether that is the adapter's loss or the rounding of any model.

Library of `python -m pipeline.export` and of `pipeline.evaluate split=merged`. Distributions are log-probabilities, fp32 [tokens, vocabulary].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KEPT_LEAST = 0.5
"""Share of the adapter's change that a merge keeps; below it, more was rounded away than kept."""
NOTHING = 1e-6
"""Nats a token: an adapter that changes less than this has nothing to lose."""
TOKENS_AT_ONCE = 128


@dataclass(frozen=True)
class Fate:
    """What a merge does to an adapter. effect: nats a token from the base to the adapter beside it; the rest as records.evaluations.Merged."""

    effect: float
    drift: float
    base_drift: float
    left: float
    verdict: str


def divergence(before: Any, after: Any) -> float:
    """Mean Kullback-Leibler divergence of the distributions after from those before, nats a token."""
    return float((before.exp() * (before - after)).sum(-1).mean())


def left(base: Any, attached: Any, rounded: Any, merged: Any) -> float:
    """Share of the adapter's change that a merge keeps: 1 - Var(e) / Var(d), where d = log attached - log base is what the adapter changes beside its base,
    and e is how far log merged - log rounded, what is left of it over the base rounded alike, lies from d.

    1: all is kept; 0: merged and rounded base are the same; below 0: rounding changes more than is kept. Variances are over the vocabulary, under the mean
    of the attached and the base distribution, and summed over tokens; to second order half of such a variance is the Kullback-Leibler divergence.
    """
    lost = whole = 0.0
    for at in range(0, len(base), TOKENS_AT_ONCE):
        b, a, r, m = (each[at : at + TOKENS_AT_ONCE] for each in (base, attached, rounded, merged))
        weights, change = (b.exp() + a.exp()) / 2, a - b
        whole += _variance(weights, change)
        lost += _variance(weights, m - r - change)
    return 1 - lost / whole if whole else 1.0


def _variance(weights: Any, values: Any) -> float:
    """Summed over rows."""
    middle = (weights * values).sum(-1, keepdim=True)
    return float((weights * (values - middle) ** 2).sum())


def verdict(effect: float, drift: float, base_drift: float, kept: float) -> str:
    """One of records.evaluations.SAID.

    too_much: the merged model is farther from the adapter than by the loss of its whole change and the rounding of the base together, which can be no more
    than 2 (effect + base_drift): (a + b)² <= 2 a² + 2 b², distances being roots of divergences. rounded_away: less than KEPT_LEAST of the change is left.
    base_changed: the change is left, but the precision changes the base itself by more than that.
    """
    if drift > 2 * (effect + base_drift) + NOTHING:
        return "too_much"
    if effect < NOTHING:
        return "kept"
    if kept < KEPT_LEAST:
        return "rounded_away"
    return "base_changed" if base_drift > effect else "kept"


def fate(base: Any, attached: Any, rounded: Any, merged: Any) -> Fate:
    """By the distributions of the base, of the adapter beside it, of the base in the merged model's precision, and of the merged model."""
    rounded, merged = rounded.to(base.device), merged.to(base.device)
    effect, drift, control = divergence(base, attached), divergence(attached, merged), divergence(base, rounded)
    kept = left(base, attached, rounded, merged)
    return Fate(effect, drift, control, kept, verdict(effect, drift, control, kept))
