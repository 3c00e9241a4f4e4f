"""JSON posted to a server that may be busy, slow or broken, by the openai library: paced, and without showing its key.

Library. The library asks again; what it does not have is ours: a pace, a limit on a whole answer, broken answers, and an end when `stop` is set.
"""

from __future__ import annotations

import email.utils
import functools
import json
import logging
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pipeline.core.files import UserError
from pipeline.core.settings import AtLeast1, Positive, check_fields
from pipeline.measure.clock import Stopwatch, now

T = TypeVar("T")
AGAIN = {408, 409, 425, 429}
"""Status codes below 500 after which the same request may succeed."""
NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")
"""Codes in a 429 that waiting does not fix."""


class Malformed(Exception):
    """An answer that is not of the promised form; the message says what it is."""


class Stopped(Exception):
    """Given up because the run ends."""


@dataclass(frozen=True)
class Patience:
    """attempts: of one request. timeout_s: for a whole answer. Waits between attempts are the openai library's; a server's Retry-After is waited for
    where it is longer, up to patience_s.
    """

    attempts: AtLeast1 = 6
    timeout_s: Positive = 60.0
    patience_s: float = 600.0

    def __post_init__(self) -> None:
        check_fields(self, "writer.patience")


class Pace:
    """Requests and tokens a minute, spread evenly: the next request starts once those before it have had their time. None: no limit."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._each = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._watch, self._lock = Stopwatch(), threading.Lock()
        self._requests = self._tokens = 0.0

    def turn(self, tokens: int) -> float:
        """Book a request of about so many tokens; seconds until it may start."""
        with self._lock:
            at = self._watch.peek()
            start = max(at, self._requests, self._tokens)
            self._requests, self._tokens = start + self._each, start + tokens * self._token
            return start - at

    def settle(self, more: int) -> None:
        """A request took so many tokens more than booked."""
        with self._lock:
            self._tokens += more * self._token

    def delay(self, seconds: float) -> None:
        """No request starts before so many seconds have passed."""
        with self._lock:
            self._requests = max(self._requests, self._watch.peek() + seconds)


def key_of(variable: str | None) -> str | None:
    """The key in an environment variable; None where no variable is named.

    Raises:
        UserError: no such name, not set, or a value that no HTTP header may hold. The message never has the value.
    """
    if variable is None:
        return None
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise UserError("config key 'writer.key_variable' takes the name of an environment variable, and what it has is none; put the key itself nowhere else")
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"the environment variable {variable} is not set; set it to the server's key, or writer.key_variable=null for a server without keys")
    if not all("!" <= c <= "~" for c in key):
        raise UserError(f"the key in {variable} has a blank or a character outside ASCII, which no HTTP header may; fix it")
    return key


def address(base_url: str) -> str:
    """The URL in its plain form. Raises UserError, without showing it, for credentials or a query in it, and for what is no http URL."""
    import httpx2

    try:
        url = httpx2.URL(base_url)
    except (httpx2.InvalidURL, TypeError):
        url = httpx2.URL()
    if url.userinfo or url.query or url.fragment:
        raise UserError("config key 'writer.base_url' has more than scheme, host and path; keys go through the environment variable writer.key_variable")
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"config key 'writer.base_url' is {base_url!r}; give a URL like http://localhost:8000/v1")
    return str(url).rstrip("/")


class Client(Generic[T]):
    """Posts to one server through the openai library, which tries again what may pass (429, 5xx, time-outs, lost connections). Safe to use from several
    threads.

    Args:
        parse: makes what is wanted of the JSON of an answer; raises Malformed for one to ask for again.
    """

    def __init__(self, base_url: str, variable: str | None, patience: Patience, pace: Pace, parse: Callable[[Any], T]) -> None:
        import httpx2
        import openai

        self.base_url, self.variable, self.patience, self.pace, self.parse = address(base_url), variable, patience, pace, parse
        self.stop = threading.Event()
        self._key, self._booked = key_of(variable), threading.local()
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        for name in ("httpx2", "openai"):  # a line a request
            logging.getLogger(name).setLevel(logging.WARNING)
        hooks: Any = {"request": [self._before], "response": [self._after]}
        http = httpx2.Client(timeout=patience.timeout_s, limits=limits, event_hooks=hooks, transport=_transport(patience.timeout_s, limits))
        self._options: Any = {"headers": {"Authorization": f"Bearer {self._key}" if self._key else openai.Omit()}}
        self._api = openai.OpenAI(base_url=self.base_url, api_key=self._key or "none", max_retries=patience.attempts - 1, timeout=patience.timeout_s,
                                  http_client=http)

    def close(self) -> None:
        self._api.close()

    def post(self, path: str, body: dict[str, Any], tokens: int) -> T:
        """What `parse` makes of the JSON that the server answers.

        Args:
            tokens: about how many the request will take.

        Raises:
            UserError: the server refuses, or all attempts failed. Stopped: `stop` was set while waiting.
        """
        import httpx2
        import openai

        self._booked.tokens = tokens
        try:
            response = self._api.post(f"/{path}", cast_to=httpx2.Response, body=body, options=self._options)
            return self.parse(_json(response))
        except openai.APIStatusError as error:
            failure = self._refusal(error.status_code, error.response.content)
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            failure = self._hidden(str(cause) if isinstance(cause, _broken()) else f"{type(cause).__name__}: {cause}").rstrip(": ")
        raise UserError(
            f"{self.base_url} gave no answer in {self.patience.attempts} attempts (the last: {failure}); "
            "what was answered is kept, run the same command again to resume"
        )

    def _before(self, request: Any) -> None:
        """Wait for an attempt's turn. Raises Stopped."""
        if self.stop.wait(max(0.0, self.pace.turn(self._booked.tokens))) or self.stop.is_set():
            raise Stopped

    def _after(self, response: Any) -> None:
        """Read an answer and say whether it may be asked for again; a server's Retry-After is waited for by all, before their next turn."""
        response.read()
        if response.status_code == 200:
            try:
                self.parse(_json(response))
            except Malformed as error:
                raise _broken()(str(error)) from error
            return
        if response.status_code == 429 and _error(response.content)[1] in NO_CREDIT:
            response.headers["x-should-retry"] = "false"
            return
        if response.status_code in AGAIN:
            response.headers["x-should-retry"] = "true"
        if response.status_code in AGAIN or response.status_code >= 500:
            self.pace.delay(self._retry_after(response.headers))
            response.headers.pop("retry-after", None)  # the library would wait without an ear for `stop`

    def _refusal(self, status: int, data: bytes) -> str:
        """What to say of an answer that is no success. Raises UserError where asking again cannot help."""
        message, code = _error(data)
        text = f"{status}{f', {self._hidden(message)}' if message else ''}"
        if status == 429 and code in NO_CREDIT:
            raise UserError(f"{self.base_url} has no credit left for this key ({code}); what was answered is kept, run the same command again once it has")
        if status in AGAIN or status >= 500:
            return text
        if status in (401, 403):  # the message may contain a part of the key
            how = f"the key in {self.variable}" if self._key else "a request without a key; name its environment variable in writer.key_variable"
            raise UserError(f"{self.base_url} refuses ({status}) {how}; check the key and what it may use")
        if status == 404:
            raise UserError(f"{self.base_url} does not know that path or model ({text}); check writer.base_url, writer.api and writer.model")
        raise UserError(f"{self.base_url} refuses the request ({text}); fix the writer's settings or the prompt")

    def _retry_after(self, headers: Any) -> float:
        """Seconds that the server asks to be left alone; 0: it does not say."""
        value = headers.get("retry-after", "")
        try:
            seconds = float(value)
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - now()
            except (TypeError, ValueError):
                return 0.0
        if not seconds <= self.patience.patience_s:
            raise UserError(f"{self.base_url} asks to wait for {seconds:.0f} s, longer than writer.patience.patience_s; run the same command again after that")
        return max(0.0, seconds)

    def _hidden(self, text: str) -> str:
        text = " ".join(text.split())
        return (text.replace(self._key, "…") if self._key else text)[:200]


def _transport(timeout_s: float, limits: Any) -> Any:
    """HTTP, each answer of which has to be whole in so many seconds: the client's own limit is one of silence."""
    import httpx2

    class Whole(httpx2.SyncByteStream):
        def __init__(self, stream: Any) -> None:
            self.stream, self.watch = stream, Stopwatch()

        def __iter__(self) -> Any:
            for block in self.stream:
                if self.watch.peek() > timeout_s:
                    raise httpx2.ReadTimeout(f"no whole answer in {timeout_s:g} s")
                yield block

        def close(self) -> None:
            self.stream.close()

    class Transport(httpx2.HTTPTransport):
        def handle_request(self, request: Any) -> Any:
            response = super().handle_request(request)
            response.stream = Whole(response.stream)
            return response

    return Transport(limits=limits)


@functools.cache
def _broken() -> type[Exception]:
    """An answer that is not of the promised form, as an error that the library asks again after."""
    import httpx2

    return type("Broken", (httpx2.TransportError,), {})


def _json(response: Any) -> Any:
    try:
        return json.loads(response.content)
    except ValueError as error:
        kind = response.headers.get("content-type") or "no stated type"
        raise Malformed(f"{len(response.content)} bytes of {kind} that are not JSON") from error


def _error(data: bytes) -> tuple[str, str]:
    """(message, code) of an OpenAI-compatible error body; empty where it is another."""
    try:
        body = json.loads(data)
        error = body.get("error", body) if isinstance(body, dict) else {}
        error = error if isinstance(error, dict) else {"message": error}
        return str(error.get("message") or ""), str(error.get("code") or error.get("type") or "")
    except ValueError:
        return "", ""
