"""Rows that a teacher wrote, mixed with the rows that people labelled: the settings of conf/synthetic/, and the rows that a cell takes.

Library. `python -m pipeline.synthesize` writes synthetic/<task>/<name>/; a cell with synthetic=<name> trains on its labelled rows and on as many
of these as synthetic.share says. Validation and test rows are never synthetic.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig

from pipeline.core.compose import plain
from pipeline.core.files import UserError, read_json, read_jsonl, sha256
from pipeline.core.settings import AtLeast0, AtLeast1, Within, build
from pipeline.records.results import Synthetic

TASK = "task"


@dataclass(frozen=True)
class Synthesis:
    """All keys of conf/synthetic/<name>.yaml."""

    name: str
    share: float = 0.0
    """Synthetic rows as a share of the training rows, from 0 to below 1: 0.5 is as many as there are labelled ones."""
    seeds: str | None = None
    """task: labelled training rows of the cell; else a qna.yaml or a folder of them (pipeline/teachers/synthetic/taxonomy.py)."""
    documents: str | None = None
    """A folder with the documents that a taxonomy's knowledge names."""
    passage_words: AtLeast1 = 250
    rows: AtLeast1 = 200
    """Rows to keep of a set, as evenly from its leaves as it goes."""
    row_seeds: tuple[int, ...] | None = None
    """seeds=task: the cells' seeds, each of which gets a set written from its own labelled rows; null: that of the config's seed."""
    seed_rows: AtLeast1 = 8
    """seeds=task: labelled rows of every answer that are shown; without fixed choices, that many in all."""
    shots: AtLeast0 = 3
    """Examples shown with every request, drawn anew each time."""
    attempts: Annotated[float, Within(1)] = 4.0
    """Most texts to ask for, as a multiple of `rows`."""
    judge: bool = False
    """Whether the writer rates its rows from 1 to 3 and those below 2 are dropped (as LAB does)."""
    near: Annotated[float, Within(0, 1, above=True)] = 0.7
    """ROUGE-L from which on a text counts as a duplicate (Self-Instruct, Wang et al., 2023)."""
    shortest: AtLeast0 = 3
    longest: int | None = None
    """Words of a question; null: twice as many as the longest example has."""
    question_column: str | None = None
    """The task's column that a question fills; null: the only one of its prompt."""
    context_column: str | None = None
    """The column that a context fills; null: it comes before the question."""
    description: str | None = None
    """seeds=task: what the rows are, in words."""
    words: dict | None = None
    """What is asked of the writer: system, by_answer, question, in_context, context, answer, judge."""
    seed: int = 0

    def check(self) -> None:
        if not 0 <= self.share < 1:
            raise UserError(f"config key 'synthetic.share' is {self.share}; it is a share of the training rows, from 0 to below 1")
        if self.longest is not None and self.longest < self.shortest:
            raise UserError(f"synthetic.longest={self.longest} is below synthetic.shortest={self.shortest}; raise it")


def read(cfg: DictConfig) -> Synthesis:
    """The checked settings. Raises UserError naming the key."""
    settings: Synthesis = build(Synthesis, plain(cfg)["synthetic"], "synthetic")
    return settings


def wanted(cfg: DictConfig) -> bool:
    """Whether a cell of this config trains on synthetic rows."""
    return is_wanted(cfg.get("synthetic"))


def is_wanted(group: Any) -> bool:
    """The same of the config group alone."""
    return bool(group and group["name"] != "none" and group["share"])


def folder_of(cfg: DictConfig) -> Path:
    return Path(cfg.paths.synthetic) / cfg.task.name / cfg.synthetic.name


def reads(cfg: DictConfig) -> list[Path]:
    """The files whose content decides what a cell of this config learns."""
    return [folder_of(cfg) / "rows.jsonl"] if wanted(cfg) else []


def count(labelled: int, share: float) -> int:
    """How many rows make up `share` of the whole together with so many labelled ones."""
    return round(labelled * share / (1 - share))


def extra(cfg: DictConfig, labelled: Sequence[dict]) -> tuple[list[dict], Synthetic | None]:
    """The synthetic rows that a cell trains on besides its labelled ones, and its result's entry for them.

    Drawn with the cell's seed, leaves in turn; a smaller draw with the same seed is a part of a larger one.

    Raises:
        UserError: not written, written for other data or for other labelled rows than the cell has, or too few.
    """
    if not wanted(cfg):
        return [], None
    settings, folder = read(cfg), folder_of(cfg)
    command = f"python -m pipeline.synthesize task={cfg.task.name} synthetic={settings.name} writer=local"
    if not (folder / "rows.jsonl").exists():
        raise UserError(f"{folder / 'rows.jsonl'} does not exist; run: {command} writer.temperature=0.9")
    about = read_json(folder / "manifest.json")
    if about["data_sha256"] != sha256(Path(cfg.paths.data) / cfg.task.name / "manifest.json"):
        raise UserError(f"{folder} was written for other data than data/{cfg.task.name} now has; run again: {command}")
    key = "all" if "all" in about["sets"] else str(cfg.seed)
    if key not in about["sets"]:
        raise UserError(f"{folder} has no rows for seed {key}, only for {', '.join(about['sets'])}; run: {command} synthetic.row_seeds=[…,{key}]")
    rows = [row for row in read_jsonl(folder / "rows.jsonl") if row["set"] == key]
    _check_shown(folder, rows, labelled)
    number = count(len(labelled), settings.share)
    if number > len(rows):
        most = len(rows) / (len(rows) + len(labelled))
        raise UserError(
            f"synthetic.share={settings.share} of {len(labelled)} labelled rows asks for {number} synthetic ones, but {folder} has {len(rows)}; "
            f"write more (synthetic.rows), or set synthetic.share={int(most * 100) / 100} at most"
        )
    one = about["sets"][key]
    return draw(rows, number, cfg.seed), Synthetic(settings.name, number, settings.share, about["teacher"], one["seconds"], one["examples_beside"])


def draw(rows: Sequence[dict], number: int, seed: int) -> list[dict]:
    """`number` of the rows in an order that the seed decides, leaves and answers in turn as long as each has some left."""
    shuffled = random.Random(f"{seed}/synthetic").sample(list(rows), len(rows))
    place: dict[tuple[str, str | None], int] = {}
    turns: list[tuple[int, int, dict]] = []
    for row in shuffled:
        group = (row["leaf"], row["answer"] if row["choices"] else None)
        place[group] = place.get(group, -1) + 1
        turns.append((place[group], len(turns), row))
    return [row for _, _, row in sorted(turns, key=lambda turn: turn[:2])][:number]


def _check_shown(folder: Path, rows: Sequence[dict], labelled: Sequence[dict]) -> None:
    """Every labelled row that the writer was shown must be one that the cell pays for."""
    known = {row["id"] for row in labelled}
    foreign = next((seed for row in rows for seed in row["seeds"] if seed not in known), None)
    if foreign is not None:
        raise UserError(
            f"{folder} was written from labelled rows that this cell does not have (first: {foreign}); "
            f"run python -m pipeline.synthesize again with train_rows={len(labelled)}, the fewest that its cells have"
        )
