"""How long a training takes, from this machine's measured throughput.

Library of cell.py; calibrate.py measures. A calibration times real steps of the cell's own technique on random weights of the model's
shape with two numbers of layers and two sizes of micro-batch; a step is taken to be linear in both. They are kept in
<paths.work>/throughput.json under the hardware and the versions of what computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, read_json, write_json
from pipeline.forecasting.plan import Plan

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
MODEL_ERROR = 0.15
"""Relative error granted to the linear model beside the spread of the measured steps (docs/forecast.md has what it was on finished cells)."""


@dataclass(frozen=True)
class Point:
    """Seconds of optimiser steps (one micro-batch each) of a model with so many layers at so many cells (tokens, padding counted)."""

    layers: int
    cells: int
    seconds: tuple[float, ...]


def file_of(work: str | Path) -> Path:
    """Where calibrations are kept."""
    return Path(work) / "throughput.json"


def machine(hardware: str) -> str:
    """What a calibration holds for: the device, its threads, and versions."""
    versions = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return "; ".join([hardware, f"{threads} threads", *versions])


def work(plan: Plan) -> str:
    """What of a plan decides a step's time, besides layers and cells."""
    shape, held = plan.shape, plan.trained
    sizes = f"d{shape.width} h{shape.heads}/{shape.groups}x{shape.head} f{shape.inner} v{shape.vocabulary}{'' if shape.tied else ' untied'}"
    what = [held.name, f"top {shape.layers - held.first}" if held.first else "", " ".join(f"{k}:{r}" for k, r in held.ranks.items()),
            f"p{held.dropout}" if held.dropout else "", f"soft {held.virtual}" if held.virtual else ""]
    how = [plan.engine, plan.precision, f"{8 * plan.compute} bits", "checkpointing" if plan.checkpointing else ""]
    return "; ".join(w for w in [sizes, *what, *how] if w)


def known(path: Path, hardware: str, plan: Plan) -> list[Point]:
    """The points measured of this work on this machine; none if there are none."""
    if not path.exists():
        return []
    with contextlib.suppress(UserError, KeyError, TypeError):  # what cannot be read is measured again
        held = read_json(path)[machine(hardware)][work(plan)]["points"]
        return [Point(p["layers"], p["cells"], tuple(p["seconds"])) for p in held]
    return []


def keep(path: Path, hardware: str, plan: Plan, points: Sequence[Point], date: str) -> None:
    """Add a calibration to the file; one of the same work is replaced."""
    held: dict[str, Any] = {}
    if path.exists():
        with contextlib.suppress(UserError):
            held = read_json(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    held.setdefault(machine(hardware), {})[work(plan)] = {"date": date, "points": [dataclasses.asdict(p) for p in points]}
    write_json(path, held)


def train_seconds(plan: Plan, steps: int, points: Sequence[Point]) -> tuple[float, float, float]:
    """(low, expected, high) seconds of `steps` steps.

    A micro-batch of n cells through L layers takes a + b L + c n + d L n seconds; the four come from the four points.
    """
    whole = sum(seconds(points, plan.shape.layers, cells) * count for cells, count in plan.fed)
    expected = steps * whole / max(1, plan.looked)
    wide = (MODEL_ERROR**2 + max(spread(p.seconds) for p in points) ** 2) ** 0.5
    return expected / (1 + wide), expected, expected * (1 + wide)


def seconds(points: Sequence[Point], layers: int, cells: int) -> float:
    """Of a micro-batch; never less than the fastest that was measured at as many layers or fewer."""
    small, large = sorted({p.cells for p in points})
    low, high = sorted({p.layers for p in points})
    middle = {(p.layers, p.cells): statistics.median(p.seconds) for p in points}

    def at(n: int) -> float:
        each = max(0.0, (middle[high, n] - middle[low, n]) / (high - low))
        return middle[low, n] + each * (layers - low)

    slope = max(0.0, (at(large) - at(small)) / (large - small))
    return max(at(small) + slope * (cells - small), middle[low, small] * min(1.0, cells / small))


def spread(values: Sequence[float]) -> float:
    """Half the range of the middle 80%, over the median."""
    ordered = sorted(values)
    cut = len(ordered) // 10
    inner = ordered[cut : len(ordered) - cut]
    return (inner[-1] - inner[0]) / 2 / statistics.median(ordered)
