"""Reinforcement learning from a verifiable reward: sampled answers that are right are made likelier. conf/objective/grpo.yaml, rloo.yaml.

The loop is TRL's (training/trl.py). An answer earns 1 if what is extracted from it is the row's, else 0, so the model must be right now and
then from the start: start=<a fine-tuned cell>. A killed run starts anew.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pipeline.core.files import UserError
from pipeline.core.settings import NotNegative, Positive, Task, Within
from pipeline.data.rows import Encoded
from pipeline.objectives.base import Objective, PreparedExamples, TrainingContext
from pipeline.scoring.reading import agrees, extract


@dataclass(frozen=True)
class Question(Encoded):
    """A row's example, with what sampling and rewarding need."""

    row: Any = None
    encoder: Any = None


@dataclass(frozen=True)
class Grpo(Objective):
    """Group-relative policy optimisation (Shao et al., 2024), or REINFORCE with the other samples' mean as baseline (RLOO, Ahmadian et al., 2024).

    A step takes train.batch_size rows and num_generations sampled answers of each; losses and advantages are TRL's defaults.
    """

    prepares = True
    trainer = "trl"

    algorithm: Literal["grpo", "rloo"]
    num_generations: Annotated[int, Within(2, why="answers are compared within a row's own")]
    temperature: Positive
    beta: NotNegative = 0.0
    """Weight of the KL to the model as training starts with it; above 0 only for an adapter."""

    @property
    def name(self) -> str:
        return self.algorithm

    def prepared(self, examples: list[list[Encoded]], context: TrainingContext) -> PreparedExamples:
        if importlib.util.find_spec("trl") is None:
            raise UserError(f"objective={self.algorithm} trains with TRL, which is not installed; run: pip install 'trl>=1.16,<1.17'")
        if self.beta and not hasattr(context.model, "peft_config"):
            raise UserError(f"objective.beta is {self.beta}, but only an adapter keeps the model it started from to compare with; set 0 or choose method=lora")
        questions = [Question(**vars(e), row=row, encoder=context.encoder) for row, (e, *_) in zip(context.rows, examples, strict=True)]
        return PreparedExamples([[q] for q in questions])

    def reward(self, completions: Sequence[Any], row: Sequence[dict], task: Task) -> list[float]:
        """1 for a right answer, 0 for any other; a completion is a text or, in a chat, a list of one message."""
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        answers = [answer_in(text, one, task) for text, one in zip(texts, row, strict=True)]
        return [float(agrees(a, one["answer"], task.answer_pattern)) for a, one in zip(answers, row, strict=True)]

    def hyperparameters(self) -> dict[str, Any]:
        return {"num_generations": self.num_generations, "temperature": self.temperature, "beta": self.beta}


def answer_in(text: str, row: dict, task: Task) -> str | None:
    """The answer in a sampled text: for a choice the one that it begins with, else what the task extracts."""
    if task.scoring == "generate":
        return extract(text, task.answer_pattern)
    start = text.strip().casefold()
    return max((c for c in row["choices"] if start.startswith(c.casefold())), key=len, default=None)
