"""A race from its first cell to its end: screening, then one seed after another, as pipeline/racing/policy.py decides, within the budget.

Library of `python -m pipeline.race`. `Seeds` runs cells and reads what they answered; a test, or a replay, puts another in its place.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from omegaconf import DictConfig

from pipeline.cell import grid as cell_grid
from pipeline.cell import identity, inputs
from pipeline.cell.child import Ended, Limit, Watcher, limited
from pipeline.cell.launch import INTERRUPTED
from pipeline.core.files import UserError, read_jsonl
from pipeline.core.progress import Progress
from pipeline.fan.run import run as fan_out
from pipeline.forecasting import sharing
from pipeline.methods.base import Method
from pipeline.racing.entrants import Asked, Entrant
from pipeline.racing.journal import Entry, Journal, Screened
from pipeline.racing.policy import Action, Arm, Race, Rules
from pipeline.records.finished import SEEDLESS, read_or_name
from pipeline.scoring.answers import by_row, headline
from pipeline.search.space import at
from pipeline.stats.bootstrap import mean

VARIANT = "race"
AGAIN = 3
"""How often a seed is begun anew that collapsed, before the technique leaves."""
NEXT = 100_000
"""Between the seed numbers of a seed and of the one that takes its place."""
MIDWAY = 0.5
"""Of training, after which a run that can only end as collapsed is stopped."""


class BudgetUsed(Exception):
    """A run was ended for the budget's sake."""


class Runner(Protocol):
    """What runs seeds of techniques."""

    def run(self, wanted: Sequence[tuple[int, int, int]], floors: Sequence[float | None], left_s: float) -> list[Entry]:
        """Run (arm, unit, again) and say what became of each. Raises BudgetUsed."""

    def answers(self, entry: Entry) -> np.ndarray | None:
        """The answers [n] to the test rows; None where they are gone."""


@dataclass
class Driver:
    """One race over entrants that are able to run. The journal has their order."""

    entrants: Sequence[Entrant]
    asked: Asked
    screened: dict[str, Screened]
    journal: Journal
    runner: Runner

    def __post_init__(self) -> None:
        arms = [Arm(e.name, e.price_s, self.journal.order.index(e.name) + 1, _packs(e), (float(e.trains), float(e.memory_bytes or 0), e.price_s))
                for e in self.entrants]
        self.race = Race(arms, self.asked.rows, Rules(self.asked.within, self.asked.error, self.asked.looks, self.asked.these))
        self.race.spent_s = sum(one.seconds for one in self.screened.values())
        self.used: dict[str, list[Entry]] = {e.name: [] for e in self.entrants}
        self.ended = ""
        """Why there was no more to run; empty: it is decided, or nothing that could be run would decide it."""

    def go(self) -> Race:
        """Run until it is decided, nothing helps, or the budget is used. Finished seeds are taken from the journal."""
        try:
            while actions := self.race.batch(self.asked.budget_s - self.race.spent_s, self.asked.at_once):
                self._seeds(actions)
        except BudgetUsed:
            self.ended = "a run was stopped when the budget was used up"
        return self.race

    def _seeds(self, actions: Sequence[Action]) -> None:
        """The next seeds of some arms; what collapsed is begun anew until it does not, and only then are answers added, in the order of the seeds."""
        wanted = [(a.arm, len(self.race.answers.runs[a.arm]) + i, 0) for a in actions for i in range(a.seeds)]
        entries: dict[tuple[int, int], list[Entry]] = {}
        while wanted:
            for (arm, unit, _), entry in zip(wanted, self._run(wanted), strict=True):
                entries.setdefault((arm, unit), []).append(entry)
                self.used[entry.technique].append(entry)
            wanted = [(arm, unit, len(tried)) for (arm, unit), tried in entries.items()
                      if tried[-1].status in ("collapsed", "diverged") and len(tried) <= AGAIN and arm not in self.race.refused]
        for (arm, _), tried in sorted(entries.items()):
            seconds = sum(entry.seconds for entry in tried)
            if arm not in self.race.refused and tried[-1].status == "ok" and (right := self.runner.answers(tried[-1])) is not None:
                self.race.add(arm, right, seconds, fixed=tried[-1].kind in SEEDLESS)
            else:
                self.race.spend(arm, seconds)
                self.race.drop(arm)

    def _run(self, wanted: Sequence[tuple[int, int, int]]) -> list[Entry]:
        """What became of seeds: as the journal says, else run now."""
        def known(key: tuple[int, int, int]) -> Entry | None:
            entry = self.journal.entries.get((self.entrants[key[0]].name, *key[1:]))
            return entry if entry is not None and (entry.status != "ok" or self.runner.answers(entry) is not None) else None

        new = [key for key in wanted if known(key) is None]
        if new:
            left = self.asked.budget_s - self.journal.spent_s
            if left <= 0:
                raise BudgetUsed
            floors = [self.floor(arm) for arm, _, _ in new]
            for entry in self.runner.run(new, floors, left):
                self.journal.entries[entry.key] = entry
            self.journal.write()
        return [self.journal.entries[self.entrants[arm].name, unit, again] for arm, unit, again in wanted]

    def floor(self, arm: int) -> float | None:
        """The validation metric below which a run of the arm counts as collapsed; None: none does."""
        value = self.screened[self.entrants[arm].name].validation
        return None if value is None or self.asked.collapse is None else value - self.asked.collapse

    def collapsed(self, name: str) -> tuple[int, int]:
        """(seeds that collapsed or diverged, all that were begun) of a technique."""
        tried = self.used[name]
        return sum(entry.status in ("collapsed", "diverged") for entry in tried), len(tried)


class Seeds:
    """Runs cells of the experiment, in this process or (race.at_once above 1) by pipeline.fan."""

    def __init__(self, entrants: Sequence[Entrant], asked: Asked, screened: dict[str, Screened], journal: Journal, load: Any) -> None:
        self.entrants, self.asked, self.screened, self.journal, self.load = entrants, asked, screened, journal, load
        self.mirror = cell_grid.Mirror()
        self.ids: list[str] | None = None
        self.hopeless = False
        """Whether the last run was stopped because it could only end as collapsed."""
        self.held: dict[str, np.ndarray | None] = {}

    def cell(self, arm: int, unit: int, again: int) -> DictConfig:
        """The config of a seed's cell."""
        entrant = self.entrants[arm]
        settings = {**self.screened[entrant.name].settings, "seed": self.asked.seed + unit + NEXT * again, "variant": VARIANT}
        return at(entrant.cfg, settings)

    def run(self, wanted: Sequence[tuple[int, int, int]], floors: Sequence[float | None], left_s: float) -> list[Entry]:
        cells = [self.cell(*key) for key in wanted]
        before = [cell_grid.is_done(cfg) for cfg in cells]
        missing = [cfg for cfg, done in zip(cells, before, strict=True) if not done]
        seconds = self._run(missing, min((f for f in floors if f is not None), default=None) if len({arm for arm, _, _ in wanted}) == 1 else None, left_s)
        return [self._entry(key, cfg, floor, None if done or self.asked.at_once > 1 else seconds / max(1, len(missing)))
                for key, cfg, floor, done in zip(wanted, cells, floors, before, strict=True)]

    def _run(self, missing: list[DictConfig], floor: float | None, left_s: float) -> float:
        """Run cells within so many seconds; those that it took. Raises BudgetUsed."""
        self.hopeless = False
        if not missing:
            return 0.0
        for cfg in missing:
            inputs.check_ahead(cfg)
            identity.check_free(cfg)
        what = ", ".join(identity.folder_of(cfg).name for cfg in missing)
        self.journal.begin(what)
        with limited(left_s / max(1, self.asked.at_once), self.journal.beat) as limit, self._told(what, limit):
            if self.asked.at_once > 1:
                code = fan_out(missing, sharing.limit)
            else:
                packed = [at(cfg, {"pack": True}) for cfg in missing] if len(missing) > 1 else missing
                watcher = Stops(limit, floor)
                code = cell_grid.run_here(packed, self.load(), self.mirror, watcher)
                self.hopeless = watcher.hopeless
                if watcher.hopeless:
                    return self.journal.ended()
        if limit.reached:
            self._lost(what)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return self.journal.ended()

    @contextlib.contextmanager
    def _told(self, what: str, limit: Limit) -> Iterator[None]:
        """An end for the budget's sake is no interruption."""
        try:
            yield
        except (KeyboardInterrupt, Ended, UserError):
            if not limit.reached:
                raise
            self._lost(what)

    def _lost(self, what: str) -> None:
        seconds = self.journal.ended()
        self.journal.lose(f"{what}: stopped, the budget was used up", seconds)
        raise BudgetUsed

    def _entry(self, key: tuple[int, int, int], cfg: DictConfig, floor: float | None, seconds: float | None) -> Entry:
        arm, unit, again = key
        folder = identity.folder_of(cfg)
        result = read_or_name(folder / "result.json")
        took = seconds if seconds is not None else result.phases.wall_s if result is not None and result.phases is not None else 0.0
        made = Entry(self.entrants[arm].name, unit, again, "failed", round(took, 3), str(folder))
        if result is None:
            made.status = "collapsed" if self.hopeless else "failed"  # stopped on its way, or ended with an error that it showed
            return made
        made.kind, made.status = result.kind, result.status
        made.served_bytes = result.size.served_bytes if result.size is not None else None
        scored = result.scores.get("validation")
        made.validation = headline(scored, result.metric) if scored is not None and result.status == "ok" else None
        if made.status == "ok" and floor is not None and made.validation is not None and made.validation < floor:
            made.status = "collapsed"
        return made

    def answers(self, entry: Entry) -> np.ndarray | None:
        if entry.cell not in self.held:
            self.held[entry.cell] = self._answers(Path(entry.cell))
        return self.held[entry.cell]

    def _answers(self, folder: Path) -> np.ndarray | None:
        path = folder / "predictions.jsonl"
        result = read_or_name(folder / "result.json")
        if result is None or not path.exists():
            return None
        values, statistic = by_row([row for row in read_jsonl(path) if row["split"] == "test"], result.metric)
        if statistic not in (None, mean) or not values:
            raise UserError(f"{path} has no number a row for the metric {result.metric}, on which a race rests; choose another task.metric")
        ids = sorted(values)
        self.ids = self.ids or ids
        if ids != self.ids:
            raise UserError(f"{path} answers other test rows than the race's first cell; give evaluate.test_rows as before, or delete "
                            f"{self.journal.path.parent}")
        return np.array([values[i] for i in ids])


class Stops(Watcher):
    """Stops a run midway that can only end as collapsed: whose validation metric would have to rise by more than any did that ended well."""

    def __init__(self, limit: Limit, floor: float | None) -> None:
        self.limit, self.floor, self.hopeless = limit, floor, False

    def runs(self, progress: Progress | None) -> None:
        if progress is None or self.floor is None or progress.metric is None or progress.stage != "train" or progress.done < MIDWAY:
            return
        if progress.metric < self.floor - RISE and not self.hopeless:
            self.hopeless = True
            print(f"stopped: validation is at {progress.metric:.3f} after {progress.done:.0%} of training, where {self.floor:.3f} counts as "
                  f"collapsed", file=sys.stderr)
            self.limit.end()


RISE = 0.1
"""What the validation metric may still rise by after MIDWAY, at the most optimistic."""


def _packs(entrant: Entrant) -> bool:
    """Whether several seeds are trained at once: an adapter on a GPU."""
    from pipeline.measure.machine import card

    if entrant.cfg.device == "cpu" or card() is None or not entrant.trains:
        return False
    from pipeline.cell.packing import _refusal
    from pipeline.core.compose import build

    method: Method = build(entrant.cfg.method, "method")
    return _refusal(method, build(entrant.cfg.objective, "objective"), entrant.cfg.train.checkpointing) is None
