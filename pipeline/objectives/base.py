"""What an objective is: the examples that a row gives, and the loss of a batch of them.

Library. `_target_` in conf/objective/<name>.yaml names the class.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.data import Batch, Example
from pipeline.scoring import logits_at
from pipeline.settings import Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Objective:
    """Standard fine-tuning: cross-entropy of the answer given the prompt."""

    @property
    def name(self) -> str:
        """As in conf/objective/, MLflow and the table."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def needs_rationales(self) -> bool:
        """Whether rows must come with a teacher's text."""
        return False

    def prompt(self, prompt: str) -> str:
        """The prompt under which the model is to answer."""
        return prompt

    def label_example(self, row: dict, task: Task) -> Example:
        """The example of a row that carries its label; a generated answer must end, a scored choice need not."""
        return Example(self.prompt(row["prompt"]), row["answer"], ends=task.scoring == "generate")

    def examples(self, row: dict, task: Task, rationale: dict | None) -> list[Example]:
        """The training examples of a row. `rationale` is the teacher's row, if there is one."""
        return [self.label_example(row, task)]

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Scalar: sum over labelled positions of weight · cross-entropy, in fp32."""
        import torch.nn.functional as F

        logits = logits_at(model, batch.input_ids, batch.rows, batch.cols)
        return (F.cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()

    def hyperparameters(self) -> dict[str, Any]:
        """What to show in the table and in MLflow."""
        return {}
