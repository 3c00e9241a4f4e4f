"""A writer behind an OpenAI-compatible server: OpenAI's, vLLM, llama.cpp, Ollama, … conf/writer/server.yaml.

Every answer is stored as soon as it comes, so an interrupted run pays again only for what was under way. The key comes from an environment
variable and is written nowhere.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.core.files import UserError
from pipeline.core.settings import AtLeast1, Positive
from pipeline.measure.clock import Stopwatch
from pipeline.teachers.api_client import Client, Malformed, Pace, Patience, Stopped, address, key_of
from pipeline.teachers.writers import Completion, Messages, Writer, as_text

PATHS = {"chat": "chat/completions", "completions": "completions"}
CHARACTERS_PER_TOKEN = 4  # of English text, to book a request before its tokens are known


@dataclass(frozen=True, kw_only=True)
class ServerWriter(Writer):
    """
    Args:
        base_url: requests go to <base_url>/chat/completions, or <base_url>/completions with api=completions.
        key_variable: the environment variable with the key; null: none is sent.
        room_key: what the server calls the most tokens of a text (max_tokens, max_completion_tokens).
        extra: more keys of every request; null removes one (temperature, for a model that knows none).
        separator: api=completions: stands before every turn but replies, and ends the text.
        concurrency: requests under way at once.
        requests_per_minute, tokens_per_minute: limits; null: none.
        input_price, output_price: per million tokens, in `currency`; null: no price is reported.
    """

    kind = "server"

    base_url: str
    model: str | None = None
    api: Literal["chat", "completions"] = "chat"
    key_variable: str | None = "OPENAI_API_KEY"
    room_key: str = "max_tokens"
    extra: dict[str, Any] = field(default_factory=dict)
    separator: str = "\n\n"
    concurrency: AtLeast1 = 4
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    patience: dict[str, Any] = field(default_factory=dict)
    input_price: float | None = None
    output_price: float | None = None
    currency: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({value is None for value in (self.input_price, self.output_price, self.currency)}) > 1:
            raise UserError("writer.input_price, writer.output_price (per million tokens) and writer.currency go together; set all three, or none")
        Patience(**self.patience)

    def check(self) -> None:
        if not self.model:
            raise UserError("config key 'writer.model' is not set; name a model that the server has")
        address(self.base_url)
        key_of(self.key_variable)

    def identity(self) -> dict[str, Any]:
        return {
            "server": address(self.base_url), "api": self.api, "model": self.model, "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature, "top_p": self.top_p, "extra": self.extra, **({"separator": self.separator} if self.api == "completions" else {}),
        }

    def about(self) -> dict[str, Any]:
        about = super().about()
        price, read, wrote = None, about["prompt_tokens"], about["completion_tokens"]
        if self.input_price is not None and self.output_price is not None and read is not None and wrote is not None:
            price = round((read * self.input_price + wrote * self.output_price) / 1e6, 6)
        return {**about, "price": price, "currency": self.currency}

    def _ask(self, prompts: dict[str, Messages], seed: int, keep: Callable[[str, Completion], None]) -> None:
        client = Client(self.base_url, self.key_variable, Patience(**self.patience), Pace(self.requests_per_minute, self.tokens_per_minute), self._parse)
        watch, lock = Stopwatch(), threading.Lock()

        def ask(key: str) -> None:
            try:
                text, read, wrote, cut = self._answer(client, self.body(prompts[key], seed))
                with lock:  # each answer's seconds are those since the one before, so that they add up to the wall clock
                    keep(key, Completion(text, round(watch.lap(), 4), read, wrote, cut))
            except BaseException:
                client.stop.set()  # what is under way is paid for and still stored; nothing new starts
                raise

        pool = ThreadPoolExecutor(self.concurrency, "writer")
        try:
            for done in as_completed([pool.submit(ask, key) for key in prompts]):
                error = done.exception()
                if error is not None and not isinstance(error, Stopped):
                    raise error
        finally:
            client.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            client.close()

    def body(self, messages: Messages, seed: int) -> dict[str, Any]:
        """The request: sampling has its seed, greedy writing none; a null in `extra` removes a key."""
        body: dict[str, Any] = {"model": self.model, self.room_key: self.max_new_tokens, "temperature": self.temperature}
        if self.temperature > 0:
            body |= {"seed": seed} | ({"top_p": self.top_p} if self.top_p < 1 else {})
        if self.api == "completions":
            body |= {"prompt": as_text(messages, self.separator), "stop": [self.separator]}
        else:
            body["messages"] = messages
        return {key: value for key, value in {**body, **self.extra}.items() if value is not None}

    def _answer(self, client: Client, body: dict[str, Any]) -> tuple[str, int | None, int | None, bool]:
        booked = len(json.dumps(body)) // CHARACTERS_PER_TOKEN + self.max_new_tokens
        text, read, wrote, cut = client.post(PATHS[self.api], body, booked)
        if read is not None and wrote is not None:
            client.pace.settle(read + wrote - booked)
        return text, read, wrote, cut

    def _parse(self, body: Any) -> tuple[str, int | None, int | None, bool]:
        """(text, prompt tokens, completion tokens, cut). A refusal of the model is an empty text."""
        try:
            choice = body["choices"][0]
            text = choice["message"]["content"] if self.api == "chat" else choice["text"]
        except (KeyError, IndexError, TypeError) as error:
            reported = body.get("error") if isinstance(body, dict) else None
            raise Malformed(f"JSON without a choice{f': {json.dumps(reported)}' if reported else ''}") from error
        if text is not None and not isinstance(text, str):
            raise Malformed("a choice whose content is no text")
        usage = body.get("usage")
        read, wrote = (_count(usage, key) for key in ("prompt_tokens", "completion_tokens"))
        return (text or "").strip(), read, wrote, choice.get("finish_reason") == "length"


def _count(usage: Any, key: str) -> int | None:
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if type(value) is int else None
