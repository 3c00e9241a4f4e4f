"""Training curves as small multiples: the loss over the steps, and below it the validation metric at its checks.

Library of `python -m pipeline.report`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from pipeline.records.finished import Cell
from pipeline.reporting import words as f
from pipeline.reporting.plot import Scale, scale, tag
from pipeline.reporting.rows import Row

WIDTH, HEIGHT = 300, 236
LEFT, RIGHT = 34.0, 292.0
LOSS = (122.0, 20.0)  # pixels of the lower and the upper end of each part's y axis
CHECKS = (208.0, 154.0)
MOST_POINTS = 150  # of a curve; longer ones are averaged in equal stretches of steps


def panels(rows: Sequence[Row], colour: dict[str, str]) -> list[tuple[str, Markup]]:
    """(name, drawing) of every row that trained. Rows with the same objective share the axis of the loss."""
    trained = [r for r in rows if any(_losses(c) for c in r.cells)]
    checks = [v for r in trained for c in r.cells for _, v in _checks(c)]
    metric = scale(checks, *CHECKS, room=0.12) if checks else None
    found = []
    for row in trained:
        same = [v for r in trained if r.cells[0].result.objective == row.cells[0].result.objective for c in r.cells for _, v in _losses(c)]
        found.append((row.name, _panel(row, scale(same, *LOSS, floor=0.0 if min(same) >= 0 else None), metric, colour[row.family])))
    return found


def _panel(row: Row, loss: Scale, metric: Scale | None, colour: str) -> Markup:
    last = max(step for c in row.cells for step, _ in _losses(c))
    x = Scale(0, last, LEFT, RIGHT)
    parts = [*_grid(loss, lambda v: f"{v:g}"), *_caption("loss", LOSS[1])]
    for cell in row.cells:
        if line := _losses(cell):
            d = "M" + " L".join(f"{x(step):.1f},{loss(value):.1f}" for step, value in line)
            parts.append(tag("path", class_=f"line {colour}", d=d))
    if metric:
        parts += [*_grid(metric, lambda v: f"{100 * v:g}"), *_caption("validation, %", CHECKS[1])]
        for cell in row.cells:
            parts += _dots(cell, row.name, x, metric, colour)
    for step, anchor in ((0, "start"), (last, "end")):
        parts.append(tag("text", f"{step:,.0f}{' steps' if step else ''}", class_="tick", x=x(step), y=HEIGHT - 8, text_anchor=anchor))
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"Training curve of {row.name}")


def _grid(y: Scale, show: Callable[[float], str]) -> list[Markup]:
    ticks = y.ticks()
    parts = []
    for at in ticks[:: math.ceil(len(ticks) * 18 / abs(y.end - y.start)) or 1]:
        parts.append(tag("line", class_="grid", x1=LEFT, x2=RIGHT, y1=y(at), y2=y(at)))
        parts.append(tag("text", show(at), class_="tick", x=LEFT - 6, y=y(at) + 4, text_anchor="end"))
    return parts


def _caption(text: str, top: float) -> list[Markup]:
    return [tag("text", text, class_="tick", x=LEFT, y=top - 8)]


def _dots(cell: Cell, name: str, x: Scale, y: Scale, colour: str) -> list[Markup]:
    line = _checks(cell)
    if not line:
        return []
    d = "M" + " L".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
    parts = [tag("path", class_=f"line thin {colour}", d=d)]
    for step, value in line:
        title = tag("title", f"seed {cell.result.seed}, step {step:,.0f}\nvalidation {f.percent(value)}%")
        hit = tag("circle", class_="hit", cx=x(step), cy=y(value), r=9)
        dot = tag("circle", class_=f"dot {colour}", cx=x(step), cy=y(value), r=3)
        parts.append(tag("a", title, hit, dot, class_="point", href=f"#{f.anchor(name)}"))
    return parts


def _losses(cell: Cell) -> list[tuple[float, float]]:
    points = [(p["step"], p["loss"]) for p in cell.result.history if _finite(p.get("loss"))]
    size = math.ceil(len(points) / MOST_POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(math.fsum(s for s, _ in part) / len(part), math.fsum(v for _, v in part) / len(part)) for part in parts]


def _checks(cell: Cell) -> list[tuple[float, float]]:
    return [(p["step"], p["validation_metric"]) for p in cell.result.history if _finite(p.get("validation_metric"))]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
