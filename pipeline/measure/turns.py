"""A device that several processes share: work that is timed has it alone, other work runs beside other such work.

Library of `pipeline.cells`, which has several cells under way at once. Two files are locked with flock, which the kernel ends with the process that
holds it: `device` (shared by who works beside others, exclusive to who is timed) and `next` (held by who waits to be alone, so that nobody comes in
before it). Where nobody shares the device (`join` was not called) all of it costs nothing. A third one is the gate that cells wait at, loaded, until
the checks of all have passed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.measure.clock import marked, synchronise

FILES = ("device", "next")


class Turns:
    """This process's part in sharing a device. The device is waited for (its queue is empty) before another process is let in.

    Args:
        folder: where the two files are, the same for all that share the device.
    """

    def __init__(self, folder: Path, device: Any) -> None:
        self.device = device
        self.waited_s = 0.0
        """Seconds spent waiting for others, since `join`."""
        self.alone_s = self._since = 0.0
        """Seconds for which this process had the device alone; when that last began."""
        self._device, self._next = (os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC) for name in FILES)
        self._here = self._is_alone = False
        self._queued: Any = None
        """What the device had been given to do at the last point."""

    def beside(self) -> None:
        """Begin to use the device, beside others that are not timed."""
        if not self._here:
            with self._waiting(), self._in_line():
                fcntl.flock(self._device, fcntl.LOCK_SH)
            self._here = True

    def leave(self) -> None:
        """Let others have the device alone."""
        if self._here:
            synchronise(self.device)
            fcntl.flock(self._device, fcntl.LOCK_UN)
            self._here = False

    def point(self) -> None:
        """Let who waits to be alone go first: to be called often where nothing is timed. The device is no further behind than one point."""
        if not self._here or self._is_alone:
            return
        before, self._queued = self._queued, marked(self.device)
        if before is not None:
            before.synchronize()
        if self._wanted():
            self.leave()
            self.beside()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Have the device alone inside."""
        if self._is_alone:
            yield
            return
        before = self._here
        self._take()
        try:
            yield
        finally:
            if self._is_alone:
                self._give()
            if before:
                self.beside()
            else:
                self.leave()

    @contextlib.contextmanager
    def between(self, again: bool = True) -> Iterator[None]:
        """Within `alone`, work that is not timed: beside others inside, who may have the device alone meanwhile; alone again after it, unless nothing
        that is timed is left (`again`)."""
        if not self._is_alone:
            yield
            return
        self._give()
        self.beside()
        try:
            yield
        finally:
            if again:
                self._take()

    def _take(self) -> None:
        self.leave()
        with self._waiting(), self._in_line():
            fcntl.flock(self._device, fcntl.LOCK_EX)
        self._here = self._is_alone = True
        self._since = time.perf_counter()

    def _give(self) -> None:
        self._is_alone = False
        self.leave()
        self.alone_s += time.perf_counter() - self._since

    @contextlib.contextmanager
    def away(self, waiting: bool = False) -> Iterator[None]:
        """Be without the device inside: for work of the processor alone, or, `waiting`, as one must be who waits for another process."""
        if self._is_alone or not self._here:
            yield
            return
        self.leave()
        with self._waiting() if waiting else contextlib.nullcontext():
            yield
        self.beside()

    def _wanted(self) -> bool:
        """Whether somebody is in line."""
        try:
            fcntl.flock(self._next, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._next, fcntl.LOCK_UN)
        return False

    @contextlib.contextmanager
    def _in_line(self) -> Iterator[None]:
        fcntl.flock(self._next, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._next, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        at = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - at


class Gate:
    """A file that is locked until what must come first is through; others wait at it in `passed`. It opens by itself when the process ends.

    Args:
        path: a file that nobody else uses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def open(self) -> None:
        """Let through all that wait, and all that come."""
        fcntl.flock(self._file, fcntl.LOCK_UN)


_turns: Turns | None = None
_beside = False
_gate: Path | None = None
_gate_s = 0.0


def join(folder: Path | None, device: Any) -> None:
    """This process shares the device from now on. folder: None where they take no turns."""
    global _turns, _beside
    _turns, _beside = None if folder is None else Turns(folder, device), True


def leave() -> None:
    """Share nothing any more."""
    global _turns, _beside
    if _turns is not None:
        _turns.leave()
    _turns, _beside = None, False


def shared() -> bool:
    """Whether other processes work beside this one."""
    return _beside


def crowded() -> bool:
    """Whether they do so on the device even while something is timed."""
    return _beside and _turns is None


def waited_s() -> float:
    """Seconds that this process has waited for others."""
    return _gate_s + (_turns.waited_s if _turns is not None else 0.0)


def alone_s() -> float:
    """Seconds for which this process has had the device alone."""
    return _turns.alone_s if _turns is not None else 0.0


@contextlib.contextmanager
def behind(gate: Path | None) -> Iterator[None]:
    """This process does not go on beyond `passed` before that gate opens, nor does an error leave it; None: there is no gate."""
    global _gate
    _gate = gate
    try:
        yield
    except Exception:
        passed()
        raise
    finally:
        _gate = None


def passed() -> None:
    """Wait until the gate is open."""
    global _gate, _gate_s
    if _gate is None:
        return
    with away():
        at, file = time.perf_counter(), os.open(_gate, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        finally:
            os.close(file)
        _gate, waited = None, time.perf_counter() - at
        _gate_s += waited


def beside() -> None:
    """Begin to use the device."""
    if _turns is not None:
        _turns.beside()


def point() -> None:
    """Let who waits to be timed go first."""
    if _turns is not None:
        _turns.point()


def alone() -> contextlib.AbstractContextManager[None]:
    """Have the device alone inside: for what is timed."""
    return _turns.alone() if _turns is not None else contextlib.nullcontext()


def between(again: bool = True) -> contextlib.AbstractContextManager[None]:
    """Work inside `alone` that is not timed, beside others; again: whether something that is timed comes after it."""
    return _turns.between(again) if _turns is not None else contextlib.nullcontext()


def away(waiting: bool = False) -> contextlib.AbstractContextManager[None]:
    """Be without the device inside."""
    return _turns.away(waiting) if _turns is not None else contextlib.nullcontext()
