"""Cells under way at once on one machine: what is timed has the device to itself, the rest of a cell runs beside others' (measure/turns.py).

Library of pipeline/cell/grid.py. With one at a time, which is what a CPU does, a cell begins when the one before it has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell import identity, locks
from pipeline.cell.child import CellRun, Child, Watcher, handed_on, pause
from pipeline.cell.inputs import Shared
from pipeline.cell.launch import INTERRUPTED
from pipeline.core.files import discard
from pipeline.core.progress import CellsBar
from pipeline.measure.clock import now
from pipeline.records.finished import name as cell_name
from pipeline.records.finished import read_or_name


@dataclass(frozen=True)
class AtOnce:
    """How many cells may be under way at once."""

    cells: int = 1
    needs: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the device that a cell will take, by its name, as the forecast says; a cell that is not there has the device alone."""
    room: int | None = None
    """Bytes that they may take together; None: as many cells as `cells` says."""


def take_back(cfg: DictConfig) -> bool:
    """Whether a cell that others ran beside has a result that says it ran out of memory, which is removed then: it says so of a crowded device."""
    path = identity.folder_of(cfg) / "result.json"
    result: Any = read_or_name(path)
    if result is None or result.status != "oom":
        return False
    discard(path)
    return True


@dataclass
class UnderWay:
    """A cell that runs. crowded: whether another one ran beside it at any time."""

    cfg: DictConfig
    run: CellRun
    held: contextlib.ExitStack
    crowded: bool


class Pool:
    """Runs cells in children of this process.

    Args:
        is_done: whether a cell has its result.
        ended: is told of each cell whose result is there.
        shown: whether a bar over all of them is drawn; the cells' own are for their configs to leave out.
    """

    def __init__(self, missing: Sequence[DictConfig], shared: Shared, watcher: Watcher, at_once: AtOnce, is_done: Callable[[DictConfig], bool],
                 ended: Callable[[DictConfig], None], shown: bool = False) -> None:
        self.waiting = list(enumerate(missing, 1))
        self.count, self.shared, self.watcher, self.at_once, self.is_done, self.ended = len(missing), shared, watcher, at_once, is_done, ended
        self.running: list[UnderWay] = []
        self.elsewhere: list[DictConfig] = []
        """Cells that another process computes, and those that read them."""
        self.alone = {cell_name(cfg) for cfg in missing if cfg.train.parallel != "none"}
        """Names of cells with nobody beside them: those of several GPUs, and those that ran out of memory beside others and are run again."""
        self.code = 0
        self.bar = CellsBar(len(missing), shown)
        self._reads: dict[str, set[Path]] = {}

    def run(self) -> int:
        """Run all but those that another process computes (`elsewhere`). The highest exit code; INTERRUPTED: ended by a signal, some did not begin.

        Raises:
            Ended: a cell was ended by a signal; the others are ended, too.
        """
        try:
            with handed_on(self._children):
                while self.waiting and self.code != INTERRUPTED or self.running:
                    if not (self._begin_next() or self._end_those_through()):
                        self.bar.show(self.count - len(self.waiting) - len(self.running), {cell_name(o.cfg): o.run.channel.read() for o in self.running})
                        pause()
        finally:
            self.bar.close()
            self._end_all()
        return self.code

    def _children(self) -> list[Child]:
        return [one.run.child for one in self.running]

    def _end_all(self) -> None:
        for child in self._children():
            child.send(15)
        while not all(child.poll() for child in self._children()):
            pause()
        for one in self.running:
            one.held.close()

    def _begin_next(self) -> bool:
        """Begin the first cell that may; whether one has."""
        if self.code == INTERRUPTED or (self.running and len(self.running) >= self.at_once.cells):
            return False
        for place, (number, cfg) in enumerate(self.waiting):
            if not self._fits(cfg) or self._awaits(cfg, [*(one.cfg for one in self.running), *(c for _, c in self.waiting[:place])]):
                continue
            del self.waiting[place]
            self._begin(number, cfg)
            return True
        return False

    def _fits(self, cfg: DictConfig) -> bool:
        """Whether a cell may begin beside those that run."""
        if not self.running:
            return True
        names = [cell_name(one.cfg) for one in self.running]
        if len(names) >= self.at_once.cells or self.alone & {*names, cell_name(cfg)}:
            return False
        needs = [self.at_once.needs.get(name) for name in (*names, cell_name(cfg))]
        return self.at_once.room is None or sum(need if need is not None else self.at_once.room for need in needs) <= self.at_once.room

    def _awaits(self, cfg: DictConfig, others: Sequence[DictConfig]) -> bool:
        """Whether a cell reads one of the others, such as the one it begins at, which is not finished yet."""
        if not others:
            return False
        name = str(identity.folder_of(cfg))
        if name not in self._reads:
            self._reads[name] = {path.parent for path in identity.reads(cfg)}
        return not self._reads[name].isdisjoint(identity.folder_of(other) for other in others)

    def _begin(self, number: int, cfg: DictConfig) -> None:
        with contextlib.ExitStack() as stack:
            members = [] if self._awaits(cfg, self.elsewhere) else stack.enter_context(locks.free([cfg]))
            if not members:
                self.elsewhere.append(cfg)
                return
            if self.is_done(cfg) or self.watcher.passes(cfg):
                return
            self.bar.hide()
            self.watcher.begins(cfg, number, self.count)
            shared = self.shared
            if cell_name(cfg) in self.alone:
                shared = dataclasses.replace(shared, at_once=1, turns=None)
            run = CellRun(cfg, shared, now(), self.watcher)
            for one in self.running:
                one.crowded = True
            self.running.append(UnderWay(cfg, run, stack.pop_all(), bool(self.running)))

    def _end_those_through(self) -> bool:
        """Take in those that have ended; whether one has."""
        through = False
        for one in list(self.running):
            code = self._ended(one)
            if code is None:
                continue
            through = True
            self.code = INTERRUPTED if INTERRUPTED in (code, self.code) else max(code, self.code)
        return through

    def _ended(self, one: UnderWay) -> int | None:
        """The exit code of a cell that is through; None: it runs."""
        try:
            code = one.run.poll()
        except BaseException:
            self._release(one)
            raise
        if code is None:
            return None
        self.bar.hide()
        if code == 0 and one.crowded and not one.cfg.share and take_back(one.cfg):
            self.alone.add(cell_name(one.cfg))
            self.waiting.append((self.count, one.cfg))
            print(f"{cell_name(one.cfg)} ran out of memory beside other cells, and is run again by itself", flush=True)
        elif code == 0:
            self.ended(one.cfg)
        self._release(one)
        return code

    def _release(self, one: UnderWay) -> None:
        self.running.remove(one)
        one.held.close()
