"""The Llama family's forward and backward by hand: frozen, adapted or trained weights, one or several adapters at once.

Library. Against autograd over the modules this keeps less (norms, activations and rotations are made again on the way
back), launches fewer kernels (stacked q, k, v and gate, up; residual sums inside the products; no fp32 detours of
adapters), and makes no weight gradient that nobody wants. Every function is checked against transformers with autograd
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
from pipeline.engine.attention import Attend, Attends, Heads, Rows, Stream
from pipeline.engine.linear import Group
from pipeline.engine.ops import Tensor

LOGITS_AT_ONCE = 2**28  # numbers of the [chunk, V] logits that exist at a time, roughly


def logits_rows(vocabulary: int) -> int:
    """Rows of a chunk of logits; whole tiles of a product where there are several."""
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    return rows - rows % 256 if rows > 256 else rows


def _spread(picked: Tensor, at: Tensor, rows: int, room: int) -> Tensor:
    """picked [M, d] added up in the rows `at` of a [rows, d + room]."""
    whole = picked.new_zeros(rows, picked.shape[1] + room)
    whole[:, : picked.shape[1]].index_add_(0, at, picked)
    return whole


class Beside:
    """Where weight gradients are made: at once, or on a stream beside the one that the way back goes on with.

    What is made beside reads tensors that this object keeps until the streams have met, so that their memory is not given away.
    """

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream
        self._read: list[tuple] = []

    def do(self, group: Group, *tensors: Tensor | None) -> None:
        """group.backward_weight(*tensors)."""
        if self.stream is None or not group.trained:
            group.backward_weight(*tensors)
            return
        self._read.append(tensors)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            group.backward_weight(*tensors)

    def join(self) -> None:
        """What follows comes after what was made beside."""
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
    """One decoder layer."""

    norm1: Norm
    qkv: Group
    out: Group
    norm2: Norm
    gate_up: Group
    down: Group
    heads: Heads
    eps: float
    held: list[Tensor] | None = None
    """Where the largest of what backward needs goes, for as many tokens as will come; None: into new tensors."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attends, save: bool, exact: bool = False) -> tuple[Tensor, tuple]:
        """(output [N, d], what backward needs) of x [N, d], which becomes the output; cos, sin [T, e] with N a multiple of T.
        exact: as ops.rmsnorm has it."""
        to1, to2, to3, to4 = [held[: len(x)] for held in self.held] if save and self.held else [None] * 4
        n1, r1 = ops.rmsnorm(x, self.norm1.weight, self.eps, self.qkv.room, to1, exact)
        qkv, kept_qkv = self.qkv.forward(n1, to=to2)
        ops.rotate_(qkv.view(len(qkv), -1, self.heads.width), cos, sin, self.heads.queries + self.heads.groups)
        mixed, attended = attend.forward(self.heads, qkv, save)
        x2, kept_out = self.out.forward(mixed, x, lasts=False)
        n2, r2 = ops.rmsnorm(x2, self.norm2.weight, self.eps, self.gate_up.room, to3, exact)
        gu, kept_gu = self.gate_up.forward(n2, to=None if to4 is None else to4[:, : to4.shape[1] - self.gate_up.under])
        y, kept_down = self.down.forward(ops.swiglu(gu, self.down.room), x2, lasts=False)
        return y, (n1, r1, kept_qkv, attended, kept_out, n2, r2, kept_gu, gu, gu if to4 is None else to4, kept_down) if save else ()

    def hold(self, tokens: int, inner: int, like: Tensor) -> None:
        """Set memory aside for `tokens` tokens, once: what is taken and given back at every step leaves holes between."""
        d = self.norm1.weight.shape[0]
        widths = (d + self.qkv.room, (self.heads.queries + 2 * self.heads.groups) * self.heads.width, d + self.gate_up.room, 2 * inner + self.gate_up.under)
        self.held = [like.new_zeros(tokens, width) for width in widths]

    def backward(self, dy: Tensor, saved: tuple, cos: Tensor, sin: Tensor, attend: Attend, wanted: bool, beside: Beside, room: int) -> Tensor | None:
        """dx [N, d + room] (None unless wanted) of dy [N, d + down.under]; gradients of what is trained are written where they belong, by `beside`.
        What stands in columns beyond d means nothing outside."""
        n1, r1, kept_qkv, attended, kept_out, n2, r2, kept_gu, gu, wide, kept_down = saved
        d = self.norm1.weight.shape[0]
        dh, dkept = self.down.backward_input(dy)
        assert dh is not None
        beside.join()  # the layer above
        h, dgu = self._activation_backward(dh, gu, kept_gu, dkept, beside)
        beside.do(self.down, dy, h, kept_down, dkept)
        dn, dkept = self.gate_up.backward_input(wide)
        assert dn is not None
        beside.do(self.gate_up, dgu, n2, kept_gu, dkept)
        dx2 = ops.rmsnorm_backward(dn, n2[:, :d], self.norm2.weight, r2, dy[:, :d], self.norm2.dweight, self.out.under)
        del dn, gu, dgu, wide
        dmixed, dkept = self.out.backward_input(dx2)
        assert dmixed is not None
        beside.join()
        del dh, h  # the largest: attention needs its room
        if self.out.trained:
            beside.do(self.out, dx2, attend.again(self.heads, attended), kept_out, dkept)
        dq, dk, dv = attend.backward(self.heads, attended, dmixed)
        dqkv = ops.unrotate(dq, dk, dv, cos, sin, self.qkv.under)
        del dq, dk, dv
        dn, dkept = self.qkv.backward_input(dqkv, wanted or self.norm1.dweight is not None)
        beside.do(self.qkv, dqkv, n1, kept_qkv, dkept)
        return ops.rmsnorm_backward(dn, n1[:, :d], self.norm1.weight, r1, dx2[:, :d], self.norm1.dweight, room) if dn is not None else None

    def _activation_backward(self, dh: Tensor, gu: Tensor, kept: Tensor | None, dkept: Tensor | None, beside: Beside) -> tuple[Tensor | None, Tensor | None]:
        """(h, d gu), from which weight gradients are still to be made; gu becomes d gu.

        (None, None) where they were made with it: one run's adapters on gate, up and down, and no stream beside that would do it meanwhile.
        """
        db, da = self.gate_up.db, self.down.da
        together = self.gate_up.single and self.down.single and len(self.gate_up.low) == 2 and beside.stream is None
        if not together or db is None or da is None or kept is None or dkept is None:
            return ops.swiglu_backward_(dh, gu)
        ops.swiglu_backward_thin_(dh, gu, kept[0], dkept[0], db, da[0])
        return None, None


@dataclass
class Llama:
    """The whole model. embedding [V, d]; head [V, d] (the same tensor where tied); angles(T) gives cos, sin [T, width].

    lowest: the first layer with anything trained in it or below it (0 where the input embeddings are); layers below it
    are neither kept nor walked by backward.
    """

    embedding: Tensor
    layers: Sequence[Layer]
    norm: Norm
    head: Tensor
    angles: Callable[[int], tuple[Tensor, Tensor]]
    inner: int
    """Width inside the feed-forward layers."""
    lowest: int = 0
    dembedding: Tensor | None = None
    """Gradient of the embedding [V, d]; None if frozen."""
    padding: int | None = None
    """The id whose embedding learns nothing as an input (torch.nn.Embedding's padding_idx)."""
    dhead: Tensor | None = None
    """Gradient of an untied head; a tied one's goes into dembedding."""
    prompt: Tensor | None = None
    """Soft prompts [K, n, d] before every row, and their gradient."""
    dprompt: Tensor | None = None
    noise: ops.Noise | None = None
    """Of the adapters' dropout; shared by the groups."""
    backends: list[Any] | None = None
    """The attention kernels to choose from (torch.nn.attention.SDPBackend); None: torch's own order."""
    beside: Any = None
    """A CUDA stream on which weight gradients are made while the way back goes on; None: they take their turn."""

    @property
    def virtual(self) -> int:
        """Soft tokens before every row."""
        return self.prompt.shape[1] if self.prompt is not None else 0

    def hidden(self, ids: Tensor, save: bool, stream: Stream | None = None) -> tuple[Tensor, list[tuple]]:
        """(hidden states before the last norm [R·(n + T), d], what each layer keeps) of ids [R, T].

        stream: ids hold a slot's rows one after another, R = K (without soft prompts).
        """
        x = F.embedding(ids, self.embedding)
        if self.prompt is not None:
            slots, n, d = self.prompt.shape
            before = self.prompt[:, None].expand(slots, len(ids) // slots, n, d).reshape(-1, n, d)
            x = torch.cat((before, x), 1)
        cos, sin, attend = self._places(x.shape[1], stream)
        if self.noise is not None:
            self.noise.tokens, self.noise.on, self.noise.stream = x.shape[1], save, (stream.row, stream.position) if stream else None
        x, kept = x.reshape(-1, x.shape[-1]), []
        for index, layer in enumerate(self.layers):
            x, saved = layer.forward(x, cos, sin, attend, save and index >= self.lowest, not save)
            kept.append(saved)
        return x, kept

    def _places(self, t: int, stream: Stream | None) -> tuple[Tensor, Tensor, Attend]:
        """(cos, sin, the way to attend) of rows of t tokens, or of a stream."""
        if stream is None:
            return *self.angles(t), Rows(t, self.backends)
        cos, sin = (part[stream.position] for part in self.angles(stream.longest))
        return cos, sin, stream

    def answer(self, ids: Tensor, cos: Tensor, sin: Tensor, attends: Sequence[Attends]) -> Tensor:
        """Hidden states before the last norm [N, d] of ids [N] (adapters without dropout, no soft prompt); nothing is kept.

        cos, sin [T, e]: of tokens in rows of T (T = N: each token its own). attends: of every layer.
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

    def hold(self, tokens: int) -> None:
        """Set memory aside in every layer that backward will walk, for batches of at most `tokens` tokens (soft ones counted)."""
        for layer in self.layers[self.lowest :]:
            layer.hold(tokens, self.inner, self.embedding)

    def step(self, ids: Tensor, at: Tensor, targets: Tensor, weights: Tensor, dense: bool = False, stream: Stream | None = None) -> Tensor:
        """Forward and backward: weights · nll [M] fp32; gradients are written where they belong.

        ids [R, T]; at [M]: labelled positions in the flattened [R, n + T]; targets, weights [M]. dense: `at` is every position in order.
        stream: as in hidden.
        """
        beside = Beside(self.beside)
        with torch.no_grad():
            x, kept = self.hidden(ids, True, stream)
            tokens = len(x)
            x = x if dense else x[at]
            normed, rstd = ops.rmsnorm(x, self.norm.weight, self.layers[0].eps)
            del x
            loss, dnormed = self._head(normed, targets, weights)
            room = [layer.down.under for layer in self.layers[self.lowest :]]
            room = [0, *room] if room else [0]  # what the layer above leaves beside dx for each; the lowest layer's dx has none
            dpicked = ops.rmsnorm_backward(dnormed, normed, self.norm.weight, rstd, None, self.norm.dweight, room[-1] if dense else 0)
            dx: Any = dpicked if dense else _spread(dpicked, at, tokens, room[-1])
            del normed, dnormed, dpicked  # or they would stay through the whole way back
            if len(self.layers) > self.lowest:
                cos, sin, attend = self._places(ids.shape[1] + self.virtual, stream)
                below = self.dembedding is not None or self.dprompt is not None
                for index in range(len(self.layers) - 1, self.lowest - 1, -1):
                    below_it = room[index - self.lowest]
                    dx = self.layers[index].backward(dx, kept.pop(), cos, sin, attend, index > self.lowest or below, beside, below_it)
            beside.join()
            self._inputs(ids, dx)
        return loss

    def _head(self, normed: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(loss [M], gradient of the normed states [M, d]); the logits exist a chunk at a time."""
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
        """The gradients of what the first layer reads: soft prompts and embeddings."""
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
