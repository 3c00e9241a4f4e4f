"""Methods that train nothing: the base as it is, demonstrations in the prompt, and a teacher's answers.

conf/method/none.yaml, few_shot.yaml, teacher.yaml.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import Unsuited, UserError, read_jsonl, write_jsonl
from pipeline.data.conversations import reworded
from pipeline.data.rows import Example
from pipeline.methods.base import Method


@dataclass(frozen=True)
class Untouched(Method):
    """Zero-shot: the base model answers the bare prompt."""

    @property
    def name(self) -> str:
        return "none"

    @property
    def sharing(self) -> str:
        return "together"


@dataclass(frozen=True)
class FewShot(Method):
    """k labelled training rows before every prompt (Brown et al., 2020), the same ones for all rows.

    The rows are drawn with the cell's seed, answers balanced as far as k allows, in random order.
    """

    prepares = True
    own_prompt = True

    k: int
    separator: str = "\n\n"
    answer_separator: str = " "
    """Between a demonstration's prompt and its answer."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"method.k is {self.k}; few-shot needs at least 1 demonstration (zero_shot has none)")

    @property
    def sharing(self) -> str:
        return "together"

    def prepare(self, examples: Sequence[Example], seed: int, base: Any = None) -> list[dict[str, str]]:
        if self.k > len(examples):
            raise Unsuited(f"method.k={self.k}, but there are {len(examples)} training rows; lower k or raise train_rows")
        rng = random.Random(seed)
        by_answer: dict[str, list[Example]] = {}
        for example in rng.sample(list(examples), len(examples)):
            by_answer.setdefault(example.answer, []).append(example)
        groups = [by_answer[a] for a in sorted(by_answer)]
        rounds = [group[i] for i in range(max(map(len, groups))) for group in rng.sample(groups, len(groups)) if i < len(group)]
        chosen = rounds[: self.k]
        rng.shuffle(chosen)
        return [{"prompt": e.prompt, "answer": e.answer} for e in chosen]

    def prompt(self, prompt: str, state: list[dict[str, str]]) -> str:
        shots = [shot["prompt"] + self.answer_separator + shot["answer"] for shot in state]
        return reworded(prompt, lambda asked: self.separator.join([*shots, asked]))

    def hyperparameters(self) -> dict[str, Any]:
        return {"k": self.k}

    def labelled_rows(self, train: int, validation: int) -> int:
        return self.k

    def save(self, model: Any, state: list[dict[str, str]], folder: Path) -> None:
        write_jsonl(folder / "demonstrations.jsonl", state)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        return base, read_jsonl(folder / "demonstrations.jsonl")


@dataclass(frozen=True)
class TeacherAnswers(Method):
    """The teacher's answers, so that the teacher is a row of the table with its accuracy."""

    answers_without_model = True

    @property
    def name(self) -> str:
        return "teacher"

    def answers(self, rows: Sequence[dict], rationales: dict[str, dict]) -> list[str]:
        missing = next((row["id"] for row in rows if row["id"] not in rationales), None)
        if missing is not None:
            raise UserError(f"the teacher has no row for {missing!r}; run python -m pipeline.rationales for all rows, or choose another teacher")
        return [rationales[row["id"]].get("answer") or "" for row in rows]
