"""pipeline.cells killed, and two of them at once: no cell is computed twice or lost, and every one reaches MLflow."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import sweep, train
from pipeline.cell import grid, identity, locks
from pipeline.cell import run as cell_run
from pipeline.core import locks as core_locks
from pipeline.core.compose import compose
from pipeline.records import mlflow as records_mlflow
from pipeline.records.results import read
from pipeline.search import trials as search_trials

FORK = multiprocessing.get_context("fork")
SHORT = ["technique=lora", "precision=fp32", "experiment=tried", "train_rows=16", "train.batch_size=8", "train.steps=2", "evaluate.test_rows=8"]


@pytest.fixture
def words(overrides: list[str], imports: None) -> list[str]:
    return [*overrides, *SHORT]


@pytest.fixture
def mirrored(words: list[str], mirroring: Callable[[list[str]], list[str]]) -> list[str]:
    """The same with a database of MLflow's."""
    return mirroring(words)


def seeds(words: list[str], count: int = 3) -> list[Any]:
    return [compose([*words, f"seed={seed}"]) for seed in range(count)]


def runs(root: Path) -> list[str]:
    """Of which cells there are runs, from another process: this one goes on to fork."""
    with FORK.Pool(1) as pool:
        return pool.apply(_runs, (root,))


def _runs(root: Path) -> list[str]:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return sorted(r.data.tags[records_mlflow.CELL] for r in found if records_mlflow.DIGEST in r.data.tags)


def started(cells: list[Any]) -> Any:
    process = FORK.Process(target=lambda: os._exit(grid.run_cells(cells)))
    process.start()
    return process


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


def holding(cfg: Any, until: Path) -> Any:
    """A process that holds a cell until a second after a file is there."""
    process = FORK.Process(target=_hold, args=(locks.path_of(cfg), until))
    process.start()
    wait_for(lambda: core_locks.holder(locks.path_of(cfg)) == f"process {process.pid}")
    return process


def _hold(path: Path, until: Path) -> None:
    with core_locks.held(path):
        wait_for(until.exists)
        time.sleep(1)


@pytest.mark.slow
def test_cells_that_were_done_before_a_kill_reach_mlflow_at_the_next_start(words, mirrored, tmp_path, capfd):
    assert grid.run_cells(seeds(words)) == 0 and runs(tmp_path) == []
    assert grid.run_cells(seeds(mirrored)) == 0
    assert "3 of 3 cells are done" in capfd.readouterr().out
    assert runs(tmp_path) == [f"tried/lora-s{seed}-n16" for seed in range(3)]


@pytest.mark.slow
def test_every_cell_is_mirrored_before_the_next_one_starts_and_a_kill_loses_no_run(mirrored, tmp_path, capfd):
    cells = seeds(mirrored)
    process = started(cells)
    wait_for((identity.folder_of(cells[1]) / "result.json").exists)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    ended = (identity.folder_of(cells[1]) / "result.json").stat().st_mtime_ns
    assert "tried/lora-s0-n16" in runs(tmp_path)
    assert grid.run_cells(cells) == 0, "no lock is left behind"
    assert runs(tmp_path) == [f"tried/lora-s{seed}-n16" for seed in range(3)]
    computed = Counter(re.findall(r"(lora-s\d-n16): test", capfd.readouterr().out))
    computed.setdefault("lora-s1-n16", 1)  # the kill may come before its line
    assert computed == {f"lora-s{seed}-n16": 1 for seed in range(3)}
    assert (identity.folder_of(cells[1]) / "result.json").stat().st_mtime_ns == ended, "computed once"


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_one_warning(words, capfd):
    cells = seeds([*(w for w in words if w != "tracking=none"), "tracking.uri=http://127.0.0.1:9"], 2)
    assert grid.run_cells(cells) == 0
    assert capfd.readouterr().err.count("no server answers there") == 1
    assert all((identity.folder_of(cfg) / "result.json").exists() for cfg in cells)


@pytest.mark.parametrize("more", [[], pytest.param(["pack=true"], marks=pytest.mark.slow)])
def test_two_at_once_compute_each_cell_once_and_both_end_with_all_of_them(words, more, capfd):
    cells = seeds([*words, *more], 4)
    both = [started(cells), started(cells)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    out = capfd.readouterr().out
    assert Counter(re.findall(r"(lora-s\d-n16): test", out)) == {f"lora-s{seed}-n16": 1 for seed in range(4)}
    assert len(re.findall(r"trained with \d at once", out)) >= (3 if more else 0), "each may have taken its share of the seeds"


def test_the_second_takes_the_next_free_cell_and_waits_for_the_others(words, capfd):
    cells = seeds(words)
    lock = holding(cells[0], identity.folder_of(cells[2]) / "result.json")
    assert grid.run_cells(cells) == 0
    out = capfd.readouterr().out
    waiting = f"waiting for lora-s0-n16, which process {lock.pid} computes"
    assert out.index("lora-s2-n16: test") < out.index(waiting) < out.index("lora-s0-n16: test"), "who held it left no result, so it is computed here"
    lock.join()


def test_a_cell_that_begins_at_one_that_another_process_computes_waits_for_it(words, capfd):
    first, second = seeds(words, 1)[0], compose([*words, "seed=0", "variant=on", "start=lora"])
    lock = holding(first, locks.path_of(first))
    assert grid.run_cells([first, second]) == 0
    lock.join()
    assert read(identity.folder_of(second)).start == "lora"


@pytest.mark.parametrize(("command", "says"), [
    (train, r"cell lora-s0-n16 is being computed by process \d+"), (sweep, r"another sweep is at work in .*, in process \d+"),
])
def test_of_two_that_do_the_same_at_once_one_is_refused(command, says, words, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(locks, "DYING_S", 0.1)
    monkeypatch.setattr(search_trials, "LOCK_S", 0.1)
    choices = ["sweep.confirm=false", "sweep.space={method.config.r: {choices: [1, 2]}}"]
    both = [FORK.Process(target=lambda: os._exit(command.main([*words, *choices]))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert sorted(process.exitcode for process in both) == [0, 2]
    assert re.search(rf"error: {says}; wait for it, or end it", capfd.readouterr().err)
    made = list(tmp_path.rglob("result.json" if command is train else "best.json"))
    assert len(made) == 1 and not list(tmp_path.rglob("*.partial*")) and not list(tmp_path.rglob("checkpoints/*"))


def test_a_checkpoint_that_a_kill_after_the_result_left_is_removed_at_the_next_start(words):
    cfg = seeds(words, 1)[0]
    assert grid.run_cells([cfg]) == 0
    dead = FORK.Process(target=int)
    dead.start()
    dead.join()
    path = identity.checkpoint_of(cfg)
    path.parent.mkdir(exist_ok=True)
    for left in (path, identity.packed_of(cfg), path.with_name(f".{path.name}.{dead.pid}.partial")):
        left.write_bytes(b"half")
    other = path.with_name("another-cell.pt")
    other.touch()
    assert grid.run_cells([cfg]) == 0 and list(path.parent.iterdir()) == [other]


def test_a_single_cell_that_another_process_computes_is_refused_with_its_pid(words, capfd, monkeypatch):
    monkeypatch.setattr(locks, "DYING_S", 0.1)
    monkeypatch.setattr(cell_run, "run", lambda *_, **__: pytest.fail("it is computed twice"))
    with locks.alone(compose(words)):
        assert train.main(words) == 2
    assert capfd.readouterr().err == f"error: cell lora-s0-n16 is being computed by process {os.getpid()}; wait for it, or end it, then run again\n"
