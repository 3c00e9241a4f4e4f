"""What differs between two result sets, as text, Markdown or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

from pipeline.reporting import words as f
from pipeline.reporting.drift import Change, Cost, Drift, Move

SHOWN_CONFIG = 30


def headline(found: Drift) -> str:
    """One sentence."""
    moved = [m.name for m in found.techniques if m.moved]
    alone = [m.name for m in found.cells if m.moved]
    compared = len(found.cells)
    if compared and found.identical == compared:
        return f"All {compared} shared cells of {found.experiment} gave the same answers."
    if not compared:
        return f"No shared cell of {found.experiment} has predictions on both sides, so no accuracy can be compared."
    if not moved and not alone:
        return f"No technique of {found.experiment} moved by more than seed noise ({compared} cells, {found.identical} with the same answers)."
    said = [f"{len(moved)} of {len(found.techniques)} techniques ({', '.join(moved)})"] if moved else []
    said += [f"{len(alone)} of {compared} cells ({', '.join(alone)})"] if alone else []
    return f"Moved by more than seed noise in {found.experiment}: {' and '.join(said)}."


def markdown(found: Drift) -> str:
    """Headline, what differs, what moved, as Markdown."""
    parts = [f"# {found.experiment}: A against B", headline(found), *_caveats(found)]
    if found.changes:
        parts += ["## What is not the same", _table(["what", "A", "B", "cells"], [_changed(c, found.shared) for c in _shown(found.changes)])]
    else:
        parts.append("Data, model, versions, hardware, code and settings are the same.")
    if found.techniques:
        parts += ["## Test accuracy, %", _table(["technique", "A", "B", "B − A (95%)", "p", "answers that differ", ""], [_moved(m) for m in found.techniques])]
    if alone := [m for m in found.cells if m.moved]:
        parts += ["## Cells that moved", _table(["cell", "A", "B", "B − A (95%)", "p", "answers that differ", ""], [_moved(m) for m in alone])]
    if found.costs:
        parts += ["## Costs that moved", _table(["technique", "figure", "A", "B", "B / A"], [_cost(c) for c in found.costs])]
    return "\n\n".join(parts) + "\n"


def text(found: Drift) -> str:
    """The same for a terminal."""
    return markdown(found).replace("## ", "").replace("# ", "", 1)


def as_json(found: Drift) -> str:
    """Everything, with the headline and whether anything moved."""
    return json.dumps({"headline": headline(found), "moved": found.moved, **dataclasses.asdict(found)}, indent=1, default=str) + "\n"


FORMATS: dict[str, Callable[[Drift], str]] = {"text": text, "markdown": markdown, "json": as_json}


def _caveats(found: Drift) -> list[str]:
    said = []
    for side, other in (("A", "B"), ("B", "A")):
        if found.only[side]:
            said.append(f"In {side} alone: {', '.join(found.only[side])}.")
        if gone := [c for c in found.lost[side] if c not in found.lost[other]]:
            said.append(f"Out of memory in {side} alone: {', '.join(gone)}.")
    if any(c.kind == "data" for c in found.changes):
        said.append("The data are not the same: rows are matched by their ids alone, and a move may be the data's.")
    if found.techniques and not found.covers_seeds:
        said.append("No technique has two seeds, so nothing is known of how much a seed matters: p is over test rows alone (McNemar's test) and calls more a "
                    "move than there is.")
    if found.uncosted:
        said.append(f"{found.uncosted[0].upper()}{found.uncosted[1:]}.")
    return said


def _shown(changes: Sequence[Change]) -> list[Change]:
    """Settings last, and not more of them than one reads."""
    settings = [c for c in changes if c.kind == "config"]
    return [*(c for c in changes if c.kind != "config"), *settings[:SHOWN_CONFIG]]


def _changed(change: Change, shared: int) -> list[str]:
    number = "all" if change.cells == shared else f"{change.cells} of {shared}"
    return [f"{change.kind}: {change.what}", _short(change.before), _short(change.after), number]


def _short(value: object) -> str:
    said = "—" if value is None else str(value)
    return said if len(said) <= 40 else f"{said[:37]}…"


def _moved(move: Move) -> list[str]:
    apart = f"{100 * (move.after - move.before):+.1f} ({100 * move.low:+.1f} to {100 * move.high:+.1f})"
    return [move.name, f.percent(move.before), f.percent(move.after), apart, f"{move.corrected:.3f}", f"{move.flips:,}", "moved" if move.moved else ""]


def _cost(cost: Cost) -> list[str]:
    ratio = "—" if not cost.before else f"{cost.after / cost.before:.2f}"
    return [cost.name, cost.figure, f"{cost.before:,.4g}", f"{cost.after:,.4g}", ratio]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(r[i]) for r in (heads, *rows)) for i in range(len(heads))]
    lines = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in (heads, ["-" * w for w in widths], *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
