"""What `python -m pipeline.evaluate` wrote of finished cells: what a merge leaves of an adapter, and scores of lm-evaluation-harness.

Library. evaluations/<experiment>/<cell>/ holds merged/merged.json and suites/<task>.json. Each names the run that it is of (when that was started), so
that figures of a cell that was run again since are not taken for the new one's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.files import Damaged, read_object
from pipeline.records.results import Result

T = TypeVar("T")
SAID = {"kept": "", "base_changed": "the base changes more than by the adapter", "rounded_away": "rounded away", "too_much": "changed too much"}
"""What became of an adapter in a merge -> the same in words; the worst last."""
TITLES = {"fp32": "fp32", "bf16": "bf16", "nf4": "NF4", "int8": "int8", "q8_0": "GGUF Q8_0"}
"""A precision that a merged model is rounded to -> its name in words."""


@dataclass(frozen=True)
class Merged:
    """A merged model in one precision.

    score: headline metric; change: its points against the adapter beside its base. drift: nats a token from the adapter beside its base to the merged model;
    base_drift: from the base to the base rounded alike, which is what the precision costs without any adapter. left: share of the adapter's change that the
    merge keeps, at most 1, below 0 where rounding adds more than is kept. verdict: one of SAID (pipeline/serving/distances.py).
    """

    precision: str
    score: float
    change: float
    drift: float
    base_drift: float
    left: float
    verdict: str


@dataclass(frozen=True)
class Truth:
    """attached: headline metric of the adapter beside its base; effect: nats a token from the base to it; merged: one a precision."""

    metric: str
    attached: float
    effect: float
    rows: int
    merged: tuple[Merged, ...]


@dataclass(frozen=True)
class Measured:
    """A metric of a task of lm-evaluation-harness: of the artefact, of its untouched base, and the difference. stderr: the value's standard error."""

    value: float
    stderr: float | None
    base: float | None
    change: float | None


@dataclass(frozen=True)
class Evaluations:
    """Of one cell. suites: {task, with how it was asked (fewer rows, merged): {metric: …}}. old: files of an earlier run of the cell, which are not read."""

    truth: Truth | None = None
    suites: Mapping[str, Mapping[str, Measured]] | None = None
    old: tuple[Path, ...] = ()


def run_of(result: Result) -> str | None:
    """What a file of evaluations says of the run that it is of."""
    started = result.provenance.get("started")
    return str(started) if started else None


def folder_of(root: Path, result: Result) -> Path:
    """Where evaluations of a cell lie. root: the config's paths.evaluations."""
    return root / result.experiment / result.cell


def read(root: Path, result: Result) -> Evaluations:
    """All of one cell's; a damaged file is named in a warning and left out."""
    folder, run = folder_of(root, result), run_of(result)
    old: list[Path] = []

    def known(path: Path, made: Callable[[dict[str, Any]], T]) -> T | None:
        try:
            values = read_object(path)
            if values.get("run") != run:
                old.append(path)
                return None
            return _made(path, values, made)
        except Damaged as error:
            print(f"warning: {error}", file=sys.stderr)
            return None

    file = folder / "merged" / "merged.json"
    truth = known(file, _truth) if file.exists() else None
    every = [known(path, _suite) for path in sorted((folder / "suites").glob("*.json"))]
    return Evaluations(truth, dict(one for one in every if one), tuple(old))


def _made(path: Path, values: dict[str, Any], made: Callable[[dict[str, Any]], T]) -> T:
    try:
        return made(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is not what pipeline.evaluate writes ({error}); delete it and evaluate the cell again") from error


def _truth(values: dict[str, Any]) -> Truth:
    merged = tuple(Merged(**one) for one in values["merged"])
    return Truth(values["metric"], values["attached"], values["effect"], values["rows"], merged)


def _suite(values: dict[str, Any]) -> tuple[str, dict[str, Measured]]:
    part = f", first {values['rows']} rows" if values["rows"] else ""
    return f"{values['task']}{part}{', merged' if values['merged'] else ''}", {name: Measured(**one) for name, one in values["metrics"].items()}
