"""What an answer says and what answers are worth: read out of a text, compared, counted into a `Score`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core.settings import Task
from pipeline.records.score import Score
from pipeline.scoring import per_row
from pipeline.stats.bootstrap import Statistic, class_value, interval, macro_f1, mean


def chosen(rows: Sequence[dict], scores: Sequence[Sequence[float]], task: Task) -> list[dict]:
    """One prediction a row from its choices' log-likelihoods: {id, answer, prediction, correct, scores}."""
    predictions = []
    for row, values in zip(rows, scores, strict=True):
        if not all(map(math.isfinite, values)):  # a model whose training diverged answers nothing
            predictions.append({"id": row["id"], "answer": row["answer"], "prediction": None, "correct": False, "scores": {}})
            continue
        lengths = [len(c) if task.length_normalised else 1 for c in row["choices"]]
        best = max(range(len(values)), key=lambda i: values[i] / lengths[i])  # noqa: B023 (used at once)
        prediction = row["choices"][best]
        predictions.append({
            "id": row["id"], "answer": row["answer"], "prediction": prediction, "correct": prediction == row["answer"],
            "scores": {c: round(v, 6) for c, v in zip(row["choices"], values, strict=True)},
        })
    return predictions


def finite(predictions: Sequence[dict]) -> bool:
    """Whether there is a row whose choices all have a finite log-likelihood; True where answers are generated, or none was asked for."""
    return not predictions or any(p.get("scores", True) for p in predictions)


def score(predictions: Sequence[dict], task: Task) -> Score:
    """The metrics of a split's predictions. A row without an answer counts as wrong.

    The interval is Wilson's (1927) at 95%.
    """
    from scipy.stats import binomtest

    hits, rows = sum(p["correct"] for p in predictions), len(predictions)
    interval = binomtest(hits, rows).proportion_ci(method="wilson")
    low, high = _interval(predictions, task.metric_name)
    accuracy = _metric("accuracy").compute(predictions=[int(p["correct"]) for p in predictions], references=[1] * rows)["accuracy"]
    return Score(
        rows=rows, accuracy=float(accuracy), accuracy_low=float(interval.low), accuracy_high=float(interval.high),
        macro_f1=_macro_f1(predictions, task), rouge_l=_rouge(predictions) if task.metric == "rouge_l" else None,
        nll=_nll(predictions), unanswered=sum(p["prediction"] is None for p in predictions), metric_low=low, metric_high=high,
        **_means(predictions, task),
    )


def by_row(predictions: Sequence[dict], metric: str) -> tuple[dict[str, float], Statistic | None]:
    """What a metric makes of every row, by its id, and what makes the metric of these values; None: the mean of right and wrong answers.

    Empty where the metric does not exist for such answers: macro-F1 of choices that differ by row.
    """
    if metric == "macro_f1":
        names = _labels(predictions)
        code = {name: i for i, name in enumerate(names)}
        values = {p["id"]: class_value(code[p["answer"]], code.get(p["prediction"]), len(names)) for p in predictions} if names else {}
        return values, macro_f1(len(names))
    if predictions and all("value" in p for p in predictions):
        return {p["id"]: float(p["value"]) for p in predictions}, None if metric in per_row.DECIDE else mean
    if metric == "rouge_l":
        return {p["id"]: one for p, one in zip(predictions, _rouge_by_row(predictions), strict=True)}, mean
    return {p["id"]: float(p["correct"]) for p in predictions}, None


def _means(predictions: Sequence[dict], task: Task) -> dict[str, float]:
    """The metric that is the mean of the rows' own values, under its name; nothing where it is another."""
    return {task.metric_name: math.fsum(p["value"] for p in predictions) / len(predictions)} if all("value" in p for p in predictions) else {}


def _interval(predictions: Sequence[dict], metric: str) -> tuple[float | None, float | None]:
    """The bootstrap's 95% interval of a headline metric other than accuracy."""
    import numpy as np

    values, statistic = by_row(predictions, metric)
    return (None, None) if metric == "accuracy" or statistic is None or not values else interval(np.array(list(values.values())), statistic)


def _labels(predictions: Sequence[dict]) -> tuple[str, ...]:
    """The choices, where all rows that have any have the same; else none."""
    every = {tuple(sorted(p["scores"])) for p in predictions if p.get("scores")}
    return next(iter(every)) if len(every) == 1 else ()


def _macro_f1(predictions: Sequence[dict], task: Task) -> float | None:
    """Over a task's fixed labels; None where the choices differ by row or the answer is free text."""
    labels = {tuple(sorted(p["scores"])) for p in predictions if "scores" in p}
    if task.scoring != "choice" or len(labels) != 1 or not all(labels):
        return None
    names = next(iter(labels))
    code = {name: i for i, name in enumerate(names)}
    references = [code[p["answer"]] for p in predictions]
    predicted = [code[p["prediction"]] for p in predictions]
    return float(_metric("macro_f1").compute(predictions=predicted, references=references, labels=len(names))["macro_f1"])


def _rouge(predictions: Sequence[dict]) -> float:
    outputs = [p.get("output", p["prediction"]) for p in predictions]
    return float(_metric("rouge_l").compute(predictions=outputs, references=[p["answer"] for p in predictions])["rouge_l"])


def _rouge_by_row(predictions: Sequence[dict]) -> list[float]:
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return [float(scorer.score(p["answer"], p.get("output", p["prediction"]) or "")["rougeL"].fmeasure) for p in predictions]


def _nll(predictions: Sequence[dict]) -> float | None:
    values = [-p["scores"][p["answer"]] for p in predictions if p.get("scores") and p["answer"] in p["scores"]]
    return sum(values) / len(values) if len(values) == len(predictions) else None


@functools.cache
def _metric(name: str) -> Any:
    """A metric module of `evaluate` that lies in this project; loading one by name would fetch code from a hub."""
    import evaluate

    return evaluate.load(str(Path(__file__).parent / "metrics" / name))


def preload(task: Task) -> None:
    """Import what scoring needs, so that it is booked to start-up and not to the first evaluation. Raises UserError where an own metric cannot be had."""
    per_row.of(task)
    for name in ("accuracy", "macro_f1", *(["rouge_l"] if task.metric == "rouge_l" else [])):
        _metric(name)
    import scipy.stats  # noqa: F401


def headline(scores: Score, metric: str) -> float:
    """The task's metric. NaN-free: a metric the split cannot have falls back to accuracy."""
    value = getattr(scores, metric)
    return float(scores.accuracy if value is None else value)
