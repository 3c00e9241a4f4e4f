"""Who may race: the techniques of an experiment with what a seed of each costs by forecast, and those that are left out before anything is paid.

Library of `python -m pipeline.race`.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell import grid as cell_grid
from pipeline.cell.identity import decides
from pipeline.core.compose import by_key, without
from pipeline.core.files import UserError
from pipeline.data.rows import read_rows
from pipeline.intake.flow import costs_of
from pipeline.racing.policy import OVER, rows_needed
from pipeline.stats.looking import LOOKS

UNKNOWN_S = 60.0
"""Of a seed whose time nothing forecasts, and no other's either."""
ROW_VARIANCE = 0.05
"""Of the difference of two techniques on a row, where nothing was measured: they disagree on one row in twenty, which is little."""


@dataclass(frozen=True)
class Entrant:
    """A technique with its cell (seed and settings are put in later). price_s: of a seed, forecast; reason: why it does not race, empty where it does."""

    name: str
    cfg: DictConfig
    price_s: float
    trains: bool
    reason: str = ""
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Asked:
    """What the race was asked for. within: a fraction."""

    budget_s: float
    within: float
    error: float
    these: bool
    rates: int
    screen_share: float
    collapse: float | None
    seed: int
    looks: tuple[int, ...]
    at_once: int
    rows: int
    """Test rows."""

    @classmethod
    def of(cls, cfg: DictConfig) -> Asked:
        """Of a composed config. Raises UserError for a budget that is missing, and test rows too few for `within`."""
        race = cfg.race
        if cfg.budget_hours is None:
            raise UserError("pipeline.race needs a budget; add budget_hours=<hours of this device>, for example budget_hours=6")
        if cfg.task.get("metric") == "macro_f1":
            raise UserError("task.metric=macro_f1 is no mean over rows, which a race compares techniques by; race on task.metric=accuracy")
        path = Path(cfg.paths.data) / cfg.task.name / "test.jsonl"
        rows = len(read_rows(path)[: cfg.evaluate.test_rows])
        made = cls(cfg.budget_hours * 3600, cfg.within / 100, cfg.error, race.rows == "these", race.rates, race.screen_share,
                   None if race.collapse is None else race.collapse / 100, race.seed, tuple(s for s in LOOKS if s <= race.seeds), race.at_once, rows)
        needed = 0 if made.these else rows_needed(made.within, made.error, ROW_VARIANCE)
        if rows < needed:
            fits = next(w / 10 for w in range(1, 1000) if rows_needed(w / 1000, made.error, ROW_VARIANCE) <= rows)
            raise UserError(f"{rows} test rows are too few for within={cfg.within:g}: equal techniques that disagree on one row in twenty could never be "
                            f"shown to be so "
                            f"close, which takes about {needed:,} rows; add test rows, or take within={fits:g}, or race.rows=these for a statement on these "
                            f"rows alone")
        return made


    def settings(self, every: Sequence[Entrant]) -> dict[str, Any]:
        """What a race may not change when it is resumed: all but the budget."""
        fixed = {key: value for key, value in asdict(self).items() if key not in ("budget_s", "at_once", "looks")}
        cells = {one.name: hashlib.sha256(json.dumps(decides(one.cfg), sort_keys=True, default=str).encode()).hexdigest()[:16] for one in every}
        return {**fixed, "seeds": self.looks[-1], "techniques": [one.name for one in every], "cells": cells}


def entrants(cfg: DictConfig, overrides: Sequence[str], asked: Asked) -> list[Entrant]:
    """The techniques that the race names, or the experiment's grid.

    Raises:
        UserError: one technique alone; none that the budget and the memory hold.
    """
    words = by_key(overrides)
    if "experiments" not in words:
        raise UserError("pipeline.race needs an experiment; add experiments=<name>, for example experiments=quick")
    axes = cell_grid.grid(words["experiments"])["grid"]
    names = list(dict.fromkeys(cfg.race.techniques or ([words["technique"]] if "technique" in words else axes["techniques"])))
    if len(names) < 2:
        raise UserError(f"one technique ({names[0]}) is no race; name at least two in race.techniques, or in the experiment's grid")
    rows = words.get("train_rows", axes["train_rows"][0])
    rest = without(overrides, "technique", "seed", "train_rows")
    cells = [cell_grid.compose_cell([*rest, f"technique={name}", f"seed={asked.seed}", f"train_rows={'null' if rows is None else rows}"]) for name in names]
    for cell in cells:
        if cell.start is not None:
            raise UserError(f"{cell.technique.name} begins at another cell (start={cell.start}), whose seeds a race does not run; leave it out of "
                            f"race.techniques")
    costs = costs_of(cells, cfg)
    usual = [c.total_s for c in costs.values() if c.total_s]
    typical = statistics.median(usual) if usual else UNKNOWN_S
    made = [_entrant(name, cell, costs[cell.technique.name], typical, asked) for name, cell in zip(names, cells, strict=True)]
    able = [one for one in made if not one.reason]
    if len(able) < 2:
        prices = sorted(one.price_s for one in made if "memory" not in one.reason)
        if len(prices) < 2:
            raise UserError(f"fewer than two techniques fit into memory ({'; '.join(f'{one.name}: {one.reason}' for one in made if one.reason)}); take a "
                            f"smaller model")
        raise UserError(f"budget_hours={asked.budget_s / 3600:g} holds no two techniques: by forecast a seed of the cheapest two takes "
                        f"{OVER * sum(prices[:2]) / 3600:.2g} hours, the smallest budget that would do")
    return made


def _entrant(name: str, cell: DictConfig, cost: Any, usual: float, asked: Asked) -> Entrant:
    price, trains = cost.total_s or usual, bool(cost.train_s) or cost.total_s is None
    reason = ""
    if cost.fits is False:
        reason = f"does not fit into memory by forecast ({(cost.memory_bytes or 0) / 2**30:.1f} GiB)"
    elif OVER * price > asked.budget_s:
        reason = f"a seed costs more than the budget by forecast ({price / 3600:.2g} h)"
    return Entrant(name, cell, price, trains, reason, cost.memory_bytes)
