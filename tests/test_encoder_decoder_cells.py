"""Cells on a base whose prompt an encoder reads: techniques beside those of tests/test_architectures.py learn, ranks share a step, the paper's experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import LEARN, ROWS, write_model
from conftest import write_rationales, write_task
from safetensors.torch import load_file

from pipeline import plan, prepare, rationales, train
from pipeline.cell import identity, preflight
from pipeline.cell import run as cell_run
from pipeline.cell.grid import grid, grid_overrides
from pipeline.core.compose import build, compose
from pipeline.core.files import read_json, read_jsonl, write_json, write_jsonl
from pipeline.core.settings import read as read_settings
from pipeline.records.results import read
from pipeline.serving import artefact

PAPER = "hsieh2023"


@pytest.fixture(scope="module")
def t5(tiny, tmp_path_factory) -> Path:
    """A folder of data/, rationales/ and models/t5, of the paper's shape (v1.1)."""
    root = tmp_path_factory.mktemp("t5")
    write_model("t5-v1_1", tiny / "models" / "smollm2_135m", root / "models" / "t5")
    write_json(root / "models" / "t5" / "manifest.json", {"name": "t5", "sha256": "t5"})
    write_task(root / "data" / "vader_movies", train=ROWS)
    write_rationales(root / "rationales" / "vader_movies" / "lexicon", root / "data" / "vader_movies")
    taught = read_jsonl(root / "rationales" / "vader_movies" / "lexicon" / "rationales.jsonl")
    right = {row["id"]: row["answer"] for split in ("train", "validation", "test") for row in read_jsonl(root / "data" / "vader_movies" / f"{split}.jsonl")}
    write_jsonl(root / "right" / "vader_movies" / "lexicon" / "rationales.jsonl", [{**row, "answer": right[row["id"]], "correct": True} for row in taught])
    about = {"teacher": "lexicon", "task": "vader_movies", "rows": len(taught), "seconds": 0.5}
    write_json(root / "right" / "vader_movies" / "lexicon" / "manifest.json", about)
    return root


@pytest.fixture
def words(overrides, t5) -> list[str]:
    own = ("paths.data=", "paths.models=", "paths.rationales=", "model=")
    places = [f"paths.{folder}={t5}/{folder}" for folder in ("data", "models", "rationales")]
    return [*(o for o in overrides if not o.startswith(own)), *places, "model=local", "model.name=t5", f"model.source.path={t5}/models/t5"]


@pytest.mark.parametrize(("technique", "more"), [
    pytest.param("full", ["train.lr=3e-3"], marks=pytest.mark.slow),
    pytest.param("task_distillation", ["train.lr=3e-3", "paths.rationales=RIGHT"], marks=pytest.mark.slow),
    pytest.param("step_by_step_prefixed", ["train.lr=3e-3", "objective.predict_prefix=film ", "objective.explain_prefix=plot "], marks=pytest.mark.slow),
    pytest.param("adapter_pfeiffer", ["train.lr=1e-2"], marks=pytest.mark.slow),
    pytest.param("adapter_parallel", ["train.lr=1e-2"], marks=pytest.mark.slow),
    pytest.param("compacter", ["train.lr=1e-2", "method.width=16"], marks=pytest.mark.slow),
    pytest.param("adamix", ["train.lr=1e-2", "train.epochs=20"], marks=pytest.mark.slow),
    pytest.param("step_by_step_qlora", ["train.lr=1e-2"], marks=pytest.mark.slow),
    pytest.param("rationale_first", ["train.lr=3e-3", "objective.max_new_tokens=8"], marks=pytest.mark.slow),
    pytest.param("orpo", ["train.lr=3e-3"], marks=pytest.mark.slow),
    pytest.param("kto", ["train.lr=1e-2"], marks=pytest.mark.slow),
    pytest.param("warp", ["train.lr=0.1", "train.epochs=10"], marks=pytest.mark.slow),
    pytest.param("head_only", ["train.lr=3e-2", "train.epochs=10"], marks=pytest.mark.slow),
    pytest.param("frozen_embeddings", ["train.lr=3e-3"], marks=pytest.mark.slow),
])
def test_a_technique_learns_and_its_artefact_answers_alike(words, t5, technique, more):
    more = [word.replace("RIGHT", f"{t5}/right") for word in more]  # the other teacher is wrong on every fourth row, which would be learnt
    cfg = compose([*words, *LEARN, f"technique={technique}", *more, "precision=fp32" if "qlora" not in technique else "precision=nf4"])
    result = cell_run.run(cfg, folder=identity.folder_of(cfg))
    assert result.status == "ok" and result.test.accuracy >= 0.95
    held = [p["prediction"] for p in read_jsonl(identity.folder_of(cfg) / "predictions.jsonl") if p["split"] == "test"]
    again, _ = artefact.score_artefact(cfg, identity.folder_of(cfg) / "artefact", "test")
    assert [p["prediction"] for p in again] == held


@pytest.mark.slow
@pytest.mark.parametrize(("technique", "way"), [("lora", "ddp"), ("full", "fsdp"), ("step_by_step", "ddp")])
@pytest.mark.usefixtures("imports")
def test_two_ranks_train_what_one_process_does(words, technique, way):
    losses, weights = [], []
    for parallel in ([], [f"train.parallel={way}", "train.gpus=2"]):
        mine = [*words, f"technique={technique}", "train.lr=1e-3", "train.epochs=1", "train.batch_size=6", "train_rows=32", "train.micro_batch_tokens=60",
                "train.validations=0", "precision=fp32", "evaluate.latency_rows=0", f"experiment=ranks{len(parallel)}"]
        assert train.main(mine) == 0
        folder = identity.folder_of(compose(mine))
        losses.append([h["loss"] for h in read(folder).history])
        weights.append({k: v for file in sorted((folder / "artefact").glob("*.safetensors")) for k, v in load_file(file).items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-4)


# the paper's experiment


def test_the_papers_cells_are_planned(tmp_path):
    assert plan.main([f"experiments={PAPER}", f"paths.plans={tmp_path}"]) == 0
    cells = grid(PAPER)["grid"]
    planned = sorted(p.stem for p in (tmp_path / PAPER).glob("*.json") if p.stem != "code")
    assert planned == sorted(f"{technique}-s{seed}-n8741" for technique in cells["techniques"] for seed in cells["seeds"])


def test_the_papers_settings_are_those_of_its_code():
    """google-research/distilling-step-by-step, run.py and train_utils.py at 4be900a."""
    for overrides in grid_overrides([f"experiments={PAPER}", "seed=0"]):
        cfg = compose(overrides)
        settings = read_settings(cfg)
        made = settings.train
        assert (made.lr, made.batch_size, made.steps, made.max_length, made.optimizer, made.schedule) == (5e-5, 64, 10000, 1024, "adamw", "linear")
        assert (made.warmup_share, made.weight_decay, made.validations) == (0, 0, 0) and settings.precision.name == "fp32"
        assert cfg.model.source.repository == "google/t5-v1_1-base" and settings.task.max_new_tokens == 64 and settings.task.metric == "exact_match"
    objective = build(compose([f"experiments={PAPER}", "technique=step_by_step_prefixed"]).objective, "objective")
    assert (objective.rationale_weight, objective.predict_prefix, objective.explain_prefix) == (1.0, "predict: ", "explain: ")
    assert made.max_grad_norm == 2, "theirs is 1, of half the loss"


@pytest.fixture
def paper(overrides, t5, tmp_path) -> list[str]:
    """Overrides of the paper's experiment with the tiny model and rows like its own."""
    rows = [{"id": str(i), "question": f"the film and a plot {'fine' if i % 2 else 'poor'}", "choices": ["film", "plot", "cast", "story", "scene"],
             "answer": "film" if i % 2 else "cast", "teacher_rationale": "The words are positive.", "teacher_answer": "film"} for i in range(80)]
    for number, row in enumerate(rows):
        row["question"] += " the" * number
    for name, part in (("train", rows[:64]), ("validation", rows[64:72]), ("test", rows[72:])):
        write_jsonl(tmp_path / "cqa" / f"{name}.jsonl", part)
    own = ("paths.data=", "paths.models=", "paths.rationales=", "model=", "model.", "task=", "teacher=")
    kept = [o for o in overrides if not o.startswith(own)]
    places = [f"paths.data={tmp_path}/data", f"paths.rationales={tmp_path}/rationales", f"paths.models={t5}/models"]
    return [*kept, *places, f"experiments={PAPER}", f"task.source.folder={tmp_path}/cqa", "model.name=t5"]


@pytest.mark.slow
def test_the_papers_experiment_runs_on_a_random_model(paper, tmp_path):
    assert prepare.main([*paper, "technique=full"]) == 0
    row = read_jsonl(tmp_path / "data" / "cqa_written" / "train.jsonl")[0]
    assert row["prompt"].endswith("\nAnswer Choices:\n(a) film\n(b) plot\n(c) cast\n(d) story\n(e) scene")
    assert rationales.main([*paper, "technique=full"]) == 0
    short = ["train.steps=3", "train.batch_size=8", "train_rows=16", "evaluate.test_rows=4", "task.max_new_tokens=8"]
    for technique in grid(PAPER)["grid"]["techniques"]:
        cfg = compose([*paper, *short, f"technique={technique}"])
        result = cell_run.run(cfg, folder=identity.folder_of(cfg))
        assert result.status == "ok" and len(result.history) == 3 and result.precision == "fp32"
        assert result.history[1]["lr"] == pytest.approx(5e-5 * 2 / 3), "falls linearly from the first step"
    last: Any = read_json(identity.folder_of(cfg) / "result.json")
    assert last["hyperparameters"]["rationale_weight"] == 1.0
    found = list(preflight.findings([cfg], preflight.Shared()))
    assert [f.check for f in found if not f.ok] in ([], ["tokenizer"]), "a vocabulary of 31 words has no letters for ( and )"
