"""Task distillation: a teacher's answers in the place of people's labels. conf/objective/task_distillation.yaml.

Goes with any method that trains. No gold label of a training row is read; validation rows, if any choose the weights, are labelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.data.rows import Encoded
from pipeline.objectives.base import Objective, PreparedExamples, TrainingContext, left_out, teacher_labelled


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
        return teacher_labelled(rows, rationales)

    def prepared(self, examples: list[list[Encoded]], context: TrainingContext) -> PreparedExamples:
        return PreparedExamples(examples, left_out(examples, context))

    def hyperparameters(self) -> dict[str, Any]:
        return {"labels_from": "validation"}
