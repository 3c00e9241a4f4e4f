"""Greedy decoding over a static cache against the model's own generate, and when it leaves the work to that."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from scoring_models import CPU, KINDS, OWNERS, PAD, items_of, of_kind, with_loras, with_prompt

from pipeline.engine import answering, attention, decode
from pipeline.scoring.scorer import generate


@pytest.fixture(scope="module", params=KINDS)
def model(request, base):
    return of_kind(request.param, base)


def by_generate(model: Any, prompts: list[list[int]], new: int, tokenizer: Any) -> list[str]:
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=PAD,
                             eos_token_id=tokenizer.eos_token_id)
        found.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("shapes", ["exact", "static", "written"])
@pytest.mark.parametrize("new", [1, pytest.param(2, marks=pytest.mark.slow), 20])
def test_texts_are_those_of_generate(monkeypatch, model, tokenizer, shapes, new):
    if shapes != "exact":
        monkeypatch.setattr(answering, "STATIC", ("cpu",))
        monkeypatch.setattr(answering, "FEW", 0 if shapes == "written" else 10**9)
    prompts = [prompt for prompt, _ in items_of(9)]
    expected = by_generate(model, prompts, new, tokenizer)
    assert generate(model, prompts, new, 128, tokenizer, PAD, CPU, torch.float32) == expected


def test_prompts_by_adapters_of_their_own_are_continued_as_by_each_alone(base, tokenizer):
    model, prompts = with_loras(base), [prompt for prompt, _ in items_of(9)]
    found = generate(model, prompts, 12, 128, tokenizer, PAD, CPU, torch.float32, owners=OWNERS)
    for name in set(OWNERS) - {"__base__"}:
        model.set_adapter(name)
        mine = [i for i, owner in enumerate(OWNERS) if owner == name]
        assert [found[i] for i in mine] == by_generate(model, [prompts[i] for i in mine], 12, tokenizer)
    mine = [i for i, owner in enumerate(OWNERS) if owner == "__base__"]
    plain = by_generate(base, prompts, 12, tokenizer)
    assert [found[i] for i in mine] == [plain[i] for i in mine] and found != plain


def test_ended_rows_get_padding_and_the_batch_stops_soon_after(base):
    forwards = []

    def counting(ids: torch.Tensor, *_: Any, **inputs: Any) -> torch.Tensor:
        forwards.append(ids.shape)
        logits = torch.zeros(len(ids), 31)
        logits[:, 5] = 1.0
        logits[0 if len(forwards) == 3 else slice(0, 0), 9] = 2.0  # the first row ends at its third token
        logits[1 if len(forwards) == 6 else slice(0, 0), 9] = 2.0
        return logits

    decoder = decode.Cached(counting, base.config, 2, 4, 40, 9, PAD, CPU)
    decoder.fill([[2, 3], [4, 5, 6, 7]])
    out = decoder.run(decoder.prefill, decoder.step)
    assert out[0].tolist() == [5, 5, 9, *[PAD] * 37] and out[1, :7].tolist() == [5, 5, 5, 5, 5, 9, PAD]
    assert len(forwards) == decode.ASK_EVERY and tuple(forwards[0]) == (2, 4) and set(map(tuple, forwards[1:])) == {(2, 1)}


def test_a_generation_config_that_matters_and_a_soft_prompt_keep_generate(base, tokenizer):
    model = copy.deepcopy(base)
    assert decode.unsuited(model) is None
    model.generation_config.repetition_penalty = 1.5
    assert "repetition_penalty" in str(decode.unsuited(model))
    prompts = [prompt for prompt, _ in items_of(4)]
    texts = generate(model, prompts, 12, 4096, tokenizer, PAD, CPU, torch.float32)
    assert texts == by_generate(model, prompts, 12, tokenizer) != by_generate(base, prompts, 12, tokenizer)
    assert "soft prompt" in str(decode.unsuited(with_prompt(base)))


def test_query_heads_of_a_group_attend_as_they_do_over_copies(monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
    mask = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., :2], mask[2, ..., 4] = False, False
    copies = (part.repeat_interleave(3, 1) for part in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], *copies, mask)[:, :, 0]
    bias = decode.additive(mask, torch.float32)
    for shared in (True, False):
        monkeypatch.setattr(attention, "has_grouped_kernel", lambda *_, shared=shared: shared)
        torch.testing.assert_close(attention.single_query_attention(q, k, v, bias), expected)


def test_a_capture_that_fails_midway_costs_no_token(monkeypatch, base, tokenizer):
    """Work that was recorded has been done once; where recording failed, the batch begins anew."""
    monkeypatch.setattr(answering, "STATIC", ("cpu",))
    prompts, notes = [prompt for prompt, _ in items_of(9)], []

    def failing(graphs: Any, work: Any, notes: list[str], what: str) -> None:
        work()
        notes.append(what)

    monkeypatch.setattr(decode, "capture", failing)
    assert generate(base, prompts, 20, 128, tokenizer, PAD, CPU, torch.float32, notes) == by_generate(base, prompts, 20, tokenizer)
    assert notes


def test_the_first_run_of_recorded_work_is_the_one_that_warms_up(monkeypatch):
    done: list[str] = []

    class Recorder:
        captures = True

    def recording(graphs: Any, work: Any, notes: list[str], what: str) -> Any:
        work()
        return lambda: done.append("again")

    monkeypatch.setattr(decode, "capture", recording)
    step = decode.Replayed(lambda: done.append("work"), Recorder(), contextlib.nullcontext, [])
    step(), step(), step()
    assert done == ["work", "again", "again"]
