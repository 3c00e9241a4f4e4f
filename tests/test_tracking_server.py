"""tracking=server: MLflow's own server over PostgreSQL with a folder of artefacts and users, and writers that do not share a lock."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import postgres
import pytest
import report_cells

from pipeline.core.compose import CONF, compose
from pipeline.records import mlflow as records_mlflow
from pipeline.records.results import write

SPAWN = multiprocessing.get_context("spawn")
WRITERS, RUNS = 8, 50
ADMIN = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "300", "MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "a password of twelve"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, folder of the artefacts)."""
    root = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with postgres.running() as database:
        environment = {**os.environ, "PGPASSWORD": postgres.PASSWORD, "MLFLOW_BACKEND_STORE_URI": database.url("mlflow", "postgresql+psycopg"),
                       "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN["MLFLOW_TRACKING_PASSWORD"], "MLFLOW_FLASK_SERVER_SECRET_KEY": "a secret",
                       "MLFLOW_AUTH_CONFIG_PATH": str(CONF / "tracking/basic_auth.ini"),
                       "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        words = ["server", "--app-name", "basic-auth", "--host", "127.0.0.1", "--port", str(port), "--artifacts-destination",
                 str(root / "artefacts"), "--workers", "2"]
        with open(root / "log", "w") as log:
            process = subprocess.Popen([Path(sys.executable).parent / "mlflow", *words], env=environment, cwd=root, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 180
            while not _healthy(port):
                assert process.poll() is None and time.monotonic() < end, (root / "log").read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", root / "artefacts"
        finally:
            process.terminate()
            process.wait(30)


def _healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
    except OSError:
        return False


def config(root: Path, address: str, work: str = "work"):
    return compose(["experiments=quick", "tracking=server", f"tracking.uri={address}", f"paths.work={root}/{work}", f"paths.results={root}/results"])


def _write(root: Path, address: str, number: int, seeds: list[int]) -> None:
    """A writer, as on a machine of its own: its lock is nobody else's."""
    cfg = config(root, address, f"work-{number}")
    for seed in seeds:
        assert records_mlflow.log_cell(root / "results/quick" / f"lora-s{seed}-n200", cfg)


def cells(root: Path, count: int) -> None:
    for seed in range(count):
        write(root / "results/quick" / f"lora-s{seed}-n200", report_cells.result("lora", seed=seed))


def runs(address: str) -> list:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name("quick")
    return list(client.search_runs([experiment.experiment_id], max_results=5000))


def at_once(root: Path, address: str, shares: list[list[int]]) -> None:
    processes = [SPAWN.Process(target=_write, args=(root, address, number, seeds)) for number, seeds in enumerate(shares)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(800)
    assert [p.exitcode for p in processes] == [0] * len(shares)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_eight_writers_write_fifty_runs_each(server, tmp_path, monkeypatch, capfd):
    address, artefacts = server
    for key, value in ADMIN.items():
        monkeypatch.setenv(key, value)
    cells(tmp_path, WRITERS * RUNS)
    at_once(tmp_path, address, [list(range(number * RUNS, (number + 1) * RUNS)) for number in range(WRITERS)])
    written = runs(address)
    by_cell = Counter(r.data.tags[records_mlflow.CELL] for r in written)
    assert len(written) == len(by_cell) == WRITERS * RUNS and all(records_mlflow.DIGEST in r.data.tags for r in written)
    assert len(list(artefacts.rglob("result.json"))) == WRITERS * RUNS and "was not written" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_writers_of_the_same_cells_leave_one_run_of_each(server, tmp_path, monkeypatch):
    address, _ = server
    for key, value in ADMIN.items():
        monkeypatch.setenv(key, value)
    cells(tmp_path, 6)
    for seed in range(6):  # others than those of before, which the server still has
        write(tmp_path / "results/quick" / f"lora-s{seed}-n200", report_cells.result("lora", seed=seed, right=111))
    at_once(tmp_path, address, [list(range(6))] * 4)
    mine = [r for r in runs(address) if r.data.tags[records_mlflow.CELL] in {f"quick/lora-s{seed}-n200" for seed in range(6)}]
    assert Counter(r.data.tags[records_mlflow.CELL] for r in mine) == {f"quick/lora-s{seed}-n200": 1 for seed in range(6)}
    assert all(records_mlflow.DIGEST in r.data.tags for r in mine)


@pytest.mark.slow
def test_without_its_credentials_it_is_one_warning_that_says_which(server, tmp_path, capsys):
    cells(tmp_path, 1)
    assert not records_mlflow.log_cell(tmp_path / "results/quick/lora-s0-n200", config(tmp_path, server[0]))
    error = capsys.readouterr().err
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in error and len(error.strip().splitlines()) == 1


def test_a_password_in_the_address_is_refused():
    from pipeline import tracking

    assert tracking.main(["backfill", "tracking=server", "tracking.uri=http://me:secret@host:5000"]) == 2


def test_the_address_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:1234")
    assert compose(["tracking=server"]).tracking.uri == "http://somewhere:1234"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert compose(["tracking=server"]).tracking.uri == "http://127.0.0.1:5000"
