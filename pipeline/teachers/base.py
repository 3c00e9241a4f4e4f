"""What a teacher is: it gives rows an answer and a rationale.

Library. `type` in conf/teacher/<name>.yaml names the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.core.settings import AtLeast1, Task, check_fields


@dataclass(frozen=True)
class Explanation:
    """The teacher's answer to a row (None: it gave none) and its reason in words (empty: none to learn from)."""

    rationale: str
    answer: str | None


@dataclass(frozen=True)
class Teacher:
    """Explains nothing (conf/teacher/none.yaml); the file of rationales is there and empty.

    Args:
        name: the folder under rationales/<task>/.
        batch_size: rows of one call of `explain`.
        row_seeds: with train_rows=n, the seeds whose n training rows are explained; None: of the config's seed alone.
    """

    works_here: ClassVar[bool] = True
    """Whether the time that `explain` takes is what the rationales cost; if not, their cost is not known."""

    name: str
    batch_size: AtLeast1 = 256
    row_seeds: list[int] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "teacher")

    def check(self, task: str, row: dict) -> None:
        """Raise UserError, naming what to change, if the teacher cannot explain this task. `row` is a training row."""

    def begin(self, task: Task, train: Sequence[dict]) -> None:
        """Take what `explain` needs of the task and its training rows (demonstrations). Raises UserError where it is missing."""

    def explain(self, rows: Sequence[dict]) -> list[Explanation | None]:
        """One explanation a row, in order; None leaves the row out of the file."""
        return [None] * len(rows)

    def report(self) -> dict[str, Any]:
        """Entries of the manifest, after the last `explain`; its `seconds`, if there are any, replace those that passed."""
        return {}

    def in_words(self) -> str:
        """How it went, for the command's output."""
        return ""
