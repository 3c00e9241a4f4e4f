"""The Llama family's forward and backward by hand: frozen, adapted or trained weights, one or several adapters at once.

Library. Against autograd over the modules this saves less for backward (norms, activations and rotations are computed
again), launches fewer kernels (stacked q, k, v and gate, up; residual sums inside the products; adapters not in fp32),
and makes no gradient of a frozen weight. Every function is checked against transformers with autograd
(tests/test_fast_llama.py).

Shapes: K slots (runs), R rows in all, T tokens a row, N = R·T, d width, r rank. Rows lie slot after slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.engine import ops
from pipeline.engine.attention import Attention, AttentionForward, Heads, Rows, Stream
from pipeline.engine.layout import logits_rows
from pipeline.engine.linear import Linears
from pipeline.engine.ops import Tensor


def _spread(picked: Tensor, at: Tensor, rows: int, room: int) -> Tensor:
    """Zeros [rows, d + room] with picked [M, d] added to the rows `at` [M]."""
    whole = picked.new_zeros(rows, picked.shape[1] + room)
    whole[:, : picked.shape[1]].index_add_(0, at, picked)
    return whole


class SideStream:
    """Where weight gradients are made: on a CUDA stream beside backward's, or (stream None) in turn.

    Tensors that the side stream reads are referenced here until `join`, so that their memory is not handed out before.
    """

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream
        self._read: list[tuple] = []

    def do(self, linears: Linears, *tensors: Tensor | None) -> None:
        """linears.backward_weight(*tensors)."""
        if self.stream is None or not linears.trained:
            linears.backward_weight(*tensors)
            return
        self._read.append(tensors)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            linears.backward_weight(*tensors)

    def join(self) -> None:
        """Let backward's stream wait for the side stream."""
        if self._read:
            torch.cuda.current_stream().wait_stream(self.stream)
            self._read.clear()


@dataclass
class Norm:
    """RMSNorm's weight [d], and where its gradient goes if it is trained."""

    weight: Tensor
    dweight: Tensor | None = None


@dataclass
class Layer:
    """One decoder layer (Touvron et al., 2023): x + attention(norm(x)), then x + down(silu(gate) · up) of its norm."""

    norm1: Norm
    qkv: Linears
    out: Linears
    norm2: Norm
    gate_up: Linears
    down: Linears
    heads: Heads
    eps: float
    reserved: list[Tensor] | None = None
    """Memory for the largest of what backward needs, for the most tokens of a batch (`reserve`); None: new tensors at every forward."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: AttentionForward, save: bool, exact: bool = False) -> tuple[Tensor, tuple]:
        """(output [N, d], what backward needs) of x [N, d], which becomes the output; cos, sin [T, e] with N a multiple of T.
        save: whether backward follows. exact: as in ops.rmsnorm."""
        to1, to2, to3, to4 = [tensor[: len(x)] for tensor in self.reserved] if save and self.reserved else [None] * 4
        n1, r1 = ops.rmsnorm(x, self.norm1.weight, self.eps, self.qkv.room, to1, exact)
        qkv, xa_qkv = self.qkv.forward(n1, to=to2)
        ops.rotate_(qkv.view(len(qkv), -1, self.heads.width), cos, sin, self.heads.queries + self.heads.groups)
        merged, attended = attend.forward(self.heads, qkv, save)
        x2, xa_out = self.out.forward(merged, x, lasts=False)
        n2, r2 = ops.rmsnorm(x2, self.norm2.weight, self.eps, self.gate_up.room, to3, exact)
        gu, xa_gu = self.gate_up.forward(n2, to=None if to4 is None else to4[:, : to4.shape[1] - self.gate_up.under])
        y, xa_down = self.down.forward(ops.swiglu(gu, self.down.room), x2, lasts=False)
        return y, (n1, r1, xa_qkv, attended, xa_out, n2, r2, xa_gu, gu, gu if to4 is None else to4, xa_down) if save else ()

    def reserve(self, tokens: int, inner: int, like: Tensor) -> None:
        """Reserve memory for `tokens` tokens, once: memory that is allocated and freed at every step fragments. inner: the feed-forward width f."""
        d = self.norm1.weight.shape[0]
        widths = (d + self.qkv.room, (self.heads.queries + 2 * self.heads.groups) * self.heads.width, d + self.gate_up.room, 2 * inner + self.gate_up.under)
        self.reserved = [like.new_zeros(tokens, width) for width in widths]

    def backward(self, dy: Tensor, saved: tuple, cos: Tensor, sin: Tensor, attend: Attention, wanted: bool, side: SideStream, room: int) -> Tensor | None:
        """dx [N, d + room] (None unless wanted) of dy [N, d + down.under], whose last columns are overwritten; gradients of what is trained are written,
        by `side`. dx's last columns are zeros, for the layer below to write to."""
        n1, r1, xa_qkv, attended, xa_out, n2, r2, xa_gu, gu, wide, xa_down = saved
        d = self.norm1.weight.shape[0]
        dh, dxa = self.down.backward_input(dy)
        assert dh is not None
        side.join()  # the layer above
        h, dgu = self._activation_backward(dh, gu, xa_gu, dxa, side)
        side.do(self.down, dy, h, xa_down, dxa)
        dn, dxa = self.gate_up.backward_input(wide)
        assert dn is not None
        side.do(self.gate_up, dgu, n2, xa_gu, dxa)
        dx2 = ops.rmsnorm_backward(dn, n2[:, :d], self.norm2.weight, r2, dy[:, :d], self.norm2.dweight, self.out.under)
        del dn, gu, dgu, wide
        dmerged, dxa = self.out.backward_input(dx2)
        assert dmerged is not None
        side.join()
        del dh, h  # the largest: attention's backward takes their memory
        if self.out.trained:
            side.do(self.out, dx2, attend.output(self.heads, attended), xa_out, dxa)
        dq, dk, dv = attend.backward(self.heads, attended, dmerged)
        dqkv = ops.unrotate(dq, dk, dv, cos, sin, self.qkv.under)
        del dq, dk, dv
        dn, dxa = self.qkv.backward_input(dqkv, wanted or self.norm1.dweight is not None)
        side.do(self.qkv, dqkv, n1, xa_qkv, dxa)
        return ops.rmsnorm_backward(dn, n1[:, :d], self.norm1.weight, r1, dx2[:, :d], self.norm1.dweight, room) if dn is not None else None

    def _activation_backward(self, dh: Tensor, gu: Tensor, xa: Tensor | None, dxa: Tensor | None, side: SideStream) -> tuple[Tensor | None, Tensor | None]:
        """(h, d gu), which the weight gradients of down, gate and up are made of; gu becomes d gu.

        (None, None) where those were made here: one run's adapters on gate, up and down, without a side stream that would make them meanwhile.
        """
        db, da = self.gate_up.db, self.down.da
        together = self.gate_up.single and self.down.single and len(self.gate_up.pairs) == 2 and side.stream is None
        if not together or db is None or da is None or xa is None or dxa is None:
            return ops.swiglu_backward_(dh, gu)
        ops.swiglu_backward_thin_(dh, gu, xa[0], dxa[0], db, da[0])
        return None, None


@dataclass
class Llama:
    """The whole model. embedding [V, d]; head [V, d] (the same tensor where tied); angles(T) gives cos, sin [T, e].

    lowest: the lowest layer in which anything is trained (0 where the input embeddings are); layers below save nothing and have no backward.
    """

    embedding: Tensor
    layers: Sequence[Layer]
    norm: Norm
    head: Tensor
    angles: Callable[[int], tuple[Tensor, Tensor]]
    inner: int
    """Width f of the feed-forward layers."""
    lowest: int = 0
    dembedding: Tensor | None = None
    """Gradient of the embedding [V, d]; None if frozen."""
    padding: int | None = None
    """The id whose embedding has no gradient as an input (torch.nn.Embedding's padding_idx)."""
    dhead: Tensor | None = None
    """Gradient of an untied head; a tied one's goes into dembedding."""
    prompt: Tensor | None = None
    """Soft prompts [K, n, d] before every row (prompt tuning: Lester et al., 2021)."""
    dprompt: Tensor | None = None
    """Their gradient [K, n, d]."""
    noise: ops.Noise | None = None
    """The adapters' dropout, the same object in all Linears."""
    backends: list[Any] | None = None
    """The attention kernels to choose from (torch.nn.attention.SDPBackend); None: torch's own order."""
    side_stream: Any = None
    """A CUDA stream on which weight gradients are made while backward runs; None: they are made in turn."""

    @property
    def virtual(self) -> int:
        """Soft tokens before every row."""
        return self.prompt.shape[1] if self.prompt is not None else 0

    def hidden(self, ids: Tensor, save: bool, stream: Stream | None = None) -> tuple[Tensor, list[tuple]]:
        """(hidden states before the last norm [R·(n + T), d], what backward needs by layer) of ids [R, T] int64.

        save: whether backward follows. stream: ids hold a slot's rows one after another, R = K (without soft prompts).
        """
        x = F.embedding(ids, self.embedding)
        if self.prompt is not None:
            slots, n, d = self.prompt.shape
            before = self.prompt[:, None].expand(slots, len(ids) // slots, n, d).reshape(-1, n, d)
            x = torch.cat((before, x), 1)
        cos, sin, attend = self._positions(x.shape[1], stream)
        if self.noise is not None:
            self.noise.tokens, self.noise.on, self.noise.stream = x.shape[1], save, (stream.row, stream.position) if stream else None
        x, saved = x.reshape(-1, x.shape[-1]), []
        for index, layer in enumerate(self.layers):
            x, needed = layer.forward(x, cos, sin, attend, save and index >= self.lowest, not save)
            saved.append(needed)
        return x, saved

    def _positions(self, t: int, stream: Stream | None) -> tuple[Tensor, Tensor, Attention]:
        """(cos, sin, attention) of rows of t tokens, or of a stream."""
        if stream is None:
            return *self.angles(t), Rows(t, self.backends)
        cos, sin = (part[stream.position] for part in self.angles(stream.longest))
        return cos, sin, stream

    def answer(self, ids: Tensor, cos: Tensor, sin: Tensor, attends: Sequence[AttentionForward]) -> Tensor:
        """Hidden states before the last norm [N, d] of ids [N], for answers: adapters without dropout, no soft prompt, nothing saved.

        cos, sin [T, e]: of rows of T tokens (T = N: of each token). attends: by layer.
        """
        if self.noise is not None:
            self.noise.on = False
        x = F.embedding(ids, self.embedding)
        for layer, attend in zip(self.layers, attends, strict=True):
            x, _ = layer.forward(x, cos, sin, attend, False, True)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [M, V] fp32 of hidden states before the last norm [M, d]."""
        return (ops.rmsnorm(hidden, self.norm.weight, self.layers[0].eps, exact=True)[0] @ self.head.t()).float()

    def reserve(self, tokens: int) -> None:
        """Reserve memory in every layer that has a backward, for batches of at most `tokens` tokens (virtual ones counted)."""
        for layer in self.layers[self.lowest :]:
            layer.reserve(tokens, self.inner, self.embedding)

    def step(self, ids: Tensor, at: Tensor, targets: Tensor, weights: Tensor, dense: bool = False, stream: Stream | None = None) -> Tensor:
        """Forward and backward: weights · nll [M] fp32; the gradients of what is trained are written.

        ids [R, T] int64; at [M] int64: labelled positions in the flattened [R, n + T]; targets [M] int64, weights [M] fp32. dense: `at` is every
        position, in order. stream: as in hidden.
        """
        side = SideStream(self.side_stream)
        with torch.no_grad():
            x, saved = self.hidden(ids, True, stream)
            tokens = len(x)
            x = x if dense else x[at]
            normed, rstd = ops.rmsnorm(x, self.norm.weight, self.layers[0].eps)
            del x
            loss, dnormed = self._head(normed, targets, weights)
            room = [layer.down.under for layer in self.layers[self.lowest :]]
            room = [0, *room] if room else [0]  # columns beside dx that each layer's `down` needs; the lowest layer's dx has none
            dpicked = ops.rmsnorm_backward(dnormed, normed, self.norm.weight, rstd, None, self.norm.dweight, room[-1] if dense else 0)
            dx: Any = dpicked if dense else _spread(dpicked, at, tokens, room[-1])
            del normed, dnormed, dpicked  # or they would stay through all of backward
            if len(self.layers) > self.lowest:
                cos, sin, attend = self._positions(ids.shape[1] + self.virtual, stream)
                below = self.dembedding is not None or self.dprompt is not None
                for index in range(len(self.layers) - 1, self.lowest - 1, -1):
                    below_it = room[index - self.lowest]
                    dx = self.layers[index].backward(dx, saved.pop(), cos, sin, attend, index > self.lowest or below, side, below_it)
            side.join()
            self._inputs(ids, dx)
        return loss

    def _head(self, normed: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(weighted nll [M] fp32, gradient [M, d]) of normed states [M, d]; the logits exist a chunk at a time."""
        to = self.dhead if self.dhead is not None else self.dembedding
        chunk = logits_rows(self.head.shape[0])
        losses, dnormed = [], torch.empty_like(normed)
        every = normed.new_empty(min(chunk, len(normed)), self.head.shape[0])
        for lo in range(0, len(normed), chunk):
            hi = min(len(normed), lo + chunk)
            logits = torch.mm(normed[lo:hi], self.head.t(), out=every[: hi - lo])
            losses.append(ops.cross_entropy_(logits, targets[lo:hi], weights[lo:hi]))
            torch.mm(logits, self.head, out=dnormed[lo:hi])
            if to is not None and lo == 0:
                torch.mm(logits.t(), normed[lo:hi], out=to)
            elif to is not None:
                to.addmm_(logits.t(), normed[lo:hi])
        return torch.cat(losses) if len(losses) > 1 else losses[0], dnormed

    def _inputs(self, ids: Tensor, dx: Tensor | None) -> None:
        """Write the gradients of soft prompts and input embeddings from the first layer's dx [R·(n + T), d]."""
        if dx is None:
            return
        rows = dx.view(len(ids), -1, dx.shape[1])
        if self.dprompt is not None:
            slots, n, d = self.dprompt.shape
            self.dprompt.copy_(rows[:, :n].reshape(slots, -1, n, d).sum(1, dtype=torch.float32))
        if self.dembedding is not None:
            fresh = torch.zeros(self.embedding.shape, device=dx.device)
            fresh.index_add_(0, ids.reshape(-1), rows[:, self.virtual :].reshape(-1, dx.shape[1]).float())
            if self.padding is not None:
                fresh[self.padding] = 0.0
            if self.dhead is not None:
                self.dembedding.copy_(fresh)
            else:
                self.dembedding.add_(fresh)
