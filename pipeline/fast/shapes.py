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

GRAIN = 8  # widths are multiples of this
SAMPLED = 256  # steps that are drawn to choose widths where the steps to come are not known


@dataclass(frozen=True)
class Shape:
    """Of one slot's part of a batch: rows [rows, width], labels [labels]; dense: every position is one, in order."""

    rows: int
    width: int
    labels: int
    dense: bool = False


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
        if len(needed) > 64:
            needed = _coarser(needed)
        self.widths = choose_widths(needed, most_widths)
        self.capacity: dict[int, int] = {}
        dense = dict.fromkeys(self.widths, True)
        self.accumulates = False
        for step in held:
            cut = list(self._cut(step))
            self.accumulates |= len(cut) > 1
            for width, parts in cut:
                rows = self.rows(width)
                counts = [sum(map(labels, part)) for part in parts]
                self.capacity[width] = max(self.capacity.get(width, 1), *counts)
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
            first += self.rows(width)

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
        self.widths = choose_widths(_coarser(needed) if len(needed) > 64 else needed, most_widths)
        self.accumulates = any(self.rows(width) < self.examples for width in self.widths)
        self.capacity, self.dense = {}, {}
        for width in self.widths:
            held = sorted((labels(e) for e in every if length(e) <= width), reverse=True)
            self.capacity[width] = sum(held[: self.rows(width)])
            self.dense[width] = all(length(e) == width == labels(e) for e in every if length(e) <= width) and len(held) >= self.rows(width)


def _coarser(needed: dict[int, int]) -> dict[int, int]:
    """At most 64 widths, each joined to the next one up."""
    widths = sorted(needed)
    size = -(-len(widths) // 64)
    groups = [widths[i : i + size] for i in range(0, len(widths), size)]
    return {group[-1]: sum(needed[w] for w in group) for group in groups}


class Static:
    """One shape's input tensors on the device, filled from pinned memory.

    ids [K·rows, width]; at, targets [K·labels]; weights [K·labels] fp32. at counts positions in the flattened
    [K·rows, virtual + width]. Places without a label point at their slot's first position with weight 0.
    """

    def __init__(self, shape: Shape, slots: int, virtual: int, pad_id: int, device: Any) -> None:
        self.shape, self.slots, self.virtual, self.pad_id, self.device = shape, slots, virtual, pad_id, device
        cells, marks = slots * shape.rows * shape.width, slots * shape.labels
        self._whole = torch.zeros(cells + 2 * marks, dtype=torch.long, device=device)
        self.weights = torch.zeros(marks, device=device)
        self.ids = self._whole[:cells].view(-1, shape.width)
        self.at, self.targets = self._whole[cells : cells + marks], self._whole[cells + marks :]

    def fill(self, micro: Micro) -> None:
        """Copy a micro-batch in; returns before the copy has happened."""
        shape, marks = self.shape, self.slots * self.shape.labels
        ids = np.full((self.slots * shape.rows, shape.width), self.pad_id, dtype=np.int64)
        at, targets = np.zeros(marks, dtype=np.int64), np.zeros(marks, dtype=np.int64)
        weights = np.zeros(marks, dtype=np.float32)
        stride = self.virtual + shape.width
        for slot, (examples, counts) in enumerate(micro.parts):
            mark, first = slot * shape.labels, slot * shape.rows
            at[mark : mark + shape.labels] = first * stride
            for row, example in enumerate(examples, first):
                ids[row, : length(example)] = example.ids[:-1]
                n = labels(example)
                at[mark : mark + n] = np.arange(n) + (row * stride + self.virtual + example.start - 1)
                targets[mark : mark + n] = example.ids[example.start :]
                weights[mark : mark + n] = example.weight / counts[example.group]
                mark += n
        whole, scales = torch.from_numpy(np.concatenate((ids.reshape(-1), at, targets))), torch.from_numpy(weights)
        if self._whole.is_cuda:
            whole, scales = whole.pin_memory(), scales.pin_memory()
        self._whole.copy_(whole, non_blocking=True)
        self.weights.copy_(scales, non_blocking=True)


def tokens(micro: Micro) -> tuple[int, int]:
    """(real tokens, padding) of a micro-batch, all slots together."""
    real = sum(length(e) for examples, _ in micro.parts for e in examples)
    return real, len(micro.parts) * micro.shape.rows * micro.shape.width - real


def solo_steps(examples: Sequence[Sequence[Encoded]], order: Iterable[Sequence[int]]) -> Iterator[list[list[Encoded]]]:
    """A single run's steps for `Shapes`: one slot, the examples of each step's rows."""
    for rows in order:
        yield [list(itertools.chain.from_iterable(examples[r] for r in rows))]
