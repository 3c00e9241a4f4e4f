"""What `python -m pipeline.evaluate` wrote beside the cells, as the report says it: what merging leaves of adapters, and lm-evaluation-harness's tasks.

Library of `python -m pipeline.report`. Both are there only where somebody has asked for them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.records.evaluations import SAID, TITLES, Evaluations, Measured
from pipeline.reporting import words as f

if TYPE_CHECKING:
    from pipeline.reporting.figures import Row

COLUMNS = ("bf16", "nf4", "int8", "q8_0")
"""Precisions of merges that the report has a column of; fp32 is the adapter itself."""
FIRST = ("acc", "acc_norm", "exact_match")
"""Of a task's metrics the one that is shown, where it has them; else the first by name. The others are in the files."""


def merged(found: Sequence[Evaluations]) -> dict[str, Any]:
    """The figures of a row about merges, over its cells: means, and the worst verdict."""
    figures: dict[str, Any] = {}
    for precision in COLUMNS:
        ones = [one for each in found if each.truth for one in each.truth.merged if one.precision == precision]
        if ones:
            key = f"merged_{precision}"
            figures[key] = statistics.fmean(one.change for one in ones) / 100
            figures |= {f"{key}_{what}": statistics.fmean(getattr(one, what) for one in ones) for what in ("drift", "left")}
            figures[f"{key}_verdict"] = max((one.verdict for one in ones), key=list(SAID).index)
    return figures


def told(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before an adapter is merged, and which evaluations are of an earlier run."""
    said = []
    for row in rows:
        by_verdict: dict[str, list[str]] = {}
        for precision in COLUMNS:
            by_verdict.setdefault(getattr(row, f"merged_{precision}_verdict") or "kept", []).append(precision)
        for verdict in ("too_much", "rounded_away"):
            if verdict in by_verdict:
                said.append(f"merged into {f.listed([TITLES[p] for p in by_verdict[verdict]])}, `{row.name}` {_what(row, verdict, by_verdict[verdict])}")
    old = [path for row in rows for each in row.evaluations for path in each.old]
    if old:
        said.append(f"evaluated before its cell was run again, and left out: {f.listed([str(path) for path in old[:3]])}"
                    f"{f' and {len(old) - 3} more' if len(old) > 3 else ''}; run pipeline.evaluate anew")
    return said


def _what(row: Row, verdict: str, precisions: Sequence[str]) -> str:
    if verdict == "too_much":
        return "changed too much: by more than the adapter and the rounding of its base explain; serve the adapter beside its base, or merge into more bits"
    left = f.listed([f"{max(0.0, getattr(row, f'merged_{p}_left')):.0%}" for p in precisions])
    return f"is rounded away ({left} of the adapter's change is left); serve it beside its base, or merge into more bits"


def suites(rows: Sequence[Row]) -> tuple[list[str], list[tuple[Row, list[tuple[str, str]]]]]:
    """(heads, a line a row that was asked any: (value, and below it the change against the base) under each head) of lm-evaluation-harness's tasks."""
    asked = [(row, _over_seeds(row)) for row in rows]
    heads = sorted({task for _, found in asked for task in found})
    metrics = {task: _shown([found[task] for _, found in asked if task in found]) for task in heads}
    lines = [(row, [_texts(found.get(task, {}).get(metrics[task])) for task in heads]) for row, found in asked if found]
    return [f"{task}, {metrics[task]}" for task in heads], lines


def _shown(each: Sequence[dict[str, Measured]]) -> str:
    names = set().union(*each)
    return next((name for name in FIRST if name in names), min(names))


def _over_seeds(row: Row) -> dict[str, dict[str, Measured]]:
    """{task: {metric: means over the row's cells that were asked it}}."""
    every: dict[str, dict[str, list[Measured]]] = {}
    for each in row.evaluations:
        for task, metrics in (each.suites or {}).items():
            for name, one in metrics.items():
                every.setdefault(task, {}).setdefault(name, []).append(one)
    return {task: {name: Measured(*(_mean([getattr(one, key) for one in ones]) for key in ("value", "stderr", "base", "change")))  # type: ignore[arg-type]
                   for name, ones in metrics.items()} for task, metrics in every.items()}


def _mean(each: Sequence[float | None]) -> float | None:
    known = [value for value in each if value is not None]
    return statistics.fmean(known) if known else None


def _texts(one: Measured | None) -> tuple[str, str]:
    if one is None:
        return f.DASH, ""
    error = "" if one.stderr is None else f" ± {_number(one.stderr)}"
    against = "" if one.change is None or one.base is None else f"{'+' if one.change > 0 else ''}{_number(one.change)} (base {_number(one.base)})"
    return f"{_number(one.value)}{error}", against


def _number(value: float) -> str:
    """A share or a perplexity, three digits behind the point or four in all."""
    return (f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}").replace("-", f.MINUS)
