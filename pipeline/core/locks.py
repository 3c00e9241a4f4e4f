"""Locks between processes: a file that names its holder, and a hold that the kernel ends with the process, however that ends.

Library. The files stay where they are; their text is valid only while a process has the lock.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.files import UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock

POLL_S = 0.02
SAY_S = 5
"""Who waits longer than this says what for."""
PATIENCE_S = 600
"""A queue that has not moved for so long is stuck."""
FOREVER = -1

_announced: set[Path] = set()


class Busy(UserError):
    """Another process holds a lock."""


@contextlib.contextmanager
def held(path: Path, wait_s: float = 0) -> Iterator[None]:
    """Hold the lock at `path`; another process is waited for wait_s seconds (FOREVER: until it ends).

    Raises:
        Busy: another process holds it. UserError: the place cannot be written.
    """
    try:
        lock = _acquire(path, wait_s)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or fix the path, then run again") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def waited(path: Path, waiting: str, wait_s: float = 0) -> Iterator[None]:
    """Hold the lock at `path` once another process has let go of it or ended, however long that takes.

    Args:
        waiting: printed where that takes longer than wait_s seconds; {holder} in it becomes who that is.

    Raises:
        UserError: the place cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(path, wait_s))
        except Busy:
            print(waiting.replace("{holder}", holder(path)), flush=True)
            stack.enter_context(held(path, FOREVER))
        yield


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold the lock at `path`; nobody gets it twice in a row while somebody else waits, however many take it over and over.

    A wait has no limit as long as the lock changes hands; the first is reported on stderr.

    Raises:
        Busy: one process has held it for PATIENCE_S. OSError: the place cannot be written.
    """
    first_in_line = _patiently(path.with_name(f"{path.stem}.queue.lock"), path)
    try:
        lock = _patiently(path, path)
    finally:
        first_in_line.release()
    try:
        yield
    finally:
        lock.release()


def holder(path: Path) -> str:
    """Who holds the lock, in words: process 123."""
    try:
        return f"process {int(path.read_text(encoding='utf-8').split()[0])}"
    except (OSError, ValueError, IndexError):  # it has been taken this moment
        return "another process"


def _acquire(path: Path, wait_s: float) -> BaseFileLock:
    from filelock import FileLock, SoftFileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait_s, poll_interval=POLL_S)
    except Timeout as error:
        raise Busy(f"{holder(path)} holds the lock {path}; wait for it, or end it, then run again") from error
    if not isinstance(lock, SoftFileLock):  # where the file system has no locks, the file is one, and says who holds it
        with contextlib.suppress(OSError):  # a full disk leaves it without a name
            path.write_text(f"{os.getpid()}\n", encoding="utf-8")
    return lock


def _patiently(path: Path, queue_for: Path) -> BaseFileLock:
    """Acquire the lock at `path`, and wait as long as the one that all queue for goes from hand to hand."""
    wait_s: float = SAY_S
    while True:
        before = _last_taken(queue_for)
        try:
            return _acquire(path, wait_s)
        except Busy as error:
            if wait_s == SAY_S:
                wait_s = PATIENCE_S
                if queue_for not in _announced:
                    print(f"waiting for the lock {queue_for}, which {holder(queue_for)} holds", file=sys.stderr, flush=True)
                    _announced.add(queue_for)
            elif _last_taken(queue_for) == before:
                raise Busy(f"{holder(queue_for)} has held the lock {queue_for} for {PATIENCE_S} s; wait for it, or end it, then run again") from error


def _last_taken(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
