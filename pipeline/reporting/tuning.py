"""Tuning: untuned beside tuned figures, what the search took, and the expected best validation metric after k random trials.

Library of `python -m pipeline.report`; pipeline/records/tuned.py reads the files that `python -m pipeline.tune` wrote.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline.core.compose import SUFFIX
from pipeline.core.files import UserError
from pipeline.records.finished import COMPARABLE
from pipeline.records.tuned import Edge, Tuned, expected_best
from pipeline.reporting import plot
from pipeline.reporting import words as f
from pipeline.reporting.charts import beside, percent
from pipeline.reporting.figures import Row
from pipeline.reporting.plot import Scale
from pipeline.reporting.text import rows_in_words
from pipeline.reporting.vega import Axis, Chart, Dot, Spec, inline, linear

WIDE, NARROW = (600, 270), (250, 250)
HEADS = ("Technique", "Untuned test, %", "Tuned test, %", "Validation, %", "Searched", "Trials", "Time")
Tunings = Mapping[tuple[str, str], Tuned]


@dataclass(frozen=True)
class Line:
    """A technique at one number of training rows: its tuning, and its rows of the comparison, untuned and tuned."""

    tuned: Tuned
    group: str
    """The number of training rows, as the grid says it."""
    before: Row | None
    after: Row | None

    @property
    def family(self) -> str:
        row = self.before or self.after
        assert row is not None
        return row.family


def part(rows: Sequence[Row], tunings: Tunings, colour: Mapping[str, str]) -> dict[str, Any]:
    """What the template shows: tuning (heads, lines, charts, remarks), None where nothing of the report was tuned."""
    lines = _lines(rows, tunings)
    if not lines:
        return {"tuning": None}
    several = len({line.group for line in lines}) > 1
    table = [(colour[line.family], _cells(line, several)) for line in lines]
    return {"tuning": {"heads": HEADS, "lines": table, "charts": _charts(lines, colour), "remarks": remarks(lines)}}


def summary(rows: Sequence[Row], tunings: Tunings) -> list[str]:
    """What table.md says of it, a sentence a technique."""
    return [
        f"`{line.tuned.technique}` tuned ({len(line.tuned.trials)} trials, {f.duration(line.tuned.device_s)}): {f.percent(line.after.test)}% "
        f"against {f.percent(line.before.test)}% untuned."
        for line in _lines(rows, tunings) if line.before and line.after
    ]


def _lines(rows: Sequence[Row], tunings: Tunings) -> list[Line]:
    by_name, lines = {(r.technique, r.group): r for r in rows}, []
    for (name, group), tuned in tunings.items():
        after = f"{name}-tuned" if "+" in name else f"{name}{SUFFIX}"
        line = Line(tuned, group, by_name.get((name, group)), by_name.get((after, group)))
        lines += [line] if line.before or line.after else []
    for line, key in itertools.product(lines, COMPARABLE):
        ours, reported = getattr(line.tuned, key), getattr(rows[0].results[0], key)
        if ours != reported:
            path = f"{line.tuned.experiment}/{line.tuned.technique}-n{line.group}.yaml"
            raise UserError(f"the tuned file {path} has {key}={ours}, the cells {key}={reported}, which no ranking may mix; move the file away or tune again")
    return sorted(lines, key=lambda line: (line.group, -line.tuned.validation, line.tuned.technique))


def _cells(line: Line, several: bool) -> list[tuple[str, str]]:
    """(text, small text below it) of each column."""
    tuned = line.tuned
    tests = [row.test if row else None for row in (line.before, line.after)]
    gain = f"{f.points(tests[1] - tests[0])} points" if tests[0] is not None and tests[1] is not None else ""
    chosen = ", ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in tuned.settings.items())
    lost = f"{tuned.failed} without a value" if tuned.failed else "" if len(tuned.trials) == tuned.budget else f"of {tuned.budget}: all there are"
    return [
        (tuned.technique, rows_in_words(line.group) if several else ""), (f.percent(tests[0]), ""), (f.percent(tests[1]), gain),
        (f.percent(tuned.validation), "; ".join(map(_at_edge, tuned.edges))), (str(len(tuned.searched)), chosen),
        (str(len(tuned.trials)), lost), (f.duration(tuned.device_s), "packed" if tuned.packed else ""),
    ]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f.hyperparameter(value)


def _at_edge(edge: Edge) -> str:
    name = edge.key.rpartition(".")[2]
    return f"{name} at its {edge.side} edge" + (", widened: again" if edge.still else ", widened" if edge.widened else "")


def remarks(lines: Sequence[Line]) -> list[str]:
    """What a reader of these figures should know, as far as it holds here."""
    budgets = sorted({line.tuned.budget for line in lines})
    unequal = f"Budgets differ ({', '.join(map(str, budgets))} trials): these techniques were not tuned alike." if len(budgets) > 1 else ""
    missing = [line.tuned.technique for line in lines if not line.after]
    still = [line.tuned.technique for line in lines if any(e.still or not e.widened for e in line.tuned.edges)]
    return [text for text in (
        "Every technique may have the same number of random trials; those that ran out of memory, diverged or ended with an error are among them. Trials see "
        "training and validation rows of one seed. Of those within a standard error of the highest the one nearest to the technique's own settings is taken, "
        "for all seeds. Its validation figure is one of many and may flatter: compare by the test columns.",
        unequal,
        f"The best value of {_named(still)} lies at the edge of what was searched: a better one may lie beyond." if still else "",
        f"No tuned cell of {_named(missing)} has run: python -m pipeline.cells experiments={lines[0].tuned.experiment} tuned=true" if missing else "",
    ) if text]


def _named(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def _charts(lines: Sequence[Line], colour: Mapping[str, str]) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """(number of training rows in words, [(CSS class, drawing)]), one for every number of rows that has a curve."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if len(line.tuned.values) > 1:
            groups.setdefault(line.group, []).append(line)
    several = len(groups) > 1
    sizes = {"wide": WIDE, "narrow": NARROW}
    return [(rows_in_words(group) if several else "", [(name, inline(curves(part, colour, *size))) for name, size in sizes.items()])
            for group, part in groups.items()]


def curves(lines: Sequence[Line], colour: Mapping[str, str], width: int, height: int) -> Spec:
    """The expected best after k trials, a line a technique."""
    values = {line.tuned.technique: expected_best(line.tuned.values) for line in lines}
    most = max(len(each) for each in values.values())
    x = Scale(1, most, 0, width)
    whole = {float(at): f"{at:,.0f}" for at in dict.fromkeys([1.0, *(float(round(at)) for at in x.ticks(6))]) if 1 <= at <= most}
    y = plot.scale([v for each in values.values() for v in each], height, 0)
    about = f"Expected best validation {lines[0].tuned.metric} after k random trials, a curve for each of {len(lines)} techniques"
    title = f"Random trials (expected best validation {lines[0].tuned.metric}, %)"
    chart = Chart(width, height, Axis(title, x, whole, grid=False), linear("", y, percent, 5), about)
    for line, dash in zip(lines, plot.dashes([line.family for line in lines]), strict=True):
        name, each = line.tuned.technique, values[line.tuned.technique]
        chart.line(list(enumerate(each, 1)), colour[line.family], dash)
        tips = [f"{name} | {k} trial{'s' * (k > 1)}: {f.percent(value)}% expected" for k, value in enumerate(each, 1)]
        chart.dots([Dot(k, value, colour[line.family], tip) for k, (value, tip) in enumerate(zip(each, tips, strict=True), 1)], 20)
    beside(chart, [(len(each), each[-1], name, "ink") for name, each in values.items()])
    return chart.spec()
