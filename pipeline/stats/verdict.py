"""The verdict on techniques that were compared: which one to take, that none should be trained, or that these data do not decide it.

Library: the report, `python -m pipeline.advise`, `sweep`, `tune` and the terminal all decide here and nowhere else; pipeline/reporting/verdict.py
has the words. docs/statistics.md states the rules:

- Differences are those of tiers.py, corrected. What is not told apart from the highest and lies within SLACK of it is as good: a tie.
- Ties go to the cheapest: the untouched base, then what trains nothing, then the least memory, then the least time. The highest is never called best.
- Training is advised where it is told apart from the untouched base. Else the verdict is not to train (a tie), or that it is undecided (the gap looks larger).
- A trained technique below the untouched base is set aside: its settings do not suit, which says nothing of the technique.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.stats.tiers import FEW, SIGNIFICANT, Comparison, Difference

SLACK = 0.02
"""What lies this much below the highest (a fraction), and is not told apart from it, is as good. That nothing is told apart alone is not enough: with
few rows or seeds that is true of techniques that are 15 points worse (benchmarks/advice.py showed it)."""
WORTH = 0.05
"""The difference that rows and seeds are counted for where techniques tie: a smaller one is seldom worth training for."""
POWER = 0.8
"""How often so many rows or seeds find a difference of that size."""
MOST_SEEDS = 20

Kind = Literal["take", "do_not_train", "undecided"]


@dataclass(frozen=True)
class Option:
    """One thing that can be taken: a technique, a setting, the untouched base.

    value: its metric, a fraction. trained: whether it is training that made it. memory: bytes at the peak; seconds: of training; None: not known.
    """

    name: str
    value: float
    base: bool = False
    trained: bool = True
    memory: float | None = None
    seconds: float | None = None

    @property
    def cost(self) -> tuple[bool, bool, float, float, float]:
        """What ties are sorted by. An untouched base needs no more memory than anything made of it, measured or not."""
        unknown = math.inf
        return not self.base, self.trained, unknown if self.memory is None else self.memory, unknown if self.seconds is None else self.seconds, -self.value


@dataclass(frozen=True)
class Evidence:
    """What a verdict rests on: `name` against `against` on the rows that all answered. against: None where there is nothing to hold it against."""

    rows: int
    """Test rows (or validation rows, of a search); 0: not compared on rows, and nothing is said of how many would decide."""
    covers_seeds: bool
    """False: single runs were compared, these weights and not their techniques."""
    seeds: int = 1
    against: str | None = None
    difference: Difference | None = None
    """`name` beyond `against`."""
    open: str | None = None
    """What `name` is not told apart from, and more rows or seeds were counted for."""
    gap: float | None = None
    """The difference that they were counted for, a fraction."""


@dataclass(frozen=True)
class Verdict:
    """take `name`; do_not_train: `name` (the untouched base, or what trains nothing) is as good; undecided: `name` leads the untouched base, not confirmed."""

    kind: Kind
    name: str | None
    """None: nothing could be compared."""
    tied: tuple[str, ...]
    """Not told apart from `name`, the highest first."""
    evidence: Evidence | None
    more_rows: int | None = None
    """Test rows beyond those there are that would decide, seeds as they are; None: no number would, or nothing is left to decide."""
    more_seeds: int | None = None
    """Seeds beyond those there are that would decide, rows as they are; None likewise. With `both`, rows and seeds together."""
    both: bool = False
    enough: bool = False
    """Whether the rows and seeds there are find such a gap POWER of the time."""
    below_base: tuple[str, ...] = ()
    """Trained techniques below the untouched base, by more than SLACK or told apart: no verdict on them."""
    options: tuple[Option, ...] = ()
    """All that were compared, the highest first."""
    untouched: str | None = None
    """The untouched base that was compared with; None: there is none."""
    lowest: bool = False
    """Whether `name` was taken for costing least, others being higher."""

    def option(self, name: str) -> Option:
        return next(one for one in self.options if one.name == name)

    @property
    def base(self) -> Option | None:
        return None if self.untouched is None else self.option(self.untouched)

    @property
    def decided(self) -> bool:
        """Whether nothing is left open that more rows or seeds were counted for."""
        return self.kind != "undecided" and self.evidence is not None and self.evidence.open is None


def decide(options: Sequence[Option], comparison: Comparison | None, slack: float = SLACK) -> Verdict:
    """The verdict on options.

    Args:
        options: what is to choose from; those that the comparison lacks are left out. Of several untouched bases the first counts.
        comparison: of at least these options, on the same rows; None: nothing was compared row by row.
        slack: a fraction; 0 for a search, where the highest is taken and only equals tie.
    """
    ranked = tuple(sorted(options, key=lambda one: (-one.value, one.cost)))
    compared = [one for one in ranked if comparison is not None and one.name in comparison.means]
    if comparison is None or not compared:
        return Verdict("undecided", None, (), None, options=ranked)
    base = next((one for one in options if one.base and one in compared), None)
    below = [one for one in compared if base and one.trained and _below(one, base, comparison, slack)]
    live = [one for one in compared if one not in below]
    alike = [one for one in live if one is live[0] or _same(one, live[0], comparison) and live[0].value - one.value <= slack + 1e-9]
    chosen, kind = _chosen(alike, base, comparison)
    tied = tuple(one.name for one in live if one is not chosen and _same(one, chosen, comparison))
    settled = Verdict(kind, chosen.name, tied, None, below_base=tuple(one.name for one in below), options=ranked,
                      untouched=base.name if base else None, lowest=chosen.value < live[0].value)
    return _with_evidence(settled, [one for one in live if one is not chosen], comparison, slack)


def _with_evidence(verdict: Verdict, others: Sequence[Option], comparison: Comparison, slack: float) -> Verdict:
    """The verdict with what it rests on, and what would decide what it leaves open. others: the highest first, without what is below the base."""
    name, base = str(verdict.name), verdict.untouched if verdict.untouched != verdict.name else None
    tied = [one for one in others if one.name in verdict.tied]
    trained = [one.name for one in tied if one.trained]
    if verdict.kind == "undecided":
        against = unsettled = base
    elif verdict.kind == "do_not_train":
        unsettled = next(iter(trained), None)
        against = unsettled or next((one.name for one in others if one.trained), None) or base or next((one.name for one in others), None)
    else:
        unsettled = next((one.name for one in tied), None)
        against = base or unsettled or next((one.name for one in others), None)
    pair = comparison.between(name, against) if against else None
    evidence = Evidence(comparison.rows, comparison.covers_seeds, pair.seeds if pair else 1, against, pair, unsettled)
    if unsettled is None or not comparison.rows:
        return replace(verdict, evidence=evidence)
    difference = comparison.between(name, unsettled)
    gap = max(abs(difference.difference), slack if verdict.kind == "undecided" else WORTH)
    more = _more(difference, gap, comparison)
    rows, seeds, both = more or (None, None, False)
    return replace(verdict, evidence=replace(evidence, gap=gap), more_rows=rows, more_seeds=seeds, both=both, enough=more is None)


def _same(one: Option, other: Option, comparison: Comparison) -> bool:
    return not comparison.between(one.name, other.name).significant


def _below(one: Option, base: Option, comparison: Comparison, slack: float) -> bool:
    return base.value - one.value > slack + 1e-9 or one.value < base.value and not _same(one, base, comparison)


def _chosen(alike: Sequence[Option], base: Option | None, comparison: Comparison) -> tuple[Option, Kind]:
    """Of those that are as good as the highest the cheapest; one that trains must be told apart from the untouched base."""
    cheapest = min(alike, key=lambda one: one.cost)
    if not cheapest.trained:
        return cheapest, "do_not_train"
    if base is None:
        return cheapest, "take"
    sure = [one for one in alike if not _same(one, base, comparison)]
    return (min(sure, key=lambda one: one.cost), "take") if sure else (alike[0], "undecided")


def _more(difference: Difference, gap: float, comparison: Comparison) -> tuple[int | None, int | None, bool] | None:
    """(rows, seeds, both) beyond those there are that find a gap so large POWER of the time, each alone; both together where neither does alone.

    None: those there are do. (None, None, False): no reasonable number does.
    """
    from scipy.special import ndtri

    pairs = len(comparison.pairs) if len(comparison.means) <= FEW else 1
    allowed = (gap / float(ndtri(1 - SIGNIFICANT / pairs / 2) + ndtri(POWER))) ** 2
    rows, seeds = comparison.rows, difference.seeds
    per_row = max(difference.row_variance, 1 / (rows + 2))  # alike on all of these rows is not alike: half a row more of each outcome (Agresti and Min, 2005)
    if difference.seed_variance is None:  # single runs: two more tell the spread over seeds, whatever it is
        return _further(per_row / allowed, rows), 2, False
    by_seed = difference.seed_variance * seeds
    if per_row / rows + by_seed / seeds <= allowed:
        return None
    more_rows = _further(per_row / (allowed - by_seed / seeds), rows) if by_seed / seeds < allowed else None
    more_seeds = math.ceil(by_seed / (allowed - per_row / rows)) - seeds if per_row / rows < allowed and by_seed else None
    if more_seeds is not None and more_seeds + seeds > MOST_SEEDS:
        more_seeds = None
    if more_rows is not None or more_seeds is not None:
        return more_rows, more_seeds, False
    wanted = next((s for s in range(seeds + 1, MOST_SEEDS + 1) if by_seed / s <= allowed / 2), None)
    return (None, None, False) if wanted is None else (_further(per_row / (allowed - by_seed / wanted), rows), wanted - seeds, True)


def _further(wanted: float, rows: int) -> int | None:
    """Rows beyond those there are, to two digits; None: there are enough."""
    if wanted <= rows:
        return None
    more = math.ceil(wanted) - rows
    unit = 10 ** max(0, math.floor(math.log10(more)) - 1)
    return math.ceil(more / unit) * unit
