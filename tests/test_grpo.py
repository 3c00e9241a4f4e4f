"""GRPO and RLOO: what earns a reward, how a step is laid out, what is refused, and that TRL's loop learns under this project's meter."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import build, compose
from pipeline.core.files import UserError, read_jsonl
from pipeline.core.settings import Task, Train
from pipeline.objectives.grpo import Grpo, answer_in
from pipeline.serving import artefact as evaluate
from pipeline.training import stepping
from pipeline.training.trl import TrlLoop, _together

CHOICE = Task("t", "choice")
NUMBER = Task("t", "generate", answer_pattern=r"-?\d[\d,]*(?:\.\d+)?")
ROW = {"answer": "bad", "choices": ["bad", "bad luck", "good"]}
SHORT = ["experiment=mine", "train_rows=64", "train.batch_size=8", "train.validations=2"]


def test_an_answer_is_the_choice_that_a_text_begins_with_or_what_the_task_extracts():
    assert [answer_in(t, ROW, CHOICE) for t in (" bad", "Bad luck, he said", "goodbye", "so bad", "")] == ["bad", "bad luck", "good", None, None]
    assert answer_in("It is 3 or 4,000.", {}, NUMBER) == "4,000"
    texts = [" bad film", "bad luck", [{"role": "assistant", "content": "BAD"}], "nothing"]
    reward = Grpo("grpo", 2, 1.0).reward
    assert reward(texts, [ROW] * 4, CHOICE) == [1.0, 0.0, 1.0, 0.0]
    assert reward(["= 4,000.0", "none"], [{"answer": "4000"}] * 2, NUMBER) == [1.0, 0.0]


@pytest.mark.parametrize(("batch", "fit", "rows"), [(8, 100, 8), (8, 5, 4), (8, 0, 1), (6, 4, 3), (7, 6, 1)])
def test_a_step_is_split_into_equal_passes(batch, fit, rows):
    assert _together(batch, fit) == rows


@pytest.mark.parametrize("change", ["algorithm=ppo", "num_generations=1", "temperature=0", "beta=-1"])
def test_values_out_of_range_are_refused(change):
    with pytest.raises(UserError, match=f"objective.*{change.split('=')[0]}"):
        build(compose(["technique=grpo", f"objective.{change}"]).objective, "objective")


def test_without_trl_and_without_an_adapter_to_hold_against_is_said(monkeypatch):
    at: Any = SimpleNamespace(model=object(), rows=[], encoder=None)
    with pytest.raises(UserError, match="objective.beta is 0.1, but only an adapter"):
        Grpo("grpo", 2, 1.0, beta=0.1).prepared([], at)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="TRL, which is not installed; run: pip install"):
        Grpo("grpo", 2, 1.0).prepared([], at)


def test_a_start_is_asked_for_by_name(overrides):
    cfg = compose([*overrides, *SHORT, "technique=grpo"])
    with pytest.raises(UserError, match="start=full, but .*full-s0-n64 holds no finished cell; run it first: python -m pipeline.train .*technique=full"):
        cell_run.run(cfg)


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto", "logit_distillation", "grpo"])
def test_the_fast_engine_and_packs_leave_such_objectives_alone(monkeypatch, name):
    objective = build(compose([f"technique={name}"]).objective, "objective")
    assert not objective.plain
    if name == "grpo":
        assert cell_run.LOOPS[objective.trainer] is TrlLoop, "which steps by itself"
        return
    eager: Any = SimpleNamespace()
    method = build(compose(["technique=lora"]).method, "method")
    monkeypatch.setattr(stepping, "Eager", lambda run: eager)
    run = stepping.Run(torch.nn.Linear(1, 1), method, objective, [[]], Train(0.1, 1, 1, 1, engine="fast"), 0, 5, None, None, 0)
    assert stepping.choose(run) is eager and eager.reason == "the objective makes batches of its own"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_trl_s_loop_learns_from_rewards_under_our_meter(overrides, tmp_path, name):
    pytest.importorskip("trl")
    start = compose([*overrides, *SHORT, "technique=full", "train.lr=1e-3", "train.epochs=2"])
    before = cell_run.run(start, folder=identity.folder_of(start))
    cfg = compose([*overrides, *SHORT, f"technique={name}", "train.lr=5e-3", "train.epochs=4"])
    actual = cell_run.run(cfg, folder=tmp_path / "cell")
    assert actual.test.accuracy >= 0.95 and actual.test.nll < before.test.nll
    rewards = [p["reward"] for p in actual.history]
    assert len(rewards) == actual.work.steps == 32 and sum(rewards[-8:]) > sum(rewards[:8]) > 0
    assert actual.history[0]["lr"] < actual.history[3]["lr"] and "validation_metric" in actual.history[15]
    assert actual.phases.train_s > 0 and actual.phases.validate_s > 0 and actual.work.tokens > 32 * 8 * 8 and actual.memory.peak_bytes
    assert actual.phases.other_s <= 0.02 * actual.phases.wall_s and any(n.startswith("begins at mine/full-s0-n64") for n in actual.notes)
    stored = [p for p in read_jsonl(tmp_path / "cell" / "predictions.jsonl") if p["split"] == "test"]
    assert [p["prediction"] for p in evaluate.score_artefact(cfg, tmp_path / "cell" / "artefact", "test")[0]] == [p["prediction"] for p in stored]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_a_run_that_diverges_ends_with_a_note(overrides, tmp_path, name):
    pytest.importorskip("trl")
    more = [f"technique={name}", "start=null", "train.lr=1e30", "train.steps=6", "objective.num_generations=4", "train.validations=0"]
    actual = cell_run.run(compose([*overrides, *SHORT, *more]), folder=tmp_path / "cell")
    assert actual.status == "diverged" and actual.work.diverged_at and actual.work.engine == "trl" and len(actual.history) < 6


@pytest.mark.slow
def test_a_divergence_from_the_start_costs_and_leaves_no_second_adapter(overrides, tmp_path):
    pytest.importorskip("trl")
    cfg = compose([*overrides, *SHORT, "technique=grpo", "start=null", "objective.beta=0.1", "train.steps=2", "objective.num_generations=2"])
    actual = cell_run.run(cfg, folder=tmp_path / "cell")
    assert actual.work.steps == 2 and not (tmp_path / "cell" / "artefact" / "ref").exists()
    never = compose([*overrides, *SHORT, "technique=grpo", "start=null", "train.steps=2", "objective.num_generations=2", "task.scoring=generate",
                     "+task.answer_pattern=never", "train.validations=0"])
    assert any("no sampled answer was right" in note for note in cell_run.run(never).notes)
    with pytest.raises(UserError, match="adalora acts between steps"):
        cell_run.run(compose([*overrides, *SHORT, "technique=grpo", "start=null", "method=adalora"]))
