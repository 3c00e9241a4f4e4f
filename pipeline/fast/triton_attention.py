"""Attention of one more token a row over its cache, in Triton: a program handles the query heads that share a key-value head of a row.

Library; ops.py has the formula and the meaning. A row is as long as it is: no mask, and no work on the columns behind it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor


@triton.jit
def _attend_next(qkv, keys, values, at, out, scale, heads, groups, length, e, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    each = heads // groups
    query, col = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    real, live = query < each, col < e
    base = qkv + row * (heads + 2 * groups) * e
    ours = real[:, None] & live[None, :]
    q = tl.load(base + (group * each + query)[:, None] * e + col[None, :], ours, 0.0)
    k_new = tl.load(base + (heads + group) * e + col, live, 0.0)
    v_new = tl.load(base + (heads + groups + group) * e + col, live, 0.0)
    last = tl.load(at + row)
    held = (row * groups + group) * length * e
    tl.store(keys + held + last * e + col, k_new, live)
    tl.store(values + held + last * e + col, v_new, live)
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    summed = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(0, last + 1, KEYS):
        number = start + tl.arange(0, KEYS)
        where = held + number[:, None] * e + col[None, :]
        old = (number < last)[:, None] & live[None, :]
        new = (number == last)[:, None]  # not read back: what this program has just stored need not be there yet
        k = tl.where(new, k_new[None, :], tl.load(keys + where, old, 0.0))
        v = tl.where(new, v_new[None, :], tl.load(values + where, old, 0.0))
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((number <= last)[None, :], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - above[:, None])
        shrink = tl.exp(highest - above)
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = above
    tl.store(out + row * heads * e + (group * each + query)[:, None] * e + col[None, :], summed / total[:, None], ours)


def attend_next(qkv: Tensor, keys: Tensor, values: Tensor, at: Tensor, heads: int) -> Tensor:
    rows, groups, length, e = keys.shape
    out = torch.empty(rows, heads * e, device=qkv.device, dtype=qkv.dtype)
    queries = max(16, triton.next_power_of_2(heads // groups))
    width = max(16, triton.next_power_of_2(e))
    _attend_next[(rows, groups)](qkv, keys, values, at, out, e**-0.5, heads, groups, length, e, QUERIES=queries, KEYS=64, WIDTH=width, num_warps=4)
    return out
