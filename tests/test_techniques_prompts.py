"""Techniques that write the prompt: retrieval over labelled rows or documents, and a template chosen on validation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cell import run as cell_run
from pipeline.core.compose import ROOT, build, compose
from pipeline.core.files import UserError, read_json, read_jsonl, write_jsonl, write_text
from pipeline.core.settings import Precision
from pipeline.data.rows import Example
from pipeline.methods.prompt_choice import PromptChoice
from pipeline.methods.retrieval import Retrieval, by_embedding, embed, passages
from pipeline.models.base import load_model, load_tokenizer
from pipeline.serving import artefact as evaluate

ROWS = [Example(f"Review: {text}\nSentiment:", answer) for text, answer in (
    ("the plot was awful", "negative"), ("a lovely cast", "positive"), ("the score of the actor", "positive"), ("poor scene", "negative"))]


@pytest.fixture
def base(tiny):
    return load_model(tiny / "models" / "smollm2_135m", Precision("fp32"), torch.device("cpu"))


def test_bm25_finds_the_rows_that_share_words_and_puts_the_nearest_last():
    method = Retrieval(2, "bm25")
    state = method.prepare(ROWS, 0, None)
    text = method.prompt("Review: a lovely lovely plot\nSentiment:", state)
    assert text == (
        "Review: the plot was awful\nSentiment: negative\n\nReview: a lovely cast\nSentiment: positive\n\nReview: a lovely lovely plot\nSentiment:"
    )
    assert Retrieval(4, "bm25").prompt("nothing in common", state).count("Sentiment:") == 4, "k rows come even where no word is shared"


def test_bm25_leaves_the_gpu_to_the_cell(tmp_path):
    """bm25s starts JAX where it is installed, and JAX takes three quarters of a GPU unless told to stay away from it."""
    write_text(tmp_path / "jax" / "__init__.py", "")
    write_text(tmp_path / "jax" / "lax.py", "import os\nprint(os.environ['JAX_PLATFORMS'])\ndef top_k(scores, k):\n    assert len(scores) == 5\n")
    ask = "from pipeline.methods.retrieval import by_bm25; print(by_bm25(['one film', 'two plots', 'three casts'])('plots of two', 2)[0])"
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout.split() == ["cpu", "1"], done.stderr


def test_the_nearest_to_a_row_by_embedding_is_the_row(base):
    texts = [e.prompt for e in ROWS]
    nearest = by_embedding(texts, base)
    assert [nearest(text, 1) for text in texts] == [[0], [1], [2], [3]]
    assert sorted(nearest(texts[0], 4)) == [0, 1, 2, 3]


def test_an_embedding_is_the_position_weighted_mean_of_the_last_states(base, tiny):
    tokenizer = load_tokenizer(tiny / "models" / "smollm2_135m")
    ids = torch.tensor([tokenizer("a lovely cast")["input_ids"]])
    states = base(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    expected = sum((i + 1) * state for i, state in enumerate(states))
    torch.testing.assert_close(embed("a lovely cast", base, tokenizer), expected / expected.norm())


@pytest.mark.parametrize("name", ["retrieval", "retrieval_embedding"])
def test_what_is_retrieved_is_saved_and_answers_alike(overrides, tmp_path, name):
    cfg = compose([*overrides, f"technique={name}", "method.k=3", "train_rows=32"])
    result = cell_run.run(cfg, folder=tmp_path / "cell")
    saved = read_jsonl(tmp_path / "cell" / "artefact" / "entries.jsonl")
    train = {r["prompt"]: r["answer"] for r in read_jsonl(Path(cfg.paths.data) / "vader_movies" / "train.jsonl")}
    assert len(saved) == 32 == result.train_rows and all(train[e["text"]] == e["answer"] for e in saved)
    actual, _ = evaluate.score_artefact(cfg, tmp_path / "cell" / "artefact", "test")
    assert actual == [p for p in read_jsonl(tmp_path / "cell" / "predictions.jsonl") if p["split"] == "test"]
    assert result.size.trainable == 0 and result.labelled_rows == 32


def test_a_user_s_documents_stand_before_the_prompt(overrides, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.txt").write_text("The film was lovely.\n\nThe plot is a plot.")
    write_jsonl(docs / "b.jsonl", [{"body": "The cast and the score."}])
    with pytest.raises(UserError, match=r"b\.jsonl row 1 has no text in column 'text' \(it has: body\); set method\.column"):
        passages(docs, "text", 60)
    cfg = compose([*overrides, "technique=retrieval_documents", f"method.documents={docs}", "method.column=body", "method.k=1"])
    made = build(cfg.method, "method")
    state = made.prepare([], 0, None)
    assert [e["text"] for e in state.entries] == ["The film was lovely.", "The plot is a plot.", "The cast and the score."]
    assert made.prompt("which cast?", state) == "The cast and the score.\n\nwhich cast?"
    cell_run.run(cfg, folder=tmp_path / "cell", splits=("test",))
    assert len(read_jsonl(tmp_path / "cell" / "artefact" / "entries.jsonl")) == 3


def test_long_documents_are_cut_into_passages(tmp_path):
    file = tmp_path / "a.md"
    file.write_text(" ".join(f"w{i}" for i in range(25)) + "\n\nshort one")
    assert [len(p.split()) for p in passages(file, "text", 10)] == [10, 10, 5, 2]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: None, "holds no .txt, .md or .jsonl file; fix the path"),
        (lambda p: p.mkdir(), "holds no .txt, .md or .jsonl file; fix the path"),
        (lambda p: p.write_text(""), "is neither .txt, .md nor .jsonl; convert it"),
    ],
)
def test_documents_that_cannot_be_read_are_named(tmp_path, write, message):
    write(tmp_path / "docs")
    with pytest.raises(UserError, match=message):
        Retrieval(1, "bm25", str(tmp_path / "docs")).prepare([], 0, None)


def test_documents_without_text_and_of_another_encoding(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n ")
    with pytest.raises(UserError, match="holds no text; add some"):
        passages(tmp_path, "text", 10)
    (tmp_path / "a.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8"):
        passages(tmp_path, "text", 10)


def test_more_to_retrieve_than_there_is():
    with pytest.raises(UserError, match=r"method\.k=9, but there are 4 training rows; lower k or add some"):
        Retrieval(9, "bm25").prepare(ROWS, 0, None)


# a chosen template


def chosen(templates: list[str], scores: dict[str, tuple[float, float]], rows: list[Example] = ROWS) -> tuple[str, list[str]]:
    asked: list[str] = []

    def validate(state: dict[str, Any]) -> tuple[float, float]:
        asked.append(state["template"])
        return scores[state["template"]]

    method = PromptChoice(templates)
    return method.choose(method.prepare(rows, 0, None), validate)["template"], asked


def test_the_template_with_the_best_validation_is_taken_and_ties_go_to_the_lower_nll():
    templates = ["A {prompt}", "B {prompt}", "C {prompt}"]
    assert chosen(templates, {"A {prompt}": (0.5, 1.0), "B {prompt}": (0.7, 2.0), "C {prompt}": (0.7, 1.5)}) == ("C {prompt}", templates)


def test_a_template_that_lists_answers_is_left_out_where_they_are_free_text():
    many = [Example("p", f"answer {i}") for i in range(21)]
    scores = {"{answers} {prompt}": (1.0, 0.0), "{prompt}": (0.1, 1.0)}
    assert chosen(list(scores), scores, many) == ("{prompt}", ["{prompt}"])
    assert chosen(list(scores), scores) == ("{answers} {prompt}", list(scores))
    with pytest.raises(UserError, match=r"every one of method\.templates asks for \{answers\}"):
        chosen(["{answers} {prompt}"], scores, many)


def test_the_prompt_keeps_braces_of_its_own():
    method = PromptChoice(["One of {answers}: {prompt}"])
    state = method.prepare(ROWS, 0, None)
    assert method.prompt("a {x} {answers}", state) == "One of negative, positive: a {x} {answers}"


def test_the_choice_is_made_on_validation_and_served(overrides, tmp_path):
    cfg = compose([*overrides, "technique=prompt_choice"])
    result = cell_run.run(cfg, folder=tmp_path / "cell")
    saved = read_json(tmp_path / "cell" / "artefact" / "template.json")
    assert len(saved["tried"]) == len(cfg.method.templates) and saved["answers"] == ["negative", "positive"]
    best = max(saved["tried"], key=lambda t: (t["metric"], -t["nll"]))
    assert saved["template"] == best["template"] and result.scores["validation"].accuracy == best["metric"]
    actual, _ = evaluate.score_artefact(cfg, tmp_path / "cell" / "artefact", "test")
    assert actual == [p for p in read_jsonl(tmp_path / "cell" / "predictions.jsonl") if p["split"] == "test"]
    assert result.phases.validate_s > 0 and result.labelled_rows == result.validation_rows == 12
