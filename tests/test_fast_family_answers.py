"""Scores and texts by the hand-written forward pass of every family, against transformers' own; and packs of runs over one of them."""

from __future__ import annotations

import pytest
import torch
from family_models import FAMILIES, WINDOW, family
from scoring_models import CPU, PAD, items_of, with_lora
from test_fast_decode import by_generate
from test_fast_llama import lora
from test_fast_scoring import naive, same, scores

from pipeline.engine import answering, bind, decode
from pipeline.engine.score import choice_scorer
from pipeline.scoring import scorer as scoring
from pipeline.scoring.scorer import continuations

WIDE = {"sliding_window": 100}
"""A window that rows fit into, so that they may share tokens."""


@pytest.fixture
def by_hand(monkeypatch):
    """Answers by hand on the CPU; fails where transformers' forward pass runs."""
    monkeypatch.setattr(answering, "STATIC", ("cpu",))
    monkeypatch.setattr(answering, "FEW", 0)

    def other(*_, **__):
        raise AssertionError("transformers' own forward pass ran")

    monkeypatch.setattr(scoring, "logits_at", other)


def answerer(name, adapted, **options):
    model = family(name, vocab_size=31, pad_token_id=PAD, **options)
    if not adapted:
        return model
    return lora(model).eval() if name.startswith("phi3") else with_lora(model)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in FAMILIES), ("gemma3", WIDE), ("mistral", WIDE)])
def test_scores_are_transformers(by_hand, name, options, adapted):
    model = answerer(name, adapted, **options)
    items = items_of(7, 40)
    assert max(len(prompt) for prompt, _ in items) > WINDOW
    found = scores(model, items, 300)
    same(found, naive(model, items))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_those_of_generate(by_hand, name, adapted, tokenizer):
    """Left-padded prompts below and above the window."""
    model = answerer(name, adapted)
    prompts = [*(prompt for prompt, _ in items_of(6)), [5, 6], [7, 8, 9]]
    notes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_generate", lambda *_: pytest.fail("generate ran"))
        found = dict(pair for part, out in continuations(model, prompts, 12, 128, 1, PAD, CPU, torch.float32, notes)
                     for pair in zip(part, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True))
    assert [found[i] for i in range(len(prompts))] == by_generate(model, prompts, 12, tokenizer) and not notes
    assert len(set(found.values())) > 4, "texts that are all the same show nothing"


def test_without_the_hand_written_pass_a_window_keeps_generate(tokenizer, monkeypatch):
    monkeypatch.setattr(decode, "greedy", lambda *_: pytest.fail("a static cache has no window"))
    model, prompts = answerer("gemma3", False), [prompt for prompt, _ in items_of(3)]
    assert scoring.generate(model, prompts, 5, 128, tokenizer, PAD, CPU, torch.float32) == by_generate(model, prompts, 5, tokenizer)


@pytest.mark.parametrize("name", ["qwen3", "phi3-partial", "gemma3"])
def test_choices_under_several_adapters_score_as_under_each_alone(name):
    model, items = answerer(name, False), items_of(6)
    bound = bind.bind(lora(model), torch.float32, slots=2, rank=4)
    bound.buffer.master.copy_(0.1 * torch.randn(bound.buffer.master.shape, generator=torch.Generator().manual_seed(7)))
    bound.buffer.scale.fill_(2.0)
    bound.buffer.sync()
    with torch.no_grad():
        found = choice_scorer(bound.llama, [0, 1], 2, 300, PAD).scores(items)
    for slot, mine in enumerate(found):
        alone = lora(answerer(name, False)).eval()
        for key, (a, b) in bound.pairs.items():
            module = alone.base_model.model.get_submodule(key)
            module.lora_A["default"].weight.data.copy_(a[slot])
            module.lora_B["default"].weight.data.copy_(b[slot])
        same(mine, naive(alone, items))
