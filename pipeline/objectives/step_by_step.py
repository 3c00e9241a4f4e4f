"""Distilling step-by-step (Hsieh et al., 2023): predict the label and explain it, as two tasks of one model.

conf/objective/step_by_step.yaml; goes with any method that trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.core.settings import NotNegative, Task
from pipeline.data.conversations import reworded
from pipeline.data.rows import Example
from pipeline.objectives.base import Objective, rationale_text


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
