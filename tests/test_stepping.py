"""The fast way to step against the eager one, through whole cells on the CPU: same losses, same weights, same resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from family_models import family

from pipeline.cell import run as cell_run
from pipeline.core.compose import build, compose
from pipeline.data.rows import Encoded
from pipeline.engine.bind import bind
from pipeline.engine.buffer import ParameterBuffer, Region
from pipeline.engine.layout import Shapes, choose_widths, tokens
from pipeline.engine.parts import Unsupported
from pipeline.engine.steps import Stepper, overlap
from pipeline.models.base import load_tokenizer
from pipeline.records.results import read

SHORT = ["train.epochs=1", "train.batch_size=6", "train_rows=32", "train.validations=0", "precision=fp32"]


def run(overrides, folder, *more):
    return cell_run.run(compose([*overrides, *SHORT, *more]), folder=folder)


def stepped(result):
    """What did the steps, why nothing faster, and the shape that rows were given."""
    assert result.work.widths
    return f"{result.work.engine}, {result.work.engine_reason}, {'streams' if result.work.streams else 'widths'}"


@pytest.mark.parametrize(("technique", "more", "way"), [
    pytest.param("lora", ["train.lr=1e-2"], "handwritten", marks=pytest.mark.slow),
    ("lora", ["train.lr=1e-2", "train.micro_batch_tokens=40", "train.weight_decay=0.1"], "handwritten"),
    ("lora", ["train.lr=1e-2", "method.config.use_dora=true", "train.micro_batch_tokens=40", "train.weight_decay=0.1"], "handwritten"),
    ("ia3", ["train.lr=1e-2"], "IA3 has no hand-written step"),
    pytest.param("full", ["train.lr=1e-3"], "handwritten", marks=pytest.mark.slow),
    ("prompt_tuning", ["train.lr=1e-2"], "handwritten"),
    pytest.param("step_by_step", ["train.lr=1e-3"], "handwritten", marks=pytest.mark.slow),
    pytest.param("lora", ["train.lr=1e-2", "train.padding_free=always"], "streams", marks=pytest.mark.slow),
    ("lora", ["train.lr=1e-2", "train.padding_free=always", "train.micro_batch_tokens=40", "train.weight_decay=0.1"], "streams"),
    pytest.param("full", ["train.lr=1e-3", "train.padding_free=always"], "streams", marks=pytest.mark.slow),
    ("prompt_tuning", ["train.lr=1e-2", "train.padding_free=always"], "widths"),
])
def test_fast_steps_are_the_eager_ones(overrides, tmp_path, technique, more, way):
    eager = run(overrides, tmp_path / "eager", f"technique={technique}", *more, "train.engine=eager")
    fast = run(overrides, tmp_path / "fast", f"technique={technique}", *more, "train.engine=fast")
    assert way in stepped(fast), fast.work
    assert [h["loss"] for h in fast.history] == pytest.approx([h["loss"] for h in eager.history], rel=1e-4)
    assert [h["lr"] for h in fast.history] == [h["lr"] for h in eager.history]
    assert fast.work.tokens == eager.work.tokens and fast.work.steps == eager.work.steps
    assert fast.size == eager.size and fast.scores["test"].nll == pytest.approx(eager.scores["test"].nll, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("technique", ["lora", "full", "prompt_tuning"])
@pytest.mark.parametrize("name", ["mistral", "qwen3", "phi3-partial", "gemma3"])
def test_fast_steps_of_a_family_are_the_eager_ones(overrides, tiny, tmp_path, name, technique):
    """Rows longer than a window. AdamW's first steps take a gradient's sign alone, also of one near zero: losses agree less closely than gradients."""
    folder = tmp_path / "models/smollm2_135m"
    shutil.copytree(tiny / "models/smollm2_135m", folder)
    family(name, vocab_size=len(load_tokenizer(folder)), pad_token_id=1).save_pretrained(folder)
    more = [*overrides, f"paths.models={tmp_path}/models", f"technique={technique}", f"train.lr={1e-3 if technique == 'full' else 1e-2}"]
    eager, fast = (run(more, tmp_path / engine, f"train.engine={engine}") for engine in ("eager", "fast"))
    assert "handwritten, None" in stepped(fast)
    assert [h["loss"] for h in fast.history] == pytest.approx([h["loss"] for h in eager.history], rel=1e-3)
    assert fast.size == eager.size and fast.scores["test"].nll == pytest.approx(eager.scores["test"].nll, rel=1e-2)


def test_qlora_steps_fast_over_the_same_four_bits(overrides, tmp_path):
    more = ["technique=qlora", "precision=nf4", "train.lr=1e-2"]
    eager, fast = (run(overrides, tmp_path / engine, *more, f"train.engine={engine}") for engine in ("eager", "fast"))
    assert fast.work.engine == "handwritten" and fast.work.engine_reason is None
    assert [h["loss"] for h in fast.history] == pytest.approx([h["loss"] for h in eager.history], rel=1e-3)


@pytest.mark.parametrize(("technique", "words", "engine"), [
    ("lora", [], "handwritten"), ("lora", ["method.config.use_dora=true"], "handwritten"), ("ia3", [], "captured"), ("kto", [], "handwritten")])
def test_a_stopped_fast_run_ends_with_the_weights_of_one_that_was_not(overrides, tmp_path, monkeypatch, technique, words, engine):
    from pipeline.training.stepping import Fast

    more = [f"technique={technique}", "train.engine=fast", "train.lr=1e-2", "train.validations=3", *words]
    whole = run(overrides, tmp_path / "whole", *more)
    step = Fast.step

    def stopping(self, number, factor):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, factor)

    monkeypatch.setattr(Fast, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(overrides, tmp_path / "parted", *more)
    monkeypatch.setattr(Fast, "step", step)
    assert run(overrides, tmp_path / "parted", *more).history == whole.history
    assert read(tmp_path / "parted").work.resumed and whole.work.engine == engine
    one, other = ((tmp_path / name / "artefact/adapter_model.safetensors").read_bytes() for name in ("whole", "parted"))
    assert one == other


@pytest.mark.slow
def test_dropout_of_a_fast_run_does_not_depend_on_how_steps_are_split(overrides, tmp_path):
    more = ["technique=lora", "train.engine=fast", "train.lr=1e-2", "method.config.lora_dropout=0.3"]
    whole, split = (run(overrides, tmp_path / str(n), *more, f"train.micro_batch_tokens={n}") for n in (2048, 40))
    packed = run(overrides, tmp_path / "packed", *more, "train.padding_free=always", "train.micro_batch_tokens=70")
    assert whole.work.engine == "handwritten" and packed.work.streams
    for other in (split, packed):
        assert [h["loss"] for h in other.history] == pytest.approx([h["loss"] for h in whole.history], rel=1e-4)
    assert packed.work.padding_share < whole.work.padding_share
    dry = run(overrides, tmp_path / "dry", *more, "method.config.lora_dropout=0.0")
    assert [h["loss"] for h in dry.history][1:] != pytest.approx([h["loss"] for h in whole.history][1:], rel=1e-3)


def test_eager_remains_on_the_cpu_unless_asked_for(overrides, tmp_path):
    result = run(overrides, tmp_path / "auto", "technique=lora")
    assert (result.work.engine, result.work.engine_reason, result.work.widths) == ("eager", None, None)


def test_widths_waste_least():
    assert choose_widths({8: 10, 16: 1, 64: 1}, 3) == [8, 16, 64]
    assert choose_widths({8: 10, 16: 1, 64: 1}, 2) == [8, 64]
    assert choose_widths({8: 1, 16: 1, 64: 9}, 2) == [16, 64]
    assert choose_widths({8: 10, 64: 1}, 1) == [64]


def encoded(n: int, labels: int, group: str = "label") -> Encoded:
    return Encoded(tuple(range(n)), n - labels, group)


def test_every_example_of_a_step_is_in_one_micro_batch_and_weights_sum_to_one():
    import torch

    from pipeline.engine.steps import Static

    step = [[encoded(5, 1), encoded(30, 2), encoded(12, 3)], [encoded(9, 1)]]
    shapes = Shapes([step], 64, 2)
    assert shapes.slots == 2 and shapes.accumulates
    seen: list[list[Encoded]] = [[], []]
    totals = torch.zeros(2)
    for micro in shapes.micro_batches(step):
        static = Static(micro.shape, 2, 4, 99, "cpu")
        static.fill(micro)
        width = 4 + micro.shape.width
        for slot, (examples, _) in enumerate(micro.parts):
            seen[slot] += examples
            marks = slice(slot * micro.shape.labels, (slot + 1) * micro.shape.labels)
            totals[slot] += static.weights[marks].sum()
            live = static.weights[marks] > 0
            at = static.at[marks][live]
            expected = [t for e in examples for t in e.ids[e.start:]]
            assert static.targets[marks][live].tolist() == expected
            rows, cols = at // width, at % width - 4
            assert static.ids[rows, cols].tolist() == [t - 1 for t in expected], "a label is predicted from the token before it"
            assert (rows // micro.shape.rows == slot).all() and (static.at[marks] // width // micro.shape.rows == slot).all()
        real, padding = tokens(micro)
        assert real + padding == static.ids.numel() and (static.ids == 99).sum() == padding
    assert [sorted(map(len, (e.ids for e in part))) for part in seen] == [[5, 12, 30], [9]]
    assert totals.tolist() == pytest.approx([1.0, 1.0])


def test_a_batch_whose_every_token_is_a_label_is_dense():
    shapes = Shapes([[[encoded(9, 8), encoded(9, 8)]]] * 2, 1000, 1)
    assert shapes.all()[0].dense and shapes.all()[0].labels == 16
    assert not Shapes([[[encoded(9, 8), encoded(9, 7)]]], 1000, 1).all()[0].dense


CPT = {"peft_type": "CPT", "task_type": "CAUSAL_LM", "cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4],
       "num_virtual_tokens": 4, "opt_weighted_loss_type": "none", "opt_projection_epsilon": 0.1, "opt_projection_format_epsilon": 0.1}
TIED = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}


@pytest.mark.parametrize(("config", "reason"), [(CPT, "other memory in a forward pass"), (TIED, "share their memory")])
def test_parameters_whose_memory_the_engine_cannot_move_are_trained_eagerly(overrides, tmp_path, config, reason):
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(config))
    more = ["technique=peft_config", f"technique.path={file}", "train.lr=1e-2"]
    eager, fast = (run(overrides, tmp_path / engine, *more, f"train.engine={engine}") for engine in ("eager", "fast"))
    assert fast.work.engine == "eager" and reason in fast.work.engine_reason
    assert fast.history == eager.history and fast.history[0]["loss"] != fast.history[-1]["loss"]


def test_overlap_sees_views_and_not_the_same_tensor_twice():
    whole = torch.zeros(8)
    first, second, one = whole[:4], whole[4:], whole[5:6]
    assert not overlap([whole], [whole, whole, torch.zeros(8)]) and not overlap([first], [first, second])
    assert overlap([whole], [whole, second]) and overlap([first], [first, whole]) and overlap([one], [whole, first, one])


class Program:
    """A program whose runs give the losses of a list, one a run."""

    virtual = 0

    def __init__(self, losses):
        self.losses, self.buffer = iter(losses), ParameterBuffer(1, [Region(4)], "cpu", torch.float32, compute_copy=False)
        self.set_up, self.check, self.begin = (lambda *_: None for _ in range(3))

    def run(self, static):
        self.buffer.raw += 1.0
        return torch.tensor([next(self.losses)])


@pytest.mark.parametrize(("losses", "same"), [([2.0, 2.0, 2.0], True), ([2.0, 2.05, 2.05], True), ([2.0, 2.5, 2.5], False), ([2.0, 2.5, 2.2], True),
                                              ([2.0, float("nan"), float("nan")], False)])
def test_a_captured_step_that_computes_something_else_is_refused(losses, same):
    """The first is the uncaptured run's; two replays that differ, as dropout makes them, say how much a difference means."""
    step = [[[Encoded([1, 2, 3], 1)]]]
    stepper = Stepper(Program(losses), Shapes(step, 64, 1), 0, "cpu")
    micro = next(stepper.shapes.micro_batches(step[0]))
    with nullcontext() if same else pytest.raises(RuntimeError, match="its loss was"):
        stepper.warm({micro.shape.width: micro})


def test_a_captured_model_makes_no_mask_where_it_makes_none_uncaptured(overrides, monkeypatch):
    """transformers cannot look at positions while it is captured, and would then mask what the kernel masks anyway."""
    from transformers.integrations import sdpa_attention
    from transformers.utils import import_utils

    from pipeline.models import attention
    from pipeline.models.base import load_stored

    cfg = compose(overrides)
    model = load_stored(Path(cfg.paths.models) / cfg.model.name).eval()
    masks, real = [], sdpa_attention.sdpa_attention_forward

    def spied(module, q, k, v, mask, **how):
        masks.append(mask)
        return real(module, q, k, v, mask, **how)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", spied)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
        monkeypatch.setattr(attention, "_capturing", lambda: True)
        captured = model(ids, use_cache=False).logits
        padded = model(ids, use_cache=False, attention_mask=torch.tensor([[1] * 6, [1] * 4 + [0] * 2])).logits
    layers = model.config.num_hidden_layers
    assert masks[: 2 * layers] == [None] * 2 * layers and torch.equal(captured, expected)
    assert all(mask is not None for mask in masks[2 * layers :]) and torch.allclose(padded[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("technique", ["full", "prompt_tuning"])
def test_a_large_residual_stream_is_left_to_autocast(technique):
    """Gemma's is: in bf16 the hand-written step's losses lay above the eager loop's."""
    model = family("gemma3")
    wrapped = build(compose([f"technique={technique}"]).method, "method").wrap(model)
    with pytest.raises(Unsupported, match="bf16 loses too much of its residual stream"):
        bind(wrapped, torch.bfloat16)
    assert bind(wrapped, torch.float32)


@pytest.mark.parametrize(("seconds", "taken"), [({"flash": 1.0, "cudnn": 0.95}, "flash"), ({"flash": 1.0, "cudnn": 0.8}, "cudnn"), ({"cudnn": 1.0}, "cudnn")])
def test_of_two_kernels_that_are_about_equal_every_run_takes_the_first(seconds, taken):
    from pipeline.engine.steps import clearly_fastest

    assert clearly_fastest(seconds) == taken
