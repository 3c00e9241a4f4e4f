"""Products and attention in Triton whose sums have one order, whatever else is computed in the same launch.

Library of invariant.py, which has the shapes, the reason and the same in plain torch. A product goes through its inner length from the first number to the
last, in one program (no split), and attention through keys from a row's first: what lies outside the row's own numbers adds zeros, which change nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

Tile = tuple[int, int, int, int, int]
"""Of a product: rows, columns, inner numbers a turn, warps, stages."""
NARROW: Tile = (64, 32, 128, 4, 4)
"""For few rows and columns: many programs, because reading the weights is what takes time."""
BROAD: Tile = (64, 128, 64, 4, 4)
"""For few rows and many columns."""
TALL: Tile = (128, 128, 64, 8, 3)
"""For many rows."""
FEW, MANY_COLUMNS = 256, 8192
QUERIES, KEYS = 64, 64
"""Of a tile of attention; 64 rows are what one warp group's instruction takes on Hopper, so that all tiles here use the same instruction."""
UNIT = 8
"""16-bit numbers in 16 bytes: strides and lengths are handed to kernels in such units where they are multiples, so that they know."""


@triton.jit(do_not_specialize=["n", "m", "k", "x_stride", "w_stride", "added_stride", "y_stride"])
def _product(x, w, added, y, n, m, k, x_stride, w_stride, added_stride, y_stride, ADDS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr):
    down, across = tl.cdiv(n, ROWS), tl.cdiv(m * OUT, COLUMNS)
    program = tl.program_id(0)
    top = program // (GROUP * across) * GROUP  # GROUP tiles below one another before the next column: what they read is in the cache
    high = tl.minimum(down - top, GROUP)
    within = program % (GROUP * across)
    row = (top + within % high).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (within // high).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_cols = row < n, col < m * OUT
    inner = tl.arange(0, INNER)
    x_at, w_at = x + row[:, None] * (x_stride * IN), w + col[None, :] * (w_stride * IN)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, k * IN, INNER):
        at = start + inner
        there = at < k * IN
        left = tl.load(x_at + at[None, :], in_rows[:, None] & there[None, :], 0.0)
        right = tl.load(w_at + at[:, None], in_cols[None, :] & there[:, None], 0.0)
        total = tl.dot(left, right, total)
    live = in_rows[:, None] & in_cols[None, :]
    if ADDS:
        total += tl.load(added + row[:, None] * (added_stride * OUT) + col[None, :], live, 0.0).to(tl.float32)
    tl.store(y + row[:, None] * (y_stride * OUT) + col[None, :], total.to(y.dtype.element_ty), live)


def _by_tile(tile: Tile, x: Tensor, w: Tensor, added: Tensor | None, y: Tensor) -> None:
    (n, k), m = x.shape, len(w)
    rows, columns, inner, warps, stages = tile
    other = y if added is None else added
    added_stride = other.stride(0) if other.dim() == 2 else 0
    unit = UNIT if k % UNIT == x.stride(0) % UNIT == w.stride(0) % UNIT == 0 else 1
    out = UNIT if m % UNIT == added_stride % UNIT == y.stride(0) % UNIT == 0 else 1
    _product[(triton.cdiv(n, rows) * triton.cdiv(m, columns),)](
        x, w, other, y, n, m // out, k // unit, x.stride(0) // unit, w.stride(0) // unit, added_stride // out, y.stride(0) // out,
        ADDS=added is not None, IN=unit, OUT=out, ROWS=rows, COLUMNS=columns, INNER=inner, GROUP=8, num_warps=warps, num_stages=stages,
    )


_ALIKE: dict[tuple[torch.device, torch.dtype], bool] = {}


def alike(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all tiles give the same bits on this device: tried once, in the run that comes before a capture. Each adds products of 16 numbers to the
    sum before them by the same instruction, but how wide an instruction is is the compiler's choice."""
    if (device, dtype) not in _ALIKE:
        numbers = torch.arange(640 * 1544, device=device).sin().view(640, 1544)
        x, w = (3.0 * numbers[:300]).to(dtype), numbers[300:].to(dtype)
        outs = [x.new_empty(len(x), len(w)) for _ in range(3)]
        for tile, out in zip((NARROW, BROAD, TALL), outs, strict=True):
            _by_tile(tile, x, w, None, out)
        _ALIKE[device, dtype] = all(torch.equal(outs[0], out) for out in outs[1:])
    return _ALIKE[device, dtype]


def product(x: Tensor, w: Tensor, added: Tensor | None, y: Tensor) -> None:
    """y [N, M] = x [N, k] · wᵀ [k, M] (+ added: [N, M], y itself too, or [M])."""
    if not alike(x.device, x.dtype):
        tile = BROAD
    elif len(x) > FEW:
        tile = TALL
    else:
        tile = BROAD if len(w) >= MANY_COLUMNS else NARROW
    _by_tile(tile, x, w, added, y)


@triton.jit(do_not_specialize=["tokens", "groups", "q_row", "q_token", "k_row", "k_token", "k_head"])
def _attention(q, k, v, out, logs, starts, first_at, tokens, groups, q_row, q_token, k_row, k_token, k_head, scale, EACH: tl.constexpr, E: tl.constexpr,
               UNIT: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    row, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    begin = tl.program_id(1) * QUERIES
    number = begin + tl.arange(0, QUERIES)
    token, head = number // EACH, group * EACH + number % EACH
    col, live = tl.arange(0, WIDTH), (number < tokens * EACH)[:, None] & (tl.arange(0, WIDTH) < E)[None, :]
    start = tl.load(starts + row)
    first = (tl.load(first_at) - start).to(tl.int32)  # what number in its row the first query is; below 0 is padding
    position = first + token
    last = first + tl.minimum(tokens * EACH - 1, begin + QUERIES - 1) // EACH
    low = 0
    if WINDOW:
        low = tl.maximum(first + begin // EACH - (WINDOW - 1), 0) // KEYS * KEYS
    query = tl.load(q + row * (q_row * UNIT) + token[:, None] * (q_token * UNIT) + head[:, None] * E + col[None, :], live, 0.0)
    k_at = row * (k_row * UNIT) + group * (k_head * UNIT) + start * (k_token * UNIT)
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, WIDTH), tl.float32)
    for at in range(low, last + 1, KEYS):
        key = at + tl.arange(0, KEYS)
        there = key <= last
        keys = tl.load(k + k_at + key[None, :] * (k_token * UNIT) + col[:, None], there[None, :] & (col < E)[:, None], 0.0)
        scores = tl.dot(query, keys) * (scale * 1.4426950408889634)
        seen = key[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        level = tl.where(new == float("-inf"), 0.0, new)
        shares = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(highest - level)
        total = total * shrink + tl.sum(shares, 1)
        values = tl.load(v + k_at + key[:, None] * (k_token * UNIT) + col[None, :], there[:, None] & (col < E)[None, :], 0.0)
        sums = tl.dot(shares.to(v.dtype.element_ty), values, sums * shrink[:, None])
        highest = new
    heads = groups * EACH
    merged = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + ((row * tokens + token) * heads + head)[:, None] * E + col[None, :], merged.to(out.dtype.element_ty), live)
    tl.store(logs + (row * heads + head) * tokens + token, (highest + tl.log2(total)) * 0.6931471805599453, number < tokens * EACH)


def attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, first: Tensor, scale: float, window: int, out: Tensor, logs: Tensor) -> None:
    """As invariant.attention, into out [R, T, H, e] and logs [R, H, T]; the last numbers of k and v lie alike."""
    rows, tokens, heads, e = q.shape
    groups = k.shape[1]
    each, block = heads // groups, triton.next_power_of_2(e)
    strides = [q.stride(0), q.stride(1), k.stride(0), k.stride(2), k.stride(1)]
    _attention[(rows * groups, triton.cdiv(tokens * each, QUERIES))](
        q, k, v, out, logs, starts, first, tokens, groups, *(stride // UNIT for stride in strides), scale, EACH=each, E=e, UNIT=UNIT, WIDTH=max(16, block),
        WINDOW=window, QUERIES=QUERIES, KEYS=KEYS, num_warps=4, num_stages=2 if block <= 128 else 1,
    )
