"""One cell from config to files, on a tiny model: known answers of training, saving, loading and scoring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import cell
from pipeline.config import compose
from pipeline.results import Result, read

LEARN = ["train.epochs=12", "train.batch_size=8", "train.schedule=constant"]
RATES = {"full": 3e-3, "lora": 2e-2, "qlora": 2e-2, "prompt_tuning": 0.3, "step_by_step": 3e-3}


def run(overrides: list[str], *more: str, folder: Path | None = None) -> Result:
    return cell.run(compose([*overrides, *more]), folder=folder)


@pytest.mark.parametrize("technique", RATES)
def test_a_separable_task_is_learnt(overrides, technique):
    result = run(overrides, f"technique={technique}", f"train.lr={RATES[technique]}", *LEARN)
    assert result.status == "ok"
    assert result.test.accuracy >= 0.95, result.history[-3:]
