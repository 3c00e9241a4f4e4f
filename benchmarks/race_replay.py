"""Every policy on the same finished runs: how often its statement is wrong, what it costs of the full grid, what is lost by its choice.

Library of `python -m benchmarks.race replay`. A replay draws techniques, seeds (with replacement, the same draws for all techniques) and test rows (with
replacement) from a cache, whose means over all seeds and rows are then the truth; screening and pruning see validation curves alone. The full grid runs
every seed of every technique. """

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.race_blocks import Block, blocks
from benchmarks.race_cache import World, worlds
from benchmarks.race_simulate import interval
from pipeline.racing.policy import Arm, Race, Rules
from pipeline.stats.looking import LOOKS

WITHINS = (1.0, 2.0, 5.0)
ERROR = 0.05
BEST_K = 3
HELD_OUT = ("cqa", "esnli", "svamp")
"""Tasks that were not looked at while the policy was made; the table has them apart."""


@dataclass(frozen=True)
class Draw:
    """One replay's part of a world: right [K, S, n], curve [K, S, C], seconds [K, S], means [K]."""

    right: np.ndarray
    curve: np.ndarray
    seconds: np.ndarray
    means: np.ndarray
    one_epoch: int
    """The place in the curve where one epoch is through."""
    shares: tuple[float, ...]

    @property
    def grid_s(self) -> float:
        return float(self.seconds.sum())


@dataclass(frozen=True)
class End:
    """chosen: what it takes; stated: whether it claims that this is within so many points of the best."""

    chosen: int
    seconds: float
    stated: bool
    screen_s: float | None = None
    """Of them, those in which one rate of each technique is screened, where the rate is chosen there; None: it is not."""


def draw(world: World, arms: int, rng: np.random.Generator) -> Draw:
    """Some of a world's techniques, in any order, and as many seeds and rows as it has."""
    chosen = rng.permutation(len(world.names))[:arms]
    seeds, rows = rng.integers(world.right.shape[1], size=world.right.shape[1]), rng.integers(world.right.shape[2], size=world.right.shape[2])
    part = world.right[chosen][:, seeds][:, :, rows]
    one = next(i for i, share in enumerate(world.shares) if share >= 0.5 - 1e-9)
    return Draw(part, world.curve[chosen][:, seeds], world.seconds[chosen][:, seeds], world.means[chosen], one, world.shares)


def ours(held: Draw, within: float, rng: np.random.Generator, these: bool = False) -> End:
    """pipeline.race: one epoch of one seed screens, fresh seeds confirm."""
    screen = int(rng.integers(held.curve.shape[1]))
    first = held.curve[:, screen, held.one_epoch]
    seconds = float(held.seconds[:, screen].sum() * held.shares[held.one_epoch])
    ranks = np.empty(len(first), dtype=int)
    ranks[np.argsort(-first, kind="stable")] = np.arange(1, len(first) + 1)
    arms = [Arm(str(k), float(held.seconds[k].mean()), int(ranks[k]), packs=True, cost=(float(held.seconds[k].mean()),)) for k in range(len(first))]
    race = Race(arms, held.right.shape[2], Rules(within / 100, ERROR, tuple(s for s in LOOKS if s <= held.right.shape[1]), these))
    while (action := race.next(float("inf"))) is not None:
        for _ in range(action.seeds):
            seed = len(race.answers.runs[action.arm])
            race.add(action.arm, held.right[action.arm, seed].astype(float), float(held.seconds[action.arm, seed]))
    return End(race.favourite or 0, seconds + race.spent_s, race.named is not None, seconds)


def full_grid(held: Draw, within: float, rng: np.random.Generator) -> End:
    """Every seed of every technique; the highest on test rows."""
    return End(int(held.right.mean((1, 2)).argmax()), held.grid_s, True)


def least_grid(held: Draw, within: float, rng: np.random.Generator, these: bool = False) -> End:
    """All techniques at the same number of seeds, the smallest at which the race's own statement, looked at once and with the error shared out evenly, could
    be made: what a grid has to be for it, known in hindsight."""
    count, seeds = held.right.shape[:2]
    for looks in (s for s in LOOKS if 1 < s <= seeds):
        race = Race([Arm(str(k), 1.0, k + 1) for k in range(count)], held.right.shape[2], Rules(within / 100, ERROR, (looks,), these))
        race.weights[:] = 1 / count
        for seed in range(looks):
            for k in range(count):
                race.add(k, held.right[k, seed].astype(float), 1.0)
        if race.named is not None:
            return End(race.named, float(held.seconds[:, :looks].sum()), True)
    return End(int(held.right.mean((1, 2)).argmax()), held.grid_s, False)


def one_epoch(held: Draw, within: float, rng: np.random.Generator) -> End:
    """One epoch of all, the best few to their end, the highest on validation rows."""
    first = held.curve[:, 0, held.one_epoch]
    best = np.argsort(-first, kind="stable")[:BEST_K]
    seconds = float(held.seconds[:, 0].sum() * held.shares[held.one_epoch] + held.seconds[best, 0].sum())
    return End(int(best[held.curve[best, 0, -1].argmax()]), seconds, True, float(held.seconds[:, 0].sum() * held.shares[held.one_epoch]))


def by_optuna(pruner: Callable[[], Any]) -> Callable[[Draw, float, np.random.Generator], End]:
    """Techniques as trials whose validation curve Optuna's pruner is shown; the highest at its end."""
    def policy(held: Draw, within: float, rng: np.random.Generator) -> End:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(study_name="replay", direction="maximize", pruner=pruner(), sampler=optuna.samplers.RandomSampler(seed=0))
        seconds, ends = 0.0, {}
        for arm in range(len(held.means)):
            trial, before = study.ask(), 0.0
            for point, share in enumerate(held.shares):
                seconds += float(held.seconds[arm, 0]) * (share - before)
                before = share
                trial.report(float(held.curve[arm, 0, point]), point + 1)
                if trial.should_prune():
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                    break
            else:
                ends[arm] = float(held.curve[arm, 0, -1])
                study.tell(trial, ends[arm])
        return End(max(ends, key=lambda k: ends[k]) if ends else 0, seconds, True)

    return policy


def _asha() -> Any:
    import optuna

    return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)


def _hyperband() -> Any:
    import optuna

    return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=4, reduction_factor=2)


def halving(held: Draw, within: float, rng: np.random.Generator) -> End:
    """Half of the techniques leave by their mean as seeds double; the first is stated where a paired t-test over seeds puts each one that is left at the end
    below it."""
    from scipy.stats import ttest_rel

    live, seconds, done = np.arange(len(held.means)), 0.0, 0
    means = held.right.mean(2)
    most = means.shape[1]
    for seeds in (2, 4, 8, most):
        seconds += float(held.seconds[live, done:seeds].sum())
        done = seeds
        live = live[np.argsort(-means[live, :seeds].mean(1), kind="stable")]
        if seeds < most:
            live = live[: max(2, len(live) // 2)]
    rest = [ttest_rel(means[live[0]], means[k] - within / 100, alternative="greater").pvalue for k in live[1:]]
    return End(int(live[0]), seconds, all(p < ERROR for p in rest))


POLICIES: dict[str, Callable[[Draw, float, np.random.Generator], End]] = {
    "race": ours, "race, these rows": functools.partial(ours, these=True), "full grid": full_grid, "least grid that states it": least_grid,
    "least grid, these rows": functools.partial(least_grid, these=True), "ASHA (Optuna)": by_optuna(_asha),
    "Hyperband (Optuna)": by_optuna(_hyperband), f"one epoch, best {BEST_K}": one_epoch, "halving, t-test": halving,
}


FIELDS = ("wrong", "hours", "hours_of_rates", "regret", "undecided")
"""Of a replay: numbers; hours are shares of the full grid's, of a grid over RATES rates where each is screened."""
RATES = 3
SIZE = 50


def wanted(path: Path, times: int, arms: int) -> list[Block]:
    """So many replays of every policy on every task and base of a cache."""
    every = [(number, world) for number, world in enumerate(worlds(path)) if len(world.names) >= 2]
    return [block for within, name in itertools.product(WITHINS, POLICIES) for number, world in every
            for block in blocks((world.model, world.task, within, name, arms), (number, world), times, SIZE)]


def block(one: Block) -> list[list[float]]:
    """The ends of a block's replays."""
    (_, _, within, name, arms), (place, world) = one.key, one.task
    return [_replay(world, within, name, min(arms, len(world.names)), place, number) for number in range(one.first, one.first + one.count)]


def _replay(world: World, within: float, name: str, arms: int, place: int, number: int) -> list[float]:
    rng = np.random.default_rng([place, number])  # the same draws for every policy
    held = draw(world, arms, rng)
    truth = _on_these(world, place, number, arms) if "these" in name else held.means
    end = POLICIES[name](held, within, rng)
    regret = float(truth.max() - truth[end.chosen])
    screened = (end.seconds + (RATES - 1) * end.screen_s) / RATES if end.screen_s is not None else end.seconds
    return [float(end.stated and regret > within / 100 + 1e-12), end.seconds / held.grid_s, screened / held.grid_s, 100 * regret, float(not end.stated)]


def summary(ends: Mapping[tuple[Any, ...], Mapping[int, Sequence[float]]]) -> list[dict[str, Any]]:
    """A line a task and base, `within` and policy."""
    made = []
    for (model, task, within, name, arms), found in sorted(ends.items()):
        means = dict(zip(FIELDS, np.array(list(found.values())).mean(0).tolist(), strict=True))
        about = {"model": model, "task": task, "within": within, "policy": name, "arms": arms, "replays": len(found)}
        made.append(about | means | {"interval": interval(round(means["wrong"] * len(found)), len(found))})
    return made


def _on_these(world: World, number: int, at: int, arms: int) -> np.ndarray:
    """[K] the means over all seeds on the rows that were drawn."""
    rng = np.random.default_rng([number, at])
    chosen = rng.permutation(len(world.names))[:arms]
    rng.integers(world.right.shape[1], size=world.right.shape[1])
    rows = rng.integers(world.right.shape[2], size=world.right.shape[2])
    means: np.ndarray = world.right[chosen][:, :, rows].mean((1, 2))
    return means


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a policy and `within`, tasks that were held out apart; the interval is that of all their replays together."""
    head = ["within", "tasks", "policy", "replays", "wrong, %", "95%", "highest of a task", "undecided, %", "of the full grid, %",
            f"of a grid over {RATES} rates, %", "regret, points"]
    rows = [f"| {' | '.join(head)} |", "| --: | --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |"]
    for within, (shown, held_out), name in itertools.product(WITHINS, (("seen", False), ("held out", True)), POLICIES):
        some = [s for s in lines if s["within"] == within and s["policy"] == name and (s["task"] in HELD_OUT) == held_out]
        if some:
            count = sum(s["replays"] for s in some)
            low, high = interval(round(sum(s["wrong"] * s["replays"] for s in some)), count)
            figures = [f"{_mean(some, 'wrong', 100):.1f}", f"{100 * low:.1f} to {100 * high:.1f}", f"{100 * max(s['wrong'] for s in some):.1f}",
                       f"{_mean(some, 'undecided', 100):.0f}", f"{_mean(some, 'hours', 100):.1f}", f"{_mean(some, 'hours_of_rates', 100):.1f}",
                       f"{_mean(some, 'regret', 1):.2f}"]
            rows.append(f"| {within:g} | {shown} | {name} | {count:,} | {' | '.join(figures)} |")
    return "\n".join(rows)


def _mean(some: Sequence[dict[str, Any]], key: str, times: float) -> float:
    """Over replays."""
    return times * sum(s[key] * s["replays"] for s in some) / sum(s["replays"] for s in some)
