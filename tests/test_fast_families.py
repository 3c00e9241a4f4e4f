"""The hand-written step of every family against transformers and PEFT with autograd, and what of a family it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from family_models import FAMILIES, WINDOW, family
from test_fast_llama import R, T, batch, close, gradient, lora, packed, reference, together

from pipeline.engine import bind
from pipeline.engine.attention import Stream
from pipeline.engine.parts import Unsupported


def lora_gradients_agree(model, bound, gradients):
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, expected in gradients.items():
        close(gradient(bound, name, model.get_parameter(name)), expected, 1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("reserved", "dora"), [(True, False), (False, False), (True, True), (False, True)])
def test_lora_gradients_are_autograds(name, reserved, dora):
    ids, rows, cols, targets, weights, at = batch()
    assert T > WINDOW
    model = lora(family(name), dora=dora)
    expected, gradients = reference(copy.deepcopy(model), ids, rows, cols, targets, weights)
    bound = bind.bind(model, torch.float32)
    if reserved:
        bound.llama.reserve(R * T)
    close(bound.llama.step(ids, at, targets, weights), expected)
    assert len(bound.pairs) == 3 * (4 if name.startswith("phi3") else 7)
    lora_gradients_agree(model, bound, gradients)


@pytest.mark.parametrize("name", FAMILIES)
def test_full_gradients_are_autograds(name):
    ids, rows, cols, targets, weights, at = batch(1)
    model = family(name).requires_grad_(True)
    expected, gradients = reference(copy.deepcopy(model), ids, rows, cols, targets, weights)
    bound = bind.bind(model, torch.float32)
    close(bound.llama.step(ids, at, targets, weights), expected)
    assert gradients.keys() == {key for key, _ in model.named_parameters()}
    for key, parameter in model.named_parameters():
        start, size = parameter.data.storage_offset(), parameter.numel()
        close(bound.buffer.raw[0, start : start + size].view(parameter.shape), gradients[key], 1e-4)


@pytest.mark.parametrize("name", ["gemma3", "phi3-partial"])
def test_prompt_gradients_are_autograds(name):
    """Gemma scales the embeddings of tokens, not those of a soft prompt."""
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(2)
    model = get_peft_model(family(name), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    ids, rows, cols, targets, weights, at = batch(2, virtual=5)
    expected, gradients = reference(copy.deepcopy(model), ids, rows, cols, targets, weights)
    bound = bind.bind(model, torch.float32)
    close(bound.llama.step(ids, at, targets, weights), expected)
    (gradient,) = gradients.values()
    close(bound.buffer.raw.view(gradient.shape), gradient)


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gemma3"])
def test_slots_are_runs_of_their_own(name):
    ranks, plain = (2, 4), family(name)
    solo, bound = packed(plain, ranks)
    parts = [batch(k) for k in range(2)]
    ids, at, targets, weights = together(parts)
    loss = bound.llama.step(ids, at, targets, weights).view(2, -1)
    for k, model in enumerate(solo):
        expected, gradients = reference(model, *parts[k][:5])
        close(loss[k], expected)
        for key, (a, _) in bound.pairs.items():
            start = a.storage_offset() + k * a.stride(0)
            grad = bound.buffer.raw.view(-1)[start : start + a[0].numel()].view(a.shape[1:])
            close(grad[: ranks[k]], gradients[f"base_model.model.{key}.lora_A.default.weight"], 1e-4)


@pytest.mark.parametrize(("name", "dora"), [("mistral", False), ("gemma3", False), ("gemma3", True)])
def test_rows_in_a_stream_are_rows_of_their_own(name, dora):
    ids, rows, cols, targets, weights, at = batch()
    bound = bind.bind(lora(family(name), dora=dora), torch.float32)
    expected = bound.llama.step(ids, at, targets, weights)
    gradients = bound.buffer.raw.clone()
    place = torch.arange(R * T)
    stream = Stream(torch.arange(0, R * T + 1, T, dtype=torch.int32), place % T, place // T, T)
    close(bound.llama.step(ids.view(1, -1), at, targets, weights, stream=stream), expected)
    close(bound.buffer.raw, gradients)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3", "gemma3"])
@pytest.mark.parametrize("dora", [False, True])
def test_four_bit_weights_are_dequantised_into_the_same_step(imports, name, dora):
    from benchmarks.speed_workloads import quantise

    base = family(name, hidden_size=64, intermediate_size=64)
    quantise(base, torch.float32)
    model = lora(base, dora=dora)
    ids, rows, cols, targets, weights, at = batch()
    expected, gradients = reference(copy.deepcopy(model), ids, rows, cols, targets, weights)
    bound = bind.bind(model, torch.float32)
    close(bound.llama.step(ids, at, targets, weights), expected)
    lora_gradients_agree(model, bound, gradients)


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "llama"])
def test_norms_that_multiply_by_zero_or_nearly(name):
    """As real weights do: 1 to 4 of the 256 columns of most of Gemma 3 270M's head norms. What such a column was is in no output, and it is large."""
    model = family(name).requires_grad_(True)
    zero = -1.0 if name == "gemma3" else 0.0
    for key, parameter in model.named_parameters():
        if "norm" in key:
            parameter.data.copy_(torch.linspace(zero - 1.0, zero + 2.0, parameter.numel()) + 1e-3)
            if key != "model.norm.weight":
                parameter.data[1::4] = zero
    ids, rows, cols, targets, weights, at = batch(1)
    expected, gradients = reference(copy.deepcopy(model), ids, rows, cols, targets, weights)
    bound = bind.bind(model, torch.float32)
    close(bound.llama.step(ids, at, targets, weights), expected)
    for key, parameter in model.named_parameters():
        start, size = parameter.data.storage_offset(), parameter.numel()
        close(bound.buffer.raw[0, start : start + size].view(parameter.shape), gradients[key], 1e-4)


def test_a_last_norm_that_multiplies_by_zero_is_refused():
    model = lora(family("gemma3"))
    model.get_base_model().model.norm.weight.data[3] = -1.0
    with pytest.raises(Unsupported, match="last norm multiplies a number by zero"):
        bind.bind(model, torch.float32)


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(("name", "options", "reason"), [
    ("qwen3", {"attention_bias": True}, "biases"),
    ("qwen3", {"hidden_act": "gelu"}, "hidden_act"),
    ("qwen2", {"attention_dropout": 0.1}, "attention_dropout"),
    ("llama", {"mlp_bias": True}, "biases"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
                                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}, "rotary positions"),
    ("phi3", {"rope_parameters": LONGROPE}, "rotary positions"),
    ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop"),
    ("qwen3", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layers"),
])
def test_what_it_does_not_take_it_names(name, options, reason):
    for model in (lora(family(name, **options)), family(name, **options).requires_grad_(True)):
        with pytest.raises(Unsupported, match=reason):
            bind.bind(model, torch.float32)


@pytest.mark.parametrize(("name", "scaled"), [
    ("gemma3", {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    ("qwen3", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8}),
])
def test_rotations_that_are_scaled(name, scaled):
    """YaRN's cos and sin are more than rotations: norms of heads are turned back through them."""
    ids, rows, cols, targets, weights, at = batch()
    model = lora(family(name, rope_parameters=scaled))
    expected, gradients = reference(copy.deepcopy(model), ids, rows, cols, targets, weights)
    bound = bind.bind(model, torch.float32)
    close(bound.llama.step(ids, at, targets, weights), expected)
    lora_gradients_agree(model, bound, gradients)


def test_an_option_of_a_later_transformers_is_refused_where_it_is_set():
    from dataclasses import dataclass

    from transformers import Qwen3Config

    from pipeline.engine import families

    @dataclass
    class Later(Qwen3Config):
        warp: float = 1.0

    config = Later()
    assert families.refused(config) is None
    config.warp = 2.0
    assert "warp" in str(families.refused(config))
