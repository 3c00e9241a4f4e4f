"""index.html: one self-contained page from the template, with nothing to fetch.

Library of `python -m pipeline.report`. Texts that come from results are escaped by the template engine.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup, escape

from pipeline.forecasting.cell import Forecast, forecast_of
from pipeline.measure.clock import Phases
from pipeline.records.finished import Cell
from pipeline.records.results import Result, Work
from pipeline.reporting import costs as report_complexity
from pipeline.reporting import evaluated, forgetting, overoptimisation, times, tuning
from pipeline.reporting import words as f
from pipeline.reporting.charts import by_rows, colours, costs, forest, scatter, training_curves
from pipeline.reporting.figures import Row, columns, metric_name, remarks
from pipeline.reporting.growth import WIDE, Growth, charts, sentences
from pipeline.reporting.growth import curves as growth_curves
from pipeline.reporting.growth import remarks as growth_remarks
from pipeline.reporting.growth import table as growth_table
from pipeline.reporting.mistakes import of_report
from pipeline.reporting.rows import by_group, tier_notes, timing_notes
from pipeline.reporting.text import answer, context, provenance, rows_in_words, warnings
from pipeline.reporting.vega import Spec, inline

TEMPLATES = Path(__file__).with_name("templates")
UNBROKEN = re.compile(r"\b[np] [=<] |\d [A-Za-z]{1,3}\b|\d–\d")
BRIEF = ("name", "test", "against_zero_shot", "letters", "labelled_rows", "train_s", "peak_bytes", "trainable", "artefact_bytes", "latency_s")
"""Columns of the first table, which is whole on a page of 1280 pixels."""
NARROW = ("name", "test", "against_zero_shot", "train_s", "peak_bytes")
"""Those of them that a phone shows."""


def page(experiment: str, rows: Sequence[Row], missing: Sequence[str], grown: Growth | None = None, tunings: tuning.Tunings | None = None,
         data: Path | None = None) -> str:
    """The page. data: the folder of prepared tasks, for the texts of wrong rows."""
    return template("report.html").render(
        **_content(experiment, rows, missing, sentences(grown) if grown else ()), **_growth(rows, grown),
        **tuning.part(rows, tunings or {}, colours(rows)), mistakes=of_report(rows, data),
    )


def template(name: str) -> Any:
    """A page of templates/, in which a value that is not there is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )
    environment.filters |= {"words": words, "hyperparameter": f.hyperparameter, "anchor": f.anchor, "drawing": inline}
    return environment.get_template(name)


def drawings(rows: Sequence[Row], grown: Growth | None) -> dict[str, Spec]:
    """The charts that are kept as files beside the page, by name: those of the largest number of training rows."""
    colour, first = colours(rows), next(iter(by_group(rows).values()))
    kept = {"intervals": forest(first, colour)} if any(r.test is not None for r in first) else {}
    kept |= {c.title.lower().replace(" ", "_"): c.spec for cost in costs(first) if (c := scatter(first, cost, colour))}
    panels = report_complexity.panels(first)
    kept |= {c.title.lower().replace(" ", "_"): c.spec for c in overoptimisation.charts(first, colour)}
    kept |= {"times": times.picture(spent, times.WIDE)} if (spent := times.lines(rows)) else {}
    kept |= {"complexity": report_complexity.picture(panels, colour, len(panels[0].figures))} if panels and panels[0].figures else {}
    return kept | ({"learning_curves": growth_curves(grown, colour, *WIDE)} if grown else {})


def _growth(rows: Sequence[Row], grown: Growth | None) -> dict[str, Any]:
    """The part on data dependency; without learning curves the lines over the training rows stand in."""
    colour = colours(rows)
    if grown is None:
        return {"growth": None, "by_rows": inline(spec) if (spec := by_rows(rows, colour)) else None}
    heads, lines = growth_table(grown)
    of = [colour[one.family] for one in grown.lines]
    return {"growth": grown, "growth_charts": charts(grown, colour), "growth_heads": heads, "growth_lines": list(zip(of, lines, strict=True)),
            "crossovers": sentences(grown), "growth_remarks": growth_remarks(grown), "by_rows": None}


def words(text: str) -> Markup:
    """A sentence as HTML: escaped, what stands in backticks bold, numbers kept on one line with what belongs to them."""
    joined = str.maketrans({" ": "\N{NO-BREAK SPACE}", "–": "\N{WORD JOINER}–\N{WORD JOINER}"})
    parts = UNBROKEN.sub(lambda match: match[0].translate(joined), str(text)).split("`")
    return Markup("").join(Markup("<b>{}</b>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts))


def _content(experiment: str, rows: Sequence[Row], missing: Sequence[str], grown: Sequence[str]) -> dict[str, Any]:
    colour, cells = colours(rows), [c for r in rows for c in r.cells]
    first = cells[0].result
    heading = {"experiment": experiment, "task": first.task, "model": first.model, "metric": metric_name(rows)}
    words = {"verdict": answer(rows), "context": context(rows, grown), "warnings": warnings(rows, missing), "remarks": remarks, "provenance": provenance(cells)}
    assets = {"css": _asset("report.css"), "js": _asset("report.js")}
    shown, unmeasured = columns(rows)
    first_ones = [c for key in BRIEF for c in shown if c.key == key]
    groups = [(name, len(list(members))) for name, members in itertools.groupby(shown, key=lambda c: c.section)]  # runs of columns of one section
    table = {"rows": rows, "brief": first_ones, "narrow": NARROW, "columns": shown, "groups": groups, "unmeasured": [c.title for c in unmeasured]}
    return {**heading, **words, **assets, **table, **_charts(rows, colour), **_cells(rows), **_forecasts(rows)}


def _charts(rows: Sequence[Row], colour: dict[str, str]) -> dict[str, Any]:
    groups = by_group(rows)
    largest, first = next(iter(groups.items()))
    costly = [(rows_in_words(name), [c for cost in costs(group) if (c := scatter(group, cost, colour))]) for name, group in groups.items()]
    return {
        "colour": colour,
        "families": {r.family: colour[r.family] for r in sorted(rows, key=lambda r: colour[r.family]) if not r.teacher},
        "forest": inline(forest(first, colour)) if any(r.test is not None for r in first) else None,
        "forest_rows": rows_in_words(largest) if len(groups) > 1 else "",
        "charts": [(name, charts) for name, charts in costly if charts],
        "curves": [(name, inline(spec)) for name, spec in training_curves(rows, colour)],
        "curve_checks": any(point.get("validation_metric") is not None for r in rows for c in r.cells for point in c.result.history),
        "forgetting": [(rows_in_words(name), charts) for name, group in groups.items() if (charts := forgetting.charts(group, colour))],
        "probed": forgetting.probes(rows), "suites": evaluated.suites(rows),
        "rewards": overoptimisation.charts(first, colour), "reward_sentences": overoptimisation.sentences(first),
        **_complexity(first, colour),
    }


def _complexity(rows: Sequence[Row], colour: dict[str, str]) -> dict[str, Any]:
    """One picture of all techniques: on a wide page its measures side by side, on a phone two in a row."""
    panels = report_complexity.panels(rows)
    measured = len(panels[0].figures) if panels else 0
    sizes = {"wide": measured if measured < 9 else 5, "narrow": 2} if measured else {}
    numbers = sorted({n for panel in panels for n in panel.numbers}, key=int)
    return {"complexity": panels if measured else [], "complexity_missing": report_complexity.unmeasured(rows), "complexity_numbers": numbers,
            "complexity_pictures": [(name, inline(report_complexity.picture(panels, colour, columns))) for name, columns in sizes.items()]}


def _cells(rows: Sequence[Row]) -> dict[str, Any]:
    names, details = {f.anchor(r.name) for r in rows}, []
    for row in rows:
        alias = f.anchor(row.technique)  # where a learning curve's point leads
        details.append((row, [_detail(c, row.own_notes) for c in row.cells], "" if alias in names else alias))
        names.add(alias)
    notes = {"tier_notes": tier_notes(rows), "timing_notes": timing_notes(rows)}
    spent = times.lines(rows)
    pictures = [(name, inline(times.picture(spent, width))) for name, width in (("wide", times.WIDE), ("narrow", times.NARROW))] if spent else []
    return {"phase_names": times.PHASES, "time_pictures": pictures, **notes, "details": details}


def _asset(name: str) -> Markup:
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _bar(phases: Phases) -> list[tuple[str, float, str]]:
    """(phase, its share in percent, seconds in words) of the phases of one cell that took any time."""
    return [(name, round(100 * seconds / phases.wall_s, 3), f.duration(seconds)) for name, seconds in times.parts(phases)]


def _detail(cell: Cell, own_notes: Sequence[str]) -> dict[str, Any]:
    """One cell's facts for its fold-out; what is true of every cell is said elsewhere."""
    result = cell.result
    facts = {**_quality(result), **_resources(result), "Teacher": _teacher(result), "Timing": cell.timing, "Engine": _engine(cell)}
    facts |= {"Notes": "; ".join(n for n in result.notes if n in own_notes), "Error": result.error}
    return {
        "result": result, "facts": {k: v for k, v in facts.items() if v}, "phases": _phases(result.phases),
        "config": yaml.safe_dump(result.config, sort_keys=True, allow_unicode=True) if result.config else "",
        "bar": _bar(result.phases) if result.phases and result.phases.wall_s else [],
    }


def _quality(result: Result) -> dict[str, str | None]:
    test, sets = result.test, [split for split in result.scores if split.startswith("transfer/")]
    return {
        "Transfer, %": ", ".join(f"{split.partition('/')[2]} {_score(result, split)}" for split in sets),
        "Log-loss of the right answer": f"{test.nll:.3f} nats a row" if test and test.nll is not None else None,
        "Test rows without an answer": str(test.unanswered) if test and test.unanswered else None,
    }


def _resources(result: Result) -> dict[str, str | None]:
    size, work, memory, inference = result.size, result.work, result.memory, result.inference
    return {
        "Energy": _energy(work),
        "Cost": f"{result.cost.amount:.4g} {result.cost.currency} ({result.cost.per_hour:g} an hour)" if result.cost else None,
        "Tuned": _tuning(result),
        "Steps": f"{work.steps:,}" if work and work.steps else None,
        "Padding share": f"{100 * work.padding_share:.0f}%" if work and work.padding_share is not None else None,
        "Memory before the first step": f.size(memory.baseline_bytes) if memory and memory.baseline_bytes is not None else None,
        "Allocated peak": f.size(memory.peak_allocated_bytes) if memory and memory.peak_allocated_bytes is not None else None,
        "Device's own view": f.size(memory.device_used_bytes) if memory and memory.device_used_bytes is not None else None,
        "Base in memory": f.size(size.model_bytes) if size and size.model_bytes is not None else None,
        "Model as served, in memory": f.size(size.served_bytes) if size and size.served_bytes is not None else None,
        "Attention": size.attention if size else None,
        "Rounded": _of_blocks(size.quantised_share if size else None),
        "Pruned, taken apart or adapted": _of_blocks(size.reached_share if size else None),
        "Latency and adapters": f"measured in {inference.requests_from}" if inference and inference.requests_from else None,
        "Beside other cells": _beside(result),
        "Test rows a second": f.rate(inference.rows_per_s) if inference and inference.rows_per_s is not None else None,
    }


def _beside(result: Result) -> str | None:
    there = result.neighbours
    if there is None:
        return None
    if not there.turns:
        return f"up to {there.cells} on the device at once{', through MPS' * there.mps}: no time is the cell's own"
    waited = f", {f.duration(there.waited_s)} of waiting left out" if there.waited_s else ""
    return f"up to {there.cells} under way; alone on the device while it was timed (training, test rows, requests){waited}"


def _of_blocks(share: float | None) -> str | None:
    return f"{share:.0%} of the blocks' weights" if share is not None else None


def _energy(work: Work | None) -> str | None:
    if work is None or not work.steps:
        return None
    parts = [f"{joules:,.1f} J{where}" for joules, where in ((work.energy_j, ""), (work.host_energy_j, " (CPU)")) if joules is not None]
    return "; ".join([*parts, *([work.energy_note] if work.energy_note else [])]) or None


def _tuning(result: Result) -> str | None:
    tuning = result.tuning
    if tuning is None:
        return None
    return f"{tuning.searched} hyperparameters, {tuning.trials} trials with seed {tuning.seed}, {f.duration(tuning.device_s)}; {tuning.file}"


def _engine(cell: Cell) -> str:
    work = cell.result.work
    if not cell.engine or work is None or not work.widths:
        return cell.engine
    return f"{cell.engine}; {'rows packed into streams of tokens' if work.streams else 'widths'} {', '.join(map(str, work.widths))}"


def _score(result: Result, split: str) -> str:
    return f.percent(getattr(result.scores[split], result.metric))


def _teacher(result: Result) -> str:
    teacher = result.teacher
    if teacher is None:
        return ""
    right = f", {f.percent(teacher.accuracy)}% right" if teacher.accuracy is not None else ""
    return f"{teacher.name}: {teacher.rows:,} rationales of training rows{right}"


def _phases(phases: Phases | None) -> list[tuple[str, str]]:
    values = dataclasses.asdict(phases) if phases else {}
    return [(title, f.duration(values[f"{name}_s"])) for name, title in times.PHASES.items() if values.get(f"{name}_s")]


FORECAST_HEADS = ("technique", "peak memory", "forecast", "error", "training", "forecast")


def forecast_lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line a row that was trained: its name and family, the texts under FORECAST_HEADS, the memory's relative error, and why there is no forecast."""
    lines = []
    for row in rows:
        cells = [c.result for c in row.cells if c.result.status == "ok" and c.result.memory and c.result.memory.peak_bytes and not c.untrained]
        if not cells:
            continue
        forecast = forecast_of(cells[0])
        peak = statistics.median(c.memory.peak_bytes for c in cells if c.memory and c.memory.peak_bytes)
        memory = forecast.memory.total if forecast and forecast.memory else None
        error = memory / peak - 1 if memory else None
        texts = [f.size(peak), f.size(memory), f"{f.signed(100 * error)}%" if error is not None else f.DASH, f.duration(row.train_s), _forecast_time(forecast)]
        reason = forecast.reason if forecast else "its model or data are not here"
        lines.append({"name": row.name, "family": row.family, "texts": texts, "error": error, "reason": reason})
    return lines


def _forecast_time(forecast: Forecast | None) -> str:
    if forecast is None or forecast.train_s is None:
        return f.DASH
    low, middle, high = forecast.train_s
    return f"{f.duration(middle)} [{f.duration(low)}, {f.duration(high)}]"


def _forecasts(rows: Sequence[Row]) -> dict[str, Any]:
    """What the template forecast.html reads."""
    lines = forecast_lines(rows)
    errors = [abs(line["error"]) for line in lines if line["error"] is not None]
    middle = f"{100 * statistics.median(errors):.1f}%" if errors else None
    return {"forecasts": lines if errors else [], "forecast_heads": FORECAST_HEADS, "forecast_error": middle}
