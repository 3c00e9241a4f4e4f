"""The race's page: the statement, its course as a drawing, the table, and the price of more certainty as a curve.

Library of `python -m pipeline.race`; drawings are Vega-Lite's, made here, offline.
"""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from pipeline.core.files import atomic_folder, write_json, write_text
from pipeline.racing.drive import Driver
from pipeline.racing.words import Told, markdown
from pipeline.reporting import vega
from pipeline.reporting.page import TEMPLATES, template
from pipeline.reporting.plot import scale
from pipeline.reporting.vega import Axis, Chart, Dot, Spec, linear

WIDTH, LINE = 380, 20  # which a phone shows at full size


def write(folder: Path, experiment: str, driver: Driver, told: Told, metric: str) -> Path:
    """Write folder/{index.html, race.md, race.json, charts/}; returns the page's path."""
    import dataclasses

    charts = {"course": course(driver)} if any(driver.race.answers.runs) else {}
    charts |= {"price": price(told)} if any(hours is not None for _, hours in told.by_within) else {}
    css = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    page = template("race.html").render(experiment=experiment, told=told, metric=metric, css=css, course=charts.get("course"), price=charts.get("price"))
    with atomic_folder(folder, "race.json") as beside:
        beside.mkdir()
        write_text(beside / "index.html", page)
        write_text(beside / "race.md", markdown(experiment, told))
        write_json(beside / "race.json", dataclasses.asdict(told))
        for name, drawn in vega.files(charts).items():
            (beside / name).parent.mkdir(exist_ok=True)
            (beside / name).write_bytes(drawn)
    return folder / "index.html"


def course(driver: Driver) -> Spec:
    """A line a technique that ran over the hours of the race: a dot a seed, a ring where it left; the names at the left."""
    race = driver.race
    order = [k for k in (*race.alive, *sorted(race.left, key=lambda k: -race.left[k].spent_s)) if race.answers.runs[k]]
    last = max([race.spent_s, 1e-9]) / 3600
    rows = {k: len(order) - place for place, k in enumerate(order)}
    height = max(60.0, LINE * len(order))
    x = scale([0.0, last], 0, WIDTH, floor=0.0)
    y = Axis("", scale([0.5, len(order) + 0.5], height, 0, room=0.0), {float(row): race.arms[k].name for k, row in rows.items()}, grid=False)
    chart = Chart(WIDTH, height, linear("hours", x, lambda value: f"{value:.3g}"), y, f"the course of the race: {len(order)} techniques over {last:.3g} hours")
    ends = [race.left[k].spent_s / 3600 if k in race.left else last for k in order]
    chart.spans([(rows[k], 0.0, end, "faint" if k in race.left else "f1") for k, end in zip(order, ends, strict=True)])
    seeds = [(at / 3600, k) for at, k in race.course if k in rows]
    chart.seeds([(at, rows[k]) for at, k in seeds], "f1")
    dots = [Dot(end, rows[k], "faint" if k in race.left else "f1", f"{race.arms[k].name} | {_tip(driver, k)}", hollow=k in race.left)
            for k, end in zip(order, ends, strict=True)]
    chart.dots(dots)
    return chart.spec()


def _tip(driver: Driver, arm: int) -> str:
    race = driver.race
    runs = len(race.answers.runs[arm])
    level = f"{100 * race.answers.level(arm):.1f}% over {runs} seeds" if runs else "not run"
    return f"{level} | {100 * race.left[arm].difference:.1f} points below {race.arms[race.left[arm].by].name}" if arm in race.left else level


def price(told: Told) -> Spec:
    """Hours beyond those spent against the points within which the chosen one is to be."""
    points = [(within, hours) for within, hours in told.by_within if hours is not None]
    x, y = scale([within for within, _ in told.by_within], 0, WIDTH), scale([*(hours for _, hours in points), 0.0], 200, 0, floor=0.0)
    chart = Chart(WIDTH, 200, linear("within, points", x, lambda value: f"{value:g}"), linear("more hours", y, lambda value: f"{value:.2g}"),
                  "hours that a decision would take against the points that it is to be within")
    chart.line(points, "f1")
    chart.dots([Dot(within, hours, "f1", f"within {within:g} points | {hours:.2g} more hours") for within, hours in points])
    return chart.spec()
