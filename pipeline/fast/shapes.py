"""Batches of few static shapes: what a CUDA graph needs, and what keeps padding small.

Library. The steps of a run are known before it starts (data.step_rows is a function of seed and step), so the widths
that a run uses are chosen from all its steps, and so is how many labels a batch of each width can hold.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.data import Encoded
from pipeline.fast.attend import Stream

GRAIN = 8  # widths are multiples of this
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


class Static:
    """One shape's input tensors on the device, filled from pinned memory.

    ids [K·rows, width] (a stream's: [K, width]); at, targets [K·labels]; weights [K·labels] fp32. at counts positions in the flattened
    [K·rows, virtual + width]. Places without a label point at their slot's first position with weight 0. stream: None, or where its rows are.
    """

    def __init__(self, shape: Shape, slots: int, virtual: int, pad_id: int, device: Any) -> None:
        self.shape, self.slots, self.virtual, self.pad_id, self.device = shape, slots, virtual, pad_id, device
        cells, marks = slots * shape.cells, slots * shape.labels
        self._whole = torch.zeros(cells + 2 * marks, dtype=torch.long, device=device)
        self.weights = torch.zeros(marks, device=device)
        self.ids = self._whole[:cells].view(-1, shape.width)
        self.at, self.targets = self._whole[cells : cells + marks], self._whole[cells + marks :]
        self.stream: Stream | None = None
        if shape.longest:
            ends = torch.zeros(slots * self._sequences + 1, dtype=torch.int32, device=device)
            self.stream = Stream(ends, torch.zeros_like(self._whole[:cells]), torch.zeros_like(self._whole[:cells]), shape.longest)

    @property
    def _sequences(self) -> int:
        """A stream's rows a slot: those of the step, and what the rest is cut into, because no row may be longer than the longest."""
        return self.shape.rows + -(-self.shape.width // self.shape.longest)

    def fill(self, micro: Micro) -> None:
        """Copy a micro-batch in; returns before the copy has happened."""
        shape, marks, cells = self.shape, self.slots * self.shape.labels, self.shape.cells
        ids = np.full(self.slots * cells, self.pad_id, dtype=np.int64)
        at, targets = np.zeros(marks, dtype=np.int64), np.zeros(marks, dtype=np.int64)
        weights = np.zeros(marks, dtype=np.float32)
        for slot, (examples, counts) in enumerate(micro.parts):
            mark, begin = slot * shape.labels, slot * cells
            at[mark : mark + shape.labels] = begin + slot * shape.rows * self.virtual
            for row, example in enumerate(examples, slot * shape.rows):
                ids[begin : begin + length(example)] = example.ids[:-1]
                n = labels(example)
                at[mark : mark + n] = np.arange(n) + (begin + (row + 1) * self.virtual + example.start - 1)
                targets[mark : mark + n] = example.ids[example.start :]
                weights[mark : mark + n] = example.weight / counts[example.group]
                mark += n
                begin += length(example) if shape.longest else shape.width
        self._copy(self._whole, np.concatenate((ids, at, targets)))
        self._copy(self.weights, weights)
        if self.stream:
            self._fill_stream(self.stream, [[length(e) for e in examples] for examples, _ in micro.parts])

    def _fill_stream(self, stream: Stream, lengths: list[list[int]]) -> None:
        sizes = []
        for own in lengths:
            left = self.shape.width - sum(own)
            own = [*own, *([stream.longest] * (left // stream.longest)), left % stream.longest]
            sizes.append(own + [0] * (self._sequences - len(own)))
        every = np.array(sizes)
        numbers, flat = np.tile(np.arange(every.shape[1]), len(sizes)), every.reshape(-1)
        ends = np.concatenate(([0], np.cumsum(flat)))
        self._copy(stream.ends, ends.astype(np.int32))
        self._copy(stream.position, np.arange(ends[-1]) - np.repeat(ends[:-1], flat))
        self._copy(stream.row, np.repeat(numbers, flat))

    @staticmethod
    def _copy(to: torch.Tensor, values: np.ndarray) -> None:
        host = torch.from_numpy(values)
        to.copy_(host.pin_memory() if to.is_cuda else host, non_blocking=True)


def tokens(micro: Micro) -> tuple[int, int]:
    """(real tokens, padding) of a micro-batch, all slots together."""
    real = sum(length(e) for examples, _ in micro.parts for e in examples)
    return real, len(micro.parts) * micro.shape.cells - real


def solo_steps(examples: Sequence[Sequence[Encoded]], order: Iterable[Sequence[int]]) -> Iterator[list[list[Encoded]]]:
    """A single run's steps for `Shapes`: one slot, the examples of each step's rows."""
    for rows in order:
        yield [list(itertools.chain.from_iterable(examples[r] for r in rows))]
