"""The fast engine's kernels against plain torch on a CUDA device: python -m pytest -m gpu tests/test_gpu_kernels.py"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu


def numbers(*shape: int, apart: int = 0):
    """Seeded bf16 numbers [.., n], whose rows lie `apart` numbers further apart than they are long."""
    import torch

    generator = torch.Generator("cuda").manual_seed(sum(shape) + apart)
    whole = torch.randn(*shape[:-1], shape[-1] + apart, device="cuda", generator=generator).bfloat16()
    return whole[..., : shape[-1]]


def near(ours, theirs, tolerance: float = 4e-3) -> None:
    assert (ours.float() - theirs.float()).norm() <= tolerance * theirs.float().norm()


@pytest.mark.parametrize(("n", "d", "rank", "ends"), [(8192, 2048, 16, [2048]), (1000, 576, 8, [576]), (5000, 3072, 16, [2048, 2560, 3072]), (70, 64, 3, [64])])
def test_thin_products_are_plain_ones_and_repeat_bit_for_bit(n, d, rank, ends):
    import torch

    from pipeline.engine import misc

    p, x = numbers(n, len(ends) * rank, apart=3), numbers(n, d, apart=8)
    actual = [torch.full((rank, d), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for out in actual:
        assert misc.thin_(out, p, x, ends)
    spans = enumerate(zip([0, *ends], ends, strict=False))
    near(actual[0], torch.cat([p[:, j * rank : (j + 1) * rank].float().t() @ x[:, lo:hi].float() for j, (lo, hi) in spans], 1))
    assert torch.equal(actual[0], actual[1]) and torch.equal(actual[0], actual[2])
    assert not misc.counters(x.device).any(), "the counters are zero again"


@pytest.mark.parametrize(("n", "f", "rank"), [(4096, 1536, 16), (5001, 8192, 7)])
def test_the_activations_backward_makes_the_adapters_gradients(n, f, rank):
    import torch

    from pipeline.engine import ops, swiglu

    dh, gu, xa, dxa = numbers(n, f), numbers(n, 2 * f, apart=64), numbers(n, 2 * rank, apart=100), numbers(n, rank, apart=50)
    assert swiglu.suits(gu, rank)
    outs = []
    for _ in range(2):
        db, da = (torch.full(shape, float("nan"), device="cuda", dtype=torch.bfloat16) for shape in ((2 * f, rank), (rank, f)))
        outs.append((ops.swiglu_backward_thin_(dh.clone(), gu.clone(), xa, dxa, db, da), db, da))
    h, dgu = ops.swiglu_backward_(dh.clone(), gu.clone())
    near(outs[0][0], dgu, 1e-3)
    near(outs[0][1], torch.cat([dgu[:, :f].float().t() @ xa[:, :rank].float(), dgu[:, f:].float().t() @ xa[:, rank:].float()]))
    near(outs[0][2], dxa.float().t() @ h.float())
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True)), "the same bits at every call"


@pytest.mark.parametrize(("rows", "vocabulary"), [(300, 128256), (50, 49152), (7, 53)])
def test_cross_entropy_and_its_gradient(rows, vocabulary):
    import torch

    from pipeline.engine import ops

    logits, targets = numbers(rows, vocabulary) * 4, torch.arange(rows, device="cuda") * (vocabulary // rows)
    weights = torch.linspace(0, 1, rows, device="cuda")
    logits[0] = float("nan")  # its weight is 0
    expected = logits[1:].float().requires_grad_()
    losses = torch.nn.functional.cross_entropy(expected, targets[1:], reduction="none") * weights[1:]
    losses.sum().backward()
    loss = ops.cross_entropy_(logits, targets, weights)
    assert loss[0] == 0 and not logits[0].any()
    assert torch.allclose(loss[1:], losses.detach(), rtol=1e-4, atol=1e-5)
    near(logits[1:], expected.grad)


def test_the_last_columns_are_zeros():
    import torch

    from pipeline.engine import ops

    x, w = numbers(130, 576), numbers(576)
    y, rstd = ops.rmsnorm(x, w, 1e-5, 24)
    dx = ops.rmsnorm_backward(x, y[:, :576], w, rstd, None, None, 64)
    turned = ops.unrotate(*(numbers(2, heads, 65, 64) for heads in (9, 3, 3)), numbers(65, 64), numbers(65, 64), 8)
    for made, room in ((y, 24), (dx, 64), (turned, 8), (ops.swiglu(numbers(130, 3072), 16), 16)):
        assert not made[:, -room:].any() and torch.isfinite(made).all() and made[:, -room - 1].any()


@pytest.mark.parametrize("n", [7, 20, 3000])
@pytest.mark.parametrize("d", [48, 576, 2048, 4096, 8192])
def test_norms_for_answers_are_torchs_bit_for_bit(n, d):
    import torch

    from pipeline.engine import norm, ops

    x, w = numbers(n, d, apart=32), numbers(d)
    y, rstd = ops.rmsnorm(x, w, 1e-5, 8, exact=True)
    expected = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(rstd, expected[:, 0]) and torch.equal(y[:, :d], w * (x.float() * expected).bfloat16()) and not y[:, d:].any()
    near(ops.rmsnorm(x, w, 1e-5)[0], y[:, :d])
    if n >= 16 and 128 < d < 8192:
        assert norm._ORDERS[d, x.device], "this torch sums in another order: answers are right, but slower"


def random_model(width):
    """A small Llama in bf16 on the device, of weights large enough that its words differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=width, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=width // 64,
                         num_key_value_heads=3 if width == 576 else 8, initializer_range=0.1, max_position_embeddings=256, bos_token_id=1, eos_token_id=2)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)


def answers_bit_for_bit(model):
    """Whether 200 rows' logits by hand are those of the model's own forward pass."""
    import torch

    from pipeline.engine.answering import Forward
    from pipeline.engine.bind import answering

    ids = torch.randint(4096, (200, 48), device="cuda")
    rows, cols = torch.arange(200, device="cuda"), torch.arange(200, device="cuda") % 48
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits[rows, cols].float()
    bound = answering(model, torch.bfloat16)
    try:
        with torch.inference_mode():
            return torch.equal(Forward(bound.llama)(ids, rows, cols), expected)
    finally:
        bound.release()


@pytest.mark.parametrize("width", [576, 2048])
def test_answers_are_transformers_bit_for_bit(width):
    """In bf16, rows of one width: norms, rotation, activation and residuals round where the model's own forward pass rounds."""
    assert answers_bit_for_bit(random_model(width))


@pytest.mark.parametrize("width", [576, 2048])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_generated_texts_are_transformers_token_for_token(width, precision):
    """Left-padded batches as generate has them, recorded steps, key-value heads that no kernel is given copies of."""
    import torch

    from pipeline.data.rows import by_length
    from pipeline.scoring.scorer import _generate, continuations

    dtype, device = torch.bfloat16 if precision == "bf16" else torch.float32, torch.device("cuda")
    model = random_model(width).to(dtype)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 4096, (n,), generator=generator).tolist() for n in torch.randint(3, 70, (500,), generator=generator).tolist()]
    parts = list(by_length([len(p) + 24 for p in prompts], 8192))
    notes: list[str] = []
    with torch.inference_mode():
        expected = dict(pair for part, out in _generate(model, prompts, parts, 24, 2, 0, device) for pair in zip(part, out.tolist(), strict=True))
        actual = continuations(model, prompts, 24, 8192, 2, 0, device, dtype, notes)
        ours = dict(pair for part, out in actual for pair in zip(part, out.tolist(), strict=True))
    same = sum(ours[i][: len(text)] == text for i, text in expected.items())
    assert len(ours) == 500 and same == 500 and not notes, (same, notes)
    assert len({tuple(text) for text in expected.values()}) > 400
