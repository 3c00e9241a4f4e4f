"""benchmarks.lease carry: its calls, made one after another where there is nothing but the repository, run the plan and bring back what it made."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from benchmarks import lease, lease_carry
from pipeline.core.compose import ROOT


@pytest.fixture
def carried(tmp_path, capsys):
    """carried(plan, more words): the calls and what was printed."""

    def carry(plan: dict, *more: str) -> tuple[list[dict], str]:
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        words = ["carry", f"plan={tmp_path}/plan.yaml", f"to={tmp_path}/carry", f"root={tmp_path}/there", f"shared={tmp_path}/shared", *more]
        code = lease.main(words)
        said = capsys.readouterr()
        return (json.loads((tmp_path / "carry/calls.json").read_text()) if code == 0 else []), said.out + said.err

    return carry


def call(command: str, out: Path) -> subprocess.CompletedProcess:
    out.mkdir(exist_ok=True)
    own = {"OUT": str(out), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ | own, capture_output=True, text=True)


PLAN = {
    "keep": ["{root}/made/*"],
    "carry": {"files": {"conf/model/hub.yaml": "given/hub.yaml"}, "unpacked": ["experiments/tuners/results_h200.tar.xz"]},
    "commands": [
        {"name": "one", "gpus": "all",
         "run": "mkdir -p {root}/made && cp {root}/given/hub.yaml {root}/made/ && ls {root}/results/tuners | wc -l && echo {words} {left}"},
        {"name": "bad", "run": "exit 3"},
        {"name": "two", "needs": ["bad"], "run": "echo two > {root}/made/two"},
    ],
}


@pytest.mark.slow
def test_the_calls_carry_the_pieces_set_up_and_run_the_plan_in_slots(carried, tmp_path):
    calls, said = carried(PLAN, "piece_mb=0.3")
    *copies, last, again = calls
    assert len(copies) > 1 and f"{len(copies) + 1} pieces" in said and f"{len(calls)} again" in said
    for one in (*copies, last):
        assert sum(path.stat().st_size for path in Path(one["carry"][0]).iterdir()) <= 300_000 and len(one["command"]) < 2000
    for one in copies:
        assert call(one["command"], tmp_path / "out").returncode == 0
    done = call(last["command"], tmp_path / "out")
    assert done.returncode == 1 and "one: done" in done.stdout and "two: not begun, because bad failed" in done.stdout, done.stdout + done.stderr
    there = (tmp_path / "there/lease/one.log").read_text().split()
    assert int(there[0]) > 40 and f"paths.results={tmp_path}/there/results" in there and "tracking=none" in there and 500 < int(there[-1]) < 550
    with tarfile.open(tmp_path / "out/all.tar.xz") as archive:
        archive.extractall(tmp_path / "back", filter="data")
    assert (tmp_path / "back" / str(tmp_path / "there").lstrip("/") / "made/hub.yaml").read_text() == (ROOT / "conf/model/hub.yaml").read_text()

    (tmp_path / "there").rename(tmp_path / "gone")
    plan = PLAN | {"commands": [PLAN["commands"][0], PLAN["commands"][1] | {"run": "true"}, PLAN["commands"][2]]}
    *copies, again = carried(plan, f"earlier={tmp_path}/back")[0]
    for one in copies:
        said = call(one["command"], tmp_path / "out2").stdout
    assert "one: done" in said and " s: one: " not in said, "it was done in the loan before"
    done = call(f"{again['command']} forget=bad", tmp_path / "out2")
    assert done.returncode == 0 and (tmp_path / "there/made/two").exists()


def test_what_another_plan_carried_before_does_not_travel_again(carried, tmp_path):
    carried(PLAN)
    assert (tmp_path / "carry/stage/given/hub.yaml").exists()
    carried({"commands": []})
    assert {path.name for path in (tmp_path / "carry/stage").iterdir()} == {"env.sh", "setup.sh", "slot.sh"}


def test_prepared_tasks_travel_and_are_prepared_once(carried, tmp_path, monkeypatch):
    made = []

    def python(*words: str) -> None:
        made.append(words)
        places = dict(word.split("=", 1) for word in words if "=" in word)
        folder = Path(places["paths.rationales"], "cqa", "stored") if "teacher" in places else Path(places["paths.data"], "cqa")
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")

    monkeypatch.setattr(lease_carry, "_python", python)
    for _ in range(2):
        carried({"commands": [], "carry": {"tasks": {"cqa": "stored"}}})
        assert (tmp_path / "carry/stage/data/cqa/manifest.json").exists() and (tmp_path / "carry/stage/rationales/cqa/stored/manifest.json").exists()
    assert [words[1] for words in made] == ["pipeline.prepare", "pipeline.rationales"]


def test_a_piece_that_did_not_arrive_is_told_and_nothing_runs(carried, tmp_path):
    calls, _ = carried(PLAN, "piece_mb=0.3")
    for one in (*calls[:-3], calls[-2]):
        done = call(one["command"], tmp_path / "out")
    assert done.returncode and not (tmp_path / "there/lease").exists()


@pytest.mark.parametrize(("carry", "more", "said"), [
    ({"files": {"no/such": "x"}}, (), "the plan carries"),
    ({"models": ["qwen2_0_5b"]}, (), "qwen2_0_5b is made by"),
    ({"wheels": ["ray"]}, (), "offline_bundle.py, which is not there; set shared=FOLDER"),
    ({}, ("earlier=/no/such",), "earlier= names the folder in which archives of earlier slots were unpacked"),
    ({"models": ["qwen2_0_5b"]}, ("without=qwen",), "without=qwen is nothing that the plan carries; it carries qwen2_0_5b"),
    ({}, ("piece_mb=many",), "piece_mb=many is no number of megabytes"),
    ({}, ("pieces=3",), "benchmarks.lease carry does not take 'pieces=3'"),
])
def test_what_cannot_be_carried_is_one_sentence(carried, carry, more, said):
    assert said in carried({"commands": [], "carry": carry}, *more)[1]


def test_what_is_left_out_is_not_carried():
    kept = lease_carry._wanted({"tasks": {"cqa": "stored"}, "models": ["a", "b"], "wheels": ["ray"]}, ["ray", "b"])
    assert kept["models"] == ["a"] and kept["wheels"] == [] and kept["tasks"] == {"cqa": "stored"}


def test_a_folder_that_git_would_send_along_is_refused(tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text("commands: []")
    assert lease.main(["carry", f"plan={tmp_path}/plan.yaml", f"to={ROOT}/not_ignored"]) == 2
    assert "git does not ignore" in capsys.readouterr().err and not (ROOT / "not_ignored").exists()


def test_a_folder_of_somebody_else_is_refused_and_nothing_in_it_is_touched(tmp_path, capsys):
    """Its `stage` and `p` were deleted."""
    (tmp_path / "plan.yaml").write_text("commands: []")
    kept = [tmp_path / "mine" / name / "file" for name in ("stage", "p")]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    assert lease.main(["carry", f"plan={tmp_path}/plan.yaml", f"to={tmp_path}/mine"]) == 2
    assert "was not made by benchmarks.lease carry; name a folder that is new or empty" in capsys.readouterr().err
    assert all(path.read_text() == "mine" for path in kept)


def test_a_full_disk_is_one_sentence(tmp_path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "plan.yaml").write_text("commands: []\ncarry: {files: {requirements.lock: x}}")
    monkeypatch.setattr("shutil.copy2", full)
    assert lease.main(["carry", f"plan={tmp_path}/plan.yaml", f"to={tmp_path}/carry", f"shared={tmp_path}/shared"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/carry cannot be filled (No space left on device); free space or fix the path, then run again\n"
