"""What MLflow's pages begin with, the experiment's note, and artefacts as models that pyfunc serves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_tracking import client, config, root, runs, write_cell  # noqa: F401

from pipeline.records import mlflow as records_mlflow


def test_a_list_and_a_comparison_of_runs_begin_with_the_headlines(root):  # noqa: F811
    folder = write_cell(root)
    records_mlflow.log_cell(folder, config(root))
    [run] = runs(root)
    assert sorted(run.data.metrics)[:3] == ["1_test_accuracy", "2_train_time_s", "3_peak_memory_gib"] and min(run.data.params) == "4_r"
    assert [run.data.metrics[k] for k in sorted(run.data.metrics)[:3]] == pytest.approx([0.8, 30.0, 2e9 / 2**30], abs=1e-3) and run.data.params["4_r"] == "8"
    assert all("/" in name for name in sorted(run.data.metrics)[3:]), "all else is behind a prefix"
    tags = client(root).get_experiment_by_name("quick").tags
    view = json.loads(tags["mlflow.sharedViewState.alignscope"])
    assert tags["mlflow.experimentKind"] == "custom_model_development" and tags["mlflow.experiment.primaryMetric.name"] == "1_test_accuracy"
    assert view["selectedColumns"][1:5] == ["metrics.`1_test_accuracy`", "metrics.`2_train_time_s`", "metrics.`3_peak_memory_gib`", "params.`4_r`"]


def test_the_experiments_note_is_the_reports_where_there_is_an_experiment(root):  # noqa: F811
    records_mlflow.log_note(config(root, f"tracking.uri=sqlite:///{root}/none.db"), "early")
    records_mlflow.log_note(config(root), "early")
    assert not (root / "none.db").exists() and client(root).get_experiment_by_name("quick") is None
    records_mlflow.log_cell(write_cell(root), config(root))
    records_mlflow.log_note(config(root), "Take lora.")
    note = client(root).get_experiment_by_name("quick").tags["mlflow.note.content"]
    assert note.endswith("viewStateShareKey=alignscope&workflowType=machine_learning)\n\nTake lora.")


def test_a_report_longer_than_a_note_may_be_is_cut_at_a_line_and_says_so(root, capsys):  # noqa: F811
    """45 techniques: MLflow refused the whole note, with it the link to the runs."""
    records_mlflow.log_cell(write_cell(root), config(root))
    records_mlflow.log_note(config(root), "Take lora.\n\n" + "\n".join(f"| technique {i} | {'x' * 100} |" for i in range(300)))
    note = client(root).get_experiment_by_name("quick").tags["mlflow.note.content"]
    assert "warning" not in capsys.readouterr().err and 19_800 < len(note) <= 20_000
    assert "viewStateShareKey=alignscope" in note and "x |\n\nToo long for a note of MLflow: all of it is in table.md of quick's report." in note


def test_the_address_of_an_experiment_opens_its_runs_and_a_comparison_begins_with_the_headline(root, monkeypatch, capsys):  # noqa: F811
    """On model training: without what follows the port, MLflow's pages open on traces."""
    from pipeline import open_ui
    from pipeline.core import compose as compose_room

    folder = write_cell(root)
    records_mlflow.log_cell(folder, config(root))
    [run] = runs(root)
    assert next(iter(run.data.metrics)) == "1_test_accuracy", "the metric that MLflow's comparison of runs is drawn over"
    monkeypatch.setattr(compose_room, "compose", lambda words: config(root))
    monkeypatch.setattr("subprocess.run", lambda command: SimpleNamespace(returncode=0))
    assert open_ui.main(["quick", "--port", "5001"]) == 0
    place = f"#/experiments/{run.info.experiment_id}/runs?viewStateShareKey=alignscope&workflowType=machine_learning"
    assert f"http://127.0.0.1:5001/{place}" in capsys.readouterr().out
    assert records_mlflow.page_of(config(root), "nowhere") == records_mlflow.page_of(config(root), None) == "#/experiments?workflowType=machine_learning"


@pytest.mark.slow
def test_an_artefact_is_a_model_that_pyfunc_serves(overrides, tmp_path, monkeypatch):
    import mlflow

    from pipeline import train
    from pipeline.core import compose as compose_room
    from pipeline.core.files import read_jsonl
    from pipeline.serving import pyfunc

    own = [word for word in overrides if not word.startswith("tracking=")]
    database = f"sqlite:///{tmp_path}/mlflow.db"
    words = [*own, f"tracking.uri={database}", f"tracking.artifacts={tmp_path}/kept", "experiment=mine", "technique=lora", "train_rows=16", "train.steps=4"]
    assert train.main(words) == 0
    mlflow.set_tracking_uri(database)
    try:
        [run] = mlflow.MlflowClient().search_runs([mlflow.get_experiment_by_name("mine").experiment_id])
        [output] = run.outputs.model_outputs
        monkeypatch.setattr(pyfunc, "compose", lambda: compose_room.compose(own))
        served = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
        said = read_jsonl(tmp_path / "results" / "mine" / "lora-s0-n16" / "predictions.jsonl")
        rows = {row["id"]: row for row in read_jsonl(Path(own[0].partition("=")[2]) / "vader_movies" / "test.jsonl")}
        asked = [one for one in said if one["split"] == "test"][:6]
        assert served.predict([rows[one["id"]]["prompt"] for one in asked]) == [one["prediction"] for one in asked]
        again = [*words, "overwrite=true", "train.steps=5"]
        assert train.main(again) == 0
        [run] = mlflow.MlflowClient().search_runs([mlflow.get_experiment_by_name("mine").experiment_id])
        [new] = run.outputs.model_outputs
        [kept] = mlflow.MlflowClient().search_logged_models([run.info.experiment_id])
        assert kept.model_id == new.model_id != output.model_id
    finally:
        mlflow.set_tracking_uri(None)
