"""Search a technique's rank (and more) with Optuna on validation rows, then run the best setting as a cell of its own.

    python -m pipeline.sweep experiments=quick technique=lora                       every rank once (make sweep)
    python -m pipeline.sweep experiments=quick technique=lora sweep=rank_memory     accuracy against peak memory
    python -m pipeline.sweep experiments=quick technique=lora sweep=rank_alpha_lr   rank x alpha x learning rate
    python -m pipeline.sweep experiments=quick technique=lora sweep.executor=packed several trials at once (auto: on a GPU)
    optuna-dashboard sqlite:///sweeps/quick/lora/study.db                           look at it

Writes sweeps/<experiment>/<technique>/{study.db, sweep.json, trials.csv, best.json} and the confirm cell under results/.
Test rows are scored in the confirm cell only. A killed sweep resumes when started again: it tries the trial
that died once more and runs those that are missing. A trial that runs out of memory is an answer, not an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.cell import inputs
from pipeline.cell.grid import Mirror
from pipeline.core import settings
from pipeline.core.commands import entry
from pipeline.core.compose import by_key
from pipeline.reporting.figures import METRICS
from pipeline.reporting.verdict import of_search
from pipeline.search.study import Study, open_study, read, short
from pipeline.search.trials import alone, confirm, of_grid, search, study_name


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Search, write the outputs, confirm the best."""
    cfg = of_grid(cfg, by_key(overrides))
    settings.read(cfg)
    sweep = read(cfg)
    folder = Path(cfg.paths.sweeps) / cfg.experiment / study_name(cfg)
    mirror = Mirror()
    with alone(folder):
        study = open_study(folder, cfg, sweep)
        try:
            search(study, cfg, lambda: inputs.preload([cfg]))
            best = study.write_best()
            print(study.table())
            print(verdict(study, cfg.task.get("metric", "accuracy")))
            print(f"chosen: {' '.join(best['overrides'])} (trial {best['trial']}), in {folder / 'best.json'}")
            return confirm(cfg, best, mirror) if sweep.confirm else 0
        finally:
            mirror.sweeps(cfg, folder)


def verdict(study: Study, metric: str) -> str:
    """What the trials tell of the settings, in sentences."""
    rows = sorted((row for row in study.rows() if row["validation"] is not None), key=lambda row: study.sweep.space.order(study.sweep.space.point(row)))
    trials = [(short(study.sweep.space.point(row)), row["validation"], row.get("peak_memory")) for row in rows]
    scored = max((row["validation_rows"] or 0 for row in rows), default=None)
    return of_search(trials, scored, METRICS.get(metric, metric)).replace("`", "")


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
