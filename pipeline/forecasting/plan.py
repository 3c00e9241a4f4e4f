"""What a forecast walks through: the run's shape, technique, precision and micro-batches, and the constants that were fitted.

Library of eager.py, fast.py and memory.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.forecasting.shape import Shape
from pipeline.forecasting.trained import Trained


@dataclass(frozen=True)
class MicroBatch:
    """rows x width tokens (padding counted, soft ones not) with so many labelled ones."""

    rows: int
    width: int
    labels: int
    longest: int = 0
    """Tokens of the longest row where rows stand one after another in `width` tokens (then rows is 1)."""
    dense: bool = False
    """Every position carries a label, in order."""


@dataclass(frozen=True)
class Plan:
    """A training run as the forecast sees it."""

    shape: Shape
    trained: Trained
    precision: str
    """How the base is held: fp32, bf16, int8 or nf4."""
    compute: int
    """Bytes of a number of the arithmetic: 2 (bf16) or 4."""
    steps: Sequence[Sequence[MicroBatch]]
    """Of one optimiser step or more, in turn."""
    engine: str
    """eager, hand (the fast engine's hand-written step) or captured (the fast engine with autograd)."""
    gpu: bool = True
    double_quantisation: bool = True
    checkpointing: bool = False
    paged: bool = False
    """bitsandbytes' paged optimiser, whose state is not the allocator's."""
    accumulates: bool = False
    """Whether a step has several micro-batches."""
    warm: bool = False
    """Whether the eager optimiser's states are there from the start (a step like all but the first)."""
    fed: Sequence[tuple[int, int]] = ()
    """(cells of a micro-batch: tokens, padding counted; how many such there are) in the steps that were looked at."""
    looked: int = 0
    """How many steps those were."""

    @property
    def base(self) -> int:
        """Bytes of a number of the base where it is not quantised."""
        return {"fp32": 4, "bf16": 2}.get(self.precision, self.compute)


@dataclass(frozen=True)
class Constants:
    """What the arithmetic does not tell. `python -m benchmarks.forecast fit` sets them (experiments/forecast/)."""

    product_workspace: int = 32 * 2**20
    """Bytes that cuBLAS takes once for every thread and stream that multiplies (32 MiB on Hopper, torch's default)."""
    scale: Mapping[str, float] = field(default_factory=dict)
    """By engine: reserved over simulated bytes beyond the loaded model (kernels' own workspaces, another order of frees); 1 if not there."""
    fixed: Mapping[str, int] = field(default_factory=dict)
    """By engine: bytes beside what is simulated."""
    context: int = 600 * 2**20
    """Bytes of a card that CUDA, its libraries and kernels take outside the allocator."""
    cpu_process: int = 582 * 10**6
    """Resident bytes of a process beside its tensors: 525 MiB before the first step and 30 of libraries and small objects that steps touch."""
