"""Search a technique's rank (and more) with Optuna on validation rows, then run the best setting as a cell of its own.

    python -m pipeline.sweep experiments=quick technique=lora                       every rank once (make sweep)
    python -m pipeline.sweep experiments=quick technique=lora sweep=rank_memory     accuracy against peak memory
    python -m pipeline.sweep experiments=quick technique=lora sweep=rank_alpha_lr   rank x alpha x learning rate
    python -m pipeline.sweep experiments=quick technique=lora sweep.executor=packed several trials at once (auto: on a GPU)
    optuna-dashboard sqlite:///sweeps/quick/lora/study.db                           look at it

Writes sweeps/<experiment>/<technique>/{study.db, sweep.json, trials.csv, best.json} and the confirm cell under results/.
Test rows are scored in the confirm cell only. A killed sweep goes on where it was: started again, it tries the trial
that died once more and runs those that are missing. A trial that runs out of memory is an answer, not an error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline import cell, cells, settings, tracking, train
from pipeline.config import entry
from pipeline.measure import now
from pipeline.search_space import at
from pipeline.search_trials import alone, search
from pipeline.sweep_study import open_study, read


def run(cfg: DictConfig, given: Sequence[str] = ()) -> int:
    """Search, write the outputs, confirm the best. `given`: the config keys set by hand."""
    cfg = _of_grid(cfg, given)
    settings.read(cfg)
    sweep = read(cfg)
    folder = Path(cfg.paths.sweeps) / cfg.experiment / _name(cfg)
    confirmed: list[DictConfig] = []
    with alone(folder):
        study = open_study(folder, cfg, sweep)
        try:
            search(study, cfg, lambda: cells.preload([cfg]))
            best = study.write_best()
            print(study.table())
            print(f"best: {' '.join(best['overrides'])} (trial {best['trial']}), in {folder / 'best.json'}")
            return _confirm(cfg, best, confirmed) if sweep.confirm else 0
        finally:
            tracking.log_sweep(folder, cfg)
            for chosen in confirmed:
                tracking.log_cell(cell.folder_of(chosen), chosen)


def _name(cfg: DictConfig) -> str:
    return f"{cfg.technique.name}+{cfg.variant}" if cfg.variant else str(cfg.technique.name)


def _of_grid(cfg: DictConfig, given: Sequence[str]) -> DictConfig:
    """The cell's config with the first seed and train_rows of the experiment's grid, unless they were given."""
    if "experiments" not in given:
        return cfg
    grid = cells.grid(cfg.experiment)["grid"]
    wanted = {"seed": grid["seeds"][0], "train_rows": grid["train_rows"][0]}
    return at(cfg, {key: value for key, value in wanted.items() if key not in given})


def _confirm(cfg: DictConfig, best: dict[str, Any], confirmed: list[DictConfig]) -> int:
    """Run the best setting, or each point of the front, as a cell of the experiment; test rows are scored here only."""
    code, shared = 0, None
    for choice in best["front"] or [best]:
        variant = f"{cfg.variant}-{choice['variant']}" if cfg.variant else choice["variant"]
        chosen = at(cfg, {**choice["settings"], "variant": variant})
        if not cells.is_done(chosen):
            shared = shared or cells.preload([chosen])
            code = max(code, train.run_cell(chosen, shared, now()))
        if code == 130:
            break
        if cells.is_done(chosen):
            print(f"confirmed in {cell.folder_of(chosen)}")
            confirmed.append(chosen)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """The entry: Hydra overrides in, exit code out."""
    words = sys.argv[1:] if argv is None else list(argv)
    given = [word.partition("=")[0].lstrip("+") for word in words]
    return entry(lambda cfg: run(cfg, given))(argv)


if __name__ == "__main__":
    sys.exit(main())
