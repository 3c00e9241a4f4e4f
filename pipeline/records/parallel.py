"""How several GPUs shared a training (train.parallel), as a result keeps it. Library of results.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parallel:
    """One training on several GPUs, or on the CPU in several processes. Times and `Work.tokens_per_s` are of all together."""

    way: str
    """ddp or fsdp."""
    gpus: int
    """The world size."""
    peak_bytes: list[int | None]
    """Of each, while training; `Memory.peak_bytes` is the largest."""
    tokens_per_s: float | None
    """Of each."""
