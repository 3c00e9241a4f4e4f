"""SwiGLU and GeGLU for CUDA, in Triton, forward and backward; backward can make the LoRA gradients that need its numbers while they are in registers.

Library of ops.py, which has shapes and formulas. Reading the feed-forward layer's inside [N, 2f] again, once an adapter, costs more than the adapters'
arithmetic. Sums are made in a fixed order: the same bits at every call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from pipeline.engine.misc import COUNTERS, blocked, clear, counters, last_of, summed

Tensor = torch.Tensor

ROWS, MOST_RANK = 4096, 32
"""Tokens below which one pass leaves most of the device idle, and the rank above which the sums do not fit into registers."""


def suits(gu: Tensor, rank: int) -> bool:
    """Whether `backward_thin_` takes gu [N, 2f] with this rank; else the caller makes the gradients one by one."""
    return gu.dtype != torch.float32 and rank <= MOST_RANK and len(gu) >= ROWS and gu.stride(1) == 1 and gu.shape[1] <= 128 * COUNTERS


@triton.jit
def _activation(gate, GELU: tl.constexpr):
    """(value, derivative) of SiLU, or of GELU's approximation by tanh (Hendrycks & Gimpel, 2016)."""
    # tanh(u) is 2 sigmoid(2u) - 1, and u is sqrt(2 / pi) (x + 0.044715 x³)
    sigmoid = tl.sigmoid(gate * (1.5957691216057308 * (1.0 + 0.044715 * gate * gate)) if GELU else gate)
    value = gate * sigmoid
    slope = value * (1 - sigmoid)
    if GELU:
        slope *= 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
    return value, sigmoid + slope


@triton.jit
def _swiglu(gu, h, f, room, gu_stride, stride, GELU: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < f
    gate = tl.load(gu + row * gu_stride + col, live, 0.0).to(tl.float32)
    up = tl.load(gu + row * gu_stride + f + col, live, 0.0).to(tl.float32)
    if GELU:
        value, _ = _activation(gate, GELU)
    else:
        value = tl.div_rn(gate, 1.0 + libdevice.exp(-gate))  # bit for bit what torch's silu gives
    tl.store(h + row * stride + col, value.to(h.dtype.element_ty).to(tl.float32) * up, live)
    if tl.program_id(1) == 0:
        clear(h + row * stride + f, room, ROOM)


def swiglu(gu: Tensor, h: Tensor, gelu: bool) -> None:
    """silu(gate) · up (gelu: gelu(gate) · up) of gu [N, 2f] into h [N, f + room], zeros into the last columns."""
    n, f = gu.shape[0], gu.shape[1] // 2
    block, room = min(2048, triton.next_power_of_2(f)), h.shape[1] - f
    _swiglu[(n, triton.cdiv(f, block))](gu, h, f, room, gu.stride(0), h.stride(0), GELU=gelu, BLOCK=block, ROOM=blocked(room), num_warps=4)


@triton.jit
def _swiglu_backward(dh, gu, f, stride, gu_stride, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < f
    gate_at, up_at, h_at = gu + row * gu_stride + col, gu + row * gu_stride + f + col, dh + row * stride + col
    gate, up = tl.load(gate_at, live, 0.0).to(tl.float32), tl.load(up_at, live, 0.0).to(tl.float32)
    d = tl.load(h_at, live, 0.0).to(tl.float32)
    value, slope = _activation(gate, GELU)
    tl.store(gate_at, d * up * slope, live)
    tl.store(up_at, d * value, live)
    tl.store(h_at, value.to(dh.dtype.element_ty).to(tl.float32) * up, live)


def swiglu_backward_(dh: Tensor, gu: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """As ops.swiglu_backward_: h [N, f] takes the place of dh, d gu [N, 2f] that of gu."""
    n, f = dh.shape
    block = min(2048, triton.next_power_of_2(f))
    _swiglu_backward[(n, triton.cdiv(f, block))](dh, gu, f, dh.stride(0), gu.stride(0), GELU=gelu, BLOCK=block, num_warps=4)
    return dh, gu


@triton.jit
def _backward(dh, gu, xa, dxa, partial, db, da, counter, n, f, rank, apart, rows, parts, dh_stride, gu_stride, xa_stride, dxa_stride,
              GELU: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    part = tl.program_id(1)
    at = tl.arange(0, R)
    of_gate, of_up, of_down = tl.zeros((R, BC), tl.float32), tl.zeros((R, BC), tl.float32), tl.zeros((R, BC), tl.float32)
    for start in range(part * rows, min(n, (part + 1) * rows), BN):
        row = (start + tl.arange(0, BN)).to(tl.int64)
        live = (row < n)[:, None] & (col < f)[None, :]
        thin = (row < n)[None, :] & (at < rank)[:, None]
        place = gu + row[:, None] * gu_stride + col[None, :]
        gate, up = tl.load(place, live, 0.0).to(tl.float32), tl.load(place + f, live, 0.0).to(tl.float32)
        d = tl.load(dh + row[:, None] * dh_stride + col[None, :], live, 0.0).to(tl.float32)
        first = xa + row[None, :] * xa_stride + at[:, None]
        xa_gate, xa_up = tl.load(first, thin, 0.0), tl.load(first + apart, thin, 0.0)
        dxa_down = tl.load(dxa + row[None, :] * dxa_stride + at[:, None], thin, 0.0)
        kind = gu.dtype.element_ty
        value, slope = _activation(gate, GELU)
        d_gate, d_up = (d * up * slope).to(kind), (d * value).to(kind)
        tl.store(place, d_gate, live)
        tl.store(place + f, d_up, live)
        of_gate = tl.dot(xa_gate, d_gate, of_gate)
        of_up = tl.dot(xa_up, d_up, of_up)
        of_down = tl.dot(dxa_down, (value.to(kind).to(tl.float32) * up).to(kind), of_down)
    mine = (at < rank)[:, None] & (col < f)[None, :]
    each = rank * f
    sums = partial + at[:, None] * f + col[None, :]
    to = sums + part * 3 * each
    tl.store(to, of_gate, mine)
    tl.store(to + each, of_up, mine)
    tl.store(to + 2 * each, of_down, mine)
    if last_of(counter + tl.program_id(0), parts):
        turned = db + col[None, :] * rank + at[:, None]
        tl.store(turned, summed(sums, 3 * each, parts, mine), mine)
        tl.store(turned + f * rank, summed(sums + each, 3 * each, parts, mine), mine)
        tl.store(da + at[:, None] * f + col[None, :], summed(sums + 2 * each, 3 * each, parts, mine), mine)


def backward_thin_(dh: Tensor, gu: Tensor, xa: Tensor, dxa: Tensor, db: Tensor, da: Tensor, gelu: bool) -> Tensor:
    """As ops.swiglu_backward_thin_; partial sums of rows are fp32, added up by the last program of each block of columns."""
    (n, f), rank = dh.shape, len(da)
    columns, high = triton.cdiv(f, 64), max(16, triton.next_power_of_2(rank))
    parts = max(1, min(16, triton.cdiv(1056, columns)))
    rows = triton.cdiv(triton.cdiv(n, parts), 32) * 32
    partial = torch.empty(parts, 3, rank, f, device=gu.device)
    _backward[(columns, parts)](
        dh, gu, xa, dxa, partial, db, da, counters(gu.device), n, f, rank, xa.shape[1] - rank, rows, parts, dh.stride(0), gu.stride(0),
        xa.stride(0), dxa.stride(0), GELU=gelu, R=high, BN=16, BC=64, num_warps=4,
    )
    return gu
