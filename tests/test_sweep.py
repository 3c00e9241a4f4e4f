"""The sweep with a fake cell: every rank once, resume after a kill, oom, two objectives, confirm; and one real run, marked slow."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pipeline import sweep
from pipeline.cell import child, grid, inputs
from pipeline.cell import identity as cell_identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import CONF, ROOT, compose, plain
from pipeline.core.files import Unsuited, UserError
from pipeline.measure.clock import Phases
from pipeline.measure.memory import Memory
from pipeline.records import results
from pipeline.records.finished import name as cell_name
from pipeline.records.results import Result, Score, Work, read, write
from pipeline.search import trials as search_trials
from pipeline.search.space import Parameter, Space, at
from pipeline.search.study import open_study
from pipeline.search.study import read as read_space

ACCURACY = {1: 0.5, 2: 0.6, 4: 0.8, 8: 0.8, 16: 0.9, 32: 0.7}
RANKS = list(ACCURACY)


def fake_cell(cfg: Any, *, shared: Any = None, splits: Any = None, folder: Any = None, started: Any = None) -> Result:
    """Stands for pipeline.cell.run.run: writes down how it was called, and answers from ACCURACY."""
    r, work = cfg.method.config.r, Path(cfg.paths.work)
    call = {"r": r, "alpha": cfg.method.config.lora_alpha, "lr": cfg.train.lr, "seed": cfg.seed, "train_rows": cfg.train_rows}
    with open(work / "calls.jsonl", "a") as out:
        out.write(json.dumps(call | {"splits": splits, "folder": folder and str(folder), "variant": cfg.variant}) + "\n")
    if (work / "oom").exists() and r == 32:
        result = results.Result(**identity(cfg), status="oom", error="too big")
    elif (work / "diverged").exists() and r >= 16:
        score, work_done = Score(40, 0.0, 0.0, 0.1, unanswered=40), Work(steps=2, diverged_at=2)
        result = results.Result(**identity(cfg), status="diverged", error="training diverged at step 2", scores={"validation": score}, work=work_done)
    else:
        score = Score(40, ACCURACY[r], 0.0, 1.0)
        phases = Phases(2, 0, 0, 0, 1, 0, 0, 1, 0)
        scores = {"validation": score} if splits else {"validation": score, "test": score}
        memory, work_done = Memory("cpu_rss", 1000 * r), Work(tokens_per_s=100.0)
        result = results.Result(**identity(cfg), status="ok", scores=scores, phases=phases, memory=memory, work=work_done)
    if folder:
        write(folder, result)
    return result


def identity(cfg: Any) -> dict[str, Any]:
    named = {"experiment": cfg.experiment, "cell": cell_name(cfg), "seed": cfg.seed, "train_rows": 64}
    fixed = {"technique": "lora", "family": "f", "method": "lora", "objective": "labels", "precision": "fp32", "task": "t", "model": "m", "kind": "trained"}
    return named | fixed | {"config": plain(cfg), "provenance": cell_identity.provenance(cfg)}


def fakes(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """Overrides of a fast sweep below `root`, with the cell and what it loads replaced."""
    (root / "work").mkdir()
    stand_in(monkeypatch)
    folders = [f"paths.{name}={root}/{name}" for name in ("data", "models", "results", "sweeps", "work")]
    return [*folders, "technique=lora", "train.lr=1e-3", "tracking=none", "experiment=tried", "train_rows=64"]


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that answers at once, and nothing is loaded."""
    monkeypatch.setattr(cell_run, "run", fake_cell)
    monkeypatch.setattr(inputs, "preload", lambda missing: inputs.Shared())
    monkeypatch.setattr(grid, "preload", lambda missing: inputs.Shared())
    monkeypatch.setattr(inputs, "check_ahead", lambda cfg: None)
    monkeypatch.setattr(child, "POLL_S", 0.01)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return fakes(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over all ranks that is through, and what it printed, in out.txt; copy it before resuming it."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch, open(root / "out.txt", "w") as out, contextlib.redirect_stdout(out):
        assert sweep.main(fakes(monkeypatch, root)) == 0
    return root


def calls(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "work" / "calls.jsonl").read_text().splitlines()]


def study(tmp_path: Path) -> Any:
    import optuna

    return optuna.load_study(study_name="tried/lora", storage=f"sqlite:///{tmp_path}/sweeps/tried/lora/study.db")


def states(tmp_path: Path) -> list[str]:
    return [t.state.name for t in study(tmp_path).trials]


def best(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "sweeps/tried/lora/best.json").read_text())


def trials(tmp_path: Path) -> list[dict]:
    with open(tmp_path / "sweeps/tried/lora/trials.csv", newline="") as lines:
        return list(csv.DictReader(lines))


def test_every_rank_is_visited_once_with_alpha_at_twice_the_rank(finished):
    *searched, confirmed = calls(finished)
    assert [(c["r"], c["alpha"]) for c in searched] == [(r, 2 * r) for r in RANKS]
    rates = [float(f"{1e-3 * (r / 8) ** -0.5:.3g}") for r in RANKS]
    assert [c["lr"] for c in searched] == rates and rates[RANKS.index(8)] == 1e-3, "the technique's own at its own rank, and at one over the root of others"
    assert states(finished) == ["COMPLETE"] * 6
    assert {tuple(c["splits"]) for c in searched} == {("validation",)} and {c["folder"] for c in searched} == {None}
    assert confirmed["r"] == 16 and confirmed["splits"] is None


def test_the_best_becomes_a_confirm_cell_scored_on_test(finished):
    assert read(finished / "results/tried/lora+best-s0-n64").test is not None


def test_outputs(finished):
    assert best(finished) | {"finished": "", "settings": {}} == {
        "params": {"method.config.r": 16}, "value": 0.9, "values": {"validation": 0.9}, "trial": 4, "variant": "best", "front": None,
        "overrides": ["method.config.r=16", "method.config.lora_alpha=32", "train.lr=0.000707"], "finished": "", "settings": {},
    }  # fmt: skip
    rows = trials(finished)
    assert [float(row["validation"]) for row in rows] == list(ACCURACY.values())
    assert rows[2]["method.config.r"] == "4" and rows[2]["method.config.lora_alpha"] == "8" and rows[2]["state"] == "COMPLETE"
    assert float(rows[2]["seconds"]) > 0 and rows[2]["peak_bytes"] == "4000" and rows[2]["tokens_per_s"] == "100.0"
    out = (finished / "out.txt").read_text()
    assert "trial 3 of 6: r=4 lora_alpha=8 lr=0.00141: validation accuracy 0.800" in out and "chosen: method.config.r=16" in out
    assert "r=16 is taken: 90.0% accuracy on 40 validation rows, the highest, but" in out and "more validation rows would be needed" in out
    assert study(finished).trials[2].user_attrs["train_s"] == 1


def test_a_finished_sweep_started_again_runs_nothing(finished, words, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert sweep.main(words) == 0
    assert len(calls(tmp_path)) == 7


def test_a_tie_goes_to_the_choice_listed_first(words, tmp_path):
    assert sweep.main([*words, "sweep.confirm=false", "sweep.space={method.config.r: {choices: [8, 4, 1]}}"]) == 0
    assert best(tmp_path)["params"] == {"method.config.r": 8}


@pytest.mark.slow
def test_killed_at_trial_4_of_6_it_goes_on_and_tries_the_dead_rank_again(words, tmp_path):
    driver = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import pytest
        import test_sweep
        from pipeline import sweep
        from pipeline.cell import run as cell_run

        def fake(cfg, **more):
            result = test_sweep.fake_cell(cfg, **more)
            if cfg.method.config.r == 8 and not Path(sys.argv[1]).exists():
                Path(sys.argv[1]).touch()
                os.kill(os.getppid(), signal.SIGKILL)
                signal.pause()
            return result

        test_sweep.stand_in(pytest.MonkeyPatch())
        cell_run.run = fake
        sys.exit(sweep.main(sys.argv[2:]))
    """
    command = [sys.executable, "-c", textwrap.dedent(driver), str(tmp_path / "killed"), *words]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert states(tmp_path) == ["COMPLETE"] * 3 + ["RUNNING"] + ["WAITING"] * 2
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    done = [t for t in study(tmp_path).trials if t.state.name == "COMPLETE"]
    assert sorted(t.params["method.config.r"] for t in done) == RANKS
    assert sorted(states(tmp_path)) == ["COMPLETE"] * 6 + ["FAIL"]
    assert [c["r"] for c in calls(tmp_path)] == [1, 2, 4, 8, 16, 32, 8, 16]  # the last one confirms
    assert [row["status"] for row in trials(tmp_path)].count("died") == 1


@pytest.mark.slow
def test_an_interrupted_tpe_search_goes_on_to_n_trials_without_repeating_itself(words, tmp_path, monkeypatch):
    words = [*words, "sweep=rank_alpha_lr", "sweep.n_trials=6", "sweep.confirm=false"]
    marker = tmp_path / "interrupted"

    def interrupted(cfg: Any, **more: Any) -> Result:
        result = fake_cell(cfg, **more)
        if len(calls(tmp_path)) == 4 and not marker.exists():
            marker.touch()
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(cell_run, "run", interrupted)
    assert sweep.main(words) == 130
    assert states(tmp_path) == ["COMPLETE"] * 3 + ["FAIL"]
    assert sweep.main(words) == 0
    assert states(tmp_path).count("COMPLETE") == 6
    points = [(c["r"], c["alpha"], c["lr"]) for c in calls(tmp_path)]
    assert points[4] == points[3] and len(set(points)) == 6, "the interrupted one again, and no other twice"
    assert sweep.main([*words, "sweep.n_trials=7"]) == 0
    assert states(tmp_path).count("COMPLETE") == 7


def test_out_of_memory_is_an_answer(words, tmp_path, capsys):
    words = [*words, "sweep.confirm=false", "sweep.space={method.config.r: {choices: [16, 32]}}"]
    (tmp_path / "work" / "oom").touch()
    assert sweep.main(words) == 0
    assert states(tmp_path) == ["COMPLETE", "FAIL"]
    assert study(tmp_path).trials[1].user_attrs["status"] == "oom" and trials(tmp_path)[1]["status"] == "oom"
    assert "r=32 lora_alpha=64 lr=0.0005: out of memory (too big)" in capsys.readouterr().out
    assert sweep.main(words) == 0
    assert len(calls(tmp_path)) == 2


def test_a_trial_that_diverged_is_an_answer_and_never_the_best(words, tmp_path, capsys):
    (tmp_path / "work" / "diverged").touch()
    assert sweep.main([*words, "sweep.confirm=false", "sweep.space={method.config.r: {choices: [1, 16]}}"]) == 0
    assert states(tmp_path) == ["COMPLETE", "FAIL"] and [t["status"] for t in trials(tmp_path)] == ["ok", "diverged"]
    assert "r=16 lora_alpha=32 lr=0.000707: diverged (training diverged at step 2)" in capsys.readouterr().out
    assert best(tmp_path)["params"] == {"method.config.r": 1}
    assert sweep.main([*words, "sweep.confirm=false", "sweep.space={method.config.r: {choices: [1, 16]}}"]) == 0
    assert len(calls(tmp_path)) == 2, "it is not tried again"


def test_a_study_without_a_finite_trial_says_so_and_confirms_nothing(words, tmp_path, capsys):
    (tmp_path / "work" / "diverged").touch()
    assert sweep.main([*words, "sweep.space={method.config.r: {choices: [16, 32]}}"]) == 2
    error = capsys.readouterr().err
    assert "has a value (2 diverged; see " in error and "nothing to confirm" in error and error.count("\n") == 1
    assert len(calls(tmp_path)) == 2 and not (tmp_path / "sweeps/tried/lora/best.json").exists() and not (tmp_path / "results").exists()


def test_a_diverged_trial_of_an_earlier_study_is_not_the_best(words, tmp_path):
    """Such a trial was complete, and had the value of whatever was validated."""
    words = [*words, "sweep.confirm=false", "sweep.space={method.config.r: {choices: [1, 16]}}"]
    assert sweep.main(words) == 0 and best(tmp_path)["params"] == {"method.config.r": 16}
    with contextlib.closing(sqlite3.connect(tmp_path / "sweeps/tried/lora/study.db")) as stored, stored:
        changed = stored.execute("UPDATE trial_user_attributes SET value_json = 'true' WHERE key = 'diverged' AND trial_id = 2")
        assert changed.rowcount == 1
    assert sweep.main(words) == 0 and best(tmp_path)["params"] == {"method.config.r": 1}
    assert [t["status"] for t in trials(tmp_path)] == ["ok", "diverged"]


def test_nothing_but_out_of_memory_is_an_error(words, tmp_path, capsys):
    (tmp_path / "work" / "oom").touch()
    assert sweep.main([*words, "sweep.space={method.config.r: {choices: [32]}}"]) == 2
    assert "no trial of" in capsys.readouterr().err and not (tmp_path / "sweeps/tried/lora/best.json").exists()


@pytest.mark.parametrize(("error", "code"), [(Unsuited("more demonstrations than rows"), 0), (UserError("no space left on the disk"), 2)])
def test_what_does_not_suit_the_input_is_the_trials_own_and_other_bad_input_is_not(words, tmp_path, capfd, monkeypatch, error, code):
    def failing(cfg: Any, **more: Any) -> Result:
        if cfg.method.config.r == 2:
            raise error
        return fake_cell(cfg, **more)

    words = [*words, "sweep.confirm=false", "sweep.space={method.config.r: {choices: [1, 2, 4]}}", "+sweep.count_errors=true"]
    monkeypatch.setattr(cell_run, "run", failing)
    assert sweep.main(words) == code
    told = capfd.readouterr()
    assert f"error: {error}" in told.err and study(tmp_path).trials[1].state.name == "FAIL"
    assert ("r=2 lora_alpha=4 lr=0.002: its settings do not suit the input; it counts as a trial without a value" in told.out) is (code == 0)
    assert states(tmp_path) == ["COMPLETE", "FAIL", "WAITING" if code else "COMPLETE"]


def test_a_trial_that_fails_stops_the_sweep_and_is_tried_again(words, tmp_path, capfd, monkeypatch):
    def failing(cfg: Any, **more: Any) -> Result:
        if cfg.method.config.r == 2:
            raise UserError("the data is broken")
        return fake_cell(cfg, **more)

    words = [*words, "sweep.confirm=false", "sweep.space={method.config.r: {choices: [1, 2, 4]}}"]
    monkeypatch.setattr(cell_run, "run", failing)
    assert sweep.main(words) == 2
    error = capfd.readouterr().err
    assert "the data is broken" in error and "the trial with r=2 lora_alpha=4 lr=0.002 ended with code 2" in error
    monkeypatch.setattr(cell_run, "run", fake_cell)
    assert sweep.main(words) == 0
    assert sorted(c["r"] for c in calls(tmp_path)) == [1, 2, 4]


@pytest.mark.slow
def test_two_objectives_give_a_front_and_confirm_each_of_its_points(words, tmp_path):
    assert sweep.main([*words, "sweep=rank_memory"]) == 0
    found = best(tmp_path)
    assert [f["params"]["method.config.r"] for f in found["front"]] == [16, 4, 2, 1]  # 8 ties with 4, 32 is worse than 16
    assert found["front"][1]["values"] == {"validation": 0.8, "peak_memory": 4000}
    assert found["params"] == {"method.config.r": 16}
    confirmed = {p.name for p in (tmp_path / "results/tried").iterdir()}
    assert confirmed == {f"lora+r{r}-s0-n64" for r in (16, 4, 2, 1)}


def test_time_is_up(words, tmp_path, capsys):
    assert sweep.main([*words, "sweep.timeout_s=0"]) == 2
    assert "no trial of" in capsys.readouterr().err and not (tmp_path / "work/calls.jsonl").exists()


def test_seed_and_rows_come_from_the_grid_unless_given(words, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "grid", lambda name: {"grid": {"seeds": [3, 4], "train_rows": [48, 64]}})
    cfg = compose(words)
    for given, wanted in ((["experiments"], (3, 48)), (["experiments", "seed"], (0, 48)), (["experiments", "seed", "train_rows"], (0, 64))):
        found = search_trials.of_grid(cfg, given)
        assert (found.seed, found.train_rows) == wanted
    assert search_trials.of_grid(cfg, []) == cfg


def test_another_config_does_not_go_into_the_same_study(finished, words, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    changes = {"train.epochs=7": "train.epochs=1, now it is 7", "sweep=rank_memory": "sweep.objectives", "seed=1": "seed=0, now it is 1",
               "task=svamp": "task.", "model=smollm2_135m_random": "model.", "+task.metric=macro_f1": "task.metric=None, now it is macro_f1"}
    for change, named in changes.items():
        assert sweep.main([*words, change]) == 2
        assert named in capsys.readouterr().err
    (tmp_path / "data/vader_movies_5").mkdir(parents=True)
    (tmp_path / "data/vader_movies_5/manifest.json").write_text("{}")
    assert sweep.main(words) == 2
    assert "the data (sha256)=None" in capsys.readouterr().err
    assert len(calls(tmp_path)) == 7


NOTHING = ["report.target=0.6", "report.train_rows=[64]", "forecast.length=9", "train.progress=false", "train.checkpoint_every_s=1", "memory_limit_gb=500",
           "price_per_hour=2", "currency=EUR", "tune.trials=3", "search=rank", "evaluate.latency_rows=3", "split=validation", "sweep.n_trials=6"]


def as_before(tmp_path: Path, words: list[str]) -> None:
    """Give the study the identity that earlier versions kept: every key of the config by its old name, links beside the space, entries as they were written."""
    from pipeline.cell.identity import flat
    from pipeline.core.compose import plain

    old = {key: v for key, v in flat(plain(compose(words))) if key.partition(".")[0] not in ("sweep", "tracking", "paths", "evaluate")}
    kept = study(tmp_path).user_attrs["identity"]
    old = {key: v for key, v in old.items() if key not in kept["sweep.space"]}
    old |= {key: v for key, v in kept.items() if key.startswith("sweep.")}
    old |= {"the data (sha256)": None, "the model (sha256)": None, "evaluate.validation_share": kept["evaluate.validation_share"]}
    old["train.packing"] = old.pop("train.padding_free")
    old["sweep.space"] = {"method.config.r": {"choices": RANKS, "log": False, "step": None}}
    links = {"method.config.lora_alpha": {"times": 2, "of": "method.config.r"}, "train.lr": kept["sweep.space"]["train.lr"]}
    study(tmp_path).set_user_attr("identity", old | {"sweep.link": links})


@pytest.mark.parametrize("before", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["a study of today", "of before"])
def test_what_decides_nothing_does_not_refuse_to_go_on_with_a_study(finished, words, tmp_path, capsys, before):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    if before:
        as_before(tmp_path, words)
    shutil.copytree(tmp_path / "results", tmp_path / "elsewhere")
    for change in (NOTHING, [f"paths.results={tmp_path}/elsewhere", "paths.report=there"]):
        assert sweep.main([*words, "sweep.confirm=false", *change]) == 0
    assert len(calls(tmp_path)) == 7, "no trial was run again"
    start = {"train.epochs=7": "train.epochs", "start=full": "start=None, now it is full", "+method.config.use_dora=true": "use_dora",
             "evaluate.validation_share=0.5": "evaluate.validation_share", "+sweep.space={train.lr: {choices: [1, 2]}}": "sweep.space"}
    for word, named in start.items():
        assert sweep.main([*words, word]) == 2
        assert named in capsys.readouterr().err


def test_a_default_that_is_no_part_of_a_cell_s_identity_is_one_of_a_study_s(finished, words, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for change in ({"start": "full"}, {"method.config.gone": 3}):
        kept = study(tmp_path).user_attrs["identity"]
        study(tmp_path).set_user_attr("identity", kept | change)
        assert sweep.main(words) == 2
        assert "{}={}, now it is None".format(*next(iter(change.items()))) in capsys.readouterr().err
        study(tmp_path).set_user_attr("identity", kept)


def test_two_sweeps_do_not_share_a_folder(words, tmp_path, capsys, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(search_trials, "LOCK_S", 0)
    folder = tmp_path / "sweeps/tried/lora"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        assert sweep.main(words) == 2
    assert "another sweep is at work" in capsys.readouterr().err


def test_a_file_that_is_no_study(words, tmp_path, capsys):
    (tmp_path / "sweeps/tried/lora").mkdir(parents=True)
    (tmp_path / "sweeps/tried/lora/study.db").write_text("no database, but long enough to be looked at")
    assert sweep.main(words) == 2
    error = capsys.readouterr().err
    assert "cannot be opened as an Optuna study" in error and len(error.splitlines()) == 1


def test_a_full_disk_does_not_tell_to_delete_the_study(words, small_disk, capsys):
    folder = small_disk / "tried/lora"
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    (small_disk / "fill").write_bytes(bytes(200 << 10))  # what is left does not hold a database
    assert sweep.main([*words, f"paths.sweeps={small_disk}"]) == 2
    error = capsys.readouterr().err
    assert "study.db (" in error and "free space or fix paths.sweeps" in error and "delete" not in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["+sweep.sampeler=x"], "unknown config key 'sweep.sampeler', did you mean 'sampler'?"),
        (["+sweep.space={a.b: {choices: [1]}}"], "sweep.space names 'a.b'"),
        (["+sweep.space={method.config.rank: {choices: [1]}}"], "a cell of technique 'lora' does not have; method.config has type"),
        (["+sweep.space={method.config: {choices: [1]}}"], "which is a group of keys"),
        (["technique=full"], "sweep.space names 'method.config.r', which a cell of technique 'full' does not have"),
        (["~sweep.space", "+sweep.space={}"], "sweep.space is empty"),
        (["sweep.space={method.config.r: {choices: [0, 1]}}"], "contains 0; a rank is a whole number of at least 1"),
        (["sweep.space={method.config.r: {choices: [-4]}}"], "contains -4; a rank"),
        (["sweep.space={method.config.r: {choices: []}}"], "list each value once, and at least one"),
        (["sweep.space={method.config.r: {choices: [2, 2]}}"], "list each value once"),
        (["+sweep.space={train.lr: {low: 1, high: 2}}"], "brute_force goes through choices"),
        (["+sweep.space={train.lr: {lo: 1}}"], "unknown config key 'sweep.space.train.lr.lo', did you mean 'low'?"),
        (["sweep=rank_alpha_lr", "sweep.space={train.lr: {low: 1, high: 0.1}}"], "low <= high"),
        (["sweep=rank_alpha_lr", "sweep.n_trials=null"], "sweep.n_trials is null"),
        (["sweep.n_trials=0"], "sweep.n_trials' is 0"),
        (["sweep.sampler=grid"], "choose one of brute_force, tpe"),
        (["sweep.objectives=[latency]"], "choose [validation] or [validation, peak_memory]"),
        (["sweep.space={method.config.lora_alpha: {of: train.lr}}"], "which sweep.space does not search; it has method.config.r"),
        (["+sweep.space={method.config.lora_alpha: {choices: [1, 2]}}"], "has choices and times; keep one of them"),
        (["+sweep.space={train.lr: {step: 1, times: 2, of: method.config.r}}"], "write {times: <number>, of: <a key that is searched>}"),
        (["+sweep.space={train.lr: {factor: 1}}"], "has factor 1; write a factor above 1"),
        (["+sweep.space={train.weight_decay: {power: 1, of: method.config.r}}"],
         "follows 'method.config.r' by a power, and train.weight_decay is 0.0; write a number above 0"),
        (["sweep.space={train.lr: {power: 1e6}}"], "has power 1000000.0; write one from -4 to 4"),
        (["+sweep.space={train.lr: {scale: 2}}"], "has a scale, which follows from the cell's own values"),
        (["+sweep.space={train.lr: {step: 1}}"], "or power in the place of times"),
        (["+sweep.space={train.lr: {of: null}}"], "has power -0.5; write of, the key that it follows"),
        (["+sweep.space={train.lr: {of: method.config.q}}"], "sweep.space names 'method.config.q', which a cell"),
        (["+sweep.space={train.lr: {of: method.config.lora_alpha}}"], "follows 'method.config.lora_alpha', which sweep.space does not search"),
        (["+sweep.space={train.lr: {choices: [1, 2], step: 1}}"], "keep its choices alone"),
        (["sweep.space=3"], "sweep.space is 3; write a config key with"),
        (["+task.metric=accuracy", "+sweep.space={task.metric: {choices: [accuracy, rouge_l]}}"], "sweep.space searches 'task.metric', but no ranking may mix"),
        (["+sweep.space={model.name: {choices: [a, b]}}"], "sweep.space searches 'model.name', but no ranking may mix"),
        (["sweep=grid"], "unknown sweep 'grid'"),
        (["train.epoch=1"], "unknown config key 'train.epoch'"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(words, tmp_path, capsys, more, message):
    assert sweep.main([*words, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "sweeps").exists()


def test_tpe_draws_from_a_seed_stay_those_of_studies_made_before(tmp_path):
    cfg = compose(["technique=lora", "sweep=rank_alpha_lr", "sweep.seed=3"])
    opened, found = open_study(tmp_path, cfg, read_space(cfg)), []
    for _ in range(12):
        trial, point = opened.ask()
        opened.stored.tell(trial, point["train.lr"] * point["method.config.r"])
        found.append(tuple(point.values()))
    assert found[:2] == [(32, 64, 0.001987412857879569), (2, 8, 0.003636047340681997)], "at random"
    assert found[10:] == [(4, 16, 0.007481638525545445), (32, 32, 0.003855467886041795)], "having learnt from ten"


@pytest.mark.parametrize("name", [p.stem for p in sorted((CONF / "sweep").glob("*.yaml"))])
@pytest.mark.parametrize("technique", ["lora", "qlora"])
def test_every_sweep_fits_the_adapters(name, technique):
    cfg = compose([f"sweep={name}", f"technique={technique}", "train.lr=1e-3"])
    found = read_space(cfg)
    assert found.target >= 6
    assert at(cfg, {"method.config.r": 3}).method.config.r == 3 and cfg.method.config.r != 3


def test_ranges_suggest_whole_numbers_and_floats():
    point = next(Space({"a": Parameter(low=1, high=4), "b": Parameter(low=0.1, high=0.2), "c": Parameter(low=0, high=10, step=5)}).draw(seed=0))
    assert isinstance(point["a"], int) and 0.1 <= point["b"] <= 0.2 and point["c"] in (0, 5, 10)


@pytest.mark.slow
def test_trials_are_nested_mlflow_runs(words, tmp_path):
    import mlflow

    database = [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"tracking.artifacts={tmp_path}/artifacts"]
    choices = "sweep.space={method.config.r: {choices: [1, 4]}}"
    assert sweep.main([*[w for w in words if w != "tracking=none"], *database, choices]) == 0
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("tried").experiment_id
    found = {r.data.tags["alignscope.cell"]: r for r in client.search_runs([experiment])}
    assert set(found) == {"tried/lora+best-s0-n64", "tried/sweep/lora", "tried/sweep/lora/0", "tried/sweep/lora/1"}
    parent = found["tried/sweep/lora"]
    assert {found[f"tried/sweep/lora/{n}"].data.tags["mlflow.parentRunId"] for n in range(2)} == {parent.info.run_id}
    assert parent.data.metrics["best/validation"] == 0.8 and parent.info.status == "FINISHED"


@pytest.mark.slow
def test_the_dashboard_opens_the_study(words, tmp_path):
    assert sweep.main([*words, "sweep.confirm=false"]) == 0
    port = _free_port()
    command = [
        str(Path(sys.executable).with_name("optuna-dashboard")),
        "--port",
        str(port),
        f"sqlite:///{tmp_path}/sweeps/tried/lora/study.db",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        page = _fetch(f"http://127.0.0.1:{port}/api/studies")
    finally:
        server.terminate()
        server.wait()
    assert "tried/lora" in page


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _fetch(url: str) -> str:
    import time

    for _ in range(100):
        try:
            with urllib.request.urlopen(url, timeout=5) as page:
                return str(page.read().decode())
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"{url} does not answer")


@pytest.mark.slow
def test_a_real_sweep_of_a_tiny_model(overrides, tmp_path):
    small = ["sweep.space={method.config.r: {choices: [1, 4]}}", "train_rows=48", "train.batch_size=8", "train.lr=0.02", "train.epochs=4"]
    assert sweep.main([*overrides, "technique=lora", "experiment=tried", *small]) == 0
    rows = trials(tmp_path)
    assert [row["method.config.r"] for row in rows] == ["1", "4"] and all(float(row["peak_bytes"]) > 0 for row in rows)
    result = read(tmp_path / "results/tried/lora+best-s0-n48")
    assert result.hyperparameters["r"] == best(tmp_path)["params"]["method.config.r"] and result.test is not None
    validation = result.scores["validation"].accuracy
    assert validation == pytest.approx(best(tmp_path)["value"]), "the same seed, rows and setting give the same validation score"
