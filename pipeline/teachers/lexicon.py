"""A teacher of rules: VADER's lexicon and its handling of negation, for sentiment tasks. conf/teacher/lexicon.yaml.

The label comes from VADER's compound score (Hutto & Gilbert, ICWSM 2014), the rationale names the words behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.files import UserError
from pipeline.teachers.base import Explanation, Teacher

NAMED = 3
"""Most words of one side that a rationale names, the strongest ones."""
REACH = 3
"""How many words before a word VADER looks for a negation."""


@dataclass(frozen=True)
class Word:
    """A word of the lexicon as a text has it (with its negation), and VADER's score for it there."""

    text: str
    score: float


@dataclass(frozen=True)
class Lexicon(Teacher):
    """Answers by score, explains by words.

    Args:
        column: of a row's `fields`, the text that is judged.
        subject: what the text is, for the rationale ("so the review is positive").
        scales: {label: highest compound score that gets it}, lowest first, the last one null; the scale whose labels
            are the task's choices is used.
    """

    column: str = "text"
    subject: str = "review"
    scales: list[dict[str, float | None]] = field(default_factory=list)

    def check(self, task: str, row: dict) -> None:
        if self.column not in row["fields"]:
            columns = ", ".join(row["fields"])
            raise UserError(f"task {task} has no column {self.column!r} to judge; set teacher.column to one of: {columns}, or choose another teacher")
        if self._scale(row) is None:
            choices = ", ".join(row["choices"] or ()) or "none, its answers are generated"
            raise UserError(
                f"the lexicon judges sentiment, and no scale of conf/teacher/{self.name}.yaml has the labels of task {task} ({choices}); "
                "add one under teacher.scales or choose another teacher"
            )
        _analyser()

    def explain(self, rows: Sequence[dict]) -> list[Explanation | None]:
        return [self._explanation(row) for row in rows]

    def _scale(self, row: dict) -> dict[str, float | None] | None:
        return next((scale for scale in self.scales if set(scale) == set(row["choices"] or ())), None)

    def _explanation(self, row: dict) -> Explanation:
        text, scale = str(row["fields"].get(self.column) or ""), self._scale(row)
        assert scale is not None
        compound = _analyser().polarity_scores(text)["compound"]
        label = next(label for label, highest in scale.items() if highest is None or compound <= highest)
        middle = len(scale) % 2 == 1 and label == list(scale)[len(scale) // 2]
        return Explanation(sentence(scored_words(text), self.subject, label, middle, "but" in text.lower().split()[1:-1]), label)


def scored_words(text: str) -> list[Word]:
    """The words that VADER counts, in order, each with the score that its negation and intensifiers leave it."""
    from vaderSentiment import vaderSentiment as vader

    analyser, parsed = _analyser(), vader.SentiText(text)
    tokens = parsed.words_and_emoticons
    words: list[Word] = []
    for at, token in enumerate(tokens):
        lower = token.lower()
        kind_of = [t.lower() for t in tokens[at : at + 2]] == ["kind", "of"]
        if lower not in analyser.lexicon or lower in vader.BOOSTER_DICT or kind_of:
            continue
        score = analyser.sentiment_valence(0, parsed, token, at, [])[0]
        turned = score * analyser.lexicon[lower] < 0
        start = next((i for i in range(at - 1, max(at - REACH, 0) - 1, -1) if _negates(tokens[i])), at) if turned else at
        words.append(Word(" ".join(tokens[start : at + 1]), score))
    return [word for word in words if word.score]


def sentence(words: Sequence[Word], subject: str, label: str, middle: bool = False, but: bool = False) -> str:
    """One sentence that names the deciding words and ends with the label; empty where no word decided.

    Args:
        middle: whether the label is the scale's middle one, which needs no word.
        but: whether a "but" weighs what follows it.
    """
    good, bad = ([w for w in words if w.score * sign > 0] for sign in (1, -1))
    clauses = [_clause(side, name) for side, name in ((good, "positive"), (bad, "negative")) if side]
    if not clauses:
        return f"No word is positive or negative, so the {subject} is {label}." if middle else ""
    if len(clauses) == 2:
        clauses[1] = clauses[1].removeprefix("the word ").removeprefix("the phrase ")
    weighing = ', and what follows "but" counts more' if but and len(clauses) == 2 else ""
    text = " and ".join(clauses) + weighing
    return f"{text[0].upper()}{text[1:]}, so the {subject} is {label}."


def _clause(words: list[Word], name: str) -> str:
    strongest = sorted(words, key=lambda w: -abs(w.score))[:NAMED]
    quoted = list(dict.fromkeys(f'"{w.text}"' for w in words if w in strongest))
    if len(quoted) == 1:
        return f"the {'phrase' if ' ' in quoted[0] else 'word'} {quoted[0]} is {name}"
    return f"the words {', '.join(quoted[:-1])} and {quoted[-1]} are {name}"


def _negates(token: str) -> bool:
    from vaderSentiment import vaderSentiment as vader

    return token.lower() in ("no", "least") or bool(vader.negated([token.lower()]))


@functools.cache
def _analyser() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError("teacher=lexicon needs the package vaderSentiment; install it, or choose another teacher") from error
    return SentimentIntensityAnalyzer()
