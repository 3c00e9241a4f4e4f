"""Batches of few static shapes: what a CUDA graph needs, and what keeps padding small.

Library; without torch, because a forecast needs it before anything heavy is imported (steps.py has the tensors). The steps of a run
are known before it starts (data.rows.step_rows is a function of seed and step), so the widths that a run uses, and the labels of a
batch of each width, are chosen from all its steps.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.data.rows import Encoded, labelled_tokens

GRAIN = 8  # widths are multiples of this
TILE, LONG = 64, 2048  # of a product's inner length: a kernel's tile, and the length from which a part of a tile costs more than padding to all of it
STEPS_A_WIDTH = 24  # one more width (one more capture) pays if that many steps can use it
MOST_WIDTHS = 6
LOGITS_AT_ONCE = 2**28  # numbers of the [chunk, V] logits that exist at a time, roughly
ROWS_AT_ONCE = 16  # rows of logits that plain torch works on at a time, so that a CPU still has them in its cache
NORM_PROGRAMS = 264  # programs of the norm's backward kernel where its weight is trained
NEARLY_ZERO = 2.0**-40  # a norm's weight of 0: its output adds nothing that a sum could hold, and divided by it is still the norm's input
SUMMED_FP32 = 2**28  # trained numbers up to which several GPUs sum gradients in fp32; above, a step of one pass sums them as they are, half the bytes
SAMPLED = 256  # steps that are drawn to choose widths where the steps are not known


@dataclass(frozen=True)
class Shape:
    """Of one slot's part of a batch: ids [rows, width], labels [labels]; dense: every position is labelled.

    longest: of a stream, most tokens of a row; its ids are [width], rows one after another. 0: rows of equal width.
    """

    rows: int
    width: int
    labels: int
    dense: bool = False
    longest: int = 0

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.width if self.longest else self.rows * self.width


@dataclass(frozen=True)
class Micro:
    """A micro-batch: its shape, and by slot its examples and {group: labelled tokens of the slot's whole step}."""

    shape: Shape
    parts: list[tuple[list[Encoded], dict[str, int]]]
    first: int = 0
    """Rows of a slot in the step's earlier micro-batches."""


def length(example: Encoded) -> int:
    """Tokens that the model gets: the last one predicts nothing."""
    return len(example.ids) - 1


def labels(example: Encoded) -> int:
    return len(example.ids) - example.start


def rounded(tokens: int) -> int:
    """The width of a row of so many tokens."""
    return -(-tokens // GRAIN) * GRAIN


def padded(columns: int, inner: int) -> int:
    """Columns for adapters beside a product's `inner` others: `columns`, rounded up to whole tiles where those are small against `inner`."""
    grain = TILE if inner >= LONG else GRAIN
    return -(-columns // grain) * grain


def logits_rows(vocabulary: int) -> int:
    """Rows of a chunk of logits; whole tiles of a product where there are several."""
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    return rows - rows % 256 if rows > 256 else rows


def choose_widths(needed: dict[int, int], most: int) -> list[int]:
    """At most `most` widths such that padding every batch up to the next one wastes least.

    Args:
        needed: width -> how many batches need it.
    """
    widths = sorted(needed)
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [])}
    for end in range(1, len(widths) + 1):
        for used in range(1, most + 1):
            options = [
                (cost + widths[end - 1] * sum(needed[w] for w in widths[start:end]), [*chosen, widths[end - 1]])
                for start in range(end) for cost, chosen in [best.get((start, used - 1), (float("inf"), []))] if cost < float("inf")
            ]
            if options:
                best[end, used] = min(options)
    return min(best[len(widths), used] for used in range(1, most + 1) if (len(widths), used) in best)[1]


class Shapes:
    """The static shapes of a run and the micro-batches of each step.

    Args:
        steps: every step as its slots' examples; iterated once; a slot may have none.
        most_tokens: of a micro-batch, all slots together (one row a slot at least).
        most_widths: how many widths to choose.
    """

    def __init__(self, steps: Iterable[Sequence[Sequence[Encoded]]], most_tokens: int, most_widths: int) -> None:
        self.most_tokens = most_tokens
        needed: dict[int, int] = {}
        self.examples = 1
        filled = []
        for step in steps:
            longest = max((length(e) for part in step for e in part), default=0)
            self.slots = len(step)
            self.examples = max(self.examples, *(len(part) for part in step))
            if any(step):
                width = rounded(longest)
                needed[width] = needed.get(width, 0) + 1
                filled.append(step)
        self.widths = choose_widths(coarser(needed), most_widths)
        self.capacity: dict[int, int] = {}
        """Width -> labels of a slot in a micro-batch."""
        self.fed: dict[int, int] = {}
        """Width -> micro-batches of all steps."""
        dense = dict.fromkeys(self.widths, True)
        self.accumulates = False
        for step in filled:
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
        """Every shape, the largest first."""
        return [self.shape(width) for width in sorted(self.capacity, reverse=True)]

    def shape(self, width: int) -> Shape:
        return Shape(self.rows(width), width, self.capacity[width], self.dense[width])

    def micro_batches(self, step: Sequence[Sequence[Encoded]], whole: Sequence[Sequence[Encoded]] | None = None) -> Iterator[Micro]:
        """The micro-batches of one step; their weighted losses sum to the step's loss. whole: by slot the examples of which `step` is this rank's part."""
        counts = [labelled_tokens(part) for part in whole or step]
        first = 0
        for width, parts in self._cut(step):
            yield Micro(self.shape(width), list(zip(parts, counts, strict=True)), first)
            first += max(map(len, parts))

    def cost(self, least: float) -> float:
        """Tokens of all steps, padding included, where a micro-batch of fewer than `least` tokens counts as `least` (they take as long)."""
        return sum(count * max(self.slots * self.shape(width).tokens, least) for width, count in self.fed.items())

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
    """Shapes for steps that are not known yet, because runs come and go and each draws its rows in its own order, or texts are still to be sampled.

    The widest fits any row, and a width has labels for whichever rows it fits.

    Args:
        examples: of every row that a step may draw, one list a row.
        slots, rows: runs at once, and the most rows of a run's step.
        most_tokens, most_widths: as in Shapes.
        most_labels: of an example, where these are as long as theirs can become; None: they are the ones to come.
    """

    def __init__(self, examples: Sequence[Sequence[Encoded]], slots: int, rows: int, most_tokens: int, most_widths: int,
                 most_labels: int | None = None) -> None:
        every = [e for row in examples for e in row]
        lengths = [max(map(length, row)) for row in examples if row]
        self.slots, self.most_tokens = slots, most_tokens
        self.examples = sum(sorted(map(len, examples), reverse=True)[:rows])
        draw = random.Random(0)
        needed: dict[int, int] = {}
        for longest in [max(lengths), *(max(draw.choices(lengths, k=slots * rows)) for _ in range(SAMPLED))]:
            width = rounded(longest)
            needed[width] = needed.get(width, 0) + 1
        self.widths = choose_widths(coarser(needed), most_widths)
        self.accumulates = any(self.rows(width) < self.examples for width in self.widths)
        self.capacity, self.dense = {}, {}
        for width in self.widths:
            if most_labels is not None:
                self.capacity[width], self.dense[width] = self.rows(width) * most_labels, False
                continue
            fitting = [e for e in every if length(e) <= width]
            self.capacity[width] = sum(sorted(map(labels, fitting), reverse=True)[: self.rows(width)])
            self.dense[width] = all(length(e) == width == labels(e) for e in fitting) and len(fitting) >= self.rows(width)


def coarser(needed: dict[int, int]) -> dict[int, int]:
    """At most 64 widths, neighbours joined into the widest of them; needed: width -> how many batches need it."""
    widths = sorted(needed)
    if len(widths) <= 64:
        return needed
    size = -(-len(widths) // 64)
    groups = [widths[i : i + size] for i in range(0, len(widths), size)]
    return {group[-1]: sum(needed[w] for w in group) for group in groups}


def tokens(micro: Micro) -> tuple[int, int]:
    """(real tokens, padding) of a micro-batch, all slots together."""
    real = sum(length(e) for examples, _ in micro.parts for e in examples)
    return real, len(micro.parts) * micro.shape.tokens - real


def solo_steps(examples: Sequence[Sequence[Encoded]], order: Iterable[Sequence[int]]) -> Iterator[list[list[Encoded]]]:
    """A single run's steps for `Shapes`: one slot, the examples of each step's rows."""
    for rows in order:
        yield [list(itertools.chain.from_iterable(examples[r] for r in rows))]
