"""What each objective makes of a row, and the loss of a batch against the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.core.files import UserError
from pipeline.core.settings import Precision, Task, Train
from pipeline.data.rows import Encoder, Example, step_batches
from pipeline.models.base import load_model, load_tokenizer
from pipeline.objectives.labels import Labels
from pipeline.objectives.step_by_step import StepByStep

CHOICE = Task("t", "choice")
GENERATE = Task("t", "generate")
ROW: dict = {"id": "1", "prompt": "Review: the film\nSentiment:", "answer": "positive", "choices": ["negative", "positive"]}
RATIONALE = {"id": "1", "rationale": "The words are positive.", "answer": "positive", "correct": True}
WRONG = {**RATIONALE, "answer": "negative", "correct": False}


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny / "models" / "smollm2_135m", Precision("fp32"), torch.device("cpu"))


@pytest.fixture(scope="module")
def encoder(tiny):
    return Encoder(load_tokenizer(tiny / "models" / "smollm2_135m"), CHOICE, 64, "error")


def test_labels_give_one_example_that_ends_only_where_it_is_generated():
    assert Labels().examples(ROW, CHOICE, RATIONALE) == [Example(ROW["prompt"], "positive", "label", 1.0, ends=False)]
    assert Labels().examples(ROW, GENERATE, None) == [Example(ROW["prompt"], "positive", "label", 1.0, ends=True)]
    assert not Labels().needs_rationales and Labels().prompt("p") == "p"


def test_step_by_step_predicts_and_explains():
    objective = StepByStep(0.5)
    assert objective.examples(ROW, CHOICE, RATIONALE) == [
        Example("[label] " + ROW["prompt"], "positive", "label", 1.0, ends=False),
        Example("[rationale] " + ROW["prompt"], "The words are positive.", "rationale", 0.5, ends=True),
    ]
    assert objective.needs_rationales and objective.prompt("p") == "[label] p"


def test_rows_without_a_rationale_give_the_label_alone():
    for rationale in (None, {**RATIONALE, "rationale": ""}, {**RATIONALE, "rationale": None}):
        assert len(StepByStep(0.5).examples(ROW, CHOICE, rationale)) == 1


@pytest.mark.parametrize(
    ("policy", "rationale", "count"), [("keep", WRONG, 2), ("drop", WRONG, 1), ("keep", RATIONALE, 2), ("drop", RATIONALE, 2)]
)
def test_wrong_rationales_are_kept_or_dropped(policy, rationale, count):
    actual = StepByStep(0.5, wrong_rationales=policy).examples(ROW, CHOICE, rationale)
    assert len(actual) == count and actual[0].answer == "positive", "the label is always the row's own"


def batches(objective: Any, encoder: Encoder, rationale: dict | None, micro_batch_tokens: int = 4096) -> list:
    rows = [{**ROW, "id": str(i), "prompt": f"Review: {'film ' * i}\nSentiment:"} for i in range(1, 6)]
    encoded = [encoder.example(e) for row in rows for e in objective.examples(row, CHOICE, rationale)]
    return list(step_batches(encoded, Train(0.1, 1, 5, micro_batch_tokens), 1))


def trained(model: Any, objective: Any, found: list) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Losses and the gradient of the embedding (tied: every parameter's way leads through it)."""
    model.zero_grad()
    weight = model.get_input_embeddings().weight.requires_grad_(True)
    losses = [objective.loss(model, b) for b in found]
    for loss in losses:
        loss.backward()
    return [loss.detach() for loss in losses], weight.grad.clone()


@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_rationale_weight_0_is_standard_fine_tuning_bit_for_bit(model, encoder, policy):
    objective = StepByStep(0.0, predict_prefix="", wrong_rationales=policy)
    assert not objective.needs_rationales
    assert objective.examples(ROW, CHOICE, RATIONALE) == Labels().examples(ROW, CHOICE, RATIONALE)
    one, other = batches(objective, encoder, RATIONALE, 40), batches(Labels(), encoder, RATIONALE, 40)
    assert len(one) == len(other) > 1
    (losses, gradient), (plain_losses, plain_gradient) = trained(model, objective, one), trained(model, Labels(), other)
    assert all(torch.equal(a, b) for a, b in zip(losses, plain_losses, strict=True))
    assert torch.equal(gradient, plain_gradient)


@pytest.mark.parametrize("weight", [0.25, 2.0])
def test_the_loss_is_the_labels_plus_the_weighted_rationales(model, encoder, weight):
    objective = StepByStep(weight)
    (batch,) = batches(objective, encoder, RATIONALE)
    with torch.no_grad():
        total = float(objective.loss(model, batch))
        chances = torch.log_softmax(model(input_ids=batch.input_ids).logits, -1)
        nll = -chances[batch.rows, batch.cols, batch.targets]
        words = encoder.tokenizer.convert_ids_to_tokens(batch.input_ids[:, 1].tolist())
        is_label = torch.tensor([words[r] == "label" for r in batch.rows.tolist()])
    assert int(is_label.sum()) == 5 and int((~is_label).sum()) == 5 * 6, "five labels of one token, five rationales of five and an end"
    assert total == pytest.approx(float(nll[is_label].mean() + weight * nll[~is_label].mean()), abs=1e-5)


def test_a_negative_weight_and_an_unknown_policy_are_refused():
    with pytest.raises(UserError, match=r"'objective\.rationale_weight' is -1.0; it must be at least 0"):
        StepByStep(-1)
    with pytest.raises(UserError, match=r"'objective\.wrong_rationales' is 'fix'; choose one of keep, drop"):
        StepByStep(1, wrong_rationales="fix")


def test_names_and_what_is_shown():
    assert (Labels().name, StepByStep(0.5).name) == ("labels", "step_by_step")
    assert StepByStep(0.5).hyperparameters() == {"rationale_weight": 0.5, "wrong_rationales": "keep"} and Labels().hyperparameters() == {}


def test_the_loss_on_a_cpu_is_torchs_cross_entropy_there_and_back():
    """Several stretches of rows, a weight of 0 over logits that are no numbers, and an upstream gradient that is not 1."""
    import torch.nn.functional as F

    from pipeline.engine.layout import ROWS_AT_ONCE
    from pipeline.engine.ops import WeightedNll

    torch.manual_seed(0)
    rows = 2 * ROWS_AT_ONCE + 3
    logits, targets, weights = 5 * torch.randn(rows, 31), torch.randint(31, (rows,)), torch.rand(rows)
    theirs, ours = (logits.clone().requires_grad_() for _ in range(2))
    expected = 0.3 * (F.cross_entropy(theirs, targets, reduction="none") * weights).sum()
    expected.backward()
    actual = 0.3 * WeightedNll.apply(ours * 1.0, targets, weights)
    actual.backward()
    assert torch.allclose(actual, expected, rtol=1e-6) and torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    weights[5], logits[5] = 0.0, float("nan")
    ours = logits.requires_grad_()
    actual = WeightedNll.apply(ours * 1.0, targets, weights)
    actual.backward()
    assert actual.isfinite() and ours.grad.isfinite().all() and not ours.grad[5].any()
