"""Answers that were written once, kept by content: one JSON line each in a file that only grows.

Library. A line is whole before the next answer is waited for, so an interrupted run goes on where it stood; a last line
that was cut off is passed over and its answer asked for again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pipeline.files import UserError


@dataclass(frozen=True)
class Answer:
    """A written text and what it cost.

    seconds: its share of the wall clock of the run that wrote it. Tokens: null where they were not told. cut: the room ended before the text did.
    """

    text: str
    seconds: float
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cut: bool = False


def digest(value: Any) -> str:
    """sha256 of a JSON value, the order of its keys set aside."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Cache:
    """A file of answers, read when it is opened; `add` may be called from several threads."""

    def __init__(self, path: Path, held: dict[str, Answer], out: int) -> None:
        self.path, self._held, self._out, self._lock = path, held, out, threading.Lock()

    @classmethod
    @contextmanager
    def open(cls, path: str | Path) -> Iterator[Self]:
        """The cache at `path`, made if it is not there. Another process that has it open is waited for, so that nothing is asked twice.

        Raises:
            UserError: the place cannot be written.
        """
        from filelock import FileLock, Timeout

        path = Path(path)
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            try:
                lock.acquire(timeout=1)
            except Timeout:
                print(f"waiting for another run that writes to {path}", file=sys.stderr)
                lock.acquire()
        try:
            with _told(path):
                out = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                with _told(path):
                    held = _read(path)
                    if not _ends_whole(path):
                        os.write(out, b"\n")
                yield cls(path, held, out)
            finally:
                os.close(out)
        finally:
            lock.release()

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def __getitem__(self, key: str) -> Answer:
        return self._held[key]

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer; it is on the disk when this returns."""
        line = json.dumps({"key": key, **asdict(answer)}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock, _told(self.path):
            os.write(self._out, line)
            os.fsync(self._out)
            self._held[key] = answer


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or mend the path, then run again") from error


def _read(path: Path) -> dict[str, Answer]:
    held = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            found = json.loads(line)
            key = found.pop("key")
            held[key] = Answer(**found)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # cut off, or written by another version: asked for again
    return held


def _ends_whole(path: Path) -> bool:
    with open(path, "rb") as data:
        size = data.seek(0, os.SEEK_END)
        if not size:
            return True
        data.seek(-1, os.SEEK_END)
        return data.read(1) == b"\n"
