"""Advice from cells on disk: known answers at, between and beyond sizes, limits, ties, other tasks, and how it does where the truth is known."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import pytest
from report_cells import keep, result

from benchmarks import advice as judge
from pipeline import advise as entry
from pipeline.advice import Advice, Need, advise
from pipeline.advice_evidence import gather
from pipeline.files import UserError

SIZES = (50, 100, 400, 1600)


def accuracy(name: str, rows: int) -> float:
    """The truth of the made-up evidence."""
    return {"zero_shot": 0.4, "full": 0.9 - 2.0 * rows**-0.5, "lora": 0.9 - 2.05 * rows**-0.5, "prompt_tuning": 0.7 - 1.2 * rows**-0.5}[name]


def write(root: Path, sizes: tuple[int, ...] = SIZES, seeds: int = 3, spread: float = 0.01, **changes: Any) -> None:
    """Cells of 2,000 test rows."""
    draw = random.Random(0)
    for name in ("zero_shot", "full", "lora", "prompt_tuning"):
        for rows in sizes:
            for seed in range(seeds):
                noise = 0 if name == "zero_shot" else draw.gauss(0, spread)
                one = result(name, 100, seed, rows)
                right = round(2000 * (accuracy(name, rows) + noise))
                score = dataclasses.replace(one.scores["test"], rows=2000, accuracy=right / 2000)
                memory = dataclasses.replace(one.memory, kind="gpu_reserved")
                keep(root, dataclasses.replace(one, scores={"test": score}, memory=memory, **changes), with_predictions=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "results")
    return tmp_path / "results"


def of(root: Path, rows: int, **limits: Any) -> Advice:
    return advise(gather([root]), Need(rows, **limits))


def expected(found: Advice, name: str) -> Any:
    return next(c for c in found.candidates if c.technique == name).accuracy


def test_at_a_measured_size_the_mean_and_a_prediction_interval_come_back(root):
    found = expected(of(root, 400), "full")
    assert found.value == pytest.approx(accuracy("full", 400), abs=0.015) and found.basis == "measured at 400 rows, 3 runs"
    half = (found.high - found.low) / 2
    assert 2.06 * 0.006 * math.sqrt(4 / 3) < half < 2.1 * math.hypot(0.016 * math.sqrt(4 / 3), 0.011), "a new seed's spread, pooled, and the test rows'"


def test_between_sizes_the_learning_curve_answers(root):
    found = expected(of(root, 800), "full")
    assert "learning curve" in found.basis and found.value == pytest.approx(accuracy("full", 800), abs=0.02) and found.low < found.value < found.high


def test_between_two_sizes_without_a_curve_lies_between_them(tmp_path):
    write(tmp_path, (100, 1600))
    found = expected(of(tmp_path, 400), "lora")
    assert "between 100 and 1,600" in found.basis and accuracy("lora", 100) - 0.02 < found.value < accuracy("lora", 1600) + 0.02


@pytest.mark.parametrize("rows", [10, 5000])
def test_beyond_the_sizes_measured_nothing_is_said(root, rows, capsys):
    found = of(root, rows)
    assert found.chosen is None and "nothing is said" in found.reason
    assert entry.main([f"train_rows={rows}", f"results={root}"]) == 1 and "No evidence fits" in capsys.readouterr().out


def test_the_cheaper_of_two_that_are_alike_is_taken_and_a_worse_one_is_not(root):
    found = of(root, 400)
    assert found.chosen and found.chosen.technique == "lora" and "not told apart from full" in found.reason
    assert found.chosen.memory_bytes == 1.62e9 and [c.technique for c in found.candidates][-1] in ("zero_shot", "prompt_tuning")
    assert not of(root, 400, gpu_memory_gb=1.0).chosen or of(root, 400, gpu_memory_gb=1.0).chosen.technique != "lora"


def test_limits_rule_out_with_a_reason(root):
    found = of(root, 400, gpu_memory_gb=1.45)
    gone = {c.technique: c.out for c in found.candidates if c.out}
    assert found.chosen and found.chosen.technique == "prompt_tuning" and "GiB of 1.45" in gone["full"] and "lora" in gone
    slow = of(root, 1600, hours=0.027)
    assert slow.chosen and slow.chosen.technique == "lora" and "h of 0.027" in next(c.out for c in slow.candidates if c.technique == "full")
    high = of(root, 400, metric_floor=0.95)
    assert high.chosen is None and high.reason == "nothing that was measured meets what is asked"
    assert "below 95%" in high.candidates[0].out


def test_a_single_seed_takes_an_assumed_spread(tmp_path):
    write(tmp_path, (400,), seeds=1)
    found = expected(of(tmp_path, 400), "lora")
    assert (found.high - found.low) / 2 > 1.959 * 0.03 * math.sqrt(2)


def test_another_task_tells_of_the_choice_alone(root, capsys):
    found = of(root, 400, task="unseen")
    assert found.borrowed and found.chosen and found.task == "vader_movies"
    assert entry.main(["train_rows=400", "task=unseen", f"results={root}"]) == 0 and "Nothing was measured on unseen" in capsys.readouterr().out
    assert of(root, 400, task="unseen", metric_floor=0.5).chosen is None


def test_several_tasks_want_a_name_and_an_unknown_model_names_what_there_is(root):
    write(root / "more", (400,), task="other", experiment="standard")
    with pytest.raises(UserError, match=r"several tasks or models \(task=other .*, task=vader_movies .*\); name one"):
        of(root, 400)
    assert of(root, 400, task="other").task == "other"
    with pytest.raises(UserError, match="no finished cell is evidence on model=llama .*smollm2_135m"):
        of(root, 400, model="llama")


def test_the_answer_names_cells_settings_and_the_command(root, capsys):
    assert entry.main(["train_rows=400", "gpu_memory_gb=16", "hours=2", f"results={root}"]) == 0
    told = capsys.readouterr().out
    for part in ("Take lora", "technique=lora train_rows=400", "lora-s0-n400", "lr 0.001", "400 training rows, 16 GiB, 2 h"):
        assert part in told


@pytest.mark.parametrize(("words", "said"), [
    ([], "say how many labelled rows"), (["train_rows=many"], "train_rows=many"), (["train_rows=5", "memory=3"], "does not take 'memory=3'"),
    (["train_rows=5", "hours=-1"], "hours=-1"), (["train_rows=5", "metric_floor=80"], "80% is metric_floor=0.8"),
    (["train_rows=5", "results=nowhere"], "nowhere is no folder"), (["train_rows=5", "results=."], "no finished cell is evidence on any task"),
])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert entry.main(words) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_hidden_sizes_and_tasks_are_judged(root, tmp_path, capsys):
    write(root / "more", (100, 400), task="other", experiment="standard")
    assert judge.main([str(root), f"out={tmp_path / 'advice.json'}"]) == 0
    lines = capsys.readouterr().out
    assert "size\tvader_movies\tNone\t100" in lines and "task\tother\tvader_movies\t400" in lines
    seen = gather([root])
    found = judge.summary([*judge.by_size(seen), *judge.by_task(seen)])
    assert found["size"]["lines"] == 2 and found["size"]["largest_regret"] < 4 and found["size"]["coverage"] > 0.8 and found["task"]["lines"] == 4
    assert judge.main(["nowhere"]) == 2
