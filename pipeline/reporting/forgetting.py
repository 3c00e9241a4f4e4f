"""What was learned against what was forgotten: a chart a probe, and one of what carries over to other domains.

Library of `python -m pipeline.report`; docs/forgetting.md says what the probes are. Learned is the test figure above zero-shot's.
Along the probes' charts the untouched base stands at 0, and to the right of it more was forgotten.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.reporting import plot
from pipeline.reporting import words as f
from pipeline.reporting.charts import FRAME, MOST_NAMES, Drawn, link, name_dots, pareto, tip
from pipeline.reporting.figures import QUANTISED, Row
from pipeline.reporting.plot import Scale
from pipeline.reporting.rows import zero_shot
from pipeline.reporting.vega import Chart, Dot, linear

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
        return f.growth(value) if self.relative else f"{f.points(value)} points"


def _negative(value: float | None) -> float | None:
    return None if value is None else 0.0 - value


AXES = (
    Axis("Perplexity of news, growth in %", "Against perplexity", lambda r: r.perplexity_change, lambda r: r.perplexity_change_16bit),
    Axis("Minimal pairs lost, points", "Against grammar", lambda r: _negative(r.pairs_change), lambda r: _negative(r.pairs_change_16bit), relative=False),
    Axis("LAMBADA words lost, points", "Against LAMBADA", lambda r: _negative(r.lambada_change), lambda r: _negative(r.lambada_change_16bit), relative=False),
    Axis("Other domains, points above zero-shot", "What carries over", lambda r: r.transfer_change, relative=False, lost=False),
)


def charts(rows: Sequence[Row], colour: dict[str, str]) -> list[Drawn]:
    """The charts of rows of one group; those that fewer than two techniques have a figure for are left out, all without zero-shot."""
    base = zero_shot(rows)
    if base is None or base.test is None:
        return []
    return [chart for axis in AXES if (chart := _chart(rows, base, axis, colour))]


def _chart(rows: Sequence[Row], base: Row, axis: Axis, colour: dict[str, str]) -> Drawn | None:
    known = [(r, axis.value(r), r.test - base.test) for r in rows if not r.teacher and r.test is not None and base.test is not None]
    measured = [(r, lost, gain) for r, lost, gain in known if lost is not None]
    limit = _limit([lost for _, lost, _ in measured]) if axis.lost else float("inf")
    shown = [point for point in measured if point[1] <= limit]
    if len(shown) < 2 or len({r.technique for r, _, _ in shown}) < 2:
        return None
    left_out = [f"{r.technique} ({'perplexity' if axis.relative else 'forgot'} {axis.words(lost)}, learned {f.points(gain)})"
                for r, lost, gain in measured if lost > limit]
    left_out += [f"{r.technique} (not measured)" for r, lost, _ in known if lost is None]
    x, y = _scales(shown, axis)
    about = f"Test result above zero-shot against: {axis.title}"
    chart = Chart(FRAME.right - FRAME.left, FRAME.bottom - FRAME.top, linear(axis.title, x, _plus), linear("", y, _plus), about)
    chart.dashed((0.0, y.low), (0.0, y.high), (1, 0))
    chart.dashed((x.low, 0.0), (x.high, 0.0), (1, 0))
    if not axis.lost:  # as much gained on other domains as on the task's own
        low, high = max(x.low, y.low), min(x.high, y.high)
        chart.dashed((low, low), (high, high))
    chart.spans([(gain, lost, end, colour[row.family]) for row, lost, gain in shown if (end := _in_16bit(row, axis)) is not None])
    front = pareto([(lost if axis.lost else -lost, gain) for _, lost, gain in shown])
    name_dots(chart, [(lost, gain, row.technique) for row, lost, gain in shown], front, [(x.low, 0.0), (x.high, 0.0)])
    chart.dots([Dot(lost, gain, colour[row.family], _tip(row, axis, lost, gain), link(row), row.precision in QUANTISED) for row, lost, gain in shown])
    return Drawn(axis.heading, chart.spec(), left_out, len(shown) > MOST_NAMES)


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


def _plus(at: float) -> str:
    text = f"{100 * at:g}".replace("-", f.MINUS)
    return f"+{text}" if at > 0 else text


def _in_16bit(row: Row, axis: Axis) -> float | None:
    """Over a quantised base, what is lost against the base in 16 bits."""
    return axis.value_16bit(row) if row.precision in QUANTISED else None


def _tip(row: Row, axis: Axis, lost: float, gain: float) -> str:
    in_16bit = _in_16bit(row, axis)
    against = [f"against the base in 16 bits {axis.words(in_16bit)}"] if in_16bit is not None else []
    return tip(row, f"learned {f.points(gain)} points above zero-shot", f"{axis.title.partition(',')[0].lower()} {axis.words(lost)}", *against)


def probes(rows: Sequence[Row]) -> list[str]:
    """What the cells were probed with, in their own words."""
    return list(dict.fromkeys(r.forgetting.probes for row in rows for r in row.results if r.forgetting and r.forgetting.probes))
