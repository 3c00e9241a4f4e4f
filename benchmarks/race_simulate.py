"""Races with known truth: how often the statement is wrong, and how often there is none.

Library of `python -m benchmarks.race simulate`. A row is right for technique k and seed s where a normal variable lies below the quantile of p = mean of k +
effect of seed s on k; that variable is made of a part of the row (common to all techniques), one of the row under the technique, and one of the single
answer, so that the expected accuracy is p exactly, whatever the correlations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.race_blocks import Block, blocks
from pipeline.racing.policy import Arm, Race, Rules
from pipeline.stats.looking import LOOKS

SEEDS = tuple(s for s in LOOKS if s <= 16)
BASE = 0.7
"""Accuracy of the best technique."""
VALIDATION = 128
EFFECTS: dict[str, Callable[[np.random.Generator, float, int], float]] = {
    "normal": lambda rng, sd, k: sd * rng.standard_normal(),
    "mixed": lambda rng, sd, k: (3 * sd if k % 2 else sd / 2) * rng.standard_normal(),
    "skewed": lambda rng, sd, k: sd * (1 - rng.exponential()),
    "two modes": lambda rng, sd, k: 0.5 * sd if rng.random() < 0.8 else -2 * sd,
    "heavy": lambda rng, sd, k: sd * float(np.clip(rng.standard_t(3), -6, 6)) / 1.6,
    "collapsing": lambda rng, sd, k: sd * rng.standard_normal(),
}
"""What a seed does to a technique: a draw with mean 0. collapsing: besides, one seed in ten collapses, which validation rows show; it is trained again."""
COLLAPSE = 0.1
DRAWS = 50
"""Of a seed's effect, over which the truth on given rows is averaged (made to have mean 0)."""


@dataclass(frozen=True)
class Setting:
    """arms, test rows; within: points; truth: what the techniques' means are (`means`); effect, sd: of seeds, points; alike: of the answer's variable, the part
    that is the row's; own: the part that is the row's under the technique; together: sd of what a seed does to all, points; twins: so many test rows are alike.
    these: the statement is on these very rows, and so is the truth."""

    arms: int
    rows: int
    within: float
    truth: str
    effect: str = "normal"
    sd: float = 1.0
    alike: float = 0.5
    own: float = 0.3
    together: float = 1.0
    twins: int = 1
    these: bool = False

    def means(self, rng: np.random.Generator) -> np.ndarray:
        """True accuracies. edge: one ahead of all others by a little more than `within`; one rival: of one, the others far behind; equal; spread."""
        edge = BASE - self.within / 100 * 1.0001
        if self.truth == "equal":
            return np.full(self.arms, BASE)
        if self.truth == "edge":
            return np.array([BASE, *[edge] * (self.arms - 1)])
        if self.truth == "one rival":
            return np.array([BASE, edge, *rng.uniform(BASE - 0.35, BASE - 0.06, max(0, self.arms - 2))])
        return np.array([BASE, *(BASE - rng.gamma(1.2, 0.06, self.arms - 1)).clip(0.2)])


def settings() -> list[Setting]:
    """Every shape of truth and of seeds, at some sizes."""
    sizes = [(2, 100, 8.0), (2, 2000, 2.0), (6, 400, 5.0), (20, 100, 8.0), (20, 1000, 3.0), (20, 2000, 1.0), (20, 2000, 2.0)]
    every = [Setting(*size, truth) for size in sizes for truth in ("edge", "one rival", "equal", "spread")]
    every += [Setting(69, rows, within, truth) for rows, within in ((400, 5.0), (2000, 2.0)) for truth in ("edge", "spread")]
    shapes = [("normal", 0.2), ("normal", 2.0), ("mixed", 1.0), ("skewed", 1.5), ("two modes", 1.5), ("heavy", 1.0), ("collapsing", 1.0)]
    every += [Setting(arms, 2000, 2.0, truth, effect, sd) for arms, truth in ((2, "edge"), (6, "edge"), (20, "one rival")) for effect, sd in shapes]
    every += [Setting(6, 1000, 2.0, "edge", alike=alike, own=own) for alike, own in ((0.0, 0.0), (0.8, 0.15), (0.2, 0.7))]
    return every + [Setting(arms, 400, 2.0, truth, effect, sd, these=True) for arms, truth in ((2, "edge"), (6, "edge"), (20, "spread")) for effect, sd in
                    (("normal", 1.0), ("mixed", 1.0), ("skewed", 1.5), ("two modes", 1.5))]


class World:
    """One experiment: what each technique's seeds answer, made as it is asked for."""

    def __init__(self, setting: Setting, rng: np.random.Generator) -> None:
        self.setting, self.rng = setting, rng
        self.means = setting.means(rng)[(order := rng.permutation(setting.arms))]
        self.kind = order
        groups = -(-setting.rows // setting.twins)
        part = np.sqrt(setting.alike) * rng.standard_normal(groups) + np.sqrt(setting.own) * rng.standard_normal((setting.arms, groups))
        self.part = np.repeat(part, setting.twins, axis=1)[:, : setting.rows]
        self.noise = np.sqrt(1 - setting.alike - setting.own)
        self.shared: list[float] = []

    def run(self, arm: int, seed: int) -> tuple[np.ndarray, int]:
        """(answers [n] of a technique's seed, how often it was trained)."""
        from scipy.special import ndtri

        setting, rng, times = self.setting, self.rng, 1
        while seed >= len(self.shared):
            self.shared.append(setting.together / 100 * rng.standard_normal())
        while setting.effect == "collapsing" and rng.random() < COLLAPSE:
            times += 1
        p = self.means[arm] + self.shared[seed] + EFFECTS[setting.effect](rng, setting.sd / 100, int(self.kind[arm]))
        answers = self.part[arm] + self.noise * rng.standard_normal(setting.rows) < ndtri(np.clip(p, 0.01, 0.99))
        return answers.astype(float), times

    def truth(self) -> np.ndarray:
        """[K] what the techniques' expected accuracy is, on these rows where the setting says so."""
        from scipy.special import ndtr, ndtri

        if not self.setting.these:
            return self.means
        rng = np.random.default_rng(0)
        draws = np.array([[EFFECTS[self.setting.effect](rng, self.setting.sd / 100, int(k)) for _ in range(DRAWS)] for k in self.kind])
        draws += self.setting.together / 100 * rng.standard_normal(DRAWS)
        draws -= draws.mean(1, keepdims=True)
        levels = ndtri(np.clip(self.means[:, None] + draws, 0.01, 0.99))
        return np.array([ndtr((own[:, None] - part[None, :]) / self.noise).mean() for own, part in zip(levels, self.part, strict=True)])

    def ranks(self) -> list[int]:
        """Of screening: a run a technique on validation rows."""
        noise = np.sqrt(BASE * (1 - BASE) / VALIDATION + (self.setting.sd / 100) ** 2)
        order = np.argsort(-(self.means + noise * self.rng.standard_normal(len(self.means))))
        ranks = np.empty(len(order), dtype=int)
        ranks[order] = np.arange(1, len(order) + 1)
        return [int(r) for r in ranks]


def race(setting: Setting, rng: np.random.Generator, error: float = 0.05) -> dict[str, Any]:
    """One race to its end, without a budget: whether its statement is wrong, whether there is none, regret in points, seeds run."""
    world = World(setting, rng)
    arms = [Arm(str(k), float(price), rank, packs=True) for k, (price, rank) in enumerate(zip(rng.uniform(0.5, 2.0, setting.arms), world.ranks(), strict=True))]
    held = Race(arms, setting.rows, Rules(setting.within / 100, error, SEEDS, setting.these))
    runs = 0
    while (action := held.next(float("inf"))) is not None:
        for _ in range(action.seeds):
            right, times = world.run(action.arm, len(held.answers.runs[action.arm]))
            runs += times
            held.add(action.arm, right, times * arms[action.arm].price_s)
    name, means = held.named, world.truth()
    best = float(means.max())
    lost = int(means.argmax()) in held.left
    chosen = held.favourite or 0
    return {"wrong": name is not None and bool(means[name] < best - setting.within / 100), "undecided": name is None, "best_left": lost,
            "regret": 100 * (best - float(means[chosen])), "seeds": runs, "spent": held.spent_s / (sum(a.price_s for a in arms) * SEEDS[-1])}


FIELDS = ("wrong", "undecided", "best_left", "regret", "seeds", "spent")
"""Of a race's end: numbers."""
SIZES = {2: 250, 6: 100, 20: 25, 69: 5}
"""Races of a block, by arms."""


def wanted(races: int, most_arms: int) -> list[Block]:
    """So many races of every setting: first those of 20 techniques, whose hours and errors docs/race.md is about, then the smaller ones, 69 last."""
    every = sorted(enumerate(settings()), key=lambda one: (one[1].arms > 20, one[1].arms != 20, -one[1].arms, one[0]))
    return [block for number, setting in every if setting.arms <= most_arms
            for block in blocks((number, *asdict(setting).values()), setting, races, SIZES[setting.arms])]


def block(one: Block) -> list[list[float]]:
    """The ends of a block's races."""
    found = (race(one.task, np.random.default_rng([one.key[0], number])) for number in range(one.first, one.first + one.count))
    return [[float(end[field]) for field in FIELDS] for end in found]


def summary(ends: Mapping[tuple[Any, ...], Mapping[int, Sequence[float]]]) -> list[dict[str, Any]]:
    """A line a setting: races, wrong with its 95% interval (Clopper and Pearson 1934), undecided, regret, seeds, part of the full grid's seconds."""
    made = []
    for number, setting in enumerate(settings()):
        if found := ends.get((number, *asdict(setting).values())):
            means = dict(zip(FIELDS, np.array(list(found.values())).mean(0).tolist(), strict=True))
            made.append({**asdict(setting), "races": len(found), "interval": interval(round(means["wrong"] * len(found)), len(found)), **means})
    return made


def interval(count: int, of: int) -> list[float]:
    """The exact 95% interval of a share."""
    from scipy.stats import beta

    return [float(beta.ppf(0.025, count, of - count + 1)) if count else 0.0, float(beta.ppf(0.975, count + 1, of - count)) if count < of else 1.0]


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a setting."""
    head = ("techniques", "test rows", "within", "truth", "seeds' effect", "sd", "statement on", "races", "wrong, %", "95%", "undecided, %", "regret",
            "of the full grid, %")
    rows = [f"| {' | '.join(head)} |", "| --: | --: | --: | --- | --- | --: | --- | --: | --: | --: | --: | --: | --: |"]
    for s in lines:
        alike = "" if (s["alike"], s["own"]) == (0.5, 0.3) else f", rows' part {s['alike']:g} and {s['own']:g}"
        rows.append(f"| {s['arms']} | {s['rows']:,} | {s['within']:g} | {s['truth']} | {s['effect']}{alike} | {s['sd']:g} | "
                    f"{'these' if s['these'] else 'all'} | {s['races']:,} | "
                    f"{100 * s['wrong']:.1f} | {100 * s['interval'][0]:.1f} to {100 * s['interval'][1]:.1f} | {100 * s['undecided']:.0f} | "
                    f"{s['regret']:.2f} | {100 * s['spent']:.0f} |")
    return "\n".join(rows)
