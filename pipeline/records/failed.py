"""Why a cell that has no result gave up: noted below paths.work until it has one, for the table and whoever asks later.

Library.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig

from pipeline.core.files import UserError, discard, read_object, write_json
from pipeline.records.finished import name as cell_name


def _file(work: str | Path, experiment: str, cell: str) -> Path:
    return Path(work) / "failed" / experiment / f"{cell}.json"


def note(cfg: DictConfig, reason: str) -> None:
    """Keep why a cell gave up; empty: it did not, and what was noted before goes."""
    path = _file(cfg.paths.work, cfg.experiment, cell_name(cfg))
    with contextlib.suppress(UserError, OSError):  # a disk that is full: what the cell said of it stands on the terminal
        if reason:
            write_json(path, {"reason": reason})
        else:
            discard(path)


def named(work: str | Path, experiment: str, cells: Iterable[str]) -> list[str]:
    """The names of cells, each with why it gave up in brackets where that is known."""
    paths = {cell: _file(work, experiment, cell) for cell in cells}
    return [f"{cell} ({read_object(path)['reason']})" if path.exists() else cell for cell, path in paths.items()]
