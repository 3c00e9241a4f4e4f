"""Rationale first: the model writes its reasoning, then the answer that follows from it. conf/objective/rationale_first.yaml.

Fine-tuning on chain-of-thought (Wei et al., 2022) of a teacher, as in Ho et al. (2023): at test the model reasons by itself, so every
answer costs the tokens of its reasoning, which shows in the latency.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pipeline.core.files import UserError
from pipeline.core.settings import AtLeast1, Task, Within
from pipeline.data.rows import Encoded, Example
from pipeline.objectives.base import Objective, PreparedExamples, TrainingContext, rationale_text
from pipeline.scoring.reading import Reasoning


@dataclass(frozen=True)
class RationaleFirst(Objective):
    """L = -log p(answer | prompt, reasoning, cue) + rationale_weight · -log p(reasoning | prompt), each a mean over its own tokens.

    The two terms are two examples, the reasoning closed by the end-of-text token, so that generation ends there.
    """

    prepares = True

    rationale_weight: Annotated[float, Within(0, above=True, why="reasoning that is not learnt cannot come first")]
    max_new_tokens: AtLeast1
    """Most tokens of reasoning at test."""
    cue: str = " So the answer is"
    """Comes between reasoning and answer."""
    wrong_rationales: Literal["keep", "drop"] = "drop"
    """drop: a reasoning that ends in a wrong answer is not learnt, its row's label is; keep: it is learnt, with the right label after it."""

    @property
    def needs_rationales(self) -> bool:
        return True

    @property
    def reasoning(self) -> Reasoning:
        return Reasoning(self.max_new_tokens, self.cue)

    def examples(self, row: dict, task: Task, rationale: dict | None) -> list[Example]:
        text = rationale_text(rationale, self.wrong_rationales).strip()
        label = Example(row["prompt"], row["answer"], ends=task.scoring == "generate", prefill=self.reasoning.prefill(text))
        return [label, Example(row["prompt"], text, "rationale", self.rationale_weight, ends=True)] if text else [label]

    def prepared(self, examples: list[list[Encoded]], context: TrainingContext) -> PreparedExamples:
        lengths = [len(e.ids) - e.start for row in examples for e in row if e.group == "rationale"]
        if not lengths:
            raise UserError("no training row has a rationale to learn from; choose another teacher, or objective.wrong_rationales=keep")
        longer = sum(n > self.max_new_tokens for n in lengths)
        note = f"{longer} of {len(lengths)} rationales are longer than objective.max_new_tokens={self.max_new_tokens}, where reasoning is cut at test"
        return PreparedExamples(examples, [note] if longer else [])

    def hyperparameters(self) -> dict[str, Any]:
        return {"rationale_weight": self.rationale_weight, "wrong_rationales": self.wrong_rationales, "max_new_tokens": self.max_new_tokens}
