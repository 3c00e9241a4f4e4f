"""Run the missing cells of an experiment on many workers at once: Ray's, on this machine or a cluster, or Slurm's.

    python -m pipeline.fanout experiments=quick                                  up to four cells in turns on each GPU of this machine, or one a CPU
    python -m pipeline.fanout experiments=quick at_once=1                        one cell on a GPU
    python -m pipeline.fanout experiments=quick ray.address=auto                 on the Ray cluster that this machine is part of (or host:6379)
    python -m pipeline.fanout experiments=quick ray.address=10.0.0.1:6379 ray.store=objects    its machines do not see this folder
    python -m pipeline.fanout experiments=quick share=true                       several cells on one GPU where the forecast says that they fit
    python -m pipeline.fanout experiments=quick launcher=slurm slurm.jobs=32     a Slurm array of 32 jobs, through submitit
    python -m pipeline.fanout experiments=quick launcher=local                   the same jobs as processes of this machine

Needs `pip install 'alignscope[ray]'` (or `[slurm]`). Leaves what `pipeline.cells` leaves, the same files for the same cells; `make adopt` takes them.
A worker that dies loses its own cell alone, which is tried again on another one; the command may be killed and started again. docs/scale.md.
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from pipeline.cell.grid import compose_cells, grid_overrides, tuned_already
from pipeline.core.commands import entry
from pipeline.fan.run import run as fan_out
from pipeline.forecasting.sharing import limit


def run(cfg: DictConfig, overrides: list[str]) -> int:
    return fan_out(compose_cells(tuned_already(grid_overrides(overrides))), limit)


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
