"""A stack of linear maps that read the same input, with low-rank adapters of several runs: forward, and backward by hand.

Library; llama.py puts layers together from it. Shapes: K slots (runs), N tokens of all of them, slot after slot, r rank, m members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from pipeline.engine import ops
from pipeline.engine.ops import Tensor


@dataclass
class Low:
    """The B of one member of a group, for all slots: [K, hi - lo, r], already scaled, and its gradient; lo, hi: its columns of y."""

    lo: int
    hi: int
    b: Tensor
    db: Tensor | None = None
    member: int = 0
    """Its number in the model: its dropout's own."""


@dataclass
class Group:
    """Linear maps that read the same input, stacked: y = x Wᵀ (+ bias) + Σ (x Aᵀ) Bᵀ.

    weight: gives W [out, in] (with room and under beside and below it) in the arithmetic's dtype: a stored tensor, or one dequantised for the call.
    dweight: where W's gradient goes, None if W is frozen.
    a, da: the members' A stacked, [K, m·r, in], and its gradient; None without adapters.
    db: with one slot, the gradients of all B as one [Σ (hi - lo), r], where they and their columns of y follow one another.
    room: with one slot, columns that x and W have beyond `in`: x's then hold x Aᵀ and W's hold B, so that one product
        gives y, and one gives dx and d(x Aᵀ). 0: B is applied by products of its own.
    under: with one slot, rows that W has beyond `out`: they hold A, so that one product gives dx from a dy with d(x Aᵀ) in as many
        columns beyond `out` (zeros until then). 0: A is applied by a product of its own on the way back.
    noise: what drops out of x on its way to A, anew for every member; None: nothing does.
    """

    weight: Callable[[], Tensor]
    bias: Tensor | None = None
    dweight: Tensor | None = None
    a: Tensor | None = None
    da: Tensor | None = None
    low: list[Low] = field(default_factory=list)
    db: Tensor | None = None
    room: int = 0
    under: int = 0
    noise: ops.Noise | None = None

    @property
    def single(self) -> bool:
        """Whether it has the adapters of one run, of whose inputs nothing drops out at present."""
        return self.a is not None and len(self.a) == 1 and (self.noise is None or not self.noise.on)

    def forward(self, x: Tensor, residual: Tensor | None = None, lasts: bool = True, to: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(y [N, out] (+ residual, which becomes y), x Aᵀ [K, N/K, m·r] for backward) of x [N, in + room], whose last columns are zeros.

        lasts: x is kept until then anyway. to: a tensor to write y into (without a residual).
        """
        kept = None
        if self.room and self.a is not None:
            width, rank = self.a.shape[2], self.a.shape[1]
            kept = self._down(x[:, :width], x[None, :, width : width + rank])[0]
            kept = kept[None] if lasts else kept[None].clone()
        w = self._weight()
        if residual is not None:
            y = residual.addmm_(x, w.t())
        elif to is None:
            y = F.linear(x, w, self.bias)
        else:
            y = torch.mm(x, w.t(), out=to) if self.bias is None else torch.addmm(self.bias, x, w.t(), out=to)
        if self.a is None or self.room:
            return y, kept
        slots, rank = self.a.shape[0], self.low[0].b.shape[2]
        kept = self._down(x, x.new_empty(slots, len(x) // slots, self.a.shape[1]))
        if slots == 1:
            for j, low in enumerate(self.low):
                y[:, low.lo : low.hi].addmm_(kept[0, :, j * rank : (j + 1) * rank], low.b[0].t())
            return y, kept
        out = y.view(slots, -1, y.shape[1])
        for j, low in enumerate(self.low):
            out[:, :, low.lo : low.hi].baddbmm_(kept[:, :, j * rank : (j + 1) * rank], low.b.transpose(1, 2))
        return y, kept

    def _down(self, x: Tensor, to: Tensor) -> Tensor:
        """x Aᵀ of x [N, in], written into `to` [K, N/K, m·r]."""
        assert self.a is not None
        for columns, a, dropped in self._inputs(x):
            if len(a) == 1:
                torch.mm(dropped, a[0].t(), out=to[0, :, columns])
            else:
                torch.bmm(dropped.view(len(a), -1, dropped.shape[1]), a.transpose(1, 2), out=to[:, :, columns])
        return to

    def _inputs(self, x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(columns of x Aᵀ, their A, the x that they read): all members at once, or one by one where each drops its own."""
        assert self.a is not None
        if self.noise is None or not self.noise.on:
            yield slice(0, self.a.shape[1]), self.a, x
            return
        rank = self.low[0].b.shape[2]
        for j, low in enumerate(self.low):
            columns = slice(j * rank, (j + 1) * rank)
            yield columns, self.a[:, columns], ops.drop(x, self.noise, low.member)

    def _add_down(self, dx: Tensor, dkept: Tensor) -> Tensor:
        """dx [N, in] (in place) plus what flows back through A."""
        assert self.a is not None
        slots = len(self.a)
        if self.noise is not None:
            rank = self.low[0].b.shape[2]
            for j, low in enumerate(self.low):
                columns = slice(j * rank, (j + 1) * rank)
                part = torch.bmm(dkept[:, :, columns], self.a[:, columns]).view(len(dx), -1)
                dx.add_(ops.drop(part, self.noise, low.member))
            return dx
        if slots == 1:
            return dx.addmm_(dkept[0], self.a[0])
        dx.view(slots, -1, dx.shape[1]).baddbmm_(dkept, self.a)
        return dx

    def backward_input(self, dy: Tensor, wanted: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """(dx [N, in], d(x Aᵀ)) of dy [N, out] or [N, out + under], whose last columns are then overwritten; dx is None unless wanted."""
        if self.a is None:
            return (dy @ self.weight() if wanted else None), None
        if self.under:
            out = len(self.weight()) - self.under
            if dy.shape[1] == out + self.under and self.noise is None:
                return self._backward_tall(dy, out, wanted)
            dy = dy[:, :out]
        if self.room:
            return self._backward_wide(dy, wanted)
        dx = dy @ self._weight() if wanted else None
        slots, rank = self.a.shape[0], self.low[0].b.shape[2]
        dys = dy.view(slots, -1, dy.shape[1])
        dkept = dy.new_empty(slots, dys.shape[1], self.a.shape[1])
        for j, low in enumerate(self.low):
            part, to = dys[:, :, low.lo : low.hi], dkept[:, :, j * rank : (j + 1) * rank]
            if slots == 1:
                torch.mm(part[0], low.b[0], out=to[0])
            else:
                torch.bmm(part, low.b, out=to)
        return (self._add_down(dx, dkept) if dx is not None else None), dkept

    def _weight(self) -> Tensor:
        w = self.weight()
        return w[: len(w) - self.under] if self.under else w

    def _backward_tall(self, dy: Tensor, out: int, wanted: bool) -> tuple[Tensor | None, Tensor]:
        assert self.a is not None
        width, rank = self.a.shape[2], self.a.shape[1]
        w, dkept = self.weight(), dy[:, out : out + rank]
        if self.room:
            torch.mm(dy[:, :out], w[:out, width : width + rank], out=dkept)
        else:
            each = self.low[0].b.shape[2]
            for j, low in enumerate(self.low):
                torch.mm(dy[:, low.lo : low.hi], low.b[0], out=dkept[:, j * each : (j + 1) * each])
        return (dy @ w[:, :width] if wanted else None), dkept[None]

    def _backward_wide(self, dy: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor]:
        assert self.a is not None
        width, rank = self.a.shape[2], self.a.shape[1]
        w = self._weight()
        if not wanted:
            return None, (dy @ w[:, width : width + rank])[None]
        both = dy @ w
        dkept = both[None, :, width : width + rank]
        return self._add_down(both[:, :width], dkept), dkept

    def backward_weight(self, dy: Tensor | None, x: Tensor | None, kept: Tensor | None, dkept: Tensor | None) -> None:
        """Write the gradients of what is trained: dW = dyᵀ x, dB = dyᵀ (x Aᵀ), dA = d(x Aᵀ)ᵀ x; x [N, in] or more columns, dy [N, out] or more.
        dy None: dB is there already; x None: dA is."""
        if self.dweight is not None:
            assert dy is not None and x is not None
            torch.mm(dy.t(), x, out=self.dweight)
        if self.a is None or kept is None or dkept is None or self.da is None:
            return
        if dy is not None:
            self._backward_b(dy, kept)
        if x is not None:
            self._backward_a(x, dkept)

    def _backward_b(self, dy: Tensor, kept: Tensor) -> None:
        slots, rank = kept.shape[0], self.low[0].b.shape[2]
        if self.db is not None:
            begin = self.low[0].lo
            ops.thin_(self.db.t(), kept[0], dy[:, begin : self.low[-1].hi], [low.hi - begin for low in self.low])
        for j, low in enumerate(self.low if self.db is None else ()):
            held = kept[:, :, j * rank : (j + 1) * rank]
            assert low.db is not None
            if slots == 1:
                torch.mm(dy[:, low.lo : low.hi].t(), held[0], out=low.db[0])
            else:
                torch.bmm(dy.view(slots, -1, dy.shape[1])[:, :, low.lo : low.hi].transpose(1, 2), held, out=low.db)

    def _backward_a(self, x: Tensor, dkept: Tensor) -> None:
        assert self.a is not None and self.da is not None
        slots = len(dkept)
        for columns, _, dropped in self._inputs(x[:, : self.a.shape[2]]):
            if slots == 1:
                ops.thin_(self.da[0, columns], dkept[0, :, columns], dropped, [dropped.shape[1]])
            else:
                torch.bmm(dkept[:, :, columns].transpose(1, 2), dropped.view(slots, -1, dropped.shape[1]), out=self.da[:, columns])

    @property
    def trained(self) -> bool:
        return self.a is not None or self.dweight is not None
