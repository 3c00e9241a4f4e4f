"""One cell from config to files, on a tiny model: known answers of training, saving, loading and scoring."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from pipeline.cell import run as cell_run
from pipeline.core.compose import compose
from pipeline.core.files import read_jsonl, write_jsonl
from pipeline.records.results import Result, read
from pipeline.serving import artefact as evaluate

LEARN = ["train.epochs=12", "train.batch_size=8", "train.validations=4"]
RATES = {"full": 3e-3, "lora": 1e-2, "qlora": 1e-2, "prompt_tuning": 0.1, "step_by_step": 3e-3}
EPOCHS = {"prompt_tuning": 30}


def run(overrides: list[str], *more: str, folder: Path | None = None) -> Result:
    return cell_run.run(compose([*overrides, *more]), folder=folder)


@pytest.mark.parametrize("technique", [pytest.param(t, marks=pytest.mark.slow) if t in EPOCHS else t for t in RATES])
def test_a_separable_task_is_learnt(overrides, technique):
    result = run(overrides, f"technique={technique}", f"train.lr={RATES[technique]}", *LEARN, f"train.epochs={EPOCHS.get(technique, 12)}")
    assert result.status == "ok"
    assert result.test.accuracy >= 0.95, result.history[-3:]


def test_shuffled_labels_give_chance(overrides, tiny, tmp_path):
    data = tmp_path / "shuffled" / "vader_movies"
    shutil.copytree(tiny / "data" / "vader_movies", data)
    for split in ("train", "validation", "test"):
        rows, rng = read_jsonl(data / f"{split}.jsonl"), random.Random(7)
        answers = rng.sample([r["answer"] for r in rows], len(rows))
        write_jsonl(data / f"{split}.jsonl", [{**r, "answer": a} for r, a in zip(rows, answers, strict=True)])
    result = run([*overrides, f"paths.data={data.parent}"], "technique=full", "train.lr=3e-3", *LEARN)
    assert result.test.accuracy_low < 0.5 < result.test.accuracy_high


def test_an_untrained_lora_is_the_base(overrides, tmp_path):
    """B = 0: through train (0 steps), save, load and evaluate, nothing may change, and nothing is forgotten."""
    write_jsonl(tmp_path / "lambada.jsonl", [{"text": "the cast of the film was fine"}, {"context": "the story with the plot", "continuation": "awful"}])
    probing = ["evaluate.forgetting=true", "evaluate.probe_pairs=20", "evaluate.probe_texts=5", "evaluate.probe_lambada=2",
               f"paths.lambada={tmp_path}/lambada.jsonl"]
    base = run(overrides, "technique=zero_shot", *probing, folder=tmp_path / "base")
    lora = run(overrides, "technique=lora", "train.steps=0", *probing, folder=tmp_path / "lora")
    stored = read_jsonl(tmp_path / "base" / "predictions.jsonl")
    assert read_jsonl(tmp_path / "lora" / "predictions.jsonl") == stored
    assert lora.forgetting == base.forgetting
    for probe in ("perplexity", "pairs", "lambada", "lambada_perplexity"):
        assert getattr(lora.forgetting, probe) == getattr(lora.forgetting, f"{probe}_base") is not None
    assert lora.work.steps == 0 and lora.phases.train_s < 0.5
    cfg = compose([*overrides, "technique=lora", "train.steps=0"])
    loaded, _ = evaluate.score_artefact(cfg, tmp_path / "lora" / "artefact", "test")
    assert loaded == [p for p in stored if p["split"] == "test"]


def test_the_files_of_a_cell(overrides, tmp_path):
    result = run(overrides, "technique=lora", "train.steps=3", folder=tmp_path / "cell")
    assert read(tmp_path / "cell") == result
    assert {p.name for p in (tmp_path / "cell").iterdir()} == {"result.json", "predictions.jsonl", "history.csv", "artefact"}
    splits = [p["split"] for p in read_jsonl(tmp_path / "cell" / "predictions.jsonl")]
    assert splits.count("test") == result.test.rows == 48
    assert splits.count("validation") == result.validation_rows == int(0.2 * 64)
    lines = (tmp_path / "cell" / "history.csv").read_text().splitlines()
    assert lines[0].startswith("step,loss,lr") and len(lines) == 4
    weights = tmp_path / "cell" / "artefact" / "adapter_model.safetensors"
    assert weights.stat().st_size < result.size.artefact_bytes < 2 * weights.stat().st_size + 20_000
    assert not list((tmp_path / "work").rglob("*.pt")), "a finished cell keeps no checkpoint"


def test_test_rows_are_not_read_for_a_sweep(overrides):
    result = cell_run.run(compose([*overrides, "technique=lora", "train.steps=2"]), splits=("validation",))
    assert set(result.scores) == {"validation"}
    assert result.inference is None and result.memory.peak_bytes > 0


def test_the_best_validated_weights_are_served(overrides, tmp_path):
    """A learning rate that wrecks the model late: the validation score served is the best one seen."""
    result = run(overrides, "technique=full", "train.lr=3e-2", "train.schedule=constant", "train.epochs=6", "train.batch_size=8", "train.validations=6")
    seen = [h["validation_metric"] for h in result.history if "validation_metric" in h]
    assert len(seen) == 6
    assert result.scores["validation"].accuracy == max(seen)


def test_the_teacher_is_a_row(overrides, tmp_path):
    result = run(overrides, "technique=teacher", folder=tmp_path / "cell")
    assert result.test.accuracy == pytest.approx(0.75)
    assert result.teacher.name == "lexicon" and result.teacher.seconds == 0.5
    assert result.size.trainable == 0 and result.memory.peak_bytes is None


def test_few_shot_prompts_hold_k_balanced_demonstrations(overrides, tmp_path):
    run(overrides, "technique=few_shot", "method.k=4", folder=tmp_path / "cell")
    shots = read_jsonl(tmp_path / "cell" / "artefact" / "demonstrations.jsonl")
    assert sorted(s["answer"] for s in shots) == ["negative", "negative", "positive", "positive"]
    train = {r["prompt"] for r in read_jsonl(Path(compose(overrides).paths.data) / "vader_movies" / "train.jsonl")}
    assert {s["prompt"] for s in shots} <= train


def test_out_of_memory_is_a_result(overrides, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("pipeline.training.stepping.Eager.step", full)
    result = run(overrides, "technique=lora", folder=tmp_path / "cell")
    assert result.status == "oom" and "out of memory" in result.error
    assert read(tmp_path / "cell").status == "oom" and (tmp_path / "cell" / "artefact").is_dir()


def test_other_errors_are_not_swallowed(overrides, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr("pipeline.training.stepping.Eager.step", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        run(overrides, "technique=lora", folder=tmp_path / "cell")
    assert not (tmp_path / "cell" / "result.json").exists()


def test_results_hold_what_is_needed_to_run_again(overrides):
    result = run(overrides, "technique=zero_shot")
    assert result.config["technique"]["name"] == "zero_shot"
    assert json.dumps(result.config)
    assert {"torch", "transformers"} <= set(result.provenance["packages"])
    assert result.provenance["data_sha256"] and result.provenance["model_sha256"]
