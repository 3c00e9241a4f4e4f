"""benchmarks.differences: known differences of finished cells, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from report_cells import result

from benchmarks import differences
from pipeline.core.files import read_json, write_jsonl
from pipeline.records.results import Forgetting, write

ROWS = 400


def keep(root: Path, experiment: str, label: str, right: int, seed: int, rows: int = 200, **more: Any) -> None:
    """A cell that answers the first `right` rows right, but for `seed` rows at the end of them."""
    made = dataclasses.replace(result(label.partition("+")[0], right=right // 2, seed=seed, rows=rows), experiment=experiment, **more)
    folder = root / experiment / f"{label}-s{seed}-n{rows}"
    write(folder, made)
    write_jsonl(folder / "predictions.jsonl", [{"id": str(i), "split": "test", "correct": i < right and not right - seed <= i < right} for i in range(ROWS)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed in range(4):
        for experiment, gain in (("first", 40), ("second", 20)):
            keep(tmp_path, experiment, "full+tuned", 200, seed)
            keep(tmp_path, experiment, "step_by_step+tuned", 200 + gain, seed)
        keep(tmp_path, "first", "lora+r8-tuned", 200, seed)
    keep(tmp_path, "first", "zero_shot", 100, 0)
    return tmp_path


def test_a_pair_s_difference_is_that_of_its_cells_and_the_mean_of_all_is_the_mean(root):
    made = differences.lines(root, ["first", "second"], [("full", "step_by_step"), ("zero_shot", "lora+r8"), ("lora", "step_by_step")])
    assert [(line["experiment"], line["other"]) for line in made] == [
        ("first", "step_by_step"), ("first", "lora+r8"), ("second", "step_by_step"), ("all", "step_by_step")]
    first, beyond, second, whole = made
    assert (first["difference"], second["difference"]) == (pytest.approx(0.1), pytest.approx(0.05)) and first["seeds"] == 4 and first["test_rows"] == ROWS
    assert beyond["seeds"] == 1 and beyond["difference"] == pytest.approx((200 - 1.5 - 100) / ROWS) and beyond["one_is"] == 0.25
    assert whole["difference"] == pytest.approx(0.075) and whole["lines"] == 2
    halves = [(line["high"] - line["low"]) / 2 for line in (first, second, whole)]
    assert halves[2] == pytest.approx((halves[0] ** 2 + halves[1] ** 2) ** 0.5 / 2) and whole["low"] < 0.075 < whole["high"]
    assert all(line["corrected"] >= line["p"] for line in made[:3]) and first["corrected"] < 0.01


def test_the_table_and_the_file_say_the_same(root, tmp_path, capsys):
    to = tmp_path / "made.json"
    assert differences.main([f"results={root}", "experiments=first,second", "pairs=full:step_by_step", f"to={to}"]) == 0
    said = capsys.readouterr().out
    assert "| first | 200 | step_by_step beyond full | 59.6 | 49.6 | +10.0 [+" in said and "| all 2 | | step_by_step beyond full | | | +7.5 [" in said
    assert differences.main(["table", str(to)]) == 0 and capsys.readouterr().out == said
    assert len(read_json(to)["lines"]) == 3


def test_what_is_forgotten_is_compared_over_seeds(tmp_path):
    for seed, (lora, full) in enumerate(((0.10, 0.30), (0.12, 0.34), (0.14, 0.38))):
        for label, change in (("lora", lora), ("full", full), ("zero_shot", 0.0)):
            keep(tmp_path, "first", label, 100, seed, forgetting=Forgetting(20.0 * (1 + change), 20.0, 0.9 - change, 0.9))
    pairs = [("lora", "full"), ("zero_shot", "lora")]
    apart, beyond = differences.lines(tmp_path, ["first"], pairs, figure="perplexity")[:2]
    assert apart["difference"] == pytest.approx(0.22) and apart["one_is"] == pytest.approx(0.12) and apart["seeds"] == 3
    half = 4.303 * (0.02**2 / 3) ** 0.5  # Welch's with one sample that does not vary: Student's with two degrees of freedom
    assert (beyond["low"], beyond["high"]) == (pytest.approx(0.12 - half, abs=1e-4), pytest.approx(0.12 + half, abs=1e-4))
    assert differences.lines(tmp_path, ["first"], pairs, figure="pairs")[0]["difference"] == pytest.approx(-0.22)
    assert differences.lines(tmp_path, ["first"], pairs, figure="lambada") == []
    assert differences.main([f"results={tmp_path}", "experiments=first", "pairs=lora:full", "figure=speed"]) == 2


def test_what_cannot_be_compared_is_said(root, capsys):
    for words, message in (
        (["experiments=first", "pairs=full"], "is not of the form one:other"), (["experiments=first"], "name what is compared"),
        (["experiments=third", "pairs=full:lora"], "holds no finished cell"),
        (["experiments=first", "pairs=full:dora"], "none of the pairs has finished cells"),
        (["experiments=first", "pairs=full:step_by_step", "tuned=false"], "none of the pairs"),
    ):
        assert differences.main([f"results={root}", *words]) == 2 and message in capsys.readouterr().err, words
