"""Causal attention of the hand-written step, forward and backward: over rows of equal width, or over rows one after another in a stream.

Library of llama.py. Both take q, k, v stacked, qkv [N, (H + 2G)·e] with H query heads and G key-value heads of width e, already rotated, and give the
heads' outputs side by side, `merged` [N, H·e].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.attention
import torch.nn.functional as F

from pipeline.engine.families import Heads
from pipeline.engine.ops import Tensor


class AttentionForward(Protocol):
    """Attention without backward."""

    def forward(self, heads: Heads, qkv: Tensor, save: bool) -> tuple[Tensor, tuple]:
        """(merged [N, H·e], what backward needs, if `save`)."""


class Attention(AttentionForward, Protocol):
    """Attention with backward."""

    def output(self, heads: Heads, saved: tuple) -> Tensor:
        """`merged` again, from what was saved."""

    def backward(self, heads: Heads, saved: tuple, dmerged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq [R, H, T, e], dk, dv [R, G, T, e] of dmerged [N, H·e]."""


@dataclass(frozen=True)
class Rows:
    """Rows of `tokens` tokens each. backends: the kernels to choose from (torch.nn.attention.SDPBackend); None: torch's own order."""

    tokens: int
    backends: list[Any] | None = None

    def forward(self, heads: Heads, qkv: Tensor, save: bool) -> tuple[Tensor, tuple]:
        if self._as_stream(heads, qkv):
            return self._stream(qkv).forward(heads, qkv, save)
        with torch.set_grad_enabled(save):
            q, k, v = (p.detach().requires_grad_(save) for p in heads.split(qkv, self.tokens))
            if 0 < heads.window < self.tokens:
                mask = windowed(causal(self.tokens, qkv.device), heads.window)
                output = F.scaled_dot_product_attention(q, k, v, mask, scale=heads.scale, enable_gqa=heads.queries != heads.groups)
            else:
                output = attention(q, k, v, self.backends, heads.scale)
        return heads.merge(output.detach()), (q, k, v, output)

    def _as_stream(self, heads: Heads, qkv: Tensor) -> bool:
        """Whether the kernel for streams is needed, the only one that leaves out what is outside a window."""
        return 0 < heads.window < self.tokens and qkv.is_cuda and qkv.dtype != torch.float32

    def _stream(self, qkv: Tensor) -> Stream:
        ends = torch.arange(0, len(qkv) + 1, self.tokens, device=qkv.device, dtype=torch.int32)
        return Stream(ends, ends, ends, self.tokens)

    def output(self, heads: Heads, saved: tuple) -> Tensor:
        return self._stream(saved[3]).output(heads, saved) if self._as_stream(heads, saved[3]) else heads.merge(saved[3].detach())

    def backward(self, heads: Heads, saved: tuple, dmerged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._as_stream(heads, dmerged):
            dq, dk, dv = (
                part[0].unflatten(1, (-1, self.tokens)).transpose(0, 1) for part in self._stream(dmerged).backward(heads, saved, dmerged)
            )
            return dq, dk, dv
        *inputs, output = saved
        doutput = dmerged.reshape(output.shape[0], output.shape[2], heads.queries, heads.width).transpose(1, 2)
        dq, dk, dv = torch.autograd.grad(output, inputs, doutput)
        return dq, dk, dv


@dataclass(frozen=True)
class Stream:
    """Rows one after another in [N] tokens: a token attends to its own row alone (Krell et al., 2021, without cross-contamination).

    ends [S + 1] int32: where each row begins and the last one ends (rows may be empty; together they are all N tokens). position, row [N] int64:
    a token's number in its row, and the row's number in its slot. longest: most tokens of a row.
    """

    ends: Tensor
    position: Tensor
    row: Tensor
    longest: int

    def forward(self, heads: Heads, qkv: Tensor, save: bool) -> tuple[Tensor, tuple]:
        if not qkv.is_cuda:
            with torch.set_grad_enabled(save):
                q, k, v = (p.detach().requires_grad_(save) for p in heads.split(qkv, len(qkv)))
                token = torch.arange(len(qkv))
                row = torch.searchsorted(self.ends[1:], token, right=True)
                mask = windowed((row[:, None] == row) & (token[:, None] >= token), heads.window)
                output = F.scaled_dot_product_attention(q, k, v, mask, scale=heads.scale, enable_gqa=heads.queries != heads.groups)
            return heads.merge(output.detach()), (q, k, v, output)
        q, k, v = qkv.view(len(qkv), -1, heads.width).split((heads.queries, heads.groups, heads.groups), 1)
        output, *state, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, self.ends, self.ends, self.longest, self.longest, 0.0, True, False, **self._options(heads)
        )
        return output.reshape(len(qkv), -1), (q, k, v, output, *state)

    def _options(self, heads: Heads) -> dict[str, Any]:
        window = {"window_size_left": heads.window - 1, "window_size_right": 0} if 0 < heads.window < self.longest else {}
        return {"scale": heads.scale, **window}

    def output(self, heads: Heads, saved: tuple) -> Tensor:
        return saved[3].reshape(len(saved[3]), -1) if saved[3].is_cuda else heads.merge(saved[3].detach())

    def backward(self, heads: Heads, saved: tuple, dmerged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not dmerged.is_cuda:
            return Rows(len(dmerged)).backward(heads, saved, dmerged)
        q, k, v, output, logs, state, unused = saved
        gradients = torch.ops.aten._flash_attention_backward(
            dmerged.view(output.shape), q, k, v, output, logs, self.ends, self.ends, self.longest, self.longest, 0.0, True, state, unused,
            **self._options(heads),
        )
        dq, dk, dv = (part.transpose(0, 1)[None] for part in gradients)
        return dq, dk, dv


def causal(tokens: int, device: Any) -> Tensor:
    """[T, T] bool: True where a token attends to another."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


def windowed(mask: Tensor, window: int) -> Tensor:
    """`mask` [.., T, S] of T tokens that are the last of S in a row, without what is `window` or more tokens before (0: nothing is left out)."""
    t, s = mask.shape[-2:]
    return mask & torch.ones(t, s, dtype=torch.bool, device=mask.device).triu(s - t - window + 1) if 0 < window < s else mask


def attention(q: Tensor, k: Tensor, v: Tensor, backends: list[Any] | None = None, scale: float | None = None) -> Tensor:
    """Causal attention [R, H, T, e] of q [R, H, T, e], k, v [R, G, T, e] by one of the `backends`; None: torch chooses. scale: as in Heads."""
    grouped = q.shape[1] != k.shape[1]
    if backends is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    with torch.nn.attention.sdpa_kernel(backends):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Attention [R, H, T, e], causal or by the mask (True where a token attends to another, or a bias), over key-value heads copied for each query head, as
    in transformers; causal attention in 16 bits, and on a CPU, does not copy them. scale: as in Heads."""
    if mask is None and (q.dtype != torch.float32 or not q.is_cuda):
        return attention(q, k, v, scale=scale)
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)


def has_grouped_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> bool:
    """Whether torch has a fused kernel for q [R, H, T, e], k, v [R, G, L, e] that reads a key-value head for several query heads."""
    return torch._fused_sdp_choice(q, k, v, bias, 0.0, False, enable_gqa=True) != torch.nn.attention.SDPBackend.MATH.value


def single_query_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
    """Attention [R, H, e] of one query a row [R, H, e] over k, v [R, G, L, e] by the bias [R, 1, 1, L]; no key-value head is copied.

    Where no kernel reads one for several query heads, its H / G query heads are passed as H / G queries of one head. scale: as in Heads.
    """
    if has_grouped_kernel(q[:, :, None], k, v, bias):
        return F.scaled_dot_product_attention(q[:, :, None], k, v, bias, scale=scale, enable_gqa=True)[:, :, 0]
    each = q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (-1, each))
    return F.scaled_dot_product_attention(grouped, k, v, bias.expand(-1, k.shape[1], each, -1), scale=scale).flatten(1, 2)
