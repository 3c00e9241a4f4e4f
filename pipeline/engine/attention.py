"""Causal attention of the hand-written step, forward and back: over rows of equal width, or over rows that stand one after another.

Library of llama.py. Both take q, k, v stacked, [N, (H + 2G)·e] with H query heads, G key-value heads of width e, already rotated, and give the
heads' outputs side by side, [N, H·e].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.attention
import torch.nn.functional as F

from pipeline.engine.ops import Tensor


@dataclass(frozen=True)
class Heads:
    """Of a layer: query heads, key-value heads, and the width of one."""

    queries: int
    groups: int
    width: int

    def parts(self, qkv: Tensor, t: int) -> Sequence[Tensor]:
        """q [R, H, T, e], k, v [R, G, T, e] of qkv [R·T, (H + 2G)·e], as views."""
        return qkv.view(-1, t, self.queries + 2 * self.groups, self.width).transpose(1, 2).split((self.queries, self.groups, self.groups), 1)

    def mixed(self, output: Tensor) -> Tensor:
        """Heads' outputs [R, H, T, e] side by side, [N, H·e]."""
        return output.transpose(1, 2).reshape(-1, self.queries * self.width)


class Attends(Protocol):
    """A way to attend that is not gone back."""

    def forward(self, heads: Heads, qkv: Tensor, save: bool) -> tuple[Tensor, tuple]:
        """(mixed [N, H·e], what the way back needs if it is to be saved)."""


class Attend(Attends, Protocol):
    """A way to attend, and back."""

    def again(self, heads: Heads, saved: tuple) -> Tensor:
        """`mixed` once more, from what was saved."""

    def backward(self, heads: Heads, saved: tuple, dmixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq [R, H, T, e], dk, dv [R, G, T, e]."""


@dataclass(frozen=True)
class Rows:
    """Rows of `tokens` tokens each. backends: the kernels to choose from (torch.nn.attention.SDPBackend); None: torch's own order."""

    tokens: int
    backends: list[Any] | None = None

    def forward(self, heads: Heads, qkv: Tensor, save: bool) -> tuple[Tensor, tuple]:
        with torch.set_grad_enabled(save):
            q, k, v = (p.detach().requires_grad_(save) for p in heads.parts(qkv, self.tokens))
            output = attention(q, k, v, self.backends)
        return heads.mixed(output.detach()), (q, k, v, output)

    def again(self, heads: Heads, saved: tuple) -> Tensor:
        return heads.mixed(saved[3].detach())

    def backward(self, heads: Heads, saved: tuple, dmixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, output = saved
        doutput = dmixed.reshape(output.shape[0], output.shape[2], heads.queries, heads.width).transpose(1, 2)
        dq, dk, dv = torch.autograd.grad(output, inputs, doutput)
        return dq, dk, dv


@dataclass(frozen=True)
class Stream:
    """Rows one after another in [N] tokens: a token attends to those of its own row alone (Krell et al., 2021, without cross-contamination).

    ends [S + 1] int32: where each row begins and the last one ends (rows may be empty; together they are all N tokens). position, row [N] int64:
    of a token, its number in its row, and its row's among its slot's. longest: tokens that a row has at most.
    """

    ends: Tensor
    position: Tensor
    row: Tensor
    longest: int

    def forward(self, heads: Heads, qkv: Tensor, save: bool) -> tuple[Tensor, tuple]:
        if not qkv.is_cuda:
            with torch.set_grad_enabled(save):
                q, k, v = (p.detach().requires_grad_(save) for p in heads.parts(qkv, len(qkv)))
                every = torch.arange(len(qkv))
                home = torch.searchsorted(self.ends[1:], every, right=True)
                among = (home[:, None] == home) & (every[:, None] >= every)
                output = F.scaled_dot_product_attention(q, k, v, among, enable_gqa=heads.queries != heads.groups)
            return heads.mixed(output.detach()), (q, k, v, output)
        q, k, v = qkv.view(len(qkv), -1, heads.width).split((heads.queries, heads.groups, heads.groups), 1)
        output, *kept, _ = torch.ops.aten._flash_attention_forward(q, k, v, self.ends, self.ends, self.longest, self.longest, 0.0, True, False)
        return output.reshape(len(qkv), -1), (q, k, v, output, *kept)

    def again(self, heads: Heads, saved: tuple) -> Tensor:
        return saved[3].reshape(len(saved[3]), -1) if saved[3].is_cuda else heads.mixed(saved[3].detach())

    def backward(self, heads: Heads, saved: tuple, dmixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not dmixed.is_cuda:
            return Rows(len(dmixed)).backward(heads, saved, dmixed)
        q, k, v, output, logs, state, unused = saved
        found = torch.ops.aten._flash_attention_backward(
            dmixed.view(output.shape), q, k, v, output, logs, self.ends, self.ends, self.longest, self.longest, 0.0, True, state, unused,
        )
        dq, dk, dv = (part.transpose(0, 1)[None] for part in found)
        return dq, dk, dv


def attention(q: Tensor, k: Tensor, v: Tensor, backends: list[Any] | None = None) -> Tensor:
    """Causal attention [R, H, T, e] of q [R, H, T, e], k, v [R, G, T, e], by one of the `backends` (None: torch chooses)."""
    grouped = q.shape[1] != k.shape[1]
    if backends is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    with torch.nn.attention.sdpa_kernel(backends):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def seen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention [R, H, T, e], causal or by the mask (True where a token sees another, or a bias), over copies of the key-value heads as transformers
    has them; causal attention in 16 bits shares them."""
    if mask is None and (q.dtype != torch.float32 or not q.is_cuda):
        return attention(q, k, v)
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


def shares(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> bool:
    """Whether torch has a kernel for q [R, H, T, e], k, v [R, G, L, e] that reads a key-value head for several query heads; else it would take plain
    products."""
    return torch._fused_sdp_choice(q, k, v, bias, 0.0, False, enable_gqa=True) != torch.nn.attention.SDPBackend.MATH.value


def after(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention [R, H, e] of one query a row [R, H, e] over k, v [R, G, L, e] by the bias [R, 1, 1, L]; no key-value head is copied.

    Where no kernel shares them, the query heads of one stand where others expect queries one after another.
    """
    if shares(q[:, :, None], k, v, bias):
        return F.scaled_dot_product_attention(q[:, :, None], k, v, bias, enable_gqa=True)[:, :, 0]
    each = q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (-1, each))
    return F.scaled_dot_product_attention(grouped, k, v, bias.expand(-1, k.shape[1], each, -1)).flatten(1, 2)
