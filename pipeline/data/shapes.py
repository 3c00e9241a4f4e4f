"""Rows of the usual instruction and chat formats, told by their keys, as plain columns.

Library of tables.py. OpenAI's messages, ShareGPT's conversations, Alpaca, prompt and completion, preference pairs, answers with a thumb up or down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.core.files import UserError
from pipeline.data.conversations import Turns, normalised, transcript

TURNS = ("messages", "conversations")
"""Shapes that are conversations, each in the column of its name."""
COMPLETIONS = ("completion", "response", "output", "answer")
SHAPES = {"messages": "OpenAI messages", "conversations": "ShareGPT conversations", "preference": "preference pairs", "judged": "answers, each good or bad",
          "alpaca": "Alpaca instructions",
          "completion": "prompts and completions"}
"""Shape -> its name for people."""
PAIRED = ("preference", "judged")
"""Shapes that say of answers which is better; as a task an answer is chosen among a prompt's own."""
ANSWERED = 20
"""Rows that are looked at to tell a shape."""


def shape_of(rows: Sequence[dict[str, Any]]) -> str | None:
    """A key of SHAPES; None for a plain table."""
    first = rows[:ANSWERED]

    def all_have(*keys: str) -> bool:
        return all(key in row for row in first for key in keys)

    for key in TURNS:
        if all_have(key) and all(_is_conversation(row[key]) for row in first):
            return key
    if all_have("chosen", "rejected"):
        return "preference"
    if all_have("prompt", "completion", "label") and all(isinstance(row["label"], bool) for row in first):
        return "judged"
    if all_have("instruction", "output"):
        return "alpaca"
    return "completion" if all_have("prompt") and any(all_have(key) for key in COMPLETIONS) else None


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
                                                          for turn in value)


def flat(rows: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The rows with a text in every column that matters: preference pairs get `prompt`, `answer` and `choices`, chats get `prompt` and `answer` beside
    their turns (the last assistant turn, empty where there is none, and what comes before it); all others are as they are. Of judged answers every good one
    is a row, the bad ones of its prompt beside it; those of a prompt that has good ones alone, or bad ones, are left out.

    Raises:
        UserError: a row that is no conversation, or no pair. The message names the row.
    """
    shape = shape_of(rows)
    if shape in TURNS:
        return [{**row, **_asked(row.get(shape), f"row {n} of {where}", shape)} for n, row in enumerate(rows, 1)]
    if shape == "preference":
        return [_pair(row, f"row {n} of {where}") for n, row in enumerate(rows, 1)]
    if shape == "judged":
        return judged_rows(rows, where)
    return rows


def judged_rows(rows: Sequence[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """{prompt, answer, choices} of answers with a label each ({prompt, completion, label}). Raises UserError: a row that is none, or no prompt has both."""
    good, bad = judged(rows, where)
    worse: dict[str, list[str]] = {}
    for prompt, text in bad:
        worse.setdefault(prompt, []).append(text)
    made = [{"prompt": prompt, "answer": text, "choices": [text, *dict.fromkeys(worse[prompt])]} for prompt, text in good
            if prompt in worse and text not in worse[prompt]]
    if not made:
        raise UserError(f"{where} has no prompt with a good and a bad completion to choose between; add some, or train on it as it is: "
                        "technique=kto objective.pairs=<the file>")
    return made


def judged(rows: Sequence[dict[str, Any]], where: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(the good ones, the bad ones) of answers with a label each, as (prompt, completion). Raises UserError naming a row that is none."""
    parts: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for number, row in enumerate(rows, 1):
        prompt, text, label = (row.get(key) for key in ("prompt", "completion", "label"))
        if not isinstance(label, bool) or not _text(prompt) or not _text(text):
            raise UserError(f"row {number} of {where} is no {{prompt, completion, label}} with two texts and true or false; mend or remove that row")
        parts[label].append((_text(prompt), _text(text)))
    return parts[True], parts[False]


def _asked(value: Any, where: str, column: str) -> dict[str, str]:
    turns = normalised(value, where, column)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        return {"prompt": _said(turns), "answer": ""}
    return {"prompt": _said(turns[:last]), "answer": turns[last]["content"]}


def _said(turns: Turns) -> str:
    """Turns as a text: a single question as it is, else who says what."""
    return turns[0]["content"] if len(turns) == 1 else transcript(turns)


def _text(content: Any) -> str:
    return "" if content is None else str(content).strip()


def _pair(row: dict[str, Any], where: str) -> dict[str, Any]:
    if "chosen" not in row or "rejected" not in row:
        raise UserError(f"{where} lacks chosen or rejected; mend or remove that row")
    chosen, rejected = row["chosen"], row["rejected"]
    if _is_conversation(chosen) and _is_conversation(rejected):
        better, worse = _asked(chosen, where, "chosen"), _asked(rejected, where, "rejected")
        prompt, answer, other = better["prompt"] or _text(row.get("prompt")), better["answer"], worse["answer"]
    else:
        prompt, answer, other = _text(row.get("prompt", row.get("question", row.get("instruction")))), _text(chosen), _text(rejected)
    if not prompt or not answer or not other or answer == other:
        raise UserError(f"{where} has no prompt, an empty answer, or twice the same; write prompt, chosen and rejected, or remove that row")
    return {"prompt": prompt, "answer": answer, "choices": [answer, other]}
