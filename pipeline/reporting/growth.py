"""Data dependency: every technique's learning curve, the rows that an accuracy takes, and where one technique overtakes another.

Library of `python -m pipeline.report`. A part of the report where some technique has three sizes or more.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.core.files import UserError
from pipeline.records.finished import Cell
from pipeline.reporting import plot
from pipeline.reporting import words as f
from pipeline.reporting.charts import beside, percent
from pipeline.reporting.figures import METRICS, Row, metric_name
from pipeline.reporting.plot import Scale
from pipeline.reporting.rows import zero_shot
from pipeline.reporting.vega import Axis, Chart, Dot, Spec, inline, linear
from pipeline.scoring.answers import by_row
from pipeline.stats.learning_curve import Crossover, Curve, Estimate, Measured, RowsFor, crossover, fit


@dataclass(frozen=True)
class Line:
    """One technique: its curve, and its cells by labelled rows."""

    curve: Curve
    family: str
    kind: str
    cells: dict[int, list[Measured]]
    ends: tuple[int, int]
    """The smallest and the largest number of rows that it is drawn for."""
    first: Estimate
    last: Estimate
    needed: RowsFor

    @property
    def name(self) -> str:
        return self.curve.technique


@dataclass(frozen=True)
class Growth:
    """The learning curves of an experiment, those that end highest first."""

    lines: list[Line]
    smallest: int
    largest: int
    metric: str
    target: float
    about_target: str
    crossovers: list[Crossover]
    without: list[str]
    """Techniques that have too few sizes for a curve."""


def growth(rows: Sequence[Row], target: float | None = None) -> Growth | None:
    """The curves of an experiment; None where no technique that takes rows has three sizes.

    Args:
        target: the accuracy whose required rows are reported; None: half of the way from zero-shot to the end of the best curve.

    Raises:
        UserError: a target that is no fraction.
    """
    if target is not None and not 0 < target < 1:
        raise UserError(f"report.target is {target:g}; it is an accuracy between 0 and 1, such as 0.6")
    shown = [r for r in rows if not r.teacher and r.test is not None]
    constant = {r.technique for r in shown if not r.cells[0].result.takes_rows}  # nothing, or a number of demonstrations
    measured = [m for row in shown for cell in row.cells if (m := _measured(cell))]
    curves = fit(measured, constant)
    if not any(c.kind == "power" for c in curves.values()):
        return None
    sizes = [n for c in curves.values() if c.kind == "power" for n in c.sizes]
    smallest, largest = min(sizes), max(sizes)
    rows_of = {r.technique: r for r in shown}
    untouched = zero_shot([r for r in shown if r.technique in curves])
    base = untouched.technique if untouched else None
    best = max(curves.values(), key=lambda c: c.value(largest))
    start = curves[base].value(smallest) if base else min(c.value(smallest) for c in curves.values())
    chosen = target if target is not None else (start + best.value(largest)) / 2
    lines = [_line(c, rows_of[c.technique], measured, chosen, smallest, largest) for c in curves.values()]
    lines.sort(key=lambda one: -one.last.value)
    return Growth(
        lines, smallest, largest, metric_name(rows), chosen, "" if target is not None else _halfway(base, start, best, largest),
        [crossover(a.curve, b.curve) for a, b in itertools.combinations(lines, 2)],
        [t for t in rows_of if t not in curves],
    )


def _measured(cell: Cell) -> Measured | None:
    result = cell.result
    if result.test is None:
        return None
    right = None if result.metric == "macro_f1" else by_row(cell.predictions(), result.metric)[0]
    value = getattr(result.test, result.metric)
    return Measured(cell.label, result.train_rows + result.validation_rows, result.seed, value, result.test.rows, right or None)


def _line(curve: Curve, row: Row, measured: Sequence[Measured], target: float, smallest: int, largest: int) -> Line:
    cells = {n: [one for one in measured if (one.technique, one.rows) == (curve.technique, n)] for n in curve.sizes}
    ends = (smallest, largest) if curve.kind == "constant" else (curve.sizes[0], curve.sizes[-1])
    return Line(curve, row.family, row.kind, cells, ends, curve.at(ends[0]), curve.at(ends[1]), curve.rows_for(target))


def _halfway(base: str | None, start: float, best: Curve, largest: int) -> str:
    where = f"`{base}` ({f.percent(start)}%)" if base else f"the lowest curve's start ({f.percent(start)}%)"
    return f"half of the way from {where} to where `{best.technique}` ends ({f.percent(best.value(largest))}%)"


def rows_in_words(needed: RowsFor, constant: bool = False) -> str:
    """Rows for an accuracy with their interval: 140 [90–230]; 1,500 [1,100 to over 1,800]; at most 19; not reached."""
    if needed.low is None:
        return "not reached"
    if constant:
        return "at any size" if needed.high is not None else "cannot be told"
    if needed.high == needed.smallest:
        return f"at most {needed.smallest:,}"
    under = needed.low == needed.smallest
    low = f"{'under ' if under else ''}{needed.low:,.0f}"
    interval = f"[{low} to over {needed.largest:,}]" if needed.high is None else f"[{low} to {needed.high:,.0f}]" if under else f"[{low}–{needed.high:,.0f}]"
    return f"{'not reached' if needed.rows is None else f'{needed.rows:,.0f}'} {interval}"


def sentences(grown: Growth) -> list[str]:
    """The crossovers in words: those that the data can tell, who is ahead throughout, what they cannot tell."""
    texts = [
        f"`{name}` overtakes {f.listed([f'`{c.behind}` at n = {c.rows:,.0f} [{c.low:,.0f}–{c.high:,.0f}]' for c in group])} labelled rows."
        for name, group in _by_ahead(grown, "crosses")
    ]
    texts += [
        f"`{name}` is ahead of {f.listed([f'`{c.behind}`' for c in group])} at every size from {group[0].smallest:,} to {group[0].largest:,} rows."
        for name, group in _by_ahead(grown, "ahead")
    ]
    texts += [
        f"`{name}` is ahead of {f.listed([f'`{c.behind}` from {c.high:,.0f}' for c in group])} rows on; with fewer the data cannot tell."
        for name, group in _by_ahead(grown, "ahead_from")
    ]
    untold = [c for c in grown.crossovers if c.verdict == "unclear"]
    texts += [
        f"`{c.behind}` is ahead of `{c.ahead}` up to {c.behind_until:,.0f} rows; which is ahead at {c.largest:,}, the data cannot tell."
        for c in untold if c.behind_until
    ]
    if pairs := [f"`{c.ahead}` and `{c.behind}`" for c in untold if not c.behind_until]:
        texts.append(f"Which of two is ahead at {untold[0].largest:,} rows, the data cannot tell for {'; '.join(pairs)}.")
    return texts


def _by_ahead(grown: Growth, verdict: str) -> list[tuple[str, list[Crossover]]]:
    """Crossovers of one verdict by the technique that is ahead, in the order of their rows."""
    groups: dict[str, list[Crossover]] = {}
    for c in sorted((c for c in grown.crossovers if c.verdict == verdict), key=lambda c: c.rows or c.high or 0):
        groups.setdefault(c.ahead, []).append(c)
    return list(groups.items())


def remarks(grown: Growth) -> list[str]:
    """What a reader of the curves should know, as far as it holds here."""
    power = [one for one in grown.lines if one.curve.kind == "power"]
    poor = [one.name for one in power if not one.curve.fits]
    lone = [one.name for one in grown.lines if one.curve.seeds == 1 and one.kind != "base"]
    return [text for text in (
        "Curves are a − b · n^(−c), fitted to the sizes measured and drawn no further; what takes no rows to train is a line. Bands and brackets "
        "hold the truth 95 times in 100, each for itself.",
        f"The points of {_listed(poor)} do not lie on such a curve (lack of fit, p < 0.01): trust the points more than the line." if poor else "",
        f"One seed of {_listed(lone)}: the bands leave the spread of training out, and are too narrow." if lone else "",
        f"{grown.metric} has no answers to compare row by row: the sampling of test rows is counted as for a share, apart for every technique."
        if grown.metric == METRICS["macro_f1"] else "",
        f"Too few sizes for a curve: {_listed(grown.without)}." if grown.without else "",
    ) if text]


def _listed(names: Sequence[str]) -> str:
    return f.listed([f"`{name}`" for name in names])


def table(grown: Growth) -> tuple[list[str], list[list[str]]]:
    """(heads, lines): the rows for the target, and the accuracy at both ends of a curve, with their intervals."""
    heads = ["Technique", f"Rows for {f.percent(grown.target)}%", f"At {grown.smallest:,} rows, %", f"At {grown.largest:,} rows, %"]
    return heads, [
        [one.name, rows_in_words(one.needed, one.curve.kind == "constant"), _bounded(one, one.first, grown.smallest), _bounded(one, one.last, grown.largest)]
        for one in grown.lines
    ]


def _bounded(one: Line, estimate: Estimate, rows: int) -> str:
    """The estimate at an end of the technique's own sizes; said where that is not the experiment's."""
    text = f"{f.percent(estimate.value)} [{f.percent(estimate.low)}–{f.percent(estimate.high)}]"
    return text if one.curve.kind == "constant" or rows in one.curve.sizes else f"{text} at {min(one.curve.sizes, key=lambda n: abs(n - rows)):,}"


def summary(grown: Growth | None) -> list[str]:
    """What table.md says of it: what crosses where, and the rows for the target."""
    if grown is None:
        return []
    why = f" ({grown.about_target})" if grown.about_target else ""
    needed = [f"`{one.name}` {rows_in_words(one.needed, one.curve.kind == 'constant')}" for one in grown.lines]
    return [*sentences(grown), f"Labelled rows for {f.percent(grown.target)}%{why}: {'; '.join(needed)}."]


WIDE, NARROW = (600, 350), (250, 290)
STEPS = 60
TICK = 34.0  # pixels that a number below the axis needs


def charts(grown: Growth, colour: dict[str, str]) -> list[tuple[str, Markup]]:
    """(CSS class, drawing): one for a wide page, one for a phone."""
    return [("wide", inline(curves(grown, colour, *WIDE))), ("narrow", inline(curves(grown, colour, *NARROW)))]


def curves(grown: Growth, colour: dict[str, str], width: int, height: int) -> Spec:
    """Every technique's learning curve with its band and points."""
    x = Scale(grown.smallest, grown.largest, 0, width, log=True)
    y = _levels(grown, height)
    sizes = sorted({n for one in grown.lines if one.curve.kind == "power" for n in one.curve.sizes})
    below = Axis("Labelled rows, training and validation (log scale)", x, {float(n): f.count(n) for n in _apart(sizes, x)}, grid=False)
    about = f"Test {grown.metric} against labelled rows, a curve for each of {len(grown.lines)} techniques"
    chart = Chart(width, height, below, linear("", y, percent, 6), about)
    if y.low < grown.target < y.high:
        chart.dashed((x.low, grown.target), (x.high, grown.target))
    dashed = dict(zip((one.name for one in grown.lines), plot.dashes([one.family for one in grown.lines]), strict=True))
    upwards = grown.lines[::-1]
    drawn = {one.name: _along(one, STEPS if one.curve.kind == "power" else 1) for one in upwards}
    for one in upwards:
        chart.band([(n, e.low, e.high) for n, e in ((n, one.curve.at(n)) for n in drawn[one.name])], colour[one.family])
    for one in upwards:
        chart.line([(n, one.curve.value(n)) for n in drawn[one.name]], colour[one.family], dashed[one.name])
    for one in upwards:
        _points(chart, one, colour[one.family])
    beside(chart, [(one.ends[1], one.curve.value(one.ends[1]), one.name, colour[one.family]) for one in grown.lines])
    return chart.spec()


def _levels(grown: Growth, height: float) -> Scale:
    values = [v for one in grown.lines for n in _along(one, 8) for v in (one.curve.at(n).low, one.curve.at(n).high)]
    values += [c.accuracy for one in grown.lines for cells in one.cells.values() for c in cells]
    low, high = max(0.0, min(values)), min(1.0, max(values))
    room = 0.03 * (high - low) or 0.02
    return Scale(max(0.0, low - room), min(1.0, high + room), height, 0)


def _apart(sizes: Sequence[int], x: Scale) -> list[int]:
    """The sizes whose numbers do not touch, the largest always."""
    shown: list[int] = []
    for n in reversed(sizes):
        if not shown or x(shown[-1]) - x(n) >= TICK:
            shown.append(n)
    return shown


def _along(one: Line, steps: int) -> list[float]:
    low, high = one.ends
    return [low * (high / low) ** (i / steps) for i in range(steps + 1)]


def _points(chart: Chart, one: Line, colour: str) -> None:
    """Seeds as small dots, their mean as one that says its figures; what is constant has points at the sizes of the others."""
    shown = {n: cells for n, cells in one.cells.items() if chart.x.scale.low <= n <= chart.x.scale.high}
    seeds = [c.accuracy for cells in shown.values() if len({c.accuracy for c in cells}) > 1 for c in cells]
    at = [n for n, cells in shown.items() if len({c.accuracy for c in cells}) > 1 for _ in cells]
    chart.seeds(list(zip(at, seeds, strict=True)), colour)
    means = {n: statistics.fmean(c.accuracy for c in cells) for n, cells in shown.items()}
    chart.dots([Dot(n, mean, colour, _tip(one, n, mean), f"#{f.anchor(one.name)}") for n, mean in means.items()], size=40)


def _tip(one: Line, n: int, mean: float) -> str:
    cells, curve = one.cells[n], one.curve.at(n)
    each = ", ".join(f.percent(c.accuracy) for c in cells)
    return " | ".join([
        one.name, f"{n:,} labelled rows: {f.percent(mean)}%", *([f"seeds {each}"] if len(cells) > 1 else []),
        f"curve {f.percent(curve.value)}% [{f.percent(curve.low)}–{f.percent(curve.high)}]",
    ])
