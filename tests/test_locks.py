"""Locks between processes: they name their holder, end with it however it ends, and are taken in turn."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import locks
from pipeline.core.files import UserError

FORK = multiprocessing.get_context("fork")


def hold(path: Path, ready: Any, seconds: float = 60) -> None:
    with locks.held(path):
        ready.set()
        time.sleep(seconds)


def holding(path: Path) -> Any:
    """A process that holds the lock."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(path, ready))
    process.start()
    assert ready.wait(20)
    return process


def test_a_lock_names_its_holder_and_a_killed_holder_leaves_none(tmp_path):
    process = holding(tmp_path / "locks" / "a.lock")
    with pytest.raises(locks.Busy, match=f"process {process.pid} holds the lock .*a.lock; wait for it, or end it, then run again"), \
         locks.held(tmp_path / "locks" / "a.lock"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locks.held(tmp_path / "locks" / "a.lock"):
        assert locks.holder(tmp_path / "locks" / "a.lock") == f"process {os.getpid()}"


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*; free space or fix the path, then run again"), locks.held(tmp_path / "file" / "a.lock"):
        pass


def test_a_wait_without_limit_names_who_is_waited_for_and_ends_with_him(tmp_path, capfd):
    process = holding(tmp_path / "a.lock")
    threading.Timer(0.3, process.kill).start()
    with locks.waited(tmp_path / "a.lock", "waiting for {holder}, which writes to {x}"):
        assert locks.holder(tmp_path / "a.lock") == f"process {os.getpid()}"
    process.join()
    with locks.waited(tmp_path / "a.lock", "waiting for {holder}"):
        pass
    assert capfd.readouterr().out == f"waiting for process {process.pid}, which writes to {{x}}\n"


def greedy(path: Path, log: Path, rounds: int) -> None:
    for _ in range(rounds):
        with locks.in_turn(path), open(log, "a", encoding="utf-8") as out:
            out.write(f"{os.getpid()}\n")
            out.flush()
            time.sleep(0.05)


@pytest.mark.slow
def test_who_takes_a_lock_over_and_over_lets_others_in_between(tmp_path):
    processes = [FORK.Process(target=greedy, args=(tmp_path / "a.lock", tmp_path / "log", 15)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    order = (tmp_path / "log").read_text().split()
    assert len(order) == 45 and {p.exitcode for p in processes} == {0}
    all_there = max(order.index(str(p.pid)) for p in processes)
    assert all_there < 15, "nobody waits until another one is through"
    assert sum(a == b for a, b in itertools.pairwise(order[all_there:30])) <= 2, "nobody has it twice in a row while others wait"


def test_a_wait_is_told_once_and_ends_with_the_name_of_the_lock_and_its_holder(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(locks, "SAY_S", 0.05)
    monkeypatch.setattr(locks, "PATIENCE_S", 0.3)
    path = tmp_path / "mlflow.db.lock"
    process = holding(path)
    for _ in range(2):
        with pytest.raises(locks.Busy, match=rf"process {process.pid} has held the lock {path} for 0.3 s; wait for it, or end it, then run again"), \
             locks.in_turn(path):
            pass
    process.kill()
    process.join()
    assert capfd.readouterr().err == f"waiting for the lock {path}, which process {process.pid} holds\n"


def test_a_queue_that_moves_is_waited_for_longer_than_one_that_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SAY_S", 0.05)
    monkeypatch.setattr(locks, "PATIENCE_S", 0.5)
    others = [FORK.Process(target=greedy_once, args=(tmp_path / "a.lock", 0.3)) for _ in range(6)]
    for process in others:
        process.start()
    time.sleep(0.1)
    with locks.in_turn(tmp_path / "a.lock"):
        pass
    for process in others:
        process.join()
    assert {p.exitcode for p in others} == {0}


def greedy_once(path: Path, seconds: float) -> None:
    with locks.in_turn(path):
        time.sleep(seconds)
