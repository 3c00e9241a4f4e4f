"""The cells that a report is about: those of the experiment's grid that have a result.

Library of `python -m pipeline.report`.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import results
from pipeline.files import UserError, read_jsonl
from pipeline.results import ENGINES, Result

FROM_FILES = "peft_config"  # python -m pipeline.peft_configs adds such cells to any experiment
NAME = re.compile(r"(?P<technique>[^+]+?)(\+(?P<variant>.+))?-s(?P<seed>\d+)-n(?P<rows>\d+|all)")


@dataclass(frozen=True)
class Cell:
    """A result, its folder, and the row it belongs to."""

    result: Result
    folder: Path
    label: str
    """Technique, with its variant: lora+best."""
    rows: str
    """The grid's number of training rows: "200" or "all"."""

    @property
    def untrained(self) -> bool:
        return self.result.kind != "trained"

    @property
    def timing(self) -> str:
        """Why its training times are not those of a run by itself; empty if they are."""
        if self.result.packed:
            return "packed"
        return "resumed" if self.result.work and self.result.work.resumed else ""

    @property
    def engine(self) -> str:
        """What did the training steps, in words; empty where the eager engine did as it was asked to."""
        work = self.result.work
        if work is None or work.engine is None or (work.engine not in ("captured", "handwritten") and not work.engine_reason):
            return ""
        reason = f", because {work.engine_reason}" if work.engine_reason else ""
        graphs = ", captured in CUDA graphs" if work.engine != "eager" and self.result.hardware.get("device") == "cuda" else ""
        return f"{ENGINES[work.engine]}{reason}{graphs}"

    def right(self) -> dict[str, bool]:
        """{row id: answered right} of the test split; empty without predictions."""
        path = self.folder / "predictions.jsonl"
        return {r["id"]: bool(r["correct"]) for r in read_jsonl(path) if r["split"] == "test"} if path.exists() else {}


def select(root: Path, grid: dict[str, Any]) -> tuple[list[Cell], list[str]]:
    """The cells below results/<experiment>/ that the grid holds, and the names of those that have no result.

    Cells that were taken out of the grid stay on disk unread. A variant (a sweep's confirm cell) comes with its technique.

    Raises:
        UserError: a result of the grid is broken or of another schema; none is there.
    """
    wanted = [
        f"{technique}-s{seed}-n{'all' if rows is None else rows}"
        for rows, technique, seed in itertools.product(grid["train_rows"], grid["techniques"], grid["seeds"])
    ]
    found: dict[str, Cell] = {}
    for path in sorted(root.rglob("result.json")):
        name = path.parent.name
        parts = NAME.fullmatch(name)
        if parts and (name in wanted or (parts["variant"] and parts["technique"] in (*grid["techniques"], FROM_FILES))):
            label = parts["technique"] + (f"+{parts['variant']}" if parts["variant"] else "")
            found[name] = Cell(results.read(path), path.parent, label, parts["rows"])
    if not found:
        raise UserError(f"{root} holds none of the grid's {len(wanted)} cells; run: python -m pipeline.cells experiments={root.name}")
    return list(found.values()), [name for name in wanted if name not in found]
