"""Seconds of a whole cell: the forecast of scoring against what was measured, and how a plan follows from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.core.compose import compose, plain
from pipeline.core.files import write_json
from pipeline.forecasting.cell import Card
from pipeline.forecasting.whole import CPU_SHARE, Machine, Need, Work, parameters_of, whole
from pipeline.intake import known_models
from pipeline.measure import speed

FLOPS = 101e9
"""Of one thread of the machine on which these were measured."""
BANK = Work(15.1, 3.9, 116.0, 0, 28, 0, 0, 24, 1, 77)
CHATS = Work(42.2, 1.0, 6.0, 0, 61, 0, 0, 24, 1, 6)
PAIRS = Work(21.1, 2.2, 4.4, 0, 60, 0, 0, 24, 1, 2)
MATHS = Work(48.0, 51.6, 0.0, 126, 170, 0, 0, 24, 1)
MEASURED = [
    ("77 labels", "zero_shot", BANK, 5.8), ("77 labels", "few_shot", BANK, 12.0), ("77 labels", "prompt_tuning", BANK, 7.7), ("77 labels", "lora", BANK, 7.1),
    ("six labels", "zero_shot", CHATS, 3.5), ("six labels", "few_shot", CHATS, 6.0), ("pairs", "zero_shot", PAIRS, 4.1),
    ("free text", "zero_shot", MATHS, 17.8), ("free text", "few_shot", MATHS, 54.2),
]
"""Seconds of one processor for 24 rows of SmolLM2-135M: `python -m benchmarks.scoring rows=24 banking:zero_shot …`, 2026-11-30, AMD EPYC, one thread of two
that others used, too."""


TRAINED = [("77 labels", "lora", BANK, 8.5), ("77 labels", "full", BANK, 15.6), ("77 labels", "prompt_tuning", BANK, 12.0),
           ("pairs", "dpo", PAIRS, 60.7), ("free text", "lora", dataclasses.replace(MATHS, answer=76.0), 39.9)]
"""Seconds of one processor of training on 48 rows once, in the same session."""


def needed(technique: str, tmp_path: Path, *words: str) -> Need:
    config = tmp_path / "config.json"
    write_json(config, known_models.models()["HuggingFaceTB/SmolLM2-135M"].config)
    return Need(technique, plain(compose([f"technique={technique}", *words])), parameters_of(config), None, None, "")


def forecast(technique: str, work: Work, tmp_path: Path) -> float:
    words = ["task.scoring=generate", "++task.stop=Question", "evaluate.batch_tokens=8192"] if work.new else []
    machine = Machine(Card(False, "one thread", 2**34), FLOPS * CPU_SHARE, "")
    return whole(needed(technique, tmp_path, *words), work, machine).score_s or 0.0


@pytest.mark.parametrize(("what", "technique", "work", "seconds"), MEASURED)
def test_scoring_is_forecast_within_a_factor_of_two(tmp_path, what, technique, work, seconds):
    assert 0.5 <= forecast(technique, work, tmp_path) / seconds <= 2


@pytest.mark.parametrize(("what", "technique", "work", "seconds"), TRAINED)
def test_training_is_forecast_within_a_factor_of_two(tmp_path, what, technique, work, seconds):
    machine = Machine(Card(False, "one thread", 2**34), FLOPS * CPU_SHARE, "")
    took = whole(needed(technique, tmp_path), dataclasses.replace(work, train_rows=48), machine).train_s
    assert took and 0.5 <= took / seconds <= 2


def test_more_rows_take_more_and_texts_that_end_take_less(tmp_path):
    once = forecast("zero_shot", MATHS, tmp_path)
    assert forecast("zero_shot", dataclasses.replace(MATHS, test_rows=48), tmp_path) == pytest.approx(2 * once, rel=0.4)
    machine = Machine(Card(False, "one thread", 2**34), FLOPS * CPU_SHARE, "")
    endless = whole(needed("zero_shot", tmp_path, "task.scoring=generate", "evaluate.batch_tokens=8192"), MATHS, machine).score_s
    assert endless and endless > 1.3 * once


def test_a_row_is_not_longer_than_what_is_fed_of_it(tmp_path):
    """Demonstrations of long texts are cut at train.max_length as the texts are."""
    long, longer = (dataclasses.replace(CHATS, prompt=p) for p in (500.0, 510.0))
    assert forecast("few_shot", longer, tmp_path) == pytest.approx(forecast("few_shot", long, tmp_path), rel=0.1)


def test_threads_are_those_that_torch_takes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert speed.threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "500")
    assert speed.threads() == speed.MOST_THREADS
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= speed.threads() <= speed.MOST_THREADS


def test_a_product_is_timed_by_its_median_and_counted_for_all_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    ticks = iter(range(10**6))
    assert speed.matmul_flops(lambda: float(next(ticks))) == 2 * speed.SIDE**3
    assert speed.matmul_flops() > 1e8
