"""How far a cell's process is, told to the process that waits for it, through memory that both share.

Library. Whoever works says so with `stage` and `part`, which cost nothing where nobody watches; a process that wants to know makes a `Channel` before
it forks, and reads it. One channel a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SIZE = 4096
IN_A_LOG_S = 20.0
"""Between two lines of a bar that no terminal shows."""
_channel: Channel | None = None


@dataclass(frozen=True)
class Progress:
    """stage: train, validation, test, transfer/<set>, ... done: its share, from 0 to 1. past: the stages that ended. reason: why the process gave up.
    metric: of the last validation inside training."""

    stage: str = ""
    done: float = 0.0
    past: tuple[str, ...] = ()
    reason: str = ""
    metric: float | None = None

    def share(self, train_share: float) -> float:
        """Of a cell's work, what is done: training first, then validation (a tenth of the scoring) and test. train_share: of the work, training's."""
        score = 1 - train_share
        begun = {"": 0.0, "train": 0.0, "validation": train_share, "test": train_share + 0.1 * score}
        parts = {"": 0.0, "train": train_share, "validation": 0.1 * score, "test": 0.9 * score}
        return begun[self.stage] + parts[self.stage] * self.done if self.stage in parts else 1.0


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
        return Progress(held["stage"], held["done"], tuple(held["past"]), held["reason"], held["metric"])


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


class ScoringBar:
    """Draws what a watched process scores, with the time that is left, on standard error; its training has a bar of its own, which it draws itself.

    Args:
        shown: false: nothing is drawn.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._stage = ""
        self._bar: Any = None

    def show(self, progress: Progress | None) -> None:
        """Draw this state: a bar a stage, from its first answers on."""
        if not self._shown or progress is None:
            return
        if progress.stage != self._stage or progress.reason:
            self.close()
            self._stage = progress.stage
        if self._bar is None and progress.stage not in ("", "train") and 0 < progress.done < 1:
            self._bar = _threadless()(
                total=100, desc=f"score {progress.stage}", leave=False, mininterval=0.5 if sys.stderr.isatty() else IN_A_LOG_S,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
            )
        if self._bar is not None:
            self._bar.update(100 * progress.done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


HALF = 0.5
"""Of a cell's work, training's, where nothing is known of either."""


class CellsBar:
    """Draws one bar over all cells, those that run at once with how far each is, and the time that is left by what was done so far, on standard error.

    Args:
        count: of cells. shown: false: nothing is drawn.
    """

    def __init__(self, count: int, shown: bool) -> None:
        self._bar: Any = None
        if shown and count:
            self._bar = _threadless()(
                total=count, leave=False, mininterval=0.5 if sys.stderr.isatty() else IN_A_LOG_S, smoothing=0,
                bar_format="{percentage:3.0f}%|{bar:30}| {elapsed}<{remaining} {desc}", delay=1e-9,
            )

    def show(self, ended: int, running: Mapping[str, Progress | None]) -> None:
        """Draw this state: so many cells have ended, and these run, by their names."""
        if self._bar is None:
            return
        seen = {name: one or Progress() for name, one in running.items()}
        self._bar.set_description_str(", ".join(f"{name} {one.stage or 'begins'} {one.done:.0%}" for name, one in seen.items()), refresh=False)
        done = ended + sum(one.share(HALF) for one in seen.values())
        self._bar.update(max(0.0, done - self._bar.n))

    def hide(self) -> None:
        """Clear its line for something that is printed."""
        if self._bar is not None:
            self._bar.clear()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def fresh_line() -> str:
    """What begins a line of output where a bar may stand in it."""
    return "\r\x1b[K" if sys.stdout.isatty() and sys.stderr.isatty() else ""


def _own_locks() -> None:
    """Of a process that was forked: a lock of its own for tqdm's bars. tqdm shares the one that was there with the parent and all of its children, and a
    child that is killed while it draws has it for ever: the next bar of any of them would wait without end."""
    module = sys.modules.get("tqdm")
    if module is None:
        return
    bars, lock = [module.tqdm], threading.RLock()
    for bar in bars:
        bars += bar.__subclasses__()
        if bar is module.tqdm or "_lock" in vars(bar):
            bar.set_lock(lock)


os.register_at_fork(after_in_child=_own_locks)


def _threadless() -> Any:
    """tqdm's bar without the thread that looks after it: the process that draws goes on to fork."""
    from tqdm import tqdm

    return type("Bar", (tqdm,), {"monitor_interval": 0})


def stage(name: str) -> None:
    if _channel is not None:
        last = _channel.last
        _channel.write(Progress(name, 0.0, (*last.past, last.stage) if last.stage else last.past, metric=last.metric))


def part(done: float, total: float) -> None:
    """So much of the stage at hand is done."""
    if _channel is not None and total:
        last = _channel.last
        _channel.write(Progress(last.stage, min(1.0, done / total), last.past, metric=last.metric))


def validated(metric: float) -> None:
    if _channel is not None:
        _channel.write(dataclasses.replace(_channel.last, metric=metric))


def failed(reason: str) -> None:
    """The process gives up, in one sentence."""
    if _channel is not None:
        last = _channel.last
        _channel.write(Progress(last.stage, last.done, last.past, reason))
