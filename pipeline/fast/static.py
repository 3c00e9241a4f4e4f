"""The input tensors of a static shape, filled from pinned memory: what a CUDA graph reads.

Library of stepper.py; shapes.py says which shapes a run has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.fast.attend import Stream
from pipeline.fast.shapes import Micro, Shape, labels, length


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
