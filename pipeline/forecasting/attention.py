"""The memory of attention under autograd: the four projections, the rotation and torch's kernel, forward and back.

Library of eager.py. With 16-bit numbers on a GPU, and on a CPU, a fused kernel keeps q, k, v, its output and a number a row; in fp32 on
a GPU no fused kernel shares key-value heads, and the plain one keeps [R, H, T, T].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.forecasting.allocator import Tensor
    from pipeline.forecasting.operations import Operations

Back = Callable[[list[Any]], Any]


class Attention:
    """A layer's attention within `owner`'s walk."""

    def __init__(self, owner: Operations) -> None:
        self.owner = owner
        self.rows = self.width = 0

    @property
    def plain(self) -> bool:
        """Whether the scores themselves are kept."""
        plan = self.owner.plan
        return plan.gpu and plan.compute == 4 and plan.shape.heads != plan.shape.groups

    def __call__(self, x: Tensor, xz: int, layer: int, needs: bool) -> tuple[Tensor, Back]:
        """(o(attention(q(x), k(x), v(x))) [N, d], the way back)."""
        me = self.owner
        need = {name: me.outputs_need(layer, f"{name}_proj", needs) for name in "qkv"}
        q, q_back = me.linear(x, xz, layer, "q_proj", needs)
        k, k_back = me.linear(x, xz, layer, "k_proj", needs)
        v, v_back = me.linear(x, xz, layer, "v_proj", needs)
        q = self.rotated(q, me.s.heads)
        k = self.rotated(k, me.s.groups)
        any_needs = any(need.values())
        mixed, kernel_back = (self.scores if self.plain else self.fused)(q, k, v, any_needs)
        del q, k, v
        out, out_back = me.linear(mixed, me.z, layer, "o_proj", any_needs)
        del mixed

        def back(box: list[Any]) -> Tensor | None:
            dmixed = out_back(box)
            if dmixed is None:
                return None
            found = kernel_back([dmixed])
            del dmixed
            dk = self.unrotated(found, 1, me.s.groups)
            dq = self.unrotated(found, 0, me.s.heads)
            held = [found.pop()]
            dx = [v_back(held) if need["v"] else None]
            held = [dk]
            del dk
            dx.append(k_back(held) if need["k"] else None)
            held = [dq]
            del dq
            dx.append(q_back(held) if need["q"] else None)
            return next((d for d in dx if d is not None), None)  # added in place

        return out, back

    def rotated(self, x: Tensor, heads: int) -> Tensor:
        """x · cos + rotate_half(x) · sin; nothing but the angles is kept."""
        me = self.owner
        size, wide = me.n * heads * me.s.head, max(me.z, me.hz)
        first = me.new(size, wide)
        half = me.new(size // 2, me.z)
        turned = me.new(size, me.z)
        del half
        second = me.new(size, wide)
        del turned
        out = me.new(size, wide)
        del first, second, x
        return out if wide == me.z else me.new(size, me.z)  # autocast, before the kernel

    def unrotated(self, found: list[Any], at: int, heads: int) -> Tensor:
        """The gradient through the rotation of found[at], which is taken out."""
        me = self.owner
        size, wide = me.n * heads * me.s.head, max(me.z, me.hz)
        dy = found[at]
        found[at] = None
        if wide != me.z:
            dy = me.new(size, wide)
        turned = me.new(size, wide)
        parts = [me.new(size, wide) for _ in range(2)]
        parts.append(me.new(size // 2, wide))
        del turned
        dx = me.new(size, wide)
        del parts, dy
        return dx if wide == me.z else me.new(size, me.z)

    def fused(self, q: Tensor, k: Tensor, v: Tensor, needs: bool) -> tuple[Tensor, Back]:
        """Flash attention (Dao, 2023)."""
        me = self.owner
        s, z, n = me.s, me.z, me.n
        own, shared = n * s.heads * s.head, n * s.groups * s.head
        out, logs = me.new(own, z), me.new(n * s.heads, 4)
        saved = [q, k, v, out, logs] if needs else []
        del logs, q, k, v

        def back(box: list[Any]) -> list[Any]:
            dy = box.pop()
            found: list[Any] = [me.new(own, z), me.new(shared, z), me.new(shared, z)]
            sums = me.new(n * s.heads, 4)
            wide = me.new(own, 4) if me.plan.gpu else None
            expanded = [me.new(own, z), me.new(own, z)] if me.plan.gpu and s.heads != s.groups else []
            del sums, wide, expanded, dy
            saved.clear()
            return found

        return out, back

    def scores(self, q: Tensor, k: Tensor, v: Tensor, needs: bool) -> tuple[Tensor, Back]:
        """torch's plain attention: softmax(q kᵀ) v with key-value heads repeated."""
        me = self.owner
        s, z, n = me.s, me.z, me.n
        own, square = n * s.heads * s.head, self.rows * s.heads * self.width**2
        k, v = me.new(own, z), me.new(own, z)
        mask = me.new(self.width**2, z)
        q, k = me.new(own, z), me.new(own, z)
        raw = me.new(square, z)
        weights = me.new(square, z)
        where = me.new(square, 1)
        weights = me.new(square, z)
        del where, raw
        out = me.new(own, z)
        saved = [q, k, v, weights] if needs else []
        del q, k, v, weights, mask
        out = me.new(own, z)

        def back(box: list[Any]) -> list[Any]:
            dy = box.pop()
            dy = me.new(own, z)
            dweights = me.new(square, z)
            dv = me.new(own, z)
            del dy
            draw = me.new(square, z)
            del dweights
            dq, dk = me.new(own, z), me.new(own, z)
            del draw
            saved.clear()
            dq = me.new(own, z)
            dk = me.new(own, z)
            dk = me.new(n * s.groups * s.head, z)
            dv = me.new(n * s.groups * s.head, z)
            return [dq, dk, dv]

        return out, back
