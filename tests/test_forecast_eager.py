"""The walk through autograd's tensors against torch's own count of live bytes, on the CPU, through the stepping that trains."""

from __future__ import annotations

import itertools

import pytest

from pipeline.core.names import build
from pipeline.core.settings import Precision, Train
from pipeline.forecasting.memory import walk
from pipeline.forecasting.plan import Constants, equal_rows, training_plan
from pipeline.forecasting.shape import shape_of
from pipeline.forecasting.trained import trained

BASE = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 320, "vocab_size": 1000,
        "tie_word_embeddings": True, "max_position_embeddings": 512}
ADAPTER = "peft_adapter"
METHODS = {
    "full": {"type": "full"},
    "lora": {"type": ADAPTER, "config": {"type": "LoraConfig", "task_type": "CAUSAL_LM", "r": 8, "target_modules": "all-linear"}},
    "dropout": {"type": ADAPTER, "config": {"type": "LoraConfig", "task_type": "CAUSAL_LM", "r": 4, "lora_dropout": 0.1,
                                                 "target_modules": "all-linear"}},
    "prompt": {"type": ADAPTER, "config": {"type": "PromptTuningConfig", "task_type": "CAUSAL_LM", "num_virtual_tokens": 16}},
    "ia3": {"type": ADAPTER, "config": {"type": "IA3Config", "task_type": "CAUSAL_LM"}},
    "ln": {"type": ADAPTER, "config": {"type": "LNTuningConfig", "task_type": "CAUSAL_LM"}},
    "top": {"type": "selective", "parts": ["layers", "final_norm"], "top_layers": 1},
    "head": {"type": "selective", "parts": ["head"]},
    "biases": {"type": "selective", "parts": ["biases"], "add_biases": True},
}
ROWS, WIDTH = 4, 64


def measured(config, method, precision, labels, checkpointing):
    """(bytes of the wrapped model, peak live bytes of two steps) of a training with all rows in one micro-batch."""
    import torch

    from benchmarks.forecast_live import Live
    from pipeline.data.rows import Encoded
    from pipeline.forecasting.speed import random_base
    from pipeline.objectives.labels import Labels
    from pipeline.training.stepping import Eager, Run

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    method = build(method, "method")
    model = method.wrap(random_base(config, precision, dtype, torch.device("cpu")))
    rows = [[Encoded(tuple(range(1, WIDTH + 2)), WIDTH + 1 - labels)]] * ROWS
    stepping = Eager(Run(model, method, Labels(), rows, train(checkpointing), 0, 2, torch.device("cpu"), dtype, 0))
    live = Live(model)
    with live:
        for step in range(2):
            stepping.step(step, 1.0)
    return live.base, live.peak


def train(checkpointing=False):
    return Train(lr=1e-3, epochs=1, batch_size=ROWS, micro_batch_tokens=10**6, steps=2, progress=False, checkpointing=checkpointing)


def simulated(config, method, precision, labels, checkpointing):
    shape = shape_of({**config, "model_type": "llama"})
    name = Precision(precision, compute="fp32" if precision == "fp32" else "bf16")
    plan = training_plan(shape, trained(method, shape), train(checkpointing), name, equal_rows(ROWS, WIDTH, labels), 0, 2, gpu=False)
    memory, loaded = walk(plan, Constants())
    return loaded, memory.peak.allocated


QUICK = [("full", "fp32", 64, False), ("lora", "bf16", 8, False), ("lora", "fp32", 64, True), ("full", "bf16", 64, True), ("prompt", "fp32", 8, False)]
ALL = [c for c in itertools.product(METHODS, ("fp32", "bf16"), (8, 64), (False,)) if c not in QUICK]
ALL += [("lora", "nf4", 8, False), ("lora", "nf4", 64, True), ("prompt", "nf4", 8, False), ("lora", "int8", 8, False)]
ALL += [c for c in itertools.product(("full", "lora", "prompt"), ("fp32", "bf16"), (8, 64), (True,)) if c not in QUICK]


@pytest.mark.parametrize(("method", "precision", "labels", "checkpointing"), [*QUICK, *(pytest.param(*c, marks=pytest.mark.slow) for c in ALL)])
def test_peak_live_bytes_are_those_that_torch_counts(imports, method, precision, labels, checkpointing):
    base, peak = measured(BASE, METHODS[method], precision, labels, checkpointing)
    loaded, actual = simulated(BASE, METHODS[method], precision, labels, checkpointing)
    assert loaded == pytest.approx(base, rel=0.002)
    assert actual == pytest.approx(peak, rel=0.1 if method == "head" else 0.035 if precision != "int8" else 0.05)


def test_the_gradients_of_a_tied_embedding_are_added_out_of_place_in_fp32(imports):
    case = ({**BASE, "vocab_size": 20000}, METHODS["full"], "fp32", 8, False)
    assert simulated(*case)[1] == pytest.approx(measured(*case)[1], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"tie_word_embeddings": False}, {"num_key_value_heads": 4}])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_untied_and_ungrouped_shapes_too(imports, method, more):
    config = {**BASE, **more}
    base, peak = measured(config, METHODS[method], "bf16", 64, False)
    assert simulated(config, METHODS[method], "bf16", 64, False) == (pytest.approx(base, rel=0.002), pytest.approx(peak, rel=0.02))


def test_what_autograd_saves_grows_as_the_walk_says(imports):
    """Saved bytes a token of one more layer, by torch.autograd.graph.saved_tensors_hooks, for LoRA in fp32."""
    import torch

    def saved(layers):
        from pipeline.forecasting.speed import random_base

        torch.manual_seed(0)

        config = {**BASE, "num_hidden_layers": layers}
        model = build(METHODS["lora"], "method").wrap(random_base(config, "fp32", torch.float32, torch.device("cpu")))
        own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        retained = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                retained[storage.data_ptr()] = storage.nbytes()
            stored.append(tensor)
            return tensor

        stored: list = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(input_ids=torch.ones(ROWS, WIDTH, dtype=torch.long), use_cache=False).logits.sum()
        return sum(retained.values())

    def walked(layers):
        from pipeline.forecasting.allocator import Heap
        from pipeline.forecasting.eager import Eager

        config = {**BASE, "num_hidden_layers": layers}
        shape = shape_of({**config, "model_type": "llama"})
        plan = training_plan(shape, trained(METHODS["lora"], shape), train(), Precision("fp32"), equal_rows(ROWS, WIDTH, 8), 0, 1, gpu=False)
        memory = Heap()
        walk = Eager(plan, memory, Constants())
        walk.n, walk.rows, walk.width = ROWS * WIDTH, ROWS, WIDTH
        x, backs, needs = walk.new(ROWS * WIDTH * shape.width, 4), [], False
        for layer in range(layers):
            x, back = walk.layer(x, layer, needs)
            needs = True
            backs.append(back)
        return memory.allocated

    assert saved(3) - saved(2) == pytest.approx(walked(3) - walked(2), rel=0.01)
