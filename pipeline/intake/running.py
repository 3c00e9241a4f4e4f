"""The comparison as it runs: one bar over all cells with the time that is left, scoring included, and a table that grows.

Library of `alignscope try`. A terminal shows both; elsewhere a line is printed as each cell ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell import identity
from pipeline.cell.child import Watcher
from pipeline.core.progress import Progress
from pipeline.forecasting.whole import Whole
from pipeline.intake.planning import START_S, duration
from pipeline.measure.clock import Stopwatch
from pipeline.records.finished import read_or_name
from pipeline.records.results import Result
from pipeline.scoring.answers import headline


@dataclasses.dataclass
class Row:
    """A cell in the table. state: waits, runs, done, failed, left out."""

    technique: str
    expected_s: float
    train_share: float
    """Of the expected seconds, training's."""
    state: str = "waits"
    result: Result | None = None
    reason: str = ""
    seconds: float = 0.0

    @property
    def cells(self) -> list[str]:
        """[technique, test metric, 95% interval, training, scoring, memory, remark]."""
        if self.result is None or self.result.test is None or self.result.phases is None:
            reason = self.reason or (self.result.error if self.result else None) or ""
            return [self.technique, "", "", "", "", "", f"{self.state}{f': {reason}' if reason else ''}"]
        test, phases, memory = self.result.test, self.result.phases, self.result.memory
        value = headline(test, self.result.metric)
        bounds = test.interval(self.result.metric)
        shown = f"{100 * bounds[0]:.0f} to {100 * bounds[1]:.0f}" if bounds else ""
        size = f"{memory.peak_bytes / 2**30:.1f} GiB" if memory and memory.peak_bytes else ""
        return [self.technique, f"{100 * value:.1f}", shown, duration(phases.train_s), duration(phases.evaluate_s + phases.validate_s), size, ""]


REDRAW_S = 0.25
"""Seconds between two pictures of what runs."""
HEAD = ["technique", "test, %", "95%", "training", "scoring", "memory", ""]


class Watch(Watcher):
    """Draws the comparison, and passes over cells for which the time does not suffice any more.

    Args:
        cells: their configs, in order. costs: what the plan said of each technique.
        limit_s: seconds that all may take; None: no limit.
        console: rich's.
    """

    def __init__(self, cells: Sequence[DictConfig], costs: Mapping[str, Whole], log: Path, console: Any, limit_s: float | None = None) -> None:
        self.rows = {self._key(cfg): _row(cfg, costs.get(cfg.technique.name)) for cfg in cells}
        self.log, self.console, self.limit_s = log, console, limit_s
        self.watch, self.cell, self.drawn = Stopwatch(), Stopwatch(), Stopwatch()
        self.current: Row | None = None
        self.done = 0.0
        self.live: Any = None
        for cfg in cells:
            self._finish(cfg)

    @staticmethod
    def _key(cfg: DictConfig) -> str:
        return str(identity.folder_of(cfg))

    def _finish(self, cfg: DictConfig) -> None:
        row, result = self.rows[self._key(cfg)], read_or_name(identity.folder_of(cfg) / "result.json")
        if result is not None:
            row.state, row.result = "done" if result.status == "ok" else result.status, result

    def __enter__(self) -> Watch:
        if self.console.is_terminal:
            from rich.live import Live

            self.live = Live(self.picture(), console=self.console, auto_refresh=False, transient=True)  # a thread of its own would be forked with every cell
            self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.__exit__(*error)
            self.live = None

    def begins(self, cfg: DictConfig, number: int, count: int) -> None:
        self.current = self.rows[self._key(cfg)]
        self.current.state, self.done = "runs", 0.0
        self.cell.lap()
        self._draw()

    def runs(self, progress: Progress | None) -> None:
        if self.current is not None and progress is not None:
            self.done = progress.share(self.current.train_share)
        if self.drawn.peek() >= REDRAW_S:
            self._draw()

    def ends(self, cfg: DictConfig, code: int, reason: str) -> None:
        row = self.rows[self._key(cfg)]
        row.seconds = self.cell.lap()
        if code:
            row.state, row.reason = ("interrupted", "") if code == 130 else ("failed", reason or f"exit code {code}; {self.log} has its output")
        else:
            self._finish(cfg)
        self.current = None
        self._draw()
        if self.live is None:
            self.console.print("  ".join(filter(None, [self.bar(), *row.cells])), highlight=False)

    def passes(self, cfg: DictConfig) -> str:
        row = self.rows[self._key(cfg)]
        if self.limit_s is None or not any(r.result and r.result.kind == "trained" for r in self.rows.values()):
            return ""
        after = self.watch.peek() + row.expected_s * self.ratio
        if after <= self.limit_s:
            return ""
        row.state, row.reason = "left out", f"would end after {duration(after)} of {duration(self.limit_s)}; --hours gives more"
        return row.reason

    @property
    def ratio(self) -> float:
        """What cells took to what was expected of them."""
        took = [(r.seconds, r.expected_s) for r in self.rows.values() if r.seconds and r.state == "done"]
        return sum(t for t, _ in took) / sum(e for _, e in took) if took else 1.0

    @property
    def left_s(self) -> float:
        """Seconds until all have ended: as the plan said, corrected by what was seen."""
        waiting = sum(r.expected_s for r in self.rows.values() if r.state == "waits")
        if self.current is None:
            return self.ratio * waiting
        spent, done = self.cell.peek(), self.done
        own = self.ratio * self.current.expected_s * (1 - done)
        if done > 0.2:
            own = spent * (1 - done) / done
        return own + self.ratio * waiting

    @property
    def share(self) -> float:
        """Of all the work, what is done."""
        whole = sum(r.expected_s for r in self.rows.values())
        ended = sum(r.expected_s for r in self.rows.values() if r.state not in ("waits", "runs"))
        return min(1.0, (ended + (self.current.expected_s * self.done if self.current else 0.0)) / whole) if whole else 1.0

    def bar(self) -> str:
        """In words: how much is done, and the time that is left."""
        return f"{100 * self.share:.0f}%, {duration(self.left_s) if self.left_s >= 1 else '0 s'} left"

    def _draw(self) -> None:
        if self.live is not None:
            self.live.update(self.picture(), refresh=True)
        self.drawn.lap()

    def picture(self) -> Any:
        """The table with the bar below it, as rich draws them."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar

        name = f"{self.current.technique}, " if self.current else ""
        return Group(grid(HEAD, [r.cells for r in self.rows.values()]), ProgressBar(total=1.0, completed=self.share, width=60), f"{name}{self.bar()}")


def _row(cfg: DictConfig, cost: Whole | None) -> Row:
    total = (cost.total_s if cost else None) or START_S
    train = (cost.train_s if cost else None) or 0.0
    score = (cost.score_s if cost else None) or 1.0
    return Row(cfg.technique.name, total, train / (train + score))


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A plain table, as rich draws it: the first and last column to the left, figures to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number in (0, len(head) - 1) else "right", no_wrap=number < len(head) - 1)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
