"""Log p of a text as it is drawn and as it is trained on, bit for bit, on a CUDA device: python -m pytest -s -m gpu tests/test_gpu_invariant.py"""

from __future__ import annotations

import time

import pytest
from drawn_exact import Drawer, by_text, explained, learn, padded, stepped
from family_models import family
from test_fast_llama import lora
from test_gpu_families import on_device
from test_gpu_kernels import near, numbers

pytestmark = pytest.mark.gpu
SHAPES = {
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "1b": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
}


def prompts(rows: int, longest: int, vocabulary: int) -> list[list[int]]:
    import torch

    lengths = [1 + (17 * r) % longest for r in range(rows)]
    return [torch.randint(2, vocabulary, (n,), generator=torch.Generator().manual_seed(n + 100 * r)).tolist() for r, n in enumerate(lengths)]


@pytest.mark.parametrize(("m", "k"), [(960, 624), (16384, 2080), (48, 576), (53, 33)])
@pytest.mark.parametrize("adds", [False, True])
def test_a_products_rows_are_the_same_in_any_company(m, k, adds):
    import torch

    from pipeline.engine import invariant, invariant_kernels

    assert invariant_kernels.alike(torch.device("cuda"), torch.bfloat16), "the tiles do not give the same bits: one of them is used for all"
    x, w, added = numbers(1500, k, apart=8), numbers(m, k), numbers(1500, m) if adds else None
    whole = invariant.product(x, w, added)
    near(whole, (x.float() @ w.float().t() + (added.float() if added is not None else 0.0)).bfloat16())
    for rows in (slice(3, 4), slice(0, 64), slice(70, 370)):
        assert torch.equal(invariant.product(x[rows], w, None if added is None else added[rows]), whole[rows])


@pytest.mark.parametrize(("queries", "groups", "e", "window"), [(9, 3, 64, 0), (32, 8, 64, 0), (8, 8, 96, 0), (16, 8, 128, 40), (4, 1, 256, 24)])
def test_attention_and_its_gradient_are_torchs_and_a_token_s_are_the_same_over_a_cache(queries, groups, e, window):
    import torch

    from pipeline.engine import attention, invariant
    from pipeline.engine.families import Heads

    heads, rows, tokens, given = Heads(queries, groups, e, window=window), 5, 136, 100
    qkv, upstream = numbers(rows * tokens, (queries + 2 * groups) * e), numbers(rows * tokens, queries * e)
    ours, theirs = invariant.Rows(tokens), attention.Rows(tokens)
    merged, saved = ours.forward(heads, qkv, True)
    expected, other = theirs.forward(heads, qkv, True)
    near(merged, expected, 8e-3)
    for one, two in zip(ours.backward(heads, saved, upstream), theirs.backward(heads, other, upstream), strict=True):
        near(one, two, 2e-2)
    cache = qkv.new_full((rows, 2 * groups, 150, e), 3.0)
    starts = torch.tensor([0, 1, 30, 64, 99], device="cuda")
    lengths = [given - s for s in starts.tolist()]
    token, whole = qkv.view(rows, tokens, -1), merged.view(rows, tokens, -1)
    left = torch.stack([torch.cat((token[r, tokens - given + n :], token[r, :n])) for r, n in enumerate(lengths)])
    first = invariant.CachedRows(cache, starts, torch.arange(given, device="cuda")).forward(heads, left.view(rows * given, -1), False)[0]
    assert first.isfinite().all()
    for r, n in enumerate(lengths):
        assert torch.equal(first.view(rows, given, -1)[r, given - n :], whole[r, :n]), f"of a prompt of {n} tokens"
    for step in range(36):
        after = torch.stack([token[r, n + step] for r, n in enumerate(lengths)])
        one = invariant.CachedRows(cache, starts, torch.tensor([given + step], device="cuda")).forward(heads, after, False)[0]
        assert torch.equal(one, torch.stack([whole[r, n + step] for r, n in enumerate(lengths)])), f"at step {step}"


def bound_model(name: str, rank: int, kind: str):
    """(bound model in order, vocabulary)."""
    import torch

    from benchmarks.speed_workloads import quantise
    from pipeline.engine import bind

    if name in SHAPES:
        model = family("llama", **SHAPES[name], num_hidden_layers=4 if name == "135m" else 2, initializer_range=0.05)
        model = (model if kind == "full" else model.bfloat16()).cuda()
    else:
        model = on_device(name)
    if kind == "nf4":
        quantise(model, torch.bfloat16)
    bound = bind.bind(model.requires_grad_(True) if kind == "full" else lora(model, r=rank, alpha=2 * rank), torch.bfloat16)
    assert bound.llama.keep_order()
    return bound, model.config.vocab_size


MODELS = [("135m", 16, "lora"), ("1b", 16, "lora"), ("135m", 16, "full"), ("135m", 8, "nf4"), ("qwen2", 3, "lora"), ("qwen3-windows", 16, "lora"),
          ("gemma3", 16, "lora")]


@pytest.mark.parametrize(("name", "rank", "kind"), MODELS)
def test_log_p_as_drawn_is_log_p_as_trained(name, rank, kind):
    """Drawn by captured decoding in batches of 32; trained together, captured and not, with reserved memory, and a few among others; before and after steps."""
    import torch

    from pipeline.engine.graphs import Graphs

    began = time.perf_counter()
    bound, vocabulary = bound_model(name, rank, kind)
    asked = prompts(64, 64, vocabulary)
    drawer, graphs = Drawer(bound, asked, 32), Graphs("cuda")
    bound.llama.reserve(64 * 104)
    for seed in range(3):
        texts, drawn = drawer.draw(seed)
        assert not drawer.notes, drawer.notes
        batch = padded(texts, asked, "cuda")
        out = torch.zeros(len(batch[1]), device="cuda")
        trained = by_text(stepped(bound, batch), drawn)
        apart = [abs(a - b) for one, other in zip(trained, drawn, strict=True) for a, b in zip(one, other, strict=True)]
        print(f"{name} {kind} r{rank}, {seed} steps: {sum(map(bool, apart))} of {len(apart)} log p differ, at most {max(apart):.3g} nats; "
              f"{time.perf_counter() - began:.1f} s", flush=True)
        assert trained == drawn, explained(drawer, texts)
        graphs.capture(lambda batch=batch, out=out: out.copy_(stepped(bound, batch)))()
        assert by_text(out, drawn) == drawn, "captured"
        some = by_text(-bound.llama.nll(*padded(texts[20:25], asked[20:25], "cuda", more=40)), drawn[20:25])
        assert some == drawn[20:25], "forward alone, fewer texts and more padding"
        stepped(bound, batch)
        learn(bound, 1e-3)
    drawer.sampler.close()
    graphs.close()


def test_the_gradient_is_that_of_other_kernels():
    import torch

    from pipeline.engine import bind

    model = lora(family("llama", **SHAPES["135m"], num_hidden_layers=4, initializer_range=0.05).bfloat16().cuda(), r=16, alpha=32)
    bound, asked = bind.bind(model, torch.bfloat16), prompts(32, 64, 49152)
    batch = padded([[*p, *range(5, 25)] for p in asked], asked, "cuda")
    plain = stepped(bound, batch)
    expected = bound.buffer.raw.clone()
    assert bound.llama.keep_order()
    near(stepped(bound, batch), plain, 1e-2)
    near(bound.buffer.raw, expected, 0.1)
