"""Which cells are computed at this moment, and by which process: one computes a cell, the others take other cells or wait.

Library. A cell's lock is `<paths.work>/locks/<experiment>-<cell>.lock`; the kernel ends it with the process that holds it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from omegaconf import DictConfig

from pipeline.core import locks
from pipeline.core.files import UserError
from pipeline.records.finished import name as cell_name

DYING_S = 2  # a process killed a moment ago may still hold its lock through a child that is ending


def path_of(cfg: DictConfig) -> Path:
    """The cell's lock."""
    return Path(cfg.paths.work) / "locks" / f"{cfg.experiment}-{cell_name(cfg)}.lock"


@contextlib.contextmanager
def alone(cfg: DictConfig) -> Iterator[None]:
    """Hold a cell. Raises UserError, naming the process, where another one computes it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.held(path_of(cfg), DYING_S))
        except locks.Busy as error:
            raise UserError(f"cell {cell_name(cfg)} is being computed by {locks.holder(path_of(cfg))}; wait for it, or end it, then run again") from error
        yield


@contextlib.contextmanager
def free(cells: Iterable[DictConfig]) -> Iterator[list[DictConfig]]:
    """Hold those of the cells that no other process computes, and yield them."""
    with contextlib.ExitStack() as stack:
        taken = []
        for cfg in cells:
            with contextlib.suppress(locks.Busy):
                stack.enter_context(locks.held(path_of(cfg)))
                taken.append(cfg)
        yield taken


def waited(cfg: DictConfig) -> contextlib.AbstractContextManager[None]:
    """Hold a cell once the process that computes it has ended with it; which process that is, is printed first."""
    return locks.waited(path_of(cfg), f"waiting for {cell_name(cfg)}, which {{holder}} computes")
