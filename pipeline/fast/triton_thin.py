"""Thin products for CUDA, in Triton: pᵀ x of long tensors where p is a few numbers wide, the gradients of adapters (ops.thin_).

Library. The rows are shared out among programs; whichever ends last adds up what all of them found, in a fixed order: the same numbers at
every call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor
COUNTERS = 1024
_COUNTERS: dict[torch.device, Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """[COUNTERS] int32, zeros between any two launches: how many programs have ended, by column block. Made when first asked for, which is in the
    run that comes before a capture."""
    if device not in _COUNTERS:
        _COUNTERS[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _COUNTERS[device]


@triton.jit
def last_of(counter, programs):
    """Whether this program is the last of `programs` to come here; then the counter is zero again, and what the others have written can be read (past
    the first cache)."""
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    if before == programs - 1:
        tl.store(counter, 0)
    return before == programs - 1


@triton.jit
def summed(partial, step, parts, live):
    """Sum over `parts` tiles that are `step` numbers apart."""
    total = tl.load(partial, live, 0.0, cache_modifier=".cg")
    for first in range(1, parts, 4):
        for i in tl.static_range(4):  # loads that do not wait for one another
            total += tl.load(partial + (first + i) * step, live & (first + i < parts), 0.0, cache_modifier=".cg")
    return total


@triton.jit
def _thin(p, x, partial, out, counter, n, d, rank, rows, parts, p_stride, x_stride, r_stride, d_stride, end0, end1, R: tl.constexpr, BN: tl.constexpr,
          BD: tl.constexpr):
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
    live = (at < rank)[:, None] & (col < d)[None, :]
    mine = partial + at[:, None] * d + col[None, :]
    tl.store(mine + part * rank * d, total, live)
    if last_of(counter + tl.program_id(0), parts):
        tl.store(out + at[:, None].to(tl.int64) * r_stride + col[None, :] * d_stride, summed(mine, rank * d, parts, live), live)


def thin_(out: Tensor, p: Tensor, x: Tensor, ends: list[int]) -> bool:
    """False where cuBLAS is to do it: in fp32, for wide adapters and for members that do not end with a block."""
    (rank, d), n = out.shape, len(x)
    block = 128 if d >= 4096 else 64
    columns = triton.cdiv(d, block)
    if x.dtype == torch.float32 or rank > 64 or len(ends) > 3 or columns > COUNTERS or p.stride(1) != 1 or x.stride(1) != 1:
        return False
    if any(end % block for end in ends[:-1]):
        return False
    parts = max(1, min(triton.cdiv(264, columns), n // 128))
    rows = triton.cdiv(triton.cdiv(n, parts), 64) * 64
    parts = triton.cdiv(n, rows)
    partial = torch.empty(parts, rank, d, device=x.device)
    before = [*ends[:-1], d, d][:2]
    high = max(16, triton.next_power_of_2(rank))
    _thin[(columns, parts)](
        p, x, partial, out, counters(x.device), n, d, rank, rows, parts, p.stride(0), x.stride(0), out.stride(0), out.stride(1), *before,
        R=high, BN=64, BD=block, num_warps=4, num_stages=4,
    )
    return True
