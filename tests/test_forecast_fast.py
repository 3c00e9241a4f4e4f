"""The walk through the hand-written step against the tensors that a bound model holds, on the CPU."""

from __future__ import annotations

import dataclasses

import pytest
from test_forecast_eager import BASE, METHODS

from pipeline.core.names import build
from pipeline.core.settings import Precision, Train
from pipeline.forecasting.allocator import Heap
from pipeline.forecasting.fast import ByHand
from pipeline.forecasting.memory import check, load, walk
from pipeline.forecasting.plan import Constants, equal_rows, training_plan
from pipeline.forecasting.shape import NoForecast, shape_of
from pipeline.forecasting.trained import trained

ROWS, WIDTH, LABELS = 4, 64, 8


def settings(**more):
    return Train(**{"lr": 1e-3, "epochs": 1, "batch_size": ROWS, "micro_batch_tokens": ROWS * (WIDTH + 8), "steps": 4, "progress": False, **more})


HEADS = {"head_dim": 24, "layer_types": ["full_attention"] * 3}
FAMILIES = {
    "llama": {}, "mistral": {"sliding_window": 16}, "qwen2": {}, "qwen3": HEADS, "phi3": {"num_key_value_heads": 4},
    "gemma3_text": {**HEADS, "layer_types": ["sliding_attention"] * 3, "sliding_window": 16},
}
"""What a config says beside BASE."""


def plan_of(method, precision="fp32", family="llama", **more):
    shape = shape_of({**BASE, **FAMILIES[family], "model_type": family})
    train, rows = settings(**more), equal_rows(more.get("batch_size", ROWS), WIDTH, LABELS)
    actual = training_plan(shape, trained(METHODS[method], shape), train, Precision(precision), rows, 0, 4, gpu=True)
    return dataclasses.replace(actual, compute=4 if precision != "bf16" else 2)


def size(*tensors):
    """Bytes of the storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def bound(method, precision="fp32", accumulate=False, family="llama"):
    """(the model, what it is bound to)"""
    import torch

    from pipeline.engine.bind import bind
    from pipeline.forecasting.speed import random_base

    base = random_base({**BASE, **FAMILIES[family], "model_type": family}, precision, torch.float32, torch.device("cpu"))
    model = build(METHODS[method], "method").wrap(base)
    return model, bind(model, torch.float32, accumulate=accumulate)


def hand(plan, memory):
    parameters = load(plan, memory)
    made = ByHand(plan, memory, Constants())
    made.bind(parameters)
    return made, parameters


@pytest.mark.parametrize(("method", "accumulate", "family"), [
    ("lora", True, "llama"), *((method, False, family) for method in ("lora", "full") for family in FAMILIES), ("prompt", False, "llama"),
    ("prompt", False, "gemma3_text"),
])
def test_what_is_bound_stands_as_the_walk_says(imports, method, accumulate, family):
    model, stored = bound(method, accumulate=accumulate, family=family)
    plan = dataclasses.replace(plan_of(method, family=family), accumulates=accumulate)
    assert plan.engine == "hand"
    memory = Heap()
    made, parameters = hand(plan, memory)
    buffer, llama = stored.buffer, stored.llama
    buffers = [buffer.master, *buffer.moments, buffer.compute, buffer.raw, *([buffer.sum] if buffer.sum is not None else [])]
    assert all(b.numel() == plan.trained.count for b in buffers)
    linears = [g for layer in llama.layers for g in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    weights = [g.weight() for g in linears] + [g.bias for g in linears if g.bias is not None]
    norms = [n.weight for layer in llama.layers for n in layer.norms] + [llama.norm.weight, llama.embedding]
    assert memory.allocated == size(*buffers, *weights, *norms, *(p.data for p in model.parameters()))
    del made, parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_held_and_kept_by_a_layer_is_as_the_walk_says(imports, family):
    """Exactly, but for what attention keeps: on a CPU it keeps views, on a GPU its output and a number a row."""
    import torch

    from pipeline.engine.attention import Rows

    (_, stored), plan = bound("lora", family=family), plan_of("lora", family=family)
    memory = Heap()
    made, parameters = hand(plan, memory)
    n, layer = ROWS * WIDTH, stored.llama.layers[1]
    before = memory.allocated
    made.hold(n)
    stored.llama.reserve(n)
    assert memory.allocated - before == size(*(t for one in stored.llama.layers for t in one.reserved))
    made.n, made.width = n, WIDTH
    made.attend = lambda tokens: [made.new(tokens * plan.shape.heads * plan.shape.head, 4)]
    before = memory.allocated
    retained = made.forward(True)
    with torch.no_grad():
        _, saved = layer.forward(torch.randn(n, plan.shape.width), stored.llama.angles(WIDTH), Rows(WIDTH), True)
    own = {t.untyped_storage().data_ptr() for t in layer.reserved}
    actual = [t for item in saved for t in (item if isinstance(item, tuple) else (item,)) if t is not None and t.untyped_storage().data_ptr() not in own]
    assert memory.allocated - before == size(*actual)
    del retained, parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_gives_everything_back(family):
    plan = plan_of("full", family=family)
    memory = Heap()
    made, parameters = hand(plan, memory)
    before = memory.allocated
    made.n, made.width = ROWS * WIDTH, WIDTH
    for micro in plan.steps[0]:
        made.micro_batch(micro)
        assert memory.allocated == before
    del parameters


@pytest.mark.parametrize(("method", "precision", "more", "engine"), [
    ("lora", "bf16", {}, "hand"), ("lora", "nf4", {}, "hand"), ("full", "bf16", {}, "hand"), ("prompt", "bf16", {}, "hand"), ("lora", "int8", {}, "eager"),
    ("lora", "bf16", {"checkpointing": True}, "eager"), ("lora", "bf16", {"engine": "eager"}, "eager"), ("ia3", "bf16", {}, "captured"),
    ("top", "bf16", {}, "captured"), ("ln", "bf16", {}, "captured"), ("head", "bf16", {}, "captured"),
])
def test_the_engine_is_the_one_that_would_step(method, precision, more, engine):
    assert plan_of(method, precision, **more).engine == engine


@pytest.mark.parametrize(("family", "more", "reason"), [
    ("qwen3", {"attention_bias": True}, "qwen3"), ("gemma3_text", {"final_logit_softcapping": 30.0}, "gemma3_text"),
    ("phi3", {"rope_scaling": {"type": "longrope"}}, "phi3"), ("mistral", {"rope_parameters": {"rope_type": "dynamic"}}, "sliding-window"),
])
def test_without_the_hand_written_step_there_is_no_forecast_of_a_family_whose_modules_nobody_walked_through(monkeypatch, family, more, reason):
    monkeypatch.setitem(FAMILIES, family, {**FAMILIES[family], **more})
    assert plan_of("lora", "bf16", family).engine == "captured"
    with pytest.raises(NoForecast, match=reason):
        check(plan_of("lora", "bf16", family))


@pytest.mark.parametrize("method", ["lora", "full", "ia3"])
def test_more_rows_take_more_and_graphs_of_several_widths_too(method):
    few, many = (walk(plan_of(method, "bf16", batch_size=n, micro_batch_tokens=n * (WIDTH + 8)), Constants())[0].peak.reserved for n in (2, 512))
    assert few < many
