"""The MLflow mirror: fixed names, one run a cell, the same live and by backfill, and never in the way of training."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import tracking
from pipeline.core import locks
from pipeline.core.compose import ROOT, compose
from pipeline.core.files import write_json, write_jsonl, write_text
from pipeline.measure.clock import Phases
from pipeline.measure.memory import Memory
from pipeline.records import mlflow as records_mlflow
from pipeline.records.results import Forgetting, Inference, Result, Score, Size, Work, write

PHASES = Phases(wall_s=60, startup_s=5, load_s=5, warmup_s=0, train_s=30, validate_s=5, save_s=1, evaluate_s=13.5, other_s=0.5)


def a_result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "experiment": "quick",
        "cell": "lora-s0-n200",
        "technique": "lora",
        "family": "reparametrised",
        "method": "lora",
        "objective": "labels",
        "precision": "bf16",
        "task": "vader_movies",
        "model": "smollm2_135m",
        "seed": 0,
        "train_rows": 200,
        "status": "ok",
        "kind": "trained",
        "labelled_rows": 240,
        "hyperparameters": {"r": 8, "alpha": 16, "lr": 0.001, "dropout": None},
        "scores": {
            "test": Score(rows=300, accuracy=0.8, accuracy_low=0.75, accuracy_high=0.84, macro_f1=0.79),
            "validation": Score(rows=40, accuracy=0.85, accuracy_low=0.7, accuracy_high=0.93),
            "transfer/tweets": Score(rows=100, accuracy=0.7, accuracy_low=0.6, accuracy_high=0.78),
        },
        "phases": PHASES,
        "memory": Memory(kind="cpu_rss", peak_bytes=2_000_000_000),
        "work": Work(steps=13, tokens=9000, tokens_per_s=300.0, energy_j=None, engine="eager", engine_reason="why"),
        "size": Size(trainable=2_400_000, total=136_000_000, artefact_bytes=9_700_000),
        "inference": Inference(latency_s=0.05),
        "forgetting": Forgetting(perplexity=31.0, perplexity_base=30.0, pairs=0.9, pairs_base=0.92),
        "history": [{"step": 1, "loss": 2.0, "lr": 0.0005}, {"step": 13, "loss": 0.5, "lr": 0.0, "validation_metric": 0.85}],
        "notes": ["dequantised base"],
        "hardware": {"device": "cpu", "gpu": None, "cpu": "a CPU", "cpu_count": 2},
        "provenance": {"git_commit": "abc", "git_dirty": False, "data_sha256": "d" * 64, "started": "2026-01-02T03:04:05.678+00:00"},
        "config": {"technique": {"name": "lora"}, "seed": 0},
    }
    return Result(**(values | changes))


def write_cell(root: Path, **changes: Any) -> Path:
    result = a_result(**changes)
    folder = root / "results" / result.experiment / result.cell
    write_jsonl(folder / "predictions.jsonl", [{"split": "test", "id": "1", "correct": True}])
    write(folder, result)
    return folder


def write_sweep(root: Path, finished: bool = True) -> Path:
    folder = root / "sweeps" / "quick" / "lora"
    about = {"experiment": "quick", "technique": "lora", "task": "vader_movies", "model": "smollm2_135m", "seed": 0, "train_rows": 200}
    space = {
        "metric": "accuracy",
        "sampler": "brute_force",
        "space": {"method.config.r": {"choices": [1, 2]}},
        "objectives": ["validation"],
    }
    settings = ["method.config.r", "method.config.lora_alpha"]
    write_json(folder / "sweep.json", about | space | {"settings": settings, "provenance": {"started": "2026-01-02T03:00:00+00:00"}})
    write_text(
        folder / "trials.csv",
        "number,state,status,method.config.r,method.config.lora_alpha,validation,seconds,started,train_s,tokens_per_s,peak_bytes,memory_kind\n"
        "0,COMPLETE,ok,1,2,0.7,10.5,2026-01-02T03:00:01+00:00,8.0,200.0,1000,cpu_rss\n"
        "1,FAIL,oom,2,4,,3.0,2026-01-02T03:00:12+00:00,,,,\n",
    )
    if finished:
        write_json(folder / "best.json", {"values": {"validation": 0.7}, "finished": "2026-01-02T03:00:15+00:00"})
    return folder


def config(root: Path, *more: str) -> Any:
    return compose([*paths(root), "experiments=quick", *more])


def paths(root: Path, database: str = "mlflow.db") -> list[str]:
    folders = [f"paths.{name}={root}/{name}" for name in ("results", "sweeps", "work")]
    return [*folders, f"tracking.uri=sqlite:///{root}/{database}", f"tracking.artifacts={root}/artifacts-{database}"]


@pytest.fixture
def root(tmp_path: Path, empty_database: Path) -> Path:
    """A place whose MLflow database exists already (making one takes seconds)."""
    for name in ("mlflow.db", "again.db"):
        shutil.copy(empty_database, tmp_path / name)
    return tmp_path


def client(root: Path, database: str = "mlflow.db") -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{root}/{database}")


def runs(root: Path, database: str = "mlflow.db") -> list[Any]:
    mlflow = client(root, database)
    return list(mlflow.search_runs([e.experiment_id for e in mlflow.search_experiments()]))


def contents(root: Path, database: str) -> dict[str, Any]:
    """All that a database holds of each run, by cell; run ids are replaced by cells."""
    mlflow, found = client(root, database), {}
    cells = {r.info.run_id: r.data.tags[records_mlflow.CELL] for r in runs(root, database)}
    for run in runs(root, database):
        info, data = run.info, run.data
        history = [(m.key, m.value, m.timestamp, m.step) for key in data.metrics for m in mlflow.get_metric_history(info.run_id, key)]
        files = {
            f.path: (f.file_size, Path(info.artifact_uri.removeprefix("file://"), f.path).read_bytes())
            for f in mlflow.list_artifacts(info.run_id)
        }
        inputs = sorted((str(i.dataset.to_dictionary()), i.tags[0].value) for i in run.inputs.dataset_inputs)
        tags = {k: cells[v] if k == records_mlflow.PARENT else v for k, v in data.tags.items()}
        about = (mlflow.get_experiment(info.experiment_id).name, info.run_name, info.status, info.start_time, info.end_time)
        found[cells[info.run_id]] = (about, data.params, tags, sorted(history), inputs, files)
    return found


def test_a_cell_is_one_run_under_the_fixed_names(root):
    records_mlflow.log_cell(write_cell(root), config(root))
    [run] = runs(root)
    params = run.data.params
    assert {k: params[k] for k in ("technique", "method", "objective", "precision", "model", "task")} == {
        "technique": "lora", "method": "lora", "objective": "labels", "precision": "bf16", "model": "smollm2_135m", "task": "vader_movies",
    }  # fmt: skip
    assert [params[k] for k in ("r", "alpha", "lr", "train_rows", "seed")] == ["8", "16", "0.001", "200", "0"]
    wanted = {
        "test/accuracy": 0.8, "validation/accuracy": 0.85, "test/macro_f1": 0.79, "transfer/tweets/accuracy": 0.7,
        "forgetting/perplexity": 31.0, "forgetting/pairs_base": 0.92,
        "train/time_s": 30.0, "train/tokens_per_s": 300.0, "train/peak_bytes": 2e9, "size/trainable": 2.4e6,
        "size/artefact_bytes": 9.7e6, "inference/latency_s": 0.05, "phases/wall_s": 60.0, "phases/other_s": 0.5,
    }  # fmt: skip
    assert {k: run.data.metrics[k] for k in wanted} == wanted
    tags = run.data.tags
    assert {k: tags[k] for k in ("experiment", "technique", "family", "seed", "git_commit", "status", "memory_kind")} == {
        "experiment": "quick", "technique": "lora", "family": "reparametrised", "seed": "0",
        "git_commit": "abc", "status": "ok", "memory_kind": "cpu_rss",
    }  # fmt: skip
    assert (tags["kind"], tags["engine"], tags["engine_reason"], tags["shared_process"]) == ("trained", "eager", "why", "False")
    assert run.data.params["labelled_rows"] == "240"
    assert tags["hardware"] == "a CPU (2 cores)" and tags[records_mlflow.CELL] == "quick/lora-s0-n200"
    assert run.info.status == "FINISHED" and run.info.end_time - run.info.start_time == 60_000 and run.info.start_time == 1767323045678


def test_what_was_not_measured_is_not_logged(root):
    records_mlflow.log_cell(write_cell(root), config(root))
    [run] = runs(root)
    assert "train/energy_j" not in run.data.metrics and "dropout" not in run.data.params and "error" not in run.data.tags


def test_curves_inputs_and_files(root):
    records_mlflow.log_cell(write_cell(root), config(root))
    [run] = runs(root)
    history = client(root).get_metric_history(run.info.run_id, "history/loss")
    assert [(m.step, m.value) for m in history] == [(1, 2.0), (13, 0.5)]
    inputs = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
    assert set(inputs) == {"training", "testing"}
    assert inputs["training"].name == "vader_movies-train" and "d" * 64 in inputs["testing"].profile
    files = {f.path for f in client(root).list_artifacts(run.info.run_id)}
    assert files == {"config.yaml", "predictions.jsonl", "result.json"}


def test_a_cell_logged_again_stays_one_run_and_a_changed_one_is_brought_up_to_date(root):
    folder = write_cell(root)
    records_mlflow.log_cell(folder, config(root))
    [before] = runs(root)
    records_mlflow.log_cell(folder, config(root))
    [again] = runs(root)
    assert again.info.run_id == before.info.run_id
    write_cell(root, hyperparameters={"r": 4})
    records_mlflow.log_cell(folder, config(root))
    [after] = runs(root)
    assert after.data.params["r"] == "4" and "alpha" not in after.data.params


def test_a_run_left_half_written_is_made_anew(root):
    folder = write_cell(root)
    records_mlflow.log_cell(folder, config(root))
    [half] = runs(root)
    client(root).delete_tag(half.info.run_id, records_mlflow.DIGEST)
    records_mlflow.log_cell(folder, config(root))
    [whole] = runs(root)
    assert whole.info.run_id != half.info.run_id and records_mlflow.DIGEST in whole.data.tags


def test_out_of_memory_is_a_failed_run(root):
    bare = dict.fromkeys(("phases", "memory", "work", "size", "inference", "forgetting"))
    records_mlflow.log_cell(write_cell(root, status="oom", error="ended by the kernel", scores={}, history=[], **bare), config(root))
    [run] = runs(root)
    assert run.info.status == "FAILED" and run.data.tags["status"] == "oom" and run.data.tags["error"] == "ended by the kernel"
    assert run.data.metrics == {} and run.info.end_time == run.info.start_time


def test_a_diverged_cell_is_a_failed_run_with_what_was_measured(root):
    records_mlflow.log_cell(write_cell(root, status="diverged", error="training diverged at step 3"), config(root))
    [run] = runs(root)
    assert (run.info.status, run.data.tags["status"], run.data.tags["error"]) == ("FAILED", "diverged", "training diverged at step 3")
    assert "phases/train_s" in run.data.metrics


def test_a_sweep_is_a_parent_with_a_child_a_trial(root):
    records_mlflow.log_sweep(write_sweep(root), config(root))
    found = {r.data.tags[records_mlflow.CELL]: r for r in runs(root)}
    assert set(found) == {"quick/sweep/lora", "quick/sweep/lora/0", "quick/sweep/lora/1"}
    parent, good, oom = (found[k] for k in sorted(found))
    assert parent.data.metrics == {"best/validation": 0.7} and parent.info.status == "FINISHED"
    assert {r.data.tags[records_mlflow.PARENT] for r in (good, oom)} == {parent.info.run_id}
    assert good.data.params["r"] == "1" and good.data.params["alpha"] == "2" and good.data.metrics["validation/accuracy"] == 0.7
    assert oom.info.status == "FAILED" and oom.data.tags["status"] == "oom" and "validation/accuracy" not in oom.data.metrics


def test_a_sweep_that_goes_on_keeps_its_children_and_one_started_anew_loses_the_old_ones(root):
    folder = write_sweep(root, finished=False)
    records_mlflow.log_sweep(folder, config(root))
    before = {r.data.tags[records_mlflow.CELL]: r for r in runs(root)}
    assert before["quick/sweep/lora"].info.status == "RUNNING"
    write_sweep(root)
    records_mlflow.log_sweep(folder, config(root))
    after = {r.data.tags[records_mlflow.CELL]: r for r in runs(root)}
    assert after["quick/sweep/lora/0"].info.run_id == before["quick/sweep/lora/0"].info.run_id
    assert after["quick/sweep/lora/0"].data.tags[records_mlflow.PARENT] == after["quick/sweep/lora"].info.run_id
    text = (folder / "trials.csv").read_text().splitlines(keepends=True)
    write_text(folder / "trials.csv", "".join(text[:2]))
    records_mlflow.log_sweep(folder, config(root))
    assert {r.data.tags[records_mlflow.CELL] for r in runs(root)} == {"quick/sweep/lora", "quick/sweep/lora/0"}


def test_backfill_equals_what_was_written_live(root, capsys):
    cells = [{}, {"cell": "full-s0-n200", "technique": "full"}, {"experiment": "other", "status": "oom"}]
    for folder in [write_cell(root, **changes) for changes in cells]:
        records_mlflow.log_cell(folder, config(root))
    records_mlflow.log_sweep(write_sweep(root), config(root))
    assert tracking.main(["backfill", *paths(root, "again.db")]) == 0
    assert "3 cells and 1 sweeps" in capsys.readouterr().out
    live, again = contents(root, "mlflow.db"), contents(root, "again.db")
    assert len(live) == 6 and live == again
    assert tracking.main(["backfill", *paths(root, "again.db")]) == 0
    assert "runs: 0 written, 6 up to date" in capsys.readouterr().out


def test_backfill_takes_one_experiment(root):
    write_cell(root), write_cell(root, experiment="other")
    assert tracking.main(["backfill", "experiment=other", *paths(root)]) == 0
    assert [r.data.tags["experiment"] for r in runs(root)] == ["other"]


def test_backfill_goes_on_past_a_result_of_an_older_schema_and_names_it(root, capsys):
    write_cell(root), write_cell(root, cell="old", schema=0)
    assert tracking.main(["backfill", *paths(root)]) == 2
    assert "old/result.json was written by schema 0" in capsys.readouterr().err
    assert len(runs(root)) == 1


@pytest.mark.parametrize("words", [[], ["backfil"], ["experiments=quick"], ["backfill", "--help"]])
def test_anything_but_backfill_prints_the_usage(words, capsys):
    assert tracking.main(words) == 2
    assert "usage: python -m pipeline.tracking backfill" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["tracking=none"], "tracking is off"),
        ([], "there is no result below"),
        (["experiments=quik"], "unknown experiments 'quik'"),
        (["+tracking.url=x"], "unknown config key 'tracking.url', did you mean 'uri'?"),
    ],
)
def test_backfill_refuses_in_one_sentence(tmp_path, capsys, more, message):
    places = [p for p in paths(tmp_path) if "tracking" not in p]
    assert tracking.main(["backfill", *places, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_a_server_that_is_down_costs_one_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(records_mlflow, "_unreachable", set())
    folder, cfg = write_cell(tmp_path), config(tmp_path, "tracking.uri=http://127.0.0.1:9")
    before, at = dict(os.environ), time.monotonic()
    records_mlflow.log_cell(folder, cfg)
    assert time.monotonic() - at < 15
    warning = capsys.readouterr().err
    assert len(warning.splitlines()) == 1 and "no server answers" in warning
    assert "python -m pipeline.tracking backfill experiments=quick" in warning
    records_mlflow.log_cell(folder, cfg)
    assert capsys.readouterr().err == ""
    assert dict(os.environ) == before
    assert tracking.main(["backfill", *paths(tmp_path), "tracking.uri=http://127.0.0.1:9"]) == 2
    assert "cannot be written (no server answers there)" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "file").touch()
    records_mlflow.log_cell(write_cell(tmp_path), config(tmp_path, f"tracking.uri=sqlite:///{tmp_path}/file/mlflow.db"))
    warning = capsys.readouterr().err
    assert "was not written" in warning and len(warning.splitlines()) == 1


def test_a_lock_that_is_held_for_too_long_is_named_with_its_holder(root, capsys, monkeypatch):
    monkeypatch.setattr(locks, "SAY_S", 0.01)
    monkeypatch.setattr(locks, "PATIENCE_S", 0.1)
    folder = write_cell(root)
    with locks.held(root / "mlflow.db.lock"):
        assert tracking.main(["backfill", *paths(root)]) == 2
        told, error = capsys.readouterr().err.splitlines()
        records_mlflow.log_cell(folder, config(root))
        warning = capsys.readouterr().err
    assert told == f"waiting for the lock {root}/mlflow.db.lock, which process {os.getpid()} holds"
    assert error == f"error: process {os.getpid()} has held the lock {root}/mlflow.db.lock for 0.1 s; wait for it, or end it, then run again"
    assert f"was not written (process {os.getpid()} has held the lock" in warning and len(warning.splitlines()) == 1
    assert runs(root) == []


@pytest.mark.parametrize("held", [b"no database " * 400, bytes(8192), None], ids=["text", "zeros", "cut off"])
def test_a_damaged_database_is_named_and_left_as_it_is(root, capsys, held):
    path, folder = root / "mlflow.db", write_cell(root)
    held = path.read_bytes()[:5000] if held is None else held
    path.write_bytes(held)
    records_mlflow.log_cell(folder, config(root))
    warning = capsys.readouterr().err
    assert f"warning: sqlite:///{path} was not written (" in warning and "results are complete" in warning and len(warning.splitlines()) == 1
    assert tracking.main(["backfill", *paths(root)]) == 2
    error = capsys.readouterr().err
    assert f"error: sqlite:///{path} cannot be written (" in error and len(error.splitlines()) == 1 and path.read_bytes() == held


@pytest.mark.slow
def test_six_that_fill_one_fresh_database_at_once_write_every_run_and_say_what_they_wait_for(tmp_path):
    """Each its own experiment of 20 results: none gives up, and none waits until another one is through."""
    names = [f"e{number}" for number in range(6)]
    for name in names:
        for seed in range(20):
            write_cell(tmp_path, experiment=name, cell=f"lora-s{seed}-n200", seed=seed)
    started = [subprocess.Popen([sys.executable, "-m", "pipeline.tracking", "backfill", f"experiment={name}", *paths(tmp_path)], cwd=ROOT,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for name in names]
    said = [p.communicate() for p in started]
    assert [p.returncode for p in started] == [0] * 6, said
    assert all("20 cells and 0 sweeps" in out and "runs: 20 written" in out for out, _ in said)
    lines = [line for _, err in said for line in err.splitlines()]
    assert all(re.fullmatch(rf"waiting for the lock {tmp_path}/mlflow.db.lock, which (process \d+|another process) holds", line) for line in lines), lines
    found = [r.data.tags[records_mlflow.CELL] for r in runs(tmp_path)]
    assert len(found) == 120 == len(set(found))


def test_an_interrupted_creation_leaves_no_half_database(tmp_path, capsys, monkeypatch):
    import mlflow

    def half(tracking_uri: str) -> None:
        Path(tracking_uri.removeprefix("sqlite:///")).write_text("half a database")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mlflow, "MlflowClient", half)
    records_mlflow.log_cell(write_cell(tmp_path), config(tmp_path))
    assert "No space left" in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if "mlflow.db" in p.name and p.suffix != ".lock"]


@pytest.mark.parametrize("there", [True, False])
def test_a_tag_that_another_machine_inserts_at_the_same_moment_is_set_all_the_same(tmp_path, there):
    """MLflow looks, then inserts: the database refuses the second of two (seen with eight writers over PostgreSQL). Any other refusal is one."""
    tags: dict[str, str] = {}

    class Client:
        def get_experiment_by_name(self, name: str) -> Any:
            return SimpleNamespace(experiment_id="1", tags={})

        def get_experiment(self, experiment_id: str) -> Any:
            return SimpleNamespace(experiment_id="1", tags=tags)

        def set_experiment_tag(self, experiment_id: str, key: str, value: str) -> None:
            if key not in tags:
                tags.update({key: "the other machine's"} if there else {})
                raise RuntimeError("duplicate key value violates unique constraint")
            tags[key] = value

    mirror = records_mlflow.Mirror(Client(), None, tmp_path / "lock", lock_is_enough=False)
    if there:
        mirror.note("quick", "ours")
        assert tags[records_mlflow.NOTE].endswith("ours")
    else:
        with pytest.raises(RuntimeError, match="duplicate key"):
            mirror.note("quick", "ours")


def test_off_imports_nothing_of_mlflow(tmp_path):
    write_cell(tmp_path)
    code = f"""
        import sys
        from pipeline.records import mlflow as tracking
        from pipeline.core.compose import compose
        tracking.log_cell("{tmp_path}/results/quick/lora-s0-n200", compose(["tracking=none"]))
        assert "mlflow" not in sys.modules and "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)


def test_only_tracking_imports_mlflow():
    importing = [p.name for p in (ROOT / "pipeline").rglob("*.py") if re.search(r"^\s*(import|from) mlflow", p.read_text(), re.M)]
    assert importing == ["mlflow.py"]


@pytest.mark.slow
def test_three_first_users_at_once_make_one_database(tmp_path):
    cells = [write_cell(tmp_path, cell=f"lora-s{seed}-n200", seed=seed) for seed in range(3)]
    code = (
        "import sys; from pipeline.core import compose; from pipeline.records import mlflow as tracking; "
        "tracking.log_cell(sys.argv[1], compose.compose(sys.argv[2:]))"
    )
    words = [*paths(tmp_path), "experiments=quick"]
    started = [subprocess.Popen([sys.executable, "-c", code, str(c), *words], cwd=ROOT, stderr=subprocess.PIPE, text=True) for c in cells]
    assert not [line for p in started for line in p.communicate()[1].splitlines() if not line.startswith("waiting for the lock")]
    assert {r.data.tags["seed"] for r in runs(tmp_path)} == {"0", "1", "2"}


def test_every_number_of_a_result_reaches_mlflow():
    """A field added to the result's parts must not be forgotten here."""
    from pipeline.records.runs import _cell_metrics

    full = a_result(inference=Inference(0.1, 0.2, 3, 0.4), work=Work(1, 2, 3.0, 0.4, 0.5, False, 6.0))
    found = _cell_metrics(full)
    for prefix, part in (("phases", full.phases), ("size", full.size), ("inference", full.inference), ("train", full.work)):
        numbers = {f"{prefix}/{k}" for k, v in dataclasses.asdict(part).items() if v is not None and not isinstance(v, bool)}
        assert numbers <= set(found)
