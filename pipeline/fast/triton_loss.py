"""Cross-entropy for CUDA, in Triton: a program handles one row of logits, which its gradient takes the place of (ops.cross_entropy_ has the formula).

Library.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _cross_entropy(logits, targets, weights, loss, vocabulary: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * vocabulary
    target, weight = tl.load(targets + row), tl.load(weights + row)
    lane = tl.arange(0, EACH)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if weight == 0.0:
        tl.store(loss + row, 0.0)
        for at in range(0, vocabulary, EACH * BLOCK):
            tl.store(start + at + lane, 0.0, at + lane < vocabulary)
    else:
        # powers of two: a product and a sum in one operation, then the exponential. EACH numbers a lane: one for each, one for all to rescale the rest
        top = tl.full((BLOCK,), -1e30, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for at in range(0, vocabulary, EACH * BLOCK):
            v = tl.load(start + at + lane, at + lane < vocabulary, float("-inf")).to(tl.float32)
            new = tl.maximum(top, tl.max(v, 0) * LOG2_E)
            total = total * tl.exp2(top - new) + tl.sum(tl.exp2(v * LOG2_E - new[None, :]), 0)
            top = new
        highest = tl.max(top, 0)
        log2_z = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
        gap = tl.load(start + target).to(tl.float32) * LOG2_E - log2_z
        tl.store(loss + row, -weight * gap / LOG2_E)
        tl.debug_barrier()  # the target's logit is read before anything is written there
        for at in range(0, vocabulary, EACH * BLOCK):
            v = tl.load(start + at + lane, at + lane < vocabulary, float("-inf")).to(tl.float32)
            tl.store(start + at + lane, tl.exp2(v * LOG2_E - log2_z) * weight, at + lane < vocabulary)
        tl.debug_barrier()
        tl.store(start + target, (tl.exp2(gap) - 1.0) * weight)


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    n, vocabulary = logits.shape
    loss = torch.empty(n, device=logits.device)
    block = min(8192, triton.next_power_of_2(vocabulary))
    each = min(2, triton.next_power_of_2(triton.cdiv(vocabulary, block)))
    _cross_entropy[(n,)](logits, targets, weights, loss, vocabulary, EACH=each, BLOCK=block, num_warps=32 if block == 8192 else 4)
    return loss
