"""The configs of many cells: those that differ in their seed alone are composed once, several others at once in processes of their own.

Library of grid.py. Composing is Python's work alone, half a second a config: eleven of them took as long as the imports of what trains them.
"""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
from collections.abc import Sequence
from typing import IO

from omegaconf import DictConfig

from pipeline.cell.child import Child, pause
from pipeline.core.compose import by_key, compose, without
from pipeline.core.files import UserError
from pipeline.measure import machine
from pipeline.records import tuned

FEW = 4
"""Fewer configs than these this process composes by itself."""
Words = tuple[str, ...]


def compose_cell(overrides: Sequence[str]) -> DictConfig:
    """The config of a cell: with its tuned settings, if it has tuned=true. Raises UserError as `compose` and `tuned.applied` do."""
    return tuned.applied(compose(overrides), overrides)


def compose_cells(every: Sequence[Sequence[str]]) -> list[DictConfig]:
    """The configs of cells, in their order. Raises UserError as compose_cell does."""
    first: dict[Words, Words] = {}
    for words in every:
        first.setdefault(_key(words), tuple(words))
    composed = dict(zip(first, _composed(list(first.values())), strict=True))
    cells = []
    for words in every:
        cfg = copy.deepcopy(composed[_key(words)])
        if _key(words) != tuple(words):
            cfg.seed = int(by_key(words)["seed"])
        cells.append(cfg)
    return cells


def _key(words: Sequence[str]) -> Words:
    """The overrides without a seed that can be set afterwards."""
    return tuple(without(words, "seed")) if by_key(words).get("seed", "").isdecimal() else tuple(words)


def _composed(every: Sequence[Words]) -> list[DictConfig]:
    """One config each. The first is composed here, before others are forked: what Hydra imports and reads once is there then. Of many others a part is
    composed here, and as many parts as there are further CPUs in children."""
    made, rest = [compose_cell(words) for words in every[:1]], every[1:]
    count = 1 if len(rest) < FEW else min(len(rest), machine.cpu_count() or 1)
    parts = [rest[start::count] for start in range(count)]
    notes = [tempfile.TemporaryFile() for _ in parts[1:]]  # noqa: SIM115 (they go with this)
    children = [Child(functools.partial(_compose_into, note, part)) for note, part in zip(notes, parts[1:], strict=True)]
    try:
        lists = [[compose_cell(words) for words in parts[0]]]
    finally:
        while not all(child.poll() for child in children):
            pause()
    for child, note, part in zip(children, notes, parts[1:], strict=True):
        note.seek(0)
        lists.append(pickle.load(note) if child.outcome and child.outcome.code == 0 else [compose_cell(words) for words in part])
    return [*made, *(lists[number % count][number // count] for number in range(len(rest)))]


def _compose_into(note: IO[bytes], part: Sequence[Words]) -> int:
    """The work of a child; what it is refused, the process that waits for it composes again, and says so."""
    try:
        pickle.dump([compose_cell(words) for words in part], note)
    except UserError:
        return 2
    note.flush()
    return 0
