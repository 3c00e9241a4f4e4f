"""What only a CUDA device shows: python -m pytest -m gpu tests/test_gpu.py"""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline import cell
from pipeline.config import ROOT, compose

pytestmark = pytest.mark.gpu


def on_gpu(overrides: list[str], *more: str) -> list[str]:
    return [*(o for o in overrides if o != "device=cpu"), "device=cuda", *more]


@pytest.mark.parametrize("technique", ["full", "lora", "qlora", "prompt_tuning", "step_by_step"])
def test_a_technique_trains_on_the_gpu(overrides, tmp_path, technique):
    result = cell.run(compose(on_gpu(overrides, f"technique={technique}", "train.steps=12")), folder=tmp_path / "cell")
    assert result.status == "ok"
    assert result.precision == ("nf4" if technique == "qlora" else "bf16")
    assert result.memory.kind == "gpu_reserved" and result.memory.peak_bytes >= result.memory.peak_allocated_bytes > 0
    assert result.hardware["gpu"] and len(result.history) == 12
    assert not any("plain AdamW" in note for note in result.notes), "the paged optimiser runs on a GPU"


def test_a_real_out_of_memory_is_a_row(overrides, tmp_path):
    import torch

    torch.cuda.set_per_process_memory_fraction(0.0005)
    try:
        result = cell.run(compose(on_gpu(overrides, "technique=full", "train.batch_size=64", "train.micro_batch_tokens=1000000")), folder=tmp_path / "cell")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.status == "oom" and "out of memory" in result.error
    assert result.hardware["gpu_memory_bytes"]


def test_an_untrained_lora_is_the_base_on_the_gpu(overrides, tmp_path):
    probing = ["evaluate.forgetting=true", "evaluate.probe_pairs=20", "evaluate.probe_texts=5"]
    result = cell.run(compose(on_gpu(overrides, "technique=lora", "train.steps=0", *probing)), folder=tmp_path / "cell")
    assert result.forgetting.perplexity == result.forgetting.perplexity_base
    assert result.forgetting.pairs == result.forgetting.pairs_base


@pytest.mark.parametrize(("technique", "way"), [
    ("full", "hand-written"), ("lora", "hand-written"), ("qlora", "hand-written"), ("step_by_step", "hand-written"),
    ("prompt_tuning train.lr=1e-2", "hand-written"),
    ("lora method.config.use_dora=true", "autograd"), ("lora method.config.lora_dropout=0.1", "hand-written"),
])
def test_captured_steps_are_the_eager_ones(overrides, tmp_path, technique, way):
    name, *more = technique.split()
    words = [f"technique={name}", *more, "train.batch_size=8", "train.steps=16", "train.validations=2"]
    eager, fast = (cell.run(compose(on_gpu(overrides, *words, f"train.engine={engine}")), folder=tmp_path / engine) for engine in ("eager", "auto"))
    assert any(note.startswith("engine:") and way in note and "captured" in note for note in fast.notes), fast.notes
    losses = [[h["loss"] for h in result.history] for result in (eager, fast)]
    tolerance = 0.3 if "dropout" in technique else 0.03  # other noise
    assert losses[1] == pytest.approx(losses[0], rel=tolerance, abs=tolerance)
    assert fast.phases.warmup_s > 0 and fast.memory.peak_bytes > 0


def test_a_packed_sweep_agrees_with_one_trial_after_another(overrides, tmp_path):
    """In bf16: validation within what another order of sums moves, and no slot without an answer."""
    import csv

    from pipeline import sweep

    words = [*on_gpu(overrides, "technique=lora", "experiment=tried", "train_rows=64", "train.batch_size=8", "train.epochs=6", "train.lr=0.01", "precision=bf16"),
             "sweep.space={method.config.r: {choices: [1, 2, 4, 8]}}", "sweep.confirm=false"]
    found = {}
    for executor in ("packed", "sequential"):
        # a process of its own: the sweep forks, which a process that has used the GPU cannot
        command = [sys.executable, "-m", "pipeline.sweep", *words, f"sweep.executor={executor}", "sweep.slots=3", f"paths.sweeps={tmp_path}/{executor}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with open(tmp_path / executor / "tried/lora/trials.csv", newline="") as lines:
            found[executor] = {row["method.config.r"]: row for row in csv.DictReader(lines)}
    assert {row["packed"] for row in found["packed"].values()} == {"True"} and {row["slots"] for row in found["packed"].values()} == {"3"}
    for rank, row in found["packed"].items():
        assert float(row["validation"]) == pytest.approx(float(found["sequential"][rank]["validation"]), abs=0.1), rank
