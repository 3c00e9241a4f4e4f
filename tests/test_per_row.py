"""Metrics that are a number a row: known answers, a function of the user's own, and that no result can name one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline.core.files import UserError
from pipeline.core.settings import Task, build
from pipeline.records.finished import cell_config
from pipeline.records.results import Score
from pipeline.scoring.answers import headline, score
from pipeline.scoring.per_row import measured, number_in, own, source_of, token_f1


def task(**changes):
    return build(Task, {"name": "t", "scoring": "generate", **changes}, "task")


def said(pairs):
    return [{"id": str(i), "answer": answer, "prediction": text.splitlines()[0] if text else None, "correct": text == answer, "output": text}
            for i, (text, answer) in enumerate(pairs)]


def values(pairs, **changes):
    made = task(**changes)
    rows = [{"id": str(i)} for i in range(len(pairs))]
    found = measured(said(pairs), rows, made)
    return [one["value"] for one in found], score(found, made), found


def test_exact_match_wants_the_whole_text():
    found, actual, _ = values([("two  words\n", "two words"), ("Two words", "two words"), ("two words\nmore", "two words"), ("", "x")], metric="exact_match")
    assert found == [1, 0, 0, 0] and actual.exact_match == actual.accuracy == 0.25


@pytest.mark.parametrize(("text", "answer", "f1"), [("The cat sat.", "a cat sat", 1.0), ("cat", "cat sat on", 0.5), ("dog", "cat", 0.0), ("", "", 1.0)])
def test_token_f1_of_known_texts(text, answer, f1):
    assert token_f1(text, answer, {}) == pytest.approx(f1)


@pytest.mark.parametrize(("tolerance", "found"), [(0.0, [1, 0, 0, 1, 0]), (0.01, [1, 1, 0, 1, 0]), (0.5, [1, 1, 1, 1, 0])])
def test_a_number_within_a_tolerance(tolerance, found):
    pairs = [("so 1,000", "#### 1000"), ("1009.5", "1000"), ("1400", "1000"), ("-0.50", "-.5"), ("none", "3")]
    actual, whole, predictions = values(pairs, metric="numeric", tolerance=tolerance)
    assert actual == found and whole.numeric == whole.accuracy == sum(found) / 5 and [p["correct"] for p in predictions] == [v == 1 for v in found]
    assert number_in("no digits") is None
    with pytest.raises(UserError, match=r"row '0' has the answer 'three', in which task.metric=numeric finds no number"):
        values([("3", "three")], metric="numeric")


def test_the_pattern_decides_what_is_said():
    made = task(metric="token_f1", answer_pattern="#### (.*)")
    one = {"id": "0", "answer": "cat", "prediction": "cat", "correct": True, "output": "long words #### cat"}
    assert measured([one], [{}], made)[0]["value"] == 1 and measured([one], [{}], task(metric="token_f1"))[0]["value"] < 1


def test_other_metrics_leave_predictions_as_they_are():
    assert measured(said([("a", "a")]), [{}], task()) == said([("a", "a")]) and score(said([("a", "a")]), task()).token_f1 is None


OWN = "def half(prediction, answer, row):\n    return 0.5 if row['id'] == '0' else prediction == answer\n\ndef wild(*_):\n    return 7\n"


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_metric_17.py").write_text(OWN)
    for metric in (f"{tmp_path}/my_metric_17.py:half", "my_metric_17:half"):
        monkeypatch.syspath_prepend(str(tmp_path))
        found, actual, _ = values([("a", "b"), ("c", "c"), ("", "d")], metric=metric)
        assert found == [0.5, 1, 0] and actual.custom == 0.5 and task(metric=metric).metric_name == "custom"
        assert headline(actual, task(metric=metric).metric_name) == 0.5
        assert source_of(metric) == tmp_path / "my_metric_17.py" or source_of(metric) == Path(f"{tmp_path}/my_metric_17.py")
    with pytest.raises(UserError, match=r"gave 7 for row '1'; it has to give a number from 0 to 1"):
        own("my_metric_17:wild")("a", "b", {"id": "1"})
    for wrong, reason in (("my_metric_17:gone", "has no function 'gone'"), ("no_such_module_17:f", "cannot be imported")):
        with pytest.raises(UserError, match=reason):
            own(wrong)
    assert source_of("accuracy") is None


def test_a_result_cannot_name_a_function_to_import(monkeypatch):
    @dataclasses.dataclass
    class Stored:
        config: dict
        metric: str = "custom"

    stored = Stored({"task": {"name": "t", "scoring": "generate", "metric": "os:system"}, "model": {"name": "m"}})
    cfg = OmegaConf.create({"task": {"name": "t"}, "model": {"trust_remote_code": False}, "paths": {}, "device": "cpu", "evaluate": {}})
    assert cell_config(stored, cfg).task.metric == "custom"
    with pytest.raises(UserError, match="which no result names; give it again"):
        measured(said([("a", "a")]), [{}], task(metric="custom"))
    stored.metric = "accuracy"  # a lie changes nothing
    assert cell_config(stored, cfg).task.metric == "custom"
    cfg.task.metric = "os:system"
    assert cell_config(stored, cfg).task.metric == "os:system", "this run's own config names it"


def test_every_metric_is_a_field_of_a_score():
    from pipeline.core.settings import CUSTOM, METRICS
    from pipeline.reporting import figures

    assert {*METRICS, CUSTOM} == set(figures.METRICS) and {*METRICS, CUSTOM} <= {f.name for f in dataclasses.fields(Score)}


def test_the_file_of_an_own_metric_is_part_of_what_a_cell_is(tmp_path):
    from pipeline.cell import identity
    from pipeline.core.compose import compose

    file = tmp_path / "mine.py"
    found = []
    for text in ("def f(*_):\n    return 1\n", "def f(*_):\n    return 0\n"):
        file.write_text(text)
        found.append(identity.fingerprint(compose(["technique=lora", f"+task.metric={file}:f"])))
    assert found[0] != found[1] and "mine.py" in " ".join(identity.inputs(compose(["technique=lora", f"+task.metric={file}:f"])))
