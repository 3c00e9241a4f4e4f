"""Rows of the usual instruction and chat formats, told by their keys, as plain columns.

Library of tables.py. OpenAI's messages, ShareGPT's conversations, Alpaca, prompt and completion, preference pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.core.files import UserError

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "ai": "assistant"}
"""ShareGPT's words for who speaks."""
COMPLETIONS = ("completion", "response", "output", "answer")
SHAPES = {"messages": "OpenAI messages", "conversations": "ShareGPT conversations", "preference": "preference pairs", "alpaca": "Alpaca instructions",
          "completion": "prompts and completions"}
"""Shape -> its name for people."""
ANSWERED = 20
"""Rows that are looked at to tell a shape."""


def shape_of(rows: Sequence[dict[str, Any]]) -> str | None:
    """A key of SHAPES; None for a plain table."""
    first = rows[:ANSWERED]

    def all_have(*keys: str) -> bool:
        return all(key in row for row in first for key in keys)

    for key in ("messages", "conversations"):
        if all_have(key) and all(_is_conversation(row[key]) for row in first):
            return key
    if all_have("chosen", "rejected"):
        return "preference"
    if all_have("instruction", "output"):
        return "alpaca"
    return "completion" if all_have("prompt") and any(all_have(key) for key in COMPLETIONS) else None


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
                                                          for turn in value)


def flat(rows: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The rows with a text in every column: chats and pairs as `prompt` and `answer` (pairs also `choices`), all others as they are.

    Raises:
        UserError: a conversation that does not end with the assistant, a row of another shape. The message names the row.
    """
    shape = shape_of(rows)
    if shape in ("messages", "conversations"):
        return [_conversation(row.get(shape), f"row {n} of {where}") for n, row in enumerate(rows, 1)]
    if shape == "preference":
        return [_pair(row, f"row {n} of {where}") for n, row in enumerate(rows, 1)]
    return rows


def turns(value: Any, where: str) -> list[tuple[str, str]]:
    """(role, text) of every turn. Raises UserError where it is no conversation."""
    if not _is_conversation(value):
        raise UserError(f"{where} is no list of turns with role and content (or from and value); mend or remove that row")
    said = [(str(turn.get("role", turn.get("from"))), turn["content"] if "content" in turn else turn["value"]) for turn in value]
    return [(ROLES.get(role.lower(), role.lower()), _text(content)) for role, content in said]


def _text(content: Any) -> str:
    """A turn's text; of a list of parts those that are text."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content).strip()


def _conversation(value: Any, where: str) -> dict[str, Any]:
    said = turns(value, where)
    if said[-1][0] != "assistant" or len(said) < 2:
        raise UserError(f"{where} ends with a turn of {said[-1][0]!r}; the last turn has to be the assistant's, which is what is learnt")
    return {"prompt": transcript(said[:-1]), "answer": said[-1][1]}


def transcript(said: Iterable[tuple[str, str]]) -> str:
    """Turns as one text: a single question as it is, else who says what."""
    told = [(role, text) for role, text in said if text]
    system = [text for role, text in told if role == "system"]
    rest = [(role, text) for role, text in told if role != "system"]
    body = rest[0][1] if len(rest) == 1 else "\n".join(f"{role.capitalize()}: {text}" for role, text in rest)
    return "\n\n".join([*system, body])


def _pair(row: dict[str, Any], where: str) -> dict[str, Any]:
    if "chosen" not in row or "rejected" not in row:
        raise UserError(f"{where} lacks chosen or rejected; mend or remove that row")
    chosen, rejected = row["chosen"], row["rejected"]
    if _is_conversation(chosen) and _is_conversation(rejected):
        one, other = turns(chosen, where), turns(rejected, where)
        prompt, answer, worse = transcript(one[:-1]) or _text(row.get("prompt")), one[-1][1], other[-1][1]
    else:
        prompt, answer, worse = _text(row.get("prompt", row.get("question", row.get("instruction")))), _text(chosen), _text(rejected)
    if not prompt or not answer or not worse:
        raise UserError(f"{where} has no prompt, or an empty answer; write prompt, chosen and rejected")
    return {"prompt": prompt, "answer": answer, "choices": [answer, worse]}
