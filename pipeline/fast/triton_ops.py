"""The kernels of ops.py for CUDA, in Triton. Same names, same meaning; ops.py has the formulas.

Library. One program handles one row (of tokens, of logits) and keeps it in registers where it fits; arithmetic is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor


def width(n: int) -> tuple[int, int]:
    """(block, warps) for rows of n numbers."""
    block = triton.next_power_of_2(n)
    return block, 4 if block <= 2048 else 8 if block <= 8192 else 16


@triton.jit
def clear(to, room, ROOM: tl.constexpr):
    """Zeros into the `room` numbers at `to`."""
    if ROOM:
        beyond = tl.arange(0, ROOM)
        tl.store(to + beyond, 0.0, beyond < room)


def blocked(room: int) -> int:
    """The block that `clear` needs for so much room."""
    return triton.next_power_of_2(room) if room else 0


@triton.jit
def _rotate(qkv, cos, sin, t, stride, half, heads, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    live = at < heads * half
    head, col = at // half, at % half
    base = qkv + row * stride + head * (2 * half) + col
    angle = (row % t) * (2 * half) + col
    low, high = tl.load(base, live, 0.0).to(tl.float32), tl.load(base + half, live, 0.0).to(tl.float32)
    c_low, c_high = tl.load(cos + angle, live, 0.0).to(tl.float32), tl.load(cos + angle + half, live, 0.0).to(tl.float32)
    s_low, s_high = tl.load(sin + angle, live, 0.0).to(tl.float32), tl.load(sin + angle + half, live, 0.0).to(tl.float32)
    kind = qkv.dtype.element_ty  # each product rounded, as the model's own forward pass has it
    tl.store(base, (low * c_low).to(kind).to(tl.float32) - (high * s_low).to(kind).to(tl.float32), live)
    tl.store(base + half, (high * c_high).to(kind).to(tl.float32) + (low * s_high).to(kind).to(tl.float32), live)


def rotate_(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    n, _, e = qkv.shape
    block, warps = width(heads * e // 2)
    # without fusion: a product and the sum after it would become one operation in 16 bits, which does not round between them
    _rotate[(n,)](qkv, cos, sin, cos.shape[0], qkv.stride(0), e // 2, heads, BLOCK=block, num_warps=warps, enable_fp_fusion=False)


@triton.jit
def _unrotate(dq, dk, dv, out, cos, sin, t, half, heads, groups, room, stride, q0, q1, q2, k0, k1, k2, v0, v1, v2, BLOCK: tl.constexpr,
              ROOM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    r, pos = row // t, row % t
    at = tl.arange(0, BLOCK)
    head, col = at // half, at % half
    is_q = head < heads
    is_k = (head >= heads) & (head < heads + groups)
    is_v = (head >= heads + groups) & (head < heads + 2 * groups)
    q_at = dq + r * q0 + head * q1 + pos * q2 + col
    k_at = dk + r * k0 + (head - heads) * k1 + pos * k2 + col
    v_at = dv + r * v0 + (head - heads - groups) * v1 + pos * v2 + col
    low = tl.load(q_at, is_q, 0.0).to(tl.float32) + tl.load(k_at, is_k, 0.0).to(tl.float32)
    high = tl.load(q_at + half, is_q, 0.0).to(tl.float32) + tl.load(k_at + half, is_k, 0.0).to(tl.float32)
    turns = is_q | is_k
    angle = pos * (2 * half) + col
    c_low, c_high = tl.load(cos + angle, turns, 1.0).to(tl.float32), tl.load(cos + angle + half, turns, 1.0).to(tl.float32)
    s_low, s_high = tl.load(sin + angle, turns, 0.0).to(tl.float32), tl.load(sin + angle + half, turns, 0.0).to(tl.float32)
    new_low = low * c_low + high * s_high + tl.load(v_at, is_v, 0.0).to(tl.float32)
    new_high = high * c_high - low * s_low + tl.load(v_at + half, is_v, 0.0).to(tl.float32)
    to = out + row * stride + head * (2 * half) + col
    live = head < heads + 2 * groups
    tl.store(to, new_low, live)
    tl.store(to + half, new_high, live)
    clear(out + row * stride + (heads + 2 * groups) * 2 * half, room, ROOM)


def unrotate(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    rows, heads, t, e = dq.shape
    groups = dk.shape[1]
    dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk, dv))
    block, warps = width((heads + 2 * groups) * e // 2)
    strides = [s for g in (dq, dk, dv) for s in g.stride()[:3]]
    room = out.shape[1] - (heads + 2 * groups) * e
    _unrotate[(rows * t,)](
        dq, dk, dv, out, cos, sin, t, e // 2, heads, groups, room, out.stride(0), *strides, BLOCK=block, ROOM=blocked(room), num_warps=warps,
    )
    return out


@triton.jit
def _drop(x, keys, p, out, d, stride, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < d
    share = tl.load(p + row // rows)
    h = tl.load(keys + row).to(tl.uint32) ^ (col.to(tl.uint32) * 0x9E3779B1)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h = h ^ (h >> 16)
    value = tl.load(x + row * stride + col, live, 0.0).to(tl.float32)
    stays = h.to(tl.float64) >= share.to(tl.float64) * 4294967296.0
    tl.store(out + row * d + col, tl.where(stays, value / (1 - share), 0.0), live)


def drop(x: Tensor, keys: Tensor, p: Tensor) -> Tensor:
    n, d = x.shape
    out = torch.empty(n, d, device=x.device, dtype=x.dtype)
    block = min(1024, triton.next_power_of_2(d))
    _drop[(n, triton.cdiv(d, block))](x, keys, p, out, d, x.stride(0), n // len(p), BLOCK=block, num_warps=4)
    return out


@triton.jit
def _adamw(p, g, m, v, copy, rate, shrink, root, factor, scale, size, p0, g0, m0, c0, new1, new2, eps, HAS_COPY: tl.constexpr, HAS_SCALE: tl.constexpr,
           BLOCK: tl.constexpr):
    slot = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = col < size
    grad = tl.load(g + slot * g0 + col, live, 0.0).to(tl.float32) * tl.load(factor + slot)
    value = tl.load(p + slot * p0 + col, live, 0.0) * tl.load(shrink + slot)
    first = tl.load(m + slot * m0 + col, live, 0.0)
    first += new1 * (grad - first)
    second = tl.load(v + slot * m0 + col, live, 0.0)
    second += new2 * (grad * grad - second)
    value -= tl.load(rate + slot) * first / (tl.sqrt(second) / tl.load(root + slot) + eps)
    tl.store(p + slot * p0 + col, value, live)
    tl.store(m + slot * m0 + col, first, live)
    tl.store(v + slot * m0 + col, second, live)
    if HAS_COPY:
        if HAS_SCALE:
            value *= tl.load(scale + slot)
        tl.store(copy + slot * c0 + col, value, live)


def adamw_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, rate: Tensor, shrink: Tensor, root: Tensor, factor: Tensor,
           scale: Tensor | None, betas: tuple[float, float], eps: float) -> None:
    slots, size = p.shape
    held: Any = copy if copy is not None else p
    block = 1024
    _adamw[(triton.cdiv(size, block), slots)](
        p, g, m, v, held, rate, shrink, root, factor, scale if scale is not None else factor, size, p.stride(0), g.stride(0), m.stride(0), held.stride(0),
        *(1 - b for b in betas), eps, HAS_COPY=copy is not None, HAS_SCALE=scale is not None, BLOCK=block, num_warps=4,
    )


@triton.jit
def _place(table, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    entry = table + tl.program_id(0) * 5
    source, target = tl.load(entry).to(tl.pointer_type(DTYPE)), tl.load(entry + 1).to(tl.pointer_type(DTYPE))
    rows, width, stride = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < rows * width
    tl.store(target + (at // width) * stride + at % width, tl.load(source + at, live), live)


def place_table(pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Addresses of (contiguous [m, r], target [m, r] with rows apart) pairs, on their device; the tensors must outlive it."""
    rows = [[s.data_ptr(), t.data_ptr(), *s.shape, t.stride(0)] for s, t in pieces]
    return torch.tensor(rows, dtype=torch.long, device=pieces[0][0].device)


def place_(table: Tensor, most: int, dtype: torch.dtype) -> None:
    """Copy all pairs of a `place_table` in one launch; `most`: numbers in the largest."""
    kinds = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float16: tl.float16}
    _place[(len(table), triton.cdiv(most, 1024))](table, BLOCK=1024, DTYPE=kinds[dtype])


@triton.jit
def _nf4(packed, absmax, code, absmax2, code2, offset, out, columns, stride, size, GROUP: tl.constexpr, GROUP2: tl.constexpr, NESTED: tl.constexpr,
         BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = byte < size
    pair = tl.load(packed + byte, live, 0).to(tl.int32)
    group = byte * 2 // GROUP
    if NESTED:
        scale = tl.load(code2 + tl.load(absmax + group, live, 0).to(tl.int32), live, 0.0) * tl.load(absmax2 + group // GROUP2, live, 0.0) + tl.load(offset)
    else:
        scale = tl.load(absmax + group, live, 0.0)
    high, low = tl.load(code + (pair >> 4), live, 0.0) * scale, tl.load(code + (pair & 15), live, 0.0) * scale
    at = tl.interleave(byte * 2, byte * 2 + 1)
    tl.store(out + (at // columns) * stride + at % columns, tl.interleave(high, low), at < size * 2)


def dequantise_nf4_(out: Tensor, packed: Tensor, state: Any) -> bool:
    """False where the state is laid out in a way this kernel does not know (the caller then asks bitsandbytes)."""
    if state.quant_type not in ("nf4", "fp4") or out.stride(-1) != 1 or state.shape[1] % 2:
        return False
    nested, size = state.nested, packed.numel()
    second = state.state2 if nested else state
    _nf4[(triton.cdiv(size, 1024),)](
        packed, state.absmax, state.code, second.absmax, second.code, state.offset if nested else state.absmax, out, state.shape[1], out.stride(0), size,
        GROUP=state.blocksize, GROUP2=second.blocksize, NESTED=nested, BLOCK=1024, num_warps=4,
    )
    return True
