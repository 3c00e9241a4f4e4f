"""The prepare stage, end to end and in parts: pipeline/prepare.py and conf/task/."""

import json
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from pipeline import prepare
from pipeline.core import compose, settings
from pipeline.core.files import UserError, read_json, read_jsonl, sha256
from pipeline.core.settings import build
from pipeline.data import near
from pipeline.data import recipe as tasks
from pipeline.data import splits as data_splits
from pipeline.data.rows import read_rows
from pipeline.data.sources import Loaded

SHARED = Path("../shared/data")
TASKS = sorted(p.stem for p in (compose.CONF / "task").glob("*.yaml"))
REVIEWS = """
    name: reviews
    source: {type: files, files: FOLDER/reviews.csv}
    prompt: "Review: {text}\\nSentiment:"
    answer: {column: stars, bins: {negative: [1, 2], positive: [4, 5]}}
    scoring: choice
"""


def make(sets, **keys):
    """`assemble` over rows given as (text, label) pairs by set."""
    base = {"name": "t", "scoring": "choice", "source": {"type": "files"}, "prompt": "{text}", "answer": "{label}"}
    recipe = build(tasks.Recipe, {**base, "choices": ["bad", "good"], **keys}, "task")
    return data_splits.assemble(recipe, Loaded({s: [{"text": t, "label": label} for t, label in rows] for s, rows in sets.items()}, {}))


def pairs(prefix, count):
    return [(f"{prefix} {i}", "good" if i % 2 else "bad") for i in range(count)]


def texts(rows):
    return [row["fields"]["text"] for row in rows]


def own_task(folder, yaml=REVIEWS, csv=None):
    """Overrides that prepare a task YAML of a user's own, which lies in `folder`."""
    (folder / "task").mkdir(exist_ok=True)
    (folder / "task" / "own.yaml").write_text(textwrap.dedent(yaml).replace("FOLDER", str(folder)), encoding="utf-8")
    if csv is not None:
        (folder / "reviews.csv").write_text(csv, encoding="utf-8")
    paths = [f"paths.{k}={folder / k}" for k in ("data", "work")]
    return [f"hydra.searchpath=[file://{folder}]", "task=own", *paths]


def reviews(count):
    return "text,stars\n" + "".join(f"film {i},{i % 5 + 1}\n" for i in range(count))


def test_a_csv_and_eight_lines_of_yaml_make_a_task(tmp_path, capsys):
    overrides = own_task(tmp_path, csv=reviews(100))
    assert prepare.main(overrides) == 0
    folder = tmp_path / "data" / "reviews"
    splits = {name: read_jsonl(folder / f"{name}.jsonl") for name in data_splits.SPLITS}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 56, "validation": 8, "test": 16}  # 20 of 100 have 3 stars
    for rows in splits.values():
        for row in rows:
            number = int(row["fields"]["text"].split()[1])
            assert row["id"] == f"row-{number + 1}" and row["prompt"] == f"Review: film {number}\nSentiment:"
            assert row["answer"] == ("negative" if number % 5 < 2 else "positive") and row["choices"] == ["negative", "positive"]
    manifest = read_json(folder / "manifest.json")
    assert manifest["rows"] == {"train": 56, "validation": 8, "test": 16}
    assert manifest["left_out"]["unlabelled"] == {"train": 20}
    assert manifest["sha256"]["test.jsonl"] == sha256(folder / "test.jsonl")
    assert sum(manifest["labels"]["train"].values()) == 56
    assert "20" in capsys.readouterr().out
    before = sha256(folder)
    assert prepare.main(overrides) == 0 and sha256(folder) == before


@pytest.mark.parametrize(("yaml", "csv", "message"), [
    (REVIEWS.replace("prompt:", "promt:"), reviews(50), "unknown config key 'task.promt', did you mean 'prompt'"),
    (REVIEWS.replace("files:", "fiels:"), reviews(50), "config group 'task.source' is refused.*fiels"),
    (REVIEWS.replace("{text}", "{txt}"), reviews(50), "'txt', which row 1 of .*reviews.csv does not have; there are: text, stars"),
    (REVIEWS, None, "reviews.csv does not exist"),
    (REVIEWS, "text,stars\n", "reviews.csv holds no rows; fix the file"),
    (REVIEWS, "text,stars\n" + "".join(f"film {i},5\n" for i in range(50)), "training rows of task reviews have the answer 'positive'"),
    (REVIEWS, "text,stars\na,5\nb\n", "reviews.csv line 3 has 1 cells"),
    (REVIEWS, reviews(20).replace("film 7,3", "film 7,many"), "row 8 of .*reviews.csv has stars='many'"),
])
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, yaml, csv, message):
    assert prepare.main(own_task(tmp_path, yaml, csv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)
    assert not (tmp_path / "data").exists() or list((tmp_path / "data").iterdir()) == []


def test_a_failure_leaves_the_earlier_data_as_they_were(tmp_path):
    assert prepare.main(own_task(tmp_path, csv=reviews(100))) == 0
    before = sha256(tmp_path / "data")
    assert prepare.main(own_task(tmp_path, csv="text,stars\na,many\n")) == 2
    assert sha256(tmp_path / "data") == before


@pytest.mark.parametrize(("one", "other", "same"), [
    ("A fine  film!", "a fine film", True), ("well-made", "Well made", True), ('"Quoted"', "quoted.", True), ("Straße", "STRASSE", True),
    ("3 - 2", "3 + 2", False), ("3-2", "3+2", False), ("2.5", "25", False), ("good", "goods", False), ("a = b", "a < b", False),
])
def test_what_counts_as_the_same_text(one, other, same):
    assert (near.normalised(one) == near.normalised(other)) is same


def test_duplicates_are_dropped_and_counted_and_the_first_stays():
    sets, dropped = make({"train": [("A film!", "good"), ("a film", "good"), *pairs("x", 20)], "test": pairs("y", 4)})
    everything = [row for rows in sets.values() for row in rows]
    assert dropped["duplicate"] == {"train": 1, "test": 0} and dropped["contradicting"] == {"train": 0, "test": 0}
    assert [r["prompt"] for r in everything if r["prompt"].lower().startswith("a film")] == ["A film!"]


@pytest.mark.parametrize("scoring", [{}, {"scoring": "generate", "choices": None}])
def test_rows_that_contradict_an_earlier_one_are_left_out_and_no_duplicates(scoring):
    held = [("A film!", "good"), ("a film", "bad"), ("a film", "good"), *pairs("x", 40)]
    sets, dropped = make({"train": held, "test": pairs("y", 4)}, **scoring)
    assert dropped["contradicting"] == {"train": 1, "test": 0} and dropped["duplicate"] == {"train": 1, "test": 0}
    assert [r["answer"] for rows in sets.values() for r in rows if r["prompt"].lower().startswith("a film")] == ["good"]
    assert data_splits.left_out(dropped)["contradicting"] == {"train": 1} and "contradicting" not in data_splits.left_out({"contradicting": {"train": 0}})


def test_many_contradicting_rows_are_refused_where_answers_are_chosen():
    twice = [*pairs("x", 8), *((text, "bad" if label == "good" else "good") for text, label in pairs("x", 4)), *pairs("z", 20)]
    with pytest.raises(UserError, match="^4 of the 32 rows of train have a text .* another answer .first: train-1 has 'bad', train-9 has 'good'.; fix"):
        make({"train": twice, "test": pairs("y", 4)})
    assert make({"train": twice, "test": pairs("y", 4)}, scoring="generate", choices=None)[1]["contradicting"]["train"] == 4


def test_the_same_question_with_other_choices_contradicts_nothing():
    rows = [{"text": f"q {i // 2}", "options": [f"a {i}", f"b {i}"], "key": "A"} for i in range(40)]
    rows += [{"text": f"r {i}", "options": ["a", "b"], "key": "AB"[i % 2]} for i in range(10)]
    recipe = build(tasks.Recipe, {"name": "t", "scoring": "choice", "source": {"type": "files"}, "prompt": "{text}",
                                  "answer": {"column": "key", "of": "options"}, "choices": "options"}, "task")
    dropped = data_splits.assemble(recipe, Loaded({"train": rows}, {}))[1]
    assert dropped["contradicting"] == {"train": 0} and dropped["duplicate"] == {"train": 20}


def test_generated_answers_that_differ_in_case_alone_are_told(tmp_path, capsys):
    yaml = REVIEWS.replace("answer: {column: stars, bins: {negative: [1, 2], positive: [4, 5]}}", "answer: '{stars}'").replace("choice", "generate")
    rows = "text,stars\n" + "".join(f"film {i},{('Yes', 'no', 'yes', 'YES')[i % 4]}\n" for i in range(60))
    assert prepare.main(own_task(tmp_path, yaml, rows)) == 0
    assert "warning: 1 answers are spelt in ways that differ in case alone (first: YES, Yes, yes)" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "reason"), [
    (b"good film", "bytes and no text"), (float("nan"), "no finite number"), (float("-inf"), "no finite number"), ({"a": 1}, "an object and no text"),
    ([None, None], "a list with null or another list inside"), (["a", ["b"]], "a list with null or another list inside"), (["a", {"b": 1}], "an object"),
    ("a\0b", "a text with a NUL character"), ("\ud800", "a text with half of a surrogate pair"),
])
def test_a_value_that_has_no_text_is_named_with_its_row_and_column(value, reason):
    with pytest.raises(UserError, match=f"^row 3 of train has text=.*, which is {reason}.*; fix or remove that row$"):
        make({"train": [*pairs("x", 2), (value, "good"), *pairs("y", 20)]})
    with pytest.raises(UserError, match=f"^row 1 of train has label=.*, which is {reason}.*; fix or remove that row$"):
        make({"train": [("x", value)]}, scoring="generate", choices=None)


@pytest.mark.parametrize(("keys", "sentence"), [
    ({"choices": ["good", "bad", "BAD"]}, "'task.choices' has 'bad' and 'BAD', which differ in case alone; write one of them for both"),
    ({"choices": ["good", None]}, "'task.choices' holds None, which is no word"),
    ({"choices": ["good", ["bad"]]}, "'task.choices' holds ['bad'], which is no word"),
    ({"answer": {"column": "label", "labels": {"p": "pos", "n": "neg", "N": "NEG"}}, "choices": None}, "'task.answer.labels' has 'neg' and 'NEG'"),
    ({"answer": {"column": "label", "labels": {"p": {"a": 1}, "n": "neg"}}, "choices": None}, "'task.answer.labels' holds {'a': 1}, which is an object"),
    ({"answer": {"column": "label", "labels": {"p": "pos", " p": "neg"}}, "choices": None}, "'task.answer.labels' lists 'p' twice"),
    ({"answer": {"column": "label", "bins": {"a": [float("nan"), 2]}}, "choices": None}, "'task.answer.bins.a' is [nan, 2]; give [lowest, highest]"),
    ({"prompt": "{text}\0"}, "'task.prompt' is '{text}\\x00', which holds a NUL character"),
    ({"transfer": ["../x"]}, "'task.transfer' is '../x', which cannot name"),
    ({"transfer": ["a", "a"]}, "'task.transfer' is ['a', 'a']; name each set once"),
])
def test_words_of_a_yaml_that_cannot_be_answers(keys, sentence):
    with pytest.raises(UserError) as caught:
        make({"train": pairs("x", 40)}, **keys)
    assert sentence in str(caught.value)


def test_drawn_splits_share_no_text_and_depend_on_the_seed_alone():
    sets, _ = make({"train": pairs("x", 100)}, split={"validation": 10, "test": 0.3})
    again, _ = make({"train": pairs("x", 100)}, split={"validation": 10, "test": 0.3})
    other, _ = make({"train": pairs("x", 100)}, split={"validation": 10, "test": 0.3, "seed": 1})
    assert {name: len(rows) for name, rows in sets.items()} == {"train": 60, "validation": 10, "test": 30}
    assert sets == again != other
    assert sorted(t for rows in sets.values() for t in texts(rows)) == sorted(t for t, _ in pairs("x", 100))


def test_given_splits_stay_and_a_missing_one_is_drawn_from_train():
    sets, dropped = make({"train": pairs("x", 100), "test": pairs("y", 20)}, split={"train": 30, "test": 5})
    assert {name: len(rows) for name, rows in sets.items()} == {"train": 30, "validation": 10, "test": 5}
    assert all(t.startswith("y") for t in texts(sets["test"])) and all(t.startswith("x") for t in texts(sets["train"] + sets["validation"]))
    assert dropped["unused"] == {"train": 60, "test": 15}


def test_a_text_in_two_given_splits_is_an_error_or_dropped():
    given = {"train": [*pairs("x", 20), ("In both!", "good"), ("moved", "bad")], "validation": [*pairs("v", 4), ("in both", "good")],
             "test": [*pairs("y", 4), ("IN BOTH", "good")], "other": [*pairs("o", 4), ("Moved.", "bad")]}
    with pytest.raises(UserError, match="1 of the texts of validation.*validation-5, which test has as test-5.*task.leakage=drop"):
        make(given, transfer=["other"])
    sets, dropped = make(given, transfer=["other"], leakage="drop")
    assert {name: len(rows) for name, rows in sets.items()} == {"train": 21, "validation": 4, "test": 5, "other": 4}
    assert dropped["leaked"] == {"test": 0, "validation": 1, "train": 1, "other": 1}


def test_a_transfer_set_must_be_listed():
    for listed, given in ((["other"], {}), ([], {"other": pairs("o", 4)})):
        with pytest.raises(UserError, match="task.transfer"):
            make({"train": pairs("x", 20), **given}, transfer=listed)
    with pytest.raises(UserError, match="no set named train"):
        make({"test": pairs("x", 20)})


def test_labels_that_training_never_saw():
    with pytest.raises(UserError, match="test has the label 'odd' .test-5., which training never saw"):
        make({"train": pairs("x", 20), "test": [*pairs("y", 4), ("z", "odd")]}, choices=["bad", "good", "odd"])


def test_rows_must_suffice():
    with pytest.raises(UserError, match="20 rows are too few for task.split .*validation 10, test 15"):
        make({"train": pairs("x", 20)}, split={"validation": 10, "test": 15})
    with pytest.raises(UserError, match="task.split.train is 50, but 14 rows are left"):
        make({"train": pairs("x", 20)}, split={"train": 50})
    with pytest.raises(UserError, match="no rows are left for test"):
        make({"train": pairs("x", 20), "test": []})


def test_balance():
    sets, _ = make({"train": pairs("x", 20), "test": pairs("y", 4)})
    assert data_splits.balance(sets["test"]) == {"bad": 2, "good": 2}
    own = [{"answer": "b", "choices": ["a", "b"]}, {"answer": "c", "choices": ["c", "d"]}]
    assert data_splits.balance(own) == {"choice 1": 1, "choice 2": 1}
    assert data_splits.balance([{"answer": a, "choices": None} for a in "xxy"]) == {"distinct answers": 2}


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(prepare, "write_jsonl", full)
    assert prepare.main(own_task(tmp_path, csv=reviews(50))) == 2
    assert "cannot write" in capsys.readouterr().err and list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("task", TASKS)
def test_every_task_yaml_reads(task):
    cfg = compose.compose([f"task={task}"])
    recipe = tasks.read(cfg)
    compose.build(cfg.task.source, "task.source")
    assert recipe.name == task and recipe.licence and (recipe.spec is None or recipe.spec.column)
    assert settings.read(cfg).task.scoring == recipe.scoring


def test_the_shipped_instructions(tmp_path):
    assert prepare.main(["task=instruct", f"paths.data={tmp_path}"]) == 0
    row = next(r for r in read_jsonl(tmp_path / "instruct" / "train.jsonl") if r["fields"]["input"])
    assert row["prompt"] == f"{row['fields']['instruction']}\n\n{row['fields']['input']}" and row["choices"] is None


HUB = {
    "cqa_hub": ({"question": "Where?", "choices": {"label": ["A", "B"], "text": ["in", "out"]}, "answerKey": "B"}, "out", ["in", "out"]),
    "svamp_hub": ({"Body": "One and one.", "Question": "How many?", "Answer": "2.0"}, "2", None),
    "esnli_hub": ({"premise": "a", "hypothesis": "b", "label": 2}, "contradiction", ["entailment", "neutral", "contradiction"]),
    "trec_hub": (
        {"text": "Who?", "label_coarse_original": "HUM"}, "person", ["number", "place", "person", "description", "thing", "abbreviation"],
    ),
}


@pytest.mark.parametrize("task", HUB)
def test_hub_tasks_over_a_local_repository(task, tmp_path):
    """The same columns as on the hub, in a local folder; two rows a split, told apart by their text."""
    raw, answer, choices = HUB[task]
    text = next(k for k, v in raw.items() if isinstance(v, str))
    other = {"cqa_hub": {"answerKey": "A"}, "esnli_hub": {"label": 0}, "trec_hub": {"label_coarse_original": "NUM"}}
    (tmp_path / "repo").mkdir()
    for split in ("train", "validation", "test"):
        rows = [{**raw, text: f"{split} {i}", **(other.get(task, {}) if i % 2 else {})} for i in range(12)]
        (tmp_path / "repo" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    paths = [f"paths.data={tmp_path}", f"paths.work={tmp_path / 'work'}"]
    assert prepare.main([f"task={task}", f"task.source.id={tmp_path / 'repo'}", *paths]) == 0
    test = read_jsonl(tmp_path / task / "test.jsonl")
    assert len(test) == 12
    row = next(r for r in test if r["id"] == "test-1")
    assert (row["answer"], row["choices"]) == (answer, choices)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the files beside the project are not here")
@pytest.mark.parametrize(("task", "rows"), [
    ("cqa", {"train": 8741, "validation": 1000, "test": 1221}), ("svamp", {"train": 700, "validation": 100, "test": 200}),
    ("esnli", {"train": 8840, "validation": 1000, "test": 9824}), ("trec", {"train": 4868, "validation": 497, "test": 500}),
])
def test_the_files_beside_the_project(task, rows, tmp_path):
    assert prepare.main([f"task={task}", f"paths.data={tmp_path}"]) == 0
    assert read_json(tmp_path / task / "manifest.json")["rows"] == rows
    row = read_jsonl(tmp_path / task / "train.jsonl")[0]
    assert task == "trec" or {"teacher_rationale", "teacher_answer"} <= set(row["fields"])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vader_movies", "vader_movies_3", "vader_movies_5"])
def test_the_default_task_from_the_registry(task, tmp_path):
    assert prepare.main([f"task={task}", f"paths.data={tmp_path}", f"paths.work={tmp_path / 'work'}"]) == 0
    manifest = read_json(tmp_path / task / "manifest.json")
    assert (manifest["rows"]["validation"], manifest["rows"]["test"]) == (1000, 2000) and manifest["rows"]["train"] >= 7000
    left_out = sum(counts.get("train", 0) for counts in manifest["left_out"].values())
    assert sum(manifest["rows"][s] for s in data_splits.SPLITS) == 10605 - left_out
    saved = [row for name in data_splits.SPLITS for row in read_jsonl(tmp_path / task / f"{name}.jsonl")]
    assert len({near.normalised(row["prompt"]) for row in saved}) == len(saved)
    assert "clichés disappear" in " ".join(row["prompt"] for row in saved)  # the file is UTF-8, whatever its README's encoding


MANY = [f"label {n}" for n in range(40)]


def of_labels(counts):
    return [(f"text {label} {n}", label) for label, count in counts.items() for n in range(count)]


def test_a_drawn_split_that_would_miss_labels_has_every_one_in_its_share():
    counts = {label: 10 + 10 * (n % 2) for n, label in enumerate(MANY)}
    sets, _ = make({"train": of_labels(counts)}, choices=MANY, split={"seed": 1})
    by_split = {name: Counter(row["answer"] for row in rows) for name, rows in sets.items()}
    assert [by_split[name][label] for name in ("test", "validation", "train") for label in MANY[:2]] == [2, 4, 1, 2, 7, 14]
    assert {name: len(rows) for name, rows in sets.items()} == {"train": 420, "validation": 60, "test": 120}
    plain, _ = make({"train": of_labels(counts)}, choices=MANY, split={"seed": 1, "stratify": False})
    assert len({row["answer"] for row in plain["validation"]}) < 40 and [len(rows) for rows in plain.values()] == [len(rows) for rows in sets.values()]


def test_a_draw_that_leaves_no_label_out_is_the_plain_one():
    rows = {"train": pairs("film", 200)}
    assert make(rows) == make(rows, split={"stratify": False}) != make(rows, split={"stratify": True})


def test_rare_labels_stay_in_training_and_the_sizes_are_as_asked():
    counts = {"common": 50, "rare": 1, "two": 2}
    sets, _ = make({"train": of_labels(counts)}, choices=list(counts), split={"stratify": True, "test": 7, "validation": 5})
    assert [len(sets[name]) for name in ("test", "validation", "train")] == [7, 5, 41]
    assert {row["answer"] for row in sets["train"]} == set(counts)


def test_many_choices_are_written_once_and_read_back_into_every_row(tmp_path, capsys):
    folder = tmp_path / "data" / "reviews"
    yaml = f"""
        name: reviews
        source: {{type: files, files: FOLDER/reviews.csv}}
        prompt: "{{text}}"
        answer: "{{label}}"
        choices: [{', '.join(MANY)}]
        scoring: choice
    """
    rows = of_labels(dict.fromkeys(MANY, 8))
    assert prepare.main(own_task(tmp_path, yaml, "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))) == 0
    assert all("choices" not in row for row in read_jsonl(folder / "train.jsonl")) and read_json(folder / "manifest.json")["choices"] == MANY
    assert all(row["choices"] == MANY for name in ("train", "test") for row in read_rows(folder / f"{name}.jsonl"))
    assert "40 labels of" in capsys.readouterr().out


def test_splits_that_tell_nothing_are_warned_about(tmp_path, capsys):
    assert prepare.main(own_task(tmp_path, csv=reviews(10))) == 0
    assert "warning: validation has 1 row, which tell" in (said := capsys.readouterr().err) and "warning: test has 2 rows, which tell" in said
