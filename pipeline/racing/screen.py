"""Screening: for every technique a few learning rates for one epoch, on validation rows alone. It fixes a technique's settings and the order of the race.

Library of `python -m pipeline.race`. No claim rests on it: any heuristic would do. Trials are a study of pipeline.search, packed on a GPU where the
technique allows it, under sweeps/<experiment>/<technique>-n<train_rows>-race; a killed one resumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.cell import inputs
from pipeline.cell.child import limited
from pipeline.core.files import UserError
from pipeline.models import rates
from pipeline.racing.entrants import Asked, Entrant
from pipeline.racing.journal import Journal, Screened
from pipeline.racing.policy import OVER
from pipeline.records.results import rank_key
from pipeline.search import choice
from pipeline.search.space import Parameter, Space, at
from pipeline.search.study import Sweep, open_study, short
from pipeline.search.trials import alone, search

STEP = math.sqrt(10)
"""Between two learning rates that are tried."""
KEY = "train.lr"


def ladder(lr: float, count: int) -> list[float]:
    """So many rates around one, the nearest first: lr, lr STEP, lr / STEP, lr STEP^2, ..."""
    powers = [0] + [sign * i for i in range(1, count) for sign in (1, -1)]
    return [float(f"{lr * STEP**power:.2g}") for power in powers[:count]]


def screen(entrants: Sequence[Entrant], asked: Asked, journal: Journal, load: Callable[[], inputs.Shared]) -> dict[str, Screened]:
    """What was found for every technique, in the order of the race: the cheapest are screened first, as long as their share of the budget lasts."""
    for entrant in sorted(entrants, key=lambda e: e.price_s):
        if entrant.name not in journal.screened:
            journal.screened[entrant.name] = _one(entrant, asked, journal, load)
            journal.write()
    return journal.screened


def order(every: Sequence[Entrant], journal: Journal) -> list[str]:
    """All techniques in the order of the race: by screening, then the cheapest first. It is fixed once, since each one's share of the error goes by it."""
    def key(one: Entrant) -> tuple[bool, bool, tuple[float, float], float]:
        found = journal.screened.get(one.name)
        if found is None or found.validation is None:
            return bool(one.reason), True, (0.0, 0.0), one.price_s
        value, nll = rank_key(found.validation, found.nll)
        return bool(one.reason), False, (-value, -nll), one.price_s

    if not journal.order:
        journal.order = [one.name for one in sorted(every, key=key)]
        journal.write()
    return journal.order


def _one(entrant: Entrant, asked: Asked, journal: Journal, load: Callable[[], inputs.Shared]) -> Screened:
    empty = Screened(entrant.name, {}, None, None, 0.0)
    if not entrant.trains:
        return Screened(**{**vars(empty), "reason": "it trains nothing"})
    epochs = min(1.0, float(entrant.cfg.train.epochs))
    expected = asked.rates * entrant.price_s * epochs / max(1.0, float(entrant.cfg.train.epochs))
    used = sum(one.seconds for one in journal.screened.values())
    left = min(asked.screen_share * asked.budget_s - used, asked.budget_s - journal.spent_s)
    if OVER * expected > left:
        return Screened(**{**vars(empty), "reason": "its share of the budget was used up"})
    lr = rates.read(entrant.cfg).train.learning_rate
    space = Space({KEY: Parameter(choices=tuple(ladder(lr, asked.rates)))})
    sweep = Sweep("brute_force", space, confirm=False, executor="auto", count_errors=True)
    cfg = at(entrant.cfg, {"train.epochs": epochs, "train.lr": lr, "seed": max(0, asked.seed - 1)})
    folder = Path(cfg.paths.sweeps) / cfg.experiment / f"{entrant.name}-n{'all' if cfg.train_rows is None else cfg.train_rows}-race"
    print(f"screening {entrant.name}: {', '.join(short({KEY: value}) for value in space.searched[KEY].choices or ())}", flush=True)
    journal.begin(f"screening {entrant.name}")
    rows, reason = [], ""
    with limited(left, journal.beat) as limit, alone(folder):
        study = open_study(folder, cfg, sweep)
        try:
            search(study, cfg, load)
        except KeyboardInterrupt:
            if not limit.reached:
                raise
            reason = "stopped, its share of the budget was used up"
        except UserError as error:
            reason = " ".join(str(error).split())
        rows = [row for row in study.rows() if row["status"] != "died"]
    return _found(entrant.name, rows, space, lr, journal.ended(), reason)


def _found(name: str, rows: Sequence[dict], space: Space, lr: float, seconds: float, reason: str) -> Screened:
    trials = [{KEY: row[KEY], "validation": row["validation"], "nll": row["nll"], "status": row["status"]} for row in rows]
    taken = choice.taken([{**row, "params": space.point(row)} for row in rows], space, {KEY: lr})
    if taken is None:
        return Screened(name, {}, None, None, seconds, trials, reason or "no rate gave a value")
    return Screened(name, {KEY: taken[KEY]}, taken["validation"], taken["nll"], seconds, trials, reason)
