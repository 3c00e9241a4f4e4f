"""What the modules of a decoder layer take and keep under autograd, in bytes: norms, linear layers (transformers', PEFT's, bitsandbytes'), attention.

Library of eager.py, which has the conventions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.forecasting.allocator import Allocator, Tensor
from pipeline.forecasting.plan import Constants, Plan

Back = Callable[[list[Any]], Any]
TIED = "tied"
"""The gradient of an output layer that shares the embedding's weight."""


class Operations:
    """What modules of a decoder layer take and keep.

    Args:
        keep_casts: autocast keeps a trained weight's copy for the whole forward pass (not inside a CUDA graph's capture).
        own_gradients: trained parameters' gradients are made by every step; False: they have a place already (the fast engine's buffer).
    """

    def __init__(self, plan: Plan, memory: Allocator, constants: Constants, keep_casts: bool = True, own_gradients: bool = True) -> None:
        self.plan, self.memory, self.constants, self.s = plan, memory, constants, plan.shape
        self.keep_casts, self.own_gradients = keep_casts, own_gradients
        self.z = plan.compute
        parts = plan.trained.parts
        self.tz = 4
        """Bytes of a number of a trained weight, as the modules see it."""
        self.hz = 4 if "embedding" in parts else plan.base
        self.soft = plan.trained.kind == "soft"
        self.grads: dict[str, Tensor] = {}
        self.tied: Tensor | None = None
        """Of the output layer, while it waits for the embedding's own (autograd adds them before it keeps either)."""
        self.casts: dict[str, Tensor] = {}
        self.workspaces: dict[str, Tensor] = {}
        self.n = self.labels = self.rows = self.width = 0

    def new(self, numbers: int, z: int, kind: str = "activations") -> Tensor:
        return self.memory.new(numbers * z, kind)

    def product(self, thread: str) -> None:
        """A matrix product: cuBLAS takes its workspace the first time."""
        if self.plan.gpu and thread not in self.workspaces:
            self.workspaces[thread] = self.memory.new(self.constants.product_workspace, "workspace")

    def grad(self, name: str, numbers: int, z: int = 4) -> None:
        """A parameter's gradient is made in z bytes a number."""
        self.keep_grad(name, [self.new(numbers, z, "gradients")], numbers, z)

    def keep_grad(self, name: str, box: list[Any], numbers: int, z: int) -> None:
        """A gradient is cast to fp32 and stored, or added to the one there is."""
        made = box.pop() if z == 4 else self.new(numbers, 4, "gradients")
        if name == TIED:
            self.tied = made
        elif self.own_gradients:
            self.grads.setdefault(name, made)

    def weight_cast(self, name: str, numbers: int) -> Tensor | None:
        """A trained fp32 weight in the arithmetic's dtype."""
        if self.z == 4:
            return None
        if name not in self.casts:
            made = self.new(numbers, self.z, "weights")
            if not self.keep_casts:
                return made
            self.casts[name] = made
        return self.casts[name]

    def trains(self, layer: int, part: str = "layers") -> bool:
        trained = self.plan.trained
        return trained.kind == "full" and part in trained.parts and layer >= trained.first

    def layer_trains(self, layer: int) -> bool:
        trained = self.plan.trained
        return trained.kind in ("lora", "ia3", "ln") or self.trains(layer) or self.trains(layer, "biases")

    def norm(self, x: Tensor, needs: bool, name: str, trained: bool) -> tuple[Tensor, Back]:
        """RMSNorm as LlamaRMSNorm computes it, in fp32."""
        size, hz = self.n * self.s.width, self.hz
        oz = self.tz if trained else max(hz, self.plan.base)
        wide = x if hz == 4 else self.new(size, 4)
        with self.new(size, 4):
            root = self.new(self.n, 4)
        scaled = self.new(size, 4)
        narrow = scaled if hz == 4 else self.new(size, hz)
        del scaled
        out = self.new(size, oz)
        saved = [*([wide, root] if needs else []), *([narrow] if trained else [])]

        def back(box: list[Any]) -> Tensor | None:
            dy = box.pop()
            if trained:
                with self.new(size, oz):
                    self.grad(name, self.s.width)
            if not needs:
                saved.clear()
                return None
            dnarrow = self.new(size, oz)
            del dy
            if oz != hz:
                dnarrow = self.new(size, hz)
            dscaled = dnarrow if hz == 4 else self.new(size, 4)
            del dnarrow
            droot = self.new(size, 4)
            dwide = self.new(size, 4)
            del droot, dscaled
            with self.new(size, 4), self.new(size, 4):
                self.new(size, 4)
            saved.clear()
            return dwide if hz == 4 else self.new(size, hz)

        return out, back

    def base_linear(self, x: Tensor, xz: int, name: str, needs: bool) -> tuple[Tensor, Back]:
        """A frozen linear layer in the base's precision."""
        (i, o), z, precision = self.s.linear(name), self.z, self.plan.precision
        fed = x if xz == z else self.new(self.n * i, z)
        self.product("forward")
        saved: list[Tensor] = []
        if precision == "int8":
            with self.new(self.n * i, 2), self.new(self.n * i, 1), self.new(self.n * o, 4):
                out = self.new(self.n * o, z)
            if needs:
                saved.append(fed)
        elif precision == "nf4":
            with self.new(i * o, z):
                out = self.new(self.n * o, z)
        else:
            out = self.new(self.n * o, z)

        def back(box: list[Any]) -> Tensor | None:
            dy = box.pop()
            if not needs:
                return None
            self.product("backward")
            with self.new(i * o if precision in ("nf4", "int8") else 0, z):
                dx = self.new(self.n * i, z)
            del dy
            saved.clear()
            return dx if xz == z else self.new(self.n * i, xz)

        return out, back

    def trained_linear(self, x: Tensor, xz: int, key: str, sizes: tuple[int, int], needs: bool, tokens: int, owner: str = "") -> tuple[Tensor, Back]:
        """A linear layer with a trained fp32 weight; owner: whose gradient it is, where weights are tied."""
        (i, o), z = sizes, self.z
        fed = x if xz == z else self.new(tokens * i, z)
        cast = self.weight_cast(key, i * o)
        self.product("forward")
        out = self.new(tokens * o, z, "logits" if key == "head" else "activations")
        saved = [fed, cast if needs else None]

        def back(box: list[Any]) -> Tensor | None:
            dy = box.pop()
            self.product("backward")
            dx = self.new(tokens * i, z) if needs else None
            made = [self.new(i * o, z, "gradients")]
            del dy
            saved.clear()
            dx = self.new(tokens * i, xz) if dx is not None and xz != z else dx
            self.keep_grad(owner or key, made, i * o, z)
            return dx

        return out, back

    def lora_linear(self, x: Tensor, xz: int, layer: int, name: str, needs: bool) -> tuple[Tensor, Back]:
        """peft's Linear: base(x) + scaling · B(A(dropout(x))); over an unquantised base x goes to A by way of fp32."""
        (i, o), z, n = self.s.linear(name), self.z, self.n
        rank, p = self.plan.trained.ranks[name], self.plan.trained.dropout
        result, base_back = self.base_linear(x, xz, name, needs)
        if self.plan.precision == "nf4":
            result = self.new(n * o, z)
        straight = self.plan.precision in ("nf4", "int8") and self.plan.gpu and z == 2  # peft asks whether CUDA's autocast is on
        wide = x if straight or xz == 4 else self.new(n * i, 4)
        wz = xz if wide is x else 4
        mask = self.new(n * i, 1 if self.plan.gpu else wz) if p else None
        dropped = self.new(n * i, wz) if p else wide
        fed = dropped if wz == z else self.new(n * i, z)
        casts = [self.weight_cast(f"{layer}.{name}.{part}", rank * size) for part, size in (("A", i), ("B", o))]
        down = self.new(n * rank, z)
        with self.new(n * o, z):
            scaled = self.new(n * o, z)
        with scaled:
            out = self.new(n * o, z)
        del result
        saved = [mask if needs else None, fed, down, *casts]

        def back(box: list[Any]) -> Tensor | None:
            dy = box.pop()
            dup = self.new(n * o, z)
            ddown = self.new(n * rank, z)
            self.grad(f"{layer}.{name}.B", rank * o, z)
            del dup
            self.product("backward")
            dfed = self.new(n * i, z) if needs else None
            self.grad(f"{layer}.{name}.A", rank * i, z)
            del ddown
            saved.clear()
            if dfed is None:
                return None
            if wz != z:
                dfed = self.new(n * i, wz)
            if p:
                dfed = self.new(n * i, wz)
            if wz != xz:
                dfed = self.new(n * i, xz)
            gradient = [dy]
            del dy
            return base_back(gradient) and dfed  # added in place

        return out, back

    def ia3_linear(self, x: Tensor, xz: int, layer: int, name: str, needs: bool) -> tuple[Tensor, Back]:
        """peft's IA3: a trained vector times the output, or times the input of the feed-forward's last layer; by way of fp32."""
        (i, o), z = self.s.linear(name), self.z
        inner = name == "down_proj"
        size = self.n * (i if inner else o)
        if inner:
            wide = x if xz == 4 else self.new(size, 4)
            scaled = self.new(size, 4)
            fed = scaled if xz == 4 else self.new(size, xz)
            del scaled
            saved = [wide]
            out, base_back = self.base_linear(fed, xz, name, True)
        else:
            result, base_back = self.base_linear(x, xz, name, needs)
            scaled = self.new(size, 4)
            out = scaled if z == 4 else self.new(size, z)
            saved = [result]

        def scale_back(dy: Tensor) -> Tensor:
            wide = dy if z == 4 else self.new(size, 4)
            del dy
            with self.new(size, 4):
                self.grad(f"{layer}.{name}.ia3", i if inner else o)
            dx = self.new(size, 4)
            del wide
            saved.clear()
            return dx if z == 4 else self.new(size, z)

        def back(box: list[Any]) -> Tensor | None:
            if inner:
                return scale_back(base_back(box))
            return base_back([scale_back(box.pop())])

        return out, back

    def linear(self, x: Tensor, xz: int, layer: int, name: str, needs: bool) -> tuple[Tensor, Back]:
        kind, ranks = self.plan.trained.kind, self.plan.trained.ranks
        if kind == "lora" and name in ranks:
            return self.lora_linear(x, xz, layer, name, needs)
        if kind == "ia3" and name in ranks:
            return self.ia3_linear(x, xz, layer, name, needs)
        if self.trains(layer):
            return self.trained_linear(x, xz, f"{layer}.{name}", self.s.linear(name), needs, self.n)
        return self.base_linear(x, xz, name, needs)

    def outputs_need(self, layer: int, name: str, needs: bool) -> bool:
        """Whether a linear map's output needs a gradient, given whether its input does."""
        trained = self.plan.trained
        if trained.kind in ("lora", "ia3"):
            return needs or name in trained.ranks
        biased = name in self.s.biases or trained.added_biases
        return needs or self.trains(layer) or (self.trains(layer, "biases") and biased)

    @property
    def plain_attention(self) -> bool:
        """Whether the scores themselves are saved for backward."""
        return self.plan.gpu and self.z == 4 and self.s.heads != self.s.groups

    def attention(self, x: Tensor, xz: int, layer: int, needs: bool) -> tuple[Tensor, Back]:
        """(o(attention(q(x), k(x), v(x))) [N, d], backward)."""
        need = {name: self.outputs_need(layer, f"{name}_proj", needs) for name in "qkv"}
        q, q_back = self.linear(x, xz, layer, "q_proj", needs)
        k, k_back = self.linear(x, xz, layer, "k_proj", needs)
        v, v_back = self.linear(x, xz, layer, "v_proj", needs)
        q = self.rotated(q, self.s.heads)
        k = self.rotated(k, self.s.groups)
        any_needs = any(need.values())
        mixed, kernel_back = (self.scores if self.plain_attention else self.fused)(q, k, v, any_needs)
        del q, k, v
        out, out_back = self.linear(mixed, self.z, layer, "o_proj", any_needs)

        def back(box: list[Any]) -> Tensor | None:
            dmixed = out_back(box)
            if dmixed is None:
                return None
            grads = kernel_back([dmixed])
            del dmixed
            dk = self.unrotated(grads, 1, self.s.groups)
            dq = self.unrotated(grads, 0, self.s.heads)
            gradient = [grads.pop()]
            dx = [v_back(gradient) if need["v"] else None]
            gradient = [dk]
            del dk
            dx.append(k_back(gradient) if need["k"] else None)
            gradient = [dq]
            del dq
            dx.append(q_back(gradient) if need["q"] else None)
            return next((d for d in dx if d is not None), None)  # added in place

        return out, back

    def rotated(self, x: Tensor, heads: int) -> Tensor:
        """x · cos + rotate_half(x) · sin; only the angles are saved for backward."""
        size, wide = self.n * heads * self.s.head, max(self.z, self.hz)
        first = self.new(size, wide)
        half = self.new(size // 2, self.z)
        turned = self.new(size, self.z)
        del half
        second = self.new(size, wide)
        del turned
        out = self.new(size, wide)
        del first, second, x
        return out if wide == self.z else self.new(size, self.z)  # autocast, before the kernel

    def unrotated(self, grads: list[Any], at: int, heads: int) -> Tensor:
        """The gradient through the rotation of grads[at], which is taken out."""
        size, wide = self.n * heads * self.s.head, max(self.z, self.hz)
        dy = grads[at]
        grads[at] = None
        if wide != self.z:
            dy = self.new(size, wide)
        turned = self.new(size, wide)
        parts = [self.new(size, wide) for _ in range(2)]
        parts.append(self.new(size // 2, wide))
        del turned
        dx = self.new(size, wide)
        del parts, dy
        return dx if wide == self.z else self.new(size, self.z)

    def fused(self, q: Tensor, k: Tensor, v: Tensor, needs: bool) -> tuple[Tensor, Back]:
        """Flash attention (Dao, 2023)."""
        s, z, n = self.s, self.z, self.n
        queries, shared = n * s.heads * s.head, n * s.groups * s.head
        out, logs = self.new(queries, z), self.new(n * s.heads, 4)
        saved = [q, k, v, out, logs] if needs else []

        def back(box: list[Any]) -> list[Any]:
            dy = box.pop()
            grads: list[Any] = [self.new(queries, z), self.new(shared, z), self.new(shared, z)]
            expanded = queries if self.plan.gpu and s.heads != s.groups else 0
            with self.new(n * s.heads, 4), self.new(queries if self.plan.gpu else 0, 4), self.new(expanded, z):
                self.new(expanded, z)
            del dy
            saved.clear()
            return grads

        return out, back

    def scores(self, q: Tensor, k: Tensor, v: Tensor, needs: bool) -> tuple[Tensor, Back]:
        """torch's plain attention: softmax(q kᵀ) v with key-value heads repeated."""
        s, z, n = self.s, self.z, self.n
        queries, square = n * s.heads * s.head, self.rows * s.heads * self.width**2
        k, v = self.new(queries, z), self.new(queries, z)
        mask = self.new(self.width**2, z)
        q, k = self.new(queries, z), self.new(queries, z)
        raw = self.new(square, z)
        weights = self.new(square, z)
        where = self.new(square, 1)
        weights = self.new(square, z)
        del where, raw
        out = self.new(queries, z)
        saved = [q, k, v, weights] if needs else []
        del q, k, v, weights, mask
        out = self.new(queries, z)

        def back(box: list[Any]) -> list[Any]:
            dy = box.pop()
            dy = self.new(queries, z)
            dweights = self.new(square, z)
            dv = self.new(queries, z)
            del dy
            draw = self.new(square, z)
            del dweights
            dq, dk = self.new(queries, z), self.new(queries, z)
            del draw
            saved.clear()
            dq = self.new(queries, z)
            dk = self.new(queries, z)
            dk = self.new(n * s.groups * s.head, z)
            dv = self.new(n * s.groups * s.head, z)
            return [dq, dk, dv]

        return out, back
