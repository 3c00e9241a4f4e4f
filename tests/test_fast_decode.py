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


def scripted(ends: dict[int, int], seen: list[tuple[int, ...]]):
    """A forward pass over rows of one-token prompts 10, 11, …: a row says its own prompt, and 9 (the end) once it has said ends[row] tokens."""
    said = {}

    def forward(ids: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, **inputs: Any) -> torch.Tensor:
        seen.append(tuple(ids.shape))
        names = ids[:, -1].tolist()
        logits = torch.zeros(len(ids), 31)
        for place, name in enumerate(names):
            said[name] = said.get(name, 0) + 1
            logits[place, 9 if said[name] > ends.get(name - 10, 99) else name] = 1.0
        return logits

    return forward


def cached(base, forward, rows: int, new: int) -> decode.Cached:
    decoder = decode.Cached(forward, base.config, rows, 1, new, 9, PAD, CPU)
    for layer in decoder.cache.layers:
        layer.lazy_initialization(torch.zeros(rows, 1, 1, 2), torch.zeros(rows, 1, 1, 2))
    decoder.fill([[10 + row] for row in range(rows)])
    return decoder


def test_rows_that_have_ended_leave_the_batch_and_every_text_stays_in_its_row(base):
    ends, outs, shapes = {0: 30, 1: 3, 2: 20, 3: 4}, [], []
    for shrinks in (False, True):
        shapes.append([])
        decoder = cached(base, scripted(ends, shapes[-1]), 4, 40)
        outs.append(decoder.run(decoder.prefill, decoder.step, shrinks=shrinks).tolist())
    assert outs[0] == outs[1] == [[10 + row] * ends[row] + [9] + [PAD] * (39 - ends[row]) for row in range(4)]
    assert {rows for rows, _ in shapes[0]} == {4} and {rows for rows, _ in shapes[1]} == {4, 2, 1}


def test_a_row_that_has_ended_in_words_is_not_written_on(base):
    shapes: list[tuple[int, ...]] = []
    decoder = cached(base, scripted({}, shapes), 2, 40)
    out = decoder.run(decoder.prefill, decoder.step, lambda tokens: (tokens == 10).sum(1) >= 5, shrinks=True)
    assert out[0].tolist() == [10] * decode.ASK_EVERY + [PAD] * (40 - decode.ASK_EVERY) and out[1].tolist() == [11] * 40
    assert [rows for rows, _ in shapes] == [2] * decode.ASK_EVERY + [1] * (40 - decode.ASK_EVERY)


def test_what_all_prompts_begin_with_is_fed_once(base, tokenizer, monkeypatch):
    lead = list(range(5, 25))
    prompts = [lead + prompt for prompt, _ in items_of(9)]
    widths: list[int] = []
    monkeypatch.setattr(decode, "fed_once", lambda *args, inner=decode.fed_once: widths.append(len(args[1])) or inner(*args))
    expected = by_generate(base, prompts, 20, tokenizer)
    assert generate(base, prompts, 20, 200, tokenizer, PAD, CPU, torch.float32) == expected and widths[0] >= len(lead)
    assert decode.lead_of([*prompts, [1, 2, 3]], CPU) == [] and decode.lead_of(prompts[:1], CPU) == []


def test_words_that_stop_an_answer_leave_what_stands_before_them(base, tokenizer):
    prompts = [prompt for prompt, _ in items_of(6)]
    whole = generate(base, prompts, 60, 4096, tokenizer, PAD, CPU, torch.float32)
    stop = next(text for text in whole if len(text) > 12)[6:9]
    stopped = generate(base, prompts, 60, 4096, tokenizer, PAD, CPU, torch.float32, stop=stop)
    assert [text.partition(stop)[0] for text in stopped] == [text.partition(stop)[0] for text in whole]
    assert len(stopped[0]) <= len(whole[0]) and sum(map(len, stopped)) < sum(map(len, whole))


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
