"""What was learned against what was forgotten: a chart a probe, and one of what carries over to other domains.

Library of `python -m pipeline.report`; docs/forgetting.md says what the probes are. Learned is the test figure above zero-shot's.
Along the probes' charts the untouched base stands at 0, and to the right of it more was forgotten.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.reporting import plot
from pipeline.reporting import words as f
from pipeline.reporting.charts import FRAME, HEIGHT, WIDTH, Chart, names, point, tip
from pipeline.reporting.figures import QUANTISED, Row
from pipeline.reporting.plot import Box, Scale, tag
from pipeline.reporting.rows import zero_shot

FARTHEST = 8.0  # times the median of what was forgotten: what lies beyond is named, not drawn


@dataclass(frozen=True)
class Axis:
    """A figure to draw what was learned against."""

    title: str
    heading: str
    value: Callable[[Row], float | None]
    """A fraction; above 0: forgotten (carried over, for transfer)."""
    value_16bit: Callable[[Row], float | None] = lambda row: None
    """The same against the base in 16 bits."""
    relative: bool = True
    """Whether it is a growth in percent; else a difference in percentage points."""
    lost: bool = True
    """Whether to the right is worse."""

    def words(self, value: float) -> str:
        return f"{f.signed(100 * value)}{'%' if self.relative else ' points'}"


def _negative(value: float | None) -> float | None:
    return None if value is None else 0.0 - value


AXES = (
    Axis("Perplexity of news, growth in %", "Against perplexity", lambda r: r.perplexity_change, lambda r: r.perplexity_change_16bit),
    Axis("Minimal pairs lost, points", "Against grammar", lambda r: _negative(r.pairs_change), lambda r: _negative(r.pairs_change_16bit), relative=False),
    Axis("LAMBADA words lost, points", "Against LAMBADA", lambda r: _negative(r.lambada_change), lambda r: _negative(r.lambada_change_16bit), relative=False),
    Axis("Other domains, points above zero-shot", "What carries over", lambda r: r.transfer_change, relative=False, lost=False),
)


def charts(rows: Sequence[Row], colour: dict[str, str]) -> list[Chart]:
    """The charts of rows of one group; those that fewer than two techniques have a figure for are left out, all without zero-shot."""
    base = zero_shot(rows)
    if base is None or base.test is None:
        return []
    return [chart for axis in AXES if (chart := _chart(rows, base, axis, colour))]


def _chart(rows: Sequence[Row], base: Row, axis: Axis, colour: dict[str, str]) -> Chart | None:
    known = [(r, axis.value(r), r.test - base.test) for r in rows if not r.teacher and r.test is not None and base.test is not None]
    measured = [(r, lost, gain) for r, lost, gain in known if lost is not None]
    limit = _limit([lost for _, lost, _ in measured]) if axis.lost else float("inf")
    shown = [point for point in measured if point[1] <= limit]
    if len(shown) < 2 or len({r.technique for r, _, _ in shown}) < 2:
        return None
    left_out = [f"{r.technique} (forgot {axis.words(lost)}, learned {f.points(gain)})" for r, lost, gain in measured if lost > limit]
    left_out += [f"{r.technique} (not measured)" for r, lost, _ in known if lost is None]
    x, y = _scales(shown, axis)
    at = [(x(lost), y(gain)) for _, lost, gain in shown]
    parts = [*_axes(x, y, axis), *_beyond(shown, at, x, axis, colour), *_names(shown, at, x, y, axis)]
    for (row, lost, gain), (px, py) in zip(shown, at, strict=True):
        parts.append(point(px, py, colour[row.family], row.precision in QUANTISED, _tip(row, axis, lost, gain), row.name))
    return Chart(axis.heading, plot.svg(WIDTH, HEIGHT, parts, f"Test result above zero-shot against: {axis.title}"), left_out)


def _limit(lost: Sequence[float]) -> float:
    """The farthest that is drawn, so that one technique that forgot everything does not press the others together."""
    above = [v for v in lost if v > 0]
    return FARTHEST * statistics.median(above) if len(above) >= 3 else max(lost, default=0.0)


def _scales(shown: Sequence[tuple[Row, float, float]], axis: Axis) -> tuple[Scale, Scale]:
    across = [0.0, *(lost for _, lost, _ in shown), *(v for row, _, _ in shown if (v := _in_16bit(row, axis)) is not None)]
    room = 0.12 * (max(across) - min(across)) or 0.01  # where nothing was forgotten at all
    x = Scale(min(across) - room / 2, max(across) + room, FRAME.left, FRAME.right)
    y = plot.scale([0.0, *(gain for _, _, gain in shown)], FRAME.bottom, FRAME.top, room=0.1)
    return x, y


def _axes(x: Scale, y: Scale, axis: Axis) -> list[Markup]:
    parts = plot.percent_ticks(y, FRAME, show=_plus, zero="axis")
    for at in x.ticks():
        parts.append(tag("line", class_="grid" if at else "axis", x1=x(at), x2=x(at), y1=FRAME.top, y2=FRAME.bottom))
        parts += plot.tick(x(at), _plus(at), FRAME, marked=False)
    if not axis.lost:  # as much gained on other domains as on the task's own
        low, high = max(x.low, y.low), min(x.high, y.high)
        parts.append(tag("line", class_="target", x1=x(low), x2=x(high), y1=y(low), y2=y(high)))
    return [*parts, plot.axis_title(axis.title, FRAME, 38)]


def _plus(at: float) -> str:
    text = f"{100 * at:g}".replace("-", f.MINUS)
    return f"+{text}" if at > 0 else text


def _in_16bit(row: Row, axis: Axis) -> float | None:
    """Over a quantised base, what is lost against the base in 16 bits."""
    return axis.value_16bit(row) if row.precision in QUANTISED else None


def _beyond(shown: Sequence[tuple[Row, float, float]], at: Sequence[tuple[float, float]], x: Scale, axis: Axis, colour: dict[str, str]) -> list[Markup]:
    """Lines from points over a quantised base on to what is lost against the base in 16 bits."""
    parts = []
    for (row, _, _), (px, py) in zip(shown, at, strict=True):
        end = _in_16bit(row, axis)
        if end is not None:
            parts.append(tag("line", class_=f"whisker {colour[row.family]}", x1=px, x2=x(end), y1=py, y2=py))
    return parts


def _names(shown: Sequence[tuple[Row, float, float]], at: Sequence[tuple[float, float]], x: Scale, y: Scale, axis: Axis) -> list[Markup]:
    zeros = [Box(x(0) - 1, FRAME.top, x(0) + 1, FRAME.bottom), Box(FRAME.left, y(0) - 1, FRAME.right, y(0) + 1)]
    ends = [(px, py, x(v)) for (row, _, _), (px, py) in zip(shown, at, strict=True) if (v := _in_16bit(row, axis)) is not None]
    lines = [Box(min(px, end), py - 1, max(px, end), py + 1) for px, py, end in ends]
    return names([(*where, row.technique) for (row, _, _), where in zip(shown, at, strict=True)], at, lines, zeros)


def _tip(row: Row, axis: Axis, lost: float, gain: float) -> Markup:
    in_16bit = _in_16bit(row, axis)
    against = [f"against the base in 16 bits {axis.words(in_16bit)}"] if in_16bit is not None else []
    return tip(row, f"learned {f.points(gain)} points above zero-shot", f"{axis.title.partition(',')[0].lower()} {axis.words(lost)}", *against)


def probes(rows: Sequence[Row]) -> list[str]:
    """What the cells were probed with, in their own words."""
    return list(dict.fromkeys(r.forgetting.probes for row in rows for r in row.results if r.forgetting and r.forgetting.probes))
