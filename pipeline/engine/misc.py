"""Triton kernels of one pass each: rotation, dropout, AdamW, scatter, NF4, cross-entropy, and products with a thin matrix.

Library of ops.py, which has shapes and formulas. Arithmetic is fp32; results are rounded to the dtype of the tensor that they are written to.
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
    """Write zeros to the `room` numbers at `to`."""
    if ROOM:
        beyond = tl.arange(0, ROOM)
        tl.store(to + beyond, 0.0, beyond < room)


def blocked(room: int) -> int:
    """The block (ROOM) in which `clear` writes `room` numbers."""
    return triton.next_power_of_2(room) if room else 0


@triton.jit
def _rotate(qkv, cos, sin, t, stride, e, half, heads, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    live = at < heads * half
    head, col = at // half, at % half
    base = qkv + row * stride + head * e + col
    angle = (row % t) * (2 * half) + col
    low, high = tl.load(base, live, 0.0).to(tl.float32), tl.load(base + half, live, 0.0).to(tl.float32)
    c_low, c_high = tl.load(cos + angle, live, 0.0).to(tl.float32), tl.load(cos + angle + half, live, 0.0).to(tl.float32)
    s_low, s_high = tl.load(sin + angle, live, 0.0).to(tl.float32), tl.load(sin + angle + half, live, 0.0).to(tl.float32)
    kind = qkv.dtype.element_ty  # each product rounded, as in transformers' forward pass
    tl.store(base, (low * c_low).to(kind).to(tl.float32) - (high * s_low).to(kind).to(tl.float32), live)
    tl.store(base + half, (high * c_high).to(kind).to(tl.float32) + (low * s_high).to(kind).to(tl.float32), live)


def rotate_(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """As ops.rotate_: qkv [N, heads + G, e] in place; cos, sin [T, e or fewer] with N a multiple of T."""
    n, _, e = qkv.shape
    half = cos.shape[1] // 2
    block, warps = width(heads * half)
    # without fusion: a product and the sum after it would become one operation in 16 bits, which does not round between them
    _rotate[(n,)](qkv, cos, sin, cos.shape[0], qkv.stride(0), e, half, heads, BLOCK=block, num_warps=warps, enable_fp_fusion=False)


@triton.jit
def _unrotate(dq, dk, dv, out, cos, sin, t, half, turned, heads, groups, room, stride, q0, q1, q2, k0, k1, k2, v0, v1, v2, BLOCK: tl.constexpr,
              ROOM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    r, pos = row // t, row % t
    at = tl.arange(0, BLOCK)
    head, col = at // half, at % half
    is_q = head < heads
    is_k = (head >= heads) & (head < heads + groups)
    is_v = (head >= heads + groups) & (head < heads + 2 * groups)
    # columns in pairs: those that are rotated together, then what the rotation leaves
    one, other = tl.where(col < turned, col, col + turned), tl.where(col < turned, col + turned, col + half)
    q_at = dq + r * q0 + head * q1 + pos * q2
    k_at = dk + r * k0 + (head - heads) * k1 + pos * k2
    v_at = dv + r * v0 + (head - heads - groups) * v1 + pos * v2
    low = tl.load(q_at + one, is_q, 0.0).to(tl.float32) + tl.load(k_at + one, is_k, 0.0).to(tl.float32)
    high = tl.load(q_at + other, is_q, 0.0).to(tl.float32) + tl.load(k_at + other, is_k, 0.0).to(tl.float32)
    turns = (is_q | is_k) & (col < turned)
    angle = pos * (2 * turned) + col
    c_low, c_high = tl.load(cos + angle, turns, 1.0).to(tl.float32), tl.load(cos + angle + turned, turns, 1.0).to(tl.float32)
    s_low, s_high = tl.load(sin + angle, turns, 0.0).to(tl.float32), tl.load(sin + angle + turned, turns, 0.0).to(tl.float32)
    new_low = low * c_low + high * s_high + tl.load(v_at + one, is_v, 0.0).to(tl.float32)
    new_high = high * c_high - low * s_low + tl.load(v_at + other, is_v, 0.0).to(tl.float32)
    to = out + row * stride + head * (2 * half)
    live = head < heads + 2 * groups
    tl.store(to + one, new_low, live)
    tl.store(to + other, new_high, live)
    clear(out + row * stride + (heads + 2 * groups) * 2 * half, room, ROOM)


def unrotate(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """As ops.unrotate, into out [R·T, (H + 2G)·e + room]."""
    rows, heads, t, e = dq.shape
    groups = dk.shape[1]
    dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk, dv))
    block, warps = width((heads + 2 * groups) * e // 2)
    strides = [s for g in (dq, dk, dv) for s in g.stride()[:3]]
    room = out.shape[1] - (heads + 2 * groups) * e
    _unrotate[(rows * t,)](
        dq, dk, dv, out, cos, sin, t, e // 2, cos.shape[1] // 2, heads, groups, room, out.stride(0), *strides, BLOCK=block, ROOM=blocked(room), num_warps=warps,
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
    """As ops.drop: x [N, d], keys [N] int64 (ops.Noise.keys), p [K] fp32."""
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
    """As ops.adamw_: p, g, m, v, copy [K, P], slot by slot."""
    slots, size = p.shape
    target: Any = copy if copy is not None else p
    block = 1024
    _adamw[(triton.cdiv(size, block), slots)](
        p, g, m, v, target, rate, shrink, root, factor, scale if scale is not None else factor, size, p.stride(0), g.stride(0), m.stride(0), target.stride(0),
        *(1 - b for b in betas), eps, HAS_COPY=copy is not None, HAS_SCALE=scale is not None, BLOCK=block, num_warps=4,
    )


@triton.jit
def _scatter(table, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    entry = table + tl.program_id(0) * 5
    source, target = tl.load(entry).to(tl.pointer_type(DTYPE)), tl.load(entry + 1).to(tl.pointer_type(DTYPE))
    rows, width, stride = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < rows * width
    tl.store(target + (at // width) * stride + at % width, tl.load(source + at, live), live)


def scatter_table(pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[pairs, 5] int64 on the device: the addresses of source and target, m, r, and the target's row stride, of (contiguous [m, r], target [m, r]) pairs.
    The tensors must outlive it."""
    rows = [[s.data_ptr(), t.data_ptr(), *s.shape, t.stride(0)] for s, t in pieces]
    return torch.tensor(rows, dtype=torch.long, device=pieces[0][0].device)


def scatter_(table: Tensor, most: int, dtype: torch.dtype) -> None:
    """Copy all pairs of a `scatter_table`, of this dtype, in one launch; `most`: numbers of the largest."""
    kinds = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float16: tl.float16}
    _scatter[(len(table), triton.cdiv(most, 1024))](table, BLOCK=1024, DTYPE=kinds[dtype])


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
    """As ops.dequantise_nf4_; False, with nothing written, where this kernel does not know the state's layout (bitsandbytes' function does it then)."""
    if state.quant_type not in ("nf4", "fp4") or out.stride(-1) != 1 or state.shape[1] % 2:
        return False
    nested, size = state.nested, packed.numel()
    second = state.state2 if nested else state
    _nf4[(triton.cdiv(size, 1024),)](
        packed, state.absmax, state.code, second.absmax, second.code, state.offset if nested else state.absmax, out, state.shape[1], out.stride(0), size,
        GROUP=state.blocksize, GROUP2=second.blocksize, NESTED=nested, BLOCK=1024, num_warps=4,
    )
    return True


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
    """As ops.cross_entropy_: logits [N, V] are read twice, for the normaliser (online softmax: Milakov & Gimelshein, 2018) and for the gradient."""
    n, vocabulary = logits.shape
    loss = torch.empty(n, device=logits.device)
    block = min(8192, triton.next_power_of_2(vocabulary))
    each = min(2, triton.next_power_of_2(triton.cdiv(vocabulary, block)))
    _cross_entropy[(n,)](logits, targets, weights, loss, vocabulary, EACH=each, BLOCK=block, num_warps=32 if block == 8192 else 4)
    return loss


COUNTERS = 1024
_COUNTERS: dict[torch.device, Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """[COUNTERS] int32, zeros between any two launches: by block of columns, how many programs have ended. Made at the first call, which is in the
    run that comes before a capture."""
    if device not in _COUNTERS:
        _COUNTERS[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _COUNTERS[device]


@triton.jit
def last_of(counter, programs):
    """Whether this program is the last of `programs` to get here; if so, the counter is zero again, and what the others have written can be read (past
    the L1 cache)."""
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    if before == programs - 1:
        tl.store(counter, 0)
    return before == programs - 1


@triton.jit
def summed(partial, step, parts, live):
    """The sum of `parts` fp32 tiles that are `step` numbers apart, in their order."""
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
    """As ops.thin_; False, with nothing written, where cuBLAS is to do it: in fp32, for wide adapters, for members that do not end with a block."""
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
