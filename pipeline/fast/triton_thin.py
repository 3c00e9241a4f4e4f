"""Thin products for CUDA, in Triton: pᵀ x of long tensors where p is a few numbers wide, the gradients of adapters (ops.thin_).

Library. The rows are shared out among programs, whose sums a second kernel adds in a fixed order: the same numbers at every call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor


@triton.jit
def _thin(p, x, partial, n, d, rank, rows, p_stride, x_stride, end0, end1, R: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    first = tl.program_id(0) * BD
    part = tl.program_id(1)
    col = first + tl.arange(0, BD)
    at = tl.arange(0, R)
    member = (first >= end0).to(tl.int32) + (first >= end1).to(tl.int32)
    total = tl.zeros((R, BD), tl.float32)
    for start in range(part * rows, min(n, (part + 1) * rows), BN):
        row = (start + tl.arange(0, BN)).to(tl.int64)
        narrow = tl.load(p + row[None, :] * p_stride + (member * rank + at)[:, None], (row < n)[None, :] & (at < rank)[:, None], 0.0)
        wide = tl.load(x + row[:, None] * x_stride + col[None, :], (row < n)[:, None] & (col < d)[None, :], 0.0)
        total = tl.dot(narrow, wide, total)
    to = partial + (part * rank + at)[:, None].to(tl.int64) * d + col[None, :]
    tl.store(to, total, (at < rank)[:, None] & (col < d)[None, :])


@triton.jit
def _thin_sum(partial, out, d, rank, parts, r_stride, d_stride, R: tl.constexpr, BD: tl.constexpr):
    col = tl.program_id(0) * BD + tl.arange(0, BD)
    at = tl.arange(0, R)
    live = (at < rank)[:, None] & (col < d)[None, :]
    total = tl.zeros((R, BD), tl.float32)
    for part in range(parts):
        total += tl.load(partial + (part * rank + at)[:, None].to(tl.int64) * d + col[None, :], live, 0.0)
    tl.store(out + at[:, None].to(tl.int64) * r_stride + col[None, :] * d_stride, total, live)


def thin_(out: Tensor, p: Tensor, x: Tensor, ends: list[int]) -> bool:
    """False where cuBLAS is to do it: in fp32, for wide adapters and for members that do not end with a block."""
    (rank, d), n = out.shape, len(x)
    block = 128 if d >= 2048 else 64
    if x.dtype == torch.float32 or rank > 64 or len(ends) > 3 or any(end % block for end in ends[:-1]) or p.stride(1) != 1 or x.stride(1) != 1:
        return False
    columns = triton.cdiv(d, block)
    parts = max(1, min(triton.cdiv(264, columns), n // 128))
    rows = triton.cdiv(triton.cdiv(n, parts), 64) * 64
    parts = triton.cdiv(n, rows)
    partial = torch.empty(parts, rank, d, device=x.device)
    before = [*ends[:-1], d, d][:2]
    high = max(16, triton.next_power_of_2(rank))
    _thin[(columns, parts)](p, x, partial, n, d, rank, rows, p.stride(0), x.stride(0), *before, R=high, BN=64, BD=block, num_warps=4, num_stages=4)
    _thin_sum[(triton.cdiv(d, 64),)](partial, out, d, rank, parts, out.stride(0), out.stride(1), R=high, BD=64, num_warps=4)
    return True
