"""What is left of an adapter when it is merged into bf16, NF4 and int8: known answers at both ends, and what is told of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import evaluate
from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import compose
from pipeline.core.files import read_json, read_jsonl, sha256, write_json
from pipeline.serving import merging

SHORT = ["train_rows=16", "train.steps=8", "train.validations=0", "evaluate.latency_rows=0", "evaluate.test_rows=16", "precision=fp32"]


@pytest.fixture
def truth_of(overrides, tmp_path, capsys) -> Any:
    def measure(*words: str) -> tuple[dict[str, Any], Path]:
        cfg = compose([*overrides, *SHORT, *words])
        folder = identity.folder_of(cfg)
        cell_run.run(cfg, folder=folder)
        capsys.readouterr()
        asked = [*overrides, f"paths.evaluations={tmp_path}/evaluations", "evaluate.test_rows=16", f"cell={folder}", "split=merged"]
        assert evaluate.main(asked) == 0
        (file,) = (tmp_path / "evaluations").rglob("merged.json")
        return read_json(file), folder

    return measure


def test_a_merged_adapter_is_the_adapter_in_fp32_and_nearly_so_in_16_bits(truth_of):
    found, folder = truth_of("technique=lora", "train.lr=3e-2")
    own = [p["correct"] for p in read_jsonl(folder / "predictions.jsonl") if p["split"] == "test"]
    assert found["attached"] == pytest.approx(sum(own) / 16) and found["rows"] == 16 and found["effect"] > 0.1
    by = {one["precision"]: one for one in found["merged"]}
    assert list(by) == ["fp32", "bf16", "nf4", "int8"]
    assert by["fp32"]["drift"] < 1e-6 and by["fp32"]["change"] == 0 and by["fp32"]["effect"] == pytest.approx(found["effect"], rel=1e-3)
    assert 1e-9 < by["bf16"]["drift"] < by["nf4"]["drift"] and by["bf16"]["drift"] < 1e-2
    assert {one["verdict"] for one in found["merged"]} == {"kept"}


def test_an_adapter_smaller_than_rounding_is_told(truth_of, overrides, tiny, tmp_path):
    """Weights that are bf16's already, as most bases' are, and changes far below a 256th of them: in fp32 the adapter is there, elsewhere it is not."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny / "models", tmp_path / "models")
    folder = tmp_path / "models" / "smollm2_135m"
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().float().save_pretrained(folder)
    write_json(folder / "manifest.json", {"name": folder.name, "sha256": sha256(folder / "model.safetensors")})
    overrides.append(f"paths.models={tmp_path}/models")
    found, _ = truth_of("technique=lora", "train.lr=3e-6", "train.schedule=constant", "train.warmup_share=0")
    by = {one["precision"]: one for one in found["merged"]}
    assert found["effect"] > merging.NOTHING and by["fp32"]["verdict"] == "kept"
    assert by["bf16"]["verdict"] != "kept" and by["bf16"]["drift"] > found["effect"] > 10 * abs(by["fp32"]["drift"])
    assert by["nf4"]["verdict"] != "kept", "its steps are larger still"


@pytest.mark.parametrize(("effect", "own", "drift", "expected"), [
    (0.1, 0.1, 0.001, "kept"), (0.1, 0.009, 0.05, "rounded_away"), (0.1, 0.5, 0.2, "too_much"), (1e-7, 0.0, 0.5, "kept"), (0.1, 0.02, 0.09, "kept"),
    (0.1, 0.05, 0.11, "rounded_away"),
])
def test_what_is_told(effect, own, drift, expected):
    assert merging.verdict(effect, own, drift) == expected


def test_what_cannot_be_merged_is_refused_by_name(overrides, tmp_path, capsys):
    cfg = compose([*overrides, *SHORT, "technique=prompt_tuning"])
    cell_run.run(cfg, folder=identity.folder_of(cfg))
    assert evaluate.main([*overrides, f"cell={identity.folder_of(cfg)}", "split=merged"]) == 2
    assert "cannot be merged: its soft prompt comes before" in capsys.readouterr().err


def test_distributions_are_those_at_the_answers_tokens(tiny, overrides):
    from pipeline.serving.artefact import rows_of, scorer_of

    cfg = compose([*overrides, "technique=zero_shot", "precision=fp32"])
    scorer = scorer_of("zero_shot", None, cfg)
    rows = rows_of(cfg, "test")[:3]
    found = merging.distributions(scorer, rows)
    expected = []
    for row in sorted(rows, key=lambda r: len(scorer.encoder.prompt(r["prompt"]))):
        prompt, said = scorer.encoder.prompt(row["prompt"]), scorer.encoder.answer(row["answer"])
        expected.append(scorer.model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
    both = torch.cat(expected)
    assert found.shape == both.shape and torch.allclose(found.sum(0), both.sum(0), atol=1e-3)
