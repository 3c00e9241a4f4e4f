"""The memory of a step under autograd over transformers' Llama modules, tensor by tensor: what the eager engine takes.

Library of memory.py. It goes through the forward pass of LlamaForCausalLM with the adapters of PEFT and the linear layers of
bitsandbytes in it, keeps what autograd saves of every operation, and goes backward in autograd's order; tests/test_forecast_eager.py
checks it against saved_tensors_hooks and against torch's own count of live bytes.

Shapes: N = R·T tokens of a micro-batch, M labelled ones, d, f, V as in shape.py; z are bytes of a number. An operation returns
its output and a function that takes a box with the output's gradient and gives the input's.
"""

from __future__ import annotations

from typing import Any

from pipeline.engine.layout import ROWS_AT_ONCE
from pipeline.forecasting.allocator import Tensor
from pipeline.forecasting.modules import TIED, Back, Operations
from pipeline.forecasting.plan import MicroBatch
from pipeline.forecasting.trained import parameter_sizes
from pipeline.training.ranks import BUCKET

PAGED_FROM = 100_000
"""Numbers of a tensor from which bitsandbytes pages its optimiser state."""


class Eager(Operations):
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
        """A decoder layer: (its output [N, d], backward)."""
        norms = self.plan.trained.kind == "ln" or self.trains(layer)
        xz = self.tz if norms else max(self.hz, self.plan.base)
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

        def narrow(dy: Tensor) -> Tensor:
            return dy if self.hz == self.z else self.new(size, self.z)

        def back(box: list[Any]) -> Tensor | None:
            dy = box.pop()
            gradient = [narrow(dy)]
            gradient = [forward_back(gradient)]
            if gradient[0] is not None:
                norm2_back(gradient)  # added to dy in place
            gradient = [narrow(dy)]
            gradient = [attention_back(gradient)]
            if gradient[0] is not None:
                norm1_back(gradient)
            return dy if needs else None

        return y, back

    def checkpointed(self, x: Tensor, layer: int, needs: bool) -> tuple[Tensor, Back]:
        """torch.utils.checkpoint without re-entrance: the input is saved, the layer is gone through again in backward."""
        y, back = self.layer(x, layer, needs)
        del back  # what autograd would save is freed at once
        inputs = [x]
        del x

        def again(box: list[Any]) -> Tensor | None:
            self.casts.clear()
            out, back = self.layer(inputs[0], layer, needs)
            self.casts.clear()
            del out
            dx = back(box)
            inputs.clear()
            return dx

        return y, again

    def micro_batch(self, micro: MicroBatch) -> None:
        virtual = self.plan.trained.virtual
        cells = micro.rows * micro.width
        self.n = micro.rows * (micro.width + virtual)
        self.rows, self.width, self.labels = micro.rows, micro.width + virtual, micro.labels
        inputs = [self.new(cells, 8, "inputs"), *(self.new(micro.labels, 8, "inputs") for _ in range(3)), self.new(micro.labels, 4, "inputs")]
        trained = self.plan.trained
        x: Any = self.new(cells * self.s.width, self.hz)
        if virtual:
            with self.new(micro.rows * virtual * self.s.width, self.hz):
                x = self.new(self.n * self.s.width, self.hz)
        angles = [self.new((micro.width + virtual) * self.s.head, self.hz) for _ in range(2)]
        first = x  # a local of the model's forward pass
        needs = "embedding" in trained.parts or self.soft
        backs: list[Back] = []
        with self.memory.forward_pass():
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
        if "embedding" in trained.parts:
            self.embedding_grad()
        if self.soft:
            for number, size in enumerate(trained.sizes):
                self.grad(f"soft.{number}", size)
        del inputs, angles
        self.memory.graph_freed()

    def embedding_grad(self) -> None:
        """The input embedding's gradient. A tied output layer's is added to it: in place where autocast made that one, else a third tensor."""
        numbers = self.s.vocabulary * self.s.width
        made = self.new(numbers, 4, "gradients")
        if self.tied is not None:
            made, self.tied = self.new(numbers, 4, "gradients") if self.z == 4 else self.tied, None
        self.keep_grad("embedding", [made], numbers, 4)

    def head(self, x: Tensor, needs: bool) -> tuple[list[Any], Back]:
        """Last norm, logits at labelled positions, loss: (a box that starts backward, backward to the layers' last output)."""
        m, v, d, z = self.labels, self.s.vocabulary, self.s.width, self.z
        trained = self.plan.trained
        norms = trained.kind == "ln" or (trained.kind == "full" and "norm" in trained.parts)
        xz = self.tz if norms else max(self.hz, self.plan.base)
        normed, norm_back = self.norm(x, needs, "norm", norms)
        del x
        inside = needs or norms
        picked = self.new(m * d, xz)
        del normed
        trains = trained.kind == "full" and ("head" in trained.parts or ("embedding" in trained.parts and self.s.tied and not trained.own_head))
        if trains:
            owner = "head" if trained.own_head or not self.s.tied else TIED
            logits, logits_back = self.trained_linear(picked, xz, "head", (d, v), inside, m, owner)
        else:
            logits, logits_back = self._frozen_head(picked, xz)
        del picked
        scores = logits if z == 4 else self.new(m * v, 4, "logits")
        del logits
        if self.plan.gpu:
            saved = [self.new(m * v, 4, "logits")]
        else:  # ops.WeightedNll: a stretch of rows at a time, the gradient in the logits' place
            self.new(min(m, ROWS_AT_ONCE) * v, 4, "logits")
            saved = [scores]

        def back(box: list[Any]) -> Tensor | None:
            box.clear()
            if self.plan.gpu:
                with self.new(m * v, 4, "logits"):
                    dscores = self.new(m * v, 4, "logits")
                    saved.clear()
            else:
                dscores = saved.pop()
            if z != 4:
                dscores = self.new(m * v, z, "logits")
            gradient = [dscores]
            del dscores
            dpicked = logits_back(gradient)
            if not inside:
                return None
            dnormed = self.new(self.n * d, xz)
            del dpicked
            return norm_back([dnormed])

        return [], back

    def _frozen_head(self, picked: Tensor, xz: int) -> tuple[Tensor, Back]:
        m, v, d, z = self.labels, self.s.vocabulary, self.s.width, self.z
        with self.new(0 if xz == z else m * d, z):
            self.product("forward")
            out = self.new(m * v, z, "logits")

        def back(box: list[Any]) -> Tensor:
            dy = box.pop()
            self.product("backward")
            dx = self.new(m * d, z)
            del dy
            return dx if xz == z else self.new(m * d, xz)

        return out, back

    def states(self) -> list[Tensor]:
        """AdamW's: two moments and a step count for every trained tensor."""
        sizes = [numbers for numbers in parameter_sizes(self.plan.trained, self.s) if not self.plan.paged or numbers < PAGED_FROM]
        return [self.new(size, 4, "optimiser") for numbers in sizes for size in (1, numbers, numbers)]

    def sum_gradients(self) -> None:
        """Over the ranks: in copies of as many as are sent at once."""
        with self.new(min(BUCKET, self.plan.trained.count) if self.plan.ranks > 1 else 0, 4, "gradients"):
            pass

    def run(self) -> None:
        """All steps: micro-batches, then clipping and AdamW, then the gradients are gone."""
        states = self.states() if self.plan.warm else []
        for step in self.plan.steps:
            for micro in step:
                self.micro_batch(micro)
            self.sum_gradients()
            norms = [self.new(1, 4, "gradients") for _ in self.grads]
            del norms
            states = states or self.states()
            self.grads.clear()
