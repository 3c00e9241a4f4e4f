"""The hand-written Llama against transformers and PEFT with autograd: losses and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch

from pipeline.engine import bind, layout, ops
from pipeline.engine import parts as engine_parts

R, T, V = 4, 9, 53


def base(tied: bool = True, groups: int = 2, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=groups,
        max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=1, **options,
    )).eval().requires_grad_(False)


def batch(seed: int = 0, rows: int = R, virtual: int = 0):
    """(ids [R, T], rows, cols, targets, weights, flat positions)."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (rows, T), generator=g)
    place = torch.randperm(rows * T, generator=g)[: 3 * rows].sort().values
    at_rows, at_cols = place // T, place % T
    targets, weights = torch.randint(V, (len(place),), generator=g), torch.rand(len(place), generator=g)
    return ids, at_rows, at_cols, targets, weights, at_rows * (T + virtual) + virtual + at_cols


def reference(model, ids, rows, cols, targets, weights):
    """(weighted losses, {name: gradient}) by autograd."""
    import torch.nn.functional as F

    from pipeline.scoring.scorer import logits_at

    losses = F.cross_entropy(logits_at(model, ids, rows, cols), targets, reduction="none") * weights
    losses.sum().backward()
    return losses.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def lora(model, r: int = 4, alpha: int = 8, targets="all-linear", seed: int = 1, dora: bool = False):
    """`model` with LoRA or DoRA, as it may be in the middle of a training."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, target_modules=targets, use_dora=dora))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.randn_like(parameter))
    return wrapped


def close(ours, theirs, tolerance: float = 2e-5) -> None:
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=tolerance * theirs.abs().max().item() + 1e-8), (ours - theirs).abs().max() / theirs.abs().max()


def gradient(bound, name, parameter):
    """What a step has written for a trained parameter."""
    start, times = parameter.data.storage_offset(), bound.buffer.scale if "lora_B" in name else 1
    return times * bound.buffer.raw[0, start : start + parameter.numel()].view(parameter.shape)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"], r".*layers\.[12]\..*(up|o)_proj"])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_gradients_are_autograds(targets, dora):
    ids, rows, cols, targets_, weights, at = batch()
    model = lora(base(), targets=targets, dora=dora)
    expected, gradients = reference(copy.deepcopy(model), ids, rows, cols, targets_, weights)
    bound = bind.bind(model, torch.float32)
    close(bound.llama.step(ids, at, targets_, weights), expected)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys() and len(trained) == (3 if dora else 2) * len(bound.pairs)
    for name, parameter in trained.items():
        assert parameter.data.untyped_storage().data_ptr() == bound.buffer.master.untyped_storage().data_ptr()
        close(gradient(bound, name, parameter), gradients[name])
    lowest = min(int(n.split(".")[2]) for n in bound.pairs)
    assert bound.llama.lowest == lowest


@pytest.mark.parametrize(("reserved", "dora"), [(True, False), (False, False), (True, True)])
def test_columns_left_beside_an_adapter_add_nothing(monkeypatch, reserved, dora):
    """Room of whole tiles (wide models) for a rank far below it; fresh memory holds NaN, so that a column that nobody clears is seen."""
    monkeypatch.setattr(layout, "LONG", 1)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **options: empty(self, *size, **options).fill_(float("nan")))
    ids, rows, cols, targets, weights, at = batch()
    model = lora(base(), r=3, dora=dora)
    expected, gradients = reference(copy.deepcopy(model), ids, rows, cols, targets, weights)
    bound = bind.bind(model, torch.float32)
    layer = bound.llama.layers[0]
    assert [g.room for g in (layer.qkv, layer.out, layer.gate_up, layer.down)] == [64, 0, 64, 64] and layer.out.under == 64
    if reserved:
        bound.llama.reserve(R * T)
    other = batch(7)
    bound.llama.step(other[0], other[5], other[3], other[4])  # leaves its numbers in reserved memory
    close(bound.llama.step(ids, at, targets, weights), expected)
    for name, expected in gradients.items():
        close(gradient(bound, name, model.get_parameter(name)), expected)


@pytest.mark.parametrize(("tied", "groups"), [(True, 2), (False, 4)])
def test_full_gradients_are_autograds(tied, groups):
    ids, rows, cols, targets, weights, at = batch(1)
    model = base(tied, groups).requires_grad_(True)
    expected, gradients = reference(copy.deepcopy(model), ids, rows, cols, targets, weights)
    bound = bind.bind(model, torch.float32)
    close(bound.llama.step(ids, at, targets, weights), expected)
    for name, parameter in model.named_parameters():
        start, size = parameter.data.storage_offset(), parameter.numel()
        close(bound.buffer.raw[0, start : start + size].view(parameter.shape), gradients[name])


def test_prompt_gradients_are_autograds():
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(2)
    model = get_peft_model(base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    ids, rows, cols, targets, weights, at = batch(2, virtual=5)
    expected, gradients = reference(copy.deepcopy(model), ids, rows, cols, targets, weights)
    bound = bind.bind(model, torch.float32)
    close(bound.llama.step(ids, at, targets, weights), expected)
    (gradient,) = gradients.values()
    close(bound.buffer.raw.view(gradient.shape), gradient)


@pytest.mark.parametrize("options", [{"model_type": "qwen2"}, {"rope": "llama3"}])
def test_relatives_of_llama(options):
    if options.get("model_type") == "qwen2":
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                             num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2)).eval().requires_grad_(False)
        torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    else:
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8}
        model = base(rope_parameters=rope)
    model = lora(model)
    ids, rows, cols, targets, weights, at = batch(3)
    expected, _ = reference(copy.deepcopy(model), ids, rows, cols, targets, weights)
    close(bind.bind(model, torch.float32).llama.step(ids, at, targets, weights), expected)


def packed(plain, ranks):
    """(a model with an adapter of each rank, the pack of them bound over one base)."""
    solo = [lora(copy.deepcopy(plain), r=r, alpha=2 * r, seed=k) for k, r in enumerate(ranks)]
    bound = bind.bind(lora(copy.deepcopy(plain)), torch.float32, slots=len(ranks), rank=max(ranks))
    for k, model in enumerate(solo):
        for name, (a, b) in bound.pairs.items():
            module = model.base_model.model.get_submodule(name)
            a[k, : ranks[k]].copy_(module.lora_A["default"].weight.data)
            b[k, :, : ranks[k]].copy_(module.lora_B["default"].weight.data)
    bound.buffer.scale.fill_(2.0)
    bound.buffer.sync()
    return solo, bound


def together(parts):
    """(ids, at, targets, weights) of a step of a pack, a batch a slot."""
    ids, targets, weights = (torch.cat([p[i] for p in parts]) for i in (0, 3, 4))
    return ids, torch.cat([p[5] + k * R * T for k, p in enumerate(parts)]), targets, weights


def test_slots_are_runs_of_their_own():
    """Three adapters of ranks 2, 4 and 4 at once: each loss and gradient as if it were alone; a NaN stays where it is, bit for bit."""
    ranks, plain = (2, 4, 4), base()
    solo, bound = packed(plain, ranks)
    parts = [batch(k) for k in range(3)]
    ids, at, targets, weights = together(parts)
    loss = bound.llama.step(ids, at, targets, weights).view(3, -1)
    raw = bound.buffer.raw.clone()
    for k, model in enumerate(solo):
        expected, gradients = reference(model, *parts[k][:5])
        close(loss[k], expected)
        for name, (a, b) in bound.pairs.items():
            start = a.storage_offset() + k * a.stride(0)
            assert a.stride(0) == bound.buffer.size
            grad = raw.view(-1)[start : start + a[0].numel()].view(a.shape[1:])
            close(grad[: ranks[k]], gradients[f"base_model.model.{name}.lora_A.default.weight"])
            assert not grad[ranks[k] :].any(), "the padding of a smaller rank stays zero"
            start = b.storage_offset() + k * b.stride(0)
            grad = 2.0 * raw.view(-1)[start : start + b[0].numel()].view(b.shape[1:])
            close(grad[:, : ranks[k]], gradients[f"base_model.model.{name}.lora_B.default.weight"])
            assert not grad[:, ranks[k] :].any()
    bound.buffer.compute[1].fill_(float("nan"))
    again = bound.llama.step(ids, at, targets, weights).view(3, -1)
    assert again[1].isnan().all() and torch.equal(again[[0, 2]], loss[[0, 2]]) and torch.equal(bound.buffer.raw[[0, 2]], raw[[0, 2]])


def noise(p, seed, tokens=T, step=0.0, first=0):
    return ops.Noise(torch.tensor(p), torch.tensor(seed), torch.full((len(p),), step), torch.tensor(first), tokens)


def test_dropout_is_a_function_of_the_run_and_the_place_alone():
    x = torch.ones(2 * R * T, 40)
    both = ops.drop(x, noise([0.25, 0.5], [3, 4]), 7).view(2, R, T, 40)
    assert torch.equal(both, ops.drop(x, noise([0.25, 0.5], [3, 4]), 7).view(2, R, T, 40))
    for k, p, seed in ((0, 0.25, 3), (1, 0.5, 4)):
        alone = ops.drop(torch.ones(R * (T + 2), 40), noise([p], [seed], T + 2), 7).view(R, T + 2, 40)
        assert torch.equal(alone[:, :T], both[k]), "neighbours and padding change nothing"
        later = ops.drop(torch.ones(2 * T, 40), noise([p], [seed], first=2), 7).view(2, T, 40)
        assert torch.equal(later, both[k, 2:]), "nor does the way a step is split"
        others = [ops.drop(torch.ones(R * T, 40), n, m).view(R, T, 40) for n, m in
                  ((noise([p], [seed], step=1.0), 7), (noise([p], [seed + 1]), 7), (noise([p], [seed]), 8))]
        for other in others:
            agree = ((other == 0) == (both[k] == 0)).float().mean().item()
            assert agree == pytest.approx(p * p + (1 - p) ** 2, abs=0.05), "another step, seed or member is independent of it"
    big = ops.drop(torch.ones(2000, 500), noise([0.3], [1], 50), 0)
    assert (big == 0).float().mean().item() == pytest.approx(0.3, abs=0.002) and big.mean().item() == pytest.approx(1.0, abs=0.004)
    assert (big == 0).float().mean(0).std() < 0.014 and (big == 0).float().mean(1).std() < 0.025, "no column and no row is favoured"
    assert torch.equal(ops.drop(x, noise([0.0, 0.0], [3, 4]), 7), x)


@pytest.mark.parametrize("slots", [1, 2])
def test_gradients_with_dropout_are_autograds_over_the_same_noise(slots):
    """The adapters' dropout modules are replaced by ones that draw what the hand-written step draws."""
    ids, rows, cols, targets, weights, at = batch(4)
    p = 0.3
    model = lora(base(), targets="all-linear")
    bound = bind.bind(copy.deepcopy(model) if slots == 2 else model, torch.float32, slots=slots, rank=4 if slots == 2 else None, dropout=True, seed=5)
    bound.buffer.dropout.fill_(p)
    if slots == 2:
        for k, seed in enumerate((5, 9)):
            bound.buffer.seed[k] = seed
            for name, (a, b) in bound.pairs.items():
                module = model.base_model.model.get_submodule(name)
                a[k].copy_(module.lora_A["default"].weight.data)
                b[k].copy_(module.lora_B["default"].weight.data)
        bound.buffer.scale.fill_(2.0)
        bound.buffer.sync()
    peer = copy.deepcopy(model)

    class Same(torch.nn.Module):
        def __init__(self, member):
            super().__init__()
            self.member = member

        def forward(self, x):
            mask = ops.drop(torch.ones(R * T, x.shape[-1]), noise([p], [5]), self.member)
            return x * mask.view(x.shape)

    for member, name in enumerate(bound.pairs):
        peer.base_model.model.get_submodule(name).lora_dropout["default"] = Same(member)
    expected, gradients = reference(peer, ids, rows, cols, targets, weights)
    many = [v.repeat(slots) if v.dim() == 1 else v.repeat(slots, 1) for v in (ids, targets, weights)]
    places = torch.cat([at + k * R * T for k in range(slots)])
    close(bound.llama.step(many[0], places, many[1], many[2])[: len(at)], expected)
    for name, (a, b) in bound.pairs.items():
        for view, key, factor in ((a, "lora_A", 1.0), (b, "lora_B", 2.0)):
            start, size = view.storage_offset(), view[0].numel()
            close(factor * bound.buffer.raw[0, start : start + size].view(view.shape[1:]), gradients[f"base_model.model.{name}.{key}.default.weight"])


def test_cross_entropy_is_torchs_in_every_stretch_of_rows():
    rows = 2 * ops.ROWS_AT_ONCE + 3
    logits, targets, weights = 5 * torch.randn(rows, V), torch.randint(V, (rows,)), torch.rand(rows)
    theirs = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(theirs, targets, reduction="none") * weights
    expected.sum().backward()
    close(ops.cross_entropy_(logits, targets, weights), expected.detach())
    close(logits, theirs.grad)


def test_a_weight_of_zero_is_a_zero_whatever_the_logits():
    logits = torch.randn(3, 7)
    logits[1] = float("nan")
    loss = ops.cross_entropy_(logits, torch.tensor([1, 2, 3]), torch.tensor([1.0, 0.0, 0.5]))
    assert loss[1] == 0 and not logits[1].any() and loss[[0, 2]].isfinite().all()


@pytest.mark.parametrize("accumulate", [False, True])
def test_the_update_is_torchs(accumulate):
    from pipeline.engine.buffer import ParameterBuffer, Region

    torch.manual_seed(0)
    buffer = ParameterBuffer(2, [Region(5), Region(3, scaled=True, lr_times=2.0)], "cpu", torch.float32, accumulate=accumulate)
    buffer.master.normal_()
    buffer.scale.copy_(torch.tensor([2.0, 0.5]))
    buffer.weight_decay.copy_(torch.tensor([0.0, 0.1]))
    buffer.max_norm.copy_(torch.tensor([1e9, 0.3]))
    buffer.sync()
    peers = [[torch.nn.Parameter(buffer.master[k, lo:hi].clone()) for lo, hi in ((0, 5), (5, 8))] for k in (0, 1)]
    optimizers = [
        torch.optim.AdamW([{"params": [a], "lr": 0.01}, {"params": [b], "lr": 0.02}], weight_decay=w)
        for (a, b), w in zip(peers, (0.0, 0.1), strict=True)
    ]
    for _ in range(4):
        parts = [torch.randn(2, 8) for _ in range(2 if accumulate else 1)]
        for part in parts:
            buffer.raw.copy_(part)
            buffer.accumulate()
        buffer.lr.fill_(0.01)
        buffer.update()
        for k, (a, b) in enumerate(peers):
            total = sum(p[k] for p in parts)
            a.grad, b.grad = total[:5].clone(), total[5:] * buffer.scale[k]
            torch.nn.utils.clip_grad_norm_([a, b], float(buffer.max_norm[k]))
            optimizers[k].step()
            close(buffer.master[k], torch.cat([a, b]).detach(), 1e-6)
            close(buffer.compute[k, 5:], b.detach() * buffer.scale[k], 1e-6)


def test_an_option_that_nobody_knows_is_refused_and_a_packs_base_stays_as_it_is():
    """An option of a later PEFT, set; and initialisations that write to the base, which runs of a pack share."""
    from dataclasses import dataclass

    from peft import LoraConfig

    from pipeline.engine import options

    @dataclass
    class Later(LoraConfig):
        warp: float = 1.0
        straight: bool = True

    assert "straight" in str(options.refused("LORA", options.changed(Later(straight=False))))
    assert "warp" in str(options.refused("LORA", options.changed(Later(warp=2.0)))) and options.refused("LORA", options.changed(Later(r=3))) is None
    for start, alone, shared in (("gaussian", True, True), (False, True, True), ("pissa_niter_4", True, False), ("olora", True, False), ("mica", False, False)):
        chosen = options.changed(LoraConfig(init_lora_weights=start))
        assert [options.refused("LORA", chosen, shared=x) is None for x in (False, True)] == [alone, shared], start


def test_what_it_does_not_know_it_names():
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    def reason(model, **options):
        with pytest.raises(engine_parts.Unsupported) as caught:
            bind.bind(model, torch.float32, **options)
        return str(caught.value)

    assert "use_dora has a hand-written step for one run alone" in reason(lora(base(), dora=True), slots=2, rank=4)
    assert "lora_dropout" in reason(get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", use_dora=True, lora_dropout=0.1)))
    with_tokens = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[3, 4]))
    assert "alora_invocation_tokens" in reason(with_tokens)
    assert "velora_config" in reason(get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", velora_config={"num_groups": 4})))
    assert "init_lora_weights=mica" in reason(get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights="mica")))
    half = lora(base())
    half.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.requires_grad_(False)
    assert "it does not train" in reason(half)
    also = lora(base())
    also.base_model.model.model.norm.weight.requires_grad_(True)
    assert "it trains base_model.model.model.norm.weight" in reason(also)
    other = lora(base())
    other.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", r=2))
    other.set_adapter("second")
    assert "default one alone" in reason(other)
    assert "PREFIX_TUNING" in reason(get_peft_model(base(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)))
    assert "gpt2" in reason(GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2)).requires_grad_(True))
    frozen = base().requires_grad_(True)
    frozen.model.norm.weight.requires_grad_(False)
    assert "frozen" in reason(frozen)
    assert "bfloat16" in reason(lora(base().to(torch.bfloat16)))
    assert "packed" in reason(base().requires_grad_(True), slots=2)
