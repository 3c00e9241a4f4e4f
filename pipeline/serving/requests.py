"""Requests that name an adapter: read and checked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, read_jsonl
from pipeline.data import recipe
from pipeline.records.results import Result
from pipeline.serving.artefact import Artefact


def read_requests(source: str) -> list[dict[str, Any]]:
    """Raises UserError naming the line of a request that is none."""
    if source == "-":
        try:
            requests = [json.loads(line) for line in sys.stdin if line.strip()]
        except json.JSONDecodeError as error:
            raise UserError(f"standard input has a line that is no JSON ({error}); send one JSON object a line") from error
    else:
        requests = read_jsonl(source)
    for number, row in enumerate(requests, 1):
        for key in ("adapter", "prompt"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key]:
                raise UserError(f"request {number} of {source} has no text {key!r}; every request is {{adapter, prompt}}, choices where the task needs them")
    if not requests:
        raise UserError(f"{source} has no request; add lines like {{\"adapter\": \"lora-s0-n160\", \"prompt\": \"…\"}}")
    return requests


def folder_of(root: Path, name: str) -> Path:
    """A cell's folder. Raises UserError where there is no such cell, or the name leads elsewhere."""
    cells = sorted(p.parent.name for p in root.glob("*/result.json"))
    if name not in cells:
        raise UserError(f"{root} has no cell {name!r} to answer with; there are: {', '.join(cells) or 'none'}")
    return root / name


def check_one_base(results: dict[str, Result]) -> None:
    """Raises UserError naming two cells that differ in model, precision or start."""
    first, *others = results
    for key in ("model", "precision", "start"):
        for name in others:
            if (value := _shared(results[name], key)) != (expected := _shared(results[first], key)):
                raise UserError(f"{name} has {key} {value} and {first} has {expected}; artefacts share a base of one model in one precision, send them apart")


def _shared(result: Result, key: str) -> Any:
    """What artefacts over one base have in common; their start is a cell of one seed and number of rows."""
    if key != "start":
        return getattr(result, key)
    start = result.config.get("start")
    return start and (start if "/" in start else f"{start}-s{result.seed}-n{result.config['train_rows']} of {result.experiment}")


def with_choices(number: int, request: dict[str, Any], artefact: Artefact) -> dict[str, Any]:
    """The request with its task's fixed choices, where it brings none. Raises UserError where the task needs some."""
    if artefact.settings.task.scoring != "choice":
        return request
    choices = request.get("choices") or recipe.read(artefact.cfg).choice_list
    if not isinstance(choices, list) or len(set(map(str, choices))) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"request {number}: the task of {request['adapter']} chooses among a row's own choices; give it a list of two or more texts")
    return {**request, "choices": choices}
