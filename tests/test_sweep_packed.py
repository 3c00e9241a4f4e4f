"""sweep.executor=packed on the CPU: the outputs, a kill and a second start, too little memory, pruning, what is refused."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline import sweep
from pipeline.cell import packing
from pipeline.core.compose import ROOT, compose
from pipeline.records.results import read
from pipeline.search import trials as search_trials
from pipeline.search.space import at
from pipeline.search.study import read as read_space

RANKS = [1, 2, 4, 8, 16, 32]
SHORT = ["technique=lora", "precision=fp32", "experiment=tried", "train_rows=32", "train.batch_size=8", "train.epochs=1", "train.lr=0.02",
         "train.validations=2", "sweep.executor=packed", "sweep.confirm=false"]


@pytest.fixture
def words(overrides: list[str], imports: None) -> list[str]:
    return [*overrides, *SHORT]


def study(tmp_path: Path):
    import optuna

    return optuna.load_study(study_name="tried/lora", storage=f"sqlite:///{tmp_path}/sweeps/tried/lora/study.db")


def states(tmp_path: Path) -> list[str]:
    return [t.state.name for t in study(tmp_path).trials]


def trials(tmp_path: Path) -> list[dict]:
    with open(tmp_path / "sweeps/tried/lora/trials.csv", newline="") as lines:
        return list(csv.DictReader(lines))


def test_packed_trials_are_those_of_single_runs(words, tmp_path, capfd):
    """And say that they were packed; the confirm cell is a run of its own."""
    few = "sweep.space={method.config.r: {choices: [1, 4, 8]}}"
    assert sweep.main([*words, few, "sweep.slots=2", "sweep.confirm=true"]) == 0
    packed = trials(tmp_path)
    assert "2 trials at once" in capfd.readouterr().out
    assert [r["packed"] for r in packed] == ["True"] * 3 and [r["slots"] for r in packed] == ["2"] * 3
    assert all(float(r["train_s"]) > 0 and not r["peak_bytes"] and not r["tokens_per_s"] for r in packed)
    best = json.loads((tmp_path / "sweeps/tried/lora/best.json").read_text())
    confirmed = read(tmp_path / "results/tried/lora+best-s0-n32")
    assert not confirmed.packed and confirmed.test is not None and confirmed.scores["validation"].accuracy == best["value"]
    assert sweep.main([*words, few, "sweep.executor=sequential", f"paths.sweeps={tmp_path}/single"]) == 0
    with open(tmp_path / "single/tried/lora/trials.csv", newline="") as lines:
        single = list(csv.DictReader(lines))
    assert [r["validation"] for r in packed] == [r["validation"] for r in single] and [r["packed"] for r in single] == ["False"] * 3


@pytest.mark.slow
def test_killed_at_trial_4_of_6_it_loses_and_doubles_none(words, tmp_path):
    driver = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(ROOT)!r})
        from pipeline import sweep
        from pipeline.search import trials

        done = trials.PackedTrials._done
        def dying(self, run):
            done(self, run)
            if self.study.answered == 3 and not Path(sys.argv[1]).exists():
                Path(sys.argv[1]).touch()
                os.kill(os.getppid(), signal.SIGKILL)
                signal.pause()
        trials.PackedTrials._done = dying
        sys.exit(sweep.main(sys.argv[2:]))
    """
    command = [sys.executable, "-c", textwrap.dedent(driver), str(tmp_path / "killed"), *words, "sweep.slots=2"]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert sorted(states(tmp_path)) == ["COMPLETE"] * 3 + ["RUNNING"] + ["WAITING"] * 2
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    done = [t.params["method.config.r"] for t in study(tmp_path).trials if t.state.name == "COMPLETE"]
    assert sorted(done) == RANKS and sorted(states(tmp_path)) == ["COMPLETE"] * 6 + ["FAIL"]


@pytest.mark.slow
def test_an_interrupted_pack_puts_its_trials_back(words, tmp_path, monkeypatch):
    take = search_trials.PackedTrials._take

    def interrupted(self, free):
        if self.study.answered == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return take(self, free)

    monkeypatch.setattr(search_trials.PackedTrials, "_take", interrupted)
    assert sweep.main([*words, "sweep.slots=2"]) == 130
    assert states(tmp_path).count("COMPLETE") == 2 and "RUNNING" not in states(tmp_path)
    monkeypatch.setattr(search_trials.PackedTrials, "_take", take)
    assert sweep.main([*words, "sweep.slots=2"]) == 0
    assert states(tmp_path).count("COMPLETE") == 6


@pytest.mark.slow
def test_out_of_memory_makes_the_pack_smaller_and_loses_no_trial(words, tmp_path, monkeypatch, capfd):
    job, begun, most = packing.Packing.job, [], [2]

    def small(self, cfg, tag=None):
        begun.append(cfg)  # in a child, so the count begins anew with every pack
        if len(begun) > most[0]:
            raise RuntimeError("CUDA out of memory. Tried to allocate a lot")
        return job(self, cfg, tag)

    monkeypatch.setattr(packing.Packing, "job", small)
    assert sweep.main([*words, "sweep.space={method.config.r: {choices: [1, 2, 4]}}", "sweep.slots=2"]) == 0
    assert "2 trials at once ran out of memory; continuing with 1" in capfd.readouterr().out
    done = [r for r in trials(tmp_path) if r["state"] == "COMPLETE"]
    assert [(r["method.config.r"], r["slots"]) for r in done] == [("1", "2"), ("2", "2"), ("4", "1")]
    most[0] = 0
    assert sweep.main([*words, "sweep.space={method.config.r: {choices: [1]}}", f"paths.sweeps={tmp_path}/other"]) == 0
    assert "one trial after another, because not even one trial fits" in capfd.readouterr().out


@pytest.mark.slow
def test_a_pruned_trial_leaves_its_slot_to_the_next(words, tmp_path, monkeypatch):
    monkeypatch.setattr(search_trials.PackedTrials, "_prune", lambda self, run: run.job.name.cfg.method.config.r in (2, 8))
    assert sweep.main([*words, "sweep.slots=2", "sweep.pruner=median"]) == 0
    rows = trials(tmp_path)
    assert [r["status"] for r in rows] == ["ok", "pruned", "ok", "pruned", "ok", "ok"]
    assert states(tmp_path).count("PRUNED") == 2
    assert sweep.main([*words, "sweep.slots=2", "sweep.pruner=median"]) == 0, "a pruned trial is not tried again"
    assert len(trials(tmp_path)) == 6


@pytest.mark.slow
def test_tpe_asks_while_others_run_and_the_pruner_is_told(words, tmp_path):
    more = ["sweep=rank_alpha_lr", "sweep.executor=packed", "sweep.n_trials=5", "sweep.slots=2", "sweep.pruner=median", "sweep.confirm=false"]
    assert sweep.main([*words, *more]) == 0
    assert len(states(tmp_path)) == 5 and all(t.intermediate_values for t in study(tmp_path).trials)


@pytest.mark.parametrize(("more", "message"), [
    (["sweep.executor=parallel"], "choose one of auto, packed, sequential"),
    (["sweep.slots=0"], "sweep.slots' is 0"),
    (["sweep=rank_memory", "sweep.executor=packed"], "cannot measure peak_memory"),
    (["sweep.pruner=best"], "choose one of median"),
    (["sweep.pruner=median", "sweep.executor=sequential"], "sweep.pruner needs packed trials"),
    (["sweep.pruner=median", "sweep.executor=auto"], "sweep.pruner needs packed trials, but there is no GPU here"),
    (["method.config.use_dora=true"], "sweep.executor=packed, but LoRA with use_dora has a hand-written step for one run alone; choose auto or sequential"),
    (["+sweep.space={train.max_length: {choices: [64, 128]}}"], "the runs differ in train.max_length"),
])
def test_what_is_refused_is_one_sentence(words, capfd, more, message):
    assert sweep.main([*words, *more]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and message in error[0]


def test_auto_without_a_gpu_is_sequential_and_says_why(words):
    cfg = compose([*words, "sweep.executor=auto"])
    assert "no GPU" in (search_trials.refusal(read_space(cfg), cfg) or "")
    cfg = compose([*words, "sweep=rank_memory", "sweep.executor=auto", "device=auto"])
    assert "memory of a packed trial" in (search_trials.refusal(read_space(cfg), cfg) or "")


def test_the_covers_hold_every_extreme(words):
    cfg = compose([*words, "sweep=rank_alpha_lr", "+sweep.space={train.batch_size: {times: 4, of: method.config.r}}"])
    actual = read_space(cfg).space.covers()
    assert max(at(cfg, p).method.config.r for p in actual) == 32 and max(at(cfg, p).train.batch_size for p in actual) == 128
    assert {p["train.lr"] for p in actual if "train.lr" in p} == {1e-4, 1e-2}
