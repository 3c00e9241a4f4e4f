"""True reward against learnt reward over the divergence from the start: what who has no checkable task must guess (Gao et al., 2023).

Library of `python -m pipeline.report`. Of reinforcement learning the points are its training curve's (drawn answers to training rows), of best of n the
best of 1, 2, 4, … drawn answers to test rows. Drawn over the square root of the divergence, as there: a distance, in which rewards are about parabolas.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.records.results import Result
from pipeline.reporting import plot
from pipeline.reporting import words as f
from pipeline.reporting.charts import FRAME, Drawn, link
from pipeline.reporting.figures import Row
from pipeline.reporting.vega import Chart, Dot, linear

PARTS = 12
"""Points that a training curve is told in: means over so many stretches of its steps, and over seeds."""
DASHES = (None, "5 3", "2 3", "8 3 2 3")
"""Of lines, by technique: those of one family have one colour."""
SURE = 2.0
"""Standard errors by which the true reward must have fallen to be called lower."""


@dataclass(frozen=True)
class Point:
    """kl: nats from the start, a mean over drawn answers. reward: above the start's; None: no reward was learnt. gold: share right; error: its standard."""

    kl: float
    gold: float
    reward: float | None
    error: float


@dataclass(frozen=True)
class Curve:
    """rows: what the answers were drawn to."""

    row: Row
    points: list[Point]
    rows: Literal["training rows", "test rows"]

    @property
    def learnt(self) -> bool:
        return all(p.reward is not None for p in self.points)

    @property
    def parted(self) -> Point | None:
        """Where the true reward was highest, if it fell from there for sure while the learnt one did not; None: they did not part."""
        top, last = max(self.points, key=lambda p: p.gold), self.points[-1]
        fell = top.gold - last.gold > SURE * math.hypot(top.error, last.error)
        return top if self.learnt and fell and (last.reward or 0.0) >= (top.reward or 0.0) else None


def curves(rows: Sequence[Row]) -> list[Curve]:
    """Of every row that has any."""
    found = [Curve(row, points, "training rows") for row in rows if (points := _of_training(row))]
    found += [Curve(row, points, "test rows") for row in rows if (points := _of_best(row))]
    return found if any(curve.learnt for curve in found) else []


def _of_training(row: Row) -> list[Point]:
    every = [[p for p in r.history if p.get("kl") is not None and p.get("gold_reward") is not None] for r in row.results]
    every = [points for points in every if len(points) > 1]
    if not every:
        return []
    steps = max(float(p["step"] or 0) for points in every for p in points)
    first = [statistics.fmean(float(p["reward"] or 0) for p in points[: max(1, len(points) // PARTS)]) for points in every]
    made = []
    for part in range(PARTS):
        mine = [(p, start) for points, start in zip(every, first, strict=True) for p in points if part < float(p["step"] or 0) * PARTS / steps <= part + 1]
        if mine:
            golds = [float(p["gold_reward"] or 0) for p, _ in mine]
            error = statistics.stdev(golds) / math.sqrt(len(golds)) if len(golds) > 1 else math.inf
            learnt = statistics.fmean(float(p["reward"] or 0) - start for p, start in mine) if _is_learnt(row.results) else None
            made.append(Point(statistics.fmean(float(p["kl"] or 0) for p, _ in mine), statistics.fmean(golds), learnt, error))
    return made


def _is_learnt(results: Sequence[Result]) -> bool:
    return any(b.part == "reward" for r in results for b in r.before.values())


def _of_best(row: Row) -> list[Point]:
    every = [r.best_of for r in row.results if r.best_of]
    made = []
    for k in sorted({p["k"] for points in every for p in points}):
        mine = [(p, points[0]) for points in every for p in points if p["k"] == k]
        gold = statistics.fmean(p["gold_reward"] for p, _ in mine)
        rows = sum(r.test.rows for r in row.results if r.test)
        error = math.sqrt(gold * (1 - gold) / rows) if rows else math.inf
        made.append(Point(mine[0][0]["kl"], gold, statistics.fmean(p["reward"] - one["reward"] for p, one in mine), error))
    return made


def sentences(rows: Sequence[Row]) -> list[str]:
    """A sentence for every learnt reward: how far it and the true one rose, and where they parted."""
    said = []
    for curve in curves(rows):
        if not curve.learnt:
            continue
        first, last, parted = curve.points[0], curve.points[-1], curve.parted
        rose = f"`{curve.row.name}`: the learnt reward changed by {last.reward or 0.0:+.2g} up to a KL of {last.kl:.2g} nats, "
        rose += f"the true one from {f.percent(first.gold)}% to {f.percent(last.gold)}% right on {curve.rows}"
        if parted is None:
            said.append(f"{rose}; they did not part.")
        else:
            said.append(f"{rose}; over-optimised from a KL of {parted.kl:.2g} on, where the true one was highest ({f.percent(parted.gold)}%).")
    return said


def charts(rows: Sequence[Row], colour: dict[str, str]) -> list[Drawn]:
    """True reward over KL, of learnt rewards and of what they are held against, and below it the learnt one; empty where no reward was learnt."""
    shown = curves(rows)
    if not shown:
        return []
    drawn = [_chart("True reward", "right, %", [(c, [(p.kl, p.gold) for p in c.points]) for c in shown], colour, f.percent)]
    learnt = [(c, [(p.kl, p.reward or 0.0) for p in c.points]) for c in shown if c.learnt]
    return [*drawn, _chart("Learnt reward", "above the start's", learnt, colour, lambda v: f"{v:.2g}")]


def _distance(kl: float) -> float:
    """The square root of a divergence. Estimated from drawn answers it may lie a little below zero, where it is none."""
    return math.sqrt(max(kl, 0.0))


def _chart(heading: str, what: str, lines: Sequence[tuple[Curve, list[tuple[float, float]]]], colour: dict[str, str], show: object) -> Drawn:
    assert callable(show)
    values = [value for _, line in lines for _, value in line]
    furthest = max(_distance(kl) for _, line in lines for kl, _ in line)
    x = plot.scale([0.0, 1.5 * furthest], FRAME.left, FRAME.right, room=0.02)  # names stand to the right of the lines
    y = plot.scale(values, FRAME.bottom, FRAME.top, room=0.1)
    about = f"{heading} of drawn answers ({what}) over the square root of the KL from the start; best of n on test rows, all else on training rows"
    along = linear("√ KL from the start, in nats", x, lambda v: f"{v:g}")
    chart = Chart(FRAME.right - FRAME.left, FRAME.bottom - FRAME.top, along, linear(what, y, show), about)
    for curve, line in lines:
        row, parted = curve.row, curve.parted
        chart.line([(_distance(kl), value) for kl, value in line], colour[row.family], DASHES[sum(map(ord, row.technique)) % len(DASHES)])
        chart.dots([Dot(_distance(kl), value, colour[row.family], f"{row.name} | KL {kl:.2g} on {curve.rows} | {heading.lower()} {show(value)}", link(row),
                        hollow=parted is not None and kl == parted.kl) for kl, value in line], size=26)
    ends = sorted(((line[-1][0], line[-1][1], curve.row) for curve, line in lines), key=lambda end: end[1])
    levels = plot.stacked([y(value) for _, value, _ in ends], 12)
    span = (y.high - y.low) / (FRAME.bottom - FRAME.top)
    names = [(_distance(kl) + 0.012 * x.high, y.low + (FRAME.bottom - level) * span, row.technique, colour[row.family])
             for (kl, _, row), level in zip(ends, levels, strict=True)]
    chart.names(names, align="left")
    return Drawn(heading, chart.spec(), [])
