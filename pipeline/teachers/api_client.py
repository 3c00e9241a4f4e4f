"""JSON posted to a server that may be busy, slow or broken: paced, retried where that can help, and without showing its key.

Library. Waits end at once when `stop` is set.
"""

from __future__ import annotations

import email.utils
import json
import logging
import os
import random
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

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
    """attempts: of one request. timeout_s: for a whole answer. Waits between attempts double from first_wait_s to longest_wait_s, each drawn between
    half of it and all; a server's Retry-After is waited for where it is longer, up to patience_s.
    """

    attempts: AtLeast1 = 6
    timeout_s: Positive = 60.0
    first_wait_s: float = 1.0
    longest_wait_s: Positive = 60.0
    patience_s: float = 600.0

    def __post_init__(self) -> None:
        check_fields(self, "writer.patience")

    def wait_s(self, attempt: int) -> float:
        """Seconds before attempt `attempt` + 1, counted from 1."""
        return min(self.longest_wait_s, self.first_wait_s * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)


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


class Client:
    """Posts to one server. Safe to use from several threads."""

    def __init__(self, base_url: str, variable: str | None, patience: Patience, pace: Pace) -> None:
        import httpx2

        self.base_url, self.variable, self.patience, self.pace = address(base_url), variable, patience, pace
        self.stop = threading.Event()
        self._key = key_of(variable)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line a request
        self._http = httpx2.Client(headers=headers, timeout=patience.timeout_s, limits=limits)

    def close(self) -> None:
        self._http.close()

    def post(self, path: str, body: dict[str, Any], tokens: int, parse: Callable[[Any], T]) -> T:
        """What `parse` makes of the JSON that the server answers.

        Args:
            tokens: about how many the request will take. parse: raises Malformed for an answer to ask for again.

        Raises:
            UserError: the server refuses, or all attempts failed. Stopped: `stop` was set while waiting.
        """
        import httpx2

        failure = ""
        for attempt in range(1, self.patience.attempts + 1):
            self._sleep(self.pace.turn(tokens))
            asked = 0.0
            try:
                status, headers, data = self._send(path, body)
                if status == 200:
                    return parse(_json(data, headers.get("content-type", "")))
                failure = self._refusal(status, data)
                asked = self._retry_after(headers)
            except httpx2.RequestError as error:
                failure = f"{type(error).__name__}: {self._hidden(str(error))}".rstrip(": ")
            except Malformed as error:
                failure = self._hidden(str(error))
            if attempt < self.patience.attempts:
                if asked:
                    self.pace.delay(asked)
                self._sleep(max(asked, self.patience.wait_s(attempt)))
        raise UserError(
            f"{self.base_url} gave no answer in {self.patience.attempts} attempts (the last: {failure}); "
            "what was answered is kept, run the same command again to resume"
        )

    def _send(self, path: str, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        import httpx2

        watch, data = Stopwatch(), bytearray()
        with self._http.stream("POST", f"{self.base_url}/{path}", json=body) as response:
            for block in response.iter_bytes():
                data += block
                if watch.peek() > self.patience.timeout_s:  # the client's own limit is one of silence
                    raise httpx2.ReadTimeout(f"no whole answer in {self.patience.timeout_s:g} s")
            return response.status_code, response.headers, bytes(data)

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

    def _sleep(self, seconds: float) -> None:
        if self.stop.wait(max(0.0, seconds)) or self.stop.is_set():
            raise Stopped

    def _hidden(self, text: str) -> str:
        text = " ".join(text.split())
        return (text.replace(self._key, "…") if self._key else text)[:200]


def _json(data: bytes, content_type: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise Malformed(f"{len(data)} bytes of {content_type or 'no stated type'} that are not JSON") from error


def _error(data: bytes) -> tuple[str, str]:
    """(message, code) of an OpenAI-compatible error body; empty where it is another."""
    try:
        body = json.loads(data)
        error = body.get("error", body) if isinstance(body, dict) else {}
        error = error if isinstance(error, dict) else {"message": error}
        return str(error.get("message") or ""), str(error.get("code") or error.get("type") or "")
    except ValueError:
        return "", ""
