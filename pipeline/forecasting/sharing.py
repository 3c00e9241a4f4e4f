"""How many cells one GPU holds at once, by the forecast of their memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from pipeline.cell.room import AtOnce
from pipeline.core.compose import plain
from pipeline.core.names import class_of
from pipeline.forecasting.cell import Card, card_at_hand
from pipeline.forecasting.text import told
from pipeline.measure import machine
from pipeline.records.finished import name as cell_name

RESERVE = 0.9
"""The share of a card's memory that cells may plan to take together."""
MOST = 8
"""More at once than these gain nothing: each waits for the others' kernels."""
WAITING = 4
"""Cells under way that take turns, at least: one is timed while the others load and capture."""
CPUS_EACH = 2
"""With more CPUs than twice WAITING one for each two of them, MOST at most: what is not timed is mostly Python's work, a CPU for each cell."""
WEIGHTS_TIMES = 4
"""Bytes that a cell without a forecast (it trains nothing) is taken to need, by those of its base's files."""
BESIDES = 2 * 2**30
"""And these: the process itself, and what is made while rows are answered."""
UNKNOWN_TIMES = 1.5
"""Bytes that a cell which trains without a forecast is taken to need, by the most that another cell of the experiment needs. Who runs out of memory beside
others is run again by itself."""


def limit(missing: Sequence[DictConfig]) -> AtOnce:
    """How many of these cells `pipeline.cells` may have under way (`pipeline.fanout`: on each GPU), with what each needs; what will not fit is warned of.

    One on a CPU, where there is nothing to overlap. At most MOST with share=true, else as many as `in_turns` says: more only wait for their turn.
    """
    cfg = missing[0]
    card = card_at_hand(cfg)
    together = any(cell.train.parallel != "none" for cell in missing)  # a cell that several GPUs train has all of them to itself
    cells = 1 if together else cfg.at_once or (1 if not card.gpu else MOST if cfg.share else in_turns())
    needs: dict[str, int] = {}
    first: dict[tuple[str, int | None], int | None] = {}
    for cell in missing:
        key = (cell.technique.name, cell.train_rows)  # another seed takes as much
        if key not in first:
            first[key] = _need(cell, card)
    known = [need for need in first.values() if need is not None]
    for cell in missing if known else ():
        need = first[cell.technique.name, cell.train_rows]
        needs[cell_name(cell)] = int(UNKNOWN_TIMES * max(known)) if need is None else need
    return AtOnce(cells, needs, int(card.memory_bytes * RESERVE) if card.gpu else None)


def in_turns() -> int:
    """How many cells may take turns on one of this machine's GPUs, by the CPUs that it has for each."""
    return max(WAITING, min(MOST, (machine.cpu_count() or 1) // max(1, machine.visible_gpus()) // CPUS_EACH))


def _need(cfg: DictConfig, card: Card) -> int | None:
    """Bytes of a cell; None: nothing is known."""
    estimate = told(cfg, card)
    if estimate is not None and estimate.memory is not None:
        return int(estimate.memory.total)
    if class_of(plain(cfg)["method"], "method").trains:
        return None
    return BESIDES + WEIGHTS_TIMES * sum(path.stat().st_size for path in (Path(cfg.paths.models) / cfg.model.name).glob("*.safetensors"))
