"""Checks run side by side and beside the first cells' loading; no cell is asked or trained before all have passed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cell import ahead, grid, identity, inputs, preflight
from pipeline.cell.checks import Finding
from pipeline.cell.child import Child
from pipeline.cell.room import AtOnce
from pipeline.core.compose import compose
from pipeline.core.files import UserError
from pipeline.forecasting import rows as forecasting_rows
from pipeline.measure import machine, turns
from pipeline.models import base
from pipeline.records.finished import name as cell_name
from pipeline.records.results import read
from pipeline.training.loop import Loop

FORK = get_context("fork")
SHORT = ["technique=lora", "precision=fp32", "experiment=ahead", "train_rows=16", "train.batch_size=8", "train.steps=2", "evaluate.test_rows=8",
         "train.validations=0", "preflight=true"]
LONGEST_S = 120


@pytest.fixture
def words(overrides: list[str], imports: None) -> list[str]:
    return [*overrides, *SHORT]


def cells(words: list[str], *more: str) -> list[Any]:
    return [compose([*words, *more, "method.config.r=2"]), compose([*words, *more, "method.config.r=4", "variant=wider"])]


def two(_: Any) -> AtOnce:
    return AtOnce(2)


def mark(path: Path) -> None:
    path.touch()


def awaited(path: Path) -> None:
    watch = time.monotonic()
    while not path.exists():
        assert time.monotonic() - watch < LONGEST_S, f"{path.name} did not come"
        threading.Event().wait(0.02)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of marks: `loaded` once a cell stands at the gate, `too-early` where one trains before the checks are through."""
    passed, train = turns.passed, Loop.train

    def at_gate() -> None:
        mark(tmp_path / "loaded")
        passed()

    def training(loop: Loop) -> Any:
        if not (tmp_path / "checked").exists():
            mark(tmp_path / "too-early")
        return train(loop)

    monkeypatch.setattr(turns, "passed", at_gate)
    monkeypatch.setattr(Loop, "train", training)
    return tmp_path


def finds(monkeypatch: pytest.MonkeyPatch, places: Path, *wrong: Finding) -> None:
    """Have the checks wait for a cell that has loaded, and then find this of the wider cells."""

    def findings(group: Any, _: Any) -> Any:
        awaited(places / "loaded")
        if group[0].variant:
            threading.Event().wait(0.5)
            mark(places / "checked")
            yield from wrong

    monkeypatch.setattr(preflight, "findings", findings)


@pytest.mark.slow
def test_cells_load_while_checks_run_and_train_after_them(words, places, monkeypatch, capfd):
    finds(monkeypatch, places)
    monkeypatch.setattr(AtOnce, "places", 4)
    every = cells(words)
    assert grid.run_cells(every, limit=two) == 0
    assert (places / "checked").exists() and not (places / "too-early").exists()
    said = capfd.readouterr().out
    assert said.count("preflight: 2 techniques checked") == 1 and said.index("preflight:") < said.index("[1/2]") < said.index("[2/2]")
    result = read(identity.folder_of(every[0]))
    assert result.neighbours and result.neighbours.waited_s >= 0.4, "waiting for the checks is waiting"
    assert result.phases and result.phases.wall_s == pytest.approx(sum(v for k, v in vars(result.phases).items() if k != "wall_s"), abs=0.01)


def test_a_check_that_fails_ends_the_cells_that_loaded_beside_it(words, places, monkeypatch, capfd):
    finds(monkeypatch, places, Finding("engine", False, "its loss is another"))
    monkeypatch.setattr(AtOnce, "places", 4)
    every = cells(words)
    assert grid.run_cells(every, limit=two) == 2
    said = capfd.readouterr()
    assert said.err == ("preflight: lora: engine: its loss is another\n"
                        "error: no cell was started; change what is named above, or add preflight=false to go on regardless\n")
    assert "2 techniques checked" in said.out and "1 checks failed" in said.out and "[1/2]" not in said.out
    assert not (places / "too-early").exists() and not any((identity.folder_of(cfg) / "result.json").exists() for cfg in every)
    assert grid.run_cells([compose([*words, "technique=zero_shot", "preflight=false"])], limit=two) == 0, "no lock is left"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_while_cells_wait_at_the_gate_ends_them_and_the_checks(words, places, monkeypatch, number):
    def findings(group: Any, _: Any) -> Any:
        (places / f"check-{os.getpid()}").touch()
        threading.Event().wait(LONGEST_S)
        yield Finding("engine", True, "")

    passed = turns.passed

    def at_gate() -> None:
        (places / f"cell-{os.getpid()}").touch()
        passed()

    monkeypatch.setattr(preflight, "findings", findings)
    monkeypatch.setattr(turns, "passed", at_gate)
    monkeypatch.setattr(AtOnce, "places", 4)
    every = cells(words)
    command = FORK.Process(target=grid.run_cells, args=(every,), kwargs={"limit": two})
    command.start()
    watch = time.monotonic()
    while not (list(places.glob("check-*")) and list(places.glob("cell-*"))):
        assert command.is_alive() and time.monotonic() - watch < LONGEST_S
        time.sleep(0.05)
    os.kill(command.pid or 0, number)
    command.join(30)
    assert command.exitcode is not None, "it went on"
    time.sleep(0.2)
    for path in [*places.glob("check-*"), *places.glob("cell-*")]:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name.split("-")[1]), 0)
    assert not any((identity.folder_of(cfg) / "result.json").exists() for cfg in every)


def test_what_the_checks_find_is_not_said_by_the_cells_too(words, places, monkeypatch, capfd):
    monkeypatch.setattr(AtOnce, "places", 4)
    assert grid.run_cells(cells(words, "train.max_length=8"), limit=two) == 2
    said = capfd.readouterr().err
    assert said.count("error:") == 1 and said.count("preflight: lora: lengths:") == 2


def test_one_cell_at_a_time_begins_after_the_checks(words, places, monkeypatch, capfd):
    seen = places / "checked"

    def findings(group: Any, _: Any) -> Any:
        assert not (places / "loaded").exists()
        mark(seen)
        yield Finding("engine", True, "fine")

    monkeypatch.setattr(preflight, "findings", findings)
    assert grid.run_cells(cells(words)) == 0 and not (places / "too-early").exists()
    assert grid.run_cells(cells(words), limit=two) == 0
    assert "1 techniques" not in capfd.readouterr().out


def test_checks_have_as_many_processes_as_the_machine_and_the_device_hold(words, monkeypatch):
    groups = [[compose([*words, f"variant=v{i}"])] for i in range(5)]
    names = [cell_name(cfg) for (cfg,) in groups]

    def sizes(at_once: AtOnce, places: int) -> list[int]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AtOnce, "places", places)
            return [len(part) for part in ahead.dealt(groups, at_once)]

    assert sizes(AtOnce(2), 8) == [1] * 5 and sizes(AtOnce(2), 3) == [2, 2, 1] and sizes(AtOnce(1), 1) == [5]
    assert ahead.dealt([], AtOnce(4)) == []
    assert sizes(AtOnce(1, dict.fromkeys(names, 10), 30), 8) == [2, 2, 1], "three of them fill the device"
    assert sizes(AtOnce(2, {}, 30), 8) == [3, 2], "what is not known is not more than before"
    monkeypatch.setattr(machine, "cpu_count", lambda: 32)
    assert AtOnce(4, {}, 30).places == 24 and AtOnce(30, {}, 30).places == 30 and AtOnce(1).places == 1


def test_a_cell_beside_checks_needs_room_and_a_place(words, monkeypatch):
    every = cells(words)
    at_once = AtOnce(4, {cell_name(cfg): 10 for cfg in every}, 30)
    checks = SimpleNamespace(needs=lambda: [15], children=[])
    monkeypatch.setattr(AtOnce, "places", 4)
    pool = grid.Pool(every, inputs.Shared(), grid.Watcher(), at_once, grid.is_done, lambda _: None, checks=checks)
    assert pool._fits(every[0])
    checks.needs = lambda: [15, 10]
    assert not pool._fits(every[0]), "no room"
    checks.needs = lambda: [1] * 4
    assert not pool._fits(every[0]), "no place"


def _through(gate: Path, reads: Path) -> None:
    with turns.behind(gate):
        mark(reads)
        turns.passed()
        turns.passed()
        os._exit(0 if turns.waited_s() >= 0.3 else 1)


def _fails(gate: Path, reads: Path) -> int:
    with turns.behind(gate):
        mark(reads)
        raise UserError("it is told once the gate is open")


@pytest.mark.parametrize("work", [_through, _fails])
def test_nobody_leaves_by_a_shut_gate(work, tmp_path):
    gate = turns.Gate(tmp_path / "gate")
    child = Child(lambda: work(gate.path, tmp_path / "there"))
    awaited(tmp_path / "there")
    threading.Event().wait(0.4)
    assert child.poll() is None
    gate.open()
    while child.poll() is None:
        threading.Event().wait(0.02)
    assert child.outcome.code == (0 if work is _through else 2)


def test_without_a_gate_nothing_is_waited_for():
    with turns.behind(None):
        turns.passed()
    turns.passed()


def test_what_needs_base_and_tokenizer_alone_begins_before_the_other_imports(words, tmp_path):
    def preloaded() -> None:
        there = []
        inputs.preload([compose(words)], lambda shared: there.append((len(shared.stored), len(shared.tokenizers), "sklearn.metrics" in sys.modules)))
        os._exit(0 if [(one[0], one[1]) for one in there] == [(1, 1)] else 1)

    process = FORK.Process(target=preloaded)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_the_last_check_of_a_process_takes_the_shared_base(words, monkeypatch):
    cfg = compose(words)
    folder = Path(cfg.paths.models) / cfg.model.name
    stored = base.load_stored(folder)
    seen: list[Any] = []
    monkeypatch.setattr(preflight, "findings", lambda _, shared: seen.append(shared.stored[folder]) or [])
    rounded = compose([*words, "technique=qlora", "precision=nf4"])
    assert [*preflight.look([[cfg], [rounded], [cfg]], inputs.Shared({folder: stored}))] == [[], [], []]
    assert seen[0] is not stored and seen[1] is stored and seen[2] is stored


def test_a_forecast_of_several_techniques_reads_tokenizer_and_rows_once(words, monkeypatch):
    cfg = compose(words)
    forecasting_rows._tokenizer.cache_clear()
    forecasting_rows._rows.cache_clear()
    first = forecasting_rows.training_rows(cfg, grid_settings(cfg))
    monkeypatch.setattr(forecasting_rows, "FastTokenizer", None)
    monkeypatch.setattr(forecasting_rows, "read_rows", None)
    again = forecasting_rows.training_rows(cfg, grid_settings(cfg))
    assert [[e.ids for e in row] for row in again.examples] == [[e.ids for e in row] for row in first.examples]
    other = forecasting_rows.training_rows(compose([*words, "seed=1"]), grid_settings(cfg))
    assert len(other.examples) == len(first.examples) and other.examples != first.examples
    os.utime(Path(cfg.paths.data) / cfg.task.name / "train.jsonl")
    with pytest.raises(TypeError):
        forecasting_rows.training_rows(cfg, grid_settings(cfg))


def grid_settings(cfg: Any) -> Any:
    return inputs.read_settings(cfg)
