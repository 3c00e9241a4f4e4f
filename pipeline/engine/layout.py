"""Batches of few static shapes: what a CUDA graph needs, and what keeps padding small.

Library; without torch, because a forecast asks it before anything heavy is read (steps.py has the tensors). The steps of a run
are known before it starts (data.step_rows is a function of seed and step), so the widths that a run uses are chosen from all its
steps, and so is how many labels a batch of each width can hold.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.data.rows import Encoded

GRAIN = 8  # widths are multiples of this
TILE, LONG = 64, 2048  # of a product's inner length: what a kernel takes at a time, and from where on less than a tile costs more than padding to it
STEPS_A_WIDTH = 24  # a further width (a further capture) pays if that many steps can use it
MOST_WIDTHS = 6
SAMPLED = 256  # steps that are drawn to choose widths where the steps to come are not known


@dataclass(frozen=True)
class Shape:
    """Of one slot's part of a batch: rows [rows, width], labels [labels]; dense: every position is one, in order.

    longest: tokens of its longest row, where rows stand one after another in [width] tokens; 0: each has a width of its own.
    """

    rows: int
    width: int
    labels: int
    dense: bool = False
    longest: int = 0

    @property
    def cells(self) -> int:
        """Tokens, padding counted."""
        return self.width if self.longest else self.rows * self.width


@dataclass(frozen=True)
class Micro:
    """A micro-batch: its shape, and the examples of every slot with the slot's labelled tokens a group (over the whole step)."""

    shape: Shape
    parts: list[tuple[list[Encoded], dict[str, int]]]
    first: int = 0
    """How many of a slot's rows the step's micro-batches before it took."""


def length(example: Encoded) -> int:
    """Tokens that are fed: the last one predicts nothing."""
    return len(example.ids) - 1


def labels(example: Encoded) -> int:
    return len(example.ids) - example.start


def padded(columns: int, inner: int) -> int:
    """Columns to leave beside `inner` others for `columns` of adapters: whole tiles of a product's inner length where that is little beside it."""
    grain = TILE if inner >= LONG else GRAIN
    return -(-columns // grain) * grain


def choose_widths(needed: dict[int, int], most: int) -> list[int]:
    """At most `most` widths such that padding every batch up to the next one wastes least.

    Args:
        needed: width -> how many batches need it.
    """
    widths = sorted(needed)
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [])}
    for end in range(1, len(widths) + 1):
        for used in range(1, most + 1):
            found = [
                (cost + widths[end - 1] * sum(needed[w] for w in widths[start:end]), [*chosen, widths[end - 1]])
                for start in range(end) for cost, chosen in [best.get((start, used - 1), (float("inf"), []))] if cost < float("inf")
            ]
            if found:
                best[end, used] = min(found)
    return min(best[len(widths), used] for used in range(1, most + 1) if (len(widths), used) in best)[1]


class Shapes:
    """The static shapes of a run and the micro-batches of each step.

    Args:
        steps: every step as its slots' examples, to be read once; a slot may have none.
        most_tokens: most tokens of a micro-batch, all slots together (one row a slot at least).
        most_widths: how many widths to choose.
    """

    def __init__(self, steps: Iterable[Sequence[Sequence[Encoded]]], most_tokens: int, most_widths: int) -> None:
        self.most_tokens = most_tokens
        needed: dict[int, int] = {}
        self.examples = 1
        held = []
        for step in steps:
            found = sorted((length(e) for part in step for e in part), reverse=True)
            self.slots = len(step)
            self.examples = max(self.examples, *(len(part) for part in step))
            if found:
                width = -(-found[0] // GRAIN) * GRAIN
                needed[width] = needed.get(width, 0) + 1
                held.append(step)
        self.widths = choose_widths(coarser(needed), most_widths)
        self.capacity: dict[int, int] = {}
        self.fed: dict[int, int] = {}
        dense = dict.fromkeys(self.widths, True)
        self.accumulates = False
        for step in held:
            cut = list(self._cut(step))
            self.accumulates |= len(cut) > 1
            for width, parts in cut:
                rows = self.rows(width)
                counts = [sum(map(labels, part)) for part in parts]
                self.capacity[width] = max(self.capacity.get(width, 1), *counts)
                self.fed[width] = self.fed.get(width, 0) + 1
                dense[width] &= all(len(part) == rows and all(length(e) == width and labels(e) == width for e in part) for part in parts)
        self.dense = {width: dense[width] for width in self.capacity}

    def rows(self, width: int) -> int:
        """Rows of a slot in a micro-batch of this width."""
        return max(1, min(self.examples, self.most_tokens // (width * self.slots)))

    def all(self) -> list[Shape]:
        """Every shape that can come, the largest first."""
        return [self.shape(width) for width in sorted(self.capacity, reverse=True)]

    def shape(self, width: int) -> Shape:
        return Shape(self.rows(width), width, self.capacity[width], self.dense[width])

    def micro_batches(self, step: Sequence[Sequence[Encoded]]) -> Iterator[Micro]:
        """The micro-batches of one step; their weighted losses sum to the step's loss."""
        counts = []
        for part in step:
            found: dict[str, int] = {}
            for example in part:
                found[example.group] = found.get(example.group, 0) + labels(example)
            counts.append(found)
        first = 0
        for width, parts in self._cut(step):
            yield Micro(self.shape(width), list(zip(parts, counts, strict=True)), first)
            first += max(map(len, parts))

    def cost(self, least: float) -> float:
        """Tokens that all steps feed, padding counted, where a micro-batch takes the device as long as `least` tokens do at least."""
        return sum(count * max(self.slots * self.shape(width).cells, least) for width, count in self.fed.items())

    def _cut(self, step: Sequence[Sequence[Encoded]]) -> Iterator[tuple[int, list[list[Encoded]]]]:
        """(width, every slot's examples) of each micro-batch, the longest rows first."""
        left = [sorted(part, key=length, reverse=True) for part in step]
        while any(left):
            longest = max(length(part[0]) for part in left if part)
            width = next(w for w in self.widths if w >= longest)
            rows = self.rows(width)
            yield width, [part[:rows] for part in left]
            left = [part[rows:] for part in left]


class OpenShapes(Shapes):
    """Shapes for steps that are not known yet: runs come and go, and each draws its rows in an order of its own.

    The widest holds any row, and a width's labels are enough for whichever rows it can hold.

    Args:
        examples: of every row that a step may draw, one list a row.
        slots, rows: runs at once, and the most rows of one's step.
        most_tokens, most_widths: as in Shapes.
    """

    def __init__(self, examples: Sequence[Sequence[Encoded]], slots: int, rows: int, most_tokens: int, most_widths: int) -> None:
        every = [e for row in examples for e in row]
        lengths = [max(map(length, row)) for row in examples if row]
        self.slots, self.most_tokens = slots, most_tokens
        self.examples = sum(sorted(map(len, examples), reverse=True)[:rows])
        draw = random.Random(0)
        needed: dict[int, int] = {}
        for longest in [max(lengths), *(max(draw.choices(lengths, k=slots * rows)) for _ in range(SAMPLED))]:
            width = -(-longest // GRAIN) * GRAIN
            needed[width] = needed.get(width, 0) + 1
        self.widths = choose_widths(coarser(needed), most_widths)
        self.accumulates = any(self.rows(width) < self.examples for width in self.widths)
        self.capacity, self.dense = {}, {}
        for width in self.widths:
            held = sorted((labels(e) for e in every if length(e) <= width), reverse=True)
            self.capacity[width] = sum(held[: self.rows(width)])
            self.dense[width] = all(length(e) == width == labels(e) for e in every if length(e) <= width) and len(held) >= self.rows(width)


def coarser(needed: dict[int, int]) -> dict[int, int]:
    """At most 64 widths, each joined to the next one up."""
    widths = sorted(needed)
    if len(widths) <= 64:
        return needed
    size = -(-len(widths) // 64)
    groups = [widths[i : i + size] for i in range(0, len(widths), size)]
    return {group[-1]: sum(needed[w] for w in group) for group in groups}


def tokens(micro: Micro) -> tuple[int, int]:
    """(real tokens, padding) of a micro-batch, all slots together."""
    real = sum(length(e) for examples, _ in micro.parts for e in examples)
    return real, len(micro.parts) * micro.shape.cells - real


def solo_steps(examples: Sequence[Sequence[Encoded]], order: Iterable[Sequence[int]]) -> Iterator[list[list[Encoded]]]:
    """A single run's steps for `Shapes`: one slot, the examples of each step's rows."""
    for rows in order:
        yield [list(itertools.chain.from_iterable(examples[r] for r in rows))]
