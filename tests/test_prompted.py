"""Teachers by prompt: demonstrations, the prompt, taking texts apart, which rows are explained, from end to end."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_model, write_task

from pipeline import rationales, train
from pipeline.cell.identity import fingerprint
from pipeline.core.compose import build, compose
from pipeline.core.files import UserError, read_json, read_jsonl, write_jsonl
from pipeline.core.settings import Task, read
from pipeline.data.rows import load_rows
from pipeline.teachers.base import Explanation
from pipeline.teachers.demonstrations import Demonstrations, Shot, draw
from pipeline.teachers.prompted import Prompted, majority, match_choice

ROW = {"id": "r", "prompt": "Review: a film\nSentiment:", "answer": "positive", "choices": ["negative", "positive"], "fields": {}}
TRAIN = [
    {**ROW, "id": f"t{i}", "prompt": f"p{i}", "answer": a, "fields": {"teacher_rationale": r, "teacher_answer": said}}
    for i, (a, r, said) in enumerate([("positive", "Fun.", "positive"), ("negative", "Dull.", "Negative."), ("positive", "Bad.", "negative"),
                                      ("positive", None, "positive"), ("positive", "Nice.", "positive"), ("positive", "Good.", "positive")])
]


class Said:
    """A writer that says what it is told to."""

    temperature = 1.0

    def __init__(self, *texts: str) -> None:
        self.texts, self.prompts, self.seeds = texts, [], []

    def write(self, prompts, *, seed=0):
        self.prompts += prompts
        self.seeds.append(seed)
        return [self.texts[seed % len(self.texts)]] * len(prompts)


@functools.cache
def configured(*overrides: str) -> Prompted:
    return build(compose(["teacher=local", *overrides]).teacher, "teacher")


def teacher(*overrides: str, writer=None, task=None, rows=TRAIN) -> Prompted:
    made = configured(*overrides)
    made = replace(made, writer=writer or made.writer)
    made.begin(task or Task("t", "choice"), rows)
    return made


# demonstrations


def test_training_rows_with_a_right_stored_rationale_are_drawn_each_answer_in_turn():
    actual = Demonstrations(k=2).shots("t", TRAIN)
    assert {(s.answer, s.rationale) for s in actual} <= {("positive", "Fun."), ("negative", "Dull."), ("positive", "Nice."), ("positive", "Good.")}
    assert {s.answer for s in actual} == {"positive", "negative"} and actual[0].choices == ("negative", "positive")
    assert Demonstrations(k=2).shots("t", TRAIN) == actual and Demonstrations(k=0).shots("t", TRAIN) == []
    assert len({tuple(s.prompt for s in Demonstrations(k=2, seed=n).shots("t", TRAIN)) for n in range(9)}) > 1
    with pytest.raises(UserError, match="rows of t has 4 demonstrations, teacher.demonstrations.k asks for 5; name a file"):
        Demonstrations(k=5).shots("t", TRAIN)


def test_draws_are_even():
    shots = [Shot(str(i), None, "r", "a" if i < 8 else "b") for i in range(10)]
    assert Counter(s.answer for s in draw(shots, 4, 0)) == {"a": 2, "b": 2}
    assert Counter(s.answer for s in draw(shots, 7, 0)) == {"a": 5, "b": 2}


def test_a_file_of_demonstrations_or_of_another_teacher_s_rows(tmp_path):
    own, other = tmp_path / "own.jsonl", tmp_path / "rationales.jsonl"
    write_jsonl(own, [{"prompt": "q", "rationale": "Since.", "answer": "negative"}])
    write_jsonl(other, [
        {"id": "t0", "rationale": "Fun!", "answer": "positive", "correct": True}, {"id": "t1", "rationale": "", "answer": "negative", "correct": True},
        {"id": "t4", "rationale": "Hm.", "answer": "negative", "correct": False}, {"id": "test-1", "rationale": "Leak.", "answer": "positive", "correct": True},
    ])
    assert Demonstrations(k=1, file=str(own)).shots("t", TRAIN) == [Shot("q", ("negative", "positive"), "Since.", "negative")]
    assert Demonstrations(k=1, file=str(other)).shots("t", TRAIN) == [Shot("p0", ("negative", "positive"), "Fun!", "positive")]
    with pytest.raises(UserError, match="has 1 demonstrations"):
        Demonstrations(k=2, file=str(other)).shots("t", TRAIN)
    write_jsonl(own, [{"prompt": "q", "answer": "negative"}])
    with pytest.raises(UserError, match="line 1 of .*own.jsonl has no rationale"):
        Demonstrations(k=1, file=str(own)).shots("t", TRAIN)
    with pytest.raises(UserError, match="nowhere.jsonl does not exist"):
        Demonstrations(k=1, file="nowhere.jsonl").shots("t", TRAIN)


def test_written_demonstrations_and_the_prompt():
    written = 'teacher.demonstrations.written=[{prompt: "1 + 1", rationale: "One more.", answer: 2}]'
    made = teacher(written, "teacher.system=Think.", rows=[{**ROW, "choices": None}])
    assert made.messages({**ROW, "prompt": "2 + 1", "choices": None}) == [
        {"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "One more. So the answer is 2."},
        {"role": "user", "content": "2 + 1"},
    ]
    assert made.messages(ROW)[-1]["content"] == "Options: negative, positive.\nReview: a film\nSentiment:"
    assert len(made.messages({**ROW, "prompt": "1 + 1"})) == 2, "a demonstration does not tell its own row's answer"


# texts


@pytest.mark.parametrize(("text", "rationale", "answer"), [
    ("It is fun. So the answer is positive.", "It is fun.", "positive"), ("It is fun. THE FINAL ANSWER IS: Positive!", "It is fun.", "positive"),
    ("Fun. Therefore, the answer is that it is positive, mostly.\nReview: b", "Fun.", "positive"),
    ("The answer is negative. No, the answer is positive.", "", "negative"), ("It is positive.", "", None),
    ("", "", None), ("So the answer is maybe.", "", None),
])
def test_choices(text, rationale, answer):
    assert teacher("teacher.demonstrations.k=0").explanation(text, ROW["choices"]) == Explanation(rationale, answer)


@pytest.mark.parametrize(("text", "answer"), [("So the answer is 1,200.", "1,200"), ("So the answer is 3 + 4 = 7", "7"), ("So the answer is seven.", None)])
def test_generated_answers_by_the_task_s_own_pattern(text, answer):
    made = teacher("teacher.demonstrations.k=0", task=Task("t", "generate", answer_pattern=r"-?\d[\d,]*(?:\.\d+)?"))
    assert made.explanation("Add. " + text, None) == Explanation("Add." if answer else "", answer)


def test_the_choice_that_is_said():
    choices = ["a park", "park", "car park"]
    assert match_choice("Park.", choices) == "park" and match_choice("park near me", choices) == "park" and match_choice("a park, I think", choices) == "a park"
    assert match_choice("the car or the road", choices) is None and match_choice("the best is sparkling", choices) is None
    assert match_choice("it is great", ["good", "great"]) == "great" and match_choice("it is good or great", ["good", "great"]) is None


def test_self_consistency():
    said = ["A. So the answer is negative.", "B. So the answer is positive.", "nothing", "C. So the answer is positive."]
    writer = Said(*said)
    made = teacher("teacher.demonstrations.k=0", "teacher.samples=4", "teacher.seed=4", "writer.temperature=0.7", writer=writer)
    assert made.explain([ROW, ROW]) == [Explanation("B.", "positive")] * 2 and writer.seeds == [4, 5, 6, 7]
    tie = [Explanation("x", None), Explanation("y", "b"), Explanation("z", "a")]
    assert majority(tie) == tie[1] and majority([tie[0]]) == tie[0]


@pytest.mark.parametrize(("changes", "message"), [
    ({"template": "x"}, "'teacher.template' is 'x'; it takes {prompt}, {options}, and {prompt} must be there"),
    ({"template": "{prompt} {text}"}, "teacher.template"), ({"options": "{choices"}, "teacher.options"), ({"reply": "{answer}"}, "teacher.reply"),
    ({"answer_pattern": "("}, "no regular expression"), ({"answer_pattern": "label (.*)"}, "does not find the answer in teacher.reply"),
    ({"samples": 2}, "writer.temperature=0 writes the same text every time"), ({"samples": 0}, "teacher.samples"), ({"batch_size": 0}, "teacher.batch_size"),
])
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(UserError, match=message):
        replace(configured("teacher.demonstrations.k=0"), **changes)


@pytest.mark.parametrize(("override", "message"), [
    ("teacher.demonstrations.k=-1", "teacher.demonstrations.k"), ("+teacher.sample=1", "'teacher' is refused.*sample"),
])
def test_keys_that_there_are_not(override, message):
    with pytest.raises(UserError, match=message):
        configured(override)


# the stage


def stage(overrides: list[str], tmp_path: Path, *more: str) -> list[str]:
    saved = [o for o in overrides if not o.startswith(("paths.rationales", "teacher="))]
    return [*saved, f"paths.rationales={tmp_path}/rationales", "teacher=local", "writer.max_new_tokens=6", "teacher.demonstrations.k=0", *more]


def test_with_train_rows_the_rows_of_such_cells_alone_are_explained(overrides, tmp_path, capsys):
    command = stage(overrides, tmp_path, "train_rows=10", "teacher.row_seeds=[0,1]", "evaluate.test_rows=5")
    assert rationales.main(command) == 0
    rows = read_jsonl(tmp_path / "rationales" / "vader_movies" / "local" / "rationales.jsonl")
    counts = Counter(r["split"] for r in rows)
    assert 10 < counts["train"] <= 20 and counts["validation"] == 2 and counts["test"] == 5
    for seed in (0, 1):
        cfg = compose([*command, f"seed={seed}"])
        data = load_rows(Path(cfg.paths.data) / cfg.task.name, read(cfg).task, 10, seed, 0.2, 5, 0)
        assert {r["id"] for r in data.train} <= {r["id"] for r in rows}
    manifest = read_json(tmp_path / "rationales" / "vader_movies" / "local" / "manifest.json")
    assert all(r["answer"] is None and r["rationale"] == "" and not r["correct"] for r in rows), "random weights give no answer, and the rows stay"
    assert manifest["unparsable"] == manifest["without_rationale"] == len(rows) and manifest["seconds"] > 0
    assert "rows without an answer" in capsys.readouterr().out


def test_what_was_written_decides_a_cell_and_how_it_was_asked_does_not(overrides, tmp_path):
    command = stage(overrides, tmp_path, "technique=step_by_step", "train_rows=8")
    path = tmp_path / "rationales" / "vader_movies" / "local" / "rationales.jsonl"
    write_jsonl(path, [{"id": "a"}])
    before = fingerprint(compose(command))
    assert fingerprint(compose([*command, "writer.batch_tokens=7", "writer.model=other"])) == before
    write_jsonl(path, [{"id": "b"}])
    assert fingerprint(compose(command)) != before


@pytest.mark.slow
def test_a_local_teacher_that_knows_the_task_teaches_step_by_step(overrides, tmp_path):
    """From end to end: a tiny model learns to reason, explains the rows, and another one learns from its words."""
    write_task(tmp_path / "data" / "vader_movies")
    write_model(tmp_path / "models" / "smollm2_135m")
    learn_to_reason(tmp_path)
    form = [
        "teacher.template='{prompt}'", "teacher.reply='{rationale} label: {answer}'", "teacher.answer_pattern='label ?: (?P<answer>[a-z]+)'",
        "writer.separator='[ ['", "writer.max_new_tokens=12", "writer.model=teacher",
    ]
    moved = [o for o in overrides if not o.startswith(("paths.data", "paths.models"))]
    command = stage([*moved, f"paths.data={tmp_path}/data", f"paths.models={tmp_path}/models"], tmp_path, *form)
    assert rationales.main(command) == 0
    folder = tmp_path / "rationales" / "vader_movies" / "local"
    manifest = read_json(folder / "manifest.json")
    assert manifest["accuracy"]["test"] >= 0.9 and manifest["unparsable"] <= 5
    assert read_jsonl(folder / "rationales.jsonl")[0]["rationale"].startswith("The words are")
    cells = [*command, "experiment=mine", "train_rows=64", "train.epochs=12", "train.batch_size=8", "train.lr=3e-3"]
    assert train.main([*cells, "technique=step_by_step"]) == 0
    result = json.loads((tmp_path / "results" / "mine" / "step_by_step-s0-n64" / "result.json").read_text())
    assert result["teacher"]["seconds"] == manifest["seconds"] and result["teacher"]["accuracy"] >= 0.9
    assert result["scores"]["test"]["accuracy"] >= 0.9
    assert train.main([*cells, "technique=teacher"]) == 0
    row = json.loads((tmp_path / "results" / "mine" / "teacher-s0-n64" / "result.json").read_text())
    assert row["scores"]["test"]["accuracy"] == pytest.approx(manifest["accuracy"]["test"], abs=1e-3)


def learn_to_reason(root: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_model(root / "models" / "teacher")
    folder = root / "models" / "teacher"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = read_jsonl(root / "data" / "vader_movies" / "train.jsonl")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(200):
        row = rows[step % len(rows)]
        text = f"{row['prompt']} The words are {row['answer']} . label : {row['answer']}"
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
