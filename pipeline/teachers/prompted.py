"""A teacher that is a language model, asked to reason before it answers. conf/teacher/{local,server}.yaml.

Chain-of-thought prompting (Wei et al., 2022): worked examples, each reasoning before its answer, then the row; what comes back is taken apart into
rationale and answer. With `samples` above 1, self-consistency (Wang et al., 2023): the answer that most samples give.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.files import UserError
from pipeline.core.settings import Task
from pipeline.scoring.answers import canonical, extract
from pipeline.teachers.base import Explanation, Teacher
from pipeline.teachers.demonstrations import Demonstrations, Shot
from pipeline.teachers.writers import Messages, Writer


@dataclass
class Lesson:
    """What the teacher takes of the task, and how it went so far."""

    shots: list[Shot] = field(default_factory=list)
    pattern: str | None = None
    """The task's own, for the answer in what was said to be it."""
    asked: int = 0
    unparsable: int = 0


@dataclass(frozen=True, kw_only=True)
class Prompted(Teacher):
    """
    Args:
        writer: conf/writer/<name>.yaml.
        system: words before everything, in the system's turn; null: none.
        template: the user's turn, of {prompt} and {options}.
        options: what {options} becomes for a row with choices, of {choices}; empty for other rows.
        reply: how a demonstration answers, of {rationale} and {answer}: the form that the model is to follow.
        answer_pattern: the first match in a text ends its rationale; its group `answer` holds the answer. A text without a match has none.
        samples: texts for every row; more than 1 need writer.temperature above 0. seed: of the first, the next have the numbers after it.
    """

    writer: Writer
    template: str
    options: str
    reply: str
    answer_pattern: str
    system: str | None = None
    demonstrations: Demonstrations = field(default_factory=Demonstrations)
    samples: int = 1
    seed: int = 0
    lesson: Lesson = field(default_factory=Lesson, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _takes("template", self.template, ("prompt", "options"), ("prompt",))
        _takes("options", self.options, ("choices",), ("choices",))
        _takes("reply", self.reply, ("rationale", "answer"), ("rationale", "answer"))
        if self.samples < 1:
            raise UserError(f"config key 'teacher.samples' is {self.samples}; it must be at least 1")
        if self.samples > 1 and self.writer.temperature == 0:
            raise UserError(f"teacher.samples={self.samples}, but writer.temperature=0 writes the same text every time; raise it, or set teacher.samples=1")
        try:
            said = _said(self.answer_pattern, self.reply.format(rationale="Because.", answer="word"))
        except re.error as error:
            raise UserError(f"config key 'teacher.answer_pattern' is {self.answer_pattern!r}, no regular expression ({error}); mend it") from error
        if said is None or canonical(said[1]) != "word":
            raise UserError(f"teacher.answer_pattern={self.answer_pattern!r} does not find the answer in teacher.reply; make them agree")

    def check(self, task: str, row: dict) -> None:
        self.writer.check()

    def begin(self, task: Task, train: Sequence[dict]) -> None:
        self.lesson.shots = self.demonstrations.shots(task.name, train)
        self.lesson.pattern = task.answer_pattern

    def explain(self, rows: Sequence[dict]) -> list[Explanation | None]:
        prompts = [self.messages(row) for row in rows]
        texts = [self.writer.write(prompts, seed=self.seed + sample) for sample in range(self.samples)]
        found: list[Explanation | None] = []
        for row, mine in zip(rows, zip(*texts, strict=True), strict=True):
            said = agreed([self.explanation(text, row["choices"]) for text in mine])
            self.lesson.asked += 1
            self.lesson.unparsable += said.answer is None
            found.append(said)
        return found

    def account(self) -> dict[str, Any]:
        about = self.writer.about()
        return {
            "seconds": about.pop("seconds"), "unparsable": self.lesson.unparsable, "demonstrations": len(self.lesson.shots), "samples": self.samples,
            "writer": about,
        }

    def told(self) -> str:
        spent, lesson = self.writer.spent, self.lesson
        kept = f"{spent.written:,} of {spent.answers:,} texts written now, the others kept from before"
        return f"{kept}; {lesson.unparsable:,} of {lesson.asked:,} rows without an answer"

    def messages(self, row: dict) -> Messages:
        """The prompt for a row, whose own demonstration, if it is one, is left out."""
        turns: Messages = [{"role": "system", "content": self.system}] if self.system else []
        for shot in self.lesson.shots:
            if shot.prompt != row["prompt"]:
                turns.append({"role": "user", "content": self._question(shot.prompt, shot.choices)})
                turns.append({"role": "assistant", "content": self.reply.format(rationale=shot.rationale, answer=shot.answer)})
        return [*turns, {"role": "user", "content": self._question(row["prompt"], row["choices"])}]

    def explanation(self, text: str, choices: Sequence[str] | None) -> Explanation:
        """A text taken apart; without a usable answer its reasoning is nothing to learn from either."""
        said = _said(self.answer_pattern, text)
        if said is None:
            return Explanation("", None)
        answer = chosen(said[1], choices) if choices else extract(said[1], self.lesson.pattern)
        return Explanation(said[0], answer) if answer else Explanation("", None)

    def _question(self, prompt: str, choices: Sequence[str] | None) -> str:
        options = self.options.format(choices=", ".join(choices)) if choices else ""
        return self.template.format(prompt=prompt, options=options)


def agreed(said: Sequence[Explanation]) -> Explanation:
    """The first of those that give the most frequent answer; the earliest such answer where several are as frequent."""
    votes = Counter(canonical(one.answer) for one in said if one.answer is not None)
    if not votes:
        return said[0]
    winner = votes.most_common(1)[0][0]
    return next(one for one in said if one.answer is not None and canonical(one.answer) == winner)


def chosen(said: str, choices: Sequence[str]) -> str | None:
    """The choice that is said: word for word, else the longest that it begins with, else the only one in it; None if there is no such."""
    words = canonical(said)
    exact = next((c for c in choices if canonical(c) == words), None)
    if exact is not None:
        return exact
    within = [c for c in choices if re.search(rf"(?<!\w){re.escape(c.casefold())}(?!\w)", words)]
    first = max((c for c in within if words.startswith(c.casefold())), key=len, default=None)
    return first or (within[0] if len(within) == 1 else None)


def _said(pattern: str, text: str) -> tuple[str, str] | None:
    """(rationale, answer) by the pattern's groups; the rationale is what stands before the match if it has no group for it."""
    match = re.search(pattern, text)
    if match is None:
        return None
    groups = match.groupdict()
    answer = groups.get("answer") or next((g for g in match.groups() if g is not None), match.group(0))
    return (groups.get("rationale") or text[: match.start()]).strip(), answer.strip()


def _takes(key: str, value: str, known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    """Raise UserError where a template names something else than `known`, or lacks one of `needed`."""
    try:
        value.format(**dict.fromkeys(known, ""))
        missing = [name for name in needed if f"{{{name}}}" not in value]
    except (KeyError, IndexError, ValueError):
        missing = [*needed]
    if missing:
        raise UserError(f"config key 'teacher.{key}' is {value!r}; it takes {', '.join(f'{{{n}}}' for n in known)}, and {{{missing[0]}}} must be there")
