"""Decide under a budget, with a stated error: which technique of an experiment is within so many points of the best, found with as few hours as it takes.

    python -m pipeline.race experiments=quick budget_hours=1 within=2 error=0.05
    python -m pipeline.race experiments=quick budget_hours=1 within=5 'race.techniques=[lora,ia3,full]'     some of its techniques
    python -m pipeline.race experiments=quick budget_hours=1 within=1 race.rows=these      a statement on these test rows alone, which takes fewer rows
    python -m pipeline.race experiments=quick budget_hours=8 race.at_once=4               four cells at once, by pipeline.fanout's workers

Screening fixes each technique's learning rate on validation rows; then fresh seeds run one after another, the next one where it decides most for its price,
and techniques leave when they are shown to be below another. It ends with a technique and the chance that this is wrong, or with the set that could still be
the best and the hours that would decide. Never more hours than the budget; killed and started again it makes the same decisions and pays for nothing twice.
Writes races/<experiment>/journal.json, the cells under results/, and report/<experiment>-race/{index.html, race.md, race.json}. docs/race.md.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.cell import inputs
from pipeline.core import locks, settings
from pipeline.core.commands import entry
from pipeline.core.files import UserError
from pipeline.racing import page
from pipeline.racing.drive import Driver, Seeds
from pipeline.racing.entrants import Asked, entrants
from pipeline.racing.journal import Journal
from pipeline.racing.screen import order, screen
from pipeline.racing.words import markdown, told
from pipeline.reporting.figures import METRICS


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Race, to a technique or to what is open: both are an end."""
    settings.read(cfg)
    asked = Asked.of(cfg)
    every = entrants(cfg, overrides, asked)
    able, out = [e for e in every if not e.reason], [e for e in every if e.reason]
    folder = Path(cfg.paths.races) / cfg.experiment
    try:
        with locks.held(folder / ".lock"):
            journal = Journal(folder / "journal.json", asked.settings(every))
            load = functools.cache(lambda: inputs.preload([e.cfg for e in able]))
            screened = screen(able, asked, journal, load)
            order(every, journal)
            driver = Driver(able, asked, screened, journal, Seeds(able, asked, screened, journal, load))
            driver.go()
            metric = METRICS.get(cfg.task.get("metric", "accuracy"), "the metric")
            end = told(driver, out, metric)
            written = page.write(Path(cfg.paths.report) / f"{cfg.experiment}-race", cfg.experiment, driver, end, metric)
    except locks.Busy as error:
        raise UserError(f"another process runs this race ({locks.holder(folder / '.lock')}); wait for it, or end it") from error
    print(f"{markdown(cfg.experiment, end)}\nreport: {written}")
    return 0


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
