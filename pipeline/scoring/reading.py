"""An answer read out of a text, and compared with the reference: the pattern of a task is applied to both.

Library of answers.py and per_row.py. Needs no numpy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.core.files import UserError
from pipeline.core.settings import Task


def extract(output: str, pattern: str | None) -> str | None:
    """The answer in generated text: the pattern's last match (its first group that took part, if any), else the first line; None if empty."""
    if pattern is None:
        return output.strip().splitlines()[0].strip() if output.strip() else None
    matches = list(re.finditer(pattern, output))
    if not matches:
        return None
    last = matches[-1]
    return next((g for g in last.groups() if g is not None), last.group(0)).strip()


def canonical(answer: str) -> str:
    """The form in which generated answers are compared: case, outer punctuation and the spelling of a number set aside."""
    text = " ".join(answer.casefold().split()).lstrip(" ,;:!\"'").rstrip(" .,;:!\"'")
    try:
        return f"{float(text.replace(',', '')):.10g}"
    except ValueError:
        return text


def reference(answer: str, pattern: str | None) -> str:
    """The reference as it is compared: what the pattern finds in it; as it is where the pattern finds nothing, the bare answer already.

    A reference such as GSM8K's holds its reasoning, and "#### 72" at its end.
    """
    return answer if pattern is None else extract(answer, pattern) or answer


def agrees(prediction: str | None, answer: str, pattern: str | None) -> bool:
    """Whether an answer read out of a text is the reference's."""
    return prediction is not None and canonical(prediction) == canonical(reference(answer, pattern))


def answer_in(text: str, row: dict, task: Task) -> str | None:
    """The answer in a drawn text: for a choice the one that it begins with, else what the task extracts."""
    if task.scoring == "generate":
        return extract(text, task.answer_pattern)
    start = text.strip().casefold()
    return max((c for c in row["choices"] if start.startswith(c.casefold())), key=len, default=None)


def is_right(text: str, row: dict, task: Task) -> bool:
    """Whether the answer in a drawn text is the row's."""
    return agrees(answer_in(text, row, task), row["answer"], task.answer_pattern)


@dataclass(frozen=True)
class Reasoning:
    """max_new_tokens: the longest reasoning; cue: the words between it and the answer."""

    max_new_tokens: int
    cue: str

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"objective.max_new_tokens is {self.max_new_tokens}; the reasoning needs at least 1 token")

    def prefill(self, text: str) -> str:
        """What stands between prompt and answer once the reasoning is known."""
        return f"{text.strip()}{self.cue}".strip()
