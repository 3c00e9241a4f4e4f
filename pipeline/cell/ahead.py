"""The checks of preflight in processes of their own, side by side, while the first cells load and wait at the gate (measure/turns.py).

Library of pipeline/cell/grid.py and pool.py. One process checks one technique, or several where there are fewer places than techniques.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig

from pipeline.cell import preflight
from pipeline.cell.child import Child, handed_on, pause
from pipeline.cell.inputs import Shared, rounds_nothing
from pipeline.cell.room import AtOnce
from pipeline.core.imports import import_peft
from pipeline.measure.clock import Stopwatch
from pipeline.measure.turns import Gate
from pipeline.records.finished import name as cell_name

Groups = Sequence[Sequence[DictConfig]]
"""Cells that the same checks are for."""


class Checks:
    """Checks under way. As a context: those that still run at its end are ended.

    Args:
        cells: the missing ones; what has passed for some before is not checked again.
        at_once: how many cells may be under way, and what each needs of the device.
    """

    def __init__(self, cells: Sequence[DictConfig], shared: Shared, at_once: AtOnce) -> None:
        groups = preflight.unchecked(cells)
        self._watch, self._count, self._parts = Stopwatch(), len(groups), dealt(groups, at_once)
        self._needs = [_need(part, at_once) for part in self._parts]
        self._said: list[IO[str]] = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in self._parts]  # noqa: SIM115 (they go with this)
        threads = max(1, (shared.threads or 1) // max(1, len(self._parts)))
        self.children = [Child(functools.partial(_look, part, shared, threads, said)) for part, said in zip(self._parts, self._said, strict=True)]
        self._code: int | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="gate-")
        self.gate = Gate(Path(self._folder.name) / "checks")
        """Opens when all have passed."""

    def __enter__(self) -> Checks:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.send(15)
        while not self._through():
            pause()
        self._folder.cleanup()

    def poll(self) -> int | None:
        """0: all have passed; another code: not, which was printed, or a signal ended them; None: they run."""
        if self._code is None and self._through():
            self._code = self._outcome()
            if self._code == 0:
                self.gate.open()
        return self._code

    def wait(self) -> int:
        """The same once they are through."""
        with handed_on(lambda: self.children):
            while (code := self.poll()) is None:
                pause()
        return code

    def _through(self) -> bool:
        return all(child.poll() for child in self.children)

    def needs(self) -> list[int | None]:
        """Bytes of the device that each process which still runs may take; None: nothing is known."""
        return [need for child, need in zip(self.children, self._needs, strict=True) if child.poll() is None]

    def _outcome(self) -> int:
        if not self._count:
            return 0
        codes = [child.outcome.code for child in self.children if child.outcome]
        if any(codes):
            return max(codes)
        failed: dict[int, list[str]] = {}
        for start, said in enumerate(self._said):
            said.seek(0)
            failed |= {start + i * len(self._parts): lines for i, lines in enumerate(json.load(said))}
        return preflight.told(self._count, self._watch.lap(), [line for _, lines in sorted(failed.items()) for line in lines])


def _look(groups: Groups, shared: Shared, threads: int, said: IO[str]) -> int:
    """The work of one process; `said` takes what failed, group by group."""
    import torch

    torch.set_num_threads(threads)
    if rounds_nothing(groups[0][0]):
        import_peft()
    json.dump(list(preflight.look(groups, shared)), said)
    said.flush()
    return 0


def dealt(groups: Groups, at_once: AtOnce) -> list[Groups]:
    """The groups in as many parts as there are places, dealt in turn; in fewer where the device is small, but one for each cell under way."""
    for count in range(min(len(groups), at_once.places), 0, -1):
        parts = [groups[start::count] for start in range(count)]
        if count <= at_once.cells or at_once.holds([_need(part, at_once) for part in parts]):
            return parts
    return []


def _need(groups: Groups, at_once: AtOnce) -> int | None:
    """A check takes no more than a cell does."""
    needs: list[Any] = [at_once.needs.get(cell_name(group[0])) for group in groups]
    return None if None in needs else max(needs)
