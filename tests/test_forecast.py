"""The forecast of a composed cell: without anything heavy, what it says when it cannot, the largest batch, time, and warnings."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline import forecast
from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.cell.identity import fingerprint
from pipeline.core.compose import ROOT, compose
from pipeline.core.files import UserError
from pipeline.forecasting import cell, speed
from pipeline.forecasting.plan import Plan
from pipeline.forecasting.shape import shape_of
from pipeline.forecasting.speed import Point
from pipeline.forecasting.text import warn, warning
from pipeline.forecasting.trained import Trained

GPU = "forecast.gpu_memory_gb=16"
SMALL = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 6, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
           "vocab_size": 49152, "tie_word_embeddings": True}


@pytest.fixture
def big(tmp_path):
    """Overrides for a model that is not prepared."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return [f"forecast.model_config={tmp_path / 'config.json'}", f"paths.data={tmp_path}/no", f"paths.work={tmp_path}/work", GPU]


def forecast_of(overrides, *more, **options):
    return cell.forecast(compose([*overrides, *more]), **options)


def test_nothing_heavy_is_imported_and_the_entry_prints_bytes_and_a_verdict(overrides, big):
    code = "import sys; from pipeline.forecast import main; code = main(sys.argv[1:]); " \
           "print([m for m in ('torch', 'transformers', 'peft', 'numpy', 'datasets') if m in sys.modules], code)"
    done = subprocess.run([sys.executable, "-c", code, *overrides, "technique=lora", GPU], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stdout + done.stderr
    assert "optimiser states" in done.stdout and "fits; the largest batch in one pass is" in done.stdout


def test_the_rows_are_the_cells_own(overrides):
    actual = forecast_of(overrides, "technique=lora", "train_rows=32", "train.batch_size=8", GPU)
    result = cell_run.run(compose([*overrides, "technique=lora", "train_rows=32", "train.batch_size=8"]), splits=("validation",))
    assert result.work.steps == actual.steps and result.work.tokens == round(actual.steps * actual.step_tokens)
    assert result.size.trainable == actual.trainable and "training rows of" in actual.rows_from


def test_parts_add_up_and_double_bytes_in_full_precision(big):
    bf16, fp32 = (forecast_of(big, "technique=full", f"precision={p}", "train.engine=eager") for p in ("bf16", "fp32"))
    for actual in (bf16, fp32):
        assert sum(actual.memory.parts.values()) == actual.memory.total and actual.fits is True
        assert actual.memory.parts["optimiser"] >= 8 * actual.trainable and actual.trainable == actual.parameters == shape_of(SMALL).parameters
    assert fp32.memory.parts["activations"] > 1.4 * bf16.memory.parts["activations"]
    assert "train.max_length=512" in bf16.rows_from


def test_on_a_cpu_a_rounded_base_keeps_its_file_resident_where_the_embedding_is_a_part_of_it(tmp_path, big):
    overrides = [o for o in big if o != GPU]
    stored = {}
    for dtype in ("float32", "bfloat16"):
        (tmp_path / "config.json").write_text(json.dumps({**SMALL, "dtype": dtype}))
        stored[dtype] = forecast_of(overrides, "technique=qlora", "device=cpu", batches=False).memory.parts["weights"]
    shape = shape_of(SMALL)
    assert stored["float32"] - stored["bfloat16"] == 4 * shape.layers * shape.layer_matrices


def test_more_tokens_take_more_and_checkpointing_less(big):
    common = ["technique=lora", "train.engine=eager", "forecast.length=511", "train.batch_size=16"]
    small, large, again = (forecast_of(big, *common, *more, batches=False).memory.parts["activations"] for more in (
        ["train.micro_batch_tokens=2048"], ["train.micro_batch_tokens=8192"], ["train.micro_batch_tokens=8192", "train.checkpointing=true"]))
    assert 3.5 * small < large < 4.5 * small and again < 0.5 * large


def test_four_bits_hold_less_than_eight_than_sixteen(big):
    nf4, int8, bf16 = (forecast_of(big, "technique=lora", f"precision={p}", "train.engine=eager", batches=False).memory for p in ("nf4", "int8", "bf16"))
    assert nf4.parts["weights"] < int8.parts["weights"] < bf16.parts["weights"]


def test_the_largest_batch_fits_and_a_larger_one_does_not(big):
    common = ["technique=lora", "forecast.length=256"]
    most = forecast_of(big, *common).largest_batch
    for rows, fits in ((most, True), (most * 5 // 4, False)):
        size = [f"train.batch_size={rows}", f"train.micro_batch_tokens={rows * 264}", f"train_rows={rows}"]
        assert forecast_of(big, *common, *size, batches=False).fits is fits
    assert forecast_of(big[:-1], *common, "forecast.gpu_memory_gb=0.25").largest_batch == 0


@pytest.mark.parametrize(("more", "reason"), [
    (["technique=zero_shot"], "trains nothing"), (["technique=dora"], "no forecast of memory for method dora"),
    (["technique=prefix_tuning"], "method prefix_tuning"), (["technique=bitfit"], "finds nothing to train"),
])
def test_what_is_not_known_is_said(big, more, reason, capsys):
    actual = forecast_of(big, *more)
    assert actual.memory is None and reason in actual.reason and warning(actual) is None
    assert forecast.main([*big, *more]) == 0 and reason in capsys.readouterr().out


def test_bad_input_is_one_sentence(overrides, big, tmp_path, capsys):
    assert forecast.main([*big, "forecast.gpu_memory=16"]) == 2 and "gpu_memory_gb" in capsys.readouterr().err
    assert forecast.main([*overrides, f"paths.models={tmp_path}/none", GPU]) == 2 and "forecast.model_config" in capsys.readouterr().err


def test_a_model_that_is_not_here_is_forecast_by_its_known_shape(big, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["technique=lora", "model=hub", "model.source.repository=Qwen/Qwen3-8B", f"paths.models={tmp_path}/none", *big[1:]]
    assert forecast.main([*words, "forecast.gpu_memory_gb=80"]) == 0
    said = capsys.readouterr().out
    assert "ships with alignscope" in said and "8,190,735,360 parameters" in said and "fits; the largest batch" in said
    assert forecast.main([*words, "forecast.gpu_memory_gb=24"]) == 0 and "gives back what it holds unused" in capsys.readouterr().out


def test_a_setting_of_the_method_that_is_none_is_named(big, capsys):
    assert forecast.main([*big, "technique=lora", "++method.config.target_modules=5"]) == 2
    assert "config key 'method.config.target_modules' is 5; it takes" in capsys.readouterr().err


def test_what_will_not_fit_is_told_once_a_technique_and_nothing_is_refused(big, capsys):
    small = [*big[:-1], "forecast.gpu_memory_gb=1", "technique=full"]
    warn(compose([*small, f"seed={seed}"]) for seed in (0, 1))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "full needs" in lines[0] and "[full, all rows]" in lines[0]
    warn([compose([*big, "technique=lora"]), compose([*big, "technique=zero_shot"])])
    assert capsys.readouterr().err == ""


def test_a_forecast_decides_no_outcome_and_neither_does_checkpointing_that_is_off(overrides):
    plain = fingerprint(compose([*overrides, "technique=lora"]))
    assert fingerprint(compose([*overrides, "technique=lora", GPU])) == plain
    assert "checkpointing" not in identity.decides(compose([*overrides]))["train"]
    assert fingerprint(compose([*overrides, "technique=lora", "train.checkpointing=true"])) != plain


@pytest.mark.parametrize("technique", ["lora", "full"])
def test_checkpointed_activations_leave_every_loss_as_it_is(overrides, technique):
    common = [f"technique={technique}", "train.steps=4", "train.engine=eager", *(["method.config.lora_dropout=0.3"] if technique == "lora" else [])]
    plain, again = (cell_run.run(compose([*overrides, *common, f"train.checkpointing={c}"]), splits=("validation",)) for c in ("false", "true"))
    assert [h["loss"] for h in plain.history] == [h["loss"] for h in again.history]


def test_the_fast_engine_leaves_checkpointing_to_the_eager_one(overrides):
    result = cell_run.run(compose([*overrides, "technique=lora", "train.steps=1", "train.engine=fast", "train.checkpointing=true"]), splits=("validation",))
    assert (result.work.engine, result.work.engine_reason) == ("eager", "activations are checkpointed")


# time

PLAN = Plan(shape_of(SMALL), Trained("lora", 1, "lora"), "fp32", 4, [], "eager", fed=((100, 3), (200, 1)), looked=2)
POINTS = [Point(layers, count, (0.1 + layers * 0.01 + count * 0.001 + layers * count * 1e-4,) * 8) for layers in (1, 3) for count in (50, 200)]


def test_a_step_linear_in_layers_and_cells_is_told_exactly():
    assert speed.seconds(POINTS, 30, 120) == pytest.approx(0.1 + 0.3 + 0.12 + 30 * 120 * 1e-4)
    low, middle, high = speed.train_seconds(PLAN, 10, POINTS)
    each = [speed.seconds(POINTS, PLAN.shape.layers, count) for count in (100, 200)]
    assert middle == pytest.approx(10 * (3 * each[0] + each[1]) / 2)
    assert high / middle == pytest.approx(1 + speed.MODEL_ERROR) and middle / low == pytest.approx(1 + speed.MODEL_ERROR)


def test_noisy_steps_widen_the_interval():
    noisy = [Point(p.layers, p.cells, tuple(s * (1 + 0.2 * (-1) ** i) for i, s in enumerate(p.seconds))) for p in POINTS]
    _, middle, high = speed.train_seconds(PLAN, 1, noisy)
    assert high / middle > 1.2


def test_a_calibration_is_kept_by_machine_versions_and_work(tmp_path):
    path = speed.file_of(tmp_path)
    assert speed.known(path, "a card", PLAN) == []
    speed.keep(path, "a card", PLAN, POINTS, "2026-11-23")
    assert speed.known(path, "a card", PLAN) == POINTS and speed.known(path, "another", PLAN) == []
    path.write_text("{")
    assert speed.known(path, "a card", PLAN) == []


@pytest.mark.slow
def test_a_calibration_tells_a_time_from_then_on(overrides, capsys):
    common = [*overrides, "technique=lora", "train_rows=32", "train.batch_size=8"]
    assert forecast_of(common).train_s is None and "calibrate=true" in forecast_of(common).time_from
    assert forecast.main([*common, "forecast.calibrate=true"]) == 0 and "training takes about" in capsys.readouterr().out
    low, middle, high = forecast_of(common).train_s
    assert 0 < low < middle < high
    with pytest.raises(UserError, match="cannot be timed"):
        cell.calibrate(compose([*common, "technique=loftq", "precision=nf4"]))
