"""Tables and marked figures of README.md and docs/ are those of the committed result files (benchmarks/tables.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import rounding, speed_files, tables
from pipeline.core.files import UserError
from pipeline.reporting.compare import ROUNDED_ROWS
from pipeline.stats.tiers import FEW


def test_every_table_and_marked_figure_is_its_files(capsys):
    assert tables.main(["check=true"]) == 0, capsys.readouterr().out


def test_pages_have_tables_and_figures_to_check():
    text = "".join(path.read_text() for path in tables.pages())
    assert {block[2] for block in tables.BLOCK.finditer(text)} == set(tables.TABLES)
    assert len(tables.CLAIM.findall(text)) == text.count(" :: ") // 2 >= 20, "every mark follows a figure"


def test_targets_are_the_speed_files_judged_by_todays_rule():
    stored = {r["id"]: r for path in speed_files.FOLDER.glob("speed-*.json") for r in speed_files.rows(path)}
    for row in speed_files.rows(speed_files.FOLDER / "targets.json"):
        assert row == {key: speed_files.judged(stored[row["id"]])[key] for key in speed_files.TARGET_KEYS}, "run: python -m benchmarks.tables"


def test_what_is_said_of_false_pairs_is_what_was_simulated():
    settings = json.loads((speed_files.FOLDER / "tiers.json").read_text())["settings"]
    worst, alone = max(s["wrong"] for s in settings if s["techniques"] > FEW and s["ahead"]), next(s["any"] for s in settings if s["techniques"] == 7)
    for page in ("docs/columns.md", "docs/statistics.md"):
        text = " ".join((tables.ROOT / page).read_text().split())
        assert f"in up to {worst:.0%} of experiments" in text and f"in {alone:.0%} of" in text


def test_what_compare_says_of_rounding_is_what_was_measured():
    measured = json.loads((speed_files.FOLDER / "rounding.json").read_text())
    assert (max(row["flips"] for row in measured), measured[0]["rows"]) == ROUNDED_ROWS
    assert {row["variant"] for row in measured} == set(rounding.VARIANTS)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one page and two files."""
    (tmp_path / "a.json").write_text('[{"id": "x", "ratio": 2.449, "share": 0.125, "spread": [1, 3]}]')
    (tmp_path / "b.md").write_text("| technique | train, s |\n| --- | --- |\n| `lora` | **1,234.5** (GPU) |\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "pages", lambda: [tmp_path / "p.md"])
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "| a |"})
    monkeypatch.setattr(speed_files, "refresh", lambda folder: None)
    return tmp_path / "p.md"


@pytest.mark.parametrize(("text", "wrong"), [
    ("**2.45x**<!-- a.json :: x :: ratio --> and 2x<!-- a.json :: x :: ratio --> of 3x<!-- a.json :: x :: spread.1 -->", ""),
    ("12.5%<!-- a.json :: x :: share -->, 1,234.5<!-- b.md :: lora :: train, s -->", ""),
    ("2.4x<!-- a.json :: x :: ratio -->, 2.44x<!-- a.json :: x :: ratio -->", "2.44x is written where a.json, x, has 2.449 as ratio"),
    ("1,235<!-- b.md :: lora :: train, s --> 12%<!-- a.json :: x :: share --> 1,233<!-- b.md :: lora :: train, s -->", "1,233 is written"),
    ("<!-- table: one -->\n| b |\n\n<!-- end -->", "the table 'one'"),
])
def test_a_figure_or_table_that_is_another_is_named(page, capsys, text, wrong):
    page.write_text(text)
    assert tables.main(["check=true"]) == bool(wrong)
    told = capsys.readouterr().out
    assert (wrong or "its file's") in told and told.count("\n") == 1
    assert page.read_text() == text, "a check writes nothing"


def test_a_table_is_written_in_its_place(page):
    page.write_text("a\n<!-- table: one -->\n| b |\n\n<!-- end -->\nz\n")
    assert tables.main([]) == 0 and page.read_text() == "a\n<!-- table: one -->\n\n| a |\n\n<!-- end -->\nz\n"
    assert tables.main(["check=true"]) == 0


@pytest.mark.parametrize(("text", "said"), [
    ("1<!-- c.json :: x :: ratio -->", "c.json, which is not there"), ("1<!-- a.json :: y :: ratio -->", "no number ratio of y"),
    ("1<!-- b.md :: lora :: other -->", "no number other of lora"), ("<!-- table: two -->\n<!-- end -->", "asks for the table 'two'"),
])
def test_a_mark_that_names_nothing_is_one_sentence(page, capsys, text, said):
    page.write_text(text)
    assert tables.main([]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert page.read_text() == text


def test_a_missing_row_is_no_value(page):
    with pytest.raises(UserError, match="no number"):
        tables.value("b.md", "full", "train, s")
