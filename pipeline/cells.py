"""Run the missing cells of an experiment, one after another; needs neither DVC nor MLflow.

    python -m pipeline.cells experiments=quick                 all missing cells of experiments/quick/params.yaml's grid
    python -m pipeline.cells experiments=quick technique=lora  only those of one technique
    python -m pipeline.cells experiments=quick tuned=true      with the settings that pipeline.tune found, beside the untuned ones
    python -m pipeline.cells experiments=quick pack=true       seeds of an adapter trained at once (pipeline/cell/packing.py)
    python -m pipeline.cells experiments=quick share=true      several cells on a GPU at once, seeds of an adapter packed: no time is a cell's own
    python -m pipeline.cells experiments=quick at_once=1       one cell after another

Imports, base model and tokenizer are read once; every cell then runs in a forked child, so its memory is its own and
one that runs out of it does not stop the others. On a GPU several are under way: one has it alone while it is timed (training,
test rows, requests), the others load, capture and are probed in between. A finished cell is passed over (unless its config, data or model
changed, or it ran out of memory on other hardware), a killed one resumes from its checkpoint. Two such commands at once
share the cells. `dvc commit` adopts the result files.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.cell.grid import grid, run_missing
from pipeline.cell.launch import INTERRUPTED
from pipeline.core.commands import entry
from pipeline.core.compose import by_key
from pipeline.forecasting.sharing import limit
from pipeline.records import failed
from pipeline.records.finished import names

SHOWN = 10


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Run what is missing, in the grid's order, and say what has no result and what comes next."""
    code = run_missing(overrides, limit)
    if code != INTERRUPTED and not {"experiment", "tuned", "variant"} & by_key(overrides).keys():
        root = Path(cfg.paths.results) / cfg.experiment
        every = names(grid(cfg.experiment)["grid"])
        missing = [cell for cell in every if not (root / cell / "result.json").exists()]
        if missing:
            told = "; ".join(failed.named(cfg.paths.work, cfg.experiment, missing[:SHOWN])) + ("; …" if len(missing) > SHOWN else "")
            print(f"{len(missing)} of {len(every)} cells have no result: {told}")
        if len(missing) < len(every):
            print(f"the table and the verdict: python -m pipeline.report experiments={cfg.experiment}")
    return code


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
