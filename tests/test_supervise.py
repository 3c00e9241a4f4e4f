"""A cell's child process: what its end means, above all when it was lack of memory that ended it."""

from __future__ import annotations

import io
import json
import mmap
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from pipeline import train
from pipeline.cell import child, grid, identity, inputs, record
from pipeline.cell.child import Outcome, run_in_child
from pipeline.cell.room import AtOnce
from pipeline.core import progress
from pipeline.core.commands import entry
from pipeline.core.compose import compose
from pipeline.core.files import UserError
from pipeline.measure import machine
from pipeline.measure.memory import child_rss
from pipeline.records.results import Result, read

MIB = 2**20


def hold(mib: int, seconds: float = 0.0) -> int:
    held = mmap.mmap(-1, mib * MIB)
    for at in range(0, mib * MIB, mmap.PAGESIZE):
        held[at] = 1
    time.sleep(seconds)
    return 0


def kill_self(number: int) -> Callable[[], int]:
    def work() -> int:
        os.kill(os.getpid(), number)
        time.sleep(5)
        return 0

    return work


def resident() -> int:
    return child_rss(os.getpid()) or 0


def test_a_child_with_a_log_waits_for_no_lock_of_who_draws_on_the_terminal(tmp_path, monkeypatch):
    """rich's streams take a lock; a child that was forked while another thread drew hung for ever, and `alignscope try` with it."""
    taken = threading.Lock()

    class Drawing(io.StringIO):
        def write(self, text: str) -> int:
            with taken:
                return super().write(text)

    monkeypatch.setattr(sys, "stdout", Drawing())
    monkeypatch.setattr(sys, "stderr", Drawing())
    with taken:
        begun = child.Child(lambda: print("said", flush=True) or print("warned ✓", file=sys.stderr) or 0, log=tmp_path / "logs" / "cell.log")
        end = time.monotonic() + 20
        while begun.poll() is None and time.monotonic() < end:
            child.pause()
        begun.send(signal.SIGKILL)
    assert begun.outcome == Outcome(0) and (tmp_path / "logs" / "cell.log").read_text() == "said\nwarned ✓\n"


@pytest.mark.parametrize("code", [0, 3])
def test_the_childs_exit_code_comes_back(code):
    assert run_in_child(lambda: code) == Outcome(code)


def test_bad_input_in_the_child_is_one_sentence_and_code_2(capfd):
    def work() -> int:
        raise UserError("rows.jsonl line 3 is not JSON; fix that line")

    assert run_in_child(work) == Outcome(2)
    assert capfd.readouterr().err == "error: rows.jsonl line 3 is not JSON; fix that line\n"


def test_any_other_error_is_shown_with_its_trace(capfd):
    assert run_in_child(lambda: 1 // 0) == Outcome(1)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_an_interrupt_in_the_child_is_code_130(capfd):
    def work() -> int:
        raise KeyboardInterrupt

    assert run_in_child(work) == Outcome(130)
    assert capfd.readouterr().err == ""


def test_a_command_whose_child_took_the_signal_says_how_to_go_on(capsys):
    assert entry(lambda cfg, overrides: 130)(["experiments=quick"]) == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to resume\n"


def test_what_the_child_prints_is_not_lost_and_not_doubled(capfd):
    print("before")
    run_in_child(lambda: print("inside") or 0)
    print("after")
    assert capfd.readouterr().out == "before\ninside\nafter\n"


def test_a_child_beyond_the_memory_limit_is_ended_and_the_reason_given():
    outcome = run_in_child(lambda: hold(1500, 20), resident() + 200 * MIB)  # of what this process has mapped, a child has only what it touches
    assert outcome.code == 128 + signal.SIGKILL
    assert outcome.out_of_memory and outcome.out_of_memory.endswith("resident bytes, above memory_limit_gb")


def test_a_child_within_the_memory_limit_goes_on():
    assert run_in_child(lambda: hold(50, 0.3), resident() + 400 * MIB) == Outcome(0)


def test_signal_9_from_someone_else_is_not_out_of_memory(monkeypatch):
    monkeypatch.setattr(child, "kernel_oom_kills", lambda: 4)
    assert run_in_child(kill_self(signal.SIGKILL)) == Outcome(137)
    assert run_in_child(kill_self(signal.SIGKILL), resident() + 400 * MIB) == Outcome(137)


def test_signal_9_while_the_kernel_counts_an_oom_kill_is_out_of_memory(monkeypatch):
    counts = iter([4, 5])
    monkeypatch.setattr(child, "kernel_oom_kills", lambda: next(counts))
    assert run_in_child(kill_self(signal.SIGKILL)) == Outcome(137, "ended by the kernel for lack of memory (signal 9)")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_another_signal_is_not_out_of_memory_whatever_the_kernel_counts(monkeypatch, number):
    counts = iter([4, 5])
    monkeypatch.setattr(child, "kernel_oom_kills", lambda: next(counts))
    assert run_in_child(kill_self(number)) == Outcome(128 + number)


def test_a_kernel_that_does_not_tell_is_no_evidence(monkeypatch):
    monkeypatch.setattr(child, "kernel_oom_kills", lambda: None)
    assert run_in_child(kill_self(signal.SIGKILL)) == Outcome(137)


def test_a_signal_to_one_child_is_not_handed_to_those_that_run_beside_it():
    def sleep() -> int:
        threading.Event().wait(30)
        return 0

    children: list[child.Child] = []
    with child.handed_on(lambda: children):
        children += [child.Child(sleep)]
        children += [child.Child(sleep)]
        threading.Event().wait(0.3)  # until the second has its handlers
        children[1].send(signal.SIGTERM)
        while children[1].poll() is None:
            child.pause()
        threading.Event().wait(0.2)
        first = children[0].poll()
        children[0].send(signal.SIGKILL)
        while children[0].poll() is None:
            child.pause()
    assert children[1].outcome == Outcome(128 + signal.SIGTERM) and first is None


FORKED: list[Callable[[], object]] = []
os.register_at_fork(after_in_child=lambda: [hook() for hook in FORKED])


def test_a_signal_that_comes_while_a_child_is_forked_is_the_childs_own(capfd):
    """It ran its parent's handler, which sent it to the cells beside it, or ended in a trace where one was gone."""
    beside = child.Child(lambda: time.sleep(0.5) or 0)
    FORKED.append(lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        with child.handed_on(lambda: [beside]):
            late = child.Child(lambda: time.sleep(20) or 0)
    finally:
        FORKED.clear()
    while not (late.poll() and beside.poll()):
        child.pause()
    assert late.outcome == Outcome(130) and beside.outcome == Outcome(0), capfd.readouterr().err
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_interrupt_at_a_childs_very_end_does_not_have_it_go_on_as_its_parent(tmp_path):
    class Interrupted(io.StringIO):
        def flush(self) -> None:
            raise KeyboardInterrupt

    def work() -> int:
        sys.stdout = Interrupted()
        return 5

    here = os.getpid()
    try:
        late = child.Child(work)
    finally:
        if os.getpid() != here:
            (tmp_path / "goes on").touch()
            os._exit(0)
    while not late.poll():
        child.pause()
    assert late.outcome == Outcome(5) and not (tmp_path / "goes on").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_parent_is_handed_to_the_child_and_the_parents_handler_comes_back(number, tmp_path):
    def work() -> int:
        signal.signal(number, lambda *_: os._exit(7))
        (tmp_path / "ready").touch()
        time.sleep(20)
        return 0

    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        time.sleep(0.5)  # until the parent, which has only forked, hands signals on
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    sender = threading.Timer(0, send)
    sender.start()
    assert run_in_child(work) == Outcome(7)
    sender.join()
    assert signal.getsignal(number) is before


def test_a_cell_beyond_the_memory_limit_is_a_row_keyed_with_the_hardware(overrides, imports, capfd):
    argv = [*overrides, "technique=lora", "train_rows=16", "memory_limit_gb=0.01"]
    assert train.main(argv) == 0
    assert "oom" in capfd.readouterr().out
    cfg = compose(argv)
    folder = identity.folder_of(cfg)
    result = read(folder)
    assert result.status == "oom" and result.error and "memory_limit_gb" in result.error
    assert (result.technique, result.method, result.hyperparameters["r"]) == ("lora", "lora", 8)
    assert result.scores == {} and result.memory is None
    assert sorted(p.name for p in folder.iterdir()) == ["artefact", "history.csv", "predictions.jsonl", "result.json"]
    assert (folder / "predictions.jsonl").read_text() == ""
    assert grid.is_done(cfg), "on this hardware it is done"
    raw = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(raw | {"hardware": raw["hardware"] | {"threads": 64}}))
    assert grid.is_done(cfg), "threads decide no memory"
    bigger(folder / "result.json")
    assert not grid.is_done(cfg), "on other hardware it runs again"


def test_the_out_of_memory_row_is_written_in_a_child_so_that_this_process_stays_fit_to_fork(overrides, imports, tmp_path, monkeypatch):
    def write_oom(cfg: DictConfig, error: str) -> Result:
        (tmp_path / "pid").write_text(str(os.getpid()))
        raise UserError("cannot write result.json")

    monkeypatch.setattr(record, "write_oom", write_oom)
    assert train.main([*overrides, "technique=lora", "train_rows=16", "memory_limit_gb=0.01"]) == 2, "a row that cannot be written is told"
    assert int((tmp_path / "pid").read_text()) != os.getpid()


def bigger(path: Path) -> None:
    raw = json.loads(path.read_text())
    raw["hardware"]["memory_bytes"] //= 2
    path.write_text(json.dumps(raw))


def test_an_out_of_memory_row_is_run_again_under_another_limit(overrides, imports):
    argv = [*overrides, "technique=zero_shot", "train_rows=16"]
    assert train.main([*argv, "memory_limit_gb=0.01"]) == 0
    assert grid.is_done(compose([*argv, "memory_limit_gb=0.01"]))
    for other in ("null", "8"):
        assert not grid.is_done(compose([*argv, f"memory_limit_gb={other}"]))


def test_a_gpu_is_asked_for_its_name_in_a_child(monkeypatch):
    """What runs cells forks them, and CUDA that is in use does not survive a fork."""
    monkeypatch.setattr(machine, "hardware", lambda device: {"device": device, "pid": os.getpid()})
    found = machine.hardware_here("cuda")
    assert found["device"] == "cuda" and found["pid"] != os.getpid()
    monkeypatch.setattr(machine, "hardware", lambda device: 1 / 0)
    assert machine.hardware_here("cuda") == {}


AFTER_PARALLEL_WORK = """
import signal, torch
from pipeline.cell.child import run_in_child
torch.set_num_threads(2)
x = torch.ones(512, 512)
def work():
    signal.alarm(20)
    return 0 if float((x @ x + x * 2).sum()) else 1
assert work() == 0
signal.alarm(0)
assert run_in_child(work).code == 0 and work() == 0
"""


def test_a_process_that_computed_with_several_threads_may_still_fork_cells():
    """As `alignscope try` does, which dequantises a model and then runs cells: the first parallel work of the child hung."""
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    assert subprocess.run([sys.executable, "-c", AFTER_PARALLEL_WORK], env=env, timeout=120, check=False).returncode == 0


def test_a_finished_cell_does_not_depend_on_hardware_or_limit(overrides, imports):
    argv = [*overrides, "technique=zero_shot", "train_rows=16"]
    assert train.main(argv) == 0
    folder = identity.folder_of(compose(argv))
    bigger(folder / "result.json")
    assert grid.is_done(compose(argv)) and grid.is_done(compose([*argv, "memory_limit_gb=64"]))
    assert not grid.is_done(compose([*argv, "seed=1"])) and not grid.is_done(compose([*argv, "evaluate.test_rows=4"]))


def test_scoring_is_shown_with_the_time_that_is_left(overrides, tmp_path, monkeypatch, capfd):
    """By pipeline.cells, pipeline.train and dvc repro alike: each runs its cell here."""
    def scores(*_: object, **__: object) -> Result:
        for split, share in (("train", 0.5), ("validation", 0.5), ("test", 0.75)):
            progress.stage(split)
            progress.part(share, 1)
            time.sleep(0.3)
        raise UserError("that is enough")

    monkeypatch.setattr(child.cell_run, "run", scores)
    monkeypatch.setattr(progress, "IN_A_LOG_S", 0)
    words = [word for word in overrides if word != "train.progress=false"]
    before = threading.active_count()
    assert child.run_cell(compose([*words, "technique=zero_shot"]), None, None) == 2
    said = capfd.readouterr().err
    assert "score validation:  50%" in said and re.search(r"score test:  75%.*<00:\d\d", said) and "score train" not in said
    assert threading.active_count() == before, "the process goes on to fork"
    assert child.run_cell(compose([*overrides, "technique=zero_shot"]), None, None) == 2
    assert "score" not in capfd.readouterr().err


@pytest.mark.parametrize("at_once", [1, 2])
def test_one_bar_stands_for_all_cells_with_the_time_that_is_left(overrides, imports, tmp_path, monkeypatch, capfd, at_once):
    def works(*_: object, **__: object) -> Result:
        for split, share in (("train", 0.5), ("test", 0.5)):
            progress.stage(split)
            progress.part(share, 1)
            time.sleep(0.5)
        raise UserError("that is enough")

    monkeypatch.setattr(child.cell_run, "run", works)
    monkeypatch.setattr(progress, "IN_A_LOG_S", 0)
    words = [word for word in overrides if word != "train.progress=false"]
    cells = [compose([*words, "technique=zero_shot", f"seed={seed}"]) for seed in range(2)]
    before = threading.active_count()
    assert grid.run_here(cells, inputs.Shared(), grid.Mirror.silent(), at_once=AtOnce(at_once)) == 2
    said = capfd.readouterr().err
    seen = [(int(m[1]), m[2]) for m in re.finditer(r"(\d+)%\|.*?<([\d:?]+)", said)]
    assert [n for n, _ in seen] == sorted(n for n, _ in seen) and any(30 < n < 90 and ":" in left for n, left in seen), said
    both = re.search(r"zero_shot-s0\S* test 50%, zero_shot-s1\S* ", said)
    assert bool(both) == (at_once == 2) and "score test" not in said, said
    assert threading.active_count() == before, "the process goes on to fork"


@pytest.mark.parametrize(("stage", "done", "share"), [
    ("", 0, 0), ("train", 0.5, 0.3), ("validation", 0, 0.6), ("test", 0, 0.64), ("test", 1, 1), ("transfer/x", 0.2, 1),
])
def test_a_cells_share_counts_training_and_scoring(stage, done, share):
    assert progress.Progress(stage, done).share(0.6) == pytest.approx(share)


def test_a_child_that_is_killed_as_it_draws_a_bar_does_not_stop_the_bars_of_others():
    """It holds tqdm's lock, which tqdm shares between a process and those it forks."""
    from tqdm import tqdm

    class Own(tqdm):
        """Such as transformers and huggingface_hub have."""

    def draws() -> int:
        with tqdm.get_lock(), Own.get_lock():
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    tqdm(disable=True)
    Own.set_lock(tqdm.get_lock())
    assert run_in_child(draws).code == 128 + signal.SIGKILL
    lock = multiprocessing.get_context("fork").Process(target=lambda: tqdm(disable=True))
    lock.start()
    lock.join(10)
    stuck = lock.is_alive()
    lock.kill()
    assert not stuck
