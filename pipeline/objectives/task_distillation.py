"""Task distillation: a teacher's answers in the place of people's labels. conf/objective/task_distillation.yaml.

Goes with any method that trains. No gold label of a training row is read; validation rows, if any choose the weights, are labelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.core.files import UserError
from pipeline.data.rows import Encoded
from pipeline.objectives.base import Objective, PreparedExamples, TrainingContext
from pipeline.scoring.reading import canonical


@dataclass(frozen=True)
class TaskDistillation(Objective):
    """Cross-entropy of the teacher's answer given the prompt; rows for which it has none (or none of the row's choices) are left out."""

    own_rows = True
    prepares = True
    reads_labels = False

    @property
    def needs_rationales(self) -> bool:
        return True

    def rows(self, rows: list[dict], rationales: dict[str, dict], train_rows: int | None, seed: int) -> list[dict]:
        answers = [(row, _answer(row, rationales.get(row["id"]))) for row in rows]
        labelled = [{**row, "answer": answer} for row, answer in answers if answer is not None]
        if not labelled:
            raise UserError("the teacher has no usable answer to any training row; run python -m pipeline.rationales, or choose another teacher")
        return labelled

    def prepared(self, examples: list[list[Encoded]], context: TrainingContext) -> PreparedExamples:
        wanted = context.cfg.train_rows or len(examples)
        note = f"{wanted - len(examples)} of {wanted} training rows are left out: the teacher has no usable answer to them"
        return PreparedExamples(examples, [note] if wanted > len(examples) else [])

    def hyperparameters(self) -> dict[str, Any]:
        return {"labels_from": "validation"}


def _answer(row: dict, rationale: dict | None) -> str | None:
    """The teacher's answer as the row's choices spell it."""
    answer = rationale["answer"] if rationale else None
    if not answer or not row["choices"]:
        return answer or None
    return next((choice for choice in row["choices"] if canonical(choice) == canonical(answer)), None)
