"""An artefact of a finished cell on any prepared split: the same numbers as the cell's own, or one clear sentence."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from conftest import write_task

from pipeline import evaluate
from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import compose
from pipeline.core.files import read_json, read_jsonl
from pipeline.records.results import Result, read, write


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> tuple[list[str], Path]:
    """The overrides of a finished LoRA cell and its folder; treat as read-only."""
    root = tmp_path_factory.mktemp("finished")
    given = [
        f"paths.data={tiny}/data", f"paths.models={tiny}/models", f"paths.rationales={tiny}/rationales", f"paths.results={root}/results",
        f"paths.work={root}/work", "task=vader_movies", "device=cpu", "tracking=none", "train.progress=false", "evaluate.forgetting=false",
        "evaluate.adapters=[]",
    ]
    cfg = compose(
        [
            *given,
            "technique=lora",
            "train_rows=16",
            "train.steps=4",
            "evaluate.latency_rows=1",
            "evaluate.test_rows=40",
            "evaluate.transfer_rows=10",
        ]
    )
    cell_run.run(cfg, folder=identity.folder_of(cfg))
    return given, identity.folder_of(cfg)


def run(finished: tuple[list[str], Path], tmp_path: Path, *more: str, folder: Path | None = None) -> int:
    given, stored = finished
    return evaluate.main([*given, f"paths.evaluations={tmp_path}/evaluations", f"cell={folder or stored}", *more])


def written(tmp_path: Path, split: str) -> tuple[list[dict], dict]:
    (folder,) = (tmp_path / "evaluations").glob(f"*/*/{split}")
    return read_jsonl(folder / "predictions.jsonl"), read_json(folder / "score.json")


@pytest.mark.parametrize(("split", "limit"), [("test", "evaluate.test_rows=40"), ("transfer/news", "evaluate.transfer_rows=10")])
def test_the_cells_own_score_comes_back(finished, tmp_path, capsys, split, limit):
    assert run(finished, tmp_path, f"split={split}", limit) == 0
    result: Result = read(finished[1])
    predictions, score = written(tmp_path, split.replace("/", "-"))
    assert predictions == [p for p in read_jsonl(finished[1] / "predictions.jsonl") if p["split"] == split]
    assert score == {"split": split, "cell": result.cell, **dataclasses.asdict(result.scores[split])}
    assert f"{result.cell} on {split}: accuracy {result.scores[split].accuracy:.3f}, {len(predictions)} rows" in capsys.readouterr().out


def test_without_a_limit_every_row_is_scored(finished, tmp_path):
    assert run(finished, tmp_path, "split=validation") == 0
    assert written(tmp_path, "validation")[1]["rows"] == 32
    assert run(finished, tmp_path) == 0
    assert written(tmp_path, "test")[1]["rows"] == 48


def test_the_settings_of_the_cell_count_not_those_of_the_command(finished, tmp_path):
    assert run(finished, tmp_path, "technique=full", "seed=7", "train.max_length=2", "evaluate.test_rows=40") == 0
    assert written(tmp_path, "test")[1]["accuracy"] == read(finished[1]).scores["test"].accuracy


def refused(finished: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture, *more: str, folder: Path | None = None) -> str:
    capsys.readouterr()
    assert run(finished, tmp_path, *more, folder=folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "evaluations").exists()
    return error


@pytest.mark.parametrize("split", ["tset", "transfer/books", "transfer", "manifest", "../x", "transfer/../test"])
def test_an_unknown_split_lists_those_there_are(finished, tmp_path, capsys, split):
    error = refused(finished, tmp_path, capsys, f"split={split}")
    assert (
        f"unknown split '{split}' of " in error
        and "there are: validation, test, transfer/news, transfer/products, transfer/tweets" in error
    )


def test_no_cell_was_given(capsys):
    assert evaluate.main([]) == 2
    assert "needs a finished cell; add cell=results/<experiment>/<cell>" in capsys.readouterr().err


def test_a_cell_that_has_not_finished(finished, tmp_path, capsys):
    shutil.copytree(finished[1], tmp_path / "cell")
    (tmp_path / "cell" / "result.json").unlink()
    assert "cell/result.json does not exist; run the stage that writes it" in refused(finished, tmp_path, capsys, folder=tmp_path / "cell")
    assert "nowhere does not exist" in refused(finished, tmp_path, capsys, folder=tmp_path / "nowhere")


def test_a_cell_that_ran_out_of_memory(finished, tmp_path, capsys):
    write(tmp_path / "cell", dataclasses.replace(read(finished[1]), status="oom", scores={}))
    assert "has status oom and no artefact; choose a cell that finished" in refused(finished, tmp_path, capsys, folder=tmp_path / "cell")


def test_a_cell_whose_artefact_is_gone(finished, tmp_path, capsys):
    write(tmp_path / "cell", read(finished[1]))
    assert "artefact has no artefact; run the cell again, or dvc checkout it" in refused(
        finished, tmp_path, capsys, folder=tmp_path / "cell"
    )


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:100])])
def test_an_artefact_whose_weights_are_gone_or_cut_short(finished, tmp_path, capsys, damage):
    shutil.copytree(finished[1], tmp_path / "cell")
    damage(tmp_path / "cell" / "artefact" / "adapter_model.safetensors")
    error = refused(finished, tmp_path, capsys, folder=tmp_path / "cell")
    assert "cell/artefact cannot be loaded" in error and "run the cell again, or dvc checkout it" in error


def test_a_result_of_an_older_schema(finished, tmp_path, capsys):
    shutil.copytree(finished[1], tmp_path / "cell")
    raw = json.loads((tmp_path / "cell" / "result.json").read_text())
    (tmp_path / "cell" / "result.json").write_text(json.dumps({**raw, "schema": 0}))
    assert "written by schema 0, this version reads schemas 1 and 2; delete the cell's folder" in refused(
        finished, tmp_path, capsys, folder=tmp_path / "cell"
    )


def test_the_teacher_has_no_model(finished, tmp_path, capsys):
    cfg = compose([*finished[0], f"paths.results={tmp_path}/results", "technique=teacher", "teacher=lexicon"])
    cell_run.run(cfg, folder=identity.folder_of(cfg))
    assert "the teacher answers without a model; its rows are in rationales/" in refused(
        finished, tmp_path, capsys, folder=identity.folder_of(cfg)
    )


def test_results_that_cannot_be_written(finished, tmp_path, capsys):
    (tmp_path / "evaluations").write_text("in the way")
    assert run(finished, tmp_path) == 2
    assert f"cannot write {tmp_path}/evaluations/" in capsys.readouterr().err
    assert (tmp_path / "evaluations").read_text() == "in the way"


def test_texts_beyond_the_models_context_are_cut_as_the_cell_cut_them(finished, tmp_path):
    """train.max_length lies above the model's context of 256 tokens: the context counts, in the cell and here."""
    data = tmp_path / "data" / "vader_movies"
    write_task(data, train=16, validation=4, test=8)
    rows = read_jsonl(data / "test.jsonl")
    (data / "test.jsonl").write_text("".join(json.dumps({**r, "prompt": "film plot " * 150 + r["prompt"]}) + "\n" for r in rows))
    given = [*finished[0], f"paths.data={tmp_path}/data", f"paths.results={tmp_path}/results", f"paths.work={tmp_path}/work"]
    cfg = compose([*given, "technique=zero_shot", "train.too_long=truncate", "evaluate.transfer_rows=0", "evaluate.latency_rows=1"])
    result = cell_run.run(cfg, folder=identity.folder_of(cfg))
    assert "8 texts of the test rows longer than 256 tokens lost their start" in result.notes
    assert run((given, finished[1]), tmp_path, folder=identity.folder_of(cfg)) == 0
    assert written(tmp_path, "test")[0] == [p for p in read_jsonl(identity.folder_of(cfg) / "predictions.jsonl") if p["split"] == "test"]
