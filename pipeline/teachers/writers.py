"""A model that writes text for prompts, and the cache of its answers."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pipeline.core import locks
from pipeline.core.files import UserError
from pipeline.core.settings import AtLeast1, NotNegative, Within, check_fields

Messages = list[dict[str, str]]
"""[{"role": "system" | "user" | "assistant", "content": text}, …]"""


@dataclass
class Spent:
    """What the answers that a writer gave have cost, those from the cache too: each counts once, at what it cost when it was written.

    Tokens are null as soon as one answer's are not known.
    """

    answers: int = 0
    written: int = 0
    """Of these, written now."""
    cut: int = 0
    seconds: float = 0.0
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    keys: set[str] = field(default_factory=set, repr=False)

    def add(self, key: str, answer: Completion) -> None:
        if key in self.keys:
            return
        self.keys.add(key)
        self.answers += 1
        self.cut += answer.cut
        self.seconds += answer.seconds
        self.prompt_tokens = _sum(self.prompt_tokens, answer.prompt_tokens)
        self.completion_tokens = _sum(self.completion_tokens, answer.completion_tokens)


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Writes texts and keeps them. A subclass says what decides a text (`identity`) and how to get new ones (`_ask`).

    Args:
        cache: the folder of the answers.
        max_new_tokens: of one text.
        temperature: 0 takes the likeliest token (greedy); above 0 samples with `seed`.
        top_p: sampling keeps to the likeliest tokens of this share (Holtzman et al., 2020); 1: to all.
    """

    kind: ClassVar[str]
    cache: str
    max_new_tokens: AtLeast1
    temperature: NotNegative = 0.0
    top_p: Annotated[float, Within(0, 1, above=True)] = 1.0
    spent: Spent = field(default_factory=Spent, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, "writer")

    def check(self) -> None:
        """Raise UserError, naming what to change, if it cannot write: no such model, no key."""

    def identity(self) -> dict[str, Any]:
        """Who writes and how: what, beside messages and seed, decides a text. Has no secret in it."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """What a manifest says of the writer and of what its answers cost; null where it is not known."""
        spent = self.spent
        return {
            "kind": self.kind, **self.identity(), "answers": spent.answers, "cut": spent.cut, "seconds": round(spent.seconds, 3),
            "prompt_tokens": spent.prompt_tokens, "completion_tokens": spent.completion_tokens,
        }

    def write(self, prompts: Sequence[Messages], *, seed: int = 0) -> list[str]:
        """One text for each prompt, in order. seed: of sampling; greedy texts do not depend on it.

        Each answer is on the disk before the next is waited for: after an interruption the same call asks for the missing ones only.

        Raises:
            UserError: it cannot write, or a prompt is too long.
        """
        from tqdm import tqdm

        who = self.identity() | ({"seed": seed} if self.temperature > 0 else {})
        keys = [digest([who, messages]) for messages in prompts]
        with Cache.open(Path(self.cache) / f"{self.kind}-{digest(self.identity())[:12]}.jsonl") as cache:
            missing = {key: messages for key, messages in zip(keys, prompts, strict=True) if key not in cache}
            if missing:
                with tqdm(total=len(missing), desc=f"{self.kind} writer", unit="text", disable=None, leave=False) as bar:

                    def keep(key: str, answer: Completion) -> None:
                        cache.add(key, answer)
                        self.spent.written += 1
                        bar.update()

                    self._ask(missing, seed, keep)
            for key in keys:
                self.spent.add(key, cache[key])
            return [cache[key].text for key in keys]

    def _ask(self, prompts: dict[str, Messages], seed: int, keep: Callable[[str, Completion], None]) -> None:
        """Write a text for each of these, by key, and `keep` each as soon as it is there."""
        raise NotImplementedError


def as_text(messages: Messages, separator: str) -> str:
    """The turns as plain text for a model without a chat template: a reply follows what it answers after a blank, any other turn after `separator`."""
    parts = [(" " if m["role"] == "assistant" else separator) + m["content"] for m in messages]
    return "".join(parts).removeprefix(separator)


def _sum(total: int | None, more: int | None) -> int | None:
    return None if total is None or more is None else total + more


@dataclass(frozen=True)
class Completion:
    """A written text and what it cost.

    seconds: its share of the wall clock of the run that wrote it. Tokens: null where they were not reported. cut: whether max_new_tokens ended the text.
    """

    text: str
    seconds: float
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cut: bool = False

    def __post_init__(self) -> None:
        """Raises TypeError for a field of another type: a cache may have been written by anybody."""
        tokens = (self.prompt_tokens, self.completion_tokens)
        if not isinstance(self.text, str) or type(self.seconds) not in (int, float) or {*map(type, tokens)} - {int, type(None)} or type(self.cut) is not bool:
            raise TypeError(f"no answer: {self}")


def digest(value: Any) -> str:
    """sha256 of a JSON value, the order of its keys set aside."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Cache:
    """A file of answers, read when it is opened; `add` may be called from several threads."""

    def __init__(self, path: Path, answers: dict[str, Completion], out: int) -> None:
        self.path, self._answers, self._out, self._lock = path, answers, out, threading.Lock()

    @classmethod
    @contextmanager
    def open(cls, path: str | Path) -> Iterator[Self]:
        """The cache at `path`, made if it is not there. Another process that has it open is waited for, so that nothing is asked twice.

        Raises:
            UserError: the place cannot be written.
        """
        path = Path(path)
        with locks.waited(path.with_suffix(".lock"), f"waiting for {{holder}}, which writes to {path}", wait_s=1):
            with _refusals(path):
                out = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                with _refusals(path):
                    answers = _read(path)
                    if not _ends_with_newline(path):
                        os.write(out, b"\n")
                yield cls(path, answers, out)
            finally:
                os.close(out)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Completion:
        return self._answers[key]

    def add(self, key: str, answer: Completion) -> None:
        """Keep an answer; it is on the disk when this returns."""
        line = json.dumps({"key": key, **asdict(answer)}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock, _refusals(self.path):
            os.write(self._out, line)
            os.fsync(self._out)
            self._answers[key] = answer


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turns an OSError into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or fix the path, then run again") from error


def _read(path: Path) -> dict[str, Completion]:
    answers, bad = {}, []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            if line:
                answer = json.loads(line)
                key = str(answer.pop("key"))
                answers[key] = Completion(**answer)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            bad.append(number)
    if bad:
        print(f"warning: {path} has {len(bad)} damaged lines (the first: line {bad[0]}); what they held is asked for again", file=sys.stderr)
    return answers


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as data:
        size = data.seek(0, os.SEEK_END)
        if not size:
            return True
        data.seek(-1, os.SEEK_END)
        return data.read(1) == b"\n"
