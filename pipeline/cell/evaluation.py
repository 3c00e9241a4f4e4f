"""A cell's model, or its teacher, answers the rows; what a request takes of it, and what it forgot."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cell import requests
from pipeline.cell.inputs import Inputs, Parts
from pipeline.core import progress
from pipeline.data.rows import Rows
from pipeline.measure import clock, turns
from pipeline.measure.clock import Meter
from pipeline.measure.memory import Memory, PeakMemory
from pipeline.records.results import Forgetting, Inference, Score
from pipeline.scoring import answers, reading
from pipeline.scoring.per_row import measured
from pipeline.scoring.scorer import Scorer

GENERATED_ROWS = 8
"""Rows whose right answers' likelihood is asked for where answers are generated."""
UNIFORM = 0.99
"""Of ln(vocabulary): a loss above it is a uniform guess's."""


@dataclass(frozen=True)
class Evaluation:
    """scores: by split. predictions: one a row, with its split. memory: the peak while the last timed split was answered. notes: the cell's.

    finite: whether the model gave any answer a finite likelihood. unmeasured: why a measurement that failed is null, by its name.
    """

    scores: dict[str, Score]
    predictions: list[dict]
    memory: Memory
    inference: Inference | None = None
    forgetting: Forgetting | None = None
    notes: list[str] = field(default_factory=list)
    finite: bool = True
    unmeasured: dict[str, str] = field(default_factory=dict)


def validate(scorer: Scorer, rows: Sequence[dict]) -> tuple[float, float | None]:
    """(metric, nll) of the model as it stands."""
    return ranked(answers.score(measured(scorer.predict(rows), rows, scorer.task), scorer.task), scorer.task.metric_name)


def ranked(score: Score, metric: str) -> tuple[float, float | None]:
    """(metric, nll) by which weights are chosen; nll is None where answers are generated, or not finite."""
    return answers.headline(score, metric), score.nll


def score_answers(parts: Parts, rows: Rows, meter: Meter) -> Evaluation:
    """Score answers that come without a model (the teacher's)."""
    predictions: list[dict] = []
    scores: dict[str, Score] = {}
    with meter.phase("evaluate"):
        for split, asked in (("validation", rows.validation), ("test", rows.test)):
            if not parts.wants(split):
                continue
            replies = parts.method.answers(asked, rows.rationales) or []
            scored = [{"id": r["id"], "answer": r["answer"], "prediction": g, "correct": reading.agrees(g, r["answer"], parts.settings.task.answer_pattern)}
                     for r, g in zip(asked, replies, strict=True)]
            scored = measured(scored, asked, parts.settings.task)
            predictions += [{"split": split, **p} for p in scored]
            scores[split] = answers.score(scored, parts.settings.task)
    return Evaluation(scores, predictions, Memory(kind="none", peak_bytes=None))


KEPT = 64
"""Rows that are answered on a CPU before they are kept: what an interrupt loses at most."""


class Answers:
    """Predictions that are kept as they come, so that a run which was interrupted does not answer its rows again.

    Args:
        path: the file; None: nothing is kept.
    """

    def __init__(self, scorer: Scorer, path: Path | None) -> None:
        self.scorer, self.path = scorer, path
        self.before: dict[tuple[str, str], dict] = {}
        for row in _read_kept(path):
            self.before[row.pop("split"), row["id"]] = row
        self.fresh = 0
        """Rows that were answered in this process, of the last split."""

    def predict(self, split: str, rows: Sequence[dict]) -> list[dict]:
        """One prediction a row, as Scorer.predict has them."""
        known = {row["id"]: self.before[split, row["id"]] for row in rows if (split, row["id"]) in self.before}
        asked = [row for row in rows if row["id"] not in known]
        self.fresh = len(asked)
        size = KEPT if self.path is not None and self.scorer.device.type == "cpu" else max(1, len(asked))
        for start in range(0, len(asked), size):
            part = self.scorer.predict(asked[start : start + size])
            known |= {one["id"]: one for one in part}
            if self.path is not None and len(asked) > size:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"split": split, **one}) + "\n" for one in part)
            progress.part(len(known), len(rows))
        return [known[row["id"]] for row in rows]


def _read_kept(path: Path | None) -> list[dict]:
    """The lines of the file; of one that was cut off in the middle of a line those before it."""
    if path is None or not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def evaluate(parts: Parts, inputs: Inputs, scorer: Scorer, meter: Meter, keep: Path | None = None) -> Evaluation:
    """Score the splits; time one-row requests and full batches over the test rows; probe. `scorer.model` may be merged at the end.

    keep: the file in which answers are kept until the cell has its result; None: nowhere.
    """
    kept = Answers(scorer, keep)
    rows = inputs.rows
    predictions: list[dict] = []
    scores: dict[str, Score] = {}

    def answer(split: str, asked: list[dict]) -> None:
        progress.stage(split)
        answered = measured(kept.predict(split, asked), asked, parts.settings.task)
        predictions.extend({"split": split, **p} for p in answered)
        scores[split] = answers.score(answered, parts.settings.task)

    failed: dict[str, str] = {}
    tried = functools.partial(_measure, failed)
    memory, inference = PeakMemory(parts.device), None
    memory.start()
    with meter.phase("validate"):
        if parts.wants("validation"):
            answer("validation", rows.validation)
    peak = memory.stop()
    with meter.phase("evaluate"):
        if parts.wants("test"):
            with turns.alone():
                watch = clock.Stopwatch(parts.device)
                memory.start()
                answer("test", rows.test)
                seconds, peak, fresh = watch.lap(), memory.stop(), kept.fresh
            for split, asked in rows.transfer.items():
                answer(f"transfer/{split}", asked)
            inference = Inference(rows_per_s=fresh / seconds if fresh else None, peak_bytes=peak.peak_bytes)
        forgetting = tried("forgetting", None, lambda: inputs.probing.forgetting(scorer.model) if inputs.probing else None)
        nats = _nats_per_token(scorer, rows.validation, predictions) if parts.method.trains else None
        if inference is not None:
            inference = requests.measure(parts, scorer, rows.test, inference, tried, failed)
    finite = answers.finite(predictions) and (nats is None or math.isfinite(nats))
    if finite and nats is not None and (note := _no_better_than_uniform(nats, scorer.model.config.get_text_config().vocab_size)):
        scorer.notes.append(note)
    scorer.notes += [f"{name} was not measured: {reason}" for name, reason in failed.items()]
    return Evaluation(scores, predictions, peak, inference, forgetting, scorer.notes, finite, failed)


def _measure(failed: dict[str, str], name: str, without: Any, measure: Callable[[], Any]) -> Any:
    """What `measure` gives; where it fails `without`, and its reason among the `failed`: a cell that has trained and answered keeps its result."""
    try:
        return measure()
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return without


def _nats_per_token(scorer: Scorer, rows: Sequence[dict], predictions: Sequence[dict]) -> float | None:
    """Mean negative log-likelihood of a token of the right answers: those that were scored, or where answers are generated those of a few rows.

    None where neither is known: the model reasons before it answers, or there are no rows.
    """
    encoder = scorer.encoder
    if scorer.task.scoring == "choice":
        known = [(p["scores"][p["answer"]], len(encoder.answer(p["answer"]))) for p in predictions if p["answer"] in p["scores"]]
    elif scorer.reasoning:
        known = []
    else:
        asked = rows[:GENERATED_ROWS]
        items = [(prompt, [encoder.answer(row["answer"])]) for row, (prompt, _) in zip(asked, scorer.items(asked), strict=True)]
        known = [(values[0], len(choices[0])) for values, (_, choices) in zip(scorer.log_likelihoods(items), items, strict=True)] if items else []
    return -sum(value for value, _ in known) / sum(tokens for _, tokens in known) if known else None


def _no_better_than_uniform(nats: float, vocabulary: int) -> str | None:
    """The note of a trained model that any token is as likely for as any other, or worse; None for one that has learnt something."""
    if nats < UNIFORM * math.log(vocabulary):
        return None
    return (f"the trained model gives the right answers' tokens no more than a uniform guess over its vocabulary does ({nats:.3g} nats a token, "
            f"ln {vocabulary} is {math.log(vocabulary):.3g}): it may still rank choices, but what it writes is ruined; lower train.lr")
