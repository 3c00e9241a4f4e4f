"""Many repetitions in blocks, on several processes: what a block gave is a line of a file, and blocks that stand there are not run again.

Library of `python -m benchmarks.race simulate | replay`, to be run with OMP_NUM_THREADS=1. Every repetition seeds its draws with its own number, so that
blocks may be of any size and run in any order, here or on another machine. Lines that other code has written count as not there.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rates import lines
from pipeline.measure.clock import Stopwatch

ROOT = Path(__file__).parent.parent
CODE = ("pipeline/racing/policy.py", "pipeline/stats/looking.py", "pipeline/stats/tiers.py", "benchmarks/race_simulate.py", "benchmarks/race_replay.py")


def code() -> str:
    """Of the files that decide what a repetition gives."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in CODE)).hexdigest()[:12]


def _lines(path: Path) -> list[dict[str, Any]]:
    own = code()
    return [line for line in lines(path) if line["code"] == own]


@dataclass(frozen=True)
class Block:
    """Repetitions `first` … `first + count - 1` of what `key` names; task: what the function is given to do them."""

    key: tuple[Any, ...]
    first: int
    count: int
    task: Any


def blocks(key: tuple[Any, ...], task: Any, times: int, size: int) -> list[Block]:
    """So many repetitions, in blocks of this size."""
    return [Block(key, first, min(size, times - first), task) for first in range(0, times, size)]


def run(path: Path, wanted: Sequence[Block], work: Callable[[Block], list[list[float]]], processes: int, limit_s: float) -> Iterator[tuple[Any, ...]]:
    """Run the blocks that the file lacks, in this order, until the time is up; yields the key of each block as it is written.

    Args:
        work: what each repetition of a block gave, a list of numbers a repetition; a function of a module.
    """
    own, watch, done = code(), Stopwatch(), {(tuple(line["key"]), line["first"], line["count"]) for line in _lines(path)}
    missing = [block for block in wanted if (block.key, block.first, block.count) not in done]
    print(f"{len(missing)} of {len(wanted)} blocks are to be run", file=sys.stderr, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file, multiprocessing.get_context("fork").Pool(processes) if processes > 1 else _Here() as pool:
        for block, ends in pool.imap_unordered(_Numbered(work), missing):
            file.write(json.dumps({"code": own, "key": block.key, "first": block.first, "count": block.count, "ends": ends}) + "\n")
            file.flush()
            yield block.key
            if watch.peek() > limit_s:
                print(f"the time is up after {watch.peek():.0f} s", file=sys.stderr, flush=True)
                return


def ends(path: Path) -> dict[tuple[Any, ...], dict[int, list[float]]]:
    """By key and number of the repetition, what it gave."""
    found: dict[tuple[Any, ...], dict[int, list[float]]] = {}
    for line in _lines(path):
        found.setdefault(tuple(line["key"]), {}).update(enumerate(line["ends"], line["first"]))
    return found


@dataclass(frozen=True)
class _Numbered:
    work: Callable[[Block], list[list[float]]]

    def __call__(self, block: Block) -> tuple[Block, list[list[float]]]:
        return block, self.work(block)


class _Here:
    """This process in the place of a pool."""

    imap_unordered = staticmethod(map)

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass
