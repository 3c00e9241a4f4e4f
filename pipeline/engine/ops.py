"""The step's small operations, forward and backward: RMSNorm, rotary positions, SwiGLU and GeGLU, cross-entropy, AdamW.

Library. On CUDA each is one Triton kernel (misc.py); elsewhere plain torch, which is also the reference the kernels
are tested against. Shapes: N tokens, d width, f inner width, H query heads, G key-value heads, e head width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.engine.layout import NEARLY_ZERO, ROWS_AT_ONCE

Tensor = torch.Tensor
TWICE_ROOT_2_PI = 2.0 * math.sqrt(2.0 / math.pi)


def _kernels(tensor: Tensor) -> Any:
    """The Triton kernels where the tensor is on a GPU, else None."""
    if not tensor.is_cuda:
        return None
    from pipeline.engine import misc

    return misc


def rmsnorm(x: Tensor, weight: Tensor, eps: float, room: int = 0, out: Tensor | None = None, exact: bool = False, plus: bool = False,
            residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RMSNorm (Zhang & Sennrich, 2019): (weight · x / rms(x) [N, d + room], 1 / rms(x) [N] fp32) of x [N, d], whose rows may lie apart.

    The last `room` columns are zeros. out: a tensor to write into, x itself if it is one. exact: the mean is summed in the order of torch's reduction,
    so that every bit is that of transformers' module. plus: 1 + weight is applied, and nothing rounded before (Gemma). residual [N, d]: the norm is
    added to it, too, in place. But for `exact`, a weight of 0 counts as 2^-40: nothing in the output's sums, and the backward can still read the input.
    """
    y = x.new_empty(len(x), x.shape[1] + room) if out is None else out
    if x.is_cuda:
        from pipeline.engine import norm

        return y, norm.rmsnorm(x, weight, eps, y, exact, plus, residual)
    rstd = torch.rsqrt(x.float().square().mean(-1) + eps)
    normed = x.float() * rstd[:, None]
    w = weight.float() + plus
    w = w if exact else torch.where(w == 0, NEARLY_ZERO, w)
    y[:, : x.shape[1]] = normed * w if plus else w.to(weight.dtype) * normed.to(x.dtype)
    y[:, x.shape[1] :] = 0.0
    if residual is not None:
        residual.add_(y[:, : x.shape[1]])
    return y, rstd


def rmsnorm_backward(dy: Tensor, y: Tensor, weight: Tensor, rstd: Tensor, dres: Tensor | None, dweight: Tensor | None, room: int = 0,
                     plus: bool = False) -> Tensor:
    """Gradient [N, d + room] of RMSNorm's input from dy and its output y [N, d] (x / rms(x) is y / weight, so that x need not be saved).

    dres [N, d]: the residual's gradient, added; None: there is none. dweight [d]: takes the weight's gradient; None: the weight is frozen.
    Rows of dy, y and dres may lie apart; the last `room` columns are zeros. plus: as in rmsnorm.
    """
    dx = y.new_empty(len(y), weight.shape[0] + room)
    if y.is_cuda:
        from pipeline.engine import norm

        return norm.rmsnorm_backward(dy, y, weight, rstd, dres, dweight, dx, plus)
    w = weight.float() + plus
    w = torch.where(w == 0, NEARLY_ZERO, w)
    normed = y.float() / w
    if dweight is not None:
        dweight.copy_((dy.float() * normed).sum(0))
    scaled = dy.float() * w
    dnormed = rstd[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    dx[:, : len(w)] = dnormed + dres.float() if dres is not None else dnormed
    dx[:, len(w) :] = 0.0
    return dx


def head_norms_(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, heads: int, groups: int, exact: bool = False, plus: bool = False,
                before: Tensor | None = None) -> Tensor:
    """RMSNorm of each of H query heads by one weight [e] and of G key heads by another, in place in qkv [N, H + 2G, e]; 1 / rms [N, H + G] fp32.

    exact, plus: as in rmsnorm. before [N, H + G, e]: takes the heads as they were, for the backward.
    """
    if qkv.is_cuda and not exact:
        from pipeline.engine import norm

        return norm.head_norms_(qkv, q_weight, k_weight, eps, heads, groups, plus, before)
    if before is not None:
        before.copy_(qkv[:, : heads + groups])
    scales = []
    for part, weight in zip(qkv[:, : heads + groups].split((heads, groups), 1), (q_weight, k_weight), strict=True):  # as transformers' modules do
        wide = part.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        part.copy_(wide * rstd * (1.0 + weight.float()) if plus else weight * (wide * rstd).to(part.dtype))
        scales.append(rstd[..., 0])
    return torch.cat(scales, 1)


def head_norms_backward_(dqkv: Tensor, before: Tensor, rstd: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, plus: bool = False,
                         dq_weight: Tensor | None = None, dk_weight: Tensor | None = None) -> None:
    """Gradients through the norms of `head_norms_`, in place in the first (H + G)·e columns of dqkv [N, ..].

    before [N, H + G, e], contiguous: the norms' input. It is not read off their output: real weights hold zeros (Gemma 3 270M's), and a rotation mixes a
    small column with the large one beside it. dq_weight, dk_weight [e]: take the weights' gradients; None: they are frozen.
    """
    if dqkv.is_cuda:
        from pipeline.engine import norm

        return norm.head_norms_backward_(dqkv, before, rstd, q_weight, k_weight, heads, plus, dq_weight, dk_weight)
    n, both, e = before.shape
    gradient, normed = dqkv[:, : both * e].view(n, both, e).float(), before.float() * rstd[..., None]
    w = torch.cat([weight.float().expand(count, -1) for weight, count in ((q_weight, heads), (k_weight, both - heads))]) + plus
    if dq_weight is not None and dk_weight is not None:
        sums = (gradient * normed).sum(0)
        dq_weight.copy_(sums[:heads].sum(0))
        dk_weight.copy_(sums[heads:].sum(0))
    scaled = gradient * w
    dqkv[:, : both * e] = (rstd[..., None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))).view(n, -1)
    return None


def rotate_(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Rotary positions (Su et al., 2021) on the first `heads` heads of qkv [N, heads + G, e], in place; cos, sin [T, e], N a multiple of T.

    Where cos and sin are narrower than a head, its last columns are left as they are.
    """
    if kernels := _kernels(qkv):
        return kernels.rotate_(qkv, cos, sin, heads)
    part = qkv[:, :heads, : cos.shape[-1]]
    c, s = (v.repeat(qkv.shape[0] // v.shape[0], 1)[:, None] for v in (cos, sin))
    low, high = part.chunk(2, -1)
    part.copy_(part * c + torch.cat((-high, low), -1) * s)
    return None


def _turned_back(part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transposed rotation."""
    low, high = (part * sin).chunk(2, -1)
    return part * cos + torch.cat((high, -low), -1)


def unrotate(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, room: int = 0) -> Tensor:
    """Gradients dq [R, H, T, e], dk, dv [R, G, T, e] through the rotation, as one [R·T, (H + 2G)·e + room]; the last `room` columns are zeros."""
    out = dq.new_empty(dq.shape[0] * dq.shape[2], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[3] + room)
    if kernels := _kernels(dq):
        return kernels.unrotate(dq, dk, dv, cos, sin, out)
    turned, width = torch.cat((dq, dk), 1), cos.shape[-1]
    turned[..., :width] = _turned_back(turned[..., :width], cos, sin)
    flat = torch.cat((turned, dv), 1).transpose(1, 2).reshape(len(out), -1)
    out[:, : flat.shape[1]] = flat
    out[:, flat.shape[1] :] = 0.0
    return out


def swiglu(gu: Tensor, room: int = 0, gelu: bool = False, exact: bool = False) -> Tensor:
    """silu(gate) · up [N, f + room] of gu [N, 2f] (Shazeer, 2020), whose rows may lie apart; the last `room` columns are zeros.

    gelu: GELU's approximation by tanh in SiLU's place. exact: every bit as in transformers.
    """
    f = gu.shape[1] // 2
    h = gu.new_empty(len(gu), f + room)
    if gu.is_cuda and not (gelu and exact):
        from pipeline.engine import swiglu as triton_swiglu

        triton_swiglu.swiglu(gu, h, gelu)
    else:
        h[:, :f] = (F.gelu(gu[:, :f], approximate="tanh") if gelu else F.silu(gu[:, :f])) * gu[:, f:]
        h[:, f:] = 0.0
    return h


def swiglu_backward_thin_(dh: Tensor, gu: Tensor, xa: Tensor, dxa: Tensor, db: Tensor, da: Tensor, gelu: bool = False) -> Tensor:
    """d gu [N, 2f], as `swiglu_backward_` makes it of dh [N, f] and gu [N, 2f] (overwritten), and the LoRA gradients that need d gu or h.

    xa [N, 2r]: x Aᵀ of the gate and up maps ([N, r]: of one map that is both); the gradient of their B goes into db [2f, r]. dxa [N, r]: the gradient
    of the down map's x Aᵀ; that of its A goes into da [r, f]. Rows of all but db and da may lie apart. On a GPU in one pass: h is never written, d gu
    not read again.
    """
    if gu.is_cuda:
        from pipeline.engine import swiglu as triton_swiglu

        if triton_swiglu.suits(gu, len(da)):
            return triton_swiglu.backward_thin_(dh, gu, xa, dxa, db, da, gelu)
    f = dh.shape[1]
    h, dgu = swiglu_backward_(dh, gu, gelu)
    thin_(db.t(), xa, dgu, [f, 2 * f] if xa.shape[1] > len(da) else [2 * f])
    thin_(da, dxa, h, [f])
    return dgu


def swiglu_backward_(dh: Tensor, gu: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """SwiGLU backward: (its output h [N, f], d gu [N, 2f]) from dh [N, f] and gu [N, 2f], whose rows may lie apart; both inputs are overwritten."""
    if gu.is_cuda:
        from pipeline.engine import swiglu as triton_swiglu

        return triton_swiglu.swiglu_backward_(dh, gu, gelu)
    gate, up = (v.float() for v in gu.chunk(2, -1))
    inner = 1.0 + 0.044715 * gate.square() if gelu else 1.0
    steep = TWICE_ROOT_2_PI * inner if gelu else 1.0  # tanh(u) is 2 sigmoid(2u) - 1
    sigmoid = torch.sigmoid(gate * steep)
    value, d = gate * sigmoid, dh.float()
    slope = TWICE_ROOT_2_PI * (3.0 * inner - 2.0) if gelu else 1.0
    h = value * up
    gu.copy_(torch.cat((d * up * (sigmoid + value * (1 - sigmoid) * slope), d * value), -1))
    return dh.copy_(h), gu


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """weights · -log softmax(logits)[targets], [N] fp32, of logits [N, V], targets [N] int64, weights [N] fp32.

    The logits are overwritten by the gradient of the sum. A weight of 0 gives a loss and a gradient of exactly 0, whatever the logits are.
    """
    if logits.is_cuda:
        from pipeline.engine import misc

        return misc.cross_entropy_(logits, targets, weights)
    loss = torch.empty(len(logits), device=logits.device)
    for first in range(0, len(logits), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        logs, target, weight = torch.log_softmax(logits[rows].float(), -1), targets[rows, None], weights[rows, None]
        loss[rows] = -(weight * logs.gather(1, target))[:, 0]
        grad = logs.exp_()
        logits[rows] = grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0)).mul_(weight)
    if not (counted := weights != 0).all():
        loss[~counted], logits[~counted] = 0.0, 0.0
    return loss


class WeightedNll(torch.autograd.Function):
    """Σ weights · nll, scalar fp32, of logits [N, V], targets, weights [N]: `cross_entropy_` for autograd. For one backward; the logits are overwritten."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        ctx.gradient = logits.detach()
        return cross_entropy_(ctx.gradient, targets, weights).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # or it would stay until backward has ended
        return gradient.mul_(upstream), None, None


def adamw_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, rate: Tensor, shrink: Tensor, root: Tensor, factor: Tensor,
           scale: Tensor | None, betas: tuple[float, float], eps: float) -> None:
    """AdamW (Loshchilov & Hutter, 2019) on parameters p, gradients g, moments m, v [K, P], fp32 but g, in place.

    Args:
        copy: [K, P], takes p (· scale) in its dtype; None: no copy.
        rate, shrink, root, factor: [K] fp32: lr / (1 - beta1^t), 1 - lr · weight decay, sqrt(1 - beta2^t), and what g is multiplied by.
        scale: [K] fp32, LoRA's alpha / r; None: 1.
    """
    if kernels := _kernels(p):
        return kernels.adamw_(p, g, m, v, copy, rate, shrink, root, factor, scale, betas, eps)
    g = g.float() * factor[:, None]
    p.mul_(shrink[:, None])
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    p.sub_(rate[:, None] * m / (v.sqrt() / root[:, None] + eps))
    if copy is not None:
        copy.copy_(p if scale is None else p * scale[:, None])
    return None


@dataclass
class Noise:
    """The dropout of K slots (Srivastava et al., 2014), all on the device.

    p [K] fp32; seed [K] int64; step [K]: steps that the slot has taken; first [] int64: the row of the step that the micro-batch begins with.
    Whether a number is dropped is a hash of its seed, step, member of the model, row, token and column alone: a run's dropout does not depend on its
    neighbours, on padding or on how a step is split.
    """

    p: Tensor
    seed: Tensor
    step: Tensor
    first: Tensor
    tokens: int = 0
    """Tokens of a row of the current batch."""
    on: bool = True
    """False while a model only answers."""
    stream: tuple[Tensor, Tensor] | None = None
    """(row, token) [K·R·T] where rows stand one after another; None: rows of `tokens` tokens."""

    def keys(self, rows: int, member: int) -> Tensor:
        """The hash of everything but the column, [rows] int64 below 2^32, for rows = K·R·T."""
        at = torch.arange(rows, device=self.p.device).view(len(self.p), -1)
        row, token = (part.view(at.shape) for part in self.stream) if self.stream else ((at - at[:, :1]) // self.tokens, at % self.tokens)
        row = row + self.first
        start = mix(mix(self.seed + GOLDEN) ^ (self.step.long() * GOLDEN & MASK)) ^ (member * GOLDEN & MASK)
        return mix(mix(start)[:, None] ^ (row * 65536 + token & MASK)).reshape(-1)


GOLDEN, MASK = 0x9E3779B1, 0xFFFFFFFF


def mix(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser (Appleby, 2011), in int64."""
    h = h & MASK
    h = (h ^ (h >> 16)) * 0x85EBCA6B & MASK
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & MASK
    return h ^ (h >> 16)


def drop(x: Tensor, noise: Noise, member: int) -> Tensor:
    """x [N, d] with each number zeroed with its slot's probability p, else divided by 1 - p; the same numbers at every call with the same arguments."""
    keys = noise.keys(len(x), member)
    if kernels := _kernels(x):
        return kernels.drop(x, keys, noise.p)
    column = torch.arange(x.shape[1], device=x.device) * GOLDEN & MASK
    p = noise.p.repeat_interleave(len(x) // len(noise.p))[:, None]
    stays = mix(keys[:, None] ^ column) >= (p.double() * 2**32)
    return torch.where(stays, x / (1 - p), 0.0).to(x.dtype)


def thin_(out: Tensor, p: Tensor, x: Tensor, ends: list[int]) -> None:
    """out [r, D] = pᵀ x by member, for LoRA's gradients: columns of x [N, D] up to ends[0] with the first r columns of p [N, m·r], up to ends[1] with the
    next r, and so on. N is large and r small, so that on CUDA a kernel of its own is faster."""
    rank = len(out)
    if x.is_cuda:
        from pipeline.engine.misc import thin_

        if thin_(out, p, x, ends):
            return
    for j, (lo, hi) in enumerate(zip([0, *ends], ends, strict=False)):
        torch.mm(p[:, j * rank : (j + 1) * rank].t(), x[:, lo:hi], out=out[:, lo:hi])


def wide_product(x: Tensor, w: Tensor) -> Tensor:
    """x wᵀ [N, M] of x [N, k] and w [M, k] in any dtype, summed and kept in fp32."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, w.t(), out_dtype=torch.float32)
    return x.float() @ w.float().t()


class Scatter:
    """Repeats copies at once, in one launch on CUDA: every first tensor [m, r], contiguous, into the second, whose rows may lie apart.

    For LoRA's A and B, which stand a second time beside and under the frozen weights (linear.py).
    """

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs
        self._kernels = _kernels(pairs[0][0]) if pairs else None
        self._table = self._kernels.scatter_table(pairs) if self._kernels else None

    def copy(self) -> None:
        if self._kernels:
            self._kernels.scatter_(self._table, max(s.numel() for s, _ in self.pairs), self.pairs[0][0].dtype)
        else:
            for source, target in self.pairs:
                target.copy_(source)


def dequantise_nf4_(out: Tensor, packed: Tensor, state: Any) -> None:
    """4-bit weights (NF4: Dettmers et al., 2023; bitsandbytes' layout and QuantState) into out [rows, columns], whose rows may lie apart."""
    kernels = _kernels(packed)
    if kernels and kernels.dequantise_nf4_(out, packed, state):
        return
    from bitsandbytes.functional import dequantize_4bit

    out.copy_(dequantize_4bit(packed, state))
