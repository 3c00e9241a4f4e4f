"""Train and evaluate one cell: technique x seed x train_rows of an experiment.

    python -m pipeline.train experiments=quick technique=lora seed=0 train_rows=160
    python -m pipeline.train experiments=quick technique=lora+tuned seed=0 train_rows=160     with the settings that pipeline.tune found

Writes results/<experiment>/<cell>/{result.json, predictions.jsonl, history.csv, artefact/} and mirrors them to MLflow
(off: tracking=none). A killed run goes on from its last checkpoint; out of memory is a result (status oom, exit 0).
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from pipeline import cell, tracking, tuned
from pipeline.config import entry, task_overrides
from pipeline.files import UserError, check_writable
from pipeline.measure import Stopwatch, process_start
from pipeline.results import Result
from pipeline.scoring import headline
from pipeline.supervise import run_in_child


def run(cfg: DictConfig) -> int:
    """Run the cell in a child process and mirror its result."""
    cfg = tuned.applied(cfg, task_overrides())
    code = run_cell(cfg, None, process_start() + warned(cfg))
    if code == 0:
        tracking.log_cell(cell.folder_of(cfg), cfg)
    return code


def warned(*cells: DictConfig) -> float:
    """Tell which of the cells will not fit. Returns the seconds that took, which are none of the cells'."""
    from pipeline.forecasting.warn import warn

    watch = Stopwatch()
    warn(cells)
    return watch.lap()


def run_cell(cfg: DictConfig, shared: cell.Shared | None, started: float | None) -> int:
    """One cell in a child process; 0 once its result is on disk."""
    cell.read(cfg)  # a misspelt key is told before anything is started
    folder = cell.folder_of(cfg)
    check_writable(folder)
    limit = cfg.memory_limit_gb and int(cfg.memory_limit_gb * 2**30)

    def work() -> int:
        result = cell.run(cfg, shared=shared, folder=folder, started=started)
        print(summary(result))
        return 0

    done = run_in_child(work, limit)
    if done.out_of_memory:
        reason = done.out_of_memory
        done = run_in_child(lambda: print(summary(cell.write_oom(cfg, reason))) or 0)  # what it imports stays out of this process
    if done.code > 128 and done.code != 130:
        raise UserError(f"cell {cell.name(cfg)} was ended by signal {done.code - 128}; run the same command again, it goes on from its last checkpoint")
    return done.code


def summary(result: Result) -> str:
    """One line on a finished cell."""
    if result.status != "ok" or result.test is None or result.phases is None:
        return f"{result.cell}: {result.status} ({result.error})"
    test = result.test
    return (
        f"{result.cell}: test {result.metric} {headline(test, result.metric):.3f} [{test.accuracy_low:.3f}, {test.accuracy_high:.3f}] "
        f"on {test.rows} rows, train {result.phases.train_s:.1f} s, wall {result.phases.wall_s:.1f} s"
    )


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
