"""SIGTERM and SIGINT while something is under way: the one place that replaces their handlers and puts them back.

Library. A process that is forked inside has the handlers of its parent until it calls `restore`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

BOTH = (signal.SIGTERM, signal.SIGINT)
_replaced: list[dict[signal.Signals, Any]] = []
"""The handlers of before, the outermost first."""


@contextlib.contextmanager
def handled(handle: Callable[[int], object]) -> Iterator[None]:
    """Both signals call `handle` with their number; outside the main thread, where Python has no handlers, they do not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _replaced.append({s: signal.signal(s, lambda number, _: handle(number)) for s in BOTH})
    try:
        yield
    finally:
        _undo()


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Both signals wait inside, in a child that is forked there until it calls `restore`: none of its parent's handlers runs in it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BOTH)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def restore() -> None:
    """Put back the handlers from before the outermost `handled`, and let what was held back come."""
    while _replaced:
        _undo()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BOTH)


def _undo() -> None:
    for number, handler in _replaced.pop().items():
        signal.signal(number, handler)
