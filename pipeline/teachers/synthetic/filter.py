"""What a teacher wrote, cleaned and checked: form, length, answers, duplicates, leakage. Every text that is dropped is counted by its reason."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.core.settings import Task
from pipeline.data.near import Near
from pipeline.scoring.answers import extract
from pipeline.teachers.synthetic.rows import Synthesis

REFUSAL = re.compile(r"(?i)\bas an ai\b|\b(?:language model|ai assistant)\b|\bi(?:'m| am) (?:sorry|unable)\b")
TAG = re.compile(r"\[(?:Start|End) of |<\|[^|]*\|>")
MARK = re.compile(r"^\s*(?:\d+[.)]\s+|[-*•]\s+|#+\s+)")
LEAST_ANSWER = 20
"""Words that a written answer may always have."""

END = re.compile(r"""[.!?…。！？]["'”’)\]*]*\s*$""")

FORMAT, UNFINISHED, LENGTH, ANSWER, LEAKED, DUPLICATE, NEAR, JUDGE = (
    "format", "unfinished", "length", "answer", "leaked", "duplicate", "near_duplicate", "judge",
)


class Filter:
    """The rules for one set of rows.

    Args:
        template: the task's prompt; its words around a column are removed from a text, and a text with more of them is dropped.
        held_out: texts of validation, test and transfer rows. labelled: those of training rows and seed examples.
    """

    def __init__(self, settings: Synthesis, task: Task, template: str, held_out: Near, labelled: Near) -> None:
        self.settings, self.task, self.held_out, self.labelled = settings, task, held_out, labelled
        self.written = Near(settings.near)
        self.dropped: Counter[str] = Counter()
        self.frame = [line.strip() for text, *_ in string.Formatter().parse(template) for line in text.splitlines() if len(line.strip()) > 2]

    def text(self, raw: str, like: Sequence[str], longest: int | None = None) -> str | None:
        """A text in the form of the examples `like`; None if it is dropped. Lengths in words; longest None: twice the longest example's.

        Where three examples of four end in a mark, one that does not was cut off.
        """
        text = self._cleaned(raw, any("\n" in one for one in like))
        if not text or REFUSAL.search(text) or TAG.search(text) or any(f.endswith(":") and f.casefold() in text.casefold() for f in self.frame):
            return self._drop(FORMAT)
        if 4 * sum(map(_ended, like)) >= 3 * len(like) and not _ended(text):
            return self._drop(UNFINISHED)
        least = self.settings.shortest
        most = longest or 2 * max(len(one.split()) for one in like)
        return text if least <= len(text.split()) <= max(least, most) else self._drop(LENGTH)

    def question(self, raw: str, like: Sequence[str], context: str = "", near: float | None = None) -> str | None:
        """A new question: not near to a held-out text, a labelled one or one written before; None if it is dropped.

        An accepted question counts as written from then on. context: what belongs to the question; both together must be new. near: the threshold
        among labelled and written texts, in the place of the settings'.
        """
        text = self.text(raw, like, longest=self.settings.longest)
        if text is None:
            return None
        whole = f"{context} {text}".strip()
        if self.held_out.near(whole):
            return self._drop(LEAKED)
        others = (self.labelled, self.written)
        if any(one.holds(whole) for one in others):
            return self._drop(DUPLICATE)
        if any(one.near(whole, near) for one in others):
            return self._drop(NEAR)
        self.written.add(whole)
        return text

    def answer(self, raw: str, like: Sequence[str]) -> str | None:
        """A written answer in the form of the task's answers, extracted by the task's pattern if it has one; None if it is dropped."""
        longest = max(LEAST_ANSWER, *(2 * len(one.split()) for one in like))
        text = self._cleaned(raw, any("\n" in one for one in like))
        if self.task.answer_pattern:
            text = extract(text, self.task.answer_pattern) or ""
        return text if text and len(text.split()) <= longest and not REFUSAL.search(text) and not TAG.search(text) else self._drop(ANSWER)

    def rated(self, raw: str) -> bool:
        """Whether a text has a rating from 1 to 3, and it is at least 2."""
        rating = re.search(r"[123]", raw)
        fine = bool(rating and rating[0] != "1")
        if not fine:
            self._drop(JUDGE)
        return fine

    def _drop(self, reason: str) -> str | None:
        self.dropped[reason] += 1
        return None

    def _cleaned(self, raw: str, lines: bool) -> str:
        """A text without quotes, list marks and the task's words around it; only its first line where no example has several."""
        kept: list[str] = []
        for line in raw.strip().splitlines():
            bare = self._bare(line)
            if kept and self._framed(line) or kept and not lines:
                break
            if bare or kept:
                kept.append(bare)
        return "\n".join(kept).strip()

    def _framed(self, line: str) -> bool:
        return any(line.strip().casefold().startswith(word.casefold()) for word in self.frame)

    def _bare(self, line: str) -> str:
        bare = MARK.sub("", line).strip()
        for word in self.frame:
            if bare.casefold().startswith(word.casefold()):
                bare = bare[len(word) :].strip()
        return bare[1:-1].strip() if len(bare) > 1 and bare[0] + bare[-1] in ('""', "“”", "''", "``") else bare


def _ended(text: str) -> bool:
    return bool(END.search(text))


def near_texts(texts: Iterable[str], least: float) -> Near:
    index = Near(least)
    for text in texts:
        index.add(text)
    return index
