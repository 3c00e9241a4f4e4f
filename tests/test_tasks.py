"""The task YAML's grammar: pipeline/data/recipe.py."""

import pytest

from pipeline.core.files import UserError
from pipeline.core.settings import build
from pipeline.data import recipe as tasks


def recipe(**keys):
    base = {"name": "t", "scoring": "choice", "source": {"type": "files"}, "prompt": "Review: {text}\nSentiment:", "answer": "{label}"}
    given = {**base, **({"choices": ["bad", "good"]} if keys.get("scoring") != "generate" else {}), **keys}
    return build(tasks.Recipe, {k: v for k, v in given.items() if v is not ...}, "task")


def row(made, **fields):
    return tasks.make_row(made, fields, "train-1", "row 1 of train")


def test_a_row_has_prompt_answer_choices_and_all_source_columns():
    assert row(recipe(), text=" Fine. ", label="good", extra=1) == {
        "id": "train-1", "prompt": "Review: Fine.\nSentiment:", "answer": "good", "choices": ["bad", "good"],
        "fields": {"text": " Fine. ", "label": "good", "extra": 1},
    }


def test_columns_rename_and_reach_into_nested_ones():
    made = recipe(columns={"text": "review", "options": "choices.text"}, choices="options", answer={"column": "key", "of": "options"})
    actual = row(made, review="x", choices={"text": ["bad", "good", "bad"]}, key="B")
    assert (actual["prompt"], actual["answer"], actual["choices"]) == ("Review: x\nSentiment:", "good", ["bad", "good"])
    assert actual["fields"] == {"choices": {"text": ["bad", "good", "bad"]}, "key": "B", "text": "x", "options": ["bad", "good", "bad"]}


@pytest.mark.parametrize(("value", "text"), [(None, ""), (42.0, "42"), (2.5, "2.5"), (" a ", "a"), (["a", 1.0], "a, 1"), (-3.0, "-3")])
def test_values_as_text(value, text):
    assert tasks.text_of(value) == text


@pytest.mark.parametrize(("stars", "word"), [("-4", "bad"), (-0.5, "bad"), ("0", None), (0.5, "good"), ("3.9", "good")])
def test_bins_include_both_ends_and_leave_the_rest_out(stars, word):
    made = recipe(answer={"column": "stars", "bins": {"bad": [None, -0.5], "good": [0.5, None]}}, choices=...)
    actual = row(made, text="x", stars=stars)
    assert (actual and actual["answer"]) == word
    assert made.choice_list == ["bad", "good"]


def test_the_first_bin_that_fits_counts():
    made = recipe(answer={"column": "n", "bins": {"bad": [None, 1], "good": [1, None]}}, choices=...)
    assert row(made, text="x", n=1)["answer"] == "bad"


@pytest.mark.parametrize(("value", "word"), [(0, "bad"), ("0", "bad"), (0.0, "bad"), (1, "good"), (2, None)])
def test_labels_match_by_their_text_and_null_leaves_out(value, word):
    made = recipe(answer={"column": "l", "labels": {0: "bad", 1: "good", 2: None}}, choices=...)
    actual = row(made, text="x", l=value)
    assert (actual and actual["answer"]) == word


@pytest.mark.parametrize(("key", "word"), [("A", "x"), ("c", "z"), (1, "y"), ("2", "z")])
def test_an_element_by_letter_or_number(key, word):
    assert row(recipe(choices="c", answer={"column": "k", "of": "c"}), text="t", k=key, c=["x", "y", "z"])["answer"] == word


@pytest.mark.parametrize(("value", "text"), [("145.0", "145"), (450.0, "450"), ("1,234", "1234"), (2.5, "2.5")])
def test_numbers_are_plain(value, text):
    made = recipe(scoring="generate", answer={"column": "n", "number": True})
    actual = row(made, text="x", n=value)
    assert (actual["answer"], actual["choices"]) == (text, None)


def test_an_empty_input_leaves_no_blank_lines():
    made = recipe(scoring="generate", prompt="{instruction}\n\n{input}", answer="{output}")
    assert row(made, instruction="Say hi.", input="", output="hi")["prompt"] == "Say hi."
    assert row(made, instruction="Say it.", input="hi", output="hi")["prompt"] == "Say it.\n\nhi"


def test_double_braces_are_text():
    assert row(recipe(prompt="{{{text}}}"), text="x", label="good")["prompt"] == "{x}"


def test_fields_hold_what_json_can_hold():
    actual = row(recipe(), text="x", label="good", score=float("nan"), when={1: (b"a",)})
    assert actual["fields"]["score"] is None and actual["fields"]["when"] == {"1": [None]}


@pytest.mark.parametrize(("keys", "fields", "message"), [
    ({}, {"review": "x", "label": "good"}, "'text'.*row 1 of train.*review, label"),
    ({"columns": {"text": "revue"}}, {"review": "x", "label": "good"}, "task.columns.text.*'revue'.*there are: review, label"),
    ({}, {"text": "x", "label": "fine"}, "'fine'.*bad, good"),
    ({}, {"text": "x", "label": None}, "row 1 of train has an empty answer"),
    ({}, {"text": "  ", "label": "good"}, "row 1 of train has no text"),
    ({"answer": {"column": "l", "labels": {0: "bad"}}, "choices": ["bad"]}, {"text": "x", "l": 3}, "l=3.*task.answer.labels"),
    ({"answer": {"column": "n", "bins": {"bad": [0, 1]}}, "choices": ["bad"]}, {"text": "x", "n": "many"}, "n='many'.*not a number"),
    ({"choices": "c"}, {"text": "x", "label": "good", "c": "good"}, "c='good'.*list"),
    ({"answer": {"column": "k", "of": "c"}, "choices": "c"}, {"text": "x", "k": "F", "c": ["a", "b"]}, "k='F'.*no place"),
    ({"answer": {"column": "k", "of": "c"}, "choices": "c"}, {"text": "x", "k": "", "c": ["a", "b"]}, "k=''.*no place"),
])
def test_a_row_that_does_not_fit_says_why(keys, fields, message):
    with pytest.raises(UserError, match=message):
        row(recipe(**keys), **fields)


@pytest.mark.parametrize(("keys", "message"), [
    ({"promt": "x"}, "task.promt.*prompt"),
    ({"prompt": ...}, "task.prompt' is missing"),
    ({"prompt": "no column"}, "task.prompt.*at least one column"),
    ({"prompt": "{text"}, "task.prompt"),
    ({"prompt": "{text!r}"}, "name of a column and nothing else"),
    ({"prompt": "{text:>3}"}, "name of a column and nothing else"),
    ({"prompt": "{}"}, "name of a column and nothing else"),
    ({"source": {"files": "x"}}, "task.source.type"),
    ({"choices": [True, False]}, "in quotes"),
    ({"leakage": "ignore"}, "task.leakage.*choose one of error, drop"),
    ({"scoring": "guess"}, "task.scoring"),
    ({"answer": {"column": "n", "of": "c", "number": True}}, "not of and number"),
    ({"answer": {"column": "n", "lables": {}}}, "task.answer.lables.*labels"),
    ({"answer": {"column": "n", "bins": {"bad": 3}}}, "task.answer.bins.bad"),
    ({"answer": {"column": "n", "bins": {"bad": [3, 1]}}}, "task.answer.bins.bad"),
])
def test_a_wrong_key_is_named(keys, message):
    with pytest.raises(UserError, match=message):
        made = recipe(**keys)
        _ = made.spec


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_a_wrong_size_is_named(size):
    with pytest.raises(UserError, match="task.split.test"):
        _ = recipe(split={"test": size}).sizes
