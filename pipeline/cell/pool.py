"""Cells under way at once on one machine: what is timed has the device to itself, the rest of a cell runs beside others' (measure/turns.py).

Library of pipeline/cell/grid.py. With one at a time, which is what a CPU does, a cell begins when the one before it has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell import identity, locks
from pipeline.cell.ahead import Checks
from pipeline.cell.child import CellRun, Child, Watcher, handed_on, pause
from pipeline.cell.inputs import Shared
from pipeline.cell.launch import INTERRUPTED
from pipeline.cell.room import AtOnce
from pipeline.core.files import discard
from pipeline.core.progress import CellsBar
from pipeline.measure.clock import now
from pipeline.records.finished import name as cell_name
from pipeline.records.finished import read_or_name


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
    """A cell that runs. number: which of them it is. crowded: whether another one, or a check, ran beside it at any time."""

    cfg: DictConfig
    number: int
    run: CellRun
    held: contextlib.ExitStack
    crowded: bool


class Pool:
    """Runs cells in children of this process.

    Args:
        is_done: whether a cell has its result.
        ended: is told of each cell whose result is there.
        shown: whether a bar over all of them is drawn; the cells' own are for their configs to leave out.
        checks: those of the cells that may still run. Cells load beside them and wait at `shared.gate`, of which nobody is told before it opens.
    """

    def __init__(self, missing: Sequence[DictConfig], shared: Shared, watcher: Watcher, at_once: AtOnce, is_done: Callable[[DictConfig], bool],
                 ended: Callable[[DictConfig], None], shown: bool = False, checks: Checks | None = None) -> None:
        self.waiting = list(enumerate(missing, 1))
        self.count, self.shared, self.watcher, self.at_once, self.is_done, self.ended = len(missing), shared, watcher, at_once, is_done, ended
        self.running: list[UnderWay] = []
        self.elsewhere: list[DictConfig] = []
        """Cells that another process computes, and those that read them."""
        self.alone = {cell_name(cfg) for cfg in missing if cfg.train.parallel != "none"}
        """Names of cells with nobody beside them: those of several GPUs, and those that ran out of memory beside others and are run again."""
        self.code = 0
        self.bar = CellsBar(len(missing), shown)
        self.checks = checks
        """None once they have passed."""
        self._reads: dict[str, set[Path]] = {}

    def run(self) -> int:
        """Run all but those that another process computes (`elsewhere`). The highest exit code; INTERRUPTED: ended by a signal, some did not begin.

        Where a check fails, its code, and no cell goes on.

        Raises:
            Ended: a cell was ended by a signal; the others are ended, too.
        """
        try:
            with handed_on(self._children):
                while self.waiting and self.code != INTERRUPTED or self.running or self.checks:
                    if self.checks and (code := self._checked(self.checks)):
                        return code
                    if not (self._begin_next() or self._end_those_through()):
                        if not self.checks:
                            self._show()
                        pause()
        finally:
            self.bar.close()
            self._end_all()
        return self.code

    def _checked(self, checks: Checks) -> int | None:
        """The checks' code. When all have passed the gate is open, and who watches is told of the cells that were behind it."""
        code = checks.poll()
        if code == 0:
            self.checks = None
            for one in self.running:
                self._tell(one.cfg, one.number)
        return code

    def _tell(self, cfg: DictConfig, number: int) -> None:
        self.bar.hide()
        self.watcher.begins(cfg, number, self.count)

    def _show(self) -> None:
        self.bar.show(self.count - len(self.waiting) - len(self.running), {cell_name(o.cfg): o.run.channel.read() for o in self.running})

    def _children(self) -> list[Child]:
        return [*(one.run.child for one in self.running), *(self.checks.children if self.checks else ())]

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
        checks = self.checks.needs() if self.checks else []
        if not self.running and not checks:
            return True
        names = [cell_name(one.cfg) for one in self.running]
        if len(names) >= self.at_once.cells or len(names) + len(checks) >= self.at_once.places or self.alone & {*names, cell_name(cfg)}:
            return False
        return self.at_once.holds([*(self.at_once.needs.get(name) for name in (*names, cell_name(cfg))), *checks])

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
            if not self.checks:
                self._tell(cfg, number)
            shared = self.shared
            if cell_name(cfg) in self.alone:
                shared = dataclasses.replace(shared, at_once=1, turns=None)
            run = CellRun(cfg, shared, now(), self.watcher)
            for one in self.running:
                one.crowded = True
            self.running.append(UnderWay(cfg, number, run, stack.pop_all(), bool(self.running or self.checks)))

    def _end_those_through(self) -> bool:
        """Take in those that have ended; whether one has. None does before the checks are through."""
        if self.checks:
            for one in self.running:
                one.run.child.poll()  # which holds it to its limits
            return False
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
