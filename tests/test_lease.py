"""benchmarks.lease: queues run in their order, a slot's end leaves nothing running and nothing lost, and what failed is told."""

from __future__ import annotations

import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from benchmarks import lease


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(lease, "LAST_WORDS_S", 0.3)
    monkeypatch.setattr(lease, "GRACE_S", 1.0)
    monkeypatch.setattr(lease, "MARGIN_S", 0.5)


@pytest.fixture
def slot(tmp_path, capsys):
    """run(queues, limit_s, more words): (exit code, what it printed)."""

    def run(queues: dict, limit_s: float = 20, *more: str, keep: tuple[str, ...] = ()) -> tuple[int, str]:
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"queues": queues, "keep": list(keep)}))
        code = lease.main(["run", f"plan={tmp_path}/plan.yaml", f"limit_s={limit_s}", f"out={tmp_path}/out", f"state={tmp_path}/state", *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_queues_keep_their_order_and_are_done_once(slot, tmp_path):
    notes = tmp_path / "notes"
    two = {"name": "two", "run": f"echo two $CUDA_VISIBLE_DEVICES {{words}} >> {notes}", "gpus": 3}
    queues = {"a": [{"name": "one", "run": f"sleep 0.5; echo one >> {notes}"}, two],
              "b": [{"name": "three", "run": f"echo three >> {notes}; echo loud", "after": ["two"]}]}
    code, _ = slot(queues, 20, "--", "k=a b", keep=(f"{tmp_path}/no*",))
    assert code == 0 and notes.read_text() == "one\ntwo 3 k=a b\nthree\n"
    assert (tmp_path / "state" / "three.log").read_text() == "loud\n"
    with tarfile.open(tmp_path / "out" / "all.tar.xz") as archive:
        names = archive.getnames()
    assert {Path(name).name for name in names} == {"notes", *(f"{name}.{kind}" for name in ("one", "two", "three") for kind in ("log", "json"))}
    assert slot(queues)[0] == 0 and notes.read_text().count("\n") == 3


def test_a_slots_end_leaves_nothing_running_and_the_next_goes_on(slot, tmp_path):
    """Bash's background processes ignore an interrupt: they were found running in the slot after."""
    beats = tmp_path / "beats"
    command = f"echo begun >> {tmp_path}/notes; [ -e {beats} ] && exit 0; (while true; do echo . >> {beats}; sleep 0.05; done) & wait"
    queues = {"a": [{"name": "long", "run": command}, {"name": "next", "run": "true"}]}
    code, said = slot(queues, 1.5)
    assert code == 1 and "long: interrupted" in said and "next: to do" in said
    size = beats.stat().st_size
    time.sleep(0.3)
    assert size and beats.stat().st_size == size
    assert slot(queues)[0] == 0 and (tmp_path / "notes").read_text() == "begun\nbegun\n"


def test_a_limit_holds_over_slots(slot):
    queues = {"a": [{"name": "long", "run": "sleep 30", "limit_s": 2}, {"name": "next", "run": "true", "after": ["long"]}]}
    assert slot(queues, 1.6)[0] == 1
    begun = time.monotonic()
    code, said = slot(queues)
    assert code == 0 and "long: cut" in said and time.monotonic() - begun < 2


def test_what_failed_stops_what_comes_after_it_until_it_is_forgotten(slot, tmp_path):
    bad = {"name": "bad", "run": f"[ -e {tmp_path}/there ]"}
    queues = {"a": [bad, {"name": "other", "run": "true"}], "b": [{"name": "next", "run": "true", "after": ["bad"]}]}
    code, said = slot(queues)
    assert code == 1 and "next: not begun, because bad failed" in said and "other: done" in said
    (tmp_path / "there").touch()
    assert slot(queues)[0] == 1
    assert slot(queues, 20, "forget=bad")[0] == 0


def test_a_command_that_the_time_does_not_suffice_for_is_not_begun(slot):
    code, said = slot({"a": [{"name": "long", "run": "true", "least_s": 50}]}, 5)
    assert code == 1 and "long: to do" in said


@pytest.mark.parametrize(("document", "said"), [
    ("queues: [", "is not YAML"),
    ("keep: []", "a plan has `queues`"),
    ("queues: {a: [{name: x}]}", "must have name and run"),
    ("queues: {a: [{name: x, run: y, gpu: 1}]}", "must have name and run"),
    ("queues: {a: [{name: x, run: y}], b: [{name: x, run: y}]}", "two commands are named x"),
    ("queues: {a: [{name: x, run: y, after: [z]}]}", "x comes after z, which the plan has not"),
    ("queues: {a: [{name: x/y, run: y}]}", "'x/y' names a file"),
    ("queues: {a: [{name: '', run: y}]}", "'' names a file"),
    ("queues: {a: [{name: x, run: y, limit_s: soon}]}", "limit_s is 'soon'; write seconds"),
])
def test_a_plan_that_is_none_is_one_sentence(document, said, tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text(document)
    assert lease.main(["run", f"plan={tmp_path}/plan.yaml", f"out={tmp_path}/out", f"state={tmp_path}/state"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_an_archive_without_room_stops_no_command(slot, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile, "open", full)
    code, said = slot({"a": [{"name": "one", "run": "true"}]})
    assert code == 0 and "not packed (No space left on device)" in said and not (tmp_path / "out" / "part.tar.xz").exists()


def test_an_interrupt_ends_the_commands(tmp_path):
    beats = tmp_path / "beats"
    queues = {"a": [{"name": "long", "run": f"while true; do echo . >> {beats}; sleep 0.05; done"}]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"queues": queues}))
    words = [f"plan={tmp_path}/plan.yaml", f"out={tmp_path}/out", f"state={tmp_path}/state", "limit_s=60"]
    command = subprocess.Popen([sys.executable, "-m", "benchmarks.lease", "run", *words], cwd=Path(lease.__file__).parent.parent,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # what a shell begins in the background ignores it
    while not beats.exists():
        assert command.poll() is None
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    assert command.wait(30) == -signal.SIGINT
    size = beats.stat().st_size
    time.sleep(0.3)
    assert beats.stat().st_size == size
