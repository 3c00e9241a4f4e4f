"""Which technique's next seed is worth most, who leaves the race, and when it is decided: numbers in, decisions out.

Library of `python -m pipeline.race` and of `python -m benchmarks.race`, which replays it on finished cells. It runs nothing and reads nothing: `Race.add` takes
what a seed gave, `Race.next` says what to run. The same answers and seconds make the same decisions, so that a race resumes from its finished cells.

The claim. Arm c is named when every other arm b has left, or was shown not to be more than `within` better than c. Let b* be the best arm. A wrong name
needs a pair (c, b*) whose difference came to look better for c than it is by more than its bound at some look; pair (a, b*) has chance error * w_a of that
(looking.py), and the weights w_a of all arms add up to 1. So the chance of a wrong name is at most `error`, whatever runs when, and whenever it ends.
The weights come from screening, which saw neither test rows nor these seeds: who did well there is given more of the error to be named with.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.stats.looking import LOOKS, PSEUDO, Answers, Gap, critical

LEADERS = 3
"""Arms with the highest metric that others are held against."""
FIRST, FIRST_SEEDS = 4, 2
"""The first arms of screening that run with several seeds before the others begin."""
SCOUTS, SCOUT_SEEDS, ARMS_A_SCOUT = 4, 4, 5
"""The cheapest arms, at most so many, one for every five, which run with still more: then it is known how wide seeds spread, and a single one of another
arm can tell."""
FUTILE = 0.02
"""A name needs all pairs of the leader decided; where that has a smaller chance, with any number of seeds, no more is spent on it."""
SURE = 0.9
"""Of the chance that a pair is decided at all: what it takes is counted up to the look that has so much of it."""
POLISHED, POLISHED_SEEDS = 3, 3
"""Where no name can be had: the arms of which most is expected, and the seeds that they get, so that the one that is taken is well chosen."""
LIKELY, PATIENCE = 0.5, 3.0
"""Then, too: an arm that is seen more than `within` below is pursued where it is as likely as that to leave, for so many usual seeds' price at most."""
OVER = 1.15
"""A seed is begun if so many times its price is left."""
EVEN = 0.5
"""Of the error, the part that is shared out evenly; the rest goes by rank in screening."""


@dataclass(frozen=True)
class Rules:
    """What is asked: within (a fraction), with which error, looking after so many seeds. most: seeds of an arm."""

    within: float
    error: float
    looks: tuple[int, ...] = LOOKS
    these: bool = False
    """Whether the statement is on these very test rows; False: on all rows that they are a sample of."""

    @property
    def most(self) -> int:
        return self.looks[-1]


@dataclass(frozen=True)
class Arm:
    """A technique in the race.

    price_s: device seconds of a seed, forecast. rank: in screening, from 1. packs: whether seeds may be trained at once. cost: what ties go by, least first.
    """

    name: str
    price_s: float
    rank: int
    packs: bool = False
    cost: tuple[float, ...] = ()


@dataclass(frozen=True)
class Action:
    """Run the next seeds of an arm."""

    arm: int
    seeds: int = 1


@dataclass(frozen=True)
class Left:
    """An arm that left the race: shown to be below `by` at a look, by the difference that was seen there (a fraction)."""

    by: int
    seeds: int
    difference: float
    spent_s: float
    """Device seconds of the whole race until then."""


@dataclass(frozen=True)
class Open:
    """A pair that is not decided: `arm` could be more than `within` better than the leader."""

    arm: int
    seeds: int
    """That both have."""
    needed: int | None
    """Seeds of both at which it would be decided in half of all cases; None: with no number of seeds, the test rows are too few."""
    hours: float | None
    """That those would take, of this arm alone."""


@dataclass
class Race:
    """See above. arms: in any order. rows: test rows. Prices are seconds of the device."""

    arms: Sequence[Arm]
    rows: int
    rules: Rules
    spent_s: float = 0.0
    left: dict[int, Left] = field(default_factory=dict)
    cleared: set[tuple[int, int]] = field(default_factory=set)
    """(c, b): b was shown not to be more than `within` better than c."""
    refused: set[int] = field(default_factory=set)
    """Arms that gave no result, and run no more."""
    course: list[tuple[float, int]] = field(default_factory=list)
    """(device seconds of the race, arm) of every seed that was answered."""

    def __post_init__(self) -> None:
        self.answers = Answers(len(self.arms), self.rows, self.rules.looks, self.rules.these)
        self.seconds: list[list[float]] = [[] for _ in self.arms]
        self._ratio = 1.0
        self.weights = weights(max(arm.rank for arm in self.arms))[[arm.rank - 1 for arm in self.arms]]

    # what was seen

    def add(self, arm: int, right: np.ndarray, seconds: float, fixed: bool = False) -> None:
        """A seed of an arm: its answers [n] to the test rows, and the device seconds that it took. fixed: nothing is random in this arm."""
        self.spend(arm, seconds)
        self.course.append((self.spent_s, arm))
        self.answers.add(arm, right, fixed)
        if fixed or len(self.answers.runs[arm]) in self.rules.looks:
            self._judge(arm)

    def spend(self, arm: int, seconds: float) -> None:
        """Seconds that gave no answers: a collapsed seed, a run that was stopped."""
        self.seconds[arm].append(seconds)
        self.spent_s += seconds
        ratios = [sum(s) / len(s) / self.arms[k].price_s for k, s in enumerate(self.seconds) if s and self.arms[k].price_s > 0]
        self._ratio = statistics.median(ratios) if ratios else 1.0

    def drop(self, arm: int) -> None:
        """The arm cannot be run (out of memory, no usable seed): nothing is known of it, so that no claim covers it."""
        self.refused.add(arm)

    @property
    def alive(self) -> list[int]:
        """Arms that may still be the best, those with the highest metric first; arms without a seed last."""
        live = [k for k in range(len(self.arms)) if k not in self.left and k not in self.refused]
        return sorted(live, key=lambda k: (-self.answers.level(k), k) if self.answers.runs[k] else (1.0, self.arms[k].rank))

    def price(self, arm: int) -> float:
        """Seconds of a seed: measured, else forecast and corrected by what was measured of others."""
        if self.seconds[arm]:
            return sum(self.seconds[arm]) / len(self.seconds[arm])
        return self.arms[arm].price_s * self._ratio

    def look(self, arm: int, other: int) -> int:
        """The last look that both have the seeds for; 0: none."""
        seeds = min(self.answers.seeds(arm), self.answers.seeds(other))
        return max((s for s in self.rules.looks if s <= seeds), default=0)

    def gaps(self, arm: int, others: Sequence[int]) -> list[tuple[list[int], Gap]]:
        """The arm against others that have a seed, each at its last look with the arm."""
        by_look: dict[int, list[int]] = {}
        for k in others:
            if k != arm and (seeds := self.look(arm, k)):
                by_look.setdefault(seeds, []).append(k)
        return [(group, self.answers.gap(arm, group, seeds)) for seeds, group in by_look.items()]

    def _judge(self, new: int) -> None:
        """Who is shown to be below a leader leaves; whom a leader is shown to be within reach of is cleared. new: the arm that answered, whose pairs are
        looked at."""
        for leader in [k for k in self.alive if self.answers.runs[k]][:LEADERS]:
            if leader in self.left:
                continue
            allowed, level = self.rules.error * self.weights[leader], self.answers.level(leader)
            others = [k for k in (self.alive if leader == new else [new]) if k != leader and k not in self.left and self.answers.runs[k]]
            for group, gap in self.gaps(leader, [k for k in others if (leader, k) not in self.cleared or self.answers.level(k) < level]):
                below, within = gap.chance_below(0.0), gap.chance_below(self.rules.within)
                for k, p, q, difference in zip(group, below, within, gap.point, strict=True):
                    if q <= allowed:
                        self.cleared.add((leader, k))
                    if p <= allowed:
                        self.left[k] = Left(leader, gap.seeds, float(difference), self.spent_s)

    @property
    def named(self) -> int | None:
        """The cheapest arm that all others have left to, or were shown to be no more than `within` better than; None: undecided."""
        alive = self.alive
        able = [c for c in alive if self.answers.runs[c] and all(b == c or (c, b) in self.cleared for b in alive)]
        return min(able, key=lambda c: (self.arms[c].cost, -self.answers.level(c)), default=None)

    # what comes next

    def next(self, left_s: float) -> Action | None:
        """What to run with so many seconds left; None: it is decided, or nothing that can be afforded decides anything."""
        return next(iter(self.batch(left_s)), None)

    def batch(self, left_s: float, count: int = 1) -> list[Action]:
        """Up to so many actions of different arms, which run at once, the most valuable first.

        Every arm runs once, the first of screening and the cheapest several times before the others; then what `_worth` has first.
        """
        if self.named is not None:
            return []
        begin = self._begin()
        able = [one for one in begin if self._affords(one[0], left_s)]
        chosen: dict[int, Action] = {}
        for arm, missing in able or [(arm, missing) for _, arm, missing in sorted(self._worth(), key=lambda one: (-one[0], one[1]))]:
            spare = left_s - sum(OVER * action.seeds * self.price(action.arm) for action in chosen.values())
            if len(chosen) < count and arm not in chosen and self._affords(arm, spare):
                chosen[arm] = self._action(arm, missing, spare)
        return list(chosen.values())

    def _begin(self) -> list[tuple[int, int]]:
        """(arm, seeds that it lacks) of those that have not run as often as every arm, the first of screening and scouts do."""
        order = sorted(self.alive, key=lambda k: self.arms[k].rank)
        able = [k for k in range(len(self.arms)) if k not in self.refused and not self.answers.fixed[k]]
        scouts = sorted(able, key=lambda k: (self.arms[k].price_s, k))[: min(SCOUTS, len(self.arms) // ARMS_A_SCOUT)]
        asked = dict.fromkeys(order, 1) | dict.fromkeys(order[:FIRST], FIRST_SEEDS) | dict.fromkeys(scouts, SCOUT_SEEDS)
        lacks = [(k, min(asked[k], self.rules.most) - self.answers.seeds(k)) for k in sorted(asked, key=lambda k: -asked[k])]
        return [(k, missing) for k, missing in lacks if missing > 0]

    def _action(self, arm: int, seeds: int, left_s: float) -> Action:
        if not self.arms[arm].packs:
            return Action(arm)
        return Action(arm, max(1, int(min(seeds, left_s / OVER / max(self.price(arm), 1e-9)))))

    def _affords(self, arm: int, left_s: float) -> bool:
        return OVER * self.price(arm) <= left_s

    def _worth(self) -> list[tuple[float, int, int]]:
        """(worth a second, the arm to run, seeds that it lacks). A name needs every pair of the leader decided, so that first comes the pair that is most
        likely to end the race undecided, for what it takes to find out."""
        leader = next((k for k in self.alive if self.answers.runs[k]), None)
        if leader is None:
            return []
        waiting = [(k, gap.seeds, later, chances[at]) for group, gap in self._open(leader) for later, chances in [self._outlook(leader, gap)]
                   for at, k in enumerate(group)]
        ends = [float(chances.max(initial=0.0)) for _, _, _, chances in waiting]
        if math.prod(ends) < FUTILE:
            return self._polishing() or self._leaving(leader, waiting)
        found = []
        for (k, seeds, later, chances), end in zip(waiting, ends, strict=True):
            seconds = self._seconds(leader, k, int(later[np.argmax(chances >= SURE * end)]))
            found.append(((1 - end + 1e-3) / max(seconds, 1e-9), *self._lacking(leader, k, seeds)))
        return found

    def _polishing(self) -> list[tuple[float, int, int]]:
        """Seeds of the arms of which most is expected."""
        expected = self.expected
        best = sorted(expected, key=lambda k: (-expected[k], k))[:POLISHED]
        return [(math.inf, k, 1) for k in best if self.answers.seeds(k) < min(POLISHED_SEEDS, self.rules.most)]

    def _leaving(self, leader: int, waiting: Sequence[tuple[int, int, np.ndarray, np.ndarray]]) -> list[tuple[float, int, int]]:
        """Seeds of arms that are likely to leave."""
        usual, found = statistics.fmean(self.price(k) for k in range(len(self.arms))), []
        for k, seeds, later, chances in waiting:
            values = [chance / max(self._seconds(leader, k, int(s)), 1e-9) for s, chance in zip(later, chances, strict=True) if chance >= LIKELY]
            if values and max(values) * usual * PATIENCE >= 1 and self.answers.level(leader) - self.answers.level(k) > self.rules.within:
                found.append((max(values), *self._lacking(leader, k, seeds)))
        return found

    def _lacking(self, leader: int, arm: int, seeds: int) -> tuple[int, int]:
        """(which of a pair to run, how often) to bring it from so many seeds to its next look."""
        target = next(s for s in self.rules.looks if s > seeds)
        missing, one = max((target - self.answers.seeds(k), k) for k in (arm, leader))
        return one, missing

    def _open(self, leader: int) -> list[tuple[list[int], Gap]]:
        """The leader against those that could be more than `within` better."""
        return self.gaps(leader, [k for k in self.alive if k != leader and (leader, k) not in self.cleared and self.answers.runs[k]])

    def _outlook(self, leader: int, gap: Gap, within: float | None = None, error: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(later looks [L], chance that each pair is decided at each [B, L]), if the true differences are about those seen."""
        from scipy.special import ndtr

        within, error = self.rules.within if within is None else within, self.rules.error if error is None else error
        later = np.array([s for s in self.rules.looks if s > gap.seeds])
        common, by_seed = gap.common[:, None], gap.by_seed[:, None]
        z = critical(error * float(self.weights[leader]), gap.by_seed / gap.common, self.rules.looks)[:, None]
        moves = np.sqrt(np.maximum(by_seed * (1 / gap.seeds - 1 / later), 1e-12))
        chances: np.ndarray = ndtr((gap.point[:, None] + within - z * np.sqrt(common + by_seed / later)) / moves)
        return later, chances

    def _seconds(self, leader: int, arm: int, seeds: int) -> float:
        """Price of bringing a pair to so many seeds."""
        return sum(max(0, seeds - self.answers.seeds(k)) * self.price(k) for k in (arm, leader))

    # whom to take

    @property
    def expected(self) -> dict[int, float]:
        """What is expected of the metric of every arm that runs: its mean, drawn towards that of all by as much as so few seeds are worth (James and
        Stein 1961), since the highest of many single seeds is high by luck."""
        tried = [k for k in self.alive if self.answers.runs[k]]
        levels = np.array([self.answers.level(k) for k in tried])
        own = self.answers.variances(tried) / np.array([self.answers.seeds(k) for k in tried])
        between = max(float(levels.var()) - float(own.mean()), 1e-6) if tried else 0.0
        weights = 1 / (between + own)
        centre = float((levels * weights).sum() / weights.sum()) if tried else 0.0
        return {k: float(value) for k, value in zip(tried, centre + (levels - centre) * between * weights, strict=True)}

    @property
    def favourite(self) -> int | None:
        """The arm that is named, or of those that could be the best the one of which most is expected; None: nothing has run."""
        if (named := self.named) is not None:
            return named
        expected = self.expected
        return max(expected, key=lambda k: (expected[k], -k), default=None)

    # what is left open

    def open(self, within: float | None = None, error: float | None = None) -> list[Open]:
        """The pairs of the leader that are not decided, with what they would take. within, error: others than the rules'."""
        leader = next((k for k in self.alive if self.answers.runs[k]), None)
        if leader is None:
            return []
        asked = (self.rules.within if within is None else within), (self.rules.error if error is None else error)
        found = []
        for group, gap in self.gaps(leader, [k for k in self.alive if k != leader and self.answers.runs[k]]):
            decided, (later, chances) = gap.chance_below(asked[0]), self._outlook(leader, gap, *asked)
            for at, k in enumerate(group):
                if decided[at] > asked[1] * self.weights[leader]:
                    needed = next((int(s) for s, chance in zip(later, chances[at], strict=True) if chance >= 0.5), None)
                    found.append(Open(k, gap.seeds, needed, None if needed is None else self._lacks(k, needed) * self.price(k) / 3600))
        return found

    def _lacks(self, arm: int, seeds: int) -> int:
        return max(0, seeds - self.answers.seeds(arm))

    def more_hours(self, within: float | None = None, error: float | None = None) -> float | None:
        """Hours that a decision would take beyond those spent, in half of all cases; 0: none. None: no number of seeds gives one."""
        waiting = self.open(within, error)
        untried = sum(self.price(k) for k in self.alive if not self.answers.runs[k]) / 3600
        if not waiting:
            return untried
        if any(one.needed is None for one in waiting):
            return None
        leader = next(k for k in self.alive if self.answers.runs[k])
        most = max(one.needed or 0 for one in waiting)
        return untried + sum(one.hours or 0.0 for one in waiting) + self._lacks(leader, most) * self.price(leader) / 3600


def weights(count: int) -> np.ndarray:
    """[count] each arm's share of the error by its rank in screening, the first of it first; they add up to 1."""
    by_rank = 1 / np.arange(1, count + 1, dtype=float) ** 2
    shares: np.ndarray = EVEN / count + (1 - EVEN) * by_rank / by_rank.sum()
    return shares


def rows_needed(within: float, error: float, variance: float) -> int:
    """Test rows with which two equal techniques could be shown to be within `within` of each other, if seeds were endless.

    variance: of their difference on a row. Counted for the first of screening, which may be named with the largest share of the error.
    """
    z = float(critical(error * (1 - EVEN) * 6 / np.pi**2, np.array([1e-3]))[0])
    half = variance * (z / within) ** 2 / 2  # n = (z / within)^2 (variance + PSEUDO / n)
    return int(np.ceil(half + np.sqrt(half**2 + PSEUDO * (z / within) ** 2)))
