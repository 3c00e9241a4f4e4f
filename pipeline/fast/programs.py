"""Forward and backward of a static batch: by hand where the model is known (llama.py), by autograd over the modules elsewhere.

Library. A program has a Flat, `virtual` (soft tokens before every row) and `run(static)`, which leaves gradients in the Flat
and returns weighted losses [K·labels]; every part of it can be captured.
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.data import Batch
from pipeline.fast.bind import Bound, Unsupported, set_keep
from pipeline.fast.flat import Flat, Region
from pipeline.fast.shapes import Static


class ByHand:
    """A bound Llama."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.llama, self.flat, self.virtual = bound.llama, bound.flat, bound.llama.virtual

    def prepare(self, tokens: int) -> None:
        """`tokens`: in the largest micro-batch."""
        set_keep(self.llama, tokens)

    def run(self, static: Static) -> torch.Tensor:
        loss = self.llama.step(static.ids, static.at, static.targets, static.weights, static.shape.dense and not self.virtual)
        self.flat.keep()
        return loss

    def release(self) -> None:
        """The model's modules own their weights again."""
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

    def prepare(self, tokens: int) -> None:
        self.model.train()

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
