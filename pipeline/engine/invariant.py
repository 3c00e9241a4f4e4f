"""Products and attention whose numbers for a token do not depend on what is computed with it: the same bits whether it is one of many tokens of a training
step, of a prompt, or one that is drawn after cached ones (batch invariance: He et al., 2025, Defeating Nondeterminism in LLM Inference).

Library of llama.py, for reinforcement learning on drawn texts: log p of a token as it was drawn is then that which it is trained with. Libraries choose a
kernel, and with it an order of sums, by how many rows there are; in 16 bits log p moves by hundredths of a nat. On CUDA by Triton
(invariant_kernels.py), elsewhere by plain torch in tiles of one size: slow, the reference for tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pipeline.engine import attention as plain
from pipeline.engine.families import Heads
from pipeline.engine.ops import Tensor

WIDEST = 256
"""Of a head, for the backward kernel."""
TILE, KEYS = 64, 64
"""Plain torch's rows of a product and of queries at a time, and keys."""


def suits(dtype: torch.dtype, heads: Heads) -> bool:
    """Whether a layer with these heads can be computed so: in 16 bits (in 32 another order of sums moves log p by millionths of a nat)."""
    return dtype.itemsize == 2 and heads.width % 8 == 0 and heads.width <= WIDEST


def product(x: Tensor, w: Tensor, added: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x [N, k] · wᵀ [k, M], summed in fp32, `added` to the sum ([N, M] or a bias [M]) and rounded once; into `out`, which may be `added`."""
    out = x.new_empty(len(x), len(w)) if out is None else out
    if x.is_cuda:
        from pipeline.engine import invariant_kernels

        invariant_kernels.product(x, w, added, out)
        return out
    wide = w.float().t()
    for low in range(0, len(x), TILE):
        part = x[low : low + TILE].float()
        with torch.autocast("cpu", enabled=False):
            sums = (torch.cat((part, part.new_zeros(TILE - len(part), part.shape[1]))) @ wide)[: len(part)]
        out[low : low + TILE] = sums if added is None else sums + (added[low : low + TILE] if added.dim() == 2 else added).float()
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, first: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Causal attention of T queries a row: (merged [R·T, H·e], logs of the sums of exp(scores) [R, H, T] fp32).

    q [R, T, H, e]; k, v [R, G, L, e], whose tokens lie alike. starts [R] int64: in which of the L columns a row begins; first [1] int64: in which its
    first query stands, before the others. Before a row's start there is padding, whose queries give finite numbers.
    """
    rows, tokens = q.shape[:2]
    scale = 1.0 / math.sqrt(heads.width) if heads.scale is None else heads.scale
    out, logs = q.new_empty(q.shape), q.new_empty(rows, heads.queries, tokens, dtype=torch.float32)
    if q.is_cuda:
        from pipeline.engine import invariant_kernels

        invariant_kernels.attention(q, k, v, starts, first, scale, heads.window, out, logs)
    else:
        with torch.autocast("cpu", enabled=False):
            _attention(q, k, v, starts, first, scale, heads.window, out, logs)
    return out.view(rows * tokens, -1), logs


def _attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, first: Tensor, scale: float, window: int, out: Tensor, logs: Tensor) -> None:
    """In the kernel's tiles: the query heads of a key head beside one another."""
    (rows, tokens, heads, e), (groups, length) = q.shape, k.shape[1:3]
    each = heads // groups
    tiles = -(-tokens * each // TILE)
    queries = q.unflatten(2, (groups, each)).permute(0, 2, 1, 3, 4).reshape(rows * groups, -1, e)
    queries = torch.nn.functional.pad(queries.float(), (0, 0, 0, tiles * TILE - queries.shape[1])).view(-1, TILE, e)
    token = (torch.arange(tiles * TILE) // each).clamp(max=tokens - 1)
    position = (first + token - starts[:, None]).view(rows, 1, tiles, TILE, 1).expand(-1, groups, -1, -1, -1).reshape(-1, TILE, 1)
    highest = torch.full((len(queries), TILE, 1), -math.inf)
    total, sums = torch.zeros_like(highest), torch.zeros_like(queries)
    for at in range(0, length, KEYS):
        key = at + torch.arange(KEYS)
        where = (starts[:, None] + key).clamp(max=length - 1).view(rows, 1, KEYS, 1).expand(-1, groups, -1, e)
        keys, values = (part.gather(2, where).float().view(-1, 1, KEYS, e).expand(-1, tiles, -1, -1).reshape(-1, KEYS, e) for part in (k, v))
        seen = (key <= position) & (key > position - (window or length))
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(~seen, -math.inf)
        new = torch.maximum(highest, scores.amax(-1, keepdim=True))
        level = new.masked_fill(new == -math.inf, 0.0)
        shares, shrink = (scores - level).exp(), (highest - level).exp()
        total = total * shrink + shares.sum(-1, keepdim=True)
        sums, highest = sums * shrink + shares.to(v.dtype).float() @ values, new
    merged = (sums / total.masked_fill(total == 0, 1.0)).view(rows, groups, -1, e)[:, :, : tokens * each]
    out.copy_(merged.unflatten(2, (tokens, each)).permute(0, 2, 1, 3, 4).reshape(out.shape))
    logs.copy_((highest + total.log()).view(rows, groups, -1)[:, :, : tokens * each].unflatten(2, (tokens, each)).transpose(2, 3).reshape(logs.shape))


@dataclass(frozen=True)
class Rows:
    """As attention.Rows: rows of `tokens` tokens each, forward in one order; backward by flash attention's kernel (elsewhere than on CUDA by autograd)."""

    tokens: int

    def forward(self, heads: Heads, qkv: Tensor, save: bool) -> tuple[Tensor, tuple]:
        q, k, v = self._split(heads, qkv)
        zeros = torch.zeros(len(q), dtype=torch.long, device=qkv.device)
        merged, logs = attention(q, k.transpose(1, 2), v.transpose(1, 2), zeros, zeros[:1], heads)
        return merged, (qkv, merged, logs) if save else ()

    def _split(self, heads: Heads, qkv: Tensor) -> tuple[Tensor, ...]:
        """q [R, T, H, e], k, v [R, T, G, e] as views."""
        return qkv.view(-1, self.tokens, heads.queries + 2 * heads.groups, heads.width).split((heads.queries, heads.groups, heads.groups), 2)

    def output(self, heads: Heads, saved: tuple) -> Tensor:
        merged: Tensor = saved[1]
        return merged

    def backward(self, heads: Heads, saved: tuple, dmerged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv, merged, logs = saved
        if not qkv.is_cuda:
            rows = plain.Rows(self.tokens)
            return rows.backward(heads, rows.forward(heads, qkv, True)[1], dmerged)
        q, k, v = self._split(heads, qkv)
        window = {"window_size_left": heads.window - 1, "window_size_right": 0} if 0 < heads.window < self.tokens else {}
        unused = torch.empty(2, dtype=torch.uint64, device=qkv.device)  # the state of a dropout that there is not
        gradients = torch.ops.aten._flash_attention_backward(
            dmerged.reshape(q.shape), q, k, v, merged.view(q.shape), logs, None, None, self.tokens, self.tokens, 0.0, True, unused, unused,
            scale=heads.scale, **window,
        )
        dq, dk, dv = (part.transpose(1, 2) for part in gradients)
        return dq, dk, dv


@dataclass(frozen=True)
class CachedRows:
    """Attention of T tokens a row at `columns` [T] int64, one after another, to the row's tokens up to them, which begin at `starts` [R] int64; their keys
    and values go into `cache` [R, 2G, L, e]."""

    cache: Tensor
    starts: Tensor
    columns: Tensor

    def forward(self, heads: Heads, qkv: Tensor, save: bool) -> tuple[Tensor, tuple]:
        q, kv = qkv.view(len(self.starts), len(self.columns), -1, heads.width).split((heads.queries, 2 * heads.groups), 2)
        self.cache.index_copy_(2, self.columns, kv.transpose(1, 2))
        k, v = self.cache.split(heads.groups, 1)
        return attention(q, k, v, self.starts, self.columns[:1], heads)[0], ()
