"""Trainable numbers in one flat buffer a slot, and AdamW over all of them at once.

Library. A slot is one run (one trial of a packed sweep); a single run has one slot. The model's parameters become views
of `master`, so saving, validating and checkpointing see the trained values without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.engine import ops

BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Region:
    """A stretch of every slot whose numbers are treated alike."""

    size: int
    scaled: bool = False
    """Whether the compute copy is multiplied by the slot's scale (LoRA's B, by alpha / r)."""
    lr_times: float = 1.0
    """Learning rate of the region over the slot's."""


class Flat:
    """K slots of P numbers: fp32 master, both moments, gradients, and a copy in the arithmetic's dtype.

    Args:
        own_copy: keep `compute`, a copy of the masters in `dtype` (scaled where the region says so); False: the
            gradients are fp32 and nothing reads a copy (autograd over the masters themselves).
        accumulate: several micro-batches a step; gradients are then summed in fp32.
    """

    def __init__(self, slots: int, regions: Sequence[Region], device: Any, dtype: Any, own_copy: bool = True, accumulate: bool = False) -> None:
        size = sum(r.size for r in regions)
        self.slots, self.regions, self.size = slots, tuple(regions), size
        self.master = torch.zeros(slots, size, device=device)
        self.moments = (torch.zeros_like(self.master), torch.zeros_like(self.master))
        self.compute = torch.zeros(slots, size, device=device, dtype=dtype) if own_copy else self.master
        self.raw = torch.zeros(slots, size, device=device, dtype=dtype if own_copy else torch.float32)
        self.sum = torch.zeros_like(self.master) if accumulate and own_copy else None
        self.lr, self.weight_decay, self.max_norm, self.scale = (torch.ones(slots, device=device) for _ in range(4))
        self.count = torch.zeros(slots, device=device, dtype=torch.float64)
        """Optimiser steps taken by each slot."""
        self.dropout = torch.zeros(slots, device=device)
        self.seed = torch.zeros(slots, dtype=torch.long, device=device)
        """Of the slots' dropout."""
        self.places = ops.Places([])
        """Where else parts of the compute copy are needed; written whenever it is."""

    def sync(self) -> None:
        """Make the compute copy of the masters as they are (after loading weights)."""
        if self.compute is not self.master:
            for region, (lo, hi) in self._spans():
                held = self.master[:, lo:hi]
                self.compute[:, lo:hi].copy_(held * self.scale[:, None] if region.scaled else held)
        self.places.copy()

    def keep(self) -> None:
        """Take up the micro-batch's gradients (a part of the captured step)."""
        if self.sum is not None:
            self.sum.add_(self.raw)

    def update(self) -> None:
        """Clip by each slot's norm, then AdamW (Loshchilov & Hutter, 2019), as torch.nn.utils.clip_grad_norm_ and torch.optim.AdamW do."""
        gradient = self.raw if self.sum is None else self.sum
        squares = torch.zeros_like(self.lr)
        for region, (lo, hi) in self._spans():
            part = torch.linalg.vector_norm(gradient[:, lo:hi], dim=1, dtype=torch.float32).square()
            squares += part * self.scale.square() if region.scaled else part
        clip = (self.max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        self.count += 1
        first, root = ((1 - b**self.count).float() for b in BETAS)
        for region, (lo, hi) in self._spans():
            copy = None if self.compute is self.master else self.compute[:, lo:hi]
            lr = self.lr * region.lr_times
            ops.adamw_(
                self.master[:, lo:hi], gradient[:, lo:hi], self.moments[0][:, lo:hi], self.moments[1][:, lo:hi], copy, lr / first, 1 - lr * self.weight_decay,
                root.sqrt(), clip * self.scale if region.scaled else clip, self.scale if region.scaled else None, BETAS, EPS,
            )
        self.places.copy()
        if self.sum is not None:
            self.sum.zero_()
        elif self.compute is self.master:
            self.raw.zero_()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside the masters."""
        return {"moments": [m.cpu() for m in self.moments], "count": self.count.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, held in zip(self.moments, state["moments"], strict=True):
            mine.copy_(held)
        self.count.copy_(state["count"])
        self.sync()

    def clear(self, slot: int) -> None:
        """Forget what a slot held, so that another run can take it."""
        for held in (self.master, self.compute, self.raw, *self.moments, *([self.sum] if self.sum is not None else [])):
            held[slot].zero_()
        self.count[slot] = 0

    def _spans(self) -> list[tuple[Region, tuple[int, int]]]:
        found, at = [], 0
        for region in self.regions:
            found.append((region, (at, at + region.size)))
            at += region.size
        return found
