"""DoRA by hand against PEFT: norms, where a run begins, AdamW's steps, answers in training, 16 bits. Gradients: test_fast_llama.py, test_fast_families.py."""

from __future__ import annotations

import copy

import pytest
import torch
from family_models import family
from test_fast_llama import base, batch, close, gradient, lora, reference

from benchmarks.speed_workloads import quantise
from pipeline.core.compose import build, compose
from pipeline.engine import bind
from pipeline.engine.parts import Unsupported


def stacks(bound):
    """Those with adapters."""
    return [linears for layer in bound.llama.layers for linears in (layer.qkv, layer.out, layer.gate_up, layer.down) if linears.pairs]


def norms(bound):
    """(as the engine has them, of W + B A in fp64) of every adapted row, and ||W||."""
    ours, full, plain = [], [], []
    for linears in stacks(bound):
        a = linears.a[0].double()
        for (columns, pair), (rows, norm, _) in zip(linears.members(), linears.magnitudes, strict=True):
            w = linears.weight()[rows, : a.shape[1]].double()
            ours.append(norm.double())
            full.append((w + pair.b[0].double() @ a[columns]).norm(dim=1))
            plain.append(w.norm(dim=1))
    return torch.cat(ours), torch.cat(full), torch.cat(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "times"), [(1, 1.0), (4, 1.0), (16, 1.0), (4, 1e-3), (4, 100.0)])
def test_norms_are_those_of_the_whole_matrix(dtype, rank, times):
    bound = bind.bind(lora(family("qwen2").to(dtype), r=rank, alpha=2 * rank, dora=True), dtype)
    for _, b in bound.pairs.values():
        b.mul_(times)
    bound.buffer.sync()
    ours, full, _ = norms(bound)
    assert len(ours) == bound.buffer.regions[2].size and float(((ours - full) / full).abs().max()) < 1e-6


@pytest.mark.parametrize("share", [0.9, 0.99, 0.999])
def test_what_all_but_cancels_the_weights_leaves_a_norm_as_exact_as_fp32_is_at_theirs(share):
    model = lora(base(), r=32, targets=["up_proj"], dora=True)
    for name, module in model.named_modules():
        if name.endswith("up_proj"):
            module.lora_A["default"].weight.data.copy_(-share * module.base_layer.weight[:32] * 4)  # alpha / r is 1 / 4
            module.lora_B["default"].weight.data.copy_(torch.eye(48, 32))
    ours, full, plain = norms(bind.bind(model, torch.float32))
    assert float(full.min() / plain.max()) < 1.1 * (1 - share) and float(((ours**2 - full**2) / plain**2).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
def test_a_run_begins_at_exactly_its_base(imports, kind):
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    plain = family("qwen2", hidden_size=64, intermediate_size=64).to(dtype)
    if kind == "nf4":
        quantise(plain, dtype)
    bound = bind.bind(build(compose(["technique=dora"]).method, "method").wrap(copy.deepcopy(plain)), dtype)
    assert all(torch.equal(linears.g, torch.ones_like(linears.g)) for linears in stacks(bound))
    ids, rows, cols, targets, weights, at = batch()
    nll = bound.llama.nll(ids, at, targets)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(plain(ids).logits[rows, cols].float(), targets, reduction="none")
    assert torch.allclose(nll, expected, rtol=2e-2 if kind == "bf16" else 1e-5)


def test_steps_are_peft_and_adamws_and_a_run_that_resumes_takes_the_same():
    """Two micro-batches a step, weight decay on the magnitudes as on all else, clipping by the norm of everything."""
    model = lora(family("qwen2"), dora=True)
    theirs = copy.deepcopy(model)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)

    def bound_to_step(model):
        bound = bind.bind(model, torch.float32, accumulate=True)
        bound.buffer.weight_decay.fill_(0.1)
        bound.buffer.max_norm.fill_(0.5)
        bound.buffer.lr.fill_(1e-2)
        return bound

    bound = bound_to_step(model)
    for step in range(6):
        parts = [batch(10 * step + part) for part in range(2)]
        for ids, rows, cols, targets, weights, at in parts:
            expected, _ = reference(theirs, ids, rows, cols, targets, weights)
            close(bound.llama.step(ids, at, targets, weights), expected, 1e-4)
            bound.buffer.accumulate()
        bound.buffer.update()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            state, model = bound.buffer.state_dict(), copy.deepcopy(model)
            bound = bound_to_step(model)
            bound.buffer.load_state_dict(state)
    begun = dict(lora(family("qwen2"), dora=True).named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            mine = model.get_parameter(name)
            assert not torch.equal(mine, begun[name])
            assert (mine - parameter).norm() < 1e-3 * (parameter - begun[name]).norm(), name


def test_a_model_in_training_answers_with_its_factors_and_nobody_elses_answers_do():
    model = lora(family("gemma3"), dora=True)
    bound = bind.bind(model, torch.float32)
    bound.serve(model)
    bound.buffer.master.mul_(1.5)
    bound.buffer.sync()
    ids, rows, cols, targets, weights, at = batch()
    llama = bind.bound_to(model, torch.float32)
    assert llama is not None
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids).logits[rows, cols], targets, reduction="none")
    close(llama.nll(ids, at, targets), expected)
    bound.release()
    with pytest.raises(Unsupported, match="DoraLinearVariant"):
        bind.answering(model, torch.float32)


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_gradients_in_16_bits_are_those_of_autograd_in_32(name):
    model = lora(family(name, initializer_range=0.1).bfloat16(), dora=True)
    ids, rows, cols, targets, weights, at = batch(rows=32)
    _, gradients = reference(copy.deepcopy(model).float(), ids, rows, cols, targets, weights)
    bound = bind.bind(model, torch.bfloat16)
    bound.llama.step(ids, at, targets, weights)
    apart = {key: float((gradient(bound, key, model.get_parameter(key)) - theirs).norm() / theirs.norm()) for key, theirs in gradients.items()}
    assert max(apart.values()) < 0.06, max(apart, key=apart.__getitem__)
