"""Numbers of a token that do not depend on what is computed with it, here by plain torch in tiles: products, attention, log p as drawn and as trained."""

from __future__ import annotations

import pytest
import torch
from drawn_exact import Drawer, by_text, explained, learn, padded, stepped
from family_models import FAMILIES, family
from test_fast_llama import lora

from benchmarks.speed_workloads import quantise
from pipeline.engine import bind, invariant
from pipeline.engine.families import Heads

HEADS = {"qwen3": {"head_dim": 16}, "gemma3": {"head_dim": 24, "query_pre_attn_scalar": 20}}


@pytest.mark.parametrize("added", ["nothing", "bias", "in place"])
def test_a_products_rows_are_the_same_alone_and_among_others(added):
    torch.manual_seed(0)
    x, w, more = torch.randn(150, 72).bfloat16()[:, :70], torch.randn(40, 70).bfloat16(), torch.randn(150, 40).bfloat16()
    other = {"nothing": None, "bias": more[0], "in place": more}[added]
    expected = x.float() @ w.float().t() + (0.0 if other is None else other.float())
    rows = [invariant.product(x[r : r + 1], w, other[r : r + 1].clone() if added == "in place" else other) for r in (0, 7, 149)]
    whole = invariant.product(x, w, other, other if added == "in place" else None)
    assert torch.allclose(whole.float(), expected, rtol=1e-2, atol=1e-2) and torch.equal(torch.cat(rows), whole[[0, 7, 149]])
    assert added != "in place" or whole.data_ptr() == more.data_ptr()


@pytest.mark.parametrize("heads", [Heads(6, 2, 24), Heads(4, 4, 16, scale=0.3), Heads(9, 3, 16, window=20)])
def test_attention_of_a_token_is_the_same_in_a_row_after_padding_and_over_a_cache(heads):
    torch.manual_seed(0)
    rows, tokens, width = 3, 90, heads.queries + 2 * heads.groups
    qkv = torch.randn(rows * tokens, width * heads.width).bfloat16()
    whole, saved = invariant.Rows(tokens).forward(heads, qkv, True)
    q, k, v = (part.float() for part in heads.split(qkv, tokens))
    at = torch.arange(tokens)
    mask = (at <= at[:, None]) & (at > at[:, None] - (heads.window or tokens))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=heads.scale, enable_gqa=True)
    assert torch.allclose(whole.float(), heads.merge(expected), atol=2e-2)
    scores = q @ k.repeat_interleave(heads.queries // heads.groups, 1).transpose(2, 3) * (heads.scale or heads.width**-0.5)
    assert torch.allclose(saved[2], scores.masked_fill(~mask, -torch.inf).logsumexp(-1), atol=1e-3)
    starts, given = torch.tensor([0, 13, 70]), 75  # prompts of 75, 62 and 5 tokens, padded on the left
    cache = torch.full((rows, 2 * heads.groups, 110, heads.width), 7.0).bfloat16()
    token = qkv.view(rows, tokens, -1)
    prompts = torch.stack([torch.cat((torch.randn(int(s), token.shape[2]).bfloat16(), token[r, : given - s])) for r, s in enumerate(starts)])
    first, _ = invariant.CachedRows(cache, starts, torch.arange(given)).forward(heads, prompts.view(rows * given, -1), False)
    assert first.isfinite().all()
    for r, start in enumerate(starts.tolist()):
        assert torch.equal(first.view(rows, given, -1)[r, start:], whole.view(rows, tokens, -1)[r, : given - start])
    for step in range(4):
        after = torch.stack([token[r, given - s + step] for r, s in enumerate(starts.tolist())])
        one, _ = invariant.CachedRows(cache, starts, torch.tensor([given + step])).forward(heads, after, False)
        assert torch.equal(one, torch.stack([whole.view(rows, tokens, -1)[r, given - s + step] for r, s in enumerate(starts.tolist())]))


def model_of(name: str):
    return family(name, **HEADS.get(name.split("-")[0], {})).bfloat16()


PROMPTS = [[7, 9, 11], [5] * 12, list(range(2, 20)), [3], [8, 4], list(range(2, 12)), [6] * 7]


@pytest.mark.parametrize(("name", "kind"), [
    *((name, "lora") for name in FAMILIES), ("llama", "full"), ("qwen2", "full"), ("llama", "nf4"), ("llama", "thin"), ("qwen2", "dora"), ("gemma3", "dora"),
])
def test_log_p_as_drawn_is_log_p_as_trained(name, kind):
    """Bit for bit, before and after optimiser steps, whichever texts are trained together."""
    model = model_of(name)
    if kind == "nf4":
        quantise(model, torch.bfloat16)
    model = model.float().requires_grad_(True) if kind == "full" else lora(model, r=3 if kind == "thin" else 4, dora=kind == "dora")
    bound = bind.bind(model, torch.bfloat16)
    assert bound.llama.keep_order()
    drawer = Drawer(bound, PROMPTS, 11)
    for seed in range(3):
        texts, drawn = drawer.draw(seed)
        batch = padded(texts, PROMPTS, "cpu")
        trained = by_text(stepped(bound, batch), drawn)
        assert trained == drawn, explained(drawer, texts)
        some = by_text(-bound.llama.nll(*padded(texts[2:4], PROMPTS[2:4], "cpu", more=40)), drawn[2:4])
        assert some == drawn[2:4]
        learn(bound, 1e-2)
    bound.release()


def test_the_gradient_is_that_of_other_kernels_and_one_that_parts_is_named(monkeypatch):
    model = lora(model_of("llama"))
    bound = bind.bind(model, torch.bfloat16)
    batch = padded([p * 3 for p in PROMPTS], PROMPTS, "cpu")
    plain = stepped(bound, batch)
    expected = bound.buffer.raw.float()
    assert bound.llama.keep_order()
    assert torch.allclose(stepped(bound, batch), plain, atol=0.1)
    assert (bound.buffer.raw.float() - expected).norm() < 0.05 * expected.norm()
    drawer = Drawer(bound, PROMPTS, 5)
    texts, _ = drawer.draw(0)
    assert "all parts of the model are equal" in explained(drawer, texts)
    inner = invariant.CachedRows.forward
    monkeypatch.setattr(invariant.CachedRows, "forward", lambda self, heads, qkv, save: (inner(self, heads, qkv, save)[0] * 1.02, ()))
    assert explained(drawer, texts).startswith("layer 0 out: ")


def test_where_it_cannot_be_it_is_left():
    assert not bind.bind(lora(family("llama")), torch.float32).llama.keep_order(), "in 32 bits there is nothing to gain"
    odd = bind.bind(lora(family("qwen3").bfloat16()), torch.bfloat16).llama
    assert not odd.keep_order() and not odd.layers[0].qkv.invariant, "its heads are 12 wide"
