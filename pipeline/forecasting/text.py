"""A forecast in words: the command's table, and a line for every cell that will not fit, before it starts.

Library of `python -m pipeline.forecast`, `train` and `cells`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from omegaconf import DictConfig

from pipeline.core.files import UserError
from pipeline.forecasting.cell import Forecast, forecast

ENGINES = {"hand": "fast (hand-written step)", "captured": "fast (autograd, captured)", "eager": "eager"}
WHAT = {
    "weights": "weights, with copies for the arithmetic", "adapter": "adapter, fp32", "gradients": "gradients", "optimiser": "optimiser states",
    "activations": "activations", "logits": "logits", "workspace": "workspace of products", "inputs": "inputs", "allocator": "allocator: rounding and holes",
    "fixed": "the process itself",
}


def table(found: Forecast) -> list[str]:
    """Lines to print."""
    head = f"{found.technique} on {found.card.name} ({gib(found.card.memory_bytes)})"
    if found.memory is None:
        return [f"{head}: {found.reason}"]
    lines = [
        f"{head}: {found.trainable:,} of {found.parameters:,} parameters trained, base in {found.precision}, engine {ENGINES[found.engine]}",
        f"rows: {found.rows_from}; longest {found.longest} tokens, {found.step_tokens:,.0f} tokens a step, {found.steps} steps", "",
    ]
    lines += [f"{WHAT[name]:<44}{size:>18,} bytes" for name, size in found.memory.parts.items() if size]
    lines += [f"{'peak':<44}{found.memory.total:>18,} bytes  ({gib(found.memory.total)})", "", verdict(found)]
    if found.train_s is not None:
        low, middle, high = found.train_s
        lines.append(f"training takes about {seconds(middle)} [{seconds(low)}, {seconds(high)}], by {found.time_from}")
    elif found.time_from:
        lines.append(found.time_from)
    return [*lines, *found.notes]


def verdict(found: Forecast) -> str:
    """Whether it fits, and the largest batch that does."""
    words = "fits" if found.fits else "does not fit"
    rows = "" if found.largest_batch is None else f"; the largest batch in one pass is {found.largest_batch:,} rows of {found.longest} tokens"
    return f"{words}{rows if found.largest_batch != 0 else '; not even one row does'}"


def warning(found: Forecast) -> str | None:
    """One line where a cell will not fit; None where it does or nothing is known."""
    if found.memory is None or found.fits:
        return None
    return (f"forecast: {found.technique} needs {gib(found.memory.total)}, {found.card.name} has {gib(found.card.memory_bytes)}; it will probably run out of "
            "memory (lower train.micro_batch_tokens, or set train.checkpointing=true)")


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def seconds(value: float) -> str:
    """A time for people."""
    if value < 120:
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


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
