"""A training step captured once and replayed: its static inputs, the two programs (hand-written, autograd), and the stepper that runs them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.data.rows import Batch, Encoded
from pipeline.engine.attention import Heads, Stream, attention
from pipeline.engine.bind import PINNED, Bound
from pipeline.engine.buffer import ParameterBuffer, Region
from pipeline.engine.graphs import Graphs, stream
from pipeline.engine.layout import Micro, Shape, Shapes, labels, length, tokens
from pipeline.engine.parts import Unsupported
from pipeline.measure import turns
from pipeline.measure.clock import device_seconds


class Static:
    """One shape's input tensors on the device, filled from pinned memory.

    ids [K·rows, width] int64 (a stream's: [K, width]); at, targets [K·labels] int64; weights [K·labels] fp32. at: labelled positions in the flattened
    [K·rows, virtual + width]; where there are fewer labels, the rest is the slot's first position with weight 0. stream: where a stream's rows are.
    nll [K·labels] fp32: -log p of the targets as `Stepper.log_p` reads them.
    """

    def __init__(self, shape: Shape, slots: int, virtual: int, pad_id: int, device: Any) -> None:
        self.shape, self.slots, self.virtual, self.pad_id, self.device = shape, slots, virtual, pad_id, device
        size, marks = slots * shape.tokens, slots * shape.labels
        self._whole = torch.zeros(size + 2 * marks, dtype=torch.long, device=device)
        self.weights, self.nll = torch.zeros(marks, device=device), torch.zeros(marks, device=device)
        self.ids = self._whole[:size].view(-1, shape.width)
        self.at, self.targets = self._whole[size : size + marks], self._whole[size + marks :]
        self.stream: Stream | None = None
        if shape.longest:
            ends = torch.zeros(slots * self._sequences + 1, dtype=torch.int32, device=device)
            self.stream = Stream(ends, torch.zeros_like(self._whole[:size]), torch.zeros_like(self._whole[:size]), shape.longest)

    @property
    def _sequences(self) -> int:
        """Rows of a slot's stream: those of the step, and those that its padding is cut into, because no row may be longer than the longest."""
        return self.shape.rows + -(-self.shape.width // self.shape.longest)

    def fill(self, micro: Micro) -> None:
        """Copy a micro-batch in; returns before the copy has happened."""
        shape, marks, size = self.shape, self.slots * self.shape.labels, self.shape.tokens
        ids = np.full(self.slots * size, self.pad_id, dtype=np.int64)
        at, targets = np.zeros(marks, dtype=np.int64), np.zeros(marks, dtype=np.int64)
        weights = np.zeros(marks, dtype=np.float32)
        for slot, (examples, counts) in enumerate(micro.parts):
            mark, begin = slot * shape.labels, slot * size
            at[mark : mark + shape.labels] = begin + slot * shape.rows * self.virtual
            for row, example in enumerate(examples, slot * shape.rows):
                ids[begin : begin + length(example)] = example.ids[:-1]
                n = labels(example)
                at[mark : mark + n] = np.arange(n) + (begin + (row + 1) * self.virtual + example.start - 1)
                targets[mark : mark + n] = example.ids[example.start :]
                weights[mark : mark + n] = np.divide(example.weights, counts[example.group])
                mark += n
                begin += length(example) if shape.longest else shape.width
        self._copy(self._whole, np.concatenate((ids, at, targets)))
        self._copy(self.weights, weights)
        if self.stream:
            self._fill_stream(self.stream, [[length(e) for e in examples] for examples, _ in micro.parts])

    def _fill_stream(self, stream: Stream, lengths: list[list[int]]) -> None:
        """lengths: of each slot's rows."""
        padded = []
        for rows in lengths:
            left = self.shape.width - sum(rows)
            rows = [*rows, *([stream.longest] * (left // stream.longest)), left % stream.longest]
            padded.append(rows + [0] * (self._sequences - len(rows)))
        numbers, sizes = np.tile(np.arange(self._sequences), len(padded)), np.array(padded).reshape(-1)
        ends = np.concatenate(([0], np.cumsum(sizes)))
        self._copy(stream.ends, ends.astype(np.int32))
        self._copy(stream.position, np.arange(ends[-1]) - np.repeat(ends[:-1], sizes))
        self._copy(stream.row, np.repeat(numbers, sizes))

    @staticmethod
    def _copy(to: torch.Tensor, values: np.ndarray) -> None:
        host = torch.from_numpy(values)
        to.copy_(host.pin_memory() if to.is_cuda else host, non_blocking=True)


SIDE_STREAM_MOST = 2**22
"""Numbers of a [tokens, d] tensor up to which weight gradients are made on a side stream: small products leave a GPU's units idle, large ones do not
(`python -m benchmarks.kernels` at 135m, 16 x 64 and at 1b, 8 x 1024)."""


CLEARLY = 0.1
"""Share of its time by which one attention kernel must beat another to be taken in its place."""
APART = 0.03
"""Share by which a captured step's loss and gradient norm may differ from an uncaptured step's: other kernels in bf16 (docs/fast.md)."""


class ByHand:
    """The hand-written step of a bound Llama."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.llama, self.buffer, self.virtual = bound.llama, bound.buffer, bound.llama.virtual

    def set_up(self, rows: int, width: int, streams: bool) -> None:
        """Reserve memory for the largest micro-batch, [rows, width] tokens, and choose its attention kernel by timing (not for
        `streams`, which have flash attention alone)."""
        self.llama.reserve(rows * width)
        small = rows * width * self.llama.embedding.shape[1] <= SIDE_STREAM_MOST
        self.llama.side_stream = stream("side") if self.llama.embedding.is_cuda and small else None
        if not streams:
            self.llama.backends = fastest_attention(rows, self.llama.layers[0].heads, width, self.llama.embedding)

    def check(self) -> None:
        """Nothing can have moved."""

    def begin(self, micro: Micro) -> None:
        """To be called before a micro-batch is run or replayed."""
        if self.llama.noise is not None:
            self.llama.noise.first.fill_(micro.first)

    def run(self, static: Static) -> torch.Tensor:
        loss = self.llama.step(static.ids, static.at, static.targets, static.weights, static.shape.dense and not self.virtual, static.stream)
        self.buffer.accumulate()
        return loss

    def nll(self, static: Static) -> torch.Tensor:
        """-log p of the targets [K·labels] fp32."""
        return self.llama.nll(static.ids, static.at, static.targets, static.shape.dense and not self.virtual, static.stream)

    def release(self) -> None:
        """Give the modules their weights back (Bound.release), and free what was reserved."""
        for layer in self.llama.layers:
            layer.reserved = None
        self.bound.release()


class ByAutograd:
    """The step of any model that torch can differentiate; its parameters and gradients become views of the ParameterBuffer.

    Args:
        groups: of the optimiser; each has params and lr, nothing else.

    Raises:
        Unsupported: parameters that are not fp32, that share memory with other tensors of the model, or groups with options of their own.
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
        if overlap(self.parameters, itertools.chain(model.parameters(), model.buffers())):
            raise Unsupported("parameters that it trains share their memory with other tensors of the model")
        regions = [Region(sum(p.numel() for p in group["params"]), lr_times=group["lr"] / lr) for group in groups]
        self.buffer = ParameterBuffer(1, regions, device, torch.float32, compute_copy=False)
        at = 0
        for parameter in self.parameters:
            views = [numbers[0, at : at + parameter.numel()].view(parameter.shape) for numbers in (self.buffer.master, self.buffer.raw)]
            views[0].copy_(parameter.data)
            parameter.data, parameter.grad = views
            at += parameter.numel()
        self._places = [p.data_ptr() for p in self.parameters]
        PINNED.add(model)

    def set_up(self, rows: int, width: int, streams: bool) -> None:
        """Nothing is reserved."""
        self.model.train()

    def check(self) -> None:
        """To be called after a step. Raises RuntimeError where the model has given a parameter other memory than the buffer's."""
        if [p.data_ptr() for p in self.parameters] != self._places:
            raise RuntimeError("the model gives its parameters other memory in a forward pass")

    def begin(self, micro: Micro) -> None:
        """Nothing to do."""

    def run(self, static: Static) -> torch.Tensor:
        with self.autocast():
            loss = self.objective.loss(self.model, self._batch(static))
        loss.backward()
        return loss.detach()[None]

    def nll(self, static: Static) -> torch.Tensor:
        """-log p of the targets [labels] fp32."""
        with torch.no_grad(), self.autocast():
            return self.objective.nll(self.model, self._batch(static))

    @staticmethod
    def _batch(static: Static) -> Batch:
        at, width = static.at, static.shape.width
        return Batch(static.ids, at // width, at % width, static.targets, static.weights, 0)

    def release(self) -> None:
        """Drop the gradients; the parameters keep their values."""
        PINNED.discard(self.model)
        for parameter in self.parameters:
            parameter.grad = None


def overlap(some: Sequence[torch.Tensor], every: Iterable[torch.Tensor]) -> bool:
    """Whether any of `some` shares memory with another tensor of `every`, which has them, too; the same tensor twice is no other."""
    tensors, asked = {id(t): t for t in every if t.numel()}, {id(t) for t in some}
    furthest = 0, 0  # where the memory seen so far ends, and whose it is
    for start, end, tensor in sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), i) for i, t in tensors.items()):
        if start < furthest[0] and asked & {tensor, furthest[1]}:
            return True
        furthest = max(furthest, (end, tensor))
    return False


def fastest_attention(rows: int, heads: Heads, width: int, like: torch.Tensor) -> list[Any] | None:
    """The attention backend, as a list of one, whose forward and backward are fastest at [rows, width] tokens on a GPU; None elsewhere (torch chooses).

    like: a tensor of the device and dtype. The choice is measured, alone on the device, so that two machines may choose differently; all backends compute
    the same sums, rounded differently: a training with a high rate ends elsewhere.
    """
    if not like.is_cuda:
        return None
    from torch.nn.attention import SDPBackend

    q, k, v = (
        torch.randn(rows, width, count, heads.width, device=like.device, dtype=like.dtype).transpose(1, 2).requires_grad_()
        for count in (heads.queries, heads.groups, heads.groups)
    )
    seconds = {}
    with turns.alone():
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            graphs = Graphs(like.device)  # a replay takes the kernels' time, a call that of launching them
            try:
                seconds[backend] = device_seconds(graphs.capture(functools.partial(_forward_backward_of, q, k, v, backend)), like.device)
            except RuntimeError as error:
                if "out of memory" in str(error):
                    raise
            finally:
                graphs.close()
    return [clearly_fastest(seconds)] if seconds else None


def clearly_fastest(seconds: Mapping[Any, float]) -> Any:
    """The first of what was timed, unless another takes less by more than CLEARLY: of two that are about equal, every run takes the same one."""
    first = next(iter(seconds))
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < (1 - CLEARLY) * seconds[first] else first


def _forward_backward_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: Any) -> None:
    output = attention(q, k, v, [backend])
    torch.autograd.grad(output, (q, k, v), output.detach())


class Together(Protocol):
    """What a step asks of the ranks of a training on several GPUs (training/ranks.py)."""

    rank: int
    count: int

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by their sums over the ranks."""

    def sum_part_(self, flat: torch.Tensor) -> None:
        """The same of this rank's part of a flat tensor; the rest of it is lost."""

    def gather_(self, flat: torch.Tensor) -> None:
        """Replace every part of a flat tensor by that of the rank whose it is."""


class Stepper:
    """Runs optimiser steps of K slots.

    Args:
        program: ByHand or ByAutograd.
        shapes: of all steps to come.
        pad_id: token that fills rows.
        ranks: of a training on several GPUs, which sum gradients between the captured passes and the captured update; None: one GPU.
        reads: whether `log_p` is asked for, with one slot.
    """

    def __init__(self, program: ByHand | ByAutograd, shapes: Shapes, pad_id: int, device: Any, ranks: Together | None = None, reads: bool = False) -> None:
        self.program, self.shapes, self.buffer, self.ranks = program, shapes, program.buffer, ranks
        self.split = ranks is not None and self.buffer.split(ranks.rank, ranks.count)
        """Whether each rank updates a part of the numbers."""
        self.slots = self.buffer.slots
        self.loss_sum, self.loss = torch.zeros(self.slots, device=device), torch.zeros(self.slots, device=device)
        self.graphs = Graphs(device)
        self.inputs = {s.width: Static(s, self.slots, program.virtual, pad_id, device) for s in shapes.all()}
        self.reads = reads
        self._replay: dict[int, Callable[[], None]] = {}
        self._read: dict[int, Callable[[], None]] = {}
        self._update: Callable[[], None] | None = None
        self._norms: Callable[[], None] = self.buffer.norms

    def warm(self, firsts: Mapping[int, Micro] | None = None) -> None:
        """Capture all shapes' forward and backward, and the update. Parameters are unchanged; moments and step counts are zero.

        Args:
            firsts: by width a micro-batch of the run, on which its captured step is compared with an uncaptured one.

        Raises:
            RuntimeError: out of memory, the step cannot be captured, or the captured step computes something else.
        """
        largest = max(self.inputs.values(), key=lambda s: s.shape.tokens)
        self.program.set_up(len(largest.ids), largest.shape.width + largest.virtual, largest.stream is not None)
        for width, static in self.inputs.items():
            if firsts:
                static.fill(firsts[width])
                self.program.begin(firsts[width])
            self._clear_gradients()
            self.loss_sum.zero_()
            self._replay[width] = self.graphs.capture(functools.partial(self._forward_backward, static))
            if self.reads:
                self._read[width] = self.graphs.capture(functools.partial(self._forward, static))
            if firsts:
                self._compare(width)
        self.program.check()
        self.buffer.lr.zero_()
        self._clear_gradients()
        if self.split:
            self._norms = self.graphs.capture(self.buffer.norms)
        self._update = self.graphs.capture(self._finish)
        for tensor in (*self.buffer.moments, self.buffer.count, self.loss_sum, self.loss):
            tensor.zero_()
        self._clear_gradients()

    def _compare(self, width: int) -> None:
        """Compare the replay of what was just captured with the uncaptured run before the capture (which a CPU makes here, where a replay is one)."""
        runs = [self._outcome()] if self.graphs.captures else []
        while len(runs) < 3:  # the third says how far two replays are apart, by dropout for instance
            self._clear_gradients()
            self.loss_sum.zero_()
            self._replay[width]()
            runs.append(self._outcome())
        for what, (uncaptured, first, second) in zip(("loss", "gradient's norm"), zip(*runs, strict=True), strict=True):
            if not abs(first - uncaptured) <= max(APART * abs(uncaptured), 4 * abs(second - first)):  # NaN, too
                raise RuntimeError(f"at width {width} its {what} was {first:.4g}, and {uncaptured:.4g} uncaptured")
        if self.reads:
            self._read[width]()
            static, stepped = self.inputs[width], runs[-1][0]
            read = float(static.nll @ static.weights)
            if not abs(read - stepped) <= APART * max(1.0, abs(stepped)):  # nats, by other kernels
                raise RuntimeError(f"at width {width} the loss of the pass before a step was {read:.4g}, and {stepped:.4g} in the step")

    def _outcome(self) -> tuple[float, float]:
        """(loss, norm of the gradient) since both were cleared, all slots together."""
        return float(self.loss_sum.sum()), float(torch.linalg.vector_norm(self.buffer.raw, dtype=torch.float32))

    def step(self, examples: Sequence[Sequence[Encoded]], lr: Sequence[float], whole: Sequence[Sequence[Encoded]] | None = None
             ) -> tuple[torch.Tensor, int, int]:
        """One optimiser step: (loss [K] fp32 on the device, real tokens, padding), of each slot's examples at each slot's learning rate.

        whole: the examples of all ranks, of which these are this one's; the loss is theirs, the tokens are this one's.
        """
        assert self._update is not None, "warm first"
        real = padding = 0
        if not any(examples):  # a rank without rows
            self._clear_gradients()
        for micro in self.shapes.micro_batches(examples, whole):
            self.inputs[micro.shape.width].fill(micro)
            self.program.begin(micro)
            self._replay[micro.shape.width]()
            counted = tokens(micro)
            real, padding = real + counted[0], padding + counted[1]
        rates = torch.tensor(lr, dtype=torch.float32)
        self.buffer.lr.copy_(rates.pin_memory() if self.buffer.lr.is_cuda else rates, non_blocking=True)
        if self.ranks is not None:
            self._sum(self.ranks)
        self._update()
        if self.ranks is not None and self.split:
            self.ranks.gather_(self.buffer.compute[0])
        return self.loss.clone(), real, padding

    def log_p(self, examples: Sequence[Encoded]) -> list[float]:
        """Log-probability of each example's labelled tokens, their sum, nats, under the weights as they are; waits for the device."""
        sums: dict[int, float] = {}
        for micro in self.shapes.micro_batches([examples]):
            static, (part, _) = self.inputs[micro.shape.width], micro.parts[0]
            static.fill(micro)
            self._read[micro.shape.width]()
            ends = list(itertools.accumulate(map(labels, part), initial=0))
            nll = static.nll.cpu().double()
            sums |= {id(example): -float(nll[lo:hi].sum()) for example, lo, hi in zip(part, ends, ends[1:], strict=False)}
        return [sums[id(example)] for example in examples]

    def _sum(self, ranks: Together) -> None:
        """Gradients and loss over the ranks; where they are split, of the former each rank its part, and their norm."""
        if self.split:
            ranks.sum_part_(self.buffer.gradient[0])
            self._norms()
            ranks.sum_([self.buffer.squares])
        else:
            ranks.sum_([self.buffer.gradient])
        ranks.sum_([self.loss_sum])

    def gather(self) -> None:
        """Bring all ranks' masters and moments here, where each has updated a part. For all ranks to call."""
        if self.ranks is not None and self.split:
            for tensor in (self.buffer.master, *self.buffer.moments):
                self.ranks.gather_(tensor[0])

    def close(self) -> None:
        """Free the graphs; parameters keep their values."""
        self._replay.clear()
        self._read.clear()
        self._update = None
        self.graphs.close()

    def _forward_backward(self, static: Static) -> None:
        loss = self.program.run(static)
        self.loss_sum.add_(loss.view(self.slots, -1).sum(1))

    def _forward(self, static: Static) -> None:
        static.nll.copy_(self.program.nll(static))

    def _finish(self) -> None:
        if not self.split:
            self.buffer.norms()
        self.buffer.apply()
        self.loss.copy_(self.loss_sum)
        self.loss_sum.zero_()

    def _clear_gradients(self) -> None:
        self.buffer.raw.zero_()
        if self.buffer.sum is not None:
            self.buffer.sum.zero_()
