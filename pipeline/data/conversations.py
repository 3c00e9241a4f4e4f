"""Conversations: turns as they come in data sets, a prompt that keeps them, and a model's own chat template around them.

Library, without torch. Read are OpenAI's messages ({role, content}, tool calls, parts of text) and ShareGPT's ({from, value}); both become turns of the
roles system, user and assistant with a text, which every template takes. docs/data.md shows both.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.core.files import UserError
from pipeline.core.schema import unwritable

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "result"),
}
"""A role as it is written in data -> as it is kept; call: of a tool, by the assistant; result: what the tool gave, said by the user."""
AROUND = {"call": ("assistant", "tool_call"), "result": ("user", "tool_response")}
"""Who says it, and the tag around it (Hermes' and Qwen's)."""
ANSWER = "AnAnswer0123456789"
"""Stands for an assistant's words while a template is looked at."""
USER_TURN = "\nUser:"
NEXT_TURN = re.compile(r"\n(?:System|User|Assistant):")
"""Where another turn of a transcript begins."""
Turns = list[dict[str, Any]]
"""{role, content}, and weight: 0 of an assistant's turn that is not to be learnt."""


class Conversation(str):
    """A prompt of several turns. As a text it is their transcript, ending where the assistant is to go on; `turns` are what a chat template takes."""

    turns: Turns

    def __new__(cls, turns: Turns) -> Conversation:
        made = super().__new__(cls, transcript(turns))
        made.turns = turns
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Conversation, (self.turns,)


def transcript(turns: Turns) -> str:
    """The turns as lines "User: …", with the beginning of the assistant's next one."""
    return "\n".join([*(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns), "Assistant:"])


def turns_of(prompt: str) -> Turns:
    """The turns of a prompt; of a text that is none, the user's only one."""
    return prompt.turns if isinstance(prompt, Conversation) else [{"role": "user", "content": prompt}]


def reworded(prompt: str, change: Callable[[str], str]) -> str:
    """The prompt with what is asked changed: of a conversation its last user turn, of a text all of it."""
    if not isinstance(prompt, Conversation):
        return change(prompt)
    last = max(i for i, turn in enumerate(prompt.turns) if turn["role"] == "user")
    return Conversation([{**turn, "content": change(turn["content"])} if i == last else turn for i, turn in enumerate(prompt.turns)])


def answered(prompt: str) -> list[tuple[Conversation, str]]:
    """Every earlier assistant turn that is to be learnt: (what comes before it, its words)."""
    turns = prompt.turns if isinstance(prompt, Conversation) else []
    learnt = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("weight", 1)]
    return [(Conversation(turns[:i]), turns[i]["content"]) for i in learnt]


def normalised(value: Any, where: str, column: str, system: str = "", tools: Any = None) -> Turns:
    """The turns of a row's value: neighbours of one role joined, an assistant's before the first user turn left out, tools as text in the system turn.

    Args:
        value: a list of messages in either form, or its JSON. where: the row in words. system: the system turn of a conversation without one.
        tools: what the assistant may call, a list or its JSON; None: nothing.

    Raises:
        UserError: no such list, a role that nobody knows, a part that is no text.
    """
    said: Turns = []
    for number, message in enumerate(_listed(value, where, column), 1):
        said += _message(message, f"{where} has, in turn {number} of {column},")
    head = "\n".join(turn["content"] for turn in said if turn["role"] == "system") or system
    head = "\n\n".join(filter(None, [head, _tools(tools, where)]))
    turns: Turns = [{"role": "system", "content": head}] if head else []
    for turn in (turn for turn in said if turn["role"] != "system"):
        if turn["role"] == "assistant" and (not turns or turns[-1]["role"] == "system"):
            continue
        if turns and turns[-1]["role"] == turn["role"] and turns[-1].get("weight", 1) == turn.get("weight", 1):
            turns[-1] = {**turn, "content": "\n".join(filter(None, [turns[-1]["content"], turn["content"]]))}
        else:
            turns.append(turn)
    return turns


def _listed(value: Any, where: str, column: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise UserError(f"{where} has no conversation in {column}: task.messages names a column with a list of {{role, content}} or {{from, value}}; "
                        "fix or remove that row")
    return value


def _message(message: dict[str, Any], where: str) -> Turns:
    """One message as a turn; none where it says nothing."""
    said = message.get("role", message.get("from"))
    role = ROLES.get(str(said).casefold())
    if role is None:
        raise UserError(f"{where} the role {said!r}; roles are {', '.join(ROLES)}; fix or remove that row")
    text = _text(message.get("content", message.get("value")), where)
    if role in AROUND:
        role, tag = AROUND[role]
        text = _tagged(tag, text)
    calls = [*(message.get("tool_calls") or []), *([message["function_call"]] if message.get("function_call") else [])]
    text = "\n".join(filter(None, [text, *(_tagged("tool_call", _call(call, where)) for call in calls)]))
    weight = {"weight": 0} if role == "assistant" and message.get("weight") == 0 else {}
    return [{"role": role, "content": text, **weight}] if text else []


def _text(content: Any, where: str) -> str:
    if isinstance(content, list):
        wrong = next((part for part in content if not isinstance(part, dict) or not isinstance(part.get("text"), str)), None)
        if wrong is not None:
            raise UserError(f"{where} a part that is no text ({str(wrong):.60}); only text can be learnt: remove that part or row")
        content = "\n".join(part["text"] for part in content)
    if content is not None and not isinstance(content, (str, int, float, dict)):
        raise UserError(f"{where} the content {content!r:.60}, which is no text; fix or remove that row")
    text = "" if content is None else _json(content) if isinstance(content, dict) else str(content).strip()
    if reason := unwritable(text):
        raise UserError(f"{where} a text with {reason}; fix or remove that row")
    return text


def _call(call: Any, where: str) -> str:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} a tool call without a name; fix or remove that row")
    arguments = function.get("arguments", {})
    with contextlib.suppress(ValueError):  # it is kept as the text that it is
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return _json({"name": function["name"], "arguments": arguments})


def _tools(tools: Any, where: str) -> str:
    if isinstance(tools, str):
        return tools.strip()
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{where} has tools {tools!r:.60}, which are no list; fix or remove that row")
    return "Tools:\n" + "\n".join(map(_json, tools)) if tools else ""


def _tagged(tag: str, text: str) -> str:
    return f"<{tag}>\n{text}\n</{tag}>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class Template:
    """A model's chat template, known by what it writes: where an assistant's answer begins, and which token closes it.

    Whatever stands between the prompt and the answer (a mark of the turn, an empty block of thoughts) belongs to the prompt, by the difference of
    the text with an answer and without.

    Raises (from the methods):
        UserError: the template refuses the turns.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def prompt(self, turns: Sequence[dict[str, Any]]) -> str:
        """The text up to the assistant's next answer."""
        asked = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        if asked[0]["role"] == "system" and not self._takes_system:
            first, user, *rest = asked
            asked = [{"role": "user", "content": f"{first['content']}\n\n{user['content']}"}, *rest]
        bare = self._rendered(asked, True)
        try:
            before, found, _ = self._rendered([*asked, {"role": "assistant", "content": ANSWER}], False).rpartition(ANSWER)
        except UserError:
            return bare
        return before if found and before.startswith(bare) else bare

    @functools.cached_property
    def end_id(self) -> int | None:
        """The token that closes an assistant's turn; the tokenizer's end-of-text token where the template has none of its own."""
        end: int | None = self.tokenizer.eos_token_id
        try:
            _, found, after = self._rendered([{"role": "user", "content": "x"}, {"role": "assistant", "content": ANSWER}], False).rpartition(ANSWER)
        except UserError:
            return end
        ids = self.tokenizer(after, add_special_tokens=False)["input_ids"] if found and after.strip() else []
        return ids[0] if ids and ids[0] in getattr(self.tokenizer, "added_tokens_decoder", ()) else end

    @functools.cached_property
    def _takes_system(self) -> bool:
        try:
            return ANSWER in self._rendered([{"role": "system", "content": ANSWER}, {"role": "user", "content": "x"}], True)
        except UserError:
            return False

    def _rendered(self, turns: list[dict[str, Any]], ask: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=ask, tokenize=False))
        except TemplateError as error:
            raise UserError(f"the model's chat template refuses the turns {', '.join(turn['role'] for turn in turns)} ({' '.join(str(error).split())}); "
                            "change those rows, or set task.format=transcript") from error
