"""What figures are of one cell, or of the cells of several seeds, where that is no field of a result: what figures.py's table names.

Library of `python -m pipeline.report`.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.records.finished import Cell


def headline(split: str) -> Callable[[Cell], float | None]:
    """The task's metric on a split."""
    def of(cell: Cell) -> float | None:
        score = cell.result.scores.get(split)
        return getattr(score, cell.result.metric) if score else None

    return of


def bound(end: int) -> Callable[[Cell], float | None]:
    """One end of the headline metric's interval on the test rows."""
    def of(cell: Cell) -> float | None:
        bounds = cell.result.test.interval(cell.result.metric) if cell.result.test else None
        return bounds[end] if bounds else None

    return of


def transfer(cell: Cell) -> float | None:
    values = [v for split in cell.result.scores if split.startswith("transfer/") and (v := headline(split)(cell)) is not None]
    return statistics.fmean(values) if values else None


def teacher_s(cell: Cell) -> float | None:
    """Seconds for rationales and for synthetic rows."""
    known = [part.seconds for part in (cell.result.teacher, cell.result.synthetic) if part is not None and part.seconds is not None]
    return sum(known) if known else None


def made_s(cell: Cell) -> float | None:
    """Seconds of warm-up and training of the cell and of all that it is made of; None where it is made of nothing, or one is not known."""
    parts = [before.seconds for before in cell.result.before.values()]
    own = cell.result.phases
    return math.fsum([*filter(None, parts), own.warmup_s, own.train_s]) if parts and None not in parts and own else None


def pairs(each: Sequence[Any], key: str) -> float | None:
    """Mean over seeds of what is known of the test pairs."""
    known = [getattr(one["test"], key) for one in each if "test" in one]
    return statistics.fmean(known) if known else None


def growth_of(base: str) -> Callable[[Cell], float | None]:
    def of(cell: Cell) -> float | None:
        before, after = getattr(cell.result.forgetting, base, None), getattr(cell.result.forgetting, "perplexity", None)
        return after / before - 1 if before and after is not None else None

    return of


def change_of(probe: str, base: str) -> Callable[[Cell], float | None]:
    def of(cell: Cell) -> float | None:
        before, after = getattr(cell.result.forgetting, base, None), getattr(cell.result.forgetting, probe, None)
        return after - before if before is not None and after is not None else None

    return of


def status(each: Sequence[str]) -> str:
    lost = Counter(status for status in each if status != "ok")
    words = [status if count == len(each) else f"{status} in {count} of {len(each)} seeds" for status, count in lost.items()]
    return ", ".join(words) or "ok"


def one_currency(part: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Any]], Any]:
    """Of costs; None where they are in several currencies."""
    return lambda costs: part(costs) if len({cost.currency for cost in costs}) == 1 else None
