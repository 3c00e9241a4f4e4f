"""The report's charts as Vega-Lite (vega.py): intervals of all techniques, quality against a cost with its Pareto front, quality against rows, training curves.

Library of `python -m pipeline.report`. Drawings are about 380 pixels wide, which a phone shows at full size; colours are those of the page's style
sheet (--f1 … --f11 by family). The page's script shows a point's description as a tooltip.
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
from pipeline.reporting.figures import OTHER_MEMORY, Row, interval, memory_kind, remarks
from pipeline.reporting.plot import Box, Scale
from pipeline.reporting.vega import COLOUR, Axis, Chart, Dot, Spec, inline, linear

WIDTH = 380
FRAME = Box(0, 0, 320, 250)
MOST_NAMES = 24
"""Points whose names a chart has room for; of more, those on the front are named and the others show theirs when pointed at."""
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
             lambda r: r.timing not in OTHER_MEMORY, by_kind=True),
        Cost("Trainable parameters", lambda r: r.trainable, f.count, whole=True),
    ]


@dataclass(frozen=True)
class Drawn:
    """A drawing with its heading and the names of the rows that it cannot show, each with the reason."""

    title: str
    spec: Spec
    left_out: list[str]
    front_alone: bool = False
    """Whether only dots on the front are named."""

    @property
    def svg(self) -> Markup:
        return inline(self.spec)


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """The CSS class of every family."""
    families = dict.fromkeys(r.family for r in sorted(rows, key=lambda r: r.family) if not r.teacher)
    return {family: f"f{1 + i % 11}" for i, family in enumerate(families)} | {r.family: "f0" for r in rows if r.teacher}


def tip(row: Row, *lines: str) -> str:
    """What a point says when it is pointed at."""
    bounds = f" [{interval(row)}]" if interval(row) else ""
    return " | ".join([row.name, f"test {f.percent(row.test)}%{bounds}", *lines, *remarks(row)])


def link(row: Row) -> str:
    """Where a point leads: the cells of its row."""
    return f"#{f.anchor(row.name)}"


def forest(rows: Sequence[Row], colour: dict[str, str]) -> Spec:
    """One line a technique: test figure and 95% interval, the highest first; the band is the highest one's interval, small marks are seeds."""
    shown = [r for r in rows if r.test is not None]
    low, high = bounds(next((r for r in shown if not r.teacher), shown[0]))
    axis = plot.scale([v for r in shown for v in bounds(r)], 0, WIDTH - 150.0, room=0.05)
    names = [r.technique for r in shown]
    scale = {"domain": [axis.low, axis.high], "nice": False, "zero": False}
    x = {"field": "x", "type": "quantitative", "scale": scale, "axis": {"title": None, "values": axis.ticks(), "labelExpr": "format(100 * datum.value, '~g')"}}
    y = {"field": "name", "type": "nominal", "sort": names, "axis": {"title": None, "labelFontSize": 12, "labelColor": COLOUR["ink"], "labelLimit": 150,
                                                                     "grid": False}}
    lines = [{"name": r.technique, "x": r.test, "low": bounds(r)[0], "high": bounds(r)[1], "c": COLOUR[colour[r.family]], "tip": tip(r), "href": link(r),
              "fill": COLOUR["page" if r.teacher else colour[r.family]], "value": f.percent(r.test)} for r in shown]
    seeds = [{"name": r.technique, "x": value, "c": COLOUR[colour[r.family]]} for r in shown if r.seeds > 1 for value in _by_seed(r)]
    plain = {"scale": None}
    layers: list[Spec] = [
        {"data": {"values": [{"low": low, "high": high}]}, "mark": {"type": "rect", "color": COLOUR["band"], "aria": False},
         "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}}},
        {"data": {"values": lines}, "mark": {"type": "rule", "strokeWidth": 1.8, "opacity": 0.6, "aria": False},
         "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y, "color": {"field": "c", **plain}}},
        {"data": {"values": seeds}, "mark": {"type": "tick", "thickness": 1.4, "size": 12, "aria": False},
         "encoding": {"x": x, "y": y, "color": {"field": "c", **plain}}},
        {"data": {"values": lines}, "mark": {"type": "point", "size": 66, "strokeWidth": 1.8, "opacity": 1},
         "encoding": {"x": x, "y": y, "stroke": {"field": "c", **plain}, "fill": {"field": "fill", **plain}, "description": {"field": "tip"},
                      "href": {"field": "href"}}},
        {"data": {"values": lines}, "mark": {"type": "text", "align": "right", "fontSize": 12, "fontWeight": 600, "aria": False},
         "encoding": {"x": {"value": WIDTH - 112}, "y": y, "text": {"field": "value"}}},
    ]
    return {"description": "Test result and 95% interval of every technique", "width": WIDTH - 150, "height": {"step": 27},
            "layer": [one for one in layers if one["data"]["values"]]}


def _by_seed(row: Row) -> list[float]:
    return [value for c in row.cells if c.result.test and (value := getattr(c.result.test, row.metric)) is not None]


def bounds(row: Row) -> tuple[float, float]:
    """Low and high end of a row's interval; the figure itself where it has none."""
    if row.metric_low is not None and row.metric_high is not None:
        return row.metric_low, row.metric_high
    return row.test or 0.0, row.test or 0.0


def scatter(rows: Sequence[Row], cost: Cost, colour: dict[str, str]) -> Drawn | None:
    """Quality against one cost; None where fewer than two techniques have both. Filled points are on the Pareto front."""
    shown, left_out = _drawable(rows, cost)
    if len(shown) < 2:
        return None
    values = [cost.value(r) or 0.0 for r in shown]
    tests = [r.test or 0.0 for r in shown]
    x = plot.scale(values, FRAME.left, FRAME.right, log=True, floor=None if min(values) > 0.7 * max(values) else 0.0)
    y = plot.scale([v for r in shown for v in bounds(r)], FRAME.bottom, FRAME.top, room=0.08)
    chart = Chart(FRAME.right - FRAME.left, FRAME.bottom - FRAME.top, _across(cost, x), linear("", y, percent), f"Test result against {cost.title}")
    front = pareto(list(zip(values, tests, strict=True)))
    stairs = [(values[i], tests[i]) for i in front] + [(x.high, tests[front[-1]])]
    chart.line(stairs, "faint", step=True)
    chart.bars([(v, *bounds(r), colour[r.family]) for v, r in zip(values, shown, strict=True)])
    name_dots(chart, [(value, test, r.technique) for value, test, r in zip(values, tests, shown, strict=True)], front, stairs)
    chart.dots([Dot(v, r.test or 0.0, colour[r.family], tip(r, cost.words(v)), link(r), i not in front)
                for i, (v, r) in enumerate(zip(values, shown, strict=True))])
    return Drawn(f"Against {cost.name}", chart.spec(), left_out, len(shown) > MOST_NAMES)


def _across(cost: Cost, x: Scale) -> Axis:
    ticks = x.ticks()
    zero = {0.0: "0"} if x.zero is not None else {}
    return Axis(f"{cost.title}{' (log scale)' if x.log else ''}", x, zero | {at: cost.show(at) for at in ticks}, grid=False)


def percent(value: float) -> str:
    return f"{100 * value:g}"


def name_dots(chart: Chart, dots: Sequence[tuple[float, float, str]], front: Sequence[int], stairs: Sequence[tuple[float, float]] = ()) -> None:
    """Write the names of dots (x, y, name) beside them, of many those on the front alone: clear of all dots, of each other and of stairs, if there is room.
    A name that stands away from its dot gets a thin line to it."""
    def pixel(point: tuple[float, float]) -> tuple[float, float]:
        return across(point[0], chart.x), chart.height * (chart.y.scale.high - point[1]) / (chart.y.scale.high - chart.y.scale.low)

    def value(px: float, py: float) -> tuple[float, float]:
        return back(px, chart.x), chart.y.scale.high - py / chart.height * (chart.y.scale.high - chart.y.scale.low)

    points = [pixel((x, y)) for x, y, _ in dots]
    around = [Box(px - 6, py - 6, px + 6, py + 6) for px, py in points]
    lines = [Box(px - 2, py - 30, px + 2, py + 30) for px, py in points]
    level = [Box(one[0], one[1] - 2, other[0], one[1] + 2) for one, other in itertools.pairwise(map(pixel, stairs))]
    named = range(len(dots)) if len(dots) <= MOST_NAMES else front
    labels = plot.place_labels([(*points[i], dots[i][2]) for i in named], [around, lines, level], Box(0, -8, chart.width + 10, chart.height - 2))
    shown = [(i, one) for i, one in zip(named, labels, strict=True) if one]
    chart.leaders([(dots[i][:2], value(*end)) for i, one in shown if (end := plot.leader(points[i], one))])
    chart.names([(*value(one.x + one.width / 2, one.y), dots[i][2], "ink") for i, one in shown])


def across(value: float, axis: Axis, width: float = FRAME.right - FRAME.left) -> float:
    """The pixel of a value on an x axis, as Vega-Lite draws it."""
    scale, move = axis.scale, _moved(axis)
    low = move(0.0 if scale.log and scale.zero is not None else scale.low)
    return width * (move(value) - low) / (move(scale.high) - low)


def back(pixel: float, axis: Axis) -> float:
    """The value at a pixel, by halving."""
    low, high = (0.0 if axis.scale.log and axis.scale.zero is not None else axis.scale.low), axis.scale.high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if across(middle, axis) < pixel else (low, middle)
    return low


def _moved(axis: Axis) -> Callable[[float], float]:
    if not axis.scale.log:
        return float
    constant = axis.scale.low / 2
    return math.log if axis.scale.zero is None else (lambda v: math.log1p(v / constant))


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


def by_rows(rows: Sequence[Row], colour: dict[str, str]) -> Spec | None:
    """Quality against the number of training rows, a line a technique; None where there is one number."""
    shown = [r for r in rows if r.test is not None and not r.teacher]
    if len({r.train_rows for r in shown}) < 2:
        return None
    cost = Cost("Training rows", lambda r: r.train_rows, f.count)
    x = plot.scale([float(r.train_rows) for r in shown], FRAME.left, FRAME.right, log=True, floor=0.0)
    y = plot.scale([r.test or 0.0 for r in shown], FRAME.bottom, FRAME.top, room=0.08)
    width = FRAME.right - FRAME.left - 90
    chart = Chart(width, FRAME.bottom - FRAME.top, _across(cost, x), linear("", y, percent), "Test result against the number of training rows")
    ends = []
    for name in dict.fromkeys(r.technique for r in shown):
        line = sorted((r for r in shown if r.technique == name), key=lambda r: r.train_rows)
        chart.line([(r.train_rows, r.test or 0.0) for r in line], colour[line[0].family])
        chart.dots([Dot(r.train_rows, r.test or 0.0, colour[r.family], tip(r, f"{r.labelled_rows} labelled rows"), link(r)) for r in line])
        ends.append((float(line[-1].train_rows), line[-1].test or 0.0, name, "ink"))
    beside(chart, ends)
    return chart.spec()


def beside(chart: Chart, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the right ends (x, y, name, colour) of lines, apart from each other."""
    scale = chart.y.scale
    gap = (scale.high - scale.low) * plot.LINE / chart.height
    levels = plot.stacked([y for _, y, _, _ in ends], gap)
    data = [{"y": level, "text": name, "c": COLOUR[colour]} for level, (_, _, name, colour) in zip(levels, ends, strict=True)]
    mark = {"type": "text", "align": "left", "baseline": "middle", "fontSize": 11.5, "aria": False, "limit": 150}
    chart.layers.append({"data": {"values": data}, "mark": mark,
                         "encoding": {"x": {"value": chart.width + 8}, "y": chart.y.encoding("y"), "text": {"field": "text"},
                                      "color": {"field": "c", "scale": None}}})


CHECK = "validation_metric"
CURVE = (236.0, 100.0)
MOST_POINTS = 150  # of a curve; longer ones are averaged in equal stretches of steps


def training_curves(rows: Sequence[Row], colour: dict[str, str]) -> list[tuple[str, Spec]]:
    """(name, drawing) of every row that trained: the loss, a line a seed, and below it the checks on validation rows. Rows with the same objective share
    the axis of the loss."""
    trained = [r for r in rows if any(_losses(c) for c in r.cells)]
    checks = [v for r in trained for c in r.cells for _, v in _points(c, CHECK)]
    panels = []
    for row in trained:
        same = [v for r in trained if r.cells[0].result.objective == row.cells[0].result.objective for c in r.cells for _, v in _losses(c)]
        last = max(step for c in row.cells for step, _ in _losses(c))
        x = Axis("", Scale(0, last, 0, CURVE[0]), {0.0: "0", float(last): f"{last:,.0f} steps"}, grid=False)
        loss = Chart(*CURVE, x, linear("loss", plot.scale(same, 0, CURVE[1], floor=0.0 if min(same) >= 0 else None), lambda v: f"{v:g}", 3), "")
        for cell in row.cells:
            loss.line(_losses(cell), colour[row.family])
        parts = [loss.spec()]
        if checks:
            y = linear("validation, %", plot.scale(checks, 0, CURVE[1] / 2, room=0.12), percent, 3)
            below = Chart(CURVE[0], CURVE[1] / 2, x, y, "")
            for cell in row.cells:
                below.line(_points(cell, CHECK), colour[row.family], thin=True)
                below.dots([Dot(step, value, colour[row.family], f"seed {cell.result.seed}, step {step:,.0f} | validation {f.percent(value)}%", link(row))
                            for step, value in _points(cell, CHECK)], size=26)
            parts += [below.spec()] if below.layers else []
        panels.append((row.name, {"description": f"Training curve of {row.name}", "vconcat": parts, "spacing": 14}))
    return panels


def _losses(cell: Cell) -> list[tuple[float, float]]:
    points = _points(cell, "loss")
    size = math.ceil(len(points) / MOST_POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(statistics.fmean(s for s, _ in part), statistics.fmean(v for _, v in part)) for part in parts]


def _points(cell: Cell, key: str) -> list[tuple[float, float]]:
    """(step, value) of the curve's points that have a finite one."""
    every = ((point["step"], point.get(key)) for point in cell.result.history)
    return [(step, value) for step, value in every if step is not None and value is not None and math.isfinite(value)]
