"""The one file that `alignscope try` writes: what decides it, who goes on with it, the stages that follow from it."""

from __future__ import annotations

import json
import random
import shutil
import sys

import yaml
from test_try_file import FEW, csv_text, jsonl, write

from pipeline import try_file
from pipeline.core.compose import ROOT
from pipeline.intake import flow, project


def test_a_metric_is_asked_for_and_one_that_is_none_is_one_sentence(place, capsys, monkeypatch):
    """By name, in a file and in a module of the folder that one is in, which the console script has not on its path."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(place))])
    write(place / "reviews.csv", csv_text())
    write(place / "measures_17.py", "def shorter(said, answer, row):\n    return float(len(said) <= len(answer))\n")
    for metric in ("macro_f1", "measures_17:shorter", "measures_17.py:shorter"):
        assert try_file.main(["reviews.csv", *FEW, "--plan", "--metric", metric]) == 0, capsys.readouterr().err
        assert yaml.safe_load((place / "experiments/reviews.yaml").read_text())["task"]["metric"] == metric
    for metric, said in (("acuracy", "did you mean 'accuracy'"), ("rouge_l", "needs task.scoring=generate"), ("measures_17:longer", "has no function 'longer'"),
                         ("nowhere_17:f", "cannot be imported")):
        capsys.readouterr()
        assert try_file.main(["reviews.csv", *FEW, "--plan", "--name", "other", "--metric", metric]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and not (place / "experiments/other.yaml").exists()


def test_an_experiment_that_is_written_is_planned_and_takes_no_other_settings(place, capsys):
    write(place / "reviews.csv", csv_text())
    assert try_file.main(["reviews.csv", *FEW, "--plan"]) == 0
    before, _ = project.file_of("reviews").read_text(), capsys.readouterr()
    assert try_file.main(["reviews", "--rows", "40"]) == 2
    error = capsys.readouterr().err
    assert "edit experiments/reviews.yaml" in error and "more reviews" in error and project.file_of("reviews").read_text() == before
    assert try_file.main(["reviews", "--plan"]) == 0
    assert "lora" in capsys.readouterr().out and not (place / "results").exists()


def test_the_same_command_goes_on_with_what_was_edited_and_another_keeps_it(place, capsys, monkeypatch):

    monkeypatch.setattr(flow, "go", lambda name, args: 0)
    write(place / "reviews.csv", csv_text())
    path = project.file_of("reviews")
    assert try_file.main(["reviews.csv", *FEW]) == 0
    edited = path.read_text().replace("test_rows: 16", "test_rows: 12")
    path.write_text(edited)
    capsys.readouterr()
    assert try_file.main(["reviews.csv", *FEW]) == 0 and "going on with experiments/reviews.yaml" in capsys.readouterr().out and path.read_text() == edited
    assert try_file.main(["reviews.csv", *FEW, "--metric", "macro_f1"]) == 0 and "macro_f1" in path.read_text()
    assert "what stood there is in experiments/reviews.yaml.bak" in capsys.readouterr().out and path.with_suffix(".yaml.bak").read_text() == edited
    second = path.read_text()
    assert try_file.main(["reviews.csv", *FEW]) == 0 and path.with_suffix(".yaml.bak").read_text() == edited
    assert path.with_suffix(".yaml.bak1").read_text() == second


def test_a_plan_is_told_to_programs(place, capsys):
    write(place / "reviews.csv", csv_text())
    assert try_file.main(["reviews.csv", *FEW, "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["experiment"] == "reviews" and plan["test_rows"] == 16 and [cell["technique"] for cell in plan["cells"]][:1] == ["zero_shot"]


def test_stages_that_were_written_by_hand_stay(place):
    write(project.file_of("mine"), "task: {name: mine}")
    known = {"experiment": "mine", "task": "mine", "model": "smollm2_135m", "teacher": "none", "synthetic": None,
             "grid": {"techniques": ["lora"], "seeds": [0], "train_rows": [16]}}
    project.stages("mine", known, "mine.csv", None)
    made = (place / "experiments/mine/dvc.yaml").read_text()
    project.stages("mine", known, "other.csv", None)
    assert (place / "experiments/mine/dvc.yaml").read_text() == made.replace("mine.csv", "other.csv")
    write(place / "experiments/mine/params.yaml", "experiment: mine\n")
    project.stages("mine", known, "mine.csv", None)
    assert "other.csv" in (place / "experiments/mine/dvc.yaml").read_text() and (place / "experiments/mine/params.yaml").read_text() == "experiment: mine\n"


def test_what_two_experiments_read_is_made_by_one_stage(place):
    """DVC refuses every command where two stages write the same: a model that both take, a task of the repository's."""
    shutil.copytree(ROOT / "experiments/shared", place / "experiments/shared")
    grid = {"techniques": ["lora"], "seeds": [0], "train_rows": [16]}

    def own(name: str, task: str) -> set[str]:
        write(project.file_of(name), "model: {name: mine}")
        project.stages(name, {"experiment": name, "task": task, "model": "mine", "teacher": "none", "synthetic": None, "grid": grid}, "a.csv", "m")
        return set(yaml.safe_load((place / f"experiments/{name}/dvc.yaml").read_text())["stages"]) - {"plan", "train", "report"}

    assert own("one", "one") == {"prepare", "rationales", "base_model"} and own("one", "one") == {"prepare", "rationales", "base_model"}
    assert own("two", "two") == {"prepare", "rationales"} and own("three", "trec") == set()
    made = yaml.safe_load((place / "experiments/one/dvc.yaml").read_text())["stages"]
    assert made["base_model"]["params"] == [{"experiments/one.yaml": ["model"]}] and made["prepare"]["params"] == [], "a key that is not there is an error"


def test_a_label_that_yaml_would_misread_stays_what_it_is(place, capsys):
    words = ["reverted_card_payment?", "yes", "no: never", "#1", "null", "1e3"]
    random.seed(0)
    rows = [{"text": f"a film of number {n}", "label": words[n % len(words)]} for n in range(120)]
    write(place / "odd.jsonl", jsonl(rows))
    assert try_file.main(["odd.jsonl", *FEW, "--plan", "--missing", "drop"]) == 0
    held = yaml.safe_load((place / "experiments/odd.yaml").read_text())
    assert held["task"]["choices"] == sorted(set(words) - {"null"})


def test_a_broken_experiment_file_is_one_sentence(place, capsys):
    write(place / "reviews.csv", csv_text())
    assert try_file.main(["reviews.csv", *FEW, "--plan"]) == 0
    path = project.file_of("reviews")
    path.write_text(path.read_text().replace('  scoring: "choice"', "  scoring: [choice?: {"))
    capsys.readouterr()
    assert try_file.main(["reviews"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "reviews.yaml" in error


def test_a_plan_for_a_card_elsewhere_runs_nothing(place, capsys):
    write(place / "reviews.csv", csv_text())
    assert try_file.main(["reviews.csv", "--model", "Qwen/Qwen3-0.6B", "--hours", "2", "--card", "24GB", "--yes"]) == 0
    out = capsys.readouterr().out
    assert "a card of 24 GiB" in out and "a guess" in out and "nothing is run" in out and not (place / "results").exists()
    assert yaml.safe_load((place / "experiments/reviews.yaml").read_text())["model"]["source"] == {"repository": "Qwen/Qwen3-0.6B"}


def test_texts_that_the_models_context_cuts_are_counted_before_anything_runs(place, capsys):
    """Of a context below the usual most tokens of a row, too: with four demonstrations all are cut, and no row alone is."""
    path = place / "models/smollm2_135m/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 32}))
    write(place / "reviews.csv", csv_text())
    assert try_file.main(["reviews.csv", *FEW, "--plan"]) == 0
    out = capsys.readouterr().out
    assert "100% of the texts with few_shot's examples are longer than 32 tokens" in out and "of the texts are longer" not in out
    assert yaml.safe_load((place / "experiments/reviews.yaml").read_text())["train"]["max_length"] == 32
