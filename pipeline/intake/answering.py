"""What a comparison answers: the table, the verdict in two sentences, and the commands for what comes next.

Library of `alignscope try`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell.grid import grid
from pipeline.core.arguments import typed
from pipeline.core.commands import call
from pipeline.core.files import UserError
from pipeline.intake import running
from pipeline.records.finished import Cell, select
from pipeline.reporting.rows import by_group, make_rows
from pipeline.reporting.text import answer as text_of
from pipeline.scoring.answers import headline


def answer(name: str, cfg: DictConfig, watch: running.Watch, code: int, args: argparse.Namespace) -> int:
    """Print what came of the comparison. Returns 0, 130 where it was interrupted, 1 where no technique has a result."""
    cells = finished(name, cfg)
    done = sum(row.result is not None for row in watch.rows.values())
    page = write_report(name, cfg) if cells and code != 130 else None
    sentences, chosen = verdict(cells)
    steps = next_steps(name, chosen, cells)
    if args.json:
        print(json.dumps(as_json(name, cells, watch, sentences, chosen, page, steps), indent=1, ensure_ascii=False))
        return code if code == 130 else 0 if cells else 1
    console = watch.console
    console.print()
    console.print(running.grid(running.HEAD, [row.cells for row in watch.rows.values()]))
    if code == 130:
        console.print(f"\ninterrupted; {done} of {len(watch.rows)} cells are done, and all that was done is kept. Go on with: {typed()} try {name}",
                      highlight=False, soft_wrap=True)
        return 130
    console.print("\n" + "\n".join(sentences), highlight=False, markup=False, soft_wrap=not console.is_terminal)  # a terminal breaks lines at words
    if page:
        console.print(f"\nreport  {page}", highlight=False, soft_wrap=True)
    console.print("\n".join(listed(steps, console.width)), highlight=False, markup=False, soft_wrap=True)
    return 0 if cells else 1


def listed(steps: Sequence[tuple[str, str]], width: int) -> list[str]:
    """The commands that come next, each with what it does: beside it, or below where some would not fit into the width."""
    longest = max(len(command) for command, _ in steps)
    beside = [f"{command:<{longest}}  {what}" for command, what in steps]
    fits = max(map(len, beside)) + 8 <= width
    lines = beside if fits else [line for command, what in steps for line in (command, f"    {what}")]
    return [f"{'next' if not number else '':<8}{line}" for number, line in enumerate(lines)]


def finished(name: str, cfg: DictConfig) -> list[Cell]:
    """The experiment's cells that have answered the test rows; none before the first."""
    try:
        cells, _ = select(Path(cfg.paths.results) / cfg.experiment, grid(name)["grid"])
    except UserError:
        return []
    return [cell for cell in cells if cell.result.status == "ok" and cell.result.test is not None]


def write_report(name: str, cfg: DictConfig) -> Path | None:
    """The report's page; None where it cannot be made of these cells."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            call("report", cfg, [f"experiments={name}"])
    except UserError:
        return None
    return Path(cfg.paths.report) / cfg.experiment / "index.html"


def verdict(cells: Sequence[Cell]) -> tuple[list[str], str | None]:
    """(the verdict's sentences, the technique that is taken; None where none could be compared), of the largest number of training rows."""
    if not cells:
        return ["No technique has a result; the table says why."], None
    rows = make_rows(cells)
    compared = [row for group in by_group(rows).values() for row in group if row.verdict is not None]
    return [text.replace("`", "") for text in text_of(rows)], compared[0].verdict.name if compared and compared[0].verdict else None


def as_json(name: str, cells: Sequence[Cell], watch: running.Watch, sentences: Sequence[str], chosen: str | None, page: Path | None,
            steps: Sequence[tuple[str, str]]) -> dict[str, Any]:
    told = [{
        "cell": c.result.cell, "technique": c.label, "metric": c.result.metric, "test": headline(c.result.test, c.result.metric) if c.result.test else None,
        "test_rows": c.result.test.rows if c.result.test else 0, "train_s": c.result.phases.train_s if c.result.phases else None,
        "peak_bytes": c.result.memory.peak_bytes if c.result.memory else None,
    } for c in cells]
    missing = [{"technique": row.technique, "state": row.state, "reason": row.reason} for row in watch.rows.values() if row.result is None]
    return {"experiment": name, "verdict": list(sentences), "take": chosen, "cells": told, "missing": missing, "report": page and str(page),
            "next": [command for command, _ in steps]}


def next_steps(name: str, chosen: str | None, cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """(a command, what it is for) of what one does next."""
    say = typed()
    trained = [c for c in cells if c.result.kind == "trained"]
    steps = [(f"{say} more {name} --seeds 3", "more seeds (--rows 500, --test-rows 500: more rows)")]
    if trained:
        best = chosen if chosen in {c.label for c in trained} else trained[0].label
        steps += [(f"{say} tune experiments={name} technique={best}", "search its learning rate and size on validation rows")]
        steps += [(f"{say} rank {name}", "which rank of LoRA")] if any(c.label == "lora" for c in trained) else []
    if cells:
        best = chosen if chosen in {c.label for c in cells} else cells[0].label
        steps += [(f"{say} errors {name} {best}", "what it answers wrong")]
        steps += [(f"{say} deploy {name} {best} --to out/{name}", "weights, predict.py, model card")]
    return [*steps, (f"{say} ui {name}", "the report, and MLflow's pages")]
