"""Rows to batches: what is drawn, in which order, how it is cut, padded, shifted and weighted."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import pytest
import torch
from conftest import write_task

from pipeline.core.files import UserError
from pipeline.core.settings import Precision, Task, Train
from pipeline.data.rows import (
    Batch,
    Encoded,
    Encoder,
    Example,
    by_length,
    collate,
    epoch_order,
    load_rationales,
    load_rows,
    pad,
    step_batches,
    step_rows,
    steps_in_epoch,
)
from pipeline.models.base import load_model, load_tokenizer
from pipeline.objectives.labels import Labels

CPU = torch.device("cpu")
TASK = Task("vader_movies", "choice", transfer=("news", "tweets"))


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny / "models" / "smollm2_135m")


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny / "models" / "smollm2_135m", Precision("fp32"), CPU)


def rows(
    tiny, train_rows: int | None, seed: int = 0, share: float = 0.2, test_rows: int | None = None, transfer_rows: int | None = None
) -> Any:
    return load_rows(tiny / "data" / "vader_movies", TASK, train_rows, seed, share, test_rows, transfer_rows)


def ids(found: list[dict]) -> list[str]:
    return [r["id"] for r in found]


def test_smaller_training_sets_are_nested_in_larger_ones_of_the_same_seed(tiny):
    sets = [ids(rows(tiny, n).train) for n in (8, 16, 64)]
    assert sets[0] == sets[1][:8] and sets[1] == sets[2][:16] and len(set(sets[2])) == 64
    assert ids(rows(tiny, None).train) == sets[2]
    assert ids(rows(tiny, 8, seed=1).train) != sets[0]


def test_rows_are_drawn_without_looking_at_their_labels(tiny):
    """Not stratified: over many seeds the labels of the first rows vary as those of a simple random draw do (here 8 of 32 + 32 rows)."""
    counts = [sum(r["answer"] == "positive" for r in rows(tiny, 8, seed).train) for seed in range(200)]
    mean, variance = sum(counts) / 200, sum((c - 4) ** 2 for c in counts) / 200
    assert abs(mean - 4) < 0.35 and 1.2 < variance < 2.4, "hypergeometric: mean 4, variance 1.78; a stratified draw has 0"


def test_validation_is_at_most_its_share_of_the_training_rows_nested_and_test_a_fixed_start(tiny):
    assert [len(rows(tiny, n).validation) for n in (2, 8, 40, 64)] == [1, 1, 8, 12]
    assert all(len(rows(tiny, n).validation) <= 0.2 * n for n in range(5, 65))
    assert ids(rows(tiny, 10, seed=3).validation) == ids(rows(tiny, 40).validation)[:2]
    whole = ids(rows(tiny, 8).test)
    assert len(whole) == 48 and ids(rows(tiny, 64, seed=1, test_rows=5).test) == whole[:5]


def test_transfer_sets_are_those_of_the_task(tiny):
    assert {k: len(v) for k, v in rows(tiny, 8).transfer.items()} == {"news": 16, "tweets": 16}
    assert {k: len(v) for k, v in rows(tiny, 8, transfer_rows=3).transfer.items()} == {"news": 3, "tweets": 3}
    assert rows(tiny, 8, transfer_rows=0).transfer == {}


def test_no_row_is_in_two_splits(tiny):
    actual = rows(tiny, None)
    every = ids(actual.train) + ids(actual.validation) + ids(actual.test)
    assert len(set(every)) == len(every)


def test_a_task_that_is_not_prepared_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing is not prepared; run: python -m pipeline\.prepare task=vader_movies"):
        load_rows(tmp_path / "nothing", TASK, 8, 0, 0.2, None, None)


def test_more_rows_than_there_are(tiny):
    with pytest.raises(UserError, match=r"train_rows=65, but .*train\.jsonl has 64 rows; ask for at most that"):
        rows(tiny, 65)


def test_a_missing_transfer_set_is_named(tmp_path):
    write_task(tmp_path / "t")
    with pytest.raises(UserError, match=r"transfer/gone\.jsonl does not exist"):
        load_rows(tmp_path / "t", Task("t", "choice", transfer=("gone",)), 8, 0, 0.2, None, None)


def test_rationales_by_row(tiny, tmp_path):
    actual = load_rationales(tiny / "rationales" / "vader_movies" / "lexicon")
    assert len(actual) == 64 + 32 + 48 and all(k == v["id"] for k, v in actual.items())
    with pytest.raises(UserError, match=r"rationales\.jsonl does not exist; run: python -m pipeline\.rationales task=movies teacher=llm"):
        load_rationales(tmp_path / "movies" / "llm")


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (8, 4), (3, 4), (5, 1)])
def test_every_epoch_sees_every_row_once_in_an_order_of_its_own(count, batch):
    steps = steps_in_epoch(count, batch)
    epochs = [[r for step in range(e * steps, (e + 1) * steps) for r in step_rows(count, batch, 0, step)] for e in range(3)]
    assert all(sorted(e) == list(range(count)) for e in epochs)
    assert epochs == [list(epoch_order(count, 0, e)) for e in range(3)], "a function of seed and epoch alone"
    assert all(len(step_rows(count, batch, 0, s)) == batch for s in range(steps - 1))


def test_the_order_depends_on_seed_and_epoch():
    orders = {epoch_order(32, seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def encoder(tokenizer: Any, max_length: int = 64, too_long: str = "error", **changes: Any) -> Encoder:
    return Encoder(tokenizer, Task(**{"name": "t", "scoring": "choice", **changes}), max_length, too_long)


def text(tokenizer: Any, tokens: Any) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(tokens)))


def test_the_answer_alone_is_labelled(tokenizer):
    actual = encoder(tokenizer).example(Example("the film", "positive film", "label", 0.5))
    assert text(tokenizer, actual.ids) == "the film positive film" and actual.start == 2 and actual.weight == 0.5
    ended = encoder(tokenizer).example(Example("the film", "positive", ends=True))
    assert ended.ids[-1] == tokenizer.eos_token_id and len(ended.ids) == 4


def test_the_separator_stands_before_the_answer(tokenizer):
    assert text(tokenizer, encoder(tokenizer, separator=" : ").answer("positive")) == ": positive"
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{{ messages[0].content }}"
    assert text(tokenizer, encoder(chatting, separator=" : ", format="chat").answer("positive")) == "positive"
    with pytest.raises(UserError, match="task.format is chat, but the model's tokenizer has no chat template"):
        encoder(tokenizer, format="chat")


def test_a_chat_prompt_goes_through_the_models_template(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "[ {% for m in messages %}{{ m['content'] }}{% endfor %} ]{% if add_generation_prompt %} label{% endif %}"
    assert text(tokenizer, encoder(chat, format="chat").prompt("the film")) == "[ the film ] label"


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt(tokenizer):
    class Closing:
        eos_token_id = pad_token_id = tokenizer.eos_token_id

        def __call__(self, text: str, **_: Any) -> dict:
            return {"input_ids": [*tokenizer(text)["input_ids"], self.eos_token_id]}

    assert encoder(Closing()).prompt("the film") == tokenizer("the film")["input_ids"]


def test_an_empty_prompt_is_one_token(tokenizer):
    assert encoder(tokenizer).prompt("") == [tokenizer.pad_token_id]


def test_long_texts_are_counted_and_refused(tokenizer):
    strict = encoder(tokenizer, max_length=5)
    for words in (3, 4, 5, 9):
        strict.example(Example(" ".join(["film"] * words), "positive"))
    with pytest.raises(
        UserError,
        match=r"2 texts of the training rows are longer than 5 tokens .*; raise train\.max_length .* or set train\.too_long=truncate",
    ):
        strict.check("the training rows")


def test_long_texts_lose_their_start_and_are_counted(tokenizer):
    lenient = encoder(tokenizer, max_length=5, too_long="truncate")
    actual = lenient.example(Example("the cast of the plot and story", "positive"))
    assert text(tokenizer, actual.ids) == "the plot and story positive" and actual.start == 4
    assert lenient.check("the test rows") == "1 texts of the test rows longer than 5 tokens lost their start"
    assert lenient.check("the test rows") is None, "the count starts anew"


def test_an_answer_as_long_as_the_limit_leaves_the_last_token_of_the_prompt(tokenizer):
    actual = encoder(tokenizer, max_length=3, too_long="truncate").example(Example("the film", "plot cast story"))
    assert text(tokenizer, actual.ids) == "film plot cast story"


@pytest.mark.parametrize("most", [1, 20, 64, 10_000])
def test_batches_hold_every_index_once_and_keep_to_the_tokens(most):
    rng = random.Random(0)
    lengths = [rng.randint(1, 30) for _ in range(50)]
    parts = list(by_length(lengths, most))
    assert sorted(i for p in parts for i in p) == list(range(50))
    assert all(len(p) == 1 or len(p) * max(lengths[i] for i in p) <= most for p in parts)
    flat = [lengths[i] for p in parts for i in p]
    assert flat == sorted(flat, reverse=True)


def test_padding_on_either_side():
    assert pad([[1, 2, 3], [4]], 0).tolist() == [[1, 2, 3], [4, 0, 0]]
    assert pad([[1, 2, 3], [4]], 0, left=True).tolist() == [[1, 2, 3], [0, 0, 4]]


def test_targets_are_shifted_by_one():
    batch = collate([Encoded((10, 11, 12, 13), 2), Encoded((20, 21), 1)], {"label": 3}, 0)
    assert batch.input_ids.tolist() == [[10, 11, 12], [20, 0, 0]], "the last token predicts nothing"
    read = [(int(batch.input_ids[r, c]), t) for r, c, t in zip(batch.rows, batch.cols, batch.targets.tolist(), strict=True)]
    assert read == [(11, 12), (12, 13), (20, 21)]
    assert batch.tokens == 4 and batch.weights.tolist() == pytest.approx([1 / 3] * 3)


def examples() -> list[Encoded]:
    rng = random.Random(2)
    actual = []
    for i in range(9):
        tokens = tuple(rng.randrange(2, 30) for _ in range(rng.randint(3, 14)))
        actual.append(Encoded(tokens, rng.randint(1, len(tokens) - 1), *(("rationale", 0.25) if i % 3 == 0 else ("label", 1.0))))
    return actual


def settings(micro_batch_tokens: int) -> Train:
    return Train(lr=0.1, epochs=1, batch_size=9, micro_batch_tokens=micro_batch_tokens)


def step(model: Any, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    """Loss and one gradient of a step."""
    model.zero_grad()
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    losses = [Labels().loss(model, b) for b in batches]
    for loss in losses:
        loss.backward()
    return sum(float(loss.detach()) for loss in losses), weight.grad.clone()


def nll(model: Any, example: Encoded) -> list[float]:
    with torch.no_grad():
        chances = torch.log_softmax(model(input_ids=torch.tensor([example.ids])).logits[0].double(), -1)
    return [-float(chances[i - 1, example.ids[i]]) for i in range(example.start, len(example.ids))]


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 10_000])
def test_the_loss_of_a_step_is_the_weighted_mean_however_it_is_split(model, micro_batch_tokens):
    batches = list(step_batches(examples(), settings(micro_batch_tokens), 1))
    assert len(batches) == {1: 9, 30: 4, 10_000: 1}[micro_batch_tokens]
    loss, gradient = step(model, batches)
    by_group: dict[str, list[float]] = {}
    for example in examples():
        by_group.setdefault(example.group, []).extend(nll(model, example))
    expected = sum({"label": 1.0, "rationale": 0.25}[g] * sum(v) / len(v) for g, v in by_group.items())
    assert loss == pytest.approx(expected, abs=1e-5)
    _, whole = step(model, list(step_batches(examples(), settings(10_000), 1)))
    torch.testing.assert_close(gradient, whole, atol=1e-6, rtol=1e-4)


def test_padding_takes_no_part_in_the_loss(model):
    actual = []
    for pad_id in (1, 7):
        actual.append(step(model, list(step_batches(examples(), settings(10_000), pad_id)))[0])
    assert actual[0] == pytest.approx(actual[1], abs=1e-6)


def test_a_draw_says_which_labels_it_lacks_and_that_one_validation_row_tells_nothing(tiny):
    from pipeline.cell.inputs import draw_notes

    whole = rows(tiny, 16)
    assert draw_notes(whole, True) == []
    one = next(draw for draw in (rows(tiny, 2, n) for n in range(100)) if len({r["answer"] for r in draw.train}) == 1)
    missing = "negative" if one.train[0]["answer"] == "positive" else "positive"
    assert draw_notes(one, True) == [
        f"no training row has 1 label ({missing}): draw more rows (train_rows)", "validated on 1 row, which tells nothing: choose more training rows"]
    assert draw_notes(one, False) == [], "what takes no rows lacks none"
    own = [{**row, "choices": [row["answer"], f"not {i}"]} for i, row in enumerate(whole.train)]
    assert draw_notes(dataclasses.replace(whole, train=own), True) == [], "choices of a row's own"


def test_texts_that_are_read_together_have_the_tokens_that_they_have_one_by_one(tokenizer):
    task = Task("t", "choice", separator=" ")
    encoder = Encoder(tokenizer, task, 64, "error")
    prompts, answers = ["Review: the lovely film\nSentiment:", "Review: poor\nSentiment:", ""], ["positive", "negative", "positive"]
    alone = [encoder.example(Example(p, a, ends=True)) for p, a in zip(prompts, answers, strict=True)]
    calls = []
    encoder.tokenizer = Counted(tokenizer, calls)
    with encoder.reading(prompts, answers):
        assert [encoder.example(Example(p, a, ends=True)) for p, a in zip(prompts, answers, strict=True)] == alone
    assert len(calls) == 2, "one for prompts, one for what follows them"
    assert encoder.example(Example(prompts[0], "positive", ends=True)) == alone[0] and len(calls) == 4, "afterwards they are read again"


class Counted:
    """A tokenizer that notes its calls."""

    def __init__(self, tokenizer, calls):
        self.tokenizer, self.calls = tokenizer, calls

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **keywords):
        self.calls.append(args)
        return self.tokenizer(*args, **keywords)
