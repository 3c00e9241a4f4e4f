"""The hand-written step of every family against transformers and PEFT with autograd, and what of a family it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from family_models import FAMILIES, WINDOW, family
from test_fast_llama import R, T, batch, close, lora, reference

from pipeline.engine import bind
from pipeline.engine.attention import Stream
from pipeline.engine.parts import Unsupported


def lora_gradients_agree(bound, gradients):
    factor = bound.buffer.scale
    for name, (a, b) in bound.pairs.items():
        for view, key, times in ((a, "lora_A", 1.0), (b, "lora_B", factor)):
            start, size = view.storage_offset(), view[0].numel()
            close(times * bound.buffer.raw[0, start : start + size].view(view.shape[1:]), gradients[f"base_model.model.{name}.{key}.default.weight"], 1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("reserved", [True, False])
def test_lora_gradients_are_autograds(name, reserved):
    ids, rows, cols, targets, weights, at = batch()
    assert T > WINDOW
    model = lora(family(name))
    expected, gradients = reference(copy.deepcopy(model), ids, rows, cols, targets, weights)
    bound = bind.bind(model, torch.float32)
    if reserved:
        bound.llama.reserve(R * T)
    close(bound.llama.step(ids, at, targets, weights), expected)
    assert len(bound.pairs) == 3 * (4 if name.startswith("phi3") else 7)
    lora_gradients_agree(bound, gradients)


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
