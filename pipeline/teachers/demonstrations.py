"""Demonstrations of reasoning for a prompt: from a config, a user's file, or the training rows that have a rationale.

Library. pipeline/teachers/prompted.py shows them to a model before the row that it is to explain.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.files import UserError, read_jsonl
from pipeline.core.settings import AtLeast0, check_fields
from pipeline.data.recipe import column_text
from pipeline.scoring.reading import canonical


@dataclass(frozen=True)
class Shot:
    """A worked example. choices: None where answers are generated."""

    prompt: str
    choices: tuple[str, ...] | None
    rationale: str
    answer: str


@dataclass(frozen=True)
class Demonstrations:
    """k worked examples: those written in the config, else lines of a file, else training rows that have a rationale.

    Args:
        k: how many; 0: none. Written ones are all shown.
        seed: of the draw from file or rows; as many of each answer as k allows.
        written: [{prompt, rationale, answer}, …].
        file: JSON Lines with prompt, rationale and answer, or with id and rationale (a rationales.jsonl) of training rows.
        rationale_column, answer_column: of the rows' source; only rows whose answer there is right are drawn.
    """

    k: AtLeast0 = 4
    seed: int = 0
    written: list[dict[str, Any]] = field(default_factory=list)
    file: str | None = None
    rationale_column: str = "teacher_rationale"
    answer_column: str = "teacher_answer"

    def __post_init__(self) -> None:
        check_fields(self, "teacher.demonstrations")

    def shots(self, task: str, train: Sequence[dict]) -> list[Shot]:
        """Raises UserError where there are fewer than k, naming the ways to give some."""
        if self.written:
            return [_shot(line, f"teacher.demonstrations.written number {n}", {}, train) for n, line in enumerate(self.written, 1)]
        if not self.k:
            return []
        shots, where = (self._of_file(train), self.file) if self.file else (self._of_rows(train), f"the training rows of {task}")
        if len(shots) < self.k:
            raise UserError(
                f"{where} has {len(shots)} demonstrations, teacher.demonstrations.k asks for {self.k}; name a file of them in "
                "teacher.demonstrations.file, write some in teacher.demonstrations.written, or set teacher.demonstrations.k=0"
            )
        return draw(shots, self.k, self.seed)

    def _of_file(self, train: Sequence[dict]) -> list[Shot]:
        by_id = {row["id"]: row for row in train}
        shots = []
        for n, line in enumerate(read_jsonl(str(self.file)), 1):
            complete = "prompt" in line or line.get("id") in by_id and line.get("rationale") and line.get("correct", True)
            if complete:  # of a teacher's file, the right training rows with a rationale
                shots.append(_shot(line, f"line {n} of {self.file}", by_id, train))
        return shots

    def _of_rows(self, train: Sequence[dict]) -> list[Shot]:
        shots = []
        for row in train:
            fields, columns = row["fields"], (self.rationale_column, self.answer_column)
            rationale, answer = (column_text(fields.get(column), column, f"row {row['id']}") for column in columns)
            if rationale and canonical(answer) == canonical(row["answer"]):
                shots.append(Shot(row["prompt"], _choices(row), rationale, row["answer"]))
        return shots


def draw(shots: Sequence[Shot], k: int, seed: int) -> list[Shot]:
    """k of them in random order, answers in turn as long as each has some left."""
    rng = random.Random(seed)
    by_answer: dict[str, list[Shot]] = {}
    for shot in rng.sample(list(shots), len(shots)):
        by_answer.setdefault(shot.answer, []).append(shot)
    groups = list(by_answer.values())
    rounds = [group[i] for i in range(max(map(len, groups))) for group in groups if i < len(group)]
    return rng.sample(rounds[:k], k)


def _choices(row: dict) -> tuple[str, ...] | None:
    return tuple(row["choices"]) if row["choices"] else None


def _shot(line: dict, where: str, by_id: dict[str, dict], train: Sequence[dict]) -> Shot:
    """A line as a demonstration; one with an id takes prompt, choices and answer from that row."""
    row = by_id.get(line.get("id", ""))
    if row is not None and "prompt" not in line:
        line = {**line, "prompt": row["prompt"], "answer": row["answer"]}
    texts = {key: column_text(line.get(key), key, where) for key in ("prompt", "rationale", "answer")}
    missing = [key for key, text in texts.items() if not text]
    if missing:
        raise UserError(f"{where} has no {missing[0]}; a demonstration has prompt, rationale and answer")
    fixed = {_choices(one) for one in train}
    choices = _choices(row) if row is not None else fixed.pop() if len(fixed) == 1 else None
    return Shot(texts["prompt"], choices, texts["rationale"], texts["answer"])
