"""RMSNorm for CUDA, in Triton, forward and backward; for answers (`exact`) with every bit of what torch's own operations give.

Library of ops.py, which has shapes and formulas. One program handles one token, [d] numbers; all arithmetic is fp32. PLUS: the weight is one more
than the number stored, and nothing is rounded before it is applied (Gemma).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipeline.engine import layout
from pipeline.engine.layout import NORM_PROGRAMS
from pipeline.engine.misc import blocked, clear, width

Tensor = torch.Tensor
NEARLY_ZERO = tl.constexpr(layout.NEARLY_ZERO)


@triton.jit
def _rmsnorm(x, w, y, r, res, d, room, x_stride, stride, res_stride, eps, PLUS: tl.constexpr, HAS_RES: tl.constexpr, BLOCK: tl.constexpr,
             ROOM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + col, col < d, 0.0).to(tl.float32)
    _normed(v, tl.sum(v * v, 0) / d, w, y, r, res, row, col, d, room, stride, res_stride, eps, PLUS, True, HAS_RES, ROOM)


@triton.jit
def _normed(v, mean, w, y, r, res, row, col, d, room, stride, res_stride, eps, PLUS: tl.constexpr, VISIBLE: tl.constexpr, HAS_RES: tl.constexpr,
            ROOM: tl.constexpr):
    rstd = tl.rsqrt(mean + eps)
    tl.store(r + row, rstd)
    weight = tl.load(w + col, col < d, 0.0).to(tl.float32)
    kind = y.dtype.element_ty
    if PLUS:
        weight += 1.0
    if VISIBLE:
        weight = tl.where(weight == 0.0, NEARLY_ZERO, weight)
    normed = ((v * rstd) * weight).to(kind) if PLUS else ((v * rstd).to(kind).to(tl.float32) * weight).to(kind)
    tl.store(y + row * stride + col, normed, col < d)
    if HAS_RES:
        to = res + row * res_stride + col
        tl.store(to, tl.load(to, col < d, 0.0).to(tl.float32) + normed.to(tl.float32), col < d)
    clear(y + row * stride + d, room, ROOM)


@triton.jit
def _rmsnorm_exact(x, w, y, r, res, d, factor, room, x_stride, stride, res_stride, eps, STEPS: tl.constexpr, PLUS: tl.constexpr,
                   HAS_RES: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr):
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
    _normed(v, tl.sum(squares, 0) * factor, w, y, r, res, row, col, d, room, stride, res_stride, eps, PLUS, False, HAS_RES, ROOM)


def rmsnorm(x: Tensor, weight: Tensor, eps: float, y: Tensor, exact: bool, plus: bool, residual: Tensor | None) -> Tensor:
    """As ops.rmsnorm, into y [N, d + room]; returns 1 / rms(x) [N] fp32."""
    (n, d), room = x.shape, y.shape[1] - x.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    block, warps = width(d)
    rstd = torch.empty(n, device=x.device)
    if not exact:
        res = y if residual is None else residual
        _rmsnorm[(n,)](
            x, weight, y, rstd, res, d, room, x.stride(0), y.stride(0), res.stride(0), eps, PLUS=plus, HAS_RES=residual is not None, BLOCK=block,
            ROOM=blocked(room), num_warps=warps,
        )
    elif n >= 16 and 128 < d < 8192 and d % 4 == 0 and _torchs_order(d, x.device):
        _exact(x, weight, eps, y, rstd, plus, residual)
    else:
        _by_torch(x, weight, eps, y, rstd, plus, residual)
    return rstd


def _exact(x: Tensor, weight: Tensor, eps: float, y: Tensor, rstd: Tensor, plus: bool = False, residual: Tensor | None = None) -> None:
    """The mean in the order of torch's reduction of contiguous rows (ATen/native/cuda/Reduce.cuh: from 16 rows and 129 numbers on, up to 8,191, a warp a
    row and four numbers a load). Without fusion, because torch rounds the squares."""
    (n, d), room = x.shape, y.shape[1] - x.shape[1]
    block, _ = width(d)
    res = y if residual is None else residual
    _rmsnorm_exact[(n,)](
        x, weight, y, rstd, res, d, 1 / d, room, x.stride(0), y.stride(0), res.stride(0), eps, STEPS=triton.cdiv(d, 128), PLUS=plus,
        HAS_RES=residual is not None, BLOCK=block, ROOM=blocked(room), num_warps=1 if block <= 1024 else 4, enable_fp_fusion=False,
    )


def _by_torch(x: Tensor, weight: Tensor, eps: float, y: Tensor, rstd: Tensor, plus: bool = False, residual: Tensor | None = None) -> None:
    """Operation by operation, as transformers' module."""
    y[:, x.shape[1] :] = 0.0
    wide = x.float()
    torch.rsqrt(wide.pow(2).mean(-1) + eps, out=rstd)
    wide = wide * rstd[:, None]
    y[:, : x.shape[1]] = wide * (1.0 + weight.float()) if plus else weight * wide.to(x.dtype)
    if residual is not None:
        residual.add_(y[:, : x.shape[1]])


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
                      HAS_DW: tl.constexpr, PLUS: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    col = tl.arange(0, BLOCK)
    weight = tl.load(w + col, col < d, 0.0).to(tl.float32)
    if PLUS:
        weight += 1.0
    weight = tl.where(weight == 0.0, NEARLY_ZERO, weight)
    inverse = 1.0 / weight
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


def rmsnorm_backward(dy: Tensor, y: Tensor, weight: Tensor, rstd: Tensor, dres: Tensor | None, dweight: Tensor | None, dx: Tensor,
                     plus: bool) -> Tensor:
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
        HAS_RES=dres is not None, HAS_DW=dweight is not None, PLUS=plus, BLOCK=block, ROOM=blocked(room), num_warps=warps,
    )
    if dweight is not None:
        dweight.copy_(partial.sum(0))
    return dx


@triton.jit
def _head_weight(wq, wk, col, heads, head, live, PLUS: tl.constexpr):
    """[HEADS, BLOCK]: the query heads' weight, then the key heads'."""
    at = col + 0 * head
    weight = tl.load(wq + at, live & (head < heads), 0.0).to(tl.float32) + tl.load(wk + at, live & (head >= heads), 0.0).to(tl.float32)
    if PLUS:
        weight += 1.0
    return weight


@triton.jit
def _head_norms(qkv, wq, wk, r, before, stride, heads, both, e, eps, PLUS: tl.constexpr, KEEP: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head, col = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    live = (head < both) & (col < e)
    at = qkv + row * stride + head * e + col
    raw = tl.load(at, live, 0.0)
    if KEEP:
        tl.store(before + (row * both + head) * e + col, raw, live)
    v = raw.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(v * v, 1) / e + eps)
    number = tl.arange(0, HEADS)
    tl.store(r + row * both + number, rstd, number < both)
    weight = _head_weight(wq, wk, col, heads, head, live, PLUS)
    normed = v * rstd[:, None]
    if not PLUS:
        normed = normed.to(qkv.dtype.element_ty).to(tl.float32)
    tl.store(at, normed * weight, live)


def head_norms_(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, heads: int, groups: int, plus: bool, before: Tensor | None) -> Tensor:
    """As ops.head_norms_: qkv [N, H + 2G, e], whose tokens may lie apart."""
    n, _, e = qkv.shape
    both = heads + groups
    rstd = torch.empty(n, both, device=qkv.device)
    _, warps = width(triton.next_power_of_2(both) * e)
    _head_norms[(n,)](
        qkv, q_weight, k_weight, rstd, rstd if before is None else before, qkv.stride(0), heads, both, e, eps, PLUS=plus, KEEP=before is not None,
        HEADS=triton.next_power_of_2(both), BLOCK=triton.next_power_of_2(e), num_warps=warps,
    )
    return rstd


@triton.jit
def _head_norms_backward(dqkv, before, wq, wk, r, dw, n, heads, both, e, d_stride, ROWS: tl.constexpr, PLUS: tl.constexpr, HAS_DW: tl.constexpr,
                         HEADS: tl.constexpr, BLOCK: tl.constexpr):
    head, col = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < both) & (col < e)
    weight = _head_weight(wq, wk, col, heads, head, inside, PLUS)
    total = tl.zeros((HEADS, BLOCK), tl.float32)
    for step in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        live = inside & (row < n)
        rstd = tl.load(r + row * both + head, (head < both) & (row < n), 0.0)
        normed = tl.load(before + (row * both + head) * e + col, live, 0.0).to(tl.float32) * rstd
        to = dqkv + row * d_stride + head * e + col
        g = tl.load(to, live, 0.0).to(tl.float32)
        if HAS_DW:
            total += g * normed
        g = g * weight
        tl.store(to, rstd * (g - normed * (tl.sum(g * normed, 1)[:, None] / e)), live)
    if HAS_DW:
        one = tl.arange(0, BLOCK)
        mine = dw + tl.program_id(0) * 2 * e + one
        tl.store(mine, tl.sum(tl.where(head < heads, total, 0.0), 0), one < e)
        tl.store(mine + e, tl.sum(tl.where(head >= heads, total, 0.0), 0), one < e)


def head_norms_backward_(dqkv: Tensor, before: Tensor, rstd: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, plus: bool,
                         dq_weight: Tensor | None, dk_weight: Tensor | None) -> None:
    """As ops.head_norms_backward_; the weights' gradients are summed over at most 264 programs' tokens, then over programs."""
    n, both, e = before.shape
    rows = 1 if dq_weight is None else max(1, -(-n // NORM_PROGRAMS))
    programs = -(-n // rows)
    partial = torch.empty(programs, 2, e, device=before.device) if dq_weight is not None else rstd
    high, block = triton.next_power_of_2(both), triton.next_power_of_2(e)
    _, warps = width(high * e)
    _head_norms_backward[(programs,)](
        dqkv, before, q_weight, k_weight, rstd, partial, n, heads, both, e, dqkv.stride(0), ROWS=rows, PLUS=plus, HAS_DW=dq_weight is not None,
        HEADS=high, BLOCK=block, num_warps=warps,
    )
    if dq_weight is not None and dk_weight is not None:
        sums = partial.sum(0)
        dq_weight.copy_(sums[0])
        dk_weight.copy_(sums[1])
