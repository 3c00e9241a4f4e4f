"""PyTorch's caching allocator on CUDA in numbers alone: which segments a sequence of allocations reserves.

Library of eager.py and fast.py. Rules and sizes are those of c10/cuda/CUDACachingAllocator.cpp with default settings: sizes
are rounded up to 512 bytes, small ones come out of segments of 2 MiB and middling ones of 20 MiB, blocks are split, best fit
is taken and neighbours are joined when freed; every stream and every CUDA graph's pool has blocks of its own. That is where
"reserved" comes from, and with it the memory that a card must have.
"""

from __future__ import annotations

import bisect
import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

MIB = 2**20
GRAIN, SMALL, LARGE_FROM = 512, MIB, 10 * MIB
SMALL_SEGMENT, MIDDLE_SEGMENT, LARGE_GRAIN = 2 * MIB, 20 * MIB, 2 * MIB


class OutOfMemory(Exception):
    """The card that was given is full."""


class Block:
    """A stretch of a segment."""

    __slots__ = ("after", "before", "free", "kind", "number", "place", "size")

    def __init__(self, size: int, place: tuple[int, int, bool], number: int) -> None:
        self.size, self.place, self.number = size, place, number
        self.before: Block | None = None
        self.after: Block | None = None
        self.free, self.kind = False, ""

    @property
    def entry(self) -> tuple[int, int, Block]:
        """In a sorted list of free blocks."""
        return self.size, self.number, self


class Tensor:
    """Memory that is given back when nothing refers to it any more, as a tensor's is."""

    __slots__ = ("__weakref__", "_allocator", "_block", "numbers")

    def __init__(self, allocator: Allocator, block: Block | None, numbers: int) -> None:
        self._allocator, self._block, self.numbers = allocator, block, numbers

    def __del__(self) -> None:
        if self._block is not None:
            self._allocator.give_back(self._block)


@dataclass
class Peak:
    """The most that was reserved; the most that was live, and by what."""

    reserved: int = 0
    allocated: int = 0
    live: dict[str, int] = field(default_factory=dict)


class Allocator:
    """A card's memory.

    Args:
        exact: round nothing and count live bytes (what a CPU's counter is nearer to).
        capacity: bytes of the card that tensors may take; None: no bound. As PyTorch does, segments that nothing lives in are
            given up before an allocation fails.
    """

    def __init__(self, exact: bool = False, capacity: int | None = None) -> None:
        self.exact, self.capacity = exact, capacity
        self.live: dict[str, int] = defaultdict(int)
        self.allocated = self.reserved = 0
        self._peak = Peak()
        self._untold = False
        self._free: dict[tuple[int, int, bool], list[tuple[int, int, Block]]] = defaultdict(list)
        self._stream = self._pool = self._made = 0
        self._streams = self._pools = 0

    def new(self, size: int, kind: str, numbers: int = 0) -> Tensor:
        """`size` bytes, booked to `kind`."""
        if size <= 0:
            return Tensor(self, None, numbers)
        rounded = size if self.exact else -(-size // GRAIN) * GRAIN
        block = self._find(rounded)
        block.kind, block.free = kind, False
        self.live[kind] += block.size
        self.allocated += block.size
        if self.allocated > self._peak.allocated:
            self._peak.allocated, self._untold = self.allocated, True
        if self.reserved > self._peak.reserved:
            self._peak.reserved = self.reserved
        return Tensor(self, block, numbers)

    def give_back(self, block: Block) -> None:
        """A tensor's memory is free; called by the tensor."""
        if self._untold:
            self._tell()
        self.live[block.kind] -= block.size
        self.allocated -= block.size
        if self.exact:
            return
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._take(other)
                self._join(block, other)
        block.free = True
        bisect.insort(self._free[block.place], block.entry)

    def empty_cache(self) -> None:
        """Give up the segments that nothing lives in (a graph's pool keeps its own)."""
        for place, blocks in self._free.items():
            if place[0] == 0:
                self.reserved -= sum(b.size for *_, b in blocks if b.before is None and b.after is None)
                blocks[:] = [held for held in blocks if held[2].before is not None or held[2].after is not None]

    @property
    def peak(self) -> Peak:
        """Since the last reset. On an exact allocator what is live is what is reserved."""
        if self._untold:
            self._tell()
        return Peak(self._peak.allocated, self._peak.allocated, self._peak.live) if self.exact else self._peak

    def _tell(self) -> None:
        self._peak.live, self._untold = dict(self.live), False

    def reset_peak(self) -> None:
        """Count peaks from here on."""
        self._peak = Peak(self.reserved, self.allocated, dict(self.live))
        self._untold = False

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """Allocations inside belong to a new stream."""
        before, self._streams = self._stream, self._streams + 1
        self._stream = self._streams
        yield
        self._stream = before

    def new_pool(self) -> int:
        """A CUDA graph's pool."""
        self._pools += 1
        return self._pools

    @contextlib.contextmanager
    def capture(self, pool: int) -> Iterator[None]:
        """Allocations inside belong to a graph's pool, and stay reserved."""
        before = self._pool, self._stream
        self._pool, self._stream = pool, -1  # all captures share one stream
        yield
        self._pool, self._stream = before

    def drop_pool(self, pool: int) -> None:
        """The graphs of a pool are gone: its segments can be given up."""
        for place in [p for p in self._free if p[0] == pool]:
            for *_, block in self._free.pop(place):
                block.place = (0, -pool - 1, place[2])
                bisect.insort(self._free[block.place], block.entry)

    def _find(self, size: int) -> Block:
        if self.exact:
            return Block(size, (0, 0, False), 0)
        small = size <= SMALL
        place = (self._pool, self._stream, small)
        blocks = self._free[place]
        at = bisect.bisect_left(blocks, (size, -1))
        block = blocks.pop(at)[2] if at < len(blocks) else self._segment(size, place)
        if block.size - size >= (GRAIN if small else SMALL + 1):
            self._split(block, size)
        return block

    def _segment(self, size: int, place: tuple[int, int, bool]) -> Block:
        whole = SMALL_SEGMENT if place[2] else MIDDLE_SEGMENT if size < LARGE_FROM else -(-size // LARGE_GRAIN) * LARGE_GRAIN
        if self.capacity is not None and self.reserved + whole > self.capacity:
            self.empty_cache()
            if self.reserved + whole > self.capacity:
                raise OutOfMemory
        self.reserved += whole
        self._made += 1
        return Block(whole, place, self._made)

    def _split(self, block: Block, size: int) -> None:
        self._made += 1
        rest = Block(block.size - size, block.place, self._made)
        rest.before, rest.after, rest.free = block, block.after, True
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        bisect.insort(self._free[rest.place], rest.entry)

    def _take(self, block: Block) -> None:
        blocks = self._free[block.place]
        at = bisect.bisect_left(blocks, (block.size, block.number))
        assert blocks[at][2] is block
        blocks.pop(at)

    def _join(self, block: Block, other: Block) -> None:
        block.size += other.size
        if block.before is other:
            block.before = other.before
            if other.before is not None:
                other.before.after = block
        else:
            block.after = other.after
            if other.after is not None:
                other.after.before = block
        block.number = min(block.number, other.number)
