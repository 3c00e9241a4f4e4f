"""How far a cell's process is, told to the process that waits for it, through memory that both share.

Library. Whoever works says so with `stage` and `part`, which cost nothing where nobody watches; a process that wants to know makes a `Channel` before
it forks, and reads it. One channel a process.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

SIZE = 4096
_channel: Channel | None = None


@dataclass(frozen=True)
class Progress:
    """stage: train, validation, test, transfer/<set>, ... done: its share, from 0 to 1. past: the stages that ended. reason: why the process gave up."""

    stage: str = ""
    done: float = 0.0
    past: tuple[str, ...] = ()
    reason: str = ""


class Channel:
    """Shared memory that one process writes and another reads."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, SIZE)
        self._last = Progress()

    def write(self, progress: Progress) -> None:
        self._last = progress
        said = json.dumps(vars(progress)).encode()
        if len(said) >= SIZE - 4:
            said = json.dumps({**vars(progress), "reason": progress.reason[: SIZE // 8]}).encode()
        self._memory[:4] = b"\0\0\0\0"
        self._memory[4 : 4 + len(said)] = said
        self._memory[:4] = len(said).to_bytes(4, "little")

    @property
    def last(self) -> Progress:
        """What this process wrote."""
        return self._last

    def read(self) -> Progress | None:
        """What was written; None before that, and while it is being written."""
        length = int.from_bytes(self._memory[:4], "little")
        if not length:
            return None
        try:
            held = json.loads(bytes(self._memory[4 : 4 + length]))
        except ValueError:  # caught in the middle of a write
            return None
        return Progress(held["stage"], held["done"], tuple(held["past"]), held["reason"])


@contextlib.contextmanager
def watched(channel: Channel) -> Iterator[Channel]:
    """What this process and those that it forks tell inside goes into the channel."""
    global _channel
    before, _channel = _channel, channel
    try:
        yield channel
    finally:
        _channel = before


def mute() -> None:
    """What this process does from now on is told nowhere: another one's progress stands for it."""
    global _channel
    _channel = None


def stage(name: str) -> None:
    """Another stage begins."""
    if _channel is not None:
        last = _channel.last
        _channel.write(Progress(name, 0.0, (*last.past, last.stage) if last.stage else last.past))


def part(done: float, total: float) -> None:
    """So much of the stage at hand is done."""
    if _channel is not None and total:
        last = _channel.last
        _channel.write(Progress(last.stage, min(1.0, done / total), last.past))


def failed(reason: str) -> None:
    """The process gives up, in one sentence."""
    if _channel is not None:
        last = _channel.last
        _channel.write(Progress(last.stage, last.done, last.past, reason))
