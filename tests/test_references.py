"""Labels taken from the data, references scored as a model's answers are, and what a template does not take."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.core.files import UserError
from pipeline.core.settings import Task, build
from pipeline.data import recipe as tasks
from pipeline.data import splits
from pipeline.data.sources import Loaded
from pipeline.scoring import references
from pipeline.scoring.per_row import measured
from pipeline.scoring.reading import agrees, reference

GSM8K = r"####\s*(-?[\d,\.]+)"


def task(**keys: Any) -> Task:
    return Task(**{"name": "maths", "scoring": "generate", **keys})


def maths(count: int = 6) -> list[dict[str, Any]]:
    return [{"id": f"row-{i}", "prompt": f"{i} + {i}?", "answer": f"It is {i} and {i}.\nSo {2 * i}.\n#### {2 * i}"} for i in range(count)]


def test_the_pattern_reads_the_reference_too():
    """GSM8K's references end in #### 72: what was read out of the model's text was compared with all of it, 0% by construction."""
    answer = "Natalia sold 48.\n#### 72"
    assert agrees("72", answer, GSM8K) and agrees("72.0", answer, GSM8K) and not agrees("48", answer, GSM8K) and not agrees(None, answer, GSM8K)
    assert reference("72", GSM8K) == "72" and reference(answer, None) == answer, "a bare answer stays as it is"
    row = {"id": "a", "answer": answer}
    scored = measured([{**row, "prediction": "72", "output": "So #### 72", "correct": True}], [row], task(metric="exact_match", answer_pattern=GSM8K))
    assert scored[0]["value"] == 1.0 and scored[0]["correct"]


def test_references_that_the_scorer_calls_wrong_stop_preparing_and_three_are_shown():
    check = references.check
    assert check({"train": maths()}, task(answer_pattern=GSM8K, max_new_tokens=40), references.by_words(task(max_new_tokens=40))) == []
    said = r"6 of the 6 reference answers .* no technique could reach 100%.*row-0 has .*row-1.*row-2 has .*; set task.answer_pat"
    with pytest.raises(UserError, match=said) as one:
        check({"train": maths()}, task(), lambda answer: None)
    assert "row-3" not in str(one.value)
    with pytest.raises(UserError, match=r"read as nothing; fix task.answer_pattern, or those rows"):
        check({"train": maths()}, task(answer_pattern=r"Answer: (\d+)"), lambda answer: None)


def test_references_that_are_cut_stop_preparing_where_the_answer_stands_at_their_end():
    short = task(answer_pattern=GSM8K, max_new_tokens=5)
    with pytest.raises(UserError, match=r"6 of the 6 reference answers .* longer than task.max_new_tokens=5 and would be cut"):
        references.check({"train": maths()}, short, references.by_words(short))
    first = task(max_new_tokens=3)
    rows = [{"id": "a", "prompt": "?", "answer": "one two three four"}]
    with pytest.raises(UserError, match="longer than"):
        references.check({"train": rows}, first, references.by_words(first))
    graded = task(metric="token_f1", max_new_tokens=3)
    (said,) = references.check({"train": rows}, graded, references.by_words(graded))
    assert "raise task.max_new_tokens for a full score" in said
    tokens = references.by_tokens(first, lambda text: [ord(c) for c in text], lambda ids: "".join(map(chr, ids)))
    assert tokens("abc") == " ab" and tokens("ab") is None, "the separator is a token of the answer"


def test_a_metric_that_does_not_see_the_answers_is_found():
    """ROUGE's words are those of the Latin alphabet: a perfect answer in another one has 0."""
    rows = [{"id": "a", "prompt": "?", "answer": "这部电影很好看"}]
    with pytest.raises(UserError, match="choose another task.metric"):
        references.check({"test": rows}, task(metric="rouge_l"), lambda answer: None)


def made(rows: list[dict[str, Any]], **keys: Any) -> splits.Sets:
    """The sets of a task of choices that lists none."""
    base = {"name": "mine", "scoring": "choice", "prompt": "{text}", "source": {"type": "files", "files": {"train": "x"}}}
    return splits.assemble(build(tasks.Recipe, base | keys, "task"), Loaded({"train": rows}, {}, {"train": "mine.csv"}))[0]


@pytest.mark.parametrize("answer", [{"column": "label"}, "{label}"])
def test_labels_come_from_the_training_rows(answer):
    rows = [{"text": f"message number {i}", "label": ("lost?", "10", "9")[i % 3]} for i in range(60)]
    sets = made(rows, answer=answer)
    assert {tuple(row["choices"]) for each in sets.values() for row in each} == {("9", "10", "lost?")}
    assert set(splits.balance(sets["train"])) == {"9", "10", "lost?"} and sum(splits.balance(sets["train"]).values()) == len(sets["train"])


def test_too_many_labels_and_empty_ones_are_an_error():
    rows = [{"text": f"message {i}", "label": f"answer {i}"} for i in range(400)]
    with pytest.raises(UserError, match="mine.csv has 400 different answers .*more than the 300 .*task.scoring=generate"):
        made(rows, answer={"column": "label"})
    rows[7]["label"] = ""
    with pytest.raises(UserError, match="row 8 of mine.csv has an empty answer"):
        made(rows[:50], answer={"column": "label"})
    with pytest.raises(UserError, match="differ in case alone"):
        made([{"text": f"message {i}", "label": ("Good", "good", "bad")[i % 3]} for i in range(30)], answer={"column": "label"})


@pytest.mark.parametrize(("value", "said"), [
    ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the answer"}], "a conversation and no text: name its column in task.messages"),
    ([{"from": "human", "value": "hi"}], "task.messages"), ({"a": 1}, "name what is inside it with a dot, as in {column.key}"),
    ([{"a": 1}], "an object and no text"), ([["x"]], "another list inside"),
])
def test_a_list_or_an_object_in_a_template_is_an_error_that_names_the_way_that_works(value, said):
    with pytest.raises(ValueError, match=said.replace("{", r"\{").replace("}", r"\}")):
        tasks.text_of(value)
    assert tasks.text_of(["a", 2.0]) == "a, 2"
