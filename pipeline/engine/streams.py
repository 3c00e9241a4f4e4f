"""Padding-free steps (`train.padding_free`): a step's rows one after another in one stream of tokens, padded at its end alone; attention within a row.

Library of stepping.py. Sizes take the place of widths: a run's streams have few different lengths, each with its CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pipeline.core.settings import Train
from pipeline.data.rows import Encoded
from pipeline.engine.layout import MOST_WIDTHS, STEPS_A_WIDTH, Shape, Shapes, choose_widths, coarser, labels, length, rounded, solo_steps

SIZE = 32
"""Sizes of streams are multiples of this."""
WORTH = 0.9
"""Streams are used where they cost at most this share of what rows of equal width cost: their attention kernel is no faster than the others."""
LAYER_S, RATE = 2e-4, 2e14
"""Seconds that a layer's kernels take, forward and backward, however few tokens there are, and FLOP/s of the device: from where on tokens matter."""


class Streams(Shapes):
    """The streams of a run with one slot. `widths` are their sizes in tokens.

    Args:
        steps, most_tokens: as in Shapes; most_sizes: how many sizes to choose.
    """

    def __init__(self, steps: Iterable[Sequence[Sequence[Encoded]]], most_tokens: int, most_sizes: int) -> None:
        self.slots, self.most_tokens, self.accumulates = 1, most_tokens, False
        parts = []
        for step in steps:
            cut = list(self._parts(step[0]))
            self.accumulates |= len(cut) > 1
            parts += cut
        needed: dict[int, int] = {}
        for part in parts:
            needed[_size(part)] = needed.get(_size(part), 0) + 1
        self.widths = choose_widths(coarser(needed), most_sizes)
        self.longest = max(rounded(length(e)) for part in parts for e in part)
        self.most_rows: dict[int, int] = {}
        self.capacity, self.fed = {}, {}
        for part in parts:
            size = self._fits(part)
            self.most_rows[size] = max(self.most_rows.get(size, 1), len(part))
            self.capacity[size] = max(self.capacity.get(size, 1), sum(map(labels, part)))
            self.fed[size] = self.fed.get(size, 0) + 1

    def rows(self, width: int) -> int:
        return self.most_rows[width]

    def shape(self, width: int) -> Shape:
        return Shape(self.most_rows[width], width, self.capacity[width], longest=self.longest)

    def _cut(self, step: Sequence[Sequence[Encoded]]) -> Iterator[tuple[int, list[list[Encoded]]]]:
        for part in self._parts(step[0]):
            yield self._fits(part), [part]

    def _parts(self, examples: Sequence[Encoded]) -> Iterator[list[Encoded]]:
        """As many rows as fit in a micro-batch at a time, the longest first."""
        part: list[Encoded] = []
        for example in sorted(examples, key=length, reverse=True):
            if part and sum(map(length, part)) + length(example) > self.most_tokens:
                yield part
                part = []
            part.append(example)
        if part:
            yield part

    def _fits(self, part: list[Encoded]) -> int:
        return next(width for width in self.widths if width >= sum(map(length, part)))


def _size(part: list[Encoded]) -> int:
    return -(-sum(map(length, part)) // SIZE) * SIZE


def shapes_of_run(examples: Sequence[Sequence[Encoded]], settings: Train, orders: Sequence[Sequence[int]], total: int, streamable: bool, layers: int,
           parameters: int) -> tuple[Shapes, Streams | None]:
    """The shapes of a single run's rows at equal width, and of its streams where those are to be used instead.

    Args:
        orders: the rows of each step; total: how many steps there are.
        streamable: whether attention within the rows of a stream is available. layers, parameters: of the model.
    """
    most = max(1, min(MOST_WIDTHS, total // STEPS_A_WIDTH))
    buckets = Shapes(solo_steps(examples, orders), settings.micro_batch_tokens, most)
    if settings.padding_free == "never" or not streamable:
        return buckets, None
    streams = Streams(solo_steps(examples, orders), settings.micro_batch_tokens, most)
    return buckets, streams if settings.padding_free == "always" or worth_it(streams, buckets, least_tokens(layers, parameters)) else None


def least_tokens(layers: int, parameters: int) -> float:
    """An estimate of the tokens below which a micro-batch takes no less time."""
    return layers * LAYER_S * RATE / (4 * parameters)


def worth_it(streams: Streams, buckets: Shapes, least: float) -> bool:
    """Whether streams of a run cost less than its rows of equal width by enough; least: as in Shapes.cost."""
    return streams.cost(least) <= WORTH * buckets.cost(least)
