"""A teacher whose texts are columns of the task's rows. conf/teacher/stored.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core.files import UserError
from pipeline.data.recipe import column_text
from pipeline.teachers.base import Explanation, Teacher


@dataclass(frozen=True)
class Stored(Teacher):
    """Columns of the task's source: a larger model's answers, or people's. rationale_column, answer_column: names in a row's `fields`."""

    works_here = False

    rationale_column: str = "teacher_rationale"
    answer_column: str = "teacher_answer"

    def check(self, task: str, row: dict) -> None:
        for key in ("rationale_column", "answer_column"):
            if getattr(self, key) not in row["fields"]:
                what = f"task {task} has no column {getattr(self, key)!r} (teacher.{key}); there are: {', '.join(row['fields'])}"
                raise UserError(f"{what}; set the key or choose another teacher")

    def explain(self, rows: Sequence[dict]) -> list[Explanation | None]:
        return [self._explanation(row) for row in rows]

    def _explanation(self, row: dict) -> Explanation | None:
        rationale, answer = (column_text(row["fields"].get(column), column, f"row {row['id']}") for column in (self.rationale_column, self.answer_column))
        return Explanation(rationale, answer or None) if rationale or answer else None
