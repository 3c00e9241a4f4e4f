"""Distillation: a teacher's labels, its distributions, its reasoning before the answer. Losses by hand, what is read, what is refused, that each learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import random_model
from conftest import write_model

from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import build, compose
from pipeline.core.files import UserError, read_jsonl
from pipeline.core.settings import Precision, Task, Train, read
from pipeline.data.rows import Encoder, Example
from pipeline.models.base import load_model, load_tokenizer
from pipeline.objectives.base import TrainingContext
from pipeline.objectives.logit_distillation import AfterLayer, Head, LogitDistillation, divergence, jensen_shannon
from pipeline.objectives.rationale_first import RationaleFirst
from pipeline.objectives.step_by_step import StepByStepUnlabelled
from pipeline.objectives.task_distillation import TaskDistillation
from pipeline.records import results
from pipeline.scoring.scorer import Scorer
from pipeline.serving import artefact as evaluate
from pipeline.serving.artefact import Artefact, Base, Multiplexer, scorer_of
from pipeline.training import stepping
from pipeline.training.online import Rollouts

CPU = torch.device("cpu")
CHOICE, GENERATE = Task("t", "choice"), Task("t", "generate")
ROW: dict = {"id": "1", "prompt": "Review: the film\nSentiment:", "answer": "positive", "choices": ["negative", "positive"], "fields": {}}
RIGHT = {"id": "1", "rationale": "The words are positive.", "answer": " Positive.", "correct": True}
WRONG = {**RIGHT, "answer": "negative", "correct": False}
SHORT = ["experiment=mine", "train_rows=64", "train.epochs=6", "train.batch_size=8", "train.validations=1"]


def run(overrides: list[str], *more: str) -> results.Result:
    cfg = compose([*overrides, *SHORT, *more])
    return cell_run.run(cfg, folder=identity.folder_of(cfg))


def answers_alike(overrides: list[str], *more: str) -> None:
    cfg = compose([*overrides, *SHORT, *more])
    held = [p for p in read_jsonl(identity.folder_of(cfg) / "predictions.jsonl") if p["split"] == "test"]
    found, _ = evaluate.score_artefact(cfg, identity.folder_of(cfg) / "artefact", "test")
    assert [(p["prediction"], p.get("reasoning")) for p in found] == [(p["prediction"], p.get("reasoning")) for p in held]


# the teacher's labels


def test_the_teacher_s_answer_takes_the_place_of_the_label():
    rows = [ROW, {**ROW, "id": "2"}, {**ROW, "id": "3"}, {**ROW, "id": "4"}]
    said = {"1": WRONG, "2": {**RIGHT, "answer": None}, "3": {**RIGHT, "answer": "neither"}}
    assert TaskDistillation().rows(rows, said, 4, 0) == [{**ROW, "answer": "negative"}], "no answer, one that is no choice, and no row at all are left out"
    assert TaskDistillation().rows([ROW], {"1": RIGHT}, 1, 0)[0]["answer"] == "positive", "in the words of the choice"
    assert TaskDistillation().rows([{**ROW, "choices": None}], {"1": RIGHT}, 1, 0)[0]["answer"] == " Positive."
    with pytest.raises(UserError, match="no usable answer to any training row"):
        TaskDistillation().rows([ROW], {}, 1, 0)


def test_task_distillation_learns_the_teacher_and_reads_no_label(overrides):
    """The teacher is wrong on every fourth row, and so is what it taught: the gold labels would give 100%."""
    found = run(overrides, "technique=task_distillation", "train.lr=3e-3")
    assert 0.6 <= found.test.accuracy <= 0.95 and found.labelled_rows == found.validation_rows
    assert found.teacher.accuracy == pytest.approx(0.75, abs=0.05)


def test_step_by_step_without_labels_takes_answer_and_reasons_from_the_teacher():
    objective = StepByStepUnlabelled(0.5)
    (row,) = objective.rows([ROW, {**ROW, "id": "2"}], {"1": WRONG, "2": {**RIGHT, "answer": None}}, 2, 0)
    assert objective.examples(row, CHOICE, WRONG) == [
        Example("[label] " + ROW["prompt"], "negative", "label", 1.0, ends=False),
        Example("[rationale] " + ROW["prompt"], "The words are positive.", "rationale", 0.5, ends=True),
    ]
    alone = dataclasses.replace(objective, rationale_weight=0.0)
    assert alone.needs_rationales and alone.examples(row, CHOICE, WRONG) == objective.examples(row, CHOICE, WRONG)[:1], "the teacher's label is read still"
    with pytest.raises(UserError, match="wrong_rationales=drop takes people's labels"):
        StepByStepUnlabelled(0.5, wrong_rationales="drop")


@pytest.mark.slow
@pytest.mark.parametrize("technique", ["step_by_step_unlabelled", "step_by_step_unlabelled_lora"])
def test_step_by_step_without_labels_learns_the_teacher_s_mistakes(overrides, technique):
    found = run(overrides, f"technique={technique}", f"train.lr={'1e-2' if 'lora' in technique else '3e-3'}", "train.epochs=12")
    assert 0.6 <= found.test.accuracy <= 0.95 and found.labelled_rows == found.validation_rows
    assert found.hyperparameters["labels_from"] == "validation" and found.hyperparameters["rationale_weight"] == 0.5


# distributions


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_divergence_is_the_formula_s_and_0_for_equal_models(direction):
    student, teacher = torch.tensor([[1.0, 0.0, -2.0]]), torch.tensor([[0.5, 0.5, 3.0]])
    q, p = (torch.softmax(x / 2, -1)[0] for x in (student, teacher))
    first, second = (p, q) if direction == "forward" else (q, p)
    expected = float(sum(a * torch.log(a / b) for a, b in zip(first, second, strict=True)))
    assert float(divergence(student, teacher, 2.0, direction)) == pytest.approx(expected, abs=1e-6)
    assert float(divergence(teacher, teacher, 2.0, direction)) == 0.0


def training_context(overrides: list[str], tiny: Path, *more: str) -> TrainingContext:
    cfg = compose([*overrides, *SHORT, "technique=logit_distillation", *more])
    model = load_model(tiny / "models" / "smollm2_135m", Precision("fp32"), CPU)
    encoder = Encoder(load_tokenizer(tiny / "models" / "smollm2_135m"), CHOICE, 64, "error")
    rows = [dict(ROW, id=str(i), prompt=f"Review: {'film ' * i}\nSentiment:") for i in range(1, 5)]
    return TrainingContext(cfg, read(cfg), model, encoder, rows, CPU, torch.float32, scorer_of)


def taught(objective: LogitDistillation, at: TrainingContext) -> list:
    examples = [[at.encoder.example(e) for e in objective.examples(row, CHOICE, None)] for row in at.rows]
    return [e for row in objective.prepared(examples, at).examples for e in row]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_model_that_teaches_itself_leaves_the_labels_alone(overrides, tiny, direction):
    """The divergence of equal models is 0, so the loss is label_weight · cross-entropy; the base as its own teacher, by its name under models/."""
    at, objective = training_context(overrides, tiny), LogitDistillation("smollm2_135m", 0.3, 2.0, direction)
    flat = taught(objective, at)
    losses = {}
    for tokens in (4096, 24):
        batches = list(objective.batches(flat, Train(0.1, 1, 4, tokens), 1))
        with torch.no_grad():
            losses[len(batches)] = float(sum(objective.loss(at.model, b) for b in batches))
    with torch.no_grad():
        nll = [-torch.log_softmax(at.model(input_ids=torch.tensor([e.ids])).logits[0], -1)[e.start - 1, e.ids[e.start]] for e in flat]
    assert len(losses) == 2 and all(v == pytest.approx(0.3 * float(sum(nll)) / len(nll), abs=1e-5) for v in losses.values())


@pytest.mark.parametrize("architecture", ["granite", "cohere2", "gemma2", "llama"])
def test_a_teacher_s_logits_come_again_from_its_states(architecture):
    """Whatever a model does behind its output layer: a scale, a bound."""
    more = {"gemma2": {"final_logit_softcapping": 2.0}, "cohere2": {"logit_scale": 0.25}}.get(architecture, {})
    model = random_model(architecture, **more).eval()
    hidden: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: hidden.append(args[0][0]))
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0]
    after = AfterLayer.of(model.config)
    assert torch.allclose(Head(model.get_output_embeddings(), 31, after).logits(hidden[0]), wanted, atol=1e-5)
    if architecture != "llama":
        assert not torch.allclose(Head(model.get_output_embeddings(), 31).logits(hidden[0]), wanted, atol=1e-2)


def test_a_teacher_is_asked_once(overrides, tiny, monkeypatch):
    at, objective = training_context(overrides, tiny), LogitDistillation("smollm2_135m", 0.3, 2.0)
    first = taught(objective, at)
    (kept,) = (Path(at.cfg.paths.work) / "teachers").iterdir()
    monkeypatch.setattr("pipeline.objectives.logit_distillation._ask", None)
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(first, taught(objective, at), strict=True))
    with pytest.raises(TypeError):
        taught(objective, dataclasses.replace(at, rows=at.rows[:2]))
    assert kept.stat().st_size < 64 * 31 * 4 + 4 * 64 * 4 + 1000, "one layer and a state a position, not a distribution a position"


@pytest.mark.parametrize("data", [b"", b"garbage" * 50, None], ids=["empty", "garbage", "cut"])
def test_states_that_are_damaged_are_named_and_asked_for_again(overrides, tiny, capsys, data):
    at, objective = training_context(overrides, tiny), LogitDistillation("smollm2_135m", 0.3, 2.0)
    first = taught(objective, at)
    (kept,) = (Path(at.cfg.paths.work) / "teachers").iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # `first` is mapped from it
    kept.write_bytes(whole[: len(whole) // 2] if data is None else data)
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(first, taught(objective, at), strict=True))
    assert f"warning: {kept} is damaged" in capsys.readouterr().err and len(kept.read_bytes()) == len(whole)


def test_a_teacher_of_another_vocabulary_or_none_at_all_is_refused(overrides, tiny, tmp_path):
    import json
    import shutil

    models = tmp_path / "models"
    shutil.copytree(tiny / "models", models)
    write_model(models / "larger", seed=3, hidden=96)
    at = training_context(overrides, tiny, f"paths.models={models}")
    larger = taught(LogitDistillation("larger", 0.0, 1.0), at)
    assert larger[0].hidden.shape == (1, 96) and larger[0].head.logits(larger[0].hidden).shape == (1, 31)
    file = models / "larger" / "tokenizer.json"
    words = json.loads(file.read_text())
    words["model"]["vocab"]["other"] = words["model"]["vocab"].pop("film")
    file.write_text(json.dumps(words))
    shutil.rmtree(Path(at.cfg.paths.work) / "teachers")
    with pytest.raises(UserError, match="objective.teacher=larger has another vocabulary than smollm2_135m"):
        taught(LogitDistillation("larger", 0.0, 1.0), at)
    with pytest.raises(UserError, match="objective.teacher=full, but .*full-s0-n64 holds no finished cell; run it first"):
        taught(LogitDistillation("full", 0.0, 1.0), at)


@pytest.mark.parametrize("change", ["label_weight=1", "label_weight=-0.1", "temperature=0", "divergence=sideways"])
def test_values_out_of_range_are_refused(change):
    with pytest.raises(UserError, match=f"objective.{change.split('=')[0]}'? is"):
        build(compose(["technique=logit_distillation", f"objective.{change}"]).objective, "objective")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logit_distillation", "logit_distillation_reverse"])
def test_a_fine_tuned_cell_teaches(overrides, name):
    """Without labels (label_weight 0) the student learns the task from the distributions alone; few-shot teaches too (by its prompt)."""
    full = run(overrides, "technique=full", "train.lr=3e-3")
    found = run(overrides, f"technique={name}", "train.lr=1e-2", "objective.label_weight=0.0")
    assert full.test.accuracy == found.test.accuracy == 1.0
    assert found.teacher.name == "full-s0-n64" and found.teacher.seconds > full.phases.train_s and found.teacher.accuracy == 1.0
    answers_alike(overrides, f"technique={name}", "train.lr=1e-2", "objective.label_weight=0.0")
    run(overrides, "technique=few_shot", "method.k=2")
    assert run(overrides, f"technique={name}", "objective.teacher=few_shot", "variant=shots", "train.steps=1").teacher.name == "few_shot-s0-n64"


# reasoning first


# on the student's own texts


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_jensen_shannon_divergence_is_the_formula_s(beta):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 7), torch.randn(3, 7)
    q, p = student.softmax(-1), teacher.softmax(-1)
    m = beta * p + (1 - beta) * q
    mixed = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    expected = {0.0: (p * (p / q).log()).sum(-1), 1.0: (q * (q / p).log()).sum(-1)}.get(beta, mixed)
    assert torch.allclose(jensen_shannon(student, teacher, beta), expected, atol=1e-6)
    assert torch.allclose(jensen_shannon(student, student, beta), torch.zeros(3), atol=1e-6)


def on_policy(overrides: list[str], tiny: Path, *more: str) -> tuple[Any, Any, list, Any]:
    """(objective, student, a step's examples, the teacher's scorer)."""
    write_model(tiny / "models" / "teacher_7", seed=7)
    at = training_context(overrides, tiny, "technique=on_policy_distillation", "objective.teacher=teacher_7", *more)
    teachers: list[Scorer] = []
    scorer = at.scorer
    at = dataclasses.replace(at, scorer=lambda *asked: teachers.append(scorer(*asked)) or teachers[-1])
    objective = build(at.cfg.objective, "objective")
    examples = [[at.encoder.example(e) for e in objective.examples(row, at.settings.task, None)] for row in at.rows]
    prepared = objective.prepared(examples, at)
    settings = dataclasses.replace(at.settings.train, lr=0.1, batch_size=4)
    run = stepping.Run(at.model, build(at.cfg.method, "method"), objective, prepared.examples, settings, 0, 2, at.device, at.dtype, at.encoder.pad_id,
                       online=prepared.online)
    rollouts = Rollouts(run, run.online)
    rollouts.begin([])
    return objective, run, rollouts.examples(0), teachers[0]


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_one_step_s_loss_is_that_of_trl_s_trainer(overrides, tiny, beta):
    pytest.importorskip("trl")
    from trl.experimental.gkd import GKDTrainer

    objective, run, examples, teacher = on_policy(overrides, tiny, f"objective.beta={beta}")
    width = max(len(e.ids) for e in examples)
    ids = torch.tensor([[*e.ids, *[1] * (width - len(e.ids))] for e in examples])
    labels = torch.tensor([[*[-100] * e.start, *e.ids[e.start :], *[-100] * (width - len(e.ids))] for e in examples])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in examples])
    stand_in: Any = SimpleNamespace(teacher_model=teacher.model, beta=beta, generalized_jsd_loss=GKDTrainer.generalized_jsd_loss)
    with torch.no_grad():
        theirs = GKDTrainer.compute_loss(stand_in, run.model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
        ours = sum(objective.loss(run.model, batch) for batch in objective.batches(examples, run.settings, run.pad_id))
    assert len(examples) == 4 and float(theirs) > 0.1 and float(ours) == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.slow
def test_a_student_learns_on_texts_of_its_own(overrides):
    run(overrides, "technique=full", "train.lr=1e-3", "train.epochs=4")
    actual = run(overrides, "technique=on_policy_distillation", "train.lr=2e-2", "train.epochs=6")
    right = [point["gold_reward"] for point in actual.history]
    assert actual.test and actual.test.accuracy >= 0.9 and sum(right[-8:]) > sum(right[:8]) and right[0] < 0.3
    assert actual.teacher and actual.teacher.name == "full-s0-n64" and actual.teacher.seconds and actual.work.engine == "eager"


def test_the_reasoning_and_the_answer_after_it_are_two_examples():
    objective = RationaleFirst(0.5, 8, cue=" So")
    assert objective.examples(ROW, CHOICE, RIGHT) == [
        Example(ROW["prompt"], "positive", prefill="The words are positive. So"),
        Example(ROW["prompt"], "The words are positive.", "rationale", 0.5, ends=True),
    ]
    bare = [Example(ROW["prompt"], "positive", prefill="So", ends=True)]
    for rationale in (None, {**RIGHT, "rationale": ""}, WRONG):
        assert objective.examples(ROW, GENERATE, rationale) == bare
    assert len(dataclasses.replace(objective, wrong_rationales="keep").examples(ROW, CHOICE, WRONG)) == 2
    for change in ({"rationale_weight": 0.0}, {"max_new_tokens": 0}, {"wrong_rationales": "fix"}):
        with pytest.raises(UserError, match=f"objective.{next(iter(change))}'? is"):
            dataclasses.replace(objective, **change)


def test_what_is_given_is_fed_and_not_learnt(tiny):
    encoder = Encoder(load_tokenizer(tiny / "models" / "smollm2_135m"), CHOICE, 64, "error")
    plain, given = encoder.example(Example("Review:", "positive")), encoder.example(Example("Review:", "positive", prefill="The words"))
    assert given.ids == (*encoder.prompt("Review:"), *encoder.answer("The words"), *encoder.answer("positive"))
    assert len(given.ids) - given.start == len(plain.ids) - plain.start == 1


@pytest.mark.parametrize("task", [CHOICE, dataclasses.replace(GENERATE, max_new_tokens=1)], ids=["choice", "generate"])
def test_the_answer_follows_the_model_s_own_reasoning(tiny, task):
    """The same as scoring the prompt with the generated reasoning and the cue put after it by hand."""
    folder = tiny / "models" / "smollm2_135m"
    model, encoder = load_model(folder, Precision("fp32"), CPU), Encoder(load_tokenizer(folder), task, 64, "error")
    settings: Any = (lambda p: p, 512, CPU, torch.float32)
    rows = [ROW, {**ROW, "id": "2", "prompt": "Review: awful plot\nSentiment:"}]
    found = Scorer(model, encoder, task, *settings, None, RationaleFirst(1.0, 5, cue=" So").reasoning).predict(rows)
    thoughts = Scorer(model, encoder, dataclasses.replace(GENERATE, max_new_tokens=5), *settings).predict(rows)
    by_hand = [{**row, "prompt": f"{row['prompt']} {(thought['output'].strip() + ' So').strip()}"} for row, thought in zip(rows, thoughts, strict=True)]
    expected = Scorer(model, encoder, task, *settings).predict(by_hand)
    for one, other, thought in zip(found, expected, thoughts, strict=True):
        assert one["reasoning"] == (thought["output"].strip() + " So").strip()
        assert one["prediction"] == other["prediction"] and one.get("scores") == pytest.approx(other.get("scores")) and one.get("output") == other.get("output")


def test_rationale_first_learns_and_pays_for_its_reasoning(overrides):
    more = ["technique=rationale_first", "train.lr=3e-3", "train.epochs=12", "objective.max_new_tokens=8", "evaluate.latency_rows=4"]
    found = run(overrides, *more)
    assert found.test.accuracy >= 0.95
    reasons = [p["reasoning"] for p in read_jsonl(Path(found.config["paths"]["results"]) / "mine" / found.cell / "predictions.jsonl")]
    assert sum(r.startswith("The words are ") and "positive" in r or "negative" in r for r in reasons) > 0.9 * len(reasons)
    answers_alike(overrides, *more)
    cfg = compose([*overrides, *SHORT, *more])
    artefact = Artefact.at("one", identity.folder_of(cfg) / "artefact", cfg)
    multiplexer = Multiplexer(Base.of(cfg), [artefact])
    (said,) = multiplexer.answer([{"adapter": "one", "prompt": ROW["prompt"], "choices": ROW["choices"]}])
    assert said["answer"] in ROW["choices"] and multiplexer.report == ["1 by one alone (it reasons first)"]


def test_no_rationale_to_learn_from_is_said_and_long_ones_are_counted(overrides):
    objective, at = RationaleFirst(1.0, 3), SimpleNamespace()
    long = SimpleNamespace(ids=range(9), start=2, group="rationale")
    assert objective.prepared([[long, long]], at).notes == [  # type: ignore[arg-type, list-item]
        "2 of 2 rationales are longer than objective.max_new_tokens=3, where reasoning is cut at test"]
    with pytest.raises(UserError, match="no training row has a rationale to learn from"):
        objective.prepared([[]], at)  # type: ignore[arg-type]


@pytest.mark.slow
def test_step_by_step_goes_with_adapters(overrides):
    for name in ("step_by_step_lora", "step_by_step_qlora"):
        found = run(overrides, f"technique={name}", "train.lr=1e-2", "train.epochs=12")
        assert found.test.accuracy >= 0.95 and found.method == "lora" and found.objective == "step_by_step"
