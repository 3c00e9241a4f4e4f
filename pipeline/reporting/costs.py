"""What a technique costs besides its training run: one picture of all, from trainable parameters to a request's memory, and many adapters on one base."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.reporting import words as f
from pipeline.reporting.figures import Row
from pipeline.reporting.vega import COLOUR, FONT, Spec

PART = 112
"""Pixels of one measure's bars, figures included."""


@dataclass(frozen=True)
class Figure:
    title: str
    text: str
    small: str = ""
    share: float | None = None
    """Of the largest among the techniques, in percent: the length of its bar. None: no bar."""


@dataclass(frozen=True)
class Panel:
    row: Row
    figures: list[Figure]
    numbers: list[str]
    """Of requests that come at once; empty where their time was not measured."""
    many: dict[str, list[str]]
    """How they are answered -> texts, by number."""
    how: str
    """How the adapters share the base."""


@dataclass(frozen=True)
class Measure:
    title: str
    scale: str
    """Measures of one scale share the full length of their bars, so that attached and merged compare."""
    value: Callable[[Row], float | None]
    show: Callable[[float | None], str]
    small: Callable[[Row], str] = lambda row: ""


def _milliseconds(value: float | None) -> str:
    return f.DASH if value is None else f"{f.milliseconds(value)} ms" if value < 1 else f"{f.seconds(value)} s"


MEASURES = (
    Measure("Trainable", "parameters", lambda r: r.trainable, f.count, lambda r: f.share(r.trainable_share)),
    Measure("Artefact", "artefact", lambda r: r.artefact_bytes, f.size),
    Measure("Hyperparameters tried", "searched", lambda r: _tuned(r)[0], f.count),
    Measure("Tuning", "tuning", lambda r: _tuned(r)[1], f.duration),
    Measure("Teacher", "teacher", lambda r: r.teacher_s, f.duration),
    Measure("One request", "request", lambda r: r.latency_s, _milliseconds),
    Measure("One request, merged", "request", lambda r: r.merged_latency_s, _milliseconds),
    Measure("Its memory", "memory", lambda r: r.request_peak_bytes, f.size),
    Measure("Its memory, merged", "memory", lambda r: r.merged_request_peak_bytes, f.size),
)


def panels(rows: Sequence[Row]) -> list[Panel]:
    """A panel for every technique that a model answers, in the order of the rows; what none of them has a figure of is left out."""
    shown = _shown(rows)
    missing = unmeasured(rows)
    measures = [m for m in MEASURES if m.title not in missing]
    most = {m.scale: max((n.value(r) or 0.0 for r in shown for n in measures if n.scale == m.scale), default=0.0) for m in measures}
    return [Panel(row, [_figure(row, m, most[m.scale]) for m in measures], *_many(row)) for row in shown]


def picture(shown: Sequence[Panel], colour: Mapping[str, str], columns: int) -> Spec:
    """Bars of every measure side by side, a line a technique; `columns` measures in a row."""
    measures = [figure.title for figure in shown[0].figures]
    names = [panel.row.name for panel in shown]
    parts = []
    for number, title in enumerate(measures):
        data = []
        for panel in shown:
            one = panel.figures[number]
            text = one.text if one.text != f.DASH else ""
            data.append({"name": panel.row.name, "share": one.share or 0.0, "text": text, "c": COLOUR[colour[panel.row.family]],
                         "tip": f"{panel.row.name} | {title.lower()} {one.text}{f' ({one.small})' if one.small else ''}"})
        labels = {"title": None, "labelFontSize": 11.5, "labelColor": COLOUR["ink"], "labelLimit": 130, "domain": True, "domainColor": COLOUR["grid"]}
        y = {"field": "name", "type": "nominal", "sort": names, "axis": labels if number % columns == 0 else {**labels, "labels": False}}
        x = {"field": "share", "type": "quantitative", "scale": {"domain": [0, 165]}, "axis": None}
        parts.append({
            "title": {"text": title, "anchor": "start", "fontSize": 11.5, "font": FONT, "color": COLOUR["ink"], "fontWeight": "normal", "offset": 6},
            "data": {"values": data}, "width": PART, "height": {"step": 19},
            "layer": [
                {"mark": {"type": "bar", "height": 9}, "encoding": {"x": x, "y": y, "color": {"field": "c", "type": "nominal", "scale": None},
                                                                  "description": {"field": "tip"}}},
                {"mark": {"type": "text", "align": "left", "dx": 4, "fontSize": 10.5, "aria": False},
                 "encoding": {"x": x, "y": y, "text": {"field": "text"}, "color": {"value": COLOUR["soft"]}}},
            ],
        })
    return {"description": f"What each of {len(names)} techniques costs to keep and to serve", "columns": columns, "spacing": 18, "concat": parts}


def unmeasured(rows: Sequence[Row]) -> list[str]:
    """Titles of the measures that no technique has a figure of."""
    return [m.title for m in MEASURES if all(m.value(r) is None for r in _shown(rows))]


def _shown(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if not r.teacher and r.status not in ("oom", "diverged")]


def _figure(row: Row, measure: Measure, most: float) -> Figure:
    value = measure.value(row)
    share = None if value is None or not most else min(100.0, round(100 * value / most, 2))
    return Figure(measure.title, measure.show(value), measure.small(row), share)


def _tuned(row: Row) -> tuple[float | None, float | None]:
    """(searched hyperparameters, device seconds spent on searching them); None where nothing was tuned by pipeline.tune."""
    tuning = next((r.tuning for r in row.results if r.tuning), None)
    return (tuning.searched, tuning.device_s) if tuning else (None, None)


def _many(row: Row) -> tuple[list[str], dict[str, list[str]], str]:
    """The last three fields of a panel: means over the seeds."""
    measured = [r.inference for r in row.results if r.inference and r.inference.adapters]
    numbers = sorted({n for i in measured for n in i.adapters or {}}, key=int)
    same = _texts([i.one_adapter or {} for i in measured], numbers)
    if not row.trainable:
        return numbers, {"requests": same}, "the model is the base itself" if measured else ""
    how = "one batch, every row by its own adapter" if measured and measured[0].adapters_mixed else "adapters take turns: PEFT does not mix them"
    return numbers, {"own adapter": _texts([i.adapters or {} for i in measured], numbers), "all by one": same}, how


def _texts(measured: Sequence[dict[str, float]], numbers: Sequence[str]) -> list[str]:
    by_number = [[m[n] for m in measured if n in m] for n in numbers]
    return [_milliseconds(statistics.fmean(values) if values else None) for values in by_number]
