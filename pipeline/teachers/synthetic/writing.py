"""New rows from seed examples, as LAB makes them (Sudalairaj et al., 2024): a question in the manner of a leaf's examples, then its answer, then a rating.

Where a task has fixed choices the answer comes first and a text is written for it, so that no label is rarer than
another (Self-Instruct's output-first way, Wang et al., 2023). Requests are chat turns: drawn examples, then the same request once more.
What comes back is cleaned and checked (form, length, answers, duplicates, leakage); every text that is dropped is counted by its reason.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.core.files import UserError
from pipeline.core.settings import Task
from pipeline.data.near import Near, own_nearness
from pipeline.scoring.reading import canonical, extract
from pipeline.teachers.synthetic.rows import Synthesis
from pipeline.teachers.synthetic.taxonomy import Leaf, SeedExample
from pipeline.teachers.writers import Messages, Writer

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
        stripped: list[str] = []
        for line in raw.strip().splitlines():
            bare = self._bare(line)
            if stripped and self._framed(line) or stripped and not lines:
                break
            if bare or stripped:
                stripped.append(bare)
        return "\n".join(stripped).strip()

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


WORDS = ("system", "by_answer", "question", "in_context", "context", "answer", "judge")


@dataclass(frozen=True)
class Branch:
    """What one kind of rows is written from: a leaf's examples, of one answer where the task has fixed choices."""

    leaf: Leaf
    answer: str | None
    examples: tuple[SeedExample, ...]

    @property
    def contexts(self) -> list[str]:
        """What can be asked about: documents' passages, else the examples' own."""
        return list(self.leaf.documents or dict.fromkeys(e.context for e in self.examples if e.context))


@dataclass(frozen=True)
class Draft:
    branch: Branch
    shots: tuple[SeedExample, ...]
    context: str = ""
    question: str = ""
    answer: str = ""

    @property
    def shown(self) -> list[str]:
        """Ids of the labelled rows that the writer saw."""
        return [shot.row for shot in self.shots if shot.row is not None]


def branches(leaves: Sequence[Leaf], choices: Sequence[str] | None) -> list[Branch]:
    """The leaves, parted by answer where the task has fixed choices. Raises UserError for an answer that is none of them."""
    if choices is None:
        return [Branch(leaf, None, leaf.examples) for leaf in leaves]
    spelling = {canonical(choice): choice for choice in choices}
    parts: list[Branch] = []
    for leaf in leaves:
        wrong = next((e for e in leaf.examples if canonical(e.answer) not in spelling), None)
        if wrong is not None:
            what = f"leaf {leaf.path} has the answer {wrong.answer!r}, none of the task's choices ({', '.join(choices)})"
            raise UserError(f"{what}; fix it or choose another task")
        for key, choice in spelling.items():
            examples = tuple(replace(e, answer=choice) for e in leaf.examples if canonical(e.answer) == key)
            parts += [Branch(leaf, choice, examples)] if examples else []
    return parts


@dataclass
class Writing:
    """One set of rows being written. tag: of the set, part of every draw."""

    writer: Writer
    settings: Synthesis
    filter: Filter
    tag: str
    asked: int = 0
    accepted: list[Draft] = field(default_factory=list)
    nearness: dict[str, float] = field(default_factory=dict)
    """By leaf, what `_near` returned."""

    def run(self, parts: Sequence[Branch]) -> list[Draft]:
        """Write in rounds, each asking for what is still missing, until there are `rows` or the attempts are spent. The same texts give the same rows."""
        goals = [self.settings.rows // len(parts) + (i < self.settings.rows % len(parts)) for i in range(len(parts))]
        most = [round(goal * self.settings.attempts) for goal in goals]
        asked, accepted, number = [0] * len(parts), [0] * len(parts), 0
        while True:
            counts = [0 if accepted[i] >= goal else min(most[i] - asked[i], _request(goal, accepted[i], asked[i])) for i, goal in enumerate(goals)]
            if not any(counts):
                return self.accepted
            rng = random.Random(f"{self.settings.seed}/{self.tag}/{number}")
            drafts = [self._draft(part, rng) for part, count in zip(parts, counts, strict=True) for _ in range(count)]
            for draft in self._written(drafts, number):
                i = next(i for i, part in enumerate(parts) if part is draft.branch)
                if accepted[i] < goals[i]:
                    self.accepted.append(draft)
                    accepted[i] += 1
            asked = [a + count for a, count in zip(asked, counts, strict=True)]
            self.asked, number = sum(asked), number + 1

    def _draft(self, branch: Branch, rng: random.Random) -> Draft:
        shots = tuple(rng.sample(branch.examples, min(self.settings.shots, len(branch.examples))))
        return Draft(branch, shots, rng.choice(branch.contexts) if branch.contexts else "")

    def _written(self, drafts: list[Draft], number: int) -> list[Draft]:
        """One round: contexts, questions, answers, ratings; each step asks about the drafts that the one before accepted."""
        drafts = self._contexts(drafts, number)
        texts = self._ask([self._question(d) for d in drafts], number)
        asked: list[Draft] = []
        for draft, text in zip(drafts, texts, strict=True):
            about = draft.context if draft.branch.leaf.kind == "skill" else ""
            question = self.filter.question(text, [e.question for e in draft.branch.examples], about, self._near(draft.branch.leaf))
            asked += [replace(draft, question=question)] if question is not None else []
        return self._judged(self._answered(asked, number), number)

    def _near(self, leaf: Leaf) -> float:
        """From which ROUGE-L on a text counts as a duplicate: above what the leaf's examples have among each other, where they follow a pattern."""
        if leaf.path not in self.nearness:
            usual = own_nearness([f"{e.context if leaf.kind == 'skill' else ''} {e.question}" for e in leaf.examples])
            self.nearness[leaf.path] = min(1.0, max(self.settings.near, usual + 1e-6))
        return self.nearness[leaf.path]

    def _contexts(self, drafts: list[Draft], number: int) -> list[Draft]:
        """New contexts for a skill that needs one, as LAB's grounded skills have; knowledge is asked about what its documents say."""
        asked = [i for i, d in enumerate(drafts) if d.context and d.branch.leaf.kind == "skill" and not d.branch.leaf.documents]
        texts = self._ask([self._turns(drafts[i], [(self._say("context"), s.context) for s in drafts[i].shots if s.context], self._say("context"))
                           for i in asked], number)
        by_index: dict[int, Draft | None] = dict(enumerate(drafts))
        for i, text in zip(asked, texts, strict=True):
            context = self.filter.text(text, [e.context for e in drafts[i].branch.examples if e.context])
            by_index[i] = replace(drafts[i], context=context) if context is not None else None
        return [draft for draft in by_index.values() if draft is not None]

    def _answered(self, drafts: list[Draft], number: int) -> list[Draft]:
        if drafts and drafts[0].branch.answer is not None:
            return [replace(d, answer=d.branch.answer or "") for d in drafts]
        answered: list[Draft] = []
        for draft, text in zip(drafts, self._ask([self._reply(d) for d in drafts], number), strict=True):
            answer = self.filter.answer(text, [e.answer for e in draft.branch.examples])
            answered += [replace(draft, answer=answer)] if answer is not None else []
        return answered

    def _judged(self, drafts: list[Draft], number: int) -> list[Draft]:
        if not self.settings.judge:
            return drafts
        requests: list[Messages] = []
        for d in drafts:
            words = self._say("judge", question=_whole(d.context, d.question), answer=d.answer)
            requests.append([{"role": "user", "content": words}])
        return [d for d, text in zip(drafts, self._ask(requests, number), strict=True) if self.filter.rated(text)]

    def _question(self, draft: Draft) -> Messages:
        def asked(context: str) -> str:
            words = self._say("by_answer", answer=draft.branch.answer) if draft.branch.answer is not None else self._say("question")
            return self._say("in_context", context=context, request=words) if context else words

        return self._turns(draft, [(asked(s.context), s.question) for s in draft.shots], asked(draft.context))

    def _reply(self, draft: Draft) -> Messages:
        def asked(context: str, question: str) -> str:
            return self._say("answer", question=_whole(context, question))

        turns = [(asked(s.context, s.question), s.answer) for s in draft.shots]
        return self._turns(draft, turns, asked(draft.context, draft.question), system=False)

    def _turns(self, draft: Draft, shots: Sequence[tuple[str, str]], last: str, system: bool = True) -> Messages:
        words = self._say("system", description=draft.branch.leaf.description) if system else ""
        turns = [{"role": "system", "content": words}] if words else []
        for question, answer in shots:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*turns, {"role": "user", "content": last}]

    def _say(self, key: str, **values: Any) -> str:
        return str((self.settings.words or {})[key]).format(**values).strip()

    def _ask(self, prompts: Sequence[Messages], number: int) -> list[str]:
        return self.writer.write(prompts, seed=self.settings.seed + number) if prompts else []

    def report(self) -> dict[str, Any]:
        """How the set came about: rows, texts asked for, and those dropped by reason."""
        reasons = self.filter.dropped if self.settings.judge else {k: v for k, v in self.filter.dropped.items() if k != JUDGE}
        raised = {path: round(near, 3) for path, near in self.nearness.items() if near > self.settings.near}
        return {"rows": len(self.accepted), "asked": self.asked, "dropped": dict(sorted(reasons.items()))} | ({"near_raised": raised} if raised else {})


def _request(goal: int, accepted: int, asked: int) -> int:
    """Texts to ask for: what is missing, divided by the share that was accepted so far (at least a quarter)."""
    share = max(accepted / asked, 0.25) if asked else 1.0
    return math.ceil((goal - accepted) / share)


def _whole(context: str, question: str) -> str:
    return f"{context}\n\n{question}" if context else question


def check_words(settings: Synthesis) -> None:
    """Raise UserError where synthetic.words lacks a request or names something that the request does not have."""
    known = {"system": ("description",), "by_answer": ("answer",), "in_context": ("context", "request"), "answer": ("question",),
             "judge": ("question", "answer")}
    words = settings.words or {}
    for key in (*WORDS, *words):
        if key not in WORDS or not isinstance(words.get(key), str):
            raise UserError(f"config key 'synthetic.words.{key}' is {words.get(key)!r}; synthetic.words holds a text for each of {', '.join(WORDS)}")
        try:
            words[key].format(**dict.fromkeys(known.get(key, ()), ""))
        except (KeyError, IndexError, ValueError) as error:
            may = ", ".join(f"{{{name}}}" for name in known.get(key, ())) or "no braces"
            raise UserError(f"config key 'synthetic.words.{key}' is {words[key]!r}; it takes {may}") from error
