"""Distilling step-by-step (Hsieh et al., 2023): predict the label and explain it, as two tasks of one model.

conf/objective/step_by_step.yaml, and step_by_step_unlabelled.yaml with the teacher's labels; go with any method that trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.core.files import UserError
from pipeline.core.settings import NotNegative, Task
from pipeline.data.conversations import reworded
from pipeline.data.rows import Encoded, Example
from pipeline.objectives.base import Objective, PreparedExamples, TrainingContext, left_out, rationale_text, teacher_labelled


@dataclass(frozen=True)
class StepByStep(Objective):
    """L = L_label + rationale_weight · L_rationale (their equation 5, λ), each a mean over its own tokens.

    The predict prefix comes before the prompt whenever the label is asked for, in training and in scoring; the
    explain prefix before the same prompt whenever the rationale is. No rationale is generated at test time.
    """

    rationale_weight: NotNegative
    predict_prefix: str = "[label] "
    explain_prefix: str = "[rationale] "
    wrong_rationales: Literal["keep", "drop"] = "keep"
    """keep or drop the rationales of wrong answers."""

    @property
    def needs_rationales(self) -> bool:
        return self.rationale_weight > 0

    def prompt(self, prompt: str) -> str:
        return reworded(prompt, lambda asked: self.predict_prefix + asked)

    def examples(self, row: dict, task: Task, rationale: dict | None) -> list[Example]:
        labels = self.label_examples(row, task)
        text = rationale_text(rationale, self.wrong_rationales)
        if not self.needs_rationales or not text:
            return labels
        explain = reworded(row["prompt"], lambda asked: self.explain_prefix + asked)
        return [*labels, Example(explain, text, "rationale", self.rationale_weight, ends=True)]

    def hyperparameters(self) -> dict[str, Any]:
        return {"rationale_weight": self.rationale_weight, "wrong_rationales": self.wrong_rationales}


@dataclass(frozen=True)
class StepByStepUnlabelled(StepByStep):
    """The same without people's labels: the teacher's answers are the labels, its rationales are learnt whether they end in the right answer or not.

    Rows for which the teacher has no usable answer are left out. No gold label of a training row is read; validation rows, if any choose the weights, are
    labelled.
    """

    own_rows = True
    prepares = True
    reads_labels = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wrong_rationales == "drop":
            raise UserError("objective.wrong_rationales=drop takes people's labels to know which are wrong, and step_by_step_unlabelled reads none; "
                            "choose keep, or objective=step_by_step")

    @property
    def needs_rationales(self) -> bool:
        return True

    def rows(self, rows: list[dict], rationales: dict[str, dict], train_rows: int | None, seed: int) -> list[dict]:
        return teacher_labelled(rows, rationales)

    def examples(self, row: dict, task: Task, rationale: dict | None) -> list[Example]:
        return super().examples(row, task, rationale if self.rationale_weight > 0 else None)

    def prepared(self, examples: list[list[Encoded]], context: TrainingContext) -> PreparedExamples:
        return PreparedExamples(examples, left_out(examples, context))

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), "labels_from": "validation"}
