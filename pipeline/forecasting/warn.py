"""A line for every cell that will not fit, before it starts; it starts all the same.

Library of `train` and `cells`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from omegaconf import DictConfig

from pipeline.core.files import UserError
from pipeline.forecasting.cell import forecast
from pipeline.forecasting.text import warning


def warn(cells: Iterable[DictConfig]) -> None:
    """Print the warnings to stderr, one a technique and number of rows (another seed takes as much)."""
    first = {(cfg.technique.name, cfg.train_rows): cfg for cfg in reversed(list(cells))}
    for (technique, rows), cfg in reversed(first.items()):
        try:
            line = warning(forecast(cfg, batches=False, time=False))
        except UserError:  # what is wrong with the cell, it will say itself
            continue
        except Exception as error:  # a forecast that fails must not keep a cell from running
            line = f"forecast: none for {technique} ({type(error).__name__}: {error})"
        if line:
            print(f"{line} [{technique}, {'all' if rows is None else rows} rows]", file=sys.stderr)
