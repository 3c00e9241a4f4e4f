"""The report's part on data dependency: what it takes for a technique, its words for known curves, where it appears."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml
from report_cells import BASE_NOTE, CURVES, GRID, keep, result, write_sizes

from pipeline import cells, report
from pipeline.cell import grid as cell_grid
from pipeline.core.files import UserError
from pipeline.records.finished import select
from pipeline.records.results import read
from pipeline.reporting.growth import charts, curves, growth, remarks, rows_in_words, sentences, summary, table
from pipeline.reporting.rows import make_rows
from pipeline.stats.learning_curve import RowsFor

SIZES = (16, 40, 100, 250)
THREE = {name: CURVES[name] for name in ("zero_shot", "few_shot", "lora")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("sizes") / "results"
    write_sizes(root, seeds=2, test_rows=800, sizes=SIZES, curves=THREE)
    return make_rows(select(root / "quick", {"techniques": list(THREE), "seeds": [0, 1], "train_rows": list(SIZES)})[0])


def test_what_trains_gets_a_curve_and_what_does_not_a_line(rows):
    actual = growth(rows)
    assert {one.name: one.curve.kind for one in actual.lines} == {"lora": "power", "few_shot": "constant", "zero_shot": "constant"}
    assert actual.lines[0].curve.sizes == (19, 48, 120, 300), "validation rows are labelled too"
    assert (actual.smallest, actual.largest) == (19, 300)
    assert actual.target == pytest.approx((actual.lines[0].last.value + actual.lines[2].first.value) / 2)
    assert re.fullmatch(r"half of the way from `zero_shot` \(\d\d\.\d%\) to where `lora` ends \(\d\d\.\d%\)", actual.about_target)


def test_what_overtakes_what_is_said_with_its_interval(rows):
    output = sentences(growth(rows))
    match = re.fullmatch(r"`lora` overtakes `few_shot` at n = (\d+) \[(\d+)–(\d+)\] labelled rows\.", output[0])
    a, b, c = CURVES["lora"]
    assert match and int(match[2]) <= (b / (a - 0.40)) ** (1 / c) <= int(match[3])
    assert "`few_shot` is ahead of `zero_shot` at every size from 19 to 300 rows." in output


def test_rows_for_an_accuracy_that_is_asked_for(rows):
    actual = growth(rows, 0.45)
    heads, lines = table(actual)
    assert heads == ["Technique", "Rows for 45.0%", "At 19 rows, %", "At 300 rows, %"] and actual.about_target == ""
    by_name = {line[0]: line for line in lines}
    match = re.fullmatch(r"(\d+) \[(\d+)–(\d+)\]", by_name["lora"][1])
    a, b, c = CURVES["lora"]
    assert match and int(match[2]) <= (b / (a - 0.45)) ** (1 / c) <= int(match[3])
    assert by_name["zero_shot"][1] == "not reached" and by_name["few_shot"][1] in ("not reached", "cannot be told")
    assert summary(actual)[-1].startswith("Labelled rows for 45.0%: `lora` ")


@pytest.mark.parametrize("target", [0.0, 1.0, 60.0])
def test_a_target_that_is_no_fraction_is_refused(rows, target):
    with pytest.raises(UserError, match=rf"report\.target is {target:g}; it is an accuracy between 0 and 1"):
        growth(rows, target)


@pytest.mark.parametrize(
    ("found", "constant", "words"),
    [
        ((140.2, 90.4, 230.1), False, "140 [90–230]"),
        ((1500.0, 1100.0, None), False, "1,500 [1,100 to over 1,800]"),
        ((None, 1100.0, None), False, "not reached [1,100 to over 1,800]"),
        ((None, None, None), False, "not reached"),
        ((25.0, 19.0, 40.0), False, "25 [under 19 to 40]"),
        ((19.0, 19.0, 19.0), False, "at most 19"),
        ((19.0, 19.0, 19.0), True, "at any size"),
        ((19.0, 19.0, None), True, "cannot be told"),
        ((None, 19.0, None), True, "cannot be told"),
    ],
)
def test_rows_in_words(found, constant, words):
    assert rows_in_words(RowsFor(0.5, *found, 19, 1800), constant) == words


def test_the_chart_has_a_line_a_band_and_points_with_words(rows):
    colour = {row.family: "f1" for row in rows}
    spec = curves(growth(rows), colour, 600, 350)
    layers = [(layer["mark"]["type"], layer["data"]["values"]) for layer in spec["layer"]]
    assert sum(kind == "area" for kind, _ in layers) == sum(kind == "line" for kind, _ in layers) == 3
    dots = [one for kind, values in layers for one in values if kind == "point" and "tip" in one]
    assert len(dots) == 3 * len(SIZES) and all(one["href"].startswith("#cells-") for one in dots)
    said = r"lora \| 48 labelled rows: [\d.]+% \| seeds [\d.]+, [\d.]+ \| curve [\d.]+% \[[\d.]+–[\d.]+\]"
    assert any(re.fullmatch(said, one["tip"]) for one in dots)
    assert sum("strokeDash" in layer["mark"] and layer["mark"]["type"] == "line" for layer in spec["layer"]) == 1, "few_shot and zero_shot share a colour"
    assert not any(isinstance(v, float) and math.isnan(v) for _, values in layers for one in values for v in one.values())


def test_the_chart_is_drawn_wide_and_narrow(rows, drawn):
    colour = {row.family: "f1" for row in rows}
    for (name, svg), least in zip(charts(growth(rows), colour), (600, 250), strict=True):
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
        assert svg.startswith('<svg class="vega"') and name in ("wide", "narrow") and least < width < least + 160
        assert "var(--f1)" in svg and 'href="#cells-' in svg and "NaN" not in svg and "https:" not in svg


def test_few_sizes_make_no_curves(tmp_path):
    for rows in (16, 40):
        keep(tmp_path, result("lora", 120 + rows, rows=rows))
    few = make_rows(select(tmp_path / "quick", {"techniques": ["lora"], "seeds": [0], "train_rows": [16, 40]})[0])
    assert growth(few) is None and summary(None) == []


def test_one_seed_and_a_technique_with_few_sizes_are_said(tmp_path):
    write_sizes(tmp_path, seeds=1, test_rows=100, sizes=SIZES, curves={"lora": CURVES["lora"]})
    write_sizes(tmp_path, seeds=1, test_rows=100, sizes=SIZES[:2], curves={"full": CURVES["full"]})
    grid = {"techniques": ["lora", "full"], "seeds": [0], "train_rows": list(SIZES)}
    actual = growth(make_rows(select(tmp_path / "quick", grid)[0]))
    output = " ".join(remarks(actual))
    assert "One seed of `lora`: the bands leave the spread of training out" in output and "Too few sizes for a curve: `full`." in output
    assert actual.about_target.startswith("half of the way from the lowest curve's start")


@pytest.mark.slow
def test_the_page_has_the_part_where_there_are_three_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cell_grid, "experiments", lambda: tmp_path / "experiments")
    (tmp_path / "experiments" / "quick").mkdir(parents=True)
    write_sizes(tmp_path / "results", seeds=2, test_rows=120, sizes=SIZES[:3], curves=THREE)
    pages = []
    for sizes in (SIZES[:3], SIZES[:2]):
        grid = {**GRID, "techniques": list(THREE), "train_rows": list(sizes)}
        Path(tmp_path / "experiments" / "quick" / "params.yaml").write_text(yaml.safe_dump({"experiment": "quick", "grid": grid}))
        words = ["experiments=quick", f"paths.results={tmp_path}/results", f"paths.report={tmp_path}/report", "report.target=0.45"]
        assert report.main(words) == 0
        pages.append((tmp_path / "report" / "quick" / "index.html").read_text())
        assert ("Labelled rows for 45.0%" in capsys.readouterr().out) == (len(sizes) == 3)
    assert "<h2>Data dependency</h2>" in pages[0] and "against training rows" not in pages[0] and BASE_NOTE in pages[0]
    assert "<h2>Data dependency</h2>" not in pages[1] and "against training rows" in pages[1]
    assert report.main([*words[:3], "report.target=7"]) == 2


@pytest.mark.slow
def test_from_cells_to_curves(overrides, imports, tmp_path, monkeypatch, capsys):
    """The tiny model on the separable task: LoRA learns it with the rows, floor of steps and all, and overtakes the untouched base."""
    monkeypatch.setattr(cell_grid, "experiments", lambda: tmp_path / "experiments")
    (tmp_path / "experiments" / "data_size_quick").mkdir(parents=True)
    grid = {"techniques": ["zero_shot", "lora"], "seeds": [0, 1], "train_rows": [16, 32, 64]}
    Path(tmp_path / "experiments" / "data_size_quick" / "params.yaml").write_text(yaml.safe_dump({"experiment": "data_size_quick", "grid": grid}))
    words = ["experiments=data_size_quick", *overrides, "train.lr=1e-2"]
    assert cells.main(words) == 0 and report.main(words) == 0
    steps = {(r.train_rows, r.work.steps) for r in (read(p) for p in (tmp_path / "results" / "data_size_quick").glob("lora-*"))}
    assert steps == {(16, 12), (32, 12), (64, 12)}
    assert "Labelled rows for" in capsys.readouterr().out
    assert "<h2>Data dependency</h2>" in (tmp_path / "report" / "data_size_quick" / "index.html").read_text()
