"""Where tensors lie, in numbers alone: PyTorch's caching allocator on CUDA, and glibc's heap on a CPU.

Library of eager.py and fast.py. What a sequence of allocations reserves is more than what is live at a time; it is the memory that
a card, or a machine, must have.
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
MAPPED_FROM = 32 * MIB
"""glibc: DEFAULT_MMAP_THRESHOLD_MAX, which the threshold has reached once a model has been read."""
HEAP, MAPPED = (0, 0, False), (1, 0, False)
ALIGNED = 96
"""glibc: bytes that posix_memalign looks for beside a tensor's own, to begin it at a multiple of 64."""
OCCUPIED = 2
"""In a forward pass, autograd's objects lie in one of so many rests (by measured peaks: docs/forecast.md)."""


class OutOfMemory(Exception):
    """The card is full."""


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
    """Memory that is freed when nothing refers to it any more, as a tensor's is."""

    __slots__ = ("__weakref__", "_allocator", "_block", "numbers")

    def __init__(self, allocator: Allocator, block: Block | None, numbers: int) -> None:
        self._allocator, self._block, self.numbers = allocator, block, numbers

    def __del__(self) -> None:
        if self._block is not None:
            self._allocator.give_back(self._block)
            self._block = None

    def __enter__(self) -> None:
        """Given back where the block ends."""

    def __exit__(self, *_: object) -> None:
        self.__del__()


@dataclass
class Peak:
    """The most that was reserved; the most that was live, and by what."""

    reserved: int = 0
    allocated: int = 0
    live: dict[str, int] = field(default_factory=dict)


class Allocator:
    """A card's memory.

    Rules and sizes are those of c10/cuda/CUDACachingAllocator.cpp with default settings: sizes are rounded up to 512 bytes, small ones
    come out of segments of 2 MiB and middling ones of 20 MiB, blocks are split, best fit is taken and neighbours are joined when freed;
    every stream and every CUDA graph's pool has blocks of its own.

    Args:
        capacity: bytes of the card that tensors may take; None: no bound. As PyTorch does, segments that nothing lives in are
            released before an allocation fails.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.live: dict[str, int] = defaultdict(int)
        self.allocated = self.reserved = 0
        self._peak = Peak()
        self._unread = False
        self._free: dict[tuple[int, int, bool], list[tuple[int, int, Block]]] = defaultdict(list)
        self._stream = self._pool = self._made = 0
        self._streams = self._pools = 0

    def new(self, size: int, kind: str, numbers: int = 0) -> Tensor:
        """`size` bytes, booked to `kind`."""
        if size <= 0:
            return Tensor(self, None, numbers)
        block = self._find(size)
        block.kind, block.free = kind, False
        self.live[kind] += block.size
        self.allocated += block.size
        if self.allocated > self._peak.allocated:
            self._peak.allocated, self._unread = self.allocated, True
        if self.reserved > self._peak.reserved:
            self._peak.reserved = self.reserved
        return Tensor(self, block, numbers)

    def give_back(self, block: Block) -> None:
        """A tensor's memory is free; called by the tensor."""
        if self._unread:
            self._note()
        self.live[block.kind] -= block.size
        self.allocated -= block.size
        self._free_block(block)

    def _free_block(self, block: Block) -> None:
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
                blocks[:] = [entry for entry in blocks if entry[2].before is not None or entry[2].after is not None]

    @property
    def peak(self) -> Peak:
        """Since the last reset."""
        if self._unread:
            self._note()
        return self._peak

    def _note(self) -> None:
        self._peak.live, self._unread = dict(self.live), False

    def reset_peak(self) -> None:
        self._peak = Peak(self.reserved, self.allocated, dict(self.live))
        self._unread = False

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
        """The graphs of a pool are gone: its segments can be released."""
        for place in [p for p in self._free if p[0] == pool]:
            for *_, block in self._free.pop(place):
                block.place = (0, -pool - 1, place[2])
                bisect.insort(self._free[block.place], block.entry)

    def forward_pass(self) -> contextlib.AbstractContextManager[None]:
        """Allocations inside are a forward pass's: autograd makes its objects between them."""
        return contextlib.nullcontext()

    def graph_freed(self) -> None:
        """The backward pass has freed autograd's objects."""

    def _find(self, size: int) -> Block:
        size = -(-size // GRAIN) * GRAIN
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


class Heap(Allocator):
    """A process's memory under glibc, where a CPU's tensors lie: what is reserved is what stays resident.

    Best fit, blocks are split, neighbours are joined when freed; where nothing fits the heap grows at its end, and it does not shrink.
    Large tensors are mapped by themselves and unmapped at once. posix_memalign looks for `ALIGNED` bytes more than it keeps and gives the
    rest back. In a forward pass autograd's own small objects come to lie in such rests, so the hole that a tensor leaves is too small for
    an equal one until the graph is gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: Block | None = None
        self._graph: list[Block] = []
        """Rests that autograd's objects lie in."""
        self._forward, self._count = False, 0

    def empty_cache(self) -> None:
        """Nothing is cached."""

    @contextlib.contextmanager
    def forward_pass(self) -> Iterator[None]:
        self._forward = True
        yield
        self._forward = False

    def graph_freed(self) -> None:
        while self._graph:
            self._free_block(self._graph.pop())

    def _find(self, size: int) -> Block:
        blocks = self._free[HEAP]
        at = bisect.bisect_left(blocks, (size + ALIGNED, -1))
        if at == len(blocks) and size >= MAPPED_FROM:
            self.reserved += size
            return Block(size, MAPPED, 0)
        block = blocks.pop(at)[2] if at < len(blocks) else self._grown(size + ALIGNED)
        self._split(block, size)
        self._count += 1
        if self._forward and self._count % OCCUPIED == 0:
            self._occupy(block.after)
        return block

    def _grown(self, size: int) -> Block:
        """The heap's last block if it is free, or a new one there, with so many bytes."""
        block = self._last
        if block is not None and block.free:
            self._take(block)
            self.reserved += size - block.size
            block.size = size
            return block
        self.reserved += size
        self._made += 1
        last = Block(size, HEAP, self._made)
        last.before = block
        if block is not None:
            block.after = last
        self._last = last
        return last

    def _occupy(self, rest: Block | None) -> None:
        assert rest is not None
        self._take(rest)
        if rest.size > ALIGNED:
            self._split(rest, ALIGNED)
        rest.free = False
        self._graph.append(rest)

    def _split(self, block: Block, size: int) -> None:
        super()._split(block, size)
        if block is self._last:
            self._last = block.after

    def _join(self, block: Block, other: Block) -> None:
        super()._join(block, other)
        if other is self._last:
            self._last = block

    def _free_block(self, block: Block) -> None:
        if block.place == MAPPED:
            self.reserved -= block.size
        else:
            super()._free_block(block)
