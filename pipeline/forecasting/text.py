"""A forecast in words: the command's table, and a line for every cell that will not fit, before it starts."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from omegaconf import DictConfig

from pipeline.core.files import UserError
from pipeline.forecasting.cell import Card, Forecast, forecast

ENGINES = {"hand": "fast (hand-written step)", "captured": "fast (autograd, captured)", "eager": "eager", "sharded": "eager, in parts (FSDP2)"}
WHAT = {
    "weights": "weights, with copies for the arithmetic", "adapter": "adapter, fp32", "gradients": "gradients", "optimiser": "optimiser states",
    "activations": "activations", "logits": "logits", "workspace": "workspace of products", "inputs": "inputs", "allocator": "allocator: rounding and holes",
    "fixed": "the process itself",
}


def table(estimate: Forecast) -> list[str]:
    head = f"{estimate.technique} on {_cards(estimate)} ({gib(estimate.card.memory_bytes)})"
    if estimate.memory is None:
        return [f"{head}: {estimate.reason}"]
    lines = [
        f"{head}: {estimate.trainable:,} of {estimate.parameters:,} parameters trained, base in {estimate.precision}, engine {ENGINES[estimate.engine]}",
        f"rows: {estimate.rows_from}; longest {estimate.longest} tokens, {estimate.step_tokens:,.0f} tokens a step, {estimate.steps} steps", "",
    ]
    lines += [f"{WHAT[name]:<44}{size / 2**20:>12,.1f} MiB" for name, size in estimate.memory.parts.items() if size]
    lines += [f"{'peak':<44}{estimate.memory.total / 2**20:>12,.1f} MiB  ({gib(estimate.memory.total)})", "", verdict(estimate)]
    if estimate.train_s is not None:
        low, middle, high = estimate.train_s
        lines.append(f"training takes about {seconds(middle)} [{seconds(low)}, {seconds(high)}], by {estimate.time_from}")
    elif estimate.time_from:
        lines.append(estimate.time_from)
    return [*lines, *estimate.notes]


def _cards(estimate: Forecast) -> str:
    return estimate.card.name if estimate.gpus == 1 else f"each of {estimate.gpus} times {estimate.card.name}"


def verdict(estimate: Forecast) -> str:
    """Whether it fits, and the largest batch that does."""
    words = "fits" if estimate.fits else "does not fit"
    if estimate.fits and estimate.memory is not None and estimate.memory.total > estimate.card.memory_bytes:
        words = "fits, though a larger card would be used up to that peak: PyTorch gives back what it holds unused once this one is full"
    rows = "" if estimate.largest_batch is None else f"; the largest batch in one pass is {estimate.largest_batch:,} rows of {estimate.longest} tokens"
    return f"{words}{rows if estimate.largest_batch != 0 else '; not even one row does'}"


def warning(estimate: Forecast) -> str | None:
    """One line where a cell will not fit; None where it does or nothing is known."""
    if estimate.memory is None or estimate.fits:
        return None
    return (f"forecast: {estimate.technique} needs {gib(estimate.memory.total)}, {_cards(estimate)} has {gib(estimate.card.memory_bytes)}; it will "
            "probably run out of memory (lower train.micro_batch_tokens, or set train.checkpointing=true)")


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def seconds(value: float) -> str:
    if value < 120:
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def warn(cells: Iterable[DictConfig]) -> None:
    """Print the warnings to stderr, one a technique and number of rows (another seed takes as much)."""
    first = {(cfg.technique.name, cfg.train_rows): cfg for cfg in reversed(list(cells))}
    for cfg in reversed(first.values()):
        told(cfg)


def told(cfg: DictConfig, card: Card | None = None) -> Forecast | None:
    """The forecast of a cell's memory, after its warning, if there is one, was printed; None where there is no forecast."""
    estimate = None
    try:
        estimate = forecast(cfg, card, batches=False, time=False)
        line = warning(estimate)
    except UserError:  # what is wrong with the cell, it will say itself
        return None
    except Exception as error:  # a forecast that fails must not keep a cell from running
        line = f"forecast: none for {cfg.technique.name} ({type(error).__name__}: {error})"
    if line:
        print(f"{line} [{cfg.technique.name}, {'all' if cfg.train_rows is None else cfg.train_rows} rows]", file=sys.stderr)
    return estimate
