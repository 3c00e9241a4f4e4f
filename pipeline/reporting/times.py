"""Where the time of each technique went: its phases as one stacked bar, the longest of all as wide as the drawing.

Library of `python -m pipeline.report`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pipeline.measure.clock import Phases
from pipeline.records.finished import Cell
from pipeline.reporting import words as f
from pipeline.reporting.figures import RESUMED, SHARED, Row
from pipeline.reporting.vega import COLOUR, Spec

PHASES = {
    "startup": "start-up", "load": "load", "warmup": "warm-up", "train": "train", "validate": "validate", "save": "save",
    "evaluate": "evaluate", "other": "other",
}
"""Phase -> what the page calls it."""
WIDE, NARROW = 640, 180
"""Pixels of the longest bar on a wide page and on a phone."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A technique's phases, means over its seeds. mark: of times that are not a run's own."""

    name: str
    phases: Phases
    mark: str


def lines(rows: Sequence[Row]) -> list[Line]:
    """A line a technique whose times were measured, in the order of the rows."""
    known = [(row, _mean([c for c in row.cells if c.result.phases and c.timing == row.timing])) for row in rows]
    shown = [(row, phases) for row, phases in known if phases and phases.wall_s]
    return [Line(row.name, phases, (RESUMED if row.timing else "") + (SHARED if row.shared_process else "")) for row, phases in shown]


def _mean(cells: Sequence[Cell]) -> Phases | None:
    each = [dataclasses.asdict(c.result.phases) for c in cells if c.result.phases]
    return Phases(**{key: sum(e[key] for e in each) / len(each) for key in each[0]}) if each else None


def parts(phases: Phases) -> list[tuple[str, float]]:
    """(phase, seconds) of the phases that took any time, in their order."""
    return [(name, seconds) for name in PHASES if (seconds := getattr(phases, f"{name}_s")) > 0]


def picture(shown: Sequence[Line], width: int) -> Spec:
    """The bars, in seconds; what a phase took is said when pointed at, what all took stands behind the bar."""
    bars, ends = [], []
    for line in shown:
        start = 0.0
        for name, seconds in parts(line.phases):
            bars.append({"name": line.name, "x": start, "x2": start + seconds, "c": COLOUR[f"p-{name}"],
                         "tip": f"{line.name} | {PHASES[name]} {f.duration(seconds)} of {f.duration(line.phases.wall_s)}"})
            start += seconds
        ends.append({"name": line.name, "x": start, "text": f"{f.seconds(line.phases.wall_s)} s{line.mark and ' '}{line.mark}"})
    y = {"field": "name", "type": "nominal", "sort": [line.name for line in shown],
         "axis": {"title": None, "labelFontSize": 12, "labelColor": COLOUR["ink"], "labelLimit": 190 if width == WIDE else 110, "grid": False}}
    longest = max(sum(seconds for _, seconds in parts(line.phases)) for line in shown)
    x = {"field": "x", "type": "quantitative", "axis": None, "scale": {"domain": [0, longest], "nice": False}}
    return {
        "description": f"Where the time of {len(shown)} techniques went", "width": width, "height": {"step": 22},
        "layer": [
            {"data": {"values": bars}, "mark": {"type": "bar", "height": 13},
             "encoding": {"x": x, "x2": {"field": "x2"}, "y": y, "color": {"field": "c", "type": "nominal", "scale": None}, "description": {"field": "tip"}}},
            {"data": {"values": ends}, "mark": {"type": "text", "align": "left", "dx": 6, "fontSize": 11, "clip": False, "aria": False},
             "encoding": {"x": x, "y": y, "text": {"field": "text"}, "color": {"value": COLOUR["soft"]}}},
        ],
    }
