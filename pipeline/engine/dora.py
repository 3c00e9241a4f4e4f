"""DoRA's factors (Liu et al., 2024): g = m / n by output row, n = ||W + B A||, which is a constant in backward (the paper's section 4.3).

Library of bind.py; linear.py applies the factors. W + B A is not made: n² = ||W||² + Σ_r (2 W Aᵀ + B (A Aᵀ)) ⊙ B, in fp32. Where B A all but cancels a row
of W, n is as exact as fp32 is at ||W||.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from pipeline.engine import ops
from pipeline.engine.linear import Linears
from pipeline.engine.ops import Tensor


class Magnitudes:
    """The M adapted output rows of a model, and the factors of its stacks.

    Args:
        stacks: those with adapters, of one slot; they are given g and magnitudes.
        m, dm: magnitudes [M] fp32 and their gradient, b: B times alpha / r [M, r], all in the order of the stacks' members.
    """

    def __init__(self, stacks: Sequence[Linears], m: Tensor, dm: Tensor, b: Tensor) -> None:
        self.stacks, self.m, self.b, self.norms = stacks, m, b, torch.ones_like(m)
        ends = list(itertools.accumulate((len(linears.weight()) for linears in stacks), initial=0))
        self.factors = torch.ones(ends[-1], device=m.device)
        rows, squares, at = [], [], 0
        for linears, lo, hi in zip(stacks, ends, ends[1:], strict=False):
            assert linears.a is not None
            linears.g, w = self.factors[lo:hi], linears.weight()[:, : linears.a.shape[2]].float()
            for pair in linears.pairs:
                own = slice(at, at := at + pair.hi - pair.lo)
                linears.magnitudes.append((slice(pair.lo, pair.hi), self.norms[own], dm[own]))
                rows.append(torch.arange(lo + pair.lo, lo + pair.hi, device=m.device))
                # PEFT's m begins as this norm, and the root of its square is it again: with B = 0 every factor is 1, to the bit
                squares.append(torch.linalg.norm(w[pair.lo : pair.hi].contiguous(), dim=1).square())
        self.rows, self.squares = torch.cat(rows), torch.cat(squares)

    def renew(self) -> None:
        """Compute norms and factors of A, B and the magnitudes as they are (a part of the captured update)."""
        crossed, at = torch.empty(self.b.shape, device=self.b.device), 0
        for linears in self.stacks:
            assert linears.a is not None
            a = linears.a[0]
            wa, aa = ops.wide_product(linears.weight()[:, : a.shape[1]], a), ops.wide_product(a, a)
            for columns, pair in linears.members():
                own = slice(at, at := at + pair.hi - pair.lo)
                torch.addmm(wa[pair.lo : pair.hi, columns], self.b[own].float(), aa[columns, columns], beta=2.0, out=crossed[own])
        torch.sqrt(self.squares + crossed.mul_(self.b).sum(1), out=self.norms)
        self.factors.index_copy_(0, self.rows, self.m / self.norms)
