"""Pruning, low-rank factors and rounding: what goes, what is nearest, what is stored, and what takes room."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import random_model
from test_techniques_written import apart, gpt2, logits, method

from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import build, compose
from pipeline.core.files import UserError, read_jsonl
from pipeline.core.settings import Precision
from pipeline.data.rows import Example
from pipeline.engine.bind import answering
from pipeline.engine.parts import Unsupported
from pipeline.models import blocks as calibration
from pipeline.models.base import load_model, memory_bytes
from pipeline.models.blocks import blocks, linears, matrix
from pipeline.records import results
from pipeline.serving import artefact as evaluate

CPU = torch.device("cpu")
ROWS = [Example("Review: fine plot with a cast", "positive"), Example("Review: the poor story", "negative"), Example("Review: a lovely scene", "positive")]


@pytest.fixture(scope="module")
def load(tiny):
    """Gives a fresh tiny Llama."""
    stored = load_model(tiny / "models" / "smollm2_135m", Precision("fp32"), CPU)
    return lambda: copy.deepcopy(stored)


def weights(model: Any) -> list[torch.Tensor]:
    return [matrix(module) for block in blocks(model) for _, module in linears(block)]


def compressed(name: str, model: Any, *overrides: str) -> Any:
    made = method(name, *overrides)
    made.prepare(ROWS, 0, model)
    return made.wrap(model)


# pruning


def test_wanda_weighs_weights_by_the_norms_of_their_inputs_row_by_row():
    """Figure 1 of Sun et al. (2023): of |W| · norms, half of every row goes; by magnitude, half of the matrix."""
    weight = torch.tensor([[4.0, 0, 1, -1], [3, -2, -1, -3], [-3, 1, 0, 2]])
    norms = torch.tensor([1.0, 2, 8, 3])
    wanda = method("wanda")._weakest(weight.abs() * norms)
    assert torch.equal(torch.where(wanda, 0, weight), torch.tensor([[4.0, 0, 1, 0], [0, 0, -1, -3], [-3, 0, 0, 2]]))
    magnitude = method("magnitude_pruning")._weakest(weight.abs())
    assert int(magnitude.sum()) == 6 and set(weight[~magnitude].abs().tolist()) == {4.0, 3.0, 2.0} and int((~magnitude).sum()) == 6


@pytest.mark.parametrize(("pattern", "left", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_a_pattern_leaves_so_many_of_every_group(load, pattern, left, of):
    for weight in weights(compressed("wanda", load(), f"method.pattern='{pattern}'")):
        assert set((weight.reshape(-1, of) != 0).sum(1).tolist()) == {left}


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_the_share_goes_and_nothing_else_moves(load, base):
    make = load if base == "llama" else gpt2
    plain = make()
    names = {id(p): n for n, p in plain.named_parameters()}
    pruned = {names[id(m.weight)] for block in blocks(plain) for _, m in linears(block)}
    model = compressed("magnitude_pruning", make(), "method.sparsity=0.25")
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name in pruned:
            assert float((one == 0).float().mean()) == pytest.approx(0.25, abs=0.01) and torch.equal(one[one != 0], other[one != 0])
        else:
            assert torch.equal(one, other)


def test_bits_are_packed_and_unpacked():
    from pipeline.methods.pruning import packed, unpacked

    torch.manual_seed(0)
    mask = torch.rand(7, 3) > 0.5
    assert torch.equal(unpacked(packed(mask), 21).view(7, 3), mask) and packed(mask).dtype == torch.uint8 and len(packed(mask)) == 3
    assert packed(torch.tensor([True] + 7 * [False])).tolist() == [128]


def test_a_pruned_model_s_artefact_is_a_bit_a_weight_and_those_left(load, tmp_path):
    made, model = method("wanda"), None
    model = compressed("wanda", load())
    made.save(model, None, tmp_path)
    count = sum(w.numel() for w in weights(model))
    rest = sum(p.numel() for p in model.parameters()) - count
    size = (tmp_path / "pruned.safetensors").stat().st_size
    assert count * (0.5 * 4 + 1 / 8) + rest * 4 <= size < count * (0.5 * 4 + 1 / 8) + rest * 4 + 8192
    assert memory_bytes(model) == memory_bytes(load()), "zeros take room"
    again = made.load(load(), tmp_path)[0]
    assert torch.equal(logits(again), logits(model)) and apart(logits(model), logits(load())) > 0.01
    assert made.notes(model)[0].startswith("50.0% of the 73,728 weights of the blocks' linear layers are zero")


# calibration


def test_the_inputs_are_those_of_a_plain_pass_while_nothing_changes(load):
    """And of the changed blocks below, once something does."""
    model, ids = load(), calibration.rows(ROWS, 2, load())
    expected: dict[tuple[int, str], torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, key=(n, name): expected.__setitem__(key, expected.get(key, 0) + args[0][0].square().sum(0)))
        for n, block in enumerate(blocks(model)) for name, module in linears(block)
    ]
    with torch.no_grad():
        for row in ids:
            model(input_ids=torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    actual: list[dict[str, torch.Tensor]] = []
    calibration.calibrate(model, ids, lambda x: x.square().sum(0), lambda block, sums: actual.append(sums))
    assert len(ids) == 2 and {(n, name) for n, sums in enumerate(actual) for name in sums} == set(expected)
    assert all(torch.allclose(actual[n][name], value, rtol=1e-4) for (n, name), value in expected.items())

    later: list[dict[str, torch.Tensor]] = []

    def change(block: Any, sums: dict[str, torch.Tensor]) -> None:
        later.append(sums)
        for _, module in linears(block):
            module.weight.data *= 0.5

    calibration.calibrate(model, ids, lambda x: x.square().sum(0), change)
    assert torch.allclose(later[0]["self_attn.q_proj"], actual[0]["self_attn.q_proj"], rtol=1e-4)
    assert not torch.allclose(later[1]["mlp.down_proj"], actual[1]["mlp.down_proj"], rtol=0.1)
    with pytest.raises(UserError, match="calibration needs training rows; raise train_rows"):
        calibration.rows([], 2, model)


# low rank


def test_factors_are_the_nearest_by_weight_or_by_output():
    """What is left is the tail of the singular values, of W or of W·L (Eckart & Young)."""
    from pipeline.methods.low_rank import factors

    torch.manual_seed(0)
    weight, inputs = torch.randn(6, 8), torch.randn(8, 200) * torch.tensor([10.0, 5, 1, 1, 1, 0.1, 0.1, 0.01])[:, None]
    left, right = factors(weight, 3)
    assert float((weight - left @ right).norm()) == pytest.approx(float(torch.linalg.svdvals(weight)[3:].norm()), rel=1e-4)
    near, far = factors(weight, 3, inputs @ inputs.T), factors(weight, 3)
    errors = [float(((weight - a @ b) @ inputs).norm()) for a, b in (near, far)]
    assert errors[0] == pytest.approx(float(torch.linalg.svdvals(weight @ inputs)[3:].norm()), rel=1e-2) and errors[0] < errors[1]


def test_inputs_that_no_row_has_do_not_break_the_factors():
    from pipeline.methods.low_rank import factors

    product = torch.zeros(8, 8)
    product[0, 0] = 4.0
    left, right = factors(torch.randn(6, 8), 2, product)
    assert torch.isfinite(left @ right).all()


@pytest.mark.parametrize("name", ["low_rank", "low_rank_calibrated"])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_thin_layers_take_the_share_and_come_back(load, tmp_path, name, base):
    make = load if base == "llama" else gpt2
    made = method(name, "method.share=0.5")
    plain = make()
    model = plain
    if name == "low_rank_calibrated" and base == "gpt2":
        calibration.calibrate(model, [[5, 6, 7, 8], [9, 10, 11]], lambda x: x.T @ x, made._replace)
    else:
        model = compressed(name, plain, "method.share=0.5")
    saved = sum(w.numel() for w in weights(model)) / sum(w.numel() for w in weights(make()))
    assert 0.4 < saved <= 0.5 and memory_bytes(model) < memory_bytes(make())
    made.save(model, None, tmp_path)
    again = made.load(make(), tmp_path)[0]
    assert torch.equal(logits(again), logits(model)) and apart(logits(model), logits(make())) > 0.01


def test_nearly_all_of_the_numbers_nearly_give_the_base(load):
    """At a share of 1 - ε a square layer has half of its rank; what is calibrated is nearer to the base on the calibration rows."""
    ids = torch.tensor([calibration.rows(ROWS, 1, load())[0]])
    actual = []
    for name in ("low_rank", "low_rank_calibrated"):
        with torch.inference_mode():
            model = compressed(name, load(), "method.share=0.9")
            actual.append(float((model(input_ids=ids).logits - load()(input_ids=ids).logits).norm()))
    assert actual[1] < actual[0]


def test_a_model_that_reads_a_layer_s_weight_in_the_place_of_calling_it_goes_on_with_thin_ones():
    """Mamba's mixer reads those of its projections."""
    ids = torch.tensor([[5, 6, 7, 8]])
    model = random_model("mamba").requires_grad_(False).eval()
    before = model(input_ids=ids).logits
    made = build(compose(["technique=low_rank", "method.share=0.95"]).method, "method")
    made.prepare([], 0, model)
    after = model(input_ids=ids).logits
    assert 0 < float((after - before).norm() / before.norm()) < 1.0 and made.reached_weights(model) > 0
    layer = next(m for m in model.modules() if hasattr(m, "factors"))
    x = torch.randn(3, layer.weight.shape[1])
    assert torch.allclose(torch.nn.functional.linear(x, layer.weight, layer.bias), layer(x), atol=1e-5)


def test_the_hand_written_answers_refuse_thin_layers_by_name(load):
    with pytest.raises(Unsupported, match="q_proj does more than its class says"):
        answering(compressed("low_rank", load()), torch.float32)


# what does not go together


@pytest.mark.parametrize(("name", "override", "message"), [
    ("wanda", "method.by=random", "method.by is 'random'; choose magnitude or wanda"),
    ("wanda", "method.sparsity=1", "method.sparsity is 1; it is a share, above 0 and below 1"),
    ("wanda", "method.pattern='1:4'", "method.pattern is '1:4' at method.sparsity=0.5; choose null"),
    ("wanda", "method.calibration_rows=0", "method.calibration_rows is 0"),
    ("low_rank", "method.share=1.0", "method.share is 1.0; it is above 0 and below 1"),
    ("full_nf4", "method.kind=int2", "method.kind is 'int2'; choose int8 or nf4"),
])
def test_a_bad_value_is_named_before_a_model_is_loaded(name, override, message):
    with pytest.raises(UserError, match=message):
        method(name, override)


@pytest.mark.parametrize(("name", "message"), [
    ("wanda", "wanda compares weights, and nf4 ones are rounded; choose precision=auto"),
    ("low_rank", "low_rank takes weights apart, and nf4 ones"),
    ("full_int8", "quantised_int8 rounds plain weights, and the base is nf4 already"),
])
def test_rounded_weights_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        method(name).check("nf4")


def test_a_pattern_that_does_not_divide_a_layer_is_told():
    made = build(compose(["technique=wanda", "method.pattern='4:8'"]).method, "method")
    with pytest.raises(UserError, match="a layer has 12 inputs, which method.pattern=4:8 does not divide"):
        made._weakest(torch.rand(2, 12))


# from end to end

SHORT = ["train.epochs=12", "train.batch_size=8", "train.validations=0", "train.lr=3e-3"]


def run(overrides: list[str], *more: str) -> results.Result:
    cfg = compose([*overrides, *SHORT, *more])
    result = cell_run.run(cfg, folder=identity.folder_of(cfg))
    stored = [p for p in read_jsonl(identity.folder_of(cfg) / "predictions.jsonl") if p["split"] == "test"]
    actual, _ = evaluate.score_artefact(cfg, identity.folder_of(cfg) / "artefact", "test")
    for one, other in zip(actual, stored, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    return result


def test_the_base_is_compressed_and_its_artefact_answers_alike(overrides):
    result = run(overrides, "technique=low_rank_calibrated")
    assert result.size.trainable == 0 and result.size.served_bytes < result.size.model_bytes and result.work.steps == 0


@pytest.mark.slow
def test_what_was_learnt_outlives_compression(overrides):
    """The separable task after full fine-tuning: 95% still, in fewer bytes; and compression upon compression."""
    full = run(overrides, "technique=full")
    assert full.test.accuracy >= 0.95
    for technique in ("full_magnitude_pruning", "full_wanda", "full_low_rank", "full_int8", "full_nf4"):
        result = run(overrides, f"technique={technique}")
        assert result.test.accuracy >= 0.95 and result.size.artefact_bytes < full.size.artefact_bytes, technique
        smaller = result.size.served_bytes < full.size.served_bytes
        assert smaller == (technique not in ("full_magnitude_pruning", "full_wanda")), "zeros take room in memory"
        assert any("begins at scratch/full-s0-nall" in note for note in result.notes)
    both = run(overrides, "technique=full_int8", "start=full_wanda", "variant=pruned")
    assert both.test.accuracy >= 0.95
    lora = run(overrides, "technique=lora", "start=wanda", "variant=pruned", "train.lr=1e-2") if run(overrides, "technique=wanda") else None
    assert lora and lora.test.accuracy >= 0.95
    with pytest.raises(UserError, match="start=full_low_rank is a cell of full_low_rank, which leaves no weights of the base's architecture"):
        run(overrides, "technique=lora", "start=full_low_rank")
