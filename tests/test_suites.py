"""lm-evaluation-harness on a cell: a task of ours, written as one of that library's, scores row by row as the cell does; its own requests against plain
transformers; what is refused. Skipped where the library is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline import evaluate
from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import compose
from pipeline.core.files import UserError, read_json, read_jsonl
from pipeline.core.settings import Precision
from pipeline.models.base import load_model
from pipeline.records import evaluations, results
from pipeline.serving import suites
from pipeline.serving.artefact import Base

needs_library = pytest.mark.skipif("not __import__('importlib').util.find_spec('lm_eval')", reason="lm-eval is not installed; make installs it")
SHORT = ["train_rows=16", "train.steps=4", "train.validations=0", "train.lr=5e-2", "evaluate.latency_rows=0", "evaluate.test_rows=12"]
WRITTEN = ["task.scoring=generate", "+task.max_new_tokens=3", "variant=written"]


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    """Whoever asks the network fails."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture
def cell_of(overrides, tmp_path) -> Any:
    def make(*words: str) -> tuple[list[str], Path]:
        cfg = compose([*overrides, *SHORT, *words])
        cell_run.run(cfg, folder=identity.folder_of(cfg))
        folder = identity.folder_of(cfg)
        return [*overrides, f"paths.evaluations={tmp_path}/evaluations", "evaluate.test_rows=12", f"cell={folder}"], folder

    return make


def exported(words: list[str], folder: Path, tmp_path: Path) -> str:
    """The name of the cell's test split as a task of the library's."""
    assert evaluate.main([*words, "split=test", f"to={tmp_path}/tasks"]) == 0
    (path,) = (tmp_path / "tasks").glob("*.yaml")
    assert yaml.safe_load(path.read_text())["task"] == path.stem and folder.name in path.stem
    return path.stem


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("technique", [
    "lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("few_shot", "prompt_tuning", "step_by_step")),
])
def test_choices_score_as_the_cell_does_row_by_row(cell_of, tmp_path, technique):
    words, folder = cell_of(f"technique={technique}", "precision=fp32")
    name = exported(words, folder, tmp_path)
    if technique == "few_shot":  # its demonstrations stand in the exported prompts, so that the untouched base answers as it does
        words, _ = cell_of("technique=zero_shot", "precision=fp32")
    assert evaluate.main([*words, f"suite={name}", f"suite_path={tmp_path}/tasks"]) == 0
    (found,) = (tmp_path / "evaluations").rglob(f"{name}.jsonl")
    asked = {row["id"]: [float(one[0][0]) for one in row["resps"]] for row in read_jsonl(found)}
    own = {p["id"]: p for p in read_jsonl(folder / "predictions.jsonl") if p["split"] == "test"}
    assert asked.keys() == own.keys() and len(asked) == 12
    for row, values in asked.items():
        assert values == pytest.approx(list(own[row]["scores"].values()), abs=1e-4)
    metrics = read_json(found.with_suffix(".json"))["metrics"]
    assert metrics["acc"]["value"] == pytest.approx(sum(p["correct"] for p in own.values()) / 12)
    share = metrics["acc"]["value"]
    assert metrics["acc"]["stderr"] == pytest.approx((share * (1 - share) / 11) ** 0.5)
    if technique == "lora":
        assert evaluations.read(tmp_path / "evaluations", results.read(folder)).suites[name]["acc"].value == share, "the report finds what was written"
    assert (metrics["acc"]["change"] != 0 or metrics["acc"]["base"] == metrics["acc"]["value"]) and metrics["acc"]["base"] is not None


@needs_library
def test_texts_are_the_cells_own(cell_of, tmp_path):
    words, folder = cell_of("technique=lora", *WRITTEN)
    name = exported([*words, *WRITTEN], folder, tmp_path)
    assert evaluate.main([*words, f"suite={name}", f"suite_path={tmp_path}/tasks", "suite_rows=7"]) == 0
    (found,) = (tmp_path / "evaluations").rglob(f"{name}.jsonl")
    asked = {row["id"]: row["resps"][0][0] for row in read_jsonl(found)}
    own = {p["id"]: p["output"] for p in read_jsonl(folder / "predictions.jsonl") if p["split"] == "test"}
    assert len(asked) == 7 and asked == {row: own[row] for row in asked}


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_a_merged_adapter_scores_as_an_attached_one_and_the_base_is_asked_once(cell_of, tmp_path, monkeypatch, merged):
    words, folder = cell_of("technique=lora", "precision=fp32")
    name = exported(words, folder, tmp_path)
    counts: list[Any] = []
    inner = suites._asked
    monkeypatch.setattr(suites, "_asked", lambda base, model, *more: counts.append(hasattr(model, "peft_config")) or inner(base, model, *more))
    for _ in range(2):
        assert evaluate.main([*words, f"suite={name}", f"suite_path={tmp_path}/tasks", f"merged={str(merged).lower()}"]) == 0
    assert counts == [False, not merged, not merged]
    (found,) = (tmp_path / "evaluations").rglob(f"{name}.jsonl")
    own = {p["id"]: list(p["scores"].values()) for p in read_jsonl(folder / "predictions.jsonl") if p["split"] == "test"}
    for row in read_jsonl(found):
        assert [float(one[0][0]) for one in row["resps"]] == pytest.approx(own[row["id"]], abs=1e-4)


@pytest.fixture
def tiny_base(tiny) -> Base:
    folder = tiny / "models" / "smollm2_135m"
    from pipeline.models.base import load_tokenizer

    return Base(load_model(folder, Precision("fp32"), torch.device("cpu")), load_tokenizer(folder), torch.device("cpu"), torch.float32)


def test_log_likelihoods_are_those_of_one_row_at_a_time(tiny_base):
    pairs = [([5, 6, 7], [8, 9]), ([4], [10, 11, 12]), ([3, 4, 5, 6, 7, 8], [9])]
    expected = []
    for context, said in pairs:
        log_p = tiny_base.model(torch.tensor([context + said])).logits.log_softmax(-1)[0, len(context) - 1 : -1]
        expected.append((float(log_p.gather(1, torch.tensor(said)[:, None]).sum()), bool((log_p.argmax(-1) == torch.tensor(said)).all())))
    found = suites.log_likelihoods(tiny_base.model, pairs, 16, 1, tiny_base)
    assert [f for f, _ in found] == pytest.approx([e for e, _ in expected], abs=1e-5) and [g for _, g in found] == [g for _, g in expected]
    likely = int(tiny_base.model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    assert suites.log_likelihoods(tiny_base.model, [([5, 6, 7], [likely])], 16, 1, tiny_base)[0][1] is True


@needs_library
def test_a_whole_text_s_likelihood_and_stop_words(tiny_base):
    from types import SimpleNamespace as Request

    model = suites.language_model(tiny_base.model, tiny_base, 64)
    text = "the film was fine and lovely"
    ids = tiny_base.tokenizer(text)["input_ids"]
    log_p = tiny_base.model(torch.tensor([[1, *ids]])).logits.log_softmax(-1)[0, :-1]
    assert model.loglikelihood_rolling([Request(args=(text,))])[0] == pytest.approx(float(log_p.gather(1, torch.tensor(ids)[:, None]).sum()), abs=1e-4)
    said = model.generate_until([Request(args=(text, {"until": [], "max_gen_toks": 6}))])[0]
    word = said.split()[1]
    assert model.generate_until([Request(args=(text, {"until": [word], "max_gen_toks": 6}))])[0] == said.partition(word)[0]
    with pytest.raises(UserError, match="draws its answers"):
        model.generate_until([Request(args=(text, {"do_sample": True}))])


@needs_library
def test_what_a_suite_cannot_ask_is_one_sentence(cell_of, tmp_path, capsys):
    words, _ = cell_of("technique=lora")
    assert evaluate.main([*words, "suite=x", f"suite_path={tmp_path}/gone"]) == 2
    assert "is no folder; name one that holds task files" in capsys.readouterr().err
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/gone.jsonl"}}}  # a hub's would be asked for again and again
    far = {"task": "far", **data, "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "a", "doc_to_choice": ["b"], "doc_to_target": 0}
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "far.yaml").write_text(json.dumps(far))
    assert evaluate.main([*words, "suite=far", f"suite_path={tmp_path}/far"]) == 2
    assert "the data of suite=far are not to be had" in capsys.readouterr().err
    few, _ = cell_of("technique=few_shot")
    assert evaluate.main([*few, "suite=far", f"suite_path={tmp_path}/far"]) == 2
    assert "what it does is in the request" in capsys.readouterr().err
    assert evaluate.main([*few[:-1], words[-1], "suite=far", f"suite_path={tmp_path}/far", "merged=true"]) == 2


def test_without_the_library_the_sentence_says_how_to_get_it(cell_of, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    words, _ = cell_of("technique=lora")
    assert evaluate.main([*words, "suite=arc_easy"]) == 2
    assert "lm-evaluation-harness, which is not installed; run: .venv/bin/pip install 'lm-eval" in capsys.readouterr().err


@needs_library
@pytest.mark.slow
def test_the_library_s_own_model_scores_the_exported_one_alike(cell_of, tmp_path):
    """pipeline.export and the library's HFLM, without this project: the same log-likelihoods."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from pipeline import export

    words, folder = cell_of("technique=lora", "precision=fp32")
    name = exported(words, folder, tmp_path)
    assert export.main([*words, f"to={tmp_path}/plain"]) == 0
    model = HFLM(pretrained=str(tmp_path / "plain"), device="cpu", dtype="float32", batch_size=4)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    samples = simple_evaluate(model, tasks=[name], task_manager=manager, bootstrap_iters=0)["samples"][name]
    own = {p["id"]: list(p["scores"].values()) for p in read_jsonl(folder / "predictions.jsonl") if p["split"] == "test"}
    assert len(samples) == 12
    for sample in samples:
        assert [float(one[0][0]) for one in sample["resps"]] == pytest.approx(own[sample["doc"]["id"]], abs=1e-4)


@needs_library
@pytest.mark.slow
def test_a_task_of_nobody_is_refused_with_the_nearest_name(cell_of, capsys):
    words, _ = cell_of("technique=lora")
    assert evaluate.main([*words, "suite=arc_eazy"]) == 2
    assert "has no task 'arc_eazy', did you mean 'arc_easy'" in capsys.readouterr().err


def test_a_task_that_is_written_opens_with_what_it_is(cell_of, tmp_path):
    words, folder = cell_of("technique=lora", "precision=fp32")
    name = exported(words, folder, tmp_path)
    rows = read_jsonl(tmp_path / "tasks" / f"{name}.jsonl")
    test = read_jsonl(Path(compose(words).paths.data) / "vader_movies" / "test.jsonl")[:12]
    assert [(r["prompt"], r["choices"][r["answer"]]) for r in rows] == [(r["prompt"], r["answer"]) for r in test]
