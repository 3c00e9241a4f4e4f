"""The report's charts as inline SVG: intervals of all techniques, quality against a cost with its Pareto front, quality against rows, training curves.

Library of `python -m pipeline.report`. Drawings are 380 pixels wide, which a phone shows at full size (training curves 300, side by side); colours
are CSS variables (--f1 … --f8 by family), so that they follow light and dark mode. The page's script shows a point's <title> as a tooltip.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.records.finished import Cell
from pipeline.reporting import plot
from pipeline.reporting import words as f
from pipeline.reporting.figures import Row, interval, memory_kind, remarks
from pipeline.reporting.plot import Box, Scale, tag

WIDTH, HEIGHT = 380, 320
FRAME = Box(40, 16, 368, 272)
MOST_NAMES = 24
"""Points whose names a chart has room for; of more, those on the front are named and the others show theirs when pointed at."""
BESIDE, ASIDE = 9.0, 45.0
"""Pixels between points of the same x, and the most that all of them take."""


@dataclass(frozen=True)
class Cost:
    """An x axis: what it shows of a row, its name, how it is written."""

    title: str
    """With its unit after a comma."""
    value: Callable[[Row], float | None]
    show: Callable[[float], str]
    clean: Callable[[Row], bool] = lambda row: True
    """Whether the figure may stand beside the others."""
    by_kind: bool = False
    """Whether only rows with the usual memory counter may."""
    whole: bool = False
    """Whether it counts from the base on: of what begins at another cell it is a part alone."""

    @property
    def name(self) -> str:
        return self.title.partition(",")[0].lower()

    def words(self, value: float) -> str:
        """The figure as a tooltip says it."""
        unit = self.title.partition(",")[2]
        return f"{self.name} {self.show(value)}{unit}"


def costs(rows: Sequence[Row]) -> list[Cost]:
    """The costs that quality is drawn against; memory in GiB, or MiB where all peaks are small."""
    unit, name = (2**30, "GiB") if max((r.peak_bytes or 0 for r in rows), default=0) >= 2**30 else (2**20, "MiB")
    return [
        Cost("Training time, s", lambda r: r.train_s, f.seconds, lambda r: not r.timing, whole=True),
        Cost(f"Peak memory, {name}", lambda r: None if r.peak_bytes is None else r.peak_bytes / unit, lambda v: f"{v:.3g}",
             lambda r: r.timing != "packed", by_kind=True),
        Cost("Trainable parameters", lambda r: r.trainable, f.count, whole=True),
    ]


@dataclass(frozen=True)
class Chart:
    """A drawing with its heading and the names of the rows that it cannot show, each with the reason."""

    title: str
    svg: Markup
    left_out: list[str]


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """The CSS class of every family."""
    families = dict.fromkeys(r.family for r in sorted(rows, key=lambda r: r.family) if not r.teacher)
    return {family: f"f{1 + i % 10}" for i, family in enumerate(families)} | {r.family: "f0" for r in rows if r.teacher}


def tip(row: Row, *lines: str) -> Markup:
    bounds = f" [{interval(row)}]" if interval(row) else ""
    return tag("title", "\n".join([row.name, f"test {f.percent(row.test)}%{bounds}", *lines, *remarks(row)]))


def forest(rows: Sequence[Row], colour: dict[str, str]) -> Markup:
    """One line a technique: test figure and 95% interval; the band is the best one's interval, small marks are seeds."""
    shown = [r for r in rows if r.test is not None]
    left = min(150.0, 14 + max(plot.text_width(r.technique) for r in shown))
    height = 30 + 28 * len(shown)
    axis = plot.scale([v for r in shown for v in bounds(r)], left, WIDTH - 46.0, room=0.03)
    best = next((r for r in shown if not r.teacher), shown[0])
    low, high = bounds(best)
    parts = [tag("rect", class_="band", x=axis(low), y=4, width=axis(high) - axis(low), height=height - 26)] if high > low else []
    for at in axis.ticks():
        parts.append(tag("line", class_="grid", x1=axis(at), x2=axis(at), y1=4, y2=height - 22))
        parts.append(tag("text", f"{100 * at:g}", class_="tick", x=axis(at), y=height - 7, text_anchor="middle"))
    for i, row in enumerate(shown):
        parts += _forest_line(row, 20 + 28 * i, left, axis, colour[row.family])
    return plot.svg(WIDTH, height, parts, "Test result and 95% interval of every technique")


def _forest_line(row: Row, y: int, left: float, axis: Scale, colour: str) -> list[Markup]:
    assert row.test is not None
    low, high = bounds(row)
    seeds = [c.result.test.accuracy for c in row.cells if c.result.test] if row.seeds > 1 and interval(row) else []
    name = plot.shorten(row.technique, left - 10)
    return [
        tag("text", name, class_="name", x=left - 10, y=y + 4, text_anchor="end"),
        tag("line", class_=f"whisker {colour}", x1=axis(low), x2=axis(high), y1=y, y2=y) if high > low else Markup(""),
        *(tag("line", class_=f"seed {colour}", x1=axis(s), x2=axis(s), y1=y - 6, y2=y + 6) for s in seeds),
        point(axis(row.test), float(y), colour, row.teacher, tip(row), row.name),
        tag("text", f.percent(row.test), class_="value", x=WIDTH - 4, y=y + 4, text_anchor="end"),
    ]


def bounds(row: Row) -> tuple[float, float]:
    """Low and high end of a row's interval; the figure itself where it has none."""
    if row.metric_low is not None and row.metric_high is not None:
        return row.metric_low, row.metric_high
    return row.test or 0.0, row.test or 0.0


def point(x: float, y: float, colour: str, hollow: bool, title: Markup, name: str) -> Markup:
    """A dot that leads to the cells of the row of this name."""
    return plot.dot(x, y, f"{colour}{' hollow' if hollow else ''}", title, f"#{f.anchor(name)}")


def scatter(rows: Sequence[Row], cost: Cost, colour: dict[str, str]) -> Chart | None:
    """Quality against one cost; None where fewer than two techniques have both. Filled points are on the Pareto front."""
    shown, left_out = _drawable(rows, cost)
    if len(shown) < 2:
        return None
    values = [cost.value(r) or 0.0 for r in shown]
    inset = 14.0 if min(values) == 0 else 0.0  # room for whiskers beside the y axis
    x = plot.scale(values, FRAME.left + inset, FRAME.right - 6, log=True, floor=None if min(values) > 0.7 * max(values) else 0.0)
    y = plot.scale([v for r in shown for v in bounds(r)], FRAME.bottom, FRAME.top, room=0.08)
    at = _apart([(x(v), y(r.test or 0.0)) for v, r in zip(values, shown, strict=True)])
    front = pareto([(v, r.test or 0.0) for v, r in zip(values, shown, strict=True)])
    stairs = _stairs([at[i] for i in front])
    parts = [*_axes(x, y, cost), tag("path", class_="front", d=plot.path(stairs))]
    parts += [tag("line", class_=f"whisker {colour[r.family]}", x1=px, x2=px, y1=y(bounds(r)[0]), y2=y(bounds(r)[1]))
              for r, (px, _) in zip(shown, at, strict=True)]
    whiskers = [Box(px - 1.5, y(bounds(r)[1]), px + 1.5, y(bounds(r)[0])) for r, (px, _) in zip(shown, at, strict=True)]
    lines = [Box(min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1) for (a, b), (c, d) in itertools.pairwise(stairs)]
    parts += names([(*at[i], shown[i].technique) for i in (range(len(shown)) if len(shown) <= MOST_NAMES else front)], at, whiskers, lines)
    for i, (row, (px, py)) in enumerate(zip(shown, at, strict=True)):
        parts.append(point(px, py, colour[row.family], i not in front, tip(row, cost.words(values[i])), row.name))
    return Chart(f"Against {cost.name}", plot.svg(WIDTH, HEIGHT, parts, f"Test result against {cost.title}"), left_out)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, value) points that no other point beats: none costs at most as much and is worth at least
    as much, one of the two strictly. Sorted by cost."""
    front = [
        i for i, (cost, value) in enumerate(points)
        if not any(c <= cost and v >= value and (c < cost or v > value) for c, v in points)
    ]
    return sorted(front, key=lambda i: points[i])


def _drawable(rows: Sequence[Row], cost: Cost) -> tuple[list[Row], list[str]]:
    shown: list[Row] = []
    left_out: dict[str, list[str]] = {}
    kinds = [memory_kind(r) for r in rows if r.peak_bytes is not None]
    usual = max(sorted(set(kinds)), key=kinds.count) if kinds else ""
    for row in rows:
        if row.teacher:
            continue
        if row.test is None:
            why = {"oom": "out of memory", "diverged": "diverged"}.get(row.status, "no result")
        elif cost.value(row) is None:
            why = "not measured"
        elif cost.whole and row.begins:
            why = "begins at another cell"
        elif not cost.clean(row):
            why = row.timing
        elif cost.by_kind and memory_kind(row) != usual:
            why = f"another counter: {memory_kind(row)}"
        else:
            shown.append(row)
            continue
        left_out.setdefault(why, []).append(row.technique)
    return shown, [f"{', '.join(names)} ({why})" for why, names in left_out.items()]


def _apart(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of the same x moved sideways by a few pixels, so that their whiskers stand side by side."""
    moved = list(points)
    groups: dict[int, list[int]] = {}
    for index, (x, _) in enumerate(points):
        groups.setdefault(round(x / 4), []).append(index)
    for group in groups.values():
        for rank, index in enumerate(sorted(group, key=lambda i: points[i][1])):
            moved[index] = (points[index][0] + min(BESIDE, ASIDE / len(group)) * (rank - (len(group) - 1) / 2), points[index][1])
    return moved


def _stairs(front: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front as what is to be had at each cost: level until the next point, then up to it; on to the right edge."""
    corners = [front[0]]
    for x, y in front[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    return [*corners, (FRAME.right, corners[-1][1])]


def _axes(x: Scale, y: Scale, cost: Cost) -> list[Markup]:
    bottom, parts = FRAME.bottom, [plot.base_line(FRAME), *plot.percent_ticks(y, FRAME)]
    if x.zero is not None:
        parts += plot.tick(x.zero, "0", FRAME, marked=False)
        parts.append(tag("rect", class_="gap", x=x.start - 8, y=bottom - 3, width=6, height=6))
        parts += [tag("line", class_="axis", x1=x.start - d - 2, x2=x.start - d + 2, y1=bottom + 4, y2=bottom - 4) for d in (8, 2)]
    parts += [part for at in x.ticks() for part in plot.tick(x(at), cost.show(at), FRAME)]
    return [*parts, plot.axis_title(f"{cost.title}{' (log scale)' if x.log else ''}", FRAME, 38)]


def names(named: Sequence[tuple[float, float, str]], dots: Sequence[tuple[float, float]], *obstacles: Sequence[Box]) -> list[Markup]:
    """The names of points (x, y, name) beside them, clear of all dots and, from the first to the last, of obstacles; a line to a point that is far."""
    around = [Box(px - 6, py - 6, px + 6, py + 6) for px, py in dots]
    placed = plot.place_labels(named, [around, *obstacles], Box(FRAME.left + 2, FRAME.top - 10, WIDTH - 2.0, FRAME.bottom - 2))
    parts = []
    for (px, py, name), label in zip(named, placed, strict=True):
        if label and label.far:
            parts.append(tag("line", class_="leader", x1=px, y1=py, x2=min(max(px, label.x), label.x + label.width), y2=label.y))
        if label:
            parts.append(tag("text", name, class_="name", x=label.x + label.width / 2, y=label.y + 4, text_anchor="middle"))
    return parts


def by_rows(rows: Sequence[Row], colour: dict[str, str]) -> Markup | None:
    """Quality against the number of training rows, a line a technique; None where there is one number."""
    shown = [r for r in rows if r.test is not None and not r.teacher]
    if len({r.train_rows for r in shown}) < 2:
        return None
    cost = Cost("Training rows", lambda r: r.train_rows, f.count)
    margin = min(150.0, max(plot.text_width(r.technique) for r in shown) + 16)
    x = plot.scale([float(r.train_rows) for r in shown], FRAME.left + 6, FRAME.right - margin, log=True, floor=0.0)
    y = plot.scale([r.test or 0.0 for r in shown], FRAME.bottom, FRAME.top, room=0.08)
    parts, ends = _axes(x, y, cost), []
    for name in dict.fromkeys(r.technique for r in shown):
        line = sorted((r for r in shown if r.technique == name), key=lambda r: r.train_rows)
        at = [(x(r.train_rows), y(r.test or 0.0)) for r in line]
        parts.append(tag("path", class_=f"line {colour[line[0].family]}", d=plot.path(at)))
        for row, (px, py) in zip(line, at, strict=True):
            parts.append(point(px, py, colour[row.family], False, tip(row, f"{row.labelled_rows} labelled rows"), row.name))
        ends.append((*at[-1], name))
    for (px, py, name), level in zip(ends, plot.stacked([py for _, py, _ in ends], plot.LINE), strict=True):
        parts.append(tag("line", class_="leader", x1=px + 5, y1=py, x2=FRAME.right - margin + 12, y2=level))
        parts.append(tag("text", plot.shorten(name, margin), class_="name", x=FRAME.right - margin + 15, y=level + 4))
    return plot.svg(WIDTH, HEIGHT, parts, "Test result against the number of training rows")


CHECK = "validation_metric"
CURVE = (300, 236)
LEFT, RIGHT = 34.0, 292.0
LOSS = (122.0, 20.0)  # pixels of the lower and the upper end of each part's y axis
CHECKS = (208.0, 154.0)
MOST_POINTS = 150  # of a curve; longer ones are averaged in equal stretches of steps


def training_curves(rows: Sequence[Row], colour: dict[str, str]) -> list[tuple[str, Markup]]:
    """(name, drawing) of every row that trained. Rows with the same objective share the axis of the loss."""
    trained = [r for r in rows if any(_losses(c) for c in r.cells)]
    checks = [v for r in trained for c in r.cells for _, v in _points(c, CHECK)]
    metric = plot.scale(checks, *CHECKS, room=0.12) if checks else None
    panels = []
    for row in trained:
        same = [v for r in trained if r.cells[0].result.objective == row.cells[0].result.objective for c in r.cells for _, v in _losses(c)]
        panels.append((row.name, _curve(row, plot.scale(same, *LOSS, floor=0.0 if min(same) >= 0 else None), metric, colour[row.family])))
    return panels


def _curve(row: Row, loss: Scale, metric: Scale | None, colour: str) -> Markup:
    last = max(step for c in row.cells for step, _ in _losses(c))
    x = Scale(0, last, LEFT, RIGHT)
    parts = _grid(loss, lambda v: f"{v:g}", "loss", LOSS[1])
    for cell in row.cells:
        if line := _losses(cell):
            parts.append(tag("path", class_=f"line {colour}", d=plot.path([(x(step), loss(value)) for step, value in line])))
    if metric:
        parts += _grid(metric, lambda v: f"{100 * v:g}", "validation, %", CHECKS[1])
        for cell in row.cells:
            parts += _dots(cell, row.name, x, metric, colour)
    height = CURVE[1] if metric else CURVE[1] - (CHECKS[0] - LOSS[0])  # no room for checks that there are none of
    for step, anchor in ((0, "start"), (last, "end")):
        parts.append(tag("text", f"{step:,.0f}{' steps' if step else ''}", class_="tick", x=x(step), y=height - 8, text_anchor=anchor))
    return plot.svg(CURVE[0], height, parts, f"Training curve of {row.name}")


def _grid(y: Scale, show: Callable[[float], str], caption: str, top: float) -> list[Markup]:
    ticks = y.ticks()
    parts = []
    for at in ticks[:: math.ceil(len(ticks) * 18 / abs(y.end - y.start)) or 1]:
        parts.append(tag("line", class_="grid", x1=LEFT, x2=RIGHT, y1=y(at), y2=y(at)))
        parts.append(tag("text", show(at), class_="tick", x=LEFT - 6, y=y(at) + 4, text_anchor="end"))
    return [*parts, tag("text", caption, class_="tick", x=LEFT, y=top - 8)]


def _dots(cell: Cell, name: str, x: Scale, y: Scale, colour: str) -> list[Markup]:
    line = _points(cell, CHECK)
    parts = [tag("path", class_=f"line thin {colour}", d=plot.path([(x(step), y(value)) for step, value in line]))] if line else []
    for step, value in line:
        title = tag("title", f"seed {cell.result.seed}, step {step:,.0f}\nvalidation {f.percent(value)}%")
        parts.append(plot.dot(x(step), y(value), colour, title, f"#{f.anchor(name)}", 3, 9))
    return parts


def _losses(cell: Cell) -> list[tuple[float, float]]:
    points = _points(cell, "loss")
    size = math.ceil(len(points) / MOST_POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(statistics.fmean(s for s, _ in part), statistics.fmean(v for _, v in part)) for part in parts]


def _points(cell: Cell, key: str) -> list[tuple[float, float]]:
    """(step, value) of the curve's points that have a finite one."""
    every = ((point["step"], point.get(key)) for point in cell.result.history)
    return [(step, value) for step, value in every if step is not None and value is not None and math.isfinite(value)]
