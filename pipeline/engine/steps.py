"""A training step captured once and replayed: its fixed buffers, the two programs (by hand, by autograd), and the stepper that runs them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.data.rows import Batch, Encoded
from pipeline.engine.attention import Heads, Stream, attention
from pipeline.engine.bind import Bound
from pipeline.engine.buffer import Flat, Region
from pipeline.engine.graphs import Graphs, stream
from pipeline.engine.layout import Micro, Shape, Shapes, labels, length, tokens
from pipeline.engine.parts import Unsupported
from pipeline.measure.clock import device_seconds


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


BESIDE = 2**22
"""Numbers of a [tokens, d] tensor up to which weight gradients are made on a stream beside: small products leave a GPU room, large ones none
(`python -m benchmarks.kernels` at 135m, 16 x 64 and at 1b, 8 x 1024)."""


class ByHand:
    """A bound Llama."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.llama, self.flat, self.virtual = bound.llama, bound.flat, bound.llama.virtual

    def prepare(self, rows: int, width: int, packed: bool) -> None:
        """Set memory aside for the largest micro-batch, [rows, width] tokens, and choose its attention kernel by trying those there are (that of rows
        one after another is flash attention)."""
        self.llama.hold(rows * width)
        small = rows * width * self.llama.embedding.shape[1] <= BESIDE
        self.llama.beside = stream("beside") if self.llama.embedding.is_cuda and small else None
        if not packed:
            self.llama.backends = fastest_attention(rows, self.llama.layers[0].heads, width, self.llama.embedding)

    def begin(self, micro: Micro) -> None:
        """Called before a micro-batch is run or replayed."""
        if self.llama.noise is not None:
            self.llama.noise.first.fill_(micro.first)

    def run(self, static: Static) -> torch.Tensor:
        loss = self.llama.step(static.ids, static.at, static.targets, static.weights, static.shape.dense and not self.virtual, static.stream)
        self.flat.keep()
        return loss

    def release(self) -> None:
        """The model's modules own their weights again, and what was set aside is free."""
        for layer in self.llama.layers:
            layer.held = None
        self.bound.release()


class ByAutograd:
    """Any model whose loss torch can differentiate; its parameters and gradients become views of the Flat.

    Args:
        groups: of the optimiser; each holds params and lr, nothing else.

    Raises:
        Unsupported: parameters that are not fp32, or groups with options of their own.
    """

    virtual = 0

    def __init__(self, model: Any, objective: Any, groups: list[dict[str, Any]], lr: float, device: Any, dtype: Any) -> None:
        from pipeline.models.base import autocast

        self.model, self.objective = model, objective
        self.autocast = lambda: autocast(device, dtype, cache=False)
        self.parameters = [p for group in groups for p in group["params"]]
        if any(set(group) - {"params", "lr", "base_lr"} for group in groups):
            raise Unsupported("its optimiser's groups have options of their own")
        if any(p.dtype != torch.float32 for p in self.parameters):
            raise Unsupported("it trains parameters that are not fp32")
        regions = [Region(sum(p.numel() for p in group["params"]), lr_times=group["lr"] / lr) for group in groups]
        self.flat = Flat(1, regions, device, torch.float32, own_copy=False)
        at = 0
        for parameter in self.parameters:
            views = [held[0, at : at + parameter.numel()].view(parameter.shape) for held in (self.flat.master, self.flat.raw)]
            views[0].copy_(parameter.data)
            parameter.data, parameter.grad = views
            at += parameter.numel()

    def prepare(self, rows: int, width: int, packed: bool) -> None:
        self.model.train()

    def begin(self, micro: Micro) -> None:
        """Nothing to do."""

    def run(self, static: Static) -> torch.Tensor:
        places = static.at
        width = static.shape.width
        batch = Batch(static.ids, places // width, places % width, static.targets, static.weights, 0)
        with self.autocast():
            loss = self.objective.loss(self.model, batch)
        loss.backward()
        return loss.detach()[None]

    def release(self) -> None:
        """Let go of the gradients; the parameters keep their values."""
        for parameter in self.parameters:
            parameter.grad = None


def fastest_attention(rows: int, heads: Heads, width: int, like: torch.Tensor) -> list[Any] | None:
    """The attention backend, as a list of one, whose forward and backward take least at this shape on a GPU; None elsewhere (torch chooses).

    like: a tensor of the device and dtype. The choice is by measurement, so two machines may choose differently; all compute the same sums.
    """
    if not like.is_cuda:
        return None
    from torch.nn.attention import SDPBackend

    q, k, v = (
        torch.randn(rows, width, count, heads.width, device=like.device, dtype=like.dtype).transpose(1, 2).requires_grad_()
        for count in (heads.queries, heads.groups, heads.groups)
    )
    seconds = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        graphs = Graphs(like.device)  # a replay takes what the kernels take; a call would take what launching takes
        try:
            seconds[backend] = device_seconds(graphs.capture(functools.partial(_attend_and_back, q, k, v, backend)), like.device)
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
        finally:
            graphs.close()
    return [min(seconds, key=seconds.__getitem__)] if seconds else None


def _attend_and_back(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: Any) -> None:
    output = attention(q, k, v, [backend])
    torch.autograd.grad(output, (q, k, v), output.detach())


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
