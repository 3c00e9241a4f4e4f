"""Forward and backward by hand of Llama and its relatives (families.py): frozen, adapted or trained weights, one or several adapters at once.

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

from pipeline.engine import invariant, ops
from pipeline.engine.attention import Attention, AttentionForward, Rows, Stream
from pipeline.engine.families import Heads
from pipeline.engine.layout import logits_rows
from pipeline.engine.linear import Linears
from pipeline.engine.ops import Tensor

Angles = Sequence[tuple[Tensor, Tensor]]
"""cos, sin [T, e] (narrower than a head: its last columns are not rotated) of every kind of rotation that layers have (Layer.rotation)."""


def rows_of(angles: Angles, rows: Any) -> Angles:
    """The tables' rows (a slice or numbers)."""
    return [(cos[rows], sin[rows]) for cos, sin in angles]


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
    """RMSNorm's weight [d], and where its gradient goes if it is trained. plus: 1 + weight is applied (ops.rmsnorm)."""

    weight: Tensor
    dweight: Tensor | None = None
    eps: float = 1e-6
    plus: bool = False

    def forward(self, x: Tensor, room: int = 0, out: Tensor | None = None, exact: bool = False, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As ops.rmsnorm."""
        return ops.rmsnorm(x, self.weight, self.eps, room, out, exact, self.plus, residual)

    def backward(self, dy: Tensor, y: Tensor, rstd: Tensor, dres: Tensor | None = None, room: int = 0) -> Tensor:
        """As ops.rmsnorm_backward; y may have more columns."""
        return ops.rmsnorm_backward(dy, y[:, : len(self.weight)], self.weight, rstd, dres, self.dweight, room, self.plus)


@dataclass
class Layer:
    """One decoder layer (Touvron et al., 2023): x + attention(norm(x)), then x + down(silu(gate) · up) of its norm.

    after1, after2: norms over what attention and the feed-forward layer add. q_norm, k_norm: of every head. gelu: as in ops.swiglu. rotation: which
    of the model's.
    """

    norm1: Norm
    qkv: Linears
    out: Linears
    norm2: Norm
    gate_up: Linears
    down: Linears
    heads: Heads
    after1: Norm | None = None
    after2: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    gelu: bool = False
    rotation: int = 0
    reserved: list[Tensor] | None = None
    """Memory for the largest of what backward needs, for the most tokens of a batch (`reserve`); None: new tensors at every forward."""

    @property
    def norms(self) -> list[Norm]:
        every = (self.norm1, self.norm2, self.after1, self.after2, self.q_norm, self.k_norm)
        return [norm for norm in every if norm is not None]

    @property
    def beside(self) -> int:
        """Columns beside its output's gradient that backward writes to."""
        return 0 if self.after2 else self.down.under

    def forward(self, x: Tensor, angles: Angles, attend: AttentionForward, save: bool, exact: bool = False) -> tuple[Tensor, tuple]:
        """(output [N, d], what backward needs) of x [N, d], which becomes the output; N is a multiple of the angles' T.
        save: whether backward follows. exact: as in ops.rmsnorm."""
        to1, to2, to3, to4, to5 = [tensor[: len(x)] for tensor in self.reserved] if save and self.reserved else [None] * 5
        n1, r1 = self.norm1.forward(x, self.qkv.room, to1, exact)
        qkv, xa_qkv, z_qkv = self.qkv.forward(n1, to=to2, keep=save)
        placed = self._place(qkv.view(len(qkv), -1, self.heads.width), angles, save, to5, exact)
        merged, attended = attend.forward(self.heads, qkv, save)
        x2, xa_out, z_out, added1 = self._add(self.out, merged, x, self.after1, exact, save)
        n2, r2 = self.norm2.forward(x2, self.gate_up.room, to3, exact)
        gu, xa_gu, _ = self.gate_up.forward(n2, to=None if to4 is None else to4[:, : to4.shape[1] - self.gate_up.under])
        y, xa_down, z_down, added2 = self._add(self.down, ops.swiglu(gu, self.down.room, self.gelu, exact), x2, self.after2, exact, save)
        if not save:
            return y, ()
        before = (z_qkv, z_out, z_down)
        return y, (n1, r1, xa_qkv, placed, attended, xa_out, added1, n2, r2, xa_gu, gu, gu if to4 is None else to4, xa_down, added2, before)

    def _place(self, qkv: Tensor, angles: Angles, save: bool, to: Tensor | None, exact: bool) -> tuple[Tensor, Tensor] | None:
        """Norms of heads and rotation, in place in qkv [N, H + 2G, e]; what the norms' backward needs: their input (in `to`) and 1 / rms."""
        heads, placed = self.heads, None
        both = heads.queries + heads.groups
        if self.q_norm and self.k_norm:
            q = self.q_norm
            before = (to if to is not None else qkv.new_empty(len(qkv), both * heads.width)).view(len(qkv), both, -1) if save else None
            scales = ops.head_norms_(qkv, q.weight, self.k_norm.weight, q.eps, heads.queries, heads.groups, exact, q.plus, before)
            placed = (before, scales) if before is not None else None
        ops.rotate_(qkv, *angles[self.rotation], both)
        return placed

    @staticmethod
    def _add(linears: Linears, x: Tensor, residual: Tensor, after: Norm | None, exact: bool, save: bool
             ) -> tuple[Tensor, Tensor | None, Tensor | None, tuple | None]:
        """(residual with linears(x), or with a norm over that, added in place; xa; z; what the norm's backward needs)."""
        if after is None:
            return *linears.forward(x, residual, lasts=False, keep=save), None
        y, xa, z = linears.forward(x, lasts=False, keep=save)
        return residual, xa, z, after.forward(y, out=y, exact=exact, residual=residual)

    def reserve(self, tokens: int, inner: int, like: Tensor) -> None:
        """Reserve memory for `tokens` tokens, once: memory that is allocated and freed at every step fragments. inner: the feed-forward width f."""
        d, (queries, groups, width) = self.norm1.weight.shape[0], (self.heads.queries, self.heads.groups, self.heads.width)
        normed = (queries + groups) * width if self.q_norm else 0
        widths = (d + self.qkv.room, (queries + 2 * groups) * width, d + self.gate_up.room, 2 * inner + self.gate_up.under, normed)
        self.reserved = [like.new_zeros(tokens, width) for width in widths]

    def backward(self, dy: Tensor, saved: tuple, angles: Angles, attend: Attention, wanted: bool, side: SideStream, room: int) -> Tensor | None:
        """dx [N, d + room] (None unless wanted) of dy [N, d + beside], whose last columns are overwritten; gradients of what is trained are written,
        by `side`. dx's last columns are zeros, for the layer below to write to."""
        n1, r1, xa_qkv, placed, attended, xa_out, added1, n2, r2, xa_gu, gu, wide, xa_down, added2, before = saved
        z_qkv, z_out, z_down = before
        d = self.norm1.weight.shape[0]
        dadded = self.after2.backward(dy, added2[0], added2[1], None, self.down.under) if self.after2 and added2 else dy
        dadded = self.down.backward_factors(dadded, z_down, self.after2 is not None)
        dh, dxa = self.down.backward_input(dadded)
        assert dh is not None
        side.join()  # the layer above
        z_gu = self.gate_up.unscaled(gu)
        h, dgu = self._activation_backward(dh, gu, xa_gu, dxa, side)
        side.do(self.down, dadded, h, xa_down, dxa)
        self.gate_up.backward_factors(wide, z_gu, True)
        dn, dxa = self.gate_up.backward_input(wide)
        assert dn is not None
        side.do(self.gate_up, dgu, n2, xa_gu, dxa)
        dx2 = self.norm2.backward(dn, n2, r2, dy[:, :d], 0 if self.after1 else self.out.under)
        del dn, gu, dgu, wide, dadded, z_gu
        dadded = self.after1.backward(dx2, added1[0], added1[1], None, self.out.under) if self.after1 and added1 else dx2
        dadded = self.out.backward_factors(dadded, z_out, self.after1 is not None)
        dmerged, dxa = self.out.backward_input(dadded)
        assert dmerged is not None
        side.join()
        del dh, h  # the largest: attention's backward takes their memory
        if self.out.trained:
            side.do(self.out, dadded, attend.output(self.heads, attended), xa_out, dxa)
        dq, dk, dv = attend.backward(self.heads, attended, dmerged)
        dqkv = ops.unrotate(dq, dk, dv, *angles[self.rotation], self.qkv.under)
        del dq, dk, dv, dadded
        if placed is not None:
            self._head_norms_backward(dqkv, *placed)
        self.qkv.backward_factors(dqkv, z_qkv, True)
        dn, dxa = self.qkv.backward_input(dqkv, wanted or self.norm1.dweight is not None)
        side.do(self.qkv, dqkv, n1, xa_qkv, dxa)
        return self.norm1.backward(dn, n1, r1, dx2[:, :d], room) if dn is not None else None

    def _head_norms_backward(self, dqkv: Tensor, before: Tensor, scales: Tensor) -> None:
        q, k = self.q_norm, self.k_norm
        assert q is not None and k is not None
        ops.head_norms_backward_(dqkv, before, scales, q.weight, k.weight, self.heads.queries, q.plus, q.dweight, k.dweight)

    def _activation_backward(self, dh: Tensor, gu: Tensor, xa: Tensor | None, dxa: Tensor | None, side: SideStream) -> tuple[Tensor | None, Tensor | None]:
        """(h, d gu), which the weight gradients of down, gate and up are made of; gu becomes d gu.

        (None, None) where those were made here: one run's adapters on gate, up and down, without a side stream that would make them meanwhile.
        """
        db, da = self.gate_up.db, self.down.da
        together = self.gate_up.single and self.down.single and side.stream is None
        if not together or db is None or len(db) != gu.shape[1] or da is None or xa is None or dxa is None:
            return ops.swiglu_backward_(dh, gu, self.gelu)
        ops.swiglu_backward_thin_(dh, gu, xa[0], dxa[0], db, da[0], self.gelu)
        if self.gate_up.g is not None:  # d gu is that of y, and B's gradient is z's
            db.mul_(self.gate_up.g[: len(db), None])
        return None, None


@dataclass
class Llama:
    """The whole model. embedding [V, d]; head [V, d] (the same tensor where tied); angles(T) gives the rotations' tables.

    lowest: the lowest layer in which anything is trained (0 where the input embeddings are); layers below save nothing and have no backward.
    """

    embedding: Tensor
    layers: Sequence[Layer]
    norm: Norm
    head: Tensor
    angles: Callable[[int], Angles]
    inner: int
    """Width f of the feed-forward layers."""
    scale: float = 1.0
    """What input embeddings are multiplied by."""
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
    invariant: bool = False
    """Forward, a token's numbers do not depend on what is computed with it (`keep_order`)."""
    side_stream: Any = None
    """A CUDA stream on which weight gradients are made while backward runs; None: they are made in turn."""

    @property
    def virtual(self) -> int:
        """Soft tokens before every row."""
        return self.prompt.shape[1] if self.prompt is not None else 0

    def keep_order(self) -> bool:
        """From now on, where invariant.py allows it, a token has the same log p, bit for bit, in a step, in `nll`, and in answers without a mask."""
        self.invariant = self.prompt is None and all(invariant.suits(self.embedding.dtype, layer.heads) for layer in self.layers)
        for layer in self.layers:
            for linears in (layer.qkv, layer.out, layer.gate_up, layer.down):
                linears.invariant = self.invariant
        return self.invariant

    def hidden(self, ids: Tensor, save: bool, stream: Stream | None = None) -> tuple[Tensor, list[tuple]]:
        """(hidden states before the last norm [R·(n + T), d], what backward needs by layer) of ids [R, T] int64.

        save: whether backward follows. stream: ids hold a slot's rows one after another, R = K (without soft prompts).
        """
        x = self._embed(ids)
        if self.prompt is not None:
            slots, n, d = self.prompt.shape
            before = self.prompt[:, None].expand(slots, len(ids) // slots, n, d).reshape(-1, n, d)
            x = torch.cat((before, x), 1)
        angles, attend = self._positions(x.shape[1], stream)
        if self.noise is not None:
            self.noise.tokens, self.noise.on, self.noise.stream = x.shape[1], save, (stream.row, stream.position) if stream else None
        x, saved = x.reshape(-1, x.shape[-1]), []
        for index, layer in enumerate(self.layers):
            x, needed = layer.forward(x, angles, attend, save and index >= self.lowest, not save and not self.invariant)
            saved.append(needed)
        return x, saved

    def _embed(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.embedding)
        return x if self.scale == 1.0 else x.mul_(self.scale)

    def _positions(self, t: int, stream: Stream | None) -> tuple[Angles, Attention]:
        """(rotations, attention) of rows of t tokens, or of a stream."""
        if stream is None:
            return self.angles(t), invariant.Rows(t) if self.invariant else Rows(t, self.backends)
        return rows_of(self.angles(stream.longest), stream.position), stream

    def answer(self, ids: Tensor, angles: Angles, attends: Sequence[AttentionForward]) -> Tensor:
        """Hidden states before the last norm [N, d] of ids [N], for answers: adapters without dropout, no soft prompt, nothing saved.

        angles: of rows of T tokens (T = N: of each token). attends: by layer.
        """
        if self.noise is not None:
            self.noise.on = False
        x = self._embed(ids)
        for layer, attend in zip(self.layers, attends, strict=True):
            x, _ = layer.forward(x, angles, attend, False, not self.invariant)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [M, V] fp32 of hidden states before the last norm [M, d]."""
        return self._vocabulary(self.norm.forward(hidden.contiguous(), exact=not self.invariant)[0]).float()

    def _vocabulary(self, normed: Tensor, to: Tensor | None = None) -> Tensor:
        """Logits [M, V] of normed states [M, d], written into `to`; None: into new memory."""
        if self.invariant:
            return invariant.product(normed, self.head, None, to)
        return normed @ self.head.t() if to is None else torch.mm(normed, self.head.t(), out=to)

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
            normed, rstd = self.norm.forward(x)
            del x
            loss, dnormed = self._head(normed, targets, weights)
            room = [layer.beside for layer in self.layers[self.lowest :]]
            room = [0, *room] if room else [0]  # columns beside each layer's dx that the one below writes to; the lowest layer's dx has none
            dpicked = self.norm.backward(dnormed, normed, rstd, room=room[-1] if dense else 0)
            dx: Any = dpicked if dense else _spread(dpicked, at, tokens, room[-1])
            del normed, dnormed, dpicked  # or they would stay through all of backward
            if len(self.layers) > self.lowest:
                angles, attend = self._positions(ids.shape[1] + self.virtual, stream)
                below = self.dembedding is not None or self.dprompt is not None
                for index in range(len(self.layers) - 1, self.lowest - 1, -1):
                    below_it = room[index - self.lowest]
                    dx = self.layers[index].backward(dx, saved.pop(), angles, attend, index > self.lowest or below, side, below_it)
            side.join()
            self._inputs(ids, dx)
        return loss

    @torch.no_grad()
    def nll(self, ids: Tensor, at: Tensor, targets: Tensor, dense: bool = False, stream: Stream | None = None) -> Tensor:
        """-log p of the targets [M] fp32, forward alone and without dropout; arguments as in step."""
        x, _ = self.hidden(ids, False, stream)
        return self.nll_after(x if dense else x[at], targets)

    def nll_after(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """-log p of the targets [M] fp32 after hidden states before the last norm [M, d]."""
        normed, _ = self.norm.forward(hidden, exact=not self.invariant)
        ones, chunk = torch.ones(len(normed), device=normed.device), logits_rows(self.head.shape[0])
        parts = [slice(lo, lo + chunk) for lo in range(0, len(normed), chunk)]
        return torch.cat([ops.cross_entropy_(self._vocabulary(normed[part]), targets[part], ones[part]) for part in parts])

    def _head(self, normed: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(weighted nll [M] fp32, gradient [M, d]) of normed states [M, d]; the logits exist a chunk at a time."""
        to = self.dhead if self.dhead is not None else self.dembedding
        chunk = logits_rows(self.head.shape[0])
        losses, dnormed = [], torch.empty_like(normed)
        every = normed.new_empty(min(chunk, len(normed)), self.head.shape[0])
        for lo in range(0, len(normed), chunk):
            hi = min(len(normed), lo + chunk)
            logits = self._vocabulary(normed[lo:hi], every[: hi - lo])
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
            fresh.index_add_(0, ids.reshape(-1), rows[:, self.virtual :].reshape(-1, dx.shape[1]).float(), alpha=self.scale)
            if self.padding is not None:
                fresh[self.padding] = 0.0
            if self.dhead is not None:
                self.dembedding.copy_(fresh)
            else:
                self.dembedding.add_(fresh)
