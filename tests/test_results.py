"""A result survives its JSON exactly, and a file that is not one says what to do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.files import UserError
from pipeline.measure.clock import Phases
from pipeline.measure.memory import Memory
from pipeline.records import results
from pipeline.records.finished import read_all
from pipeline.records.results import Forgetting, Inference, Result, Score, Size, Teacher, Work, read, write


def result(**changes: Any) -> Result:
    whole = Result(
        experiment="quick",
        cell="lora-s0-n8",
        technique="lora",
        family="reparametrised",
        method="lora",
        objective="labels",
        precision="fp32",
        task="movies",
        model="tiny",
        seed=0,
        train_rows=8,
        status="ok",
        kind="trained",
        hyperparameters={"r": 8, "modules": ["a", "b"]},
        validation_rows=2,
        scores={"test": Score(10, 0.8, 0.49, 0.943, nll=0.3), "transfer/news": Score(4, 0.5, 0.1, 0.9, unanswered=1)},
        phases=Phases(6.0, 1.0, 1.0, 0.0, 2.0, 0.5, 0.5, 1.0, 0.0),
        memory=Memory("cpu_rss", None, 100),
        work=Work(steps=3, tokens=120),
        size=Size(10, 100, 400),
        inference=Inference(0.01, 20.0),
        forgetting=Forgetting(12.0, 11.0, 0.5, 0.5),
        teacher=Teacher("lexicon", 8, 0.75, 1.5),
        history=[{"step": 1, "loss": 0.7}],
        notes=["a note"],
        hardware={"device": "cpu"},
        provenance={"packages": {"torch": "2"}},
        config={"train": {"lr": 0.1}},
    )
    return dataclasses.replace(whole, **changes)


def file(folder: Path, **changes: Any) -> Path:
    """A result.json with top-level fields changed; a value of ... removes the field."""
    raw = {**dataclasses.asdict(result()), **changes}
    (folder / "result.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return folder / "result.json"


def test_every_field_comes_back_with_its_type(tmp_path):
    write(tmp_path, result())
    assert read(tmp_path) == result() == read(tmp_path / "result.json")
    assert isinstance(read(tmp_path).scores["transfer/news"], Score)


def test_an_out_of_memory_result_keeps_what_was_not_measured_null(tmp_path):
    oom = result(
        status="oom",
        scores={},
        phases=None,
        memory=None,
        work=None,
        size=None,
        inference=None,
        forgetting=None,
        teacher=None,
        error="out of memory",
    )
    write(tmp_path, oom)
    assert read(tmp_path) == oom and oom.test is None
    assert json.loads((tmp_path / "result.json").read_text())["memory"] is None


@pytest.mark.parametrize("schema", [1, 2])
def test_a_result_that_diverged_before_it_was_a_status_is_read_as_diverged(tmp_path, schema):
    ok = result()
    work = dataclasses.replace(ok.work, diverged_at=3) if schema == 2 else ok.work
    path = file(tmp_path, work=dataclasses.asdict(work), schema=schema, notes=["training diverged: the loss was not finite at step 3 of 9"])
    actual = read(path)
    assert (actual.status, actual.work.diverged_at, actual.error) == ("diverged", 3, "training diverged at step 3")
    assert actual.scores == ok.scores


def test_a_figure_that_was_not_finite_is_null(tmp_path):
    forgotten = dataclasses.replace(result().forgetting, perplexity=None, pairs=None)
    stored = result(forgetting=forgotten, history=[{"step": 1, "loss": 1.0, "lr": 0.1, "validation_metric": 0.5, "validation_nll": None}])
    write(tmp_path, stored)
    assert read(tmp_path) == stored and results.csv_text(results.HISTORY, stored.history).splitlines()[1] == "1,1.0,0.1,0.5,"


def test_what_was_not_measured_ranks_last():
    ranked = sorted([(0.5, 0.1), (0.7, None), (0.7, 0.9), (0.7, 0.4)], key=lambda t: results.rank_key(*t), reverse=True)
    assert ranked == [(0.7, 0.4), (0.7, 0.9), (0.7, None), (0.5, 0.1)]


def test_the_test_score_is_found():
    assert result().test == Score(10, 0.8, 0.49, 0.943, nll=0.3)


def test_a_result_is_of_the_schema_that_this_version_writes(tmp_path):
    write(tmp_path, result())
    assert json.loads((tmp_path / "result.json").read_text())["schema"] == results.SCHEMA


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"schema": 0}, " was written by schema 0, this version reads schemas 1 and 2; delete the cell's folder and run it again"),
    ({"schema": ...}, " was written by schema None"),
    ({"accuracy": 0.5}, " has the unknown field 'accuracy' of Result; delete the cell's folder"),
    ({"size": {"trainable": 1, "total": 2, "artefact_bytes": 3, "disk": 4}}, ": size has the unknown field 'disk' of Size; delete"),
    ({"scores": {"test": {"rows": 1, "f1": 0.5}}}, ": scores.test has the unknown field 'f1' of Score; delete"),
    ({"technique": ...}, " lacks a field .*technique.*; delete the cell's folder"),
    ({"size": {"total": 2}}, ": size lacks a field .*trainable.*; delete the cell's folder"),
])
def test_a_file_that_is_not_of_this_schema_is_named_with_the_mend(tmp_path, changes, sentence):
    path = file(tmp_path, **changes)
    with pytest.raises(UserError, match=f"{path}{sentence}") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "sentence"), [("{", "is not JSON"), ("[1]", "was written by schema None"), ("", "is not JSON")])
def test_a_file_that_is_no_result_is_named(tmp_path, text, sentence):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(UserError, match=rf"{tmp_path}/result\.json {sentence}.*; delete"):
        read(tmp_path)


def test_a_cell_that_has_not_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"result\.json does not exist; run the stage"):
        read(tmp_path)


def test_all_results_below_a_folder_come_in_path_order(tmp_path):
    for name in ("b", "a/x"):
        write(tmp_path / name, result(cell=name[-1]))
    assert [r.cell for r in read_all(tmp_path)] == ["x", "b"]
    assert read_all(tmp_path / "none") == []


def test_a_result_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        result().status = "oom"  # type: ignore[misc]


@pytest.mark.parametrize("schema", [1, 2])
@pytest.mark.parametrize(("changes", "sentence"), [
    ({"train_rows": "many"}, "train_rows is 'many', not a whole number"), ({"train_rows": 8.5}, "train_rows is 8.5, not a whole number"),
    ({"seed": True}, "seed is True, not a whole number"), ({"scores": 5}, "scores is 5, not an object"),
    ({"scores": {"test": 0.5}}, "scores.test is 0.5, not an object"),
    ({"scores": {"test": {"rows": 1, "accuracy": "0.5", "accuracy_low": 0, "accuracy_high": 1}}}, "scores.test.accuracy is '0.5', not a number"),
    ({"notes": {"a": 1}}, "notes is {'a': 1}, not a list"), ({"notes": [5]}, r"notes\[0\] is 5, not a text"),
    ({"config": []}, r"config is \[\], not an object"),
    ({"hyperparameters": ["r"]}, r"hyperparameters is \['r'\], not an object"), ({"history": [{"step": "1"}]}, r"history\[0\].step is '1', not a number"),
    ({"history": [5]}, r"history\[0\] is 5, not an object"), ({"work": [1]}, r"work is \[1\], not an object or null"), ({"packed": 1}, "packed is 1, not true"),
    ({"memory": {"kind": 3, "peak_bytes": None}}, "memory.kind is 3, not a text"), ({"error": ["x"]}, r"error is \['x'\], not a text or null"),
    ({"inference": {"adapters": {"8": "fast"}}}, "inference.adapters.8 is 'fast', not a number"), ({"metric": "f1"}, "metric is 'f1', none of"),
    ({"hardware": {"gpu": 5}}, "hardware.gpu is 5, not a text or null"),
    ({"provenance": {"packages": "torch"}}, "provenance.packages is 'torch', not an object"),
    ({"provenance": {"started": "noon"}}, "provenance.started is 'noon', no ISO time"),
    ({"config": {"train": 3}}, "config.train is 3, not an object"), ({"config": {"paths": None}}, "config.paths is None, not an object"),
    ({"train_rows": 0}, "train_rows is 0, not a number from 1 on"), ({"history": [{"loss": 1.0}]}, r"history\[0\].step is 0, not a number from 1 on"),
    ({"scores": {"test": {"rows": 1, "accuracy": 1.5, "accuracy_low": 0, "accuracy_high": 1}}}, "scores.test.accuracy is 1.5, not a number from 0 to 1"),
    ({"inference": {"adapters": {"many": 1.0}}}, "inference.adapters has 'many', no number of requests"),
])
def test_a_value_of_another_type_is_named_with_its_file(tmp_path, schema, changes, sentence):
    gone = {1: {"kind": ..., "labelled_rows": ..., "takes_rows": ..., "start": ...}, 2: {}}[schema]
    path = file(tmp_path, schema=schema, **gone, **changes)
    with pytest.raises(UserError, match=f"{path}: {sentence}.*; .*delete the cell's folder and run it again$") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"kind": "other"}, "kind is 'other', none of trained, untrained, base, teacher"),
    ({"work": {"engine": "steam"}}, "work.engine is 'steam', none of eager, captured"),
])
def test_a_text_without_a_meaning_is_named(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=f"{file(tmp_path, **changes)}: {sentence}"):
        read(tmp_path)
