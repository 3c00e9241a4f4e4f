"""RMSNorm for CUDA, in Triton, forward and backward; for answers (`exact`) with every bit of what torch's own operations give.

Library of ops.py, which has shapes and formulas. One program handles one token, [d] numbers; all arithmetic is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipeline.engine.layout import NORM_PROGRAMS
from pipeline.engine.misc import blocked, clear, width

Tensor = torch.Tensor


@triton.jit
def _rmsnorm(x, w, y, r, d, room, x_stride, stride, eps, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + col, col < d, 0.0).to(tl.float32)
    _normed(v, tl.sum(v * v, 0) / d, w, y, r, row, col, d, room, stride, eps, ROOM)


@triton.jit
def _normed(v, mean, w, y, r, row, col, d, room, stride, eps, ROOM: tl.constexpr):
    rstd = tl.rsqrt(mean + eps)
    tl.store(r + row, rstd)
    normed = (v * rstd).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * stride + col, normed * tl.load(w + col, col < d, 0.0).to(tl.float32), col < d)
    clear(y + row * stride + d, room, ROOM)


@triton.jit
def _rmsnorm_exact(x, w, y, r, d, factor, room, x_stride, stride, eps, STEPS: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = 4 * tl.arange(0, 32)[:, None] + tl.arange(0, 4)[None, :]
    total = tl.zeros((32, 4), tl.float32)  # a thread of torch's reads four numbers at once, and has a sum for each place among them
    for step in range(STEPS):
        part = tl.load(x + row * x_stride + 128 * step + at, 128 * step + at < d, 0.0).to(tl.float32)
        total += part * part
    even, odd = tl.split(tl.reshape(total, (32, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    squares = first + second + third + fourth
    for half in tl.static_range(5):  # one half plus the other
        low, high = tl.split(tl.trans(tl.reshape(squares, (2, 16 >> half))))
        squares = low + high
    col = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + col, col < d, 0.0).to(tl.float32)
    _normed(v, tl.sum(squares, 0) * factor, w, y, r, row, col, d, room, stride, eps, ROOM)


def rmsnorm(x: Tensor, weight: Tensor, eps: float, y: Tensor, exact: bool) -> Tensor:
    """weight · x / rms(x) of x [N, d] into y [N, d + room], zeros into the last columns; returns 1 / rms(x) [N] fp32."""
    (n, d), room = x.shape, y.shape[1] - x.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    block, warps = width(d)
    rstd = torch.empty(n, device=x.device)
    if not exact:
        _rmsnorm[(n,)](x, weight, y, rstd, d, room, x.stride(0), y.stride(0), eps, BLOCK=block, ROOM=blocked(room), num_warps=warps)
    elif n >= 16 and 128 < d < 8192 and d % 4 == 0 and _torchs_order(d, x.device):
        _exact(x, weight, eps, y, rstd)
    else:
        _by_torch(x, weight, eps, y, rstd)
    return rstd


def _exact(x: Tensor, weight: Tensor, eps: float, y: Tensor, rstd: Tensor) -> None:
    """The mean in the order of torch's reduction of contiguous rows (ATen/native/cuda/Reduce.cuh: from 16 rows and 129 numbers on, up to 8,191, a warp a
    row and four numbers a load). Without fusion, because torch rounds the squares."""
    (n, d), room = x.shape, y.shape[1] - x.shape[1]
    block, _ = width(d)
    _rmsnorm_exact[(n,)](
        x, weight, y, rstd, d, 1 / d, room, x.stride(0), y.stride(0), eps, STEPS=triton.cdiv(d, 128), BLOCK=block, ROOM=blocked(room),
        num_warps=1 if block <= 1024 else 4, enable_fp_fusion=False,
    )


def _by_torch(x: Tensor, weight: Tensor, eps: float, y: Tensor, rstd: Tensor) -> None:
    """Operation by operation, as transformers' module."""
    y[:, x.shape[1] :] = 0.0
    wide = x.float()
    torch.rsqrt(wide.pow(2).mean(-1) + eps, out=rstd)
    torch.mul(weight, (wide * rstd[:, None]).to(x.dtype), out=y[:, : x.shape[1]])


_ORDERS: dict[tuple[int, torch.device], bool] = {}


def _torchs_order(d: int, device: torch.device) -> bool:
    """Whether `_exact` gives this torch's bits for rows of d numbers: tried once, in the run that comes before a capture."""
    if (d, device) not in _ORDERS:
        x = torch.arange(64 * d, device=device).sin().view(64, d).bfloat16()
        results = []
        for way in (_exact, _by_torch):
            y, rstd = torch.empty_like(x), torch.empty(64, device=device)
            way(x, x[0], 1e-5, y, rstd)
            results.append((y, rstd))
        _ORDERS[d, device] = all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    return _ORDERS[d, device]


@triton.jit
def _rmsnorm_backward(dy, y, w, r, dres, dx, dw, n, d, room, dy_stride, y_stride, res_stride, dx_stride, ROWS: tl.constexpr, HAS_RES: tl.constexpr,
                      HAS_DW: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    col = tl.arange(0, BLOCK)
    weight = tl.load(w + col, col < d, 0.0).to(tl.float32)
    inverse = tl.where(weight != 0.0, 1.0 / weight, 0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(ROWS):
        row = first + step
        live = (col < d) & (row < n)
        rstd = tl.load(r + row, row < n, 0.0)
        g = tl.load(dy + row * dy_stride + col, live, 0.0).to(tl.float32)
        normed = tl.load(y + row * y_stride + col, live, 0.0).to(tl.float32) * inverse
        if HAS_DW:
            total += g * normed
        g = g * weight
        out = rstd * (g - normed * (tl.sum(g * normed, 0) / d))
        if HAS_RES:
            out += tl.load(dres + row * res_stride + col, live, 0.0).to(tl.float32)
        tl.store(dx + row * dx_stride + col, out, live)
        if row < n:
            clear(dx + row * dx_stride + d, room, ROOM)
    if HAS_DW:
        tl.store(dw + tl.program_id(0) * d + col, total, col < d)


def rmsnorm_backward(dy: Tensor, y: Tensor, weight: Tensor, rstd: Tensor, dres: Tensor | None, dweight: Tensor | None, dx: Tensor) -> Tensor:
    """As ops.rmsnorm_backward, into dx [N, d + room]; the weight's gradient is summed over at most 264 programs' rows, then over programs."""
    n, d, room = y.shape[0], weight.shape[0], dx.shape[1] - weight.shape[0]
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    res = dres if dres is not None else y
    rows = 1 if dweight is None else max(1, -(-n // NORM_PROGRAMS))
    programs = -(-n // rows)
    partial = torch.empty(programs, d, device=y.device) if dweight is not None else y
    block, warps = width(d)
    _rmsnorm_backward[(programs,)](
        dy, y, weight, rstd, res, dx, partial, n, d, room, dy.stride(0), y.stride(0), res.stride(0), dx.stride(0), ROWS=rows,
        HAS_RES=dres is not None, HAS_DW=dweight is not None, BLOCK=block, ROOM=blocked(room), num_warps=warps,
    )
    if dweight is not None:
        dweight.copy_(partial.sum(0))
    return dx
