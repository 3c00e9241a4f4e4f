"""The forecast of memory on each of several GPUs (train.parallel): parts of the model, a part of the rows, what is measured where there is no GPU."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import parallel
from pipeline.core.settings import Precision, Train
from pipeline.forecasting import memory
from pipeline.forecasting.plan import Constants, equal_rows, training_plan
from pipeline.forecasting.shape import Shape
from pipeline.forecasting.trained import trained

SHAPE = Shape(2048, 16, 32, 8, 64, 8192, 128256, stored=2)
LORA = {"type": "peft_adapter", "config": {"type": "LoraConfig", "task_type": "CAUSAL_LM", "r": 16, "target_modules": "all-linear"}}
NONE = Constants()


def planned(method, way, ranks, rows_a_gpu=2, **more):
    train = Train(1e-3, 1, rows_a_gpu * ranks, 2 * 2056, parallel=way, padding_free="never", **more)
    rows = equal_rows(rows_a_gpu * ranks, 2048, 2048)
    return training_plan(SHAPE, trained(method, SHAPE), train, Precision("bf16"), rows, 0, 2, True, ranks)


def peak(*args, **more):
    return memory.forecast(planned(*args, **more), NONE)


def test_weights_moments_and_gradients_lie_in_parts():
    numbers = SHAPE.parameters
    alone, two, eight = (peak({"type": "full"}, "fsdp", n) for n in (1, 2, 8))
    for forecast, n in ((alone, 1), (two, 2), (eight, 8)):
        assert forecast.parts["optimiser"] == pytest.approx(8 * numbers / n, rel=0.01)
        assert forecast.total > 16 * numbers / n
    assert two.parts["activations"] == pytest.approx(alone.parts["activations"], rel=0.01), "each GPU has as many rows as before"
    assert alone.total - two.total == pytest.approx(16 * numbers / 2, rel=0.15)


def test_with_ddp_each_gpu_has_what_one_has_and_room_for_sums():
    alone, two = (peak(LORA, "ddp", n) for n in (1, 2))
    count = trained(LORA, SHAPE).count
    assert two.total - alone.total == pytest.approx(4 * count, abs=8 * 2**20)
    assert planned({"type": "full"}, "ddp", 2).accumulates is False, "of so many numbers gradients are summed as they are"
    eager = [peak(LORA, "ddp", n, engine="eager").total for n in (1, 2)]
    assert eager[0] <= eager[1] <= eager[0] + 5 * count


def test_a_card_must_hold_what_the_first_gpu_answers_with():
    """Where many GPUs share the training, the whole model in 16 bits that validation needs is the larger part."""
    plan = planned({"type": "full"}, "fsdp", 8)
    answers = 12 * SHAPE.parameters // 8 + 2 * SHAPE.parameters + NONE.outside(plan)
    enough = max(answers, memory.forecast(plan, NONE).total + NONE.outside(plan))
    assert memory.fits(plan, NONE, enough + 2**20) and not memory.fits(plan, NONE, answers - 2**20)
    assert NONE.outside(plan) == NONE.context + NONE.communication and NONE.outside(dataclasses.replace(plan, ranks=1)) == NONE.context


def test_full_fine_tuning_of_8b_fits_two_h200_and_not_one(tmp_path):
    setting = parallel.Setting(tmp_path / "x.jsonl", 2, "cuda", 2048)
    [case] = [c for c in parallel.CASES if c.name == "full-8b"]
    one, two = (parallel.forecast(case, setting, 2 * n, n) for n in (1, 2))
    assert two < 139 * 2**30 < one
