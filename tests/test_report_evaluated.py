"""What was evaluated beside the cells, in the report: merges as columns and in words, lm-evaluation-harness's tasks; nothing where nobody asked."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from report_cells import PROVENANCE, keep, result

from pipeline.core.files import write_json
from pipeline.records import evaluations
from pipeline.records.finished import select
from pipeline.reporting import evaluated
from pipeline.reporting.figures import Row
from pipeline.reporting.page import page
from pipeline.reporting.rows import make_rows, table_csv
from pipeline.reporting.text import markdown, warnings

RUN = PROVENANCE["started"]
NAMES = ("lora", "qlora", "zero_shot")


def merge(root: Path, cell: str, *ones: tuple[str, float, float, str], run: Any = RUN) -> Path:
    """merged.json of a cell: (precision, change in points, share left, verdict) each."""
    merged = [{"precision": p, "score": 0.8, "change": change, "drift": 0.0123, "base_drift": 0.02, "left": left, "verdict": verdict}
              for p, change, left, verdict in ones]
    file = root / "quick" / cell / "merged" / "merged.json"
    write_json(file, {"cell": cell, "run": run, "metric": "accuracy", "attached": 0.8, "effect": 0.1, "rows": 250, "merged": merged})
    return file


def suite(root: Path, cell: str, task: str, value: float, base: float, metric: str = "acc", **more: Any) -> None:
    metrics = {metric: {"value": value, "stderr": 0.02, "base": base, "change": value - base},
               "zzz": {"value": 9.0, "stderr": None, "base": None, "change": None}}
    write_json(root / "quick" / cell / "suites" / f"{task}.json",
               {"cell": cell, "run": RUN, "task": task, "lm_eval": "0.4.13", "rows": None, "merged": False, "metrics": metrics} | more)


@pytest.fixture
def beside(tmp_path) -> Path:
    for seed in (0, 1):
        for name in NAMES:
            keep(tmp_path / "results", result(name, 200 + seed, seed))
    return tmp_path / "evaluations"


def rows_of(beside: Path) -> dict[str, Row]:
    cells, _ = select(beside.parent / "results" / "quick", {"techniques": NAMES, "seeds": [0, 1], "train_rows": [200]})
    return {row.name: row for row in make_rows(cells, beside)}


def test_where_nothing_was_evaluated_nothing_is_said(beside):
    rows = list(rows_of(beside).values())
    html, text = page("quick", rows, []), markdown("quick", rows, [])
    assert not any(word in html + text for word in ("Merged bf16", "What else changed", "lm-evaluation-harness"))
    assert evaluated.suites(rows) == ([], []) and evaluated.told(rows) == []


def test_merges_are_columns_means_over_seeds_with_the_worst_verdict(beside):
    merge(beside, "lora-s0-n200", ("fp32", 0.0, 1.0, "kept"), ("bf16", -1.0, 0.9, "kept"), ("nf4", -4.0, 0.6, "base_changed"))
    merge(beside, "lora-s1-n200", ("fp32", 0.0, 1.0, "kept"), ("bf16", -2.0, 0.1, "rounded_away"), ("nf4", -6.0, 0.8, "kept"))
    rows = rows_of(beside)
    row = rows["lora"]
    assert (row.merged_bf16, row.merged_nf4, row.merged_int8) == (pytest.approx(-0.015), pytest.approx(-0.05), None)
    assert (row.merged_bf16_left, row.merged_bf16_verdict, row.merged_nf4_verdict) == (pytest.approx(0.5), "rounded_away", "base_changed")
    assert rows["qlora"].merged_bf16 is None
    html, text = page("quick", list(rows.values()), []), markdown("quick", list(rows.values()), [])
    for said in (html, text):
        assert "Merged bf16" in said and "Merged NF4" in said and "Merged int8" not in said, "a column where some cell has it"
        assert "drift 0.012; rounded away" in said and "is rounded away (50% of the adapter" in said
    assert "| −1.5 (drift 0.012; rounded away) |" in text
    (line,) = [line for line in csv.DictReader(io.StringIO(table_csv(list(rows.values())))) if line["name"] == "lora"]
    assert float(line["merged_bf16"]) == pytest.approx(-0.015) and line["merged_bf16_verdict"] == "rounded_away" and line["merged_int8"] == ""


def test_a_merge_that_went_wrong_is_told_and_others_are_not(beside):
    merge(beside, "lora-s0-n200", ("bf16", 0.0, -12.0, "rounded_away"), ("nf4", 0.0, 0.2, "rounded_away"), ("int8", 0.0, 0.9, "too_much"))
    merge(beside, "qlora-s0-n200", ("bf16", 0.0, 1.0, "kept"), ("nf4", 0.0, 1.0, "base_changed"))
    said = warnings(list(rows_of(beside).values()), [])
    about = [text for text in said if "merged into" in text]
    assert len(about) == 2 and "merged into int8, `lora` changed too much" in about[0]
    assert about[1].startswith("merged into bf16 and NF4, `lora` is rounded away (0% and 20% of the adapter's change is left)")


def test_figures_of_an_earlier_run_are_left_out_and_named(beside):
    file = merge(beside, "lora-s0-n200", ("bf16", -9.0, 0.0, "rounded_away"), run="2026-01-01T00:00:00+00:00")
    rows = rows_of(beside)
    assert rows["lora"].merged_bf16 is None
    (said,) = evaluated.told(list(rows.values()))
    assert str(file) in said and said.endswith("run pipeline.evaluate anew")


@pytest.mark.parametrize("content", [
    "", "[]", '{"run": "RUN", "metric": "accuracy"}', '{"run": "RUN", "metric": "a", "attached": 1, "effect": 1, "rows": 1, "merged": [{}]}',
])
def test_a_damaged_file_is_a_warning_and_no_figure(beside, capsys, content):
    file = merge(beside, "lora-s0-n200", ("bf16", -9.0, 0.0, "rounded_away"))
    file.write_text(content.replace("RUN", RUN))
    assert rows_of(beside)["lora"].merged_bf16 is None
    assert f"warning: {file}" in capsys.readouterr().err


def test_tasks_stand_beside_forgetting_with_their_change_against_the_base(beside):
    suite(beside, "lora-s0-n200", "arc_easy", 0.50, 0.60)
    suite(beside, "lora-s1-n200", "arc_easy", 0.54, 0.60)
    suite(beside, "qlora-s0-n200", "wikitext", 31.25, 30.0, "word_perplexity", rows=100)
    rows = list(rows_of(beside).values())
    heads, lines = evaluated.suites(rows)
    assert heads == ["arc_easy, acc", "wikitext, first 100 rows, word_perplexity"]
    assert {row.name: texts for row, texts in lines} == {
        "lora": [("0.520 ± 0.020", "−0.080 (base 0.600)"), ("—", "")], "qlora": [("—", ""), ("31.2 ± 0.020", "+1.250 (base 30.0)")],
    }
    html, text = page("quick", rows, []), markdown("quick", rows, [])
    assert html.index("What else changed") > html.index("Learned against forgotten")
    assert "0.520 ± 0.020" in html and "0.520 ± 0.020 (−0.080 (base 0.600))" in text


def test_a_cell_without_a_time_of_its_start_is_evaluated_all_the_same(tmp_path):
    cell = result("lora", provenance={})
    merge(tmp_path, cell.cell, ("bf16", -1.0, 0.9, "kept"), run=None)
    found = evaluations.read(tmp_path, cell)
    assert found.truth and found.truth.merged[0].change == -1.0 and found.old == ()
