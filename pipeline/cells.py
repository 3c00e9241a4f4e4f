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

from omegaconf import DictConfig

from pipeline.cell.grid import run_missing
from pipeline.core.commands import entry
from pipeline.forecasting.sharing import limit


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Run what is missing, in the grid's order."""
    return run_missing(overrides, limit)


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
