"""Work that is timed has the device alone, other work does not wait for other work, and who waits to be alone goes first."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from pipeline.measure import turns
from pipeline.measure.clock import Meter
from pipeline.measure.turns import Turns

FORK = multiprocessing.get_context("fork")


def other(folder: Path, work: str) -> FORK.Process:
    """Another process that works `beside` or `alone` until the file `stop` is there, and then lets go; it marks that it has begun."""
    process = FORK.Process(target=_work, args=(folder, work))
    process.start()
    return process


def _work(folder: Path, work: str) -> None:
    mine = Turns(folder, "cpu")
    if work == "beside":
        mine.beside()
        (folder / "begun").touch()
        while not (folder / "stop").exists():
            mine.point()
            time.sleep(0.002)
        os._exit(0)
    with mine.alone():
        (folder / "begun").touch()
        while not (folder / "stop").exists():
            time.sleep(0.002)
    os._exit(0)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} in vain"
        time.sleep(0.002)


def test_who_works_beside_lets_who_is_timed_in_at_its_next_point_and_waits_meanwhile(tmp_path):
    process = other(tmp_path, "beside")
    wait_for(tmp_path / "begun")
    mine = Turns(tmp_path, "cpu")
    mine.beside()  # at once: nobody is timed
    assert mine.waited_s < 0.2
    with mine.alone(), mine.alone():
        (tmp_path / "stop").touch()
        process.join(0.2)
        assert process.exitcode is None, "the other one stands still while this one is alone"
    assert 0.2 <= mine.alone_s < 5, "once, however often it was asked for"
    process.join(10)
    assert process.exitcode == 0


def test_what_is_not_timed_lets_another_be_timed_meanwhile_and_goes_on_alone(tmp_path):
    mine = Turns(tmp_path, "cpu")
    with mine.alone():
        process = other(tmp_path, "alone")
        process.join(0.1)
        assert not (tmp_path / "begun").exists(), "in line"
        (tmp_path / "stop").touch()
        with mine.between():
            process.join(10)
            assert process.exitcode == 0, "it had the device alone"
        late = FORK.Process(target=lambda: Turns(tmp_path, "cpu").beside())
        late.start()
        late.join(0.2)
        assert late.exitcode is None, "alone again"
    late.join(10)
    assert late.exitcode == 0


def test_after_what_is_not_timed_nobody_waits_to_be_alone_again_where_nothing_timed_is_left(tmp_path):
    mine = Turns(tmp_path, "cpu")
    with mine.alone():
        with mine.between(again=False):
            process = other(tmp_path, "alone")
            mine.leave()  # as at a point
            wait_for(tmp_path / "begun")
        taken, waited = mine.alone_s, mine.waited_s
        assert process.is_alive(), "this one goes on though another is alone"
        (tmp_path / "stop").touch()
    process.join(10)
    assert process.exitcode == 0 and mine.alone_s == taken and mine.waited_s == waited and not mine._here


def test_at_a_point_no_more_is_queued_than_since_the_point_before(tmp_path, monkeypatch):
    events: list[str] = []

    class Mark:
        def __init__(self) -> None:
            self.number = sum(event.startswith("mark") for event in events) + 1
            events.append(f"mark {self.number}")

        def synchronize(self) -> None:
            events.append(f"wait {self.number}")

    monkeypatch.setattr(turns, "marked", lambda device: Mark())
    mine = Turns(tmp_path, "cpu")
    mine.point()
    assert events == [], "without the device nothing is queued"
    mine.beside()
    for _ in range(3):
        mine.point()
    assert events == ["mark 1", "mark 2", "wait 1", "mark 3", "wait 2"]
    with mine.alone():
        mine.point()
    assert len(events) == 5, "nothing is waited for where it is timed"


def test_nobody_comes_in_while_one_is_alone_and_a_killed_one_lets_go(tmp_path):
    process = other(tmp_path, "alone")
    wait_for(tmp_path / "begun")
    late = FORK.Process(target=lambda: Turns(tmp_path, "cpu").beside())
    late.start()
    late.join(0.2)
    assert late.exitcode is None
    process.kill()
    late.join(10)
    assert late.exitcode == 0


def test_waiting_is_no_phase_and_not_of_the_wall_clock(tmp_path):
    process = other(tmp_path, "alone")
    wait_for(tmp_path / "begun")
    meter = Meter()
    meter.waited = turns.waited_s
    turns.join(tmp_path, "cpu")
    try:
        later = FORK.Process(target=lambda: (time.sleep(0.3), (tmp_path / "stop").touch()))
        later.start()
        with meter.phase("load"):
            turns.beside()
        with meter.phase("train"), turns.alone():
            time.sleep(0.05)
        phases = meter.phases()
    finally:
        turns.leave()
    process.join(10)
    later.join(10)
    assert meter.waited_s >= 0.25
    assert phases.load_s < 0.2 and phases.wall_s == pytest.approx(phases.load_s + phases.train_s + phases.other_s, abs=1e-3)
    assert phases.wall_s < 0.25


def test_alone_on_a_machine_that_nobody_shares_costs_nothing():
    with turns.alone(), turns.away():
        turns.point()
    assert turns.waited_s() == 0.0 and not turns.shared()
