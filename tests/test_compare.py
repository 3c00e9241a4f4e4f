"""Two result sets told apart: what differs is said once, what moved is told from seed noise, costs only where machines are alike."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_cells import HARDWARE, PROVENANCE, diverged, keep, oom, result

from pipeline import compare
from pipeline.core.files import read_jsonl, write_jsonl
from pipeline.reporting import compare as drift

SEEDS = (0, 1, 2)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the same nine cells."""
    for name, right in (("zero_shot", 120), ("full", 190), ("lora", 195)):
        for seed in SEEDS:
            keep(tmp_path / "a", result(name, right + (3 * seed if name != "zero_shot" else 0), seed))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def cells(folder: Path) -> list[Path]:
    return sorted(p.parent for p in folder.rglob("result.json"))


def change(folder: Path, names: str, **values: Any) -> None:
    """Write other values into the results of cells whose names begin so."""
    for cell in cells(folder):
        if cell.name.startswith(names):
            raw = json.loads((cell / "result.json").read_text())
            for key, value in values.items():
                raw[key] = {**raw[key], **value} if isinstance(value, dict) and raw[key] else value
            (cell / "result.json").write_text(json.dumps(raw))


def spoil(folder: Path, names: str, share: float) -> None:
    """Make this share of the right answers wrong."""
    draw = random.Random(0)
    for cell in cells(folder):
        if cell.name.startswith(names):
            rows = read_jsonl(cell / "predictions.jsonl")
            write_jsonl(cell / "predictions.jsonl", [{**r, "correct": r["correct"] and draw.random() >= share} for r in rows])


def test_equal_sets_are_said_to_be_equal(sides, capsys):
    assert compare.main([*map(str, sides), "fail=true"]) == 0
    told = capsys.readouterr().out
    assert "All 9 shared cells of quick gave the same answers." in told and "settings are the same" in told and "moved" not in told


def test_what_differs_is_said_once_with_the_number_of_cells(sides):
    change(sides[1], "", provenance={"packages": {**PROVENANCE["packages"], "torch": "2.14.0"}, "data_sha256": "other"}, hardware={"cpu": "another"})
    change(sides[1], "lora", config={"train": {"lr": 0.5}, "paths": {"data": "elsewhere"}, "seed": 9})
    found = drift.compare(*sides)
    assert {(c.kind, c.what, c.before, c.after, c.cells) for c in found.changes} == {
        ("version", "torch", "2.13.0+cpu", "2.14.0", 9), ("data", "data_sha256", PROVENANCE["data_sha256"], "other", 9),
        ("hardware", "cpu", HARDWARE["cpu"], "another", 9), ("config", "train.lr", None, 0.5, 3),
    }
    assert "a move may be the data's" in drift.text(found) and "machines differ (cpu)" in drift.text(found)


def test_a_technique_that_moved_is_told_and_its_neighbours_are_not(sides, capsys):
    spoil(sides[1], "full", 0.35)
    found = drift.compare(*sides)
    moved = {m.name: m for m in found.techniques}
    assert [name for name, m in moved.items() if m.moved] == ["full (200 rows)"] and found.moved
    assert moved["full (200 rows)"].high < -0.15 and moved["full (200 rows)"].flips > 100 and moved["lora (200 rows)"].flips == 0
    assert found.identical == 6 and compare.main([*map(str, sides), "fail=true"]) == 1 and compare.main([*map(str, sides)]) == 0
    assert "full (200 rows)" in capsys.readouterr().out


def test_a_small_change_is_seed_noise(sides):
    spoil(sides[1], "full", 0.02)
    found = drift.compare(*sides)
    assert not found.moved and found.identical < 9 and "No technique of quick moved" in drift.headline(found)


def test_with_one_seed_a_side_the_rows_alone_are_tested_and_that_is_said(sides):
    for folder in sides:
        for cell in cells(folder):
            if "-s0-" not in cell.name:
                shutil.rmtree(cell)
    found = drift.compare(*sides)
    assert not found.covers_seeds and "McNemar" in drift.text(found)


def test_costs_are_told_beyond_their_tolerance_and_on_like_machines_alone(sides):
    change(sides[1], "lora", phases={"train_s": 184.0}, memory={"peak_bytes": int(1.63e9)}, size={"artefact_bytes": 9_787_977})
    found = {(c.name, c.figure): c for c in drift.compare(*sides).costs}
    assert set(found) == {("lora (200 rows)", "train_s"), ("lora (200 rows)", "artefact_bytes")}, "memory is within its 2%"
    assert {c.figure for c in drift.compare(*sides, tolerance=3.0).costs} == {"artefact_bytes"}
    change(sides[1], "lora", packed=True)
    assert {c.figure for c in drift.compare(*sides).costs} == {"artefact_bytes"}, "a packed run's time is not its own"
    change(sides[1], "lora", packed=False, hardware={"gpu": "NVIDIA H200"})
    far = drift.compare(*sides)
    assert {c.figure for c in far.costs} == {"artefact_bytes"} and "machines differ (gpu)" in (far.uncosted or "")


def test_another_cpu_or_other_threads_are_called_rounding(sides):
    """Threads that only one side recorded are no difference; equal ones neither."""
    assert drift.compare(*sides).rounding is None
    change(sides[1], "", hardware={"threads": 2})
    assert drift.compare(*sides).rounding is None and not drift.compare(*sides).changes
    change(sides[0], "", hardware={"threads": 1})
    spoil(sides[1], "lora-s0", 0.03)
    found = drift.compare(*sides)
    flips = max(m.flips for m in found.cells)
    assert found.rounding == drift.Rounding(["threads"], True, flips) and flips > 0
    assert [(c.what, c.before, c.after) for c in found.changes] == [("threads", 1, 2)]
    assert f"other threads (threads): figures may differ by rounding (one seed of quick: up to {drift.ROUNDED_ROWS[0]} of 200 rows," in drift.text(found)
    assert "and nothing else differs" in drift.text(found) and found.uncosted == "the machines differ (threads), so times, energy and memory are not comparable"
    assert f"Up to {flips} of a cell's 250 rows" in drift.text(found)
    change(sides[1], "lora", config={"train": {"lr": 0.5}})
    settings = drift.compare(*sides)
    assert settings.rounding and not settings.rounding.alone and "beside what else is not the same" in drift.text(settings)
    for side, gpu in zip(sides, ("NVIDIA H200", "NVIDIA H100"), strict=True):
        change(side, "", hardware={"device": "cuda", "gpu": gpu})
    card = drift.compare(*sides)
    assert card.rounding and card.rounding.keys == ["gpu"] and "another GPU (gpu): figures may differ by rounding, beside" in drift.text(card)


def test_cells_of_one_side_and_lost_ones_are_named(sides, tmp_path):
    keep(sides[0], result("qlora", 180, 0))
    shutil.rmtree(next(c for c in cells(sides[1]) if c.name == "lora-s2-n200"))
    keep(sides[1], oom("full", 1))
    keep(sides[1], diverged("full", 2))
    found = drift.compare(*sides)
    assert found.only == {"A": ["lora-s2-n200", "qlora-s0-n200"], "B": []}
    assert found.lost == {"A": {}, "B": {"full-s1-n200": "oom", "full-s2-n200": "diverged"}} and found.shared == 8
    told = drift.markdown(found)
    assert "In A alone: lora-s2-n200, qlora-s0-n200." in told
    assert "Out of memory in B alone: full-s1-n200." in told and "Diverged in B alone: full-s2-n200." in told


def test_rows_that_both_answered_are_compared(sides):
    for cell in cells(sides[1]):
        write_jsonl(cell / "predictions.jsonl", read_jsonl(cell / "predictions.jsonl")[50:])
    whole = len(read_jsonl(cells(sides[0])[0] / "predictions.jsonl"))
    assert drift.compare(*sides).rows == whole - 50
    for cell in cells(sides[1]):
        (cell / "predictions.jsonl").unlink()
    found = drift.compare(*sides)
    assert not found.techniques and "No shared cell" in drift.headline(found)


@pytest.mark.parametrize("key", ["task", "model", "metric"])
def test_sides_of_several_tasks_models_or_metrics_are_not_compared(sides, capsys, key):
    change(sides[1], "full-s1", **{key: "macro_f1"})
    assert compare.main([*map(str, sides)]) == 2
    error = capsys.readouterr().err
    assert f"{key}=macro_f1, which no ranking may mix; move that cell out of both folders" in error and "full-s1-n200 has" in error and error.count("\n") == 1
    shutil.rmtree(sides[1] / "quick" / "full-s1-n200")
    assert compare.main([*map(str, sides)]) == 0, "what one side alone has is not compared"


def test_json_holds_everything(sides, tmp_path, capsys):
    assert compare.main([*map(str, sides), "format=json", f"out={tmp_path / 'x.json'}"]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["moved"] is False and len(found["cells"]) == 9 and "same answers" in capsys.readouterr().out
    assert set(found) == {"headline", "moved", *(f.name for f in dataclasses.fields(drift.Drift))}


@pytest.mark.parametrize(("words", "said"), [
    (["a"], "takes two folders"), (["a", "nowhere"], "nowhere is no folder"), (["a", "b", "form=text"], "does not take 'form=text'"),
    (["a", "b", "format=pdf"], "choose text, markdown, json"), (["a", "b", "fail=yes"], "neither true nor false"),
    (["a", "b", "tolerance=-1"], "no number from 0 on"), (["a", "b", "tolerance=nan"], "no number from 0 on"), (["a", "empty"], "holds no result"),
    (["a", "other"], "of the experiment"), (["a", "apart"], "no cell in common"), (["a", "mixed"], "several experiments"),
])
def test_bad_input_is_one_sentence(sides, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    keep(Path("other"), dataclasses.replace(result("lora"), experiment="standard"))
    keep(Path("apart"), result("lora", 190, 7))
    keep(Path("mixed"), result("lora", 190, 0))
    keep(Path("mixed"), dataclasses.replace(result("full"), experiment="standard"))
    assert compare.main(words) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


@pytest.mark.slow
def test_sets_with_the_same_truth_are_seldom_told_apart():
    """1,000 experiments of three techniques, seeds of 2 points spread, 500 rows: in at most 5% anything moved (and a standard error of 0.7 points)."""
    import numpy as np

    from pipeline.stats import tiers
    from pipeline.stats.tiers import holm

    draw, false = np.random.default_rng(0), 0
    for _ in range(1000):
        hard = draw.normal(0, 1, 500)
        runs = [np.array([hard + draw.normal(0, 1, 500) < draw.normal(level, 0.05) for _ in SEEDS], dtype=float) for level in (0.3, 0.3, 0.6, 0.6, 0.0, 0.0)]
        ranked = [tiers.Technique.of(r) for r in runs]
        false += min(holm([pair.p for pair in tiers.pairs_of(ranked, [(1, 0), (3, 2), (5, 4)])])) < tiers.SIGNIFICANT
    assert false / 1000 <= 0.05 + 2 * 0.007
