"""The walk through the hand-written step against the tensors that a bound model holds, on the CPU."""

from __future__ import annotations

import dataclasses

import pytest
from test_forecast_eager import BASE, METHODS

from pipeline.core.names import build
from pipeline.core.settings import Precision, Train
from pipeline.forecasting.allocator import Heap
from pipeline.forecasting.fast import ByHand
from pipeline.forecasting.memory import load, walk
from pipeline.forecasting.plan import Constants, equal_rows, training_plan
from pipeline.forecasting.shape import shape_of
from pipeline.forecasting.trained import trained

ROWS, WIDTH, LABELS = 4, 64, 8


def settings(**more):
    return Train(**{"lr": 1e-3, "epochs": 1, "batch_size": ROWS, "micro_batch_tokens": ROWS * (WIDTH + 8), "steps": 4, "progress": False, **more})


def plan_of(method, precision="fp32", **more):
    shape = shape_of({**BASE, "model_type": "llama"})
    train, rows = settings(**more), equal_rows(more.get("batch_size", ROWS), WIDTH, LABELS)
    actual = training_plan(shape, trained(METHODS[method], shape), train, Precision(precision), rows, 0, 4, gpu=True)
    return dataclasses.replace(actual, compute=4 if precision != "bf16" else 2)


def size(*tensors):
    """Bytes of the storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def bound(method, precision="fp32", accumulate=False):
    import torch

    from pipeline.engine.bind import bind
    from pipeline.forecasting.speed import random_base

    base = random_base(BASE, precision, torch.float32, torch.device("cpu"))
    return bind(build(METHODS[method], "method").wrap(base), torch.float32, accumulate=accumulate)


def hand(plan, memory):
    parameters = load(plan, memory)
    made = ByHand(plan, memory, Constants())
    made.bind(parameters)
    return made, parameters


@pytest.mark.parametrize(("method", "accumulate"), [("lora", False), ("lora", True), ("full", False), ("prompt", False)])
def test_what_is_bound_stands_as_the_walk_says(imports, method, accumulate):
    stored = bound(method, accumulate=accumulate)
    plan = dataclasses.replace(plan_of(method), accumulates=accumulate)
    memory = Heap()
    made, parameters = hand(plan, memory)
    buffer, llama = stored.buffer, stored.llama
    buffers = [buffer.master, *buffer.moments, buffer.compute, buffer.raw, *([buffer.sum] if buffer.sum is not None else [])]
    assert all(b.numel() == plan.trained.count for b in buffers)
    weights = [g.weight() for layer in llama.layers for g in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    norms = [n.weight for layer in llama.layers for n in (layer.norm1, layer.norm2)] + [llama.norm.weight, llama.embedding]
    assert memory.allocated == size(*buffers, *weights, *norms)
    del made, parameters


def test_what_is_held_and_kept_by_a_layer_is_as_the_walk_says(imports):
    """Exactly, but for what attention keeps: on a CPU it keeps views, on a GPU its output and a number a row."""
    import torch

    from pipeline.engine.attention import Rows

    stored, plan = bound("lora"), plan_of("lora")
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
    cos, sin = stored.llama.angles(WIDTH)
    with torch.no_grad():
        _, saved = layer.forward(torch.randn(n, plan.shape.width), cos, sin, Rows(WIDTH), True)
    own = {t.untyped_storage().data_ptr() for t in layer.reserved}
    actual = [t for item in saved for t in (item if isinstance(item, tuple) else (item,)) if t is not None and t.untyped_storage().data_ptr() not in own]
    assert memory.allocated - before == size(*actual)
    del retained, parameters


def test_a_step_gives_everything_back():
    plan = plan_of("full")
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


@pytest.mark.parametrize("method", ["lora", "full", "ia3"])
def test_more_rows_take_more_and_graphs_of_several_widths_too(method):
    few, many = (walk(plan_of(method, "bf16", batch_size=n, micro_batch_tokens=n * (WIDTH + 8)), Constants())[0].peak.reserved for n in (2, 512))
    assert few < many
