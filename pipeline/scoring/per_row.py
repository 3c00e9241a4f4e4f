"""Metrics that are a number a row: exact match, a number within a tolerance, token F1, or a function of the user's own.

Library of answers.py. `task.metric=module:function` names a function(prediction, answer, row) that gives 0 to 1; `folder/file.py:function` one in a file.
It is imported where this run's own config names it; a config that comes out of a result has no such name (records/finished.cell_config).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.core.settings import CUSTOM, Task
from pipeline.scoring.reading import reference

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")
ARTICLES = re.compile(r"\b(a|an|the)\b")
DECIDE = ("exact_match", "numeric")
"""Metrics whose value, 0 or 1, also says which answers are right."""
Measure = Callable[[str, str, dict], float]
"""(what was said, the answer, the row) -> 0 to 1."""


def measured(predictions: Sequence[dict], rows: Sequence[dict], task: Task) -> list[dict]:
    """The predictions with `value`, the row's number under the task's metric; as they are where the metric is made of right and wrong answers or ROUGE-L.

    What is said, and the reference, is the answer that task.answer_pattern finds, without a pattern all the text. A row without an answer has 0.

    Raises:
        UserError: an own function that cannot be imported, or gives no number from 0 to 1; a reference without a number (metric numeric).
    """
    measure = of(task)
    if measure is None:
        return list(predictions)
    scored = []
    for one, row in zip(predictions, rows, strict=True):
        said = one["prediction"] if task.answer_pattern is not None else one.get("output", one["prediction"])
        value = 0.0 if one["prediction"] is None else measure(said, reference(one["answer"], task.answer_pattern), row)
        scored.append({**one, "value": value, **({"correct": value == 1} if task.metric in DECIDE else {})})
    return scored


def of(task: Task) -> Measure | None:
    """The task's metric as a function of a row; None where it is none of these."""
    if task.own_metric:
        return own(task.metric)
    measures: dict[str, Measure] = {"exact_match": exact_match, "token_f1": token_f1, "numeric": functools.partial(_numeric, task.tolerance)}
    return measures.get(task.metric)


def exact_match(said: str, answer: str, row: dict) -> float:
    """Whether the texts are the same but for white space."""
    return float(said.split() == answer.split())


def token_f1(said: str, answer: str, row: dict) -> float:
    """F1 of the words that both have, without case, punctuation and articles (SQuAD; Rajpurkar et al., 2016)."""
    one, other = Counter(_words(said)), Counter(_words(answer))
    common = (one & other).total()
    if not one or not other:
        return float(one == other)
    return 2 * common / (one.total() + other.total())


def number_in(text: str) -> float | None:
    """The last number in a text; None where there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _numeric(tolerance: float, said: str, answer: str, row: dict) -> float:
    """Whether the last numbers of both lie within `tolerance`, of the reference where that is above 1."""
    expected, number = number_in(answer), number_in(said)
    if expected is None:
        raise UserError(f"row {row.get('id')!r} has the answer {answer!r:.60}, in which task.metric=numeric finds no number; fix the row or the metric")
    return float(number is not None and abs(number - expected) <= tolerance * max(1.0, abs(expected)) + 1e-12)


def _words(text: str) -> list[str]:
    bare = "".join(" " if c in string.punctuation else c for c in text.casefold())
    return ARTICLES.sub(" ", bare).split()


def own(metric: str) -> Measure:
    """The user's function, its values checked. Raises UserError where it cannot be had."""
    function = _imported(metric)

    def measure(said: str, answer: str, row: dict) -> float:
        value = function(said, answer, row)
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value) or not 0 <= value <= 1:
            raise UserError(f"task.metric={metric} gave {value!r} for row {row.get('id')!r}; it has to give a number from 0 to 1")
        return float(value)

    return measure


@functools.cache
def _imported(metric: str) -> Any:
    if metric == CUSTOM:
        raise UserError("the metric of this result is a function of its user's own, which no result names; give it again: task.metric=module:function")
    module, _, name = metric.rpartition(":")
    _look_here()
    try:
        found = _from_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except (ImportError, OSError, SyntaxError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"task.metric={metric} cannot be imported ({reason}); name module:function, or path/to/file.py:function") from error
    function = getattr(found, name, None)
    if not callable(function):
        raise UserError(f"task.metric={metric}: {module} has no function {name!r}; it takes (prediction, answer, row) and gives a number from 0 to 1")
    return function


def _look_here() -> None:
    """Have Python find modules in the folder that one is in, last: python -m does so by itself, a console script does not."""
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source_of(metric: str) -> Path | None:
    """The file that an own metric is in, which decides a cell's outcome; None where it is none, or not found."""
    module = metric.rpartition(":")[0]
    if not module or module.endswith(".py"):
        return Path(module) if module else None
    _look_here()
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin else None
