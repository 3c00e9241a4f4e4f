"""The memory of a step under autograd over transformers' Llama modules, tensor by tensor: what the eager engine takes.

Library of memory.py. It goes through the forward pass of LlamaForCausalLM with the adapters of PEFT and the linear layers of
bitsandbytes in it, keeps what autograd saves of every operation, and goes back in autograd's order; tests/test_forecast_eager.py
holds it against saved_tensors_hooks and against torch's own count of live bytes.

Shapes: N = R·T tokens of a micro-batch, M labelled ones, d, f, V as in shape.py; z are bytes of a number. An operation returns
its output and a function that takes a box with the output's gradient and gives the input's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.forecasting.allocator import Allocator, Tensor
from pipeline.forecasting.attention import Attention
from pipeline.forecasting.plan import Constants, MicroBatch, Plan
from pipeline.forecasting.shape import LINEAR

Back = Callable[[list[Any]], Any]
PAGED_FROM = 100_000
"""Numbers of a tensor from which bitsandbytes pages its optimiser state."""


class Eager:
    """Walks through micro-batches.

    Args:
        keep_casts: autocast keeps a trained weight's copy for the whole forward pass (not inside a CUDA graph's capture).
        gradients: where trained parameters' gradients stand already (the fast engine's buffer); None: they are made and freed.
    """

    def __init__(self, plan: Plan, memory: Allocator, constants: Constants, keep_casts: bool = True, own_gradients: bool = True) -> None:
        self.plan, self.memory, self.constants, self.s = plan, memory, constants, plan.shape
        self.keep_casts, self.own_gradients = keep_casts, own_gradients
        self.z = plan.compute
        parts = plan.trained.parts
        self.hz = 4 if "embedding" in parts else plan.base
        self.soft = plan.trained.kind == "soft"
        self.attention = Attention(self)
        self.grads: dict[str, Tensor] = {}
        self.casts: dict[str, Tensor] = {}
        self.workspaces: dict[str, Tensor] = {}
        self.n = self.labels = 0

    # -- small things

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
        """A gradient is cast to fp32 and kept, or added to the one there is."""
        made = box.pop() if z == 4 else self.new(numbers, 4, "gradients")
        if self.own_gradients:
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
        held = self.plan.trained
        return held.kind == "full" and part in held.parts and layer >= held.first

    def layer_trains(self, layer: int) -> bool:
        """Whether anything of this layer is trained."""
        held = self.plan.trained
        return held.kind in ("lora", "ia3", "ln") or self.trains(layer) or self.trains(layer, "biases")

    # -- operations

    def norm(self, x: Tensor, needs: bool, name: str, trained: bool) -> tuple[Tensor, Back]:
        """RMSNorm as LlamaRMSNorm computes it, in fp32."""
        size, hz = self.n * self.s.width, self.hz
        oz = 4 if trained else max(hz, self.plan.base)
        wide = x if hz == 4 else self.new(size, 4)
        square = self.new(size, 4)
        root = self.new(self.n, 4)
        del square
        scaled = self.new(size, 4)
        narrow = scaled if hz == 4 else self.new(size, hz)
        del scaled
        out = self.new(size, oz)
        saved = [*([wide, root] if needs else []), *([narrow] if trained else [])]
        del wide, root, narrow

        def back(box: list[Any]) -> Tensor | None:
            dout = box.pop()
            if trained:
                product = self.new(size, oz)
                self.grad(name, self.s.width)
                del product
            if not needs:
                saved.clear()
                return None
            dnarrow = self.new(size, oz)
            del dout
            if oz != hz:
                dnarrow = self.new(size, hz)
            dscaled = dnarrow if hz == 4 else self.new(size, 4)
            del dnarrow
            droot = self.new(size, 4)
            dwide = self.new(size, 4)
            del droot, dscaled
            spread = self.new(size, 4)
            power = self.new(size, 4)
            power = self.new(size, 4)
            del spread, power
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
            half, small = self.new(self.n * i, 2), self.new(self.n * i, 1)
            summed = self.new(self.n * o, 4)
            out = self.new(self.n * o, z)
            del half, small, summed
            if needs:
                saved.append(fed)
        elif precision == "nf4":
            dequantised = self.new(i * o, z)
            out = self.new(self.n * o, z)
            del dequantised
        else:
            out = self.new(self.n * o, z)
        del fed

        def back(box: list[Any]) -> Tensor | None:
            dout = box.pop()
            if not needs:
                return None
            self.product("backward")
            dequantised = self.new(i * o, z) if precision in ("nf4", "int8") else None
            dx = self.new(self.n * i, z)
            del dequantised, dout
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
        del fed, cast

        def back(box: list[Any]) -> Tensor | None:
            dout = box.pop()
            self.product("backward")
            dx = self.new(tokens * i, z) if needs else None
            made = [self.new(i * o, z, "gradients")]
            del dout
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
        up = self.new(n * o, z)
        scaled = self.new(n * o, z)
        del up
        out = self.new(n * o, z)
        del scaled, result
        saved = [mask if needs else None, fed, down, *casts]
        del mask, dropped, fed, wide, down, casts

        def back(box: list[Any]) -> Tensor | None:
            dout = box.pop()
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
            held = [dout]
            del dout
            return base_back(held) and dfed  # added in place

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
            del wide, fed
        else:
            held, base_back = self.base_linear(x, xz, name, needs)
            scaled = self.new(size, 4)
            out = scaled if z == 4 else self.new(size, z)
            saved = [held]
            del held, scaled

        def scale_back(dout: Tensor) -> Tensor:
            wide = dout if z == 4 else self.new(size, 4)
            del dout
            product = self.new(size, 4)
            self.grad(f"{layer}.{name}.ia3", i if inner else o)
            del product
            found = self.new(size, 4)
            del wide
            saved.clear()
            return found if z == 4 else self.new(size, z)

        def back(box: list[Any]) -> Tensor | None:
            if inner:
                return scale_back(base_back(box))
            return base_back([scale_back(box.pop())])

        return out, back

    def linear(self, x: Tensor, xz: int, layer: int, name: str, needs: bool) -> tuple[Tensor, Back]:
        """One of a layer's linear maps, whatever holds it."""
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
        held = self.plan.trained
        if held.kind in ("lora", "ia3"):
            return needs or name in held.ranks
        biased = name in self.s.biases or held.added_biases
        return needs or self.trains(layer) or (self.trains(layer, "biases") and biased)

    # -- the model

    def feed_forward(self, x: Tensor, xz: int, layer: int, needs: bool) -> tuple[Tensor, Back]:
        """down(silu(gate(x)) · up(x))."""
        size, z = self.n * self.s.inner, self.z
        gate, gate_back = self.linear(x, xz, layer, "gate_proj", needs)
        ours = self.outputs_need(layer, "gate_proj", needs)
        act = self.new(size, z)
        up, up_back = self.linear(x, xz, layer, "up_proj", needs)
        also = self.outputs_need(layer, "up_proj", needs)
        h = self.new(size, z)
        y, down_back = self.linear(h, z, layer, "down_proj", ours or also)
        saved = [*([gate, up] if ours else []), *([act] if also else [])]
        del gate, act, up, h

        def back(box: list[Any]) -> Tensor | None:
            dh = down_back(box)
            if not (ours or also):
                return None
            dact = self.new(size, z) if ours else None
            dup = self.new(size, z) if also else None
            del dh
            dx = up_back([dup]) if also else None
            del dup
            dgate = self.new(size, z) if ours else None
            del dact
            saved.clear()
            second = gate_back([dgate]) if ours else None
            return dx if dx is not None else second  # added in place

        return y, back

    def layer(self, x: Tensor, layer: int, needs: bool) -> tuple[Tensor, Back]:
        """A decoder layer: (its output [N, d], the way back)."""
        norms = self.plan.trained.kind == "ln" or self.trains(layer)
        xz = 4 if norms else max(self.hz, self.plan.base)
        size = self.n * self.s.width
        n1, norm1_back = self.norm(x, needs, f"{layer}.norm1", norms)
        mixed, attention_back = self.attention(n1, xz, layer, needs or norms)
        del n1
        x2 = self.new(size, self.hz)
        del mixed, x
        inside = needs or self.layer_trains(layer)
        n2, norm2_back = self.norm(x2, inside, f"{layer}.norm2", norms)
        fed, forward_back = self.feed_forward(n2, xz, layer, inside or norms)
        del n2
        y = self.new(size, self.hz)
        del fed, x2

        def narrow(dy: Tensor) -> Tensor:
            return dy if self.hz == self.z else self.new(size, self.z)

        def back(box: list[Any]) -> Tensor | None:
            dy = box.pop()
            held = [narrow(dy)]
            held = [forward_back(held)]
            if held[0] is not None:
                norm2_back(held)  # added to dy in place
            held = [narrow(dy)]
            held = [attention_back(held)]
            if held[0] is not None:
                norm1_back(held)
            return dy if needs else None

        return y, back

    def checkpointed(self, x: Tensor, layer: int, needs: bool) -> tuple[Tensor, Back]:
        """torch.utils.checkpoint without re-entrance: the input is kept, the layer is gone through again on the way back."""
        y, back = self.layer(x, layer, needs)
        del back  # what autograd would save is given back at once
        kept = [x]
        del x

        def again(box: list[Any]) -> Tensor | None:
            self.casts.clear()
            out, back = self.layer(kept[0], layer, needs)
            self.casts.clear()
            del out
            dx = back(box)
            kept.clear()
            return dx

        return y, again

    def micro_batch(self, micro: MicroBatch) -> None:
        """Forward, loss and backward of one micro-batch."""
        virtual = self.plan.trained.virtual
        cells = micro.rows * micro.width
        self.n = micro.rows * (micro.width + virtual)
        self.attention.rows, self.attention.width = micro.rows, micro.width + virtual
        self.labels = micro.labels
        inputs = [self.new(cells, 8, "inputs"), *(self.new(micro.labels, 8, "inputs") for _ in range(3)), self.new(micro.labels, 4, "inputs")]
        held = self.plan.trained
        x: Any = self.new(cells * self.s.width, self.hz)
        if virtual:
            prompts = self.new(micro.rows * virtual * self.s.width, self.hz)
            x = self.new(self.n * self.s.width, self.hz)
            del prompts
        angles = [self.new((micro.width + virtual) * self.s.head, self.hz) for _ in range(2)]
        first = x  # a local of the model's forward pass
        needs = "embedding" in held.parts or self.soft
        backs: list[Back] = []
        for layer in range(self.s.layers):
            x, back = (self.checkpointed if self.plan.checkpointing else self.layer)(x, layer, needs)
            needs = needs or self.layer_trains(layer)
            if needs:
                backs.append(back)
            del back
        if not self.soft:
            del first
        box, end_back = self.head(x, needs)
        first = x = None
        self.casts.clear()
        box = [end_back(box)]
        while backs:
            box = [backs.pop()(box) if box[0] is not None else None]
        if "embedding" in held.parts:
            self.grad("embedding", self.s.vocabulary * self.s.width)
        if self.soft:
            for number, size in enumerate(held.sizes):
                self.grad(f"soft.{number}", size)
        del inputs, angles

    def head(self, x: Tensor, needs: bool) -> tuple[list[Any], Back]:
        """Last norm, logits at labelled positions, loss: (a box that starts the way back, the way to the layers' last output)."""
        m, v, d, z = self.labels, self.s.vocabulary, self.s.width, self.z
        held = self.plan.trained
        norms = held.kind == "ln" or (held.kind == "full" and "norm" in held.parts)
        xz = 4 if norms else max(self.hz, self.plan.base)
        normed, norm_back = self.norm(x, needs, "norm", norms)
        del x
        inside = needs or norms
        picked = self.new(m * d, xz)
        del normed
        trains = held.kind == "full" and ("head" in held.parts or ("embedding" in held.parts and self.s.tied and not held.own_head))
        if trains:
            owner = "head" if held.own_head or not self.s.tied else "embedding"
            logits, logits_back = self.trained_linear(picked, xz, "head", (d, v), inside, m, owner)
        else:
            logits, logits_back = self._frozen_head(picked, xz)
        del picked
        scores = logits if z == 4 else self.new(m * v, 4, "logits")
        del logits
        kept = [self.new(m * v, 4, "logits")]
        del scores

        def back(box: list[Any]) -> Tensor | None:
            box.clear()
            dkept = self.new(m * v, 4, "logits")
            dscores = self.new(m * v, 4, "logits")
            kept.clear()
            del dkept
            if z != 4:
                dscores = self.new(m * v, z, "logits")
            held = [dscores]
            del dscores
            dpicked = logits_back(held)
            if not inside:
                return None
            dnormed = self.new(self.n * d, xz)
            del dpicked
            return norm_back([dnormed])

        return [], back

    def _frozen_head(self, picked: Tensor, xz: int) -> tuple[Tensor, Back]:
        m, v, d, z = self.labels, self.s.vocabulary, self.s.width, self.z
        fed = picked if xz == z else self.new(m * d, z)
        self.product("forward")
        out = self.new(m * v, z, "logits")
        del fed

        def back(box: list[Any]) -> Tensor:
            dout = box.pop()
            self.product("backward")
            dx = self.new(m * d, z)
            del dout
            return dx if xz == z else self.new(m * d, xz)

        return out, back

    # -- the step

    def parameter_sizes(self) -> list[int]:
        """Numbers of every trained tensor."""
        held, s = self.plan.trained, self.s
        if held.kind == "soft":
            return list(held.sizes)
        if held.kind == "lora":
            return [rank * size for _ in range(s.layers) for name, rank in held.ranks.items() for size in s.linear(name)]
        if held.kind == "ia3":
            return [s.linear(name)[0 if name == "down_proj" else 1] for _ in range(s.layers) for name in held.ranks]
        if held.kind == "ln":
            return [s.width] * (2 * s.layers + 1)
        return self._base_sizes()

    def _base_sizes(self) -> list[int]:
        held, s = self.plan.trained, self.s
        whole, found = s.vocabulary * s.width, []
        if "embedding" in held.parts:
            found.append(whole)
        for _ in range(held.first, s.layers):
            if "layers" in held.parts:
                found += [i * o for i, o in map(s.linear, LINEAR)]
            if {"layers", "biases"} & held.parts:
                found += [s.linear(name)[1] for name in (LINEAR if held.added_biases else s.biases)]
            if "layers" in held.parts:
                found += [s.width, s.width]
        found += [s.width] if "norm" in held.parts else []
        return found + ([whole] if "head" in held.parts and (not s.tied or held.own_head) else [])

    def states(self) -> list[Tensor]:
        """AdamW's: two moments and a step count for every trained tensor."""
        sizes = [numbers for numbers in self.parameter_sizes() if not self.plan.paged or numbers < PAGED_FROM]
        return [self.new(size, 4, "optimiser") for numbers in sizes for size in (1, numbers, numbers)]

    def run(self) -> None:
        """All steps: micro-batches, then clipping and AdamW, then the gradients are gone."""
        states: list[Tensor] = []
        for step in self.plan.steps:
            for micro in step:
                self.micro_batch(micro)
            norms = [self.new(1, 4, "gradients") for _ in self.grads]
            del norms
            states = states or self.states()
            self.grads.clear()
