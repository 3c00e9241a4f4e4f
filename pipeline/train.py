"""Train and evaluate one cell: technique x seed x train_rows of an experiment.

    python -m pipeline.train experiments=quick technique=lora seed=0 train_rows=160
    python -m pipeline.train experiments=quick technique=lora+tuned seed=0 train_rows=160     with the settings that pipeline.tune found
    python -m pipeline.train experiments=quick technique=full train.parallel=fsdp             over all visible GPUs (train.gpus=2: two; docs/scale.md)
    torchrun --nproc-per-node=2 -m pipeline.train … train.parallel=ddp                        the same, its processes started by torchrun

Writes results/<experiment>/<cell>/{result.json, predictions.jsonl, history.csv, artefact/} and mirrors them to MLflow
(off: tracking=none). A killed run resumes from its last checkpoint; out of memory is a result (status oom, exit 0), and so is
a training that diverged (status diverged).
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from pipeline.cell import identity, locks
from pipeline.cell.child import run_cell
from pipeline.cell.inputs import check_ahead
from pipeline.core.commands import entry
from pipeline.forecasting.text import warn
from pipeline.measure.clock import process_start
from pipeline.records import mlflow as tracking
from pipeline.records import tuned
from pipeline.training.ranks import of_torchrun


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Run the cell in a child process and mirror its result."""
    cfg = tuned.applied(cfg, overrides)
    check_ahead(cfg)
    place = of_torchrun() if cfg.train.parallel != "none" else None
    if place is not None and place.rank:
        return run_cell(cfg, None, process_start(), place=place)
    with locks.alone(cfg):
        code = run_cell(cfg, None, process_start(), meanwhile=lambda: warn([cfg]), place=place)  # the forecast is none of the cell's time
        if code == 0:
            tracking.log_cell(identity.folder_of(cfg), cfg)
    return code


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
