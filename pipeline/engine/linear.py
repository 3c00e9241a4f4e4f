"""A stack of linear maps that read the same input, with the LoRA adapters of several runs: forward, and backward by hand.

Library; llama.py makes layers of it. Shapes: K slots (runs), N tokens of all of them, slot after slot, r rank, m members (maps of the stack).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from pipeline.engine import invariant, ops
from pipeline.engine.ops import Tensor


@dataclass
class LoraPair:
    """LoRA's B of one member, for all slots: b [K, hi - lo, r], already multiplied by alpha / r, and its gradient db; lo, hi: its columns of y.

    The A of all members stand in Linears.a. member: the member's number in the model, which its dropout is drawn by.
    """

    lo: int
    hi: int
    b: Tensor
    db: Tensor | None = None
    member: int = 0


@dataclass
class Linears:
    """Linear maps that read the same input, stacked: y = x Wᵀ (+ bias) + Σ (x Aᵀ) Bᵀ (LoRA: Hu et al., 2021).

    `xa` is x Aᵀ [K, N/K, m·r] throughout, `dxa` its gradient. All tensors have the arithmetic's dtype.

    weight: gives W [out + under, in + room]: a stored tensor, or one dequantised for the call.
    dweight, dbias: the gradients of W [out, in] and of the bias [out]; None: they are frozen.
    a, da: the members' A stacked [K, m·r, in], and its gradient; None: there are no adapters.
    db: with one slot, the gradients of all B as one [Σ (hi - lo), r], where they and their columns of y follow one another.
    room: with one slot, columns of x and W beyond `in`: xa in those of x and B in those of W, so that one product gives y, and one
        gives dx and dxa. 0: B has products of its own.
    under: with one slot, rows of W beyond `out`, which hold A: one product gives dx from a dy with dxa in as many columns beyond `out`
        (zeros before). 0: A has a product of its own in backward.
    noise: dropout of A's input, drawn per member; None: no dropout.
    invariant: forward, a token's numbers do not depend on what is computed with it (invariant.py); of one slot.
    g: with one slot, DoRA's factors [out + under] fp32: y = g ⊙ z + bias, where z is the above without the bias (dora.py); None: there are none.
    magnitudes: (columns of y, their norms, the gradient of their magnitudes), fp32 but the last.
    """

    weight: Callable[[], Tensor]
    bias: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    a: Tensor | None = None
    da: Tensor | None = None
    pairs: list[LoraPair] = field(default_factory=list)
    db: Tensor | None = None
    room: int = 0
    under: int = 0
    noise: ops.Noise | None = None
    invariant: bool = False
    g: Tensor | None = None
    magnitudes: list[tuple[slice, Tensor, Tensor]] = field(default_factory=list)

    @property
    def single(self) -> bool:
        """Whether it has the adapters of one run, without dropout at present."""
        return self.a is not None and len(self.a) == 1 and (self.noise is None or not self.noise.on)

    def forward(self, x: Tensor, residual: Tensor | None = None, lasts: bool = True, to: Tensor | None = None, keep: bool = False
                ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(y [N, out], xa for backward, None without adapters, z [N, out] likewise) of x [N, in + room], whose last columns are zeros and become xa.

        residual: [N, out], added to y in place. lasts: whether x stays as it is until backward; else xa, where it is a view of x, is copied.
        to: a tensor to write y into (without a residual). keep: z is kept where there are factors; else it is None.
        """
        if self.g is None:
            return *self._sum(x, self.bias if residual is None else residual, to if residual is None else residual, lasts), None
        z, xa = self._sum(x, None, None if keep or residual is not None else to, lasts)
        g = self.g[: z.shape[1]]
        if residual is not None:
            return residual.addcmul_(z, g), xa, z if keep else None
        y = z if not keep else z.new_empty(z.shape) if to is None else to
        torch.mul(z, g, out=y) if self.bias is None else torch.addcmul(self.bias, z, g, out=y)
        return y, xa, z if keep else None

    def _sum(self, x: Tensor, added: Tensor | None, to: Tensor | None, lasts: bool) -> tuple[Tensor, Tensor | None]:
        """(x Wᵀ + Σ (x Aᵀ) Bᵀ + `added` as _product takes it, xa)."""
        xa = None
        if self.room and self.a is not None:
            width, rank = self.a.shape[2], self.a.shape[1]
            xa = self._down(x[:, :width], x[None, :, width : width + rank])
            xa = xa if lasts else xa.clone()
        y = self._product(x, self._weight(), added, to)
        if self.a is None or self.room:
            return y, xa
        slots = self.a.shape[0]
        xa = self._down(x, x.new_empty(slots, len(x) // slots, self.a.shape[1]))
        out = y.view(slots, -1, y.shape[1])
        for columns, pair in self.members():
            if slots == 1:
                part = y[:, pair.lo : pair.hi]
                self._product(xa[0, :, columns], pair.b[0], part, part)
            else:
                out[:, :, pair.lo : pair.hi].baddbmm_(xa[:, :, columns], pair.b.transpose(1, 2))
        return y, xa

    def members(self) -> Iterator[tuple[slice, LoraPair]]:
        """(columns of xa, pair) of each member."""
        for j, pair in enumerate(self.pairs):
            rank = pair.b.shape[2]
            yield slice(j * rank, (j + 1) * rank), pair

    def _down(self, x: Tensor, to: Tensor) -> Tensor:
        """xa of x [N, in], written into `to`."""
        assert self.a is not None
        for columns, a, dropped in self._inputs(x):
            if len(a) == 1:
                self._product(dropped, a[0], None, to[0, :, columns])
            else:
                torch.bmm(dropped.view(len(a), -1, dropped.shape[1]), a.transpose(1, 2), out=to[:, :, columns])
        return to

    def _product(self, x: Tensor, w: Tensor, added: Tensor | None, to: Tensor | None) -> Tensor:
        """x wᵀ + `added` ([N, out], or a bias [out]), written into `to`, which may be `added`; None: into new memory."""
        if self.invariant:
            return invariant.product(x, w, added, to)
        if to is None:
            return F.linear(x, w, added)
        if added is None:
            return torch.mm(x, w.t(), out=to)
        return to.addmm_(x, w.t()) if to is added else torch.addmm(added, x, w.t(), out=to)

    def _inputs(self, x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(columns of xa, A [K, columns, in], its input [N, in]): all members at once, or one by one where each has dropout of its own."""
        assert self.a is not None
        if self.noise is None or not self.noise.on:
            yield slice(0, self.a.shape[1]), self.a, x
            return
        for columns, pair in self.members():
            yield columns, self.a[:, columns], ops.drop(x, self.noise, pair.member)

    def _add_down(self, dx: Tensor, dxa: Tensor) -> Tensor:
        """dx [N, in] + dxa A, in place."""
        assert self.a is not None
        slots = len(self.a)
        if self.noise is not None:
            for columns, pair in self.members():
                part = torch.bmm(dxa[:, :, columns], self.a[:, columns]).view(len(dx), -1)
                dx.add_(ops.drop(part, self.noise, pair.member))
            return dx
        if slots == 1:
            return dx.addmm_(dxa[0], self.a[0])
        dx.view(slots, -1, dx.shape[1]).baddbmm_(dxa, self.a)
        return dx

    def unscaled(self, y: Tensor) -> Tensor | None:
        """z of y [N, out], of maps without biases, in new memory; None where there are no factors."""
        return None if self.g is None else torch.div(y, self.g[: y.shape[1]], out=y.new_empty(y.shape))

    def backward_factors(self, dy: Tensor, z: Tensor | None, own: bool) -> Tensor:
        """dz [N, ..], the gradient of z [N, out], of dy [N, out] or more columns; the magnitudes' gradients are written. own: dz takes dy's memory."""
        if self.g is None or z is None:
            return dy
        sums = (dy[:, : z.shape[1]] * z).sum(0, dtype=torch.float32)
        for columns, norms, dm in self.magnitudes:
            torch.div(sums[columns], norms, out=dm)
        return torch.mul(dy, self.g[: dy.shape[1]], out=dy if own else dy.new_empty(dy.shape))

    def backward_input(self, dy: Tensor, wanted: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """(dx [N, in], dxa) of dy [N, out] or [N, out + under], whose last columns are overwritten; dx is None unless wanted, dxa without adapters."""
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
        dxa = self._through_b(dy, dy.new_empty(len(self.a), len(dy) // len(self.a), self.a.shape[1]))
        return (self._add_down(dx, dxa) if dx is not None else None), dxa

    def _through_b(self, dy: Tensor, dxa: Tensor) -> Tensor:
        """dy B of dy [N, out] or more columns, written into dxa."""
        dys = dy.view(len(dxa), -1, dy.shape[1])
        for columns, pair in self.members():
            part, to = dys[:, :, pair.lo : pair.hi], dxa[:, :, columns]
            if len(dxa) == 1:
                torch.mm(part[0], pair.b[0], out=to[0])
            else:
                torch.bmm(part, pair.b, out=to)
        return dxa

    def _weight(self) -> Tensor:
        """W [out, in + room]."""
        w = self.weight()
        return w[: len(w) - self.under] if self.under else w

    def _backward_tall(self, dy: Tensor, out: int, wanted: bool) -> tuple[Tensor | None, Tensor]:
        """By the product [dy, dxa] [W; A]."""
        assert self.a is not None
        width, rank = self.a.shape[2], self.a.shape[1]
        w, dxa = self.weight(), dy[:, out : out + rank]
        if self.room:
            torch.mm(dy[:, :out], w[:out, width : width + rank], out=dxa)
        else:
            self._through_b(dy, dxa[None])
        return (dy @ w[:, :width] if wanted else None), dxa[None]

    def _backward_wide(self, dy: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor]:
        """By the product dy [W, B], then A's part."""
        assert self.a is not None
        width, rank = self.a.shape[2], self.a.shape[1]
        w = self._weight()
        if not wanted:
            return None, (dy @ w[:, width : width + rank])[None]
        both = dy @ w
        dxa = both[None, :, width : width + rank]
        return self._add_down(both[:, :width], dxa), dxa

    def backward_weight(self, dy: Tensor | None, x: Tensor | None, xa: Tensor | None, dxa: Tensor | None) -> None:
        """Write the gradients of what is trained: dW = dyᵀ x, dB = dyᵀ xa, dA = dxaᵀ x; x [N, in] or more columns, dy [N, out] or more.
        dy None: dB is written already; x None: dA is."""
        if self.dweight is not None:
            assert dy is not None and x is not None
            torch.mm(dy.t(), x, out=self.dweight)
        if self.dbias is not None:
            assert dy is not None
            torch.sum(dy, 0, out=self.dbias)
        if self.a is None or xa is None or dxa is None or self.da is None:
            return
        if dy is not None:
            self._backward_b(dy, xa)
        if x is not None:
            self._backward_a(x, dxa)

    def _backward_b(self, dy: Tensor, xa: Tensor) -> None:
        slots = len(xa)
        if self.db is not None:
            begin = self.pairs[0].lo
            ops.thin_(self.db.t(), xa[0], dy[:, begin : self.pairs[-1].hi], [pair.hi - begin for pair in self.pairs])
            return
        for columns, pair in self.members():
            assert pair.db is not None
            if slots == 1:
                torch.mm(dy[:, pair.lo : pair.hi].t(), xa[0, :, columns], out=pair.db[0])
            else:
                torch.bmm(dy.view(slots, -1, dy.shape[1])[:, :, pair.lo : pair.hi].transpose(1, 2), xa[:, :, columns], out=pair.db)

    def _backward_a(self, x: Tensor, dxa: Tensor) -> None:
        assert self.a is not None and self.da is not None
        slots = len(dxa)
        for columns, _, dropped in self._inputs(x[:, : self.a.shape[2]]):
            if slots == 1:
                ops.thin_(self.da[0, columns], dxa[0, :, columns], dropped, [dropped.shape[1]])
            else:
                torch.bmm(dxa[:, :, columns].transpose(1, 2), dropped.view(slots, -1, dropped.shape[1]), out=self.da[:, columns])

    @property
    def trained(self) -> bool:
        return self.a is not None or self.dweight is not None
