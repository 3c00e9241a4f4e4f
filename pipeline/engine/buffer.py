"""All trainable numbers in one flat buffer a slot, and AdamW over all of them at once.

Library. A slot is one run (one trial of a packed sweep); a single run has one slot. The model's parameters become views
of `master`, so saving, validating and checkpointing see the trained values without a copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.engine import ops

BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Region:
    """A contiguous part of every slot whose numbers are updated alike."""

    size: int
    scaled: bool = False
    """Whether the compute copy is multiplied by the slot's scale (LoRA's B, by alpha / r)."""
    lr_times: float = 1.0
    """The region's learning rate is so many times the slot's."""


class ParameterBuffer:
    """K slots of P numbers: `master` and `moments` [K, P] fp32, gradients `raw` and a copy `compute` [K, P] in the arithmetic's dtype.

    Args:
        compute_copy: whether there is such a copy (scaled where the region says so); False: `compute` is `master` and gradients are
            fp32 (autograd over the masters themselves).
        accumulate: several micro-batches a step; their gradients are summed in `sum` [K, P] fp32.
    """

    def __init__(self, slots: int, regions: Sequence[Region], device: Any, dtype: Any, compute_copy: bool = True, accumulate: bool = False) -> None:
        size = sum(r.size for r in regions)
        self.slots, self.regions, self.size = slots, tuple(regions), size
        self.master = torch.zeros(slots, size, device=device)
        self.moments = (torch.zeros_like(self.master), torch.zeros_like(self.master))
        self.compute = torch.zeros(slots, size, device=device, dtype=dtype) if compute_copy else self.master
        self.raw = torch.zeros(slots, size, device=device, dtype=dtype if compute_copy else torch.float32)
        self.sum = torch.zeros_like(self.master) if accumulate and compute_copy else None
        self.lr, self.weight_decay, self.max_norm, self.scale = (torch.ones(slots, device=device) for _ in range(4))
        self.count = torch.zeros(slots, device=device, dtype=torch.float64)
        """Optimiser steps taken by each slot."""
        self.dropout = torch.zeros(slots, device=device)
        self.seed = torch.zeros(slots, dtype=torch.long, device=device)
        """Of each slot's dropout."""
        self.squares = torch.zeros(slots, device=device)
        """Of each slot's gradient norm, as the last `norms` found them."""
        self.own: tuple[int, int] | None = None
        """The numbers that this rank updates (`split`); None: all."""
        self.scatter = ops.Scatter([])
        """Copies of parts of `compute` to where products read them; repeated whenever it changes."""
        self.renew: Callable[[], None] = lambda: None
        """Computes again what else follows from the numbers (DoRA's factors), after the copies."""

    @property
    def gradient(self) -> torch.Tensor:
        """The step's gradients [K, P]."""
        return self.raw if self.sum is None else self.sum

    def sync(self) -> None:
        """Make the compute copy of the masters as they are (after loading weights)."""
        if self.compute is not self.master:
            for region, (lo, hi) in self._spans():
                master = self.master[:, lo:hi]
                self.compute[:, lo:hi].copy_(master * self.scale[:, None] if region.scaled else master)
        self.scatter.copy()
        self.renew()

    def accumulate(self) -> None:
        """Add the micro-batch's gradients to the step's (a part of the captured step)."""
        if self.sum is not None:
            self.sum.add_(self.raw)

    def split(self, rank: int, count: int) -> bool:
        """Let this one of `count` ranks update its part of the numbers alone (ZeRO, Rajbhandari et al., 2020, stage 1: the time of it, the moments of the
        others' parts stand still here); False: of these regions, or so many numbers, all are updated by all."""
        if len(self.regions) != 1 or self.regions[0].scaled or self.compute is self.master or self.slots != 1 or self.size % count:
            return False
        part = self.size // count
        self.own = rank * part, (rank + 1) * part
        return True

    def update(self) -> None:
        """Clip by each slot's norm, then AdamW (Loshchilov & Hutter, 2019), as torch.nn.utils.clip_grad_norm_ and torch.optim.AdamW do."""
        self.norms()
        self.apply()

    def norms(self) -> None:
        """The first half of `update`: squares of norms, of this rank's own numbers."""
        squares = torch.zeros_like(self.lr)
        for region, (lo, hi) in self._own_spans():
            part = torch.linalg.vector_norm(self.gradient[:, lo:hi], dim=1, dtype=torch.float32).square()
            squares += part * self.scale.square() if region.scaled else part
        self.squares.copy_(squares)

    def apply(self) -> None:
        """The other half, given the squares of all."""
        gradient = self.gradient
        clip = (self.max_norm / (self.squares.sqrt() + 1e-6)).clamp(max=1.0)
        self.count += 1
        first, root = ((1 - b**self.count).float() for b in BETAS)
        for region, (lo, hi) in self._own_spans():
            copy = None if self.compute is self.master else self.compute[:, lo:hi]
            lr = self.lr * region.lr_times
            ops.adamw_(
                self.master[:, lo:hi], gradient[:, lo:hi], self.moments[0][:, lo:hi], self.moments[1][:, lo:hi], copy, lr / first, 1 - lr * self.weight_decay,
                root.sqrt(), clip * self.scale if region.scaled else clip, self.scale if region.scaled else None, BETAS, EPS,
            )
        self.scatter.copy()
        self.renew()
        if self.sum is not None:
            self.sum.zero_()
        elif self.compute is self.master:
            self.raw.zero_()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the masters."""
        return {"moments": [m.cpu() for m in self.moments], "count": self.count.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state_dict; the masters have been loaded already."""
        for moment, stored in zip(self.moments, state["moments"], strict=True):
            moment.copy_(stored)
        self.count.copy_(state["count"])
        self.sync()

    def clear(self, slot: int) -> None:
        """Zero a slot, so that another run can take it."""
        for tensor in (self.master, self.compute, self.raw, *self.moments, *([self.sum] if self.sum is not None else [])):
            tensor[slot].zero_()
        self.count[slot] = 0

    def _spans(self) -> list[tuple[Region, tuple[int, int]]]:
        ends = list(itertools.accumulate((region.size for region in self.regions), initial=0))
        return list(zip(self.regions, itertools.pairwise(ends), strict=True))

    def _own_spans(self) -> list[tuple[Region, tuple[int, int]]]:
        return self._spans() if self.own is None else [(self.regions[0], self.own)]
