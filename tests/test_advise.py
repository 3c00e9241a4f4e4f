"""Advice from cells on disk: known answers at, between and beyond sizes, limits, ties, other tasks, and how it does where the truth is known."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from report_cells import diverged, keep, oom, result

from benchmarks import advice as judge
from pipeline import advise as entry
from pipeline.core.files import UserError
from pipeline.records.finished import Cell, cells_below
from pipeline.reporting.advice import Advice, Need, advise
from pipeline.reporting.advice_text import answer
from pipeline.reporting.evidence import Expected, Seen, expected_time, gather, paired_apart
from pipeline.reporting.rows import make_rows

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


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no model and no data is: after `make repro` they would be forecast here, and memory is to be the cells' own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "results")
    return tmp_path / "results"


def of(root: Path, rows: int, **limits: Any) -> Advice:
    return advise(gather([root]), Need(rows, **limits))


def expected(found: Advice, name: str) -> Any:
    return next(c for c in found.candidates if c.technique == name).accuracy


def test_at_a_measured_size_the_mean_and_a_prediction_interval_come_back(root):
    actual = expected(of(root, 400), "full")
    assert actual.value == pytest.approx(accuracy("full", 400), abs=0.015) and actual.basis == "measured at 400 rows, 3 runs"
    half = (actual.high - actual.low) / 2
    assert 2.06 * 0.006 * math.sqrt(4 / 3) < half < 2.1 * math.hypot(0.016 * math.sqrt(4 / 3), 0.011), "a new seed's spread, pooled, and the test rows'"


def test_between_sizes_the_learning_curve_answers(root):
    actual = expected(of(root, 800), "full")
    assert "learning curve" in actual.basis and actual.value == pytest.approx(accuracy("full", 800), abs=0.02) and actual.low < actual.value < actual.high


def test_between_two_sizes_without_a_curve_lies_between_them(tmp_path):
    write(tmp_path, (100, 1600))
    actual = expected(of(tmp_path, 400), "lora")
    assert "between 100 and 1,600" in actual.basis and accuracy("lora", 100) - 0.02 < actual.value < accuracy("lora", 1600) + 0.02


@pytest.mark.parametrize("rows", [10, 5000])
def test_beyond_the_sizes_measured_nothing_is_said(root, rows, capsys):
    actual = of(root, rows)
    assert actual.chosen is None and "nothing is said" in actual.reason
    assert entry.main([f"train_rows={rows}", f"results={root}"]) == 1 and "No evidence fits" in capsys.readouterr().out


def test_with_one_seed_told_apart_is_said_of_these_weights(tmp_path):
    for seeds in (1, 3):
        for name, right in (("full", 240), ("lora", 150)):
            for seed in range(seeds):
                keep(tmp_path / str(seeds), result(name, right + seed, seed))
    single, several = (of(tmp_path / str(seeds), 200) for seeds in (1, 3))
    for one, seeds in ((single, 1), (several, 3)):
        assert one.verdict and (one.verdict.kind, one.verdict.name) == ("take", "full") and one.verdict.tied == ()
        assert ("these weights" in "\n".join(answer(one))) is (seeds == 1)
    said = "\n".join(answer(single))
    assert re.search(r"^  technique .* from full \(these weights\)$", said, re.MULTILINE) and re.search(r"^  lora +60\.0% .*  told apart$", said, re.MULTILINE)


def test_fifty_techniques_are_a_table_whose_ground_is_said_once_and_what_is_out_for_one_reason_one_line(tmp_path):
    """Every line said where the memory was measured, with a range of one run from a figure to itself."""
    memory = dataclasses.replace(result("t00", 100).memory, kind="gpu_reserved")
    for number in range(50):
        one = dataclasses.replace(result(f"t{number:02}", 200 - number % 5, 0, 200 if number < 25 else 2000), memory=memory)
        keep(tmp_path, dataclasses.replace(one, hardware={"gpu": "NVIDIA H200"}))
    said = answer(of(tmp_path, 200))
    at = said.index("Others:")
    assert said[at + 1].split()[:5] == ["technique", "expected", "accuracy", "memory", "training"] and len(said[at : at + 26]) == 26
    assert max(map(len, said[at : at + 26])) <= 90 and not any("measured" in line or "GiB to" in line for line in said[at : at + 26])
    out = " ".join("\n".join(said[said.index("Ruled out:") + 1 :]).split())
    assert out.startswith("t25, t26, t27,") and out.count("measured at 2,000 training rows, which says nothing of 200") == 1
    assert out.count("memory: measured at 200 rows of vader_movies on NVIDIA H200, 1 run") == 1


def test_a_tie_with_the_untouched_base_is_do_not_train_and_agrees_with_the_report(tmp_path):
    """It said "Take lora" where zero-shot had the same accuracy, and "told apart" where the report said that nothing was."""
    for name, right in (("zero_shot", 175), ("lora", 175), ("qlora", 171), ("full", 180)):
        keep(tmp_path / "quick", result(name, right))
    actual = of(tmp_path, 200)
    assert actual.verdict and (actual.verdict.kind, actual.chosen and actual.chosen.technique) == ("do_not_train", "zero_shot")
    text = "\n".join(answer(actual))
    assert "Do not train yet: zero_shot, the untouched base" in text and "more test rows" in text and "Take" not in text
    rows = make_rows(cells_below(tmp_path))
    reported = rows[0].verdict
    assert reported and (reported.kind, reported.name, reported.tied) == (actual.verdict.kind, actual.verdict.name, actual.verdict.tied)


def test_the_cheaper_of_two_that_are_alike_is_taken_and_a_worse_one_is_not(root):
    actual = of(root, 400)
    assert actual.chosen and actual.chosen.technique == "lora" and "full is 0.2 points higher" in "\n".join(answer(actual))
    assert actual.chosen.memory.value == 1.62e9 and [c.technique for c in actual.candidates][-1] in ("zero_shot", "prompt_tuning")
    assert not of(root, 400, gpu_memory_gb=1.0).chosen or of(root, 400, gpu_memory_gb=1.0).chosen.technique != "lora"


def test_limits_rule_out_with_a_reason(root):
    actual = of(root, 400, gpu_memory_gb=1.45)
    gone = {c.technique: c.out for c in actual.candidates if c.out}
    assert actual.chosen and actual.chosen.technique == "prompt_tuning" and "GiB of 1.45" in gone["full"] and "lora" in gone
    slow = of(root, 1600, hours=0.027)
    assert slow.chosen and slow.chosen.technique == "lora" and "h of 0.027" in next(c.out for c in slow.candidates if c.technique == "full")
    high = of(root, 400, metric_floor=0.95)
    assert high.chosen is None and high.reason == "nothing that was measured meets what is asked"
    assert "below 95%" in high.candidates[0].out


def test_a_single_seed_takes_an_assumed_spread(tmp_path):
    write(tmp_path, (400,), seeds=1)
    actual = expected(of(tmp_path, 400), "lora")
    assert (actual.high - actual.low) / 2 > 1.959 * 0.03 * math.sqrt(2)


def test_all_rows_right_in_every_run_is_not_certain(tmp_path):
    for seed in (0, 1):
        one = result("lora", 100, seed, 400)
        keep(tmp_path, dataclasses.replace(one, scores={"test": dataclasses.replace(one.scores["test"], rows=24, accuracy=1.0)}), with_predictions=False)
    actual = expected(of(tmp_path, 400), "lora")
    assert actual.value == actual.high == 1.0 and 0.85 < actual.low < 0.95


def test_the_command_names_the_task_only_where_conf_has_it(tmp_path):
    """One that is written out in the experiment's file, as `alignscope try` does it, is no option."""
    write(tmp_path / "own", (400,), task="reviews")
    text = "\n".join(answer(of(tmp_path / "own", 400)))
    assert "technique=lora train_rows=400" in text and "task=reviews" not in text


def test_another_task_tells_of_the_choice_alone(root, capsys):
    actual = of(root, 400, task="unseen")
    assert actual.borrowed == (("vader_movies", "smollm2_135m"),) and actual.chosen and actual.task == "unseen"
    assert entry.main(["train_rows=400", "task=unseen", f"results={root}"]) == 0
    said = capsys.readouterr().out
    assert "Nothing was measured on unseen with smollm2_135m" in said and "expected accuracy   not known [" in said and "what would tell     a run of " in said
    floor = of(root, 400, task="unseen", metric_floor=0.5)
    assert floor.chosen is None and floor.reason.endswith("smollm2_135m, and what was elsewhere does not tell whether 50% is reached")


def test_several_tasks_want_a_name_and_an_unknown_model_names_what_there_is(root):
    write(root / "more", (400,), task="other", experiment="standard")
    with pytest.raises(UserError, match=r"several tasks or models \(task=other .*, task=vader_movies .*\); name one"):
        of(root, 400)
    assert of(root, 400, task="other").task == "other"
    with pytest.raises(UserError, match="no finished cell is evidence on model=llama .*smollm2_135m.*name the task, too, .*: task="):
        of(root, 400, model="llama")
    assert of(root, 400, model="llama", task="other").borrowed


def test_the_answer_names_cells_settings_and_the_command(root, capsys):
    assert entry.main(["train_rows=400", "gpu_memory_gb=16", "hours=2", f"results={root}"]) == 0
    output = capsys.readouterr().out
    for part in ("Take lora", "technique=lora task=vader_movies train_rows=400", "lora-s0-n400", "lr 0.001", "400 training rows, 16 GiB, 2 h"):
        assert part in output


@pytest.mark.parametrize(("words", "said"), [
    ([], "say how many labelled rows"), (["train_rows=many"], "train_rows=many"), (["train_rows=5", "memory=3"], "does not take 'memory=3'"),
    (["train_rows=5", "hours=-1"], "hours=-1"), (["train_rows=5", "metric_floor=80"], "80% is metric_floor=0.8"),
    (["train_rows=5", "results=nowhere"], "nowhere is no folder"), (["train_rows=5", "results=."], "no finished cell is evidence on any task"),
])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert entry.main(words) == 2
    output = capsys.readouterr().err
    assert said in output and output.count("\n") == 1


@pytest.mark.slow
def test_hidden_sizes_and_tasks_are_judged(root, tmp_path, capsys):
    write(root / "more", (100, 400), task="other", experiment="standard")
    assert judge.main([str(root), f"out={tmp_path / 'advice.json'}"]) == 0
    lines = capsys.readouterr().out
    assert "size\tvader_movies\tsmollm2_135m\t100" in lines and "task\tother\tsmollm2_135m\t400" in lines
    seen = gather([root])
    actual = judge.summary([*judge.by_size(seen), *judge.elsewhere(seen)])
    assert actual["size"]["lines"] == 2 and actual["size"]["largest_regret"] < 4 and actual["size"]["coverage"] > 0.8 and actual["task"]["lines"] == 6
    assert judge.main(["nowhere"]) == 2


def made(task: str, name: str, seed: int, accuracy: float, rows: int = 400, **changes: Any) -> Seen:
    cell = Cell(dataclasses.replace(result(name, 100, seed, rows), task=task, **changes), Path("nowhere"), name, str(rows))
    return Seen(name, task, cell.result.model, rows, seed, accuracy, 2000, cell)


def world(draw: random.Random, tasks: int = 6) -> list[Seen]:
    """Tasks that differ by 8 points, techniques that differ by 6 on average and 2 beside it from task to task, seeds by 1."""
    actual = []
    for k in range(tasks):
        level = draw.gauss(0.6, 0.08)
        for name, gain in (("full", 0.06), ("lora", 0.0), ("prompt_tuning", -0.06)):
            mean = level + gain + draw.gauss(0, 0.02)
            actual += [made(f"task{k}", name, seed, mean + draw.gauss(0, 0.01)) for seed in range(2)]
    return actual


@pytest.mark.slow
def test_hidden_tasks_of_a_known_truth_cost_little():
    draw = random.Random(1)
    lines = [line for _ in range(2) for line in judge.elsewhere(world(draw))]
    actual = judge.summary(lines)["task"]
    assert actual["lines"] == 12 and actual["without_answer"] == 0 and {line["others"] for line in lines} == {5}
    assert actual["mean_regret"] < 0.5 and sum(line["chosen"] == "full" for line in lines) > 9, "the second is 6 points behind"


def test_differences_over_tasks_are_paired():
    assert paired_apart({"a": 0.9, "b": 0.8, "c": 0.85}, {"a": 0.8, "b": 0.71, "c": 0.74}) and not paired_apart({"a": 0.9}, {"a": 0.1})


LEVELS = {"easy": 0.85, "hard": 0.15, "middle": 0.55}
GAINS = {"full": 0.02, "lora": 0.0, "prompt_tuning": -0.09, "top_layers": -0.07}


def grid(models: Sequence[str] = ("one", "two"), seeds: int = 2) -> list[Seen]:
    """Techniques that lie alike on all tasks; an untouched base that knows a third of each."""
    draw = random.Random(3)
    cells = [
        made(task, name, seed, LEVELS[task] + gain + draw.gauss(0, 0.01), model=model)
        for task in LEVELS for model in models for name, gain in GAINS.items() for seed in range(seeds)
    ]
    return cells + [made(task, "zero_shot", 0, LEVELS[task] / 3, model=model, kind="base", takes_rows=False) for task in LEVELS for model in models]


def test_another_base_is_answered_from_those_that_there_are():
    """zero_shot was expected at the mean over tasks, 17%, on a task where every base knows 5%, and "do not train" was the advice."""
    actual = advise(grid(), Need(400, task="hard", model="new"))
    found = {c.technique: c for c in actual.candidates}
    assert actual.chosen and actual.chosen.technique in ("full", "lora") and actual.verdict and actual.verdict.kind != "do_not_train"
    assert len(actual.borrowed) == 6
    assert found["zero_shot"].accuracy.value < 0.1 and abs(found["full"].accuracy.value - 0.17) < 0.05
    assert found["full"].memory is None and found["full"].train_s is None, "of another model nothing is said"
    assert "model=new" in "\n".join(answer(actual))


def test_what_was_not_trained_anywhere_or_cannot_be_judged_is_said():
    """It said "do not train" where only zero-shot had been measured, and took what may not fit without a word."""
    untrained = advise([s for s in grid() if s.technique == "zero_shot"], Need(400, task="new", model="one"))
    assert untrained.chosen is None and untrained.reason.startswith("nothing was trained where there is evidence")
    said = "\n".join(answer(advise(grid(), Need(400, gpu_memory_gb=1.0, hours=0.5, task="hard", model="new"))))
    assert "whether it fits 1 GiB is not known" in said and "whether it ends within 0.5 h is not known" in said and "more test rows" not in said


def test_one_run_tells_what_others_are_to_be_expected_and_which_is_worth_a_try():
    nothing = advise(grid(), Need(400, task="new", model="one"))
    assert nothing.chosen and not nothing.chosen.accuracy.told
    run = made("new", "prompt_tuning", 0, 0.40, model="one")
    actual = advise([*grid(), run], Need(400, task="new", model="one"))
    assert [c.technique for c in actual.candidates] == ["prompt_tuning"] and [c.technique for c in actual.elsewhere][:2] in (["full", "lora"], ["lora", "full"])
    full = next(c for c in actual.elsewhere if c.technique == "full").accuracy
    assert full.told and full.low < 0.51 < full.high and abs(full.value - 0.51) < 0.07
    said = "\n".join(answer(actual))
    assert "Not measured here, expected from other tasks and models" in said and "is expected above prompt_tuning; try it: python -m pipeline.train" in said


def test_a_cache_of_runs_is_evidence_of_its_first_seeds(tmp_path):
    path = tmp_path / "cells.jsonl"
    about = {"model": "smollm2_135m", "task": "trec", "train_rows": 480}
    runs = [("lora", 1e-5), ("lora", 1.4e-3), ("zero_shot", None)]
    lines = [
        {**about, "technique": name, "seed": seed, "lr": lr, "test": {"rows": 100, "right": 50 + seed}} for name, lr in runs for seed in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evidence, truth = judge.cached(path)
    assert (len(evidence), len(truth)) == (6, 10) and {s.seed for s in evidence} == {0, 1, 2}, "of two rates the one nearest to the default"
    assert {s.technique: s.cell.result.kind for s in truth} == {"lora": "trained", "zero_shot": "base"}
    assert judge.main([str(tmp_path / "none.jsonl")]) == 2 and judge.main([str(path), "processes=two"]) == 2
    path.write_text(json.dumps({**about, "technique": "lora", "seed": 0, "lr": None, "test": {}}))
    assert judge.main([str(path)]) == 2, "a run that answered nothing"


FEWER = "was measured on 1 of the 2 tasks and models that the others were measured on"


def test_what_was_measured_on_fewer_tasks_is_not_compared():
    seen = [made(task, name, seed, 0.5) for task in ("a", "b") for name in ("full", "lora") for seed in (0, 1)]
    actual = advise([*seen, made("a", "prompt_tuning", 0, 0.99)], Need(400, task="new"))
    gone = {c.technique: c.out for c in actual.candidates if c.out}
    assert actual.task == "new" and actual.chosen and gone == {"prompt_tuning": FEWER}
    assert advise(seen, Need(400, task="new", metric_floor=0.6)).chosen is None


def test_techniques_are_ranked_over_the_same_tasks():
    """Over a and b, which most have: what was measured on an easier task instead, or beside them, gains nothing by it."""
    seen = [made(task, name, seed, 0.5) for task in ("a", "b") for name in ("full", "lora") for seed in (0, 1)]
    seen += [made(task, "prompt_tuning", seed, 0.9) for task in ("b", "c") for seed in (0, 1)]
    seen += [made(task, "zero_shot", 0, accuracy, kind="base", takes_rows=False) for task, accuracy in (("a", 0.2), ("b", 0.2), ("c", 0.9))]
    actual = {c.technique: c for c in advise(seen, Need(400, task="new")).candidates}
    assert actual["prompt_tuning"].out == FEWER
    assert all(set(actual[name].by_task) == {"a", "b"} and actual[name].out is None for name in ("full", "lora", "zero_shot"))
    assert actual["zero_shot"].accuracy.value == pytest.approx(0.2, abs=0.05)


def test_cells_of_another_metric_or_model_are_no_candidates(root):
    before = of(root, 400)
    for name, change in (("other_metric", {"metric": "macro_f1"}), ("other_model", {"model": "llama"})):
        keep(root / name, dataclasses.replace(result("bitfit", 249, 0, 400, experiment=name), **change), with_predictions=False)
    actual = of(root, 400, task="vader_movies", model="smollm2_135m")
    assert [c.technique for c in actual.candidates] == [c.technique for c in before.candidates] and "bitfit" not in {c.technique for c in actual.candidates}


def test_other_settings_are_another_technique_and_the_same_run_again_is_one(root):
    for name, change in (("again", {}), ("longer", {"hyperparameters": result("lora").hyperparameters | {"epochs": 9.0}})):
        one = result("lora", 100, 0, 400, experiment=name, **change)
        keep(root / name, dataclasses.replace(one, scores={"test": dataclasses.replace(one.scores["test"], accuracy=0.1)}), with_predictions=False)
    seen = [s for s in gather([root]) if s.rows == 400 and s.cell.result.technique == "lora"]
    assert sorted((s.technique, s.seed) for s in seen) == [("lora [epochs=2.0]", n) for n in range(3)] + [("lora [epochs=9.0]", 0)]
    assert all(s.accuracy > 0.5 for s in seen if s.technique == "lora [epochs=2.0]"), "2,000 test rows go before 250"


def test_time_follows_the_optimiser_steps_and_one_run_has_no_interval():
    config = {"train": {"epochs": 3.0, "batch_size": 16, "min_steps": 60, "steps": None}}
    cells = [made("a", "full", seed, 0.5, rows=100, config=config) for seed in range(3)]
    same, more = expected_time(cells, 64, "smollm2_135m"), expected_time(cells, 640, "smollm2_135m")
    assert isinstance(same, Expected) and isinstance(more, Expected) and more.value == pytest.approx(2 * same.value), "60 steps at 64 and 100, 120 at 640"
    assert same.low and same.high and same.low < 118 < same.high and "optimiser steps" in same.basis
    alone = expected_time(cells[:1], 100, "smollm2_135m")
    assert alone and (alone.value, alone.low) == (pytest.approx(118.0), None)


def test_cells_that_ended_out_of_memory_or_diverged_are_named(root, capsys):
    keep(root, oom("qlora", 0, 400), with_predictions=False)
    keep(root, diverged("bitfit", 0, 400))
    assert entry.main(["train_rows=400", f"results={root}"]) == 0
    assert "Ended out of memory (so without an accuracy):\n  qlora at 400 rows on AMD EPYC: 1 cell\n" in (output := capsys.readouterr().out)
    assert "Diverged (so without an accuracy):\n  bitfit at 400 rows on AMD EPYC: 1 cell\n" in output and output.count("bitfit") == 1


def test_a_damaged_result_is_named_and_left_out(root, capsys):
    path = sorted(root.rglob("result.json"))[0]
    path.write_text("")
    assert entry.main(["train_rows=400", f"results={root}"]) == 0
    output = capsys.readouterr()
    assert output.err.count(f"warning: {path} is not JSON") == 1 and output.err.count("\n") == 1 and "expected accuracy" in output.out


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [3, 6, 10])
def test_the_documents_table_of_made_up_tasks(tasks):
    """docs/advice.md's table: by what is printed here."""
    draw = random.Random(100 + tasks)
    worlds = [world(draw, tasks) for _ in range(120 // tasks)]
    lines = [line for one in worlds for line in (*judge.elsewhere(one), *judge.elsewhere(one, None, ("lora",)))]
    print(tasks, judge.summary(lines))
    for kind, actual in judge.summary(lines).items():
        assert actual["lines"] == 120 // tasks * tasks and (not actual["told"] or actual["coverage"] > 0.91), kind
