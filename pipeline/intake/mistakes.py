"""What a technique answers wrong: the confusion matrix, and wrong rows beside the right answer. Library of `python -m pipeline.errors`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from pipeline.core.compose import compose
from pipeline.core.files import UserError, closest
from pipeline.records.finished import Cell, cells_below
from pipeline.reporting.mistakes import NOTHING, texts_of
from pipeline.reporting.mistakes import confusion as by_answer

MOST_LABELS = 12
"""Rows and columns of a matrix that still fit a screen; of more labels the commonest confusions are listed."""


@dataclass(frozen=True)
class Wrong:
    id: str
    prompt: str
    answer: str
    said: str


@dataclass(frozen=True)
class Mistakes:
    """Of a cell's test rows. confusion: rows by (right answer, what was said)."""

    cell: str
    rows: int
    wrong: list[Wrong]
    confusion: Counter[tuple[str, str]]
    labels: list[str]


def config(name: str) -> DictConfig:
    """An experiment's config. Raises UserError where there is none of the name."""
    return compose([f"experiments={name}"])


def find(name: str, technique: str, seed: int = 0, rows: int | None = None) -> Cell:
    """The finished cell of a technique; of several sizes the largest. Raises UserError where there is none, naming those there are."""
    folder = Path(config(name).paths.results) / name
    cells = [c for c in cells_below(folder) if c.result.status == "ok" and c.result.test is not None] if folder.is_dir() else []
    if not cells:
        raise UserError(f"{folder} holds no finished cell; run: alignscope try {name}")
    labels = list(dict.fromkeys(c.label for c in cells))
    fit = [c for c in cells if c.label == technique and c.result.seed == seed and rows in (None, c.result.train_rows)]
    if not fit:
        raise UserError(f"{name} has no finished cell of {technique!r} with seed {seed}{closest(technique, labels)}; there are: {', '.join(labels)}")
    return max(fit, key=lambda c: c.result.train_rows)


def mistakes(cell: Cell, data: Path) -> Mistakes:
    """What a cell answers wrong. data: the prepared task's folder. Raises UserError where the rows that it answered are not there any more."""
    texts = texts_of(cell, data.parent)
    if not texts:
        raise UserError(f"{data} does not hold the rows that {cell.folder} answered; "
                        f"run: python -m pipeline.prepare task={cell.result.task}, then the cell again")
    said = cell.predictions()
    wrong = [Wrong(p["id"], texts.get(p["id"], ""), p["answer"], p["prediction"] or p.get("output") or NOTHING)
             for p in said if not p["correct"]]
    _, pairs = by_answer(said)
    return Mistakes(cell.result.cell, len(said), wrong, pairs, sorted({label for pair in pairs for label in pair}))


def confusion(found: Mistakes) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the matrix, right answers down and what was said across; of many labels, what was most often taken for what."""
    if len(found.labels) <= MOST_LABELS:
        body = [[label, *(str(found.confusion[label, said] or "·") for said in found.labels)] for label in found.labels]
        return ["right \\ said", *found.labels], [[*row, ""] for row in body]
    common = [(pair, count) for pair, count in found.confusion.most_common() if pair[0] != pair[1]][:MOST_LABELS]
    return ["right", "rows", "said"], [[right, str(count), said] for (right, said), count in common]


def as_json(found: Mistakes) -> str:
    """The same for programs, all wrong rows."""
    pairs = [{"answer": right, "said": said, "rows": count} for (right, said), count in found.confusion.most_common()]
    return json.dumps({"cell": found.cell, "rows": found.rows, "wrong": [vars(one) for one in found.wrong], "confusion": pairs}, indent=1, ensure_ascii=False)


def _short(text: str) -> str:
    """A text in one line; of a long one its beginning and its end, where a number stands."""
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= 80 else f"{flat[:40]} … {flat[-36:]}")


def lines(wrong: Sequence[Wrong], width: int = 100) -> list[str]:
    told = []
    for one in wrong:
        text = " ".join(one.prompt.split())
        told += [f"{one.id}  {text if len(text) <= width else f'…{text[-width:]}'}", f"    said {_short(one.said)}, right is {_short(one.answer)}"]
    return told
