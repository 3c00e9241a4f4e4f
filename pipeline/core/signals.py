"""SIGTERM and SIGINT while something is under way: the one place that replaces their handlers and puts them back.

Library. A process that is forked inside has the handlers of its parent until it calls `restore`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_replaced: list[dict[signal.Signals, Any]] = []
"""The handlers of before, the outermost first."""


@contextlib.contextmanager
def handled(handle: Callable[[int], object]) -> Iterator[None]:
    """Both signals call `handle` with their number; outside the main thread, where Python has no handlers, they do not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _replaced.append({s: signal.signal(s, lambda number, _: handle(number)) for s in (signal.SIGTERM, signal.SIGINT)})
    try:
        yield
    finally:
        _undo()


def restore() -> None:
    """Put back the handlers from before the outermost `handled`."""
    while _replaced:
        _undo()


def _undo() -> None:
    for number, handler in _replaced.pop().items():
        signal.signal(number, handler)
