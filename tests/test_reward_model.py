"""Reward models: the loss by hand and against TRL's, what a head is worth on pairs, that it learns, is served, and is refused where it cannot be used."""

from __future__ import annotations

import collections
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import build, compose
from pipeline.core.files import UserError, read_jsonl
from pipeline.core.settings import Precision, Task, Train
from pipeline.data.rows import Encoder
from pipeline.models.base import load_model, load_tokenizer
from pipeline.objectives.preferences import RewardModel
from pipeline.records.results import read as read_result
from pipeline.scoring import rewards
from pipeline.serving import artefact, export

CPU = torch.device("cpu")
TASK = Task("t", "choice")
ROWS: list[dict] = [
    {"id": str(i), "prompt": f"Review: {'film ' * (i + 1)}\nSentiment:", "answer": good,
     "choices": ["negative", "positive", "the plot of a story"], "fields": {}}
    for i, good in enumerate(["positive", "negative", "the plot of a story", "positive"])
]
SHORT = ["experiment=mine", "train_rows=64", "train.batch_size=8", "train.validations=1", "technique=reward_model", "start=null"]


@pytest.fixture(scope="module")
def encoder(tiny):
    return Encoder(load_tokenizer(tiny / "models" / "smollm2_135m"), TASK, 64, "error")


@pytest.fixture
def model(tiny):
    made = load_model(tiny / "models" / "smollm2_135m", Precision("fp32"), CPU)
    torch.manual_seed(3)
    rewards.attach(made)
    return made


def reward(model: Any, ids: Any) -> float:
    """Of one sequence by itself: the state before the output layer at its last token, times the head."""
    with torch.no_grad():
        return float(model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] @ model.reward_head.weight[0])


def total(objective: RewardModel, model: Any, encoder: Encoder, micro_batch_tokens: int) -> float:
    flat = [encoder.example(e) for row in ROWS for e in objective.examples(row, TASK, None)]
    batches = list(objective.batches(flat, Train(0.1, 1, 4, micro_batch_tokens), encoder.pad_id))
    assert sum(batch.tokens for batch in batches) == sum(len(e.ids) for e in flat)
    with torch.no_grad():
        return sum(float(objective.loss(model, batch)) for batch in batches)


@pytest.mark.parametrize(("wrong", "centre"), [(1, 0.0), (1, 0.3), (None, 0.0), (None, 0.3)])
def test_the_loss_is_the_formula_s_however_a_step_is_split(model, encoder, wrong, centre):
    objective = RewardModel(wrong_choices=wrong, centre=centre)
    expected = 0.0
    for row in ROWS:
        right, *others = [reward(model, encoder.example(e).ids) for e in objective.examples(row, TASK, None)]
        assert len(others) == (wrong or 2)
        chosen = math.exp(right) / sum(map(math.exp, (right, *others)))
        expected += (-math.log(chosen) + centre * sum((right + other) ** 2 for other in others) / len(others)) / len(ROWS)
    for most in (64, 10_000):
        assert total(objective, model, encoder, most) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("centre", [None, 0.3])
def test_a_pair_s_loss_is_trl_s(model, encoder, centre):
    trl = pytest.importorskip("trl")
    from transformers import LlamaForSequenceClassification

    objective = RewardModel(wrong_choices=1, centre=centre or 0.0)
    flat = [encoder.example(e) for row in ROWS for e in objective.examples(row, TASK, None)]
    theirs = LlamaForSequenceClassification(model.config).eval()
    theirs.config.num_labels, theirs.score = 1, model.reward_head
    theirs.model.load_state_dict(model.model.state_dict())
    width = max(len(e.ids) for e in flat)
    rows = [*flat[::2], *flat[1::2]]
    inputs = {"input_ids": torch.tensor([[*e.ids, *[1] * (width - len(e.ids))] for e in rows]),
              "attention_mask": torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in rows])}
    stand_in: Any = SimpleNamespace(
        model=theirs, _total_train_tokens=0, args=SimpleNamespace(center_rewards_coefficient=centre),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
    )
    with torch.no_grad():
        expected = trl.RewardTrainer.compute_loss(stand_in, theirs, inputs)
    assert total(objective, model, encoder, 10_000) == pytest.approx(float(expected), abs=1e-5)


def test_a_shuffled_control_says_nothing_of_the_right_answer():
    objective = RewardModel(wrong_choices=1, shuffle=True)
    rows = [{**ROWS[0], "id": str(i)} for i in range(400)]
    drawn = [objective.examples(row, TASK, None) for row in rows]
    assert all([e.group for e in row] == ["chosen", "rejected"] and len({e.answer for e in row}) == 2 for row in drawn)
    assert 0.42 < sum(row[0].answer == "positive" for row in drawn) / len(drawn) < 0.58
    assert drawn == [objective.examples(row, TASK, None) for row in rows], "the same at every call"


def prediction(answer: str, **values: float) -> dict:
    return {"answer": answer, "scores": values}


def test_a_pair_s_score_by_hand():
    scored = rewards.pair_score([prediction("a", a=1.0, b=0.0, c=2.0), prediction("b", a=0.0, b=0.0)])
    assert scored and (scored.pairs, scored.rows, scored.accuracy) == (3, 2, 0.5) and scored.p_value == pytest.approx(0.5)
    always = rewards.pair_score([prediction("a", a=1.0, b=0.0)] * 16)
    assert always and always.accuracy == 1.0 and always.p_value == pytest.approx(0.5 * math.erfc(4 / math.sqrt(2)))
    assert rewards.pair_score([prediction("a", a=0.0)]) is None and rewards.pair_score([]) is None


def test_calibration_by_hand():
    certain = math.log(3)  # a claimed chance of 0.75
    assert rewards.calibration_error([certain] * 3 + [-certain]) == pytest.approx(0.0)
    assert rewards.calibration_error([certain] * 4) == pytest.approx(0.25)
    assert rewards.calibration_error([-800.0, 800.0]) == pytest.approx(0.5)
    assert rewards.calibration_error([0.0]) == pytest.approx(0.0)


@pytest.mark.parametrize("more", [["train.lr=1e-2"], ["method=full", "train.lr=1e-3"]])
def test_it_learns_which_answer_is_right_and_is_served_as_it_was_scored(overrides, more):
    cfg = compose([*overrides, *SHORT, *more, "train.epochs=3"])
    folder = identity.folder_of(cfg)
    cell_run.run(cfg, folder=folder)
    actual = read_result(folder)
    assert actual.test and actual.test.accuracy >= 0.95 and set(actual.pairs) == {"validation", "test"}
    assert actual.pairs["test"].accuracy == actual.test.accuracy and actual.pairs["test"].pairs == 48 and actual.pairs["test"].p_value < 1e-6
    assert actual.test.nll is not None and actual.test.nll < math.log(2), "the pairs' own loss"
    stored = [p for p in read_jsonl(folder / "predictions.jsonl") if p["split"] == "test"]
    again = artefact.score_artefact(cfg, folder / "artefact", "test")[0]
    assert [p["scores"] for p in again] == [p["scores"] for p in stored]
    with pytest.raises(UserError, match="start=reward_model is a cell of reward_model, a model of rewards and not of texts"):
        cell_run.run(compose([*overrides, *SHORT, "technique=lora", "start=reward_model"]))
    assert "rewards of a head" in (export.refusal(artefact.Artefact.at("reward_model", folder / "artefact", cfg)) or "")
    base = artefact.Base.of(cfg)
    served = artefact.Artefact.at("reward_model", folder / "artefact", cfg)
    if not served.method.shards:
        artefact.detach(served.load(base)[0], base)
        assert not rewards.has_head(base.model) and not served.mixes


def test_a_task_without_choices_is_refused(overrides):
    with pytest.raises(UserError, match="reward_model ranks the choices of a row, and task.scoring is generate"):
        cell_run.run(compose([*overrides, *SHORT, "task.scoring=generate", "+task.answer_pattern=never"]))
    with pytest.raises(UserError, match="objective.*centre"):
        build(compose(["technique=reward_model", "objective.centre=-1"]).objective, "objective")
