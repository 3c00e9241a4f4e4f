"""benchmarks.lease: commands run in their order on the GPUs that there are, a slot's end leaves nothing running and nothing lost, and what failed is told."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from benchmarks import lease
from benchmarks.race_fill import TECHNIQUES
from pipeline.core.compose import ROOT


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(lease, "LAST_WORDS_S", 0.3)
    monkeypatch.setattr(lease, "GRACE_S", 1.0)
    monkeypatch.setattr(lease, "MARGIN_S", 0.5)


@pytest.fixture
def slot(tmp_path, capsys):
    """run(commands, limit_s, more words): (exit code, what it printed)."""

    def run(commands: list[dict], limit_s: float = 20, *more: str, keep: tuple[str, ...] = ()) -> tuple[int, str]:
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"commands": commands, "keep": list(keep)}))
        code = lease.main(["run", f"plan={tmp_path}/plan.yaml", f"limit_s={limit_s}", f"out={tmp_path}/out", f"root={tmp_path}", *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_commands_keep_their_order_on_the_gpus_that_there_are_and_are_done_once(slot, tmp_path):
    notes = tmp_path / "notes"
    commands = [
        {"name": "one", "run": f"sleep 0.5; echo one $CUDA_VISIBLE_DEVICES >> {notes}", "gpus": 1},
        {"name": "both", "run": f"echo both {{gpus}} {{words}} >> {notes}", "gpus": 2},
        {"name": "all", "run": f"echo all {{gpus}} >> {notes}", "gpus": "all"},
        {"name": "after", "run": "echo {root} >> {root}/notes; echo loud", "after": ["all"]},
        {"name": "none", "run": f"echo none ${{CUDA_VISIBLE_DEVICES-unset}} >> {notes}"},
    ]
    code, _ = slot(commands, 20, "gpus=0,1", "--", "k=a b", keep=("{root}/no*",))
    assert code == 0, "both needs what one has, and all does not overtake it:"
    assert notes.read_text() == f"none unset\none 0\nboth 0,1 k=a b\nall 0,1\n{tmp_path}\n"
    assert (tmp_path / "lease" / "after.log").read_text() == "loud\n"
    with tarfile.open(tmp_path / "out" / "all.tar.xz") as archive:
        names = archive.getnames()
    assert {Path(name).name for name in names} == {"notes", *(f"{command['name']}.{kind}" for command in commands for kind in ("log", "json"))}
    assert slot(commands, 20, "gpus=0,1")[0] == 0 and notes.read_text().count("\n") == 5


def test_two_that_need_a_gpu_each_run_at_once_on_two_and_one_after_another_on_one(slot, tmp_path):
    def meets(name: str, other: str) -> dict:
        waits = f"for i in $(seq 20); do sleep 0.05; [ -e {tmp_path}/{other} ] && exit 0; done; exit 3"
        return {"name": name, "gpus": 1, "run": f"touch {tmp_path}/{name}; {waits}"}

    assert slot([meets("a", "b"), meets("b", "a")], 20, "gpus=0,1")[0] == 0
    for name in ("a", "b"):
        (tmp_path / name).unlink()
    code, said = slot([meets("a", "b"), meets("b", "a")], 20, "gpus=0", "forget=a,b")
    assert code == 1 and "a: failed (3)" in said and "b: done" in said


def test_what_needs_more_gpus_than_there_are_is_passed_over_and_holds_up_nothing(slot, tmp_path):
    commands = [{"name": "two", "run": "true", "gpus": 2}, {"name": "compared", "run": "true", "needs": ["two"]},
                {"name": "last", "run": "true", "after": ["two"]},
                {"name": "next", "run": "true", "gpus": "all"}]
    code, said = slot(commands, 20, "gpus=0")
    assert code == 1 and "two: not begun, because it needs 2 GPUs and there is 1" in said
    assert "compared: not begun, because two was not" in said and "next: done" in said and "last: done" in said and "two: to do" in said
    assert slot(commands, 20, "gpus=0,1")[0] == 0


def test_a_slots_end_leaves_nothing_running_and_the_next_goes_on(slot, tmp_path):
    """Bash's background processes ignore an interrupt: they were found running in the slot after."""
    beats = tmp_path / "beats"
    command = f"echo begun >> {tmp_path}/notes; [ -e {beats} ] && exit 0; (while true; do echo . >> {beats}; sleep 0.05; done) & wait"
    commands = [{"name": "long", "run": command, "gpus": 1}, {"name": "next", "run": "true", "gpus": 1}]
    code, said = slot(commands, 1.5)
    assert code == 1 and "long: interrupted" in said and "next: to do" in said
    size = beats.stat().st_size
    time.sleep(0.3)
    assert size and beats.stat().st_size == size
    assert slot(commands)[0] == 0 and (tmp_path / "notes").read_text() == "begun\nbegun\n"


def test_a_limit_holds_over_slots(slot, tmp_path):
    commands = [{"name": "long", "run": "sleep 30", "limit_s": 2}, {"name": "next", "run": "true", "after": ["long"]}]
    assert slot(commands, 1.6)[0] == 1
    begun = time.monotonic()
    code, said = slot(commands)
    assert code == 0 and "long: cut" in said and time.monotonic() - begun < 2
    heeds = [{"name": "heeds", "run": f"echo {{left}} > {tmp_path}/left; exit 1", "limit_s": 45}, {"name": "then", "run": "true", "needs": ["heeds"]}]
    code, said = slot(heeds, 500)
    assert (tmp_path / "left").read_text() == "20\n", "of its own limit"
    assert code == 0 and "heeds: cut" in said and "then: done" in said


def test_what_failed_stops_what_comes_after_it_until_it_is_forgotten(slot, tmp_path):
    bad = {"name": "bad", "run": f"[ -e {tmp_path}/there ]"}
    commands = [bad, {"name": "other", "run": "true", "after": ["bad"]}, {"name": "next", "run": "true", "needs": ["bad"]},
                {"name": "last", "run": "true", "needs": ["next"]}]
    code, said = slot(commands)
    assert code == 1 and "next: not begun, because bad failed" in said and "other: done" in said
    assert "last: not begun, because next was not" in said, "it waited for the slot's end"
    (tmp_path / "there").touch()
    assert slot(commands)[0] == 1
    assert slot(commands, 20, "forget=bad")[0] == 0


def test_what_is_to_be_forgotten_is_a_command_of_the_plan(slot, tmp_path):
    """forget=../mine deleted mine.json beside the state."""
    (tmp_path / "mine.json").write_text("{}")
    code, said = slot([{"name": "one", "run": "true"}], 20, "forget=../mine")
    assert code == 2 and "forget=../mine is no command of " in said and (tmp_path / "mine.json").exists()


def test_a_command_that_the_time_does_not_suffice_for_is_not_begun_and_holds_up_nothing(slot):
    code, said = slot([{"name": "long", "run": "true", "least_s": 50, "gpus": 1}, {"name": "short", "run": "true", "gpus": 1}], 5)
    assert code == 1 and "long: to do" in said and "short: done" in said


def test_one_that_heeds_the_time_and_lacks_something_at_its_end_goes_on_in_the_next_slot(slot, tmp_path):
    """It was done, "failed (1)", and the next slot passed it over."""
    commands = [{"name": "long", "run": f"echo {{left}} >> {tmp_path}/notes; [ -e {tmp_path}/there ] && exit 0; touch {tmp_path}/there; exit 1"}]
    code, said = slot(commands, 40)
    assert code == 1 and "long: interrupted" in said and "long: to do" in said
    assert slot(commands, 40)[0] == 0 and len((tmp_path / "notes").read_text().splitlines()) == 2
    assert "failed (1)" in slot([{"name": "other", "run": "echo {left}; exit 1"}], 100)[1], "long before the end it has failed"


def test_only_what_is_new_comes_back_and_in_parts_that_may(slot, tmp_path, monkeypatch):
    (tmp_path / "old.txt").write_text("of an earlier slot")
    os.utime(tmp_path / "old.txt", (1, 1))
    made_by = f"head -c 50000 /dev/urandom > {tmp_path}/new.txt; cp {tmp_path}/new.txt {tmp_path}/predictions.jsonl"
    commands, kept = [{"name": "one", "run": made_by}], f"{tmp_path}/*.*"

    def names(*parts: str) -> list[str]:
        (tmp_path / "whole").write_bytes(b"".join((tmp_path / "out" / part).read_bytes() for part in parts))
        with tarfile.open(tmp_path / "whole") as archive:
            return [Path(name).name for name in archive.getnames()]

    slot(commands, 20, keep=(kept,))
    assert (made := names("all.tar.xz")) and "new.txt" in made and "old.txt" not in made and made[-1] == "predictions.jsonl"
    monkeypatch.setattr(lease, "PART_BYTES", 30_000)
    slot(commands, 20, "all=true", keep=(kept,))
    parts = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(parts) > 1 and parts[0] == "all.tar.xz.0" and "old.txt" in names(*parts)
    assert all((tmp_path / "out" / part).stat().st_size <= 30_000 for part in parts)


@pytest.mark.parametrize(("document", "said"), [
    ("commands: [", "is not YAML"),
    ("keep: []", "a plan has `commands`"),
    ("commands: {a: [{name: x, run: y}]}", "a plan has `commands`"),
    ("commands: [{name: x}]", "must have name and run"),
    ("commands: [{name: x, run: y, gpu: 1}]", "must have name and run"),
    ("commands: [{name: x, run: y}, {name: x, run: y}]", "two commands are named x"),
    ("commands: [{name: x, run: y, after: [z]}]", "x comes after z, which the plan has not"),
    ("commands: [{name: x/y, run: y}]", "'x/y' names a file"),
    ("commands: [{name: '', run: y}]", "'' names a file"),
    ("commands: [{name: x, run: y, limit_s: soon}]", "limit_s is 'soon'; write seconds"),
    ("commands: [{name: x, run: y, gpus: '0,1'}]", "gpus is '0,1'; write how many, or all"),
    ("commands: [{name: x, run: y, mps: on GPUs}]", "mps is 'on GPUs'; write true or false"),
])
def test_a_plan_that_is_none_is_one_sentence(document, said, tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text(document)
    assert lease.main(["run", f"plan={tmp_path}/plan.yaml", f"out={tmp_path}/out", f"root={tmp_path}"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "lease").exists()


def test_an_archive_without_room_stops_no_command(slot, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile, "open", full)
    code, said = slot([{"name": "one", "run": "true"}])
    assert code == 0 and "not packed (No space left on device)" in said and not (tmp_path / "out" / "part.tar.xz").exists()


def test_a_file_that_vanishes_while_it_is_looked_at_stops_no_slot(slot, tmp_path, monkeypatch):
    """A result is written beside its place and moved there; the archive's list met one in between."""
    (tmp_path / "there").touch()
    seen = os.path.getmtime

    def vanishes(path: str) -> float:
        Path(path).unlink()
        return seen(path)

    monkeypatch.setattr(os.path, "getmtime", vanishes)
    assert slot([{"name": "one", "run": "true"}], keep=("{root}/th*",))[0] == 0


def test_an_interrupt_ends_the_commands(tmp_path):
    beats = tmp_path / "beats"
    commands = [{"name": "long", "run": f"while true; do echo . >> {beats}; sleep 0.05; done"}]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"commands": commands}))
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


DAEMON = """#!/bin/bash
# a stand-in for NVIDIA's: -d begins a process that stays, quit on stdin ends it
pid=$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid
echo "$1 ${CUDA_MPS_PIPE_DIRECTORY##*/}" >> @/daemon
[ -e @/refuses ] && [ "$1" = -d ] && exit 1
if [ "$1" = -d ]; then
  setsid sleep 60 > /dev/null 2>&1 &
  echo $! > $pid; echo $! > @/last
else
  read said; [ -e @/hangs ] && sleep 60
  kill $(cat $pid)
fi
"""
SAYS = "echo ${CUDA_MPS_PIPE_DIRECTORY-none} >> @/notes; grep -qs 'State:.[^ZX]' /proc/$(cat @/last)/status && echo alive >> @/notes"


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    """alive(): whether the stand-in that was begun last runs. Its calls are in `daemon`, its folder's name after each."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / lease.MPS).write_text(DAEMON.replace("@", str(tmp_path)))
    (tmp_path / "bin" / lease.MPS).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/somebodys")

    def alive() -> bool:
        state = Path(f"/proc/{(tmp_path / 'last').read_text().strip()}/stat")
        return state.exists() and " Z " not in state.read_text()  # an orphan that nobody here reaps

    return alive


def says(tmp_path: Path, **more: object) -> dict:
    return {"name": "shares", "gpus": 1, "mps": True, "run": SAYS.replace("@", str(tmp_path))} | more


def test_what_shares_a_gpu_has_a_daemon_of_its_own_and_what_comes_after_has_none(slot, tmp_path, daemon):
    commands = [says(tmp_path), says(tmp_path, name="timed", mps=False)]
    assert slot(commands, 20, "gpus=0")[0] == 1, "the second found no daemon alive"
    assert (tmp_path / "notes").read_text() == f"{tmp_path}/lease/shares.mps\nalive\nnone\n" and not daemon()
    assert (tmp_path / "daemon").read_text() == "-d shares.mps\n shares.mps\n" and not (tmp_path / "lease" / "shares.mps").exists()


@pytest.mark.parametrize(("without", "reason"), [("bin", "cannot be run (No such file or directory)"), ("refuses", "ended with 1")])
def test_without_the_daemon_a_command_goes_on_and_its_log_says_so(slot, tmp_path, daemon, without, reason):
    shutil.rmtree(tmp_path / "bin") if without == "bin" else (tmp_path / "refuses").touch()
    assert slot([says(tmp_path, run=f"echo ${{CUDA_MPS_PIPE_DIRECTORY-none}} > {tmp_path}/notes")])[0] == 0
    assert (tmp_path / "notes").read_text() == "none\n"
    assert (tmp_path / "lease" / "shares.log").read_text() == f"without MPS: nvidia-cuda-mps-control {reason}\n"


@pytest.mark.slow
def test_the_daemon_ends_with_a_command_that_is_killed_and_begins_anew_with_it(slot, tmp_path, daemon):
    waits = f"trap '' INT; {SAYS.replace('@', str(tmp_path))}; [ -e {tmp_path}/again ] || (touch {tmp_path}/again; sleep 30)"
    code, said = slot([says(tmp_path, run=waits)], 1.5)
    assert code == 1 and "shares: interrupted" in said and not daemon()
    assert slot([says(tmp_path, run=waits)])[0] == 0 and (tmp_path / "notes").read_text().count("alive") == 2 and not daemon()


def test_a_daemon_that_a_killed_slot_left_is_ended_before_another_begins(slot, tmp_path, daemon):
    folder = tmp_path / "lease" / "shares.mps"
    folder.mkdir(parents=True)
    own = os.environ | {"CUDA_MPS_PIPE_DIRECTORY": str(folder)}
    assert subprocess.run([lease.MPS, "-d"], env=own).returncode == 0 and daemon()
    left = (tmp_path / "last").read_text().strip()
    assert slot([says(tmp_path)])[0] == 0 and (tmp_path / "daemon").read_text() == "-d shares.mps\n shares.mps\n" * 2
    assert not Path(f"/proc/{left}").exists() or " Z " in Path(f"/proc/{left}/stat").read_text()


def test_a_daemon_that_does_not_end_is_killed(slot, tmp_path, daemon, monkeypatch):
    monkeypatch.setattr(lease, "MPS_S", 0.5)
    (tmp_path / "hangs").touch()
    assert slot([says(tmp_path)])[0] == 0 and not daemon()


@pytest.mark.parametrize("path", sorted((Path(lease.__file__).parent / "plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_plan_can_be_read_names_what_there_is_and_times_nothing_under_mps(path):
    for command in lease.read(path).commands:
        assert command.mps == any(f"benchmarks.{shared}" in command.run for shared in ("slot run", "race fill", "rates run")), command.name
        for word in command.run.split():
            key, _, value = word.partition("=")
            for name in value.split(",") if key == "experiments" else ():
                assert (ROOT / "experiments" / f"{name}.yaml").exists() or "$" in name, name
            assert key != "techniques" or "fill" not in command.name or set(value.split(",")) <= TECHNIQUES.keys()


def test_a_daemon_that_hangs_as_it_starts_is_killed_and_the_command_goes_on(slot, tmp_path, daemon, monkeypatch):
    monkeypatch.setattr(lease, "MPS_S", 0.5)
    script = tmp_path / "bin" / lease.MPS
    script.write_text(script.read_text().replace("$! > $pid;", "$! > $pid; sleep 60;").replace(f"echo $! > {tmp_path}/last", "").replace(
        "setsid sleep 60", f"setsid bash -c 'echo $$ > {tmp_path}/last; exec sleep 60'"))
    assert slot([says(tmp_path, run=f"echo ${{CUDA_MPS_PIPE_DIRECTORY-none}} > {tmp_path}/notes")])[0] == 0
    assert (tmp_path / "notes").read_text() == "none\n" and not daemon()
    assert "without MPS: nvidia-cuda-mps-control took longer than" in (tmp_path / "lease" / "shares.log").read_text()
