"""Forward and backward of a static batch: by hand where the model is known (llama.py), by autograd over the modules elsewhere.

Library. A program has a Flat, `virtual` (soft tokens before every row) and `run(static)`, which leaves gradients in the Flat
and returns weighted losses [K·labels]; every part of it can be captured.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from pipeline.data import Batch
from pipeline.fast.attend import Heads, attention
from pipeline.fast.bind import Bound, Unsupported
from pipeline.fast.capture import Graphs, stream
from pipeline.fast.flat import Flat, Region
from pipeline.fast.shapes import Micro
from pipeline.fast.static import Static
from pipeline.measure import device_seconds

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
        from pipeline.scoring import autocast

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
