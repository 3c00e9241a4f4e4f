"""Two cells' answers to the same rows held against each other by a judge: another model, asked twice with the answers' places swapped.

Library of pipeline/judge.py. A judge prefers places and lengths (Zheng et al., 2023): a row is won only as far as both orders say so, and how often they do
is reported beside the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.core.files import UserError
from pipeline.stats.bootstrap import interval, mean

Messages = list[dict[str, str]]
VERDICT = re.compile(r"\[\[([ABC])\]\]")
SAYS = {"A": 1.0, "B": 0.0, "C": 0.5}
"""The verdict -> what the answer in the first place wins."""
ASK = (
    "{criterion} Do not let the answers' order or length decide. Explain in one sentence, then end with [[A]] if answer A is better, [[B]] if answer B is "
    "better, or [[C]] if neither is.\n\n[Question]\n{question}\n\n{reference}[Answer A]\n{a}\n[End of answer A]\n\n[Answer B]\n{b}\n[End of answer B]"
)


@dataclass(frozen=True)
class Pair:
    """A row that two cells answered. reference: the right answer, shown to the judge; empty: none is."""

    identity: str
    question: str
    one: str
    other: str
    reference: str = ""


@dataclass(frozen=True)
class Judged:
    """What came out for the first cell. Shares are of the rows judged."""

    rows: int
    wins: int
    losses: int
    ties: int
    """Rows that neither wins in both orders together: both said so, or each order said another."""
    share: float
    """Wins and half of the ties; with its 95% interval (bootstrap over rows)."""
    low: float
    high: float
    p: float
    """Two-sided sign test of wins against losses."""
    agreement: float | None
    """Share of the rows that both orders gave the same verdict on; null: no row had two answers that differ."""
    first_place: float | None
    """Share of the verdicts that were for the answer in the first place, ties counted as half: 0.5 for a judge without a preference."""
    same: int
    """Rows whose answers are the same text: a tie, and not asked about."""
    unread: int
    """Rows left out, as the judge said no verdict about them in one of the orders."""


def judge(pairs: Sequence[Pair], write: Callable[[list[Messages]], list[str]], criterion: str) -> tuple[Judged, list[dict[str, Any]]]:
    """Ask about every pair in both orders. Returns what came out, and a line a row: id, value (what the first cell wins, 0 to 1), verdicts.

    Args:
        write: the judge: a text for every prompt, in order.

    Raises:
        UserError: the judge cannot be asked, or said no verdict about any row.
    """
    asked = [pair for pair in pairs if pair.one.strip() != pair.other.strip()]
    said = write([message for pair in asked for message in (_message(pair, criterion), _message(pair, criterion, swapped=True))])
    lines: list[dict[str, Any]] = [{"id": pair.identity, "value": 0.5, "verdicts": []} for pair in pairs if pair.one.strip() == pair.other.strip()]
    same, unread = len(lines), 0
    for pair, first, second in zip(asked, said[::2], said[1::2], strict=True):
        verdicts = [verdict(first), verdict(second)]
        if None in verdicts:
            unread += 1
            continue
        one, other = (SAYS[str(letter)] for letter in verdicts)
        lines.append({"id": pair.identity, "value": (one + 1 - other) / 2, "verdicts": verdicts})
    if not lines:
        raise UserError(f"the judge said no verdict about any of {len(pairs)} rows (its first words: {said[0][:80]!r}); raise writer.max_new_tokens, or take "
                        "another model")
    return _summary(lines, same, unread), lines


def verdict(text: str) -> str | None:
    """The last verdict in what a judge said: A, B or C; None: there is none."""
    found = VERDICT.findall(text)
    return found[-1] if found else None


def _summary(lines: Sequence[dict[str, Any]], same: int, unread: int) -> Judged:
    from scipy.stats import binomtest

    values = np.array([line["value"] for line in lines])
    wins, losses = int((values > 0.5).sum()), int((values < 0.5).sum())
    asked = [line["verdicts"] for line in lines if line["verdicts"]]
    agreement = float(np.mean([SAYS[one] == 1 - SAYS[other] for one, other in asked])) if asked else None
    first = float(np.mean([SAYS[letter] for both in asked for letter in both])) if asked else None
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Judged(len(lines), wins, losses, len(lines) - wins - losses, float(values.mean()), *interval(values, mean), p, agreement, first, same, unread)


def _message(pair: Pair, criterion: str, swapped: bool = False) -> Messages:
    a, b = (pair.other, pair.one) if swapped else (pair.one, pair.other)
    reference = f"[Right answer]\n{pair.reference}\n\n" if pair.reference else ""
    return [{"role": "user", "content": ASK.format(criterion=criterion, question=pair.question, reference=reference, a=a, b=b)}]


def in_words(judged: Judged, one: str, other: str, about: dict[str, Any]) -> str:
    """What came out, what it rests on and what it cost, in a few sentences."""
    apart = "which is more than chance" if judged.p < 0.05 else "which may well be chance"
    agreed = "" if judged.agreement is None else f" The judge agrees with itself on {judged.agreement:.0%} of the rows when the answers change places."
    price = about.get("price")
    cost = f" Price: {price:.4g} {about['currency']}." if price is not None else " Price: not known (writer.input_price, output_price and currency)."
    left = f" {judged.unread} rows had no verdict and are left out." if judged.unread else ""
    counts = f"{judged.wins} won, {judged.losses} lost, {judged.ties} tied"
    won = f"{one} wins {judged.share:.1%} [{judged.low:.1%}, {judged.high:.1%}] against {other} on {judged.rows} rows"
    return f"{won} ({counts}; p = {judged.p:.2g}), {apart}.{agreed}{left}{cost}"


def as_json(judged: Judged, cells: Sequence[str], criterion: str, about: dict[str, Any]) -> dict[str, Any]:
    return {"cells": list(cells), **asdict(judged), "criterion": criterion, "judge": about}
