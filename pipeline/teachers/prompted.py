"""A teacher that is a language model, asked to reason before it answers. conf/teacher/{local,server}.yaml.

Chain-of-thought prompting (Wei et al., 2022): worked examples, each reasoning before its answer, then the row; the text that comes back is split into
rationale and answer. With `samples` above 1, self-consistency (Wang et al., 2023): the answer that most samples give.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.files import UserError
from pipeline.core.settings import AtLeast1, Task
from pipeline.scoring.reading import canonical, extract
from pipeline.teachers.base import Explanation, Teacher
from pipeline.teachers.demonstrations import Demonstrations, Shot
from pipeline.teachers.writers import Messages, Writer


@dataclass
class Session:
    """What the teacher takes of the task, and counts of how it went so far."""

    shots: list[Shot] = field(default_factory=list)
    pattern: str | None = None
    """The task's answer_pattern, for generated answers."""
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
    samples: AtLeast1 = 1
    seed: int = 0
    session: Session = field(default_factory=Session, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _takes("template", self.template, ("prompt", "options"), ("prompt",))
        _takes("options", self.options, ("choices",), ("choices",))
        _takes("reply", self.reply, ("rationale", "answer"), ("rationale", "answer"))
        if self.samples > 1 and self.writer.temperature == 0:
            raise UserError(f"teacher.samples={self.samples}, but writer.temperature=0 writes the same text every time; raise it, or set teacher.samples=1")
        try:
            parts = _split(self.answer_pattern, self.reply.format(rationale="Because.", answer="word"))
        except re.error as error:
            raise UserError(f"config key 'teacher.answer_pattern' is {self.answer_pattern!r}, no regular expression ({error}); fix it") from error
        if parts is None or canonical(parts[1]) != "word":
            raise UserError(f"teacher.answer_pattern={self.answer_pattern!r} does not find the answer in teacher.reply; make them agree")

    def check(self, task: str, row: dict) -> None:
        self.writer.check()

    def begin(self, task: Task, train: Sequence[dict]) -> None:
        self.session.shots = self.demonstrations.shots(task.name, train)
        self.session.pattern = task.answer_pattern

    def explain(self, rows: Sequence[dict]) -> list[Explanation | None]:
        prompts = [self.messages(row) for row in rows]
        texts = [self.writer.write(prompts, seed=self.seed + sample) for sample in range(self.samples)]
        explanations: list[Explanation | None] = []
        for row, samples in zip(rows, zip(*texts, strict=True), strict=True):
            explanation = majority([self.explanation(text, row["choices"]) for text in samples])
            self.session.asked += 1
            self.session.unparsable += explanation.answer is None
            explanations.append(explanation)
        return explanations

    def report(self) -> dict[str, Any]:
        about = self.writer.about()
        return {
            "seconds": about.pop("seconds"), "unparsable": self.session.unparsable, "demonstrations": len(self.session.shots), "samples": self.samples,
            "writer": about,
        }

    def in_words(self) -> str:
        spent, session = self.writer.spent, self.session
        written = f"{spent.written:,} of {spent.answers:,} texts written now, the others kept from before"
        return f"{written}; {session.unparsable:,} of {session.asked:,} rows without an answer"

    def messages(self, row: dict) -> Messages:
        """The prompt for a row, whose own demonstration, if it is one, is left out."""
        turns: Messages = [{"role": "system", "content": self.system}] if self.system else []
        for shot in self.session.shots:
            if shot.prompt != row["prompt"]:
                turns.append({"role": "user", "content": self._question(shot.prompt, shot.choices)})
                turns.append({"role": "assistant", "content": self.reply.format(rationale=shot.rationale, answer=shot.answer)})
        return [*turns, {"role": "user", "content": self._question(row["prompt"], row["choices"])}]

    def explanation(self, text: str, choices: Sequence[str] | None) -> Explanation:
        """Rationale and answer of a text; both are empty where there is no usable answer."""
        parts = _split(self.answer_pattern, text)
        if parts is None:
            return Explanation("", None)
        answer = match_choice(parts[1], choices) if choices else extract(parts[1], self.session.pattern)
        return Explanation(parts[0], answer) if answer else Explanation("", None)

    def _question(self, prompt: str, choices: Sequence[str] | None) -> str:
        options = self.options.format(choices=", ".join(choices)) if choices else ""
        return self.template.format(prompt=prompt, options=options)


def majority(samples: Sequence[Explanation]) -> Explanation:
    """The first of those that give the most frequent answer; the earliest such answer where several are as frequent."""
    votes = Counter(canonical(one.answer) for one in samples if one.answer is not None)
    if not votes:
        return samples[0]
    winner = votes.most_common(1)[0][0]
    return next(one for one in samples if one.answer is not None and canonical(one.answer) == winner)


def match_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a text means: equal to it, else the longest that it begins with, else the only one in it; None if there is no such."""
    words = canonical(text)
    exact = next((c for c in choices if canonical(c) == words), None)
    if exact is not None:
        return exact
    within = [c for c in choices if re.search(rf"(?<!\w){re.escape(c.casefold())}(?!\w)", words)]
    first = max((c for c in within if words.startswith(c.casefold())), key=len, default=None)
    return first or (within[0] if len(within) == 1 else None)


def _split(pattern: str, text: str) -> tuple[str, str] | None:
    """(rationale, answer) by the pattern's groups; without a group for the rationale it is the text before the match."""
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
