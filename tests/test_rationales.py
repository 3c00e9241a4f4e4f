"""Teachers and the rationales stage: pipeline/rationales.py, pipeline/teachers/, conf/teacher/."""

import json

import pytest

from pipeline import prepare, rationales
from pipeline.core import compose
from pipeline.core.files import UserError, read_json, read_jsonl, sha256
from pipeline.data.rows import load_rationales
from pipeline.teachers import rationales as teachers_rationales
from pipeline.teachers.base import Explanation, Teacher
from pipeline.teachers.lexicon import Word, scored_words, sentence
from pipeline.teachers.stored import Stored

TEACHERS = sorted(p.stem for p in (compose.CONF / "teacher").glob("*.yaml"))
TEXTS = [
    ("a gorgeous, splendid but tepid film", "positive"), ("not a good film", "negative"), ("a horrible mess", "negative"),
    ("it is a film", "positive"),
]
FIVE = ("terrible", "bad", "okay", "good", "great")


def prepared(folder, task="vader_movies", choices=("negative", "positive"), texts=TEXTS, **more):
    """A hand-made data/<task>, and the overrides that find it."""
    (folder / "data" / task).mkdir(parents=True)
    for split in teachers_rationales.SPLITS:
        rows = [{"id": f"{split}-{i}", "prompt": text, "answer": answer, "choices": choices and list(choices),
                 "fields": {"text": text, **{k: v[i] for k, v in more.items()}}} for i, (text, answer) in enumerate(texts)]
        (folder / "data" / task / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (folder / "data" / task / "manifest.json").write_text("{}", encoding="utf-8")
    return [f"task={task}", f"paths.data={folder / 'data'}", f"paths.rationales={folder / 'rationales'}"]


def test_the_lexicon_labels_explains_and_is_scored(tmp_path, capsys):
    assert rationales.main([*prepared(tmp_path), "teacher=lexicon", "teacher.batch_size=3"]) == 0
    folder = tmp_path / "rationales" / "vader_movies" / "lexicon"
    rows = read_jsonl(folder / "rationales.jsonl")
    assert [r["id"] for r in rows] == [f"{s}-{i}" for s in teachers_rationales.SPLITS for i in range(4)]
    assert rows[0] == {
        "id": "train-0", "split": "train", "answer": "positive", "correct": True,
        "rationale": 'The words "gorgeous" and "splendid" are positive, so the review is positive.',
    }
    assert rows[1]["rationale"] == 'The phrase "not a good" is negative, so the review is negative.'
    assert rows[2]["rationale"] == 'The words "horrible" and "mess" are negative, so the review is negative.'
    assert (rows[3]["rationale"], rows[3]["answer"], rows[3]["correct"]) == ("", "negative", False)
    manifest = read_json(folder / "manifest.json")
    assert manifest["seconds"] >= 0
    assert {k: manifest[k] for k in ("teacher", "task", "rows", "without_rationale")} == {
        "teacher": "lexicon", "task": "vader_movies", "rows": 12, "without_rationale": 3,
    }
    assert manifest["accuracy"] == dict.fromkeys(teachers_rationales.SPLITS, 0.75)
    assert manifest["data_sha256"] == sha256(tmp_path / "data" / "vader_movies" / "manifest.json")
    assert "accuracy train 0.750" in capsys.readouterr().out
    assert load_rationales(folder)["test-2"]["correct"]


def test_the_same_bytes_every_time(tmp_path):
    overrides = [*prepared(tmp_path), "teacher=lexicon"]
    path = tmp_path / "rationales" / "vader_movies" / "lexicon" / "rationales.jsonl"
    digests = {rationales.main([*overrides, f"teacher.batch_size={size}"]) or sha256(path) for size in (1, 256)}
    assert len(digests) == 1


@pytest.mark.parametrize(("text", "found"), [
    ("It is very good", [("good", 1)]), ("It isn't good", [("isn't good", -1)]), ("never so happy", [("happy", 1)]),
    ("no fun at all", [("no fun", -1)]), ("It is not bad", [("not bad", 1)]), ("a table", []), ("kind of good", [("good", 1)]),
])
def test_words_carry_their_negation(text, found):
    assert [(w.text, 1 if w.score > 0 else -1) for w in scored_words(text)] == found


def test_named_words_have_the_scores_that_vader_sums():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer, normalize

    text = "The story is surprisingly sweet and never dull, a great, great film"
    assert SentimentIntensityAnalyzer().polarity_scores(text)["compound"] == round(normalize(sum(w.score for w in scored_words(text))), 4)


def test_sentences():
    good, bad = Word("fun", 2.0), Word("dull", -1.5)
    both = 'The word "fun" is positive and "dull" is negative'
    assert sentence([good, bad], "film", "good") == both + ", so the film is good."
    assert sentence([good, bad], "film", "bad", but=True) == both + ', and what follows "but" counts more, so the film is bad.'
    assert sentence([bad, bad], "film", "bad") == 'The word "dull" is negative, so the film is bad.'
    assert sentence([], "film", "okay", middle=True) == "No word is positive or negative, so the film is okay."
    assert sentence([], "film", "bad") == ""
    many = [Word(w, s) for w, s in (("a", 1.0), ("b", 3.0), ("c", 2.0), ("d", 4.0))]
    assert sentence(many, "film", "good") == 'The words "b", "c" and "d" are positive, so the film is good.'


@pytest.mark.parametrize(("labels", "text", "label"), [
    (("negative", "neutral", "positive"), "it is a film", "neutral"), (("negative", "neutral", "positive"), "a good film", "positive"),
    (FIVE, "a horrible, awful, disgusting mess", "terrible"), (FIVE, "a good film", "good"), (FIVE, "it is a film", "okay"),
    (FIVE[::-1], "a wonderful, great masterpiece", "great"),
])
def test_the_scale_with_the_tasks_labels_is_used(labels, text, label, tmp_path):
    assert rationales.main([*prepared(tmp_path, choices=labels, texts=[(text, label)]), "teacher=lexicon"]) == 0
    assert read_jsonl(tmp_path / "rationales" / "vader_movies" / "lexicon" / "rationales.jsonl")[0]["answer"] == label


def test_a_stored_rationale_that_is_no_text_is_named(tmp_path, capsys):
    words = prepared(tmp_path, rationale=["because", {"a": 1}, "", ""], given_answer=["positive", "negative", "", ""])
    assert rationales.main([*words, "teacher=stored", "teacher.rationale_column=rationale", "teacher.answer_column=given_answer"]) == 2
    said = capsys.readouterr().err
    assert "row train-1 has rationale={'a': 1}, which is an object and no text: name what is inside it" in said and "fix or remove that row" in said


def test_stored_columns(tmp_path):
    texts = [("q", "42"), ("r", "7"), ("s", "x"), ("t", "x")]
    more = {"teacher_rationale": ["6 * 7 is 42.", "guess", None, None], "teacher_answer": [42.0, 8, "X.", None]}
    assert rationales.main([*prepared(tmp_path, choices=None, texts=texts, **more), "teacher=stored"]) == 0
    folder = tmp_path / "rationales" / "vader_movies" / "stored"
    rows = [(r["rationale"], r["answer"], r["correct"]) for r in read_jsonl(folder / "rationales.jsonl") if r["split"] == "train"]
    assert rows == [("6 * 7 is 42.", "42", True), ("guess", "8", False), ("", "X.", True)]
    manifest = read_json(folder / "manifest.json")
    assert manifest["seconds"] is None and manifest["without_rationale"] == 3 and manifest["accuracy"]["test"] == 0.6667


def test_no_teacher_writes_an_empty_file_and_says_so(tmp_path, capsys):
    assert rationales.main([*prepared(tmp_path), "teacher=none"]) == 0
    folder = tmp_path / "rationales" / "vader_movies" / "none"
    assert (folder / "rationales.jsonl").read_bytes() == b"" and read_json(folder / "manifest.json")["rows"] == 0
    assert "no rows, because teacher=none explains nothing" in capsys.readouterr().out


@pytest.mark.parametrize(("overrides", "message"), [
    (["teacher=stored"], "no column 'teacher_rationale' .teacher.rationale_column.; there are: text"),
    (["teacher=lexicon", "teacher.column=body"], "no column 'body' to judge; set teacher.column to one of: text"),
    (["teacher=lexicon", "teacher.scales=[]"], "no scale of conf/teacher/lexicon.yaml has the labels.*negative, positive"),
    (["teacher=lexicon", "teacher.batch_size=0"], "teacher.batch_size"),
    (["teacher=lexicon", "+teacher.colum=x"], "config group 'teacher' is refused.*colum"),
    (["teacher=oracle"], "unknown teacher 'oracle'.*lexicon, local, none, server, stored"),
    (["teacher=none", "task=trec"], "data/trec is not prepared; run: python -m pipeline.prepare task=trec"),
])
def test_a_teacher_that_does_not_fit_says_what_to_change(tmp_path, capsys, overrides, message):
    assert rationales.main([*prepared(tmp_path), *overrides]) == 2
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(capsys.readouterr().err)
    assert not (tmp_path / "rationales").exists()


def test_a_missing_lexicon_package_is_named(tmp_path, capsys, monkeypatch):
    from pipeline.teachers import lexicon

    lexicon._analyser.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "vaderSentiment.vaderSentiment", None)
    assert rationales.main([*prepared(tmp_path), "teacher=lexicon"]) == 2
    assert "needs the package vaderSentiment" in capsys.readouterr().err


@pytest.mark.parametrize("name", TEACHERS)
def test_every_teacher_yaml_builds(name):
    teacher = compose.build(compose.compose([f"teacher={name}"]).teacher, "teacher")
    assert isinstance(teacher, Teacher) and teacher.name == name


def test_explanations_come_in_batches():
    sizes = []

    class Counting(Teacher):
        def explain(self, rows):
            sizes.append(len(rows))
            return [Explanation("because", "x")] * len(rows)

    rows = [{"id": str(i), "answer": "x", "choices": None, "fields": {}} for i in range(7)]
    assert len(teachers_rationales.explained(Counting("c", batch_size=3), "train", rows)) == 7 and sizes == [3, 3, 1]
    with pytest.raises(UserError, match="batch_size"):
        Stored("s", batch_size=-1)


@pytest.mark.slow
def test_the_lexicon_on_the_default_task(tmp_path):
    """VADER is a modest judge of whole review sentences; these are its accuracies on this split."""
    paths = [f"paths.{k}={tmp_path / k}" for k in ("data", "work", "rationales")]
    assert prepare.main(["task=vader_movies", *paths]) == 0 and rationales.main(["task=vader_movies", "teacher=lexicon", *paths]) == 0
    manifest = read_json(tmp_path / "rationales" / "vader_movies" / "lexicon" / "manifest.json")
    assert manifest["accuracy"] == pytest.approx({"train": 0.658, "validation": 0.654, "test": 0.669}, abs=5e-4)
