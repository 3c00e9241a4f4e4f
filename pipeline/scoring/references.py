"""The reference answers of a task scored as a model's answers would be: what a perfect model reaches, before anything runs.

Library of `python -m pipeline.prepare`. What is not 100% here can be reached by no technique: an answer_pattern that misses the answers, a metric that
does not see them, answers longer than max_new_tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.core.files import UserError
from pipeline.core.settings import Task
from pipeline.scoring.answers import by_row
from pipeline.scoring.per_row import measured
from pipeline.scoring.reading import agrees, extract

SHOWN = 3
Cut = Callable[[str], str | None]
"""An answer -> what of it fits into max_new_tokens; None: all of it."""


def check(sets: dict[str, list[dict[str, Any]]], task: Task, cut: Cut) -> list[str]:
    """Score the references of every set and say what a reader should know of them.

    Raises:
        UserError: references that are right or wrong do not all count as right, whole or cut at max_new_tokens; three are shown.
    """
    if task.scoring == "choice":
        return []
    rows = [row for each in sets.values() for row in each]
    failed = list(_failed(rows, [row["answer"] for row in rows], task))
    if failed and task.own_metric:
        return [f"{len(failed):,} of the {len(rows):,} reference answers of task {task.name} are below 1 under task.metric={task.metric}: {_shown(failed)}"]
    if failed:
        raise UserError(f"{len(failed):,} of the {len(rows):,} reference answers of task {task.name} do not count as right when they are scored as a model's "
                        f"answer is ({_how(task)}), so no technique could reach 100%: {_shown(failed)}; {_fix(task)}")
    long = [(row, part) for row in rows if (part := cut(row["answer"])) is not None]
    lost = list(_failed([row for row, _ in long], [part for _, part in long], task))
    if not lost:
        return []
    what = (f"{len(lost):,} of the {len(rows):,} reference answers of task {task.name} are longer than task.max_new_tokens={task.max_new_tokens} and would be "
            f"cut: {_shown(lost)}")
    if _graded(task):
        return [f"{what}; raise task.max_new_tokens for a full score"]
    raise UserError(f"{what}; raise task.max_new_tokens")


def _failed(rows: Sequence[dict[str, Any]], said: Sequence[str], task: Task) -> Iterator[tuple[dict[str, Any], str, str | None]]:
    """(row, what was said, what was read out of it) of the rows whose value is below 1."""
    predictions = []
    said = [text.partition(task.stop)[0] for text in said] if task.stop else said
    for row, text in zip(rows, said, strict=True):
        prediction = extract(text, task.answer_pattern)
        right = agrees(prediction, row["answer"], task.answer_pattern)
        predictions.append({"id": row["id"], "answer": row["answer"], "prediction": prediction, "correct": right, "output": text})
    values, _ = by_row(measured(predictions, rows, task), task.metric_name)
    for row, text, one in zip(rows, said, predictions, strict=True):
        if not math.isclose(values.get(row["id"], 0.0), 1.0):
            yield row, text, one["prediction"]


def _graded(task: Task) -> bool:
    """Whether the metric gives a share for a part of an answer."""
    return task.metric not in ("accuracy", "exact_match", "numeric")


def _how(task: Task) -> str:
    read = f"task.answer_pattern {task.answer_pattern!r}" if task.answer_pattern is not None else "its first line"
    return f"{read}, task.metric={task.metric}"


def _fix(task: Task) -> str:
    if task.answer_pattern is not None:
        return "fix task.answer_pattern, or those rows"
    if _graded(task):
        return "choose another task.metric, or fix those rows"
    return "set task.answer_pattern to what the answer looks like (GSM8K: '####\\s*(-?[\\d,.]+)'), or a metric of texts: task.metric=token_f1"


def _shown(failed: Sequence[tuple[dict[str, Any], str, str | None]]) -> str:
    return "; ".join(f"{row['id']} has {_short(row['answer'])}, read as {'nothing' if read is None else _short(read)}" for row, _, read in failed[:SHOWN])


def _short(text: str) -> str:
    """A text in one line; of a long one its beginning and end, where answers stand."""
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= 70 else f"{flat[:40]} … {flat[-25:]}")


def by_words(task: Task) -> Cut:
    """Without a tokenizer: a word is a token at least, so what has more words than max_new_tokens is too long; nothing is said of the others."""
    def cut(answer: str) -> str | None:
        words = answer.split(" ")
        return None if len(answer.split()) <= task.max_new_tokens else " ".join(words[: task.max_new_tokens])

    return cut


def by_tokens(task: Task, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]) -> Cut:
    """By a model's tokenizer, the separator before the answer included."""
    def cut(answer: str) -> str | None:
        ids = encode(task.separator + answer)
        return None if len(ids) <= task.max_new_tokens else decode(ids[: task.max_new_tokens])

    return cut
