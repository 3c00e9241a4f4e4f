"""The chart of the learning curves: accuracy against labelled rows, a line and a band a technique, points at the sizes measured.

Library of `python -m pipeline.report`. Drawn twice, for a wide page and for a phone; the page shows the one that fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from pipeline.reporting import words as f
from pipeline.reporting.growth import Growth, Line
from pipeline.reporting.plot import LINE, Box, Scale, shorten, stacked, tag, text_width

WIDE, NARROW = (760, 430), (380, 360)
DASHES = (None, "7 4", "2 4", "9 3 2 3")
"""Techniques of a family share a colour and differ in the dashes."""
STEPS = 60
TICK = 34.0  # pixels that a number below the axis needs


def charts(grown: Growth, colour: dict[str, str]) -> list[tuple[str, Markup]]:
    """(CSS class, drawing): one for a wide page, one for a phone."""
    return [("wide", _chart(grown, colour, *WIDE)), ("narrow", _chart(grown, colour, *NARROW))]


def _chart(grown: Growth, colour: dict[str, str], width: int, height: int) -> Markup:
    margin = min(0.29 * width, 14 + max(text_width(one.name) for one in grown.lines))
    frame = Box(40, 14, width - margin - 8, height - 48)
    x = Scale(grown.smallest, grown.largest, frame.left + 10, frame.right, log=True)
    y = _levels(grown, frame)
    parts = [*_axes(grown, x, y, frame), *_target(grown, y, frame)]
    dashes = _dashes(grown.lines)
    parts += [_band(one, x, y, colour[one.family]) for one in reversed(grown.lines)]
    parts += [_line(one, x, y, colour[one.family], dashes[one.name]) for one in reversed(grown.lines)]
    parts += [part for one in reversed(grown.lines) for part in _points(one, x, y, colour[one.family])]
    parts += _names(grown.lines, x, y, colour, dashes, width - margin)
    about = f"Test {grown.metric} against labelled rows, a curve for each of {len(grown.lines)} techniques"
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=about)


def _levels(grown: Growth, frame: Box) -> Scale:
    values = [v for one in grown.lines for n in _grid(one, grown) for v in (one.curve.at(n).low, one.curve.at(n).high)]
    values += [c.accuracy for one in grown.lines for cells in one.cells.values() for c in cells]
    low, high = max(0.0, min(values)), min(1.0, max(values))
    room = 0.03 * (high - low) or 0.02
    return Scale(max(0.0, low - room), min(1.0, high + room), frame.bottom, frame.top)


def _grid(one: Line, grown: Growth, steps: int = 9) -> list[float]:
    sizes = (grown.smallest, grown.largest) if one.curve.kind == "constant" else (one.curve.sizes[0], one.curve.sizes[-1])
    return [sizes[0] * (sizes[1] / sizes[0]) ** (i / (steps - 1)) for i in range(steps)]


def _axes(grown: Growth, x: Scale, y: Scale, frame: Box) -> list[Markup]:
    parts = []
    for at in y.ticks(6):
        parts.append(tag("line", class_="grid", x1=frame.left, x2=frame.right, y1=y(at), y2=y(at)))
        parts.append(tag("text", f"{100 * at:g}", class_="tick", x=frame.left - 7, y=y(at) + 4, text_anchor="end"))
    parts.append(tag("line", class_="axis", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom))
    sizes = sorted({n for one in grown.lines if one.curve.kind == "power" for n in one.curve.sizes})
    for n in _apart(sizes, x):
        parts.append(tag("line", class_="axis", x1=x(n), x2=x(n), y1=frame.bottom, y2=frame.bottom + 4))
        parts.append(tag("text", f.count(n), class_="tick", x=x(n), y=frame.bottom + 17, text_anchor="middle"))
    title = "Labelled rows, training and validation (log scale)"
    return [*parts, tag("text", title, class_="title", x=(frame.left + frame.right) / 2, y=frame.bottom + 37, text_anchor="middle")]


def _apart(sizes: Sequence[int], x: Scale) -> list[int]:
    """The sizes whose numbers do not touch, the largest always."""
    kept: list[int] = []
    for n in reversed(sizes):
        if not kept or x(kept[-1]) - x(n) >= TICK:
            kept.append(n)
    return kept


def _target(grown: Growth, y: Scale, frame: Box) -> list[Markup]:
    if not y.low < grown.target < y.high:
        return []
    level = y(grown.target)
    return [
        tag("line", class_="target", x1=frame.left, x2=frame.right, y1=level, y2=level),
        tag("text", f"{f.percent(grown.target)}%", class_="tick", x=frame.left + 4, y=level - 4),
    ]


def _dashes(lines: Sequence[Line]) -> dict[str, str | None]:
    seen: dict[str, int] = {}
    found = {}
    for one in lines:
        found[one.name] = DASHES[seen.get(one.family, 0) % len(DASHES)]
        seen[one.family] = seen.get(one.family, 0) + 1
    return found


def _ends(one: Line, x: Scale) -> tuple[float, float]:
    return (x.low, x.high) if one.curve.kind == "constant" else (one.curve.sizes[0], one.curve.sizes[-1])


def _along(one: Line, x: Scale) -> list[float]:
    low, high = _ends(one, x)
    return [low * (high / low) ** (i / STEPS) for i in range(STEPS + 1)]


def _band(one: Line, x: Scale, y: Scale, colour: str) -> Markup:
    found = [(x(n), one.curve.at(n)) for n in _along(one, x)[:: 1 if one.curve.kind == "power" else STEPS]]
    edge = [(px, y(e.high)) for px, e in found] + [(px, y(e.low)) for px, e in reversed(found)]
    return tag("path", class_=f"spread {colour}", d=_path(edge) + "Z")


def _line(one: Line, x: Scale, y: Scale, colour: str, dash: str | None) -> Markup:
    at = [(x(n), y(one.curve.value(n))) for n in _along(one, x)]
    return tag("path", class_=f"line {colour}", d=_path(at), stroke_dasharray=dash)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{px:.1f},{py:.1f}" for px, py in points)


def _points(one: Line, x: Scale, y: Scale, colour: str) -> list[Markup]:
    """Seeds as small dots, their mean as one with a tooltip; what is constant has points at the sizes of the others."""
    parts = []
    for n, cells in one.cells.items():
        if not x.low <= n <= x.high:
            continue
        mean = math.fsum(c.accuracy for c in cells) / len(cells)
        same = len({c.accuracy for c in cells}) == 1
        parts += [tag("circle", class_=f"seed-dot {colour}", cx=x(n), cy=y(c.accuracy), r=1.8) for c in cells if not same]
        dot = tag("circle", class_=f"dot {colour}", cx=x(n), cy=y(mean), r=3.5)
        hit = tag("circle", class_="hit", cx=x(n), cy=y(mean), r=11)
        parts.append(tag("a", tag("title", _tip(one, n, mean)), hit, dot, class_="point", href=f"#{f.anchor(one.name)}"))
    return parts


def _tip(one: Line, n: int, mean: float) -> str:
    cells, curve = one.cells[n], one.curve.at(n)
    each = ", ".join(f.percent(c.accuracy) for c in cells)
    return "\n".join([
        one.name, f"{n:,} labelled rows: {f.percent(mean)}%", *([f"seeds {each}"] if len(cells) > 1 else []),
        f"curve {f.percent(curve.value)}% [{f.percent(curve.low)}–{f.percent(curve.high)}]",
    ])


def _names(lines: Sequence[Line], x: Scale, y: Scale, colour: dict[str, str], dashes: dict[str, str | None], left: float) -> list[Markup]:
    """Each technique's name beside the end of its line, a piece of the line before it."""
    ends = [(x(_ends(one, x)[1]), y(one.curve.value(_ends(one, x)[1]))) for one in lines]
    parts = []
    for one, (px, py), level in zip(lines, ends, stacked([py for _, py in ends], LINE), strict=True):
        parts.append(tag("line", class_="leader", x1=px + 5, y1=py, x2=left - 4, y2=level))
        parts.append(tag("text", shorten(one.name, 2 * left), class_=f"name {colour[one.family]}", x=left, y=level + 4))
    return parts
