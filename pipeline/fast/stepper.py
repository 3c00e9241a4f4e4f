"""Optimiser steps of a single run over static shapes, captured in CUDA graphs where there is CUDA.

Library; pipeline/stepping.py says when it is taken. Two graphs make a step: one of forward and backward for every shape
of micro-batch, one of clipping and AdamW.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeline.data import Encoded
from pipeline.fast.capture import Graphs
from pipeline.fast.programs import ByAutograd, ByHand
from pipeline.fast.shapes import Shapes, tokens
from pipeline.fast.static import Static


class Stepper:
    """Runs optimiser steps of K slots.

    Args:
        program: ByHand or ByAutograd.
        shapes: of all steps to come.
        pad_id: token that fills rows.
    """

    def __init__(self, program: ByHand | ByAutograd, shapes: Shapes, pad_id: int, device: Any) -> None:
        self.program, self.shapes, self.flat = program, shapes, program.flat
        self.slots = self.flat.slots
        self.loss_sum, self.loss = torch.zeros(self.slots, device=device), torch.zeros(self.slots, device=device)
        self.graphs = Graphs(device)
        self.inputs = {s.width: Static(s, self.slots, program.virtual, pad_id, device) for s in shapes.all()}
        self._replay: dict[int, Callable[[], None]] = {}
        self._update: Callable[[], None] | None = None

    def warm(self) -> None:
        """Capture everything. The slots' values are as before; moments and step counts start at zero."""
        largest = max(self.inputs.values(), key=lambda s: s.shape.cells)
        self.program.prepare(len(largest.ids), largest.shape.width + largest.virtual, largest.stream is not None)
        for width, static in self.inputs.items():
            self._replay[width] = self.graphs.capture(functools.partial(self._forward_backward, static))
        self.flat.lr.zero_()
        self._clear_gradients()
        self._update = self.graphs.capture(self._finish)
        for held in (*self.flat.moments, self.flat.count, self.loss_sum, self.loss):
            held.zero_()
        self._clear_gradients()

    def step(self, examples: Sequence[Sequence[Encoded]], lr: Sequence[float]) -> tuple[torch.Tensor, int, int]:
        """(loss [K] on the device, real tokens, padding) of one optimiser step over every slot's examples, at the slots' learning rates."""
        assert self._update is not None, "warm first"
        real = padding = 0
        for micro in self.shapes.micro_batches(examples):
            self.inputs[micro.shape.width].fill(micro)
            self.program.begin(micro)
            self._replay[micro.shape.width]()
            counted = tokens(micro)
            real, padding = real + counted[0], padding + counted[1]
        rates = torch.tensor(lr, dtype=torch.float32)
        self.flat.lr.copy_(rates.pin_memory() if self.flat.lr.is_cuda else rates, non_blocking=True)
        self._update()
        return self.loss.clone(), real, padding

    def close(self) -> None:
        """Free the graphs; parameters keep their values."""
        self._replay.clear()
        self._update = None
        self.graphs.close()

    def _forward_backward(self, static: Static) -> None:
        loss = self.program.run(static)
        self.loss_sum.add_(loss.view(self.slots, -1).sum(1))

    def _finish(self) -> None:
        self.flat.update()
        self.loss.copy_(self.loss_sum)
        self.loss_sum.zero_()

    def _clear_gradients(self) -> None:
        self.flat.raw.zero_()
        if self.flat.sum is not None:
            self.flat.sum.zero_()
