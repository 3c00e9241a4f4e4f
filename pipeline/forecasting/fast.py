"""The memory of the fast engine's hand-written step (pipeline/engine), tensor by tensor, through warm-up and capture.

Library of memory.py. It follows buffer.py, bind.py, llama.py, linear.py and graphs.py line by line and uses their names, so that a change
there has its place here; tests/test_forecast_fast.py compares it with the tensors that a bound model has.
"""

from __future__ import annotations

from typing import Any

from pipeline.engine.families import FAMILIES, WIDE
from pipeline.engine.layout import NORM_PROGRAMS, logits_rows, padded
from pipeline.forecasting.allocator import Allocator, Tensor
from pipeline.forecasting.plan import Constants, MicroBatch, Plan

QKV, OUT, GATE_UP, DOWN = range(4)


class ByHand:
    """A bound Llama of one slot."""

    def __init__(self, plan: Plan, memory: Allocator, constants: Constants) -> None:
        self.plan, self.memory, self.constants, self.s, self.z = plan, memory, constants, plan.shape, plan.compute
        self.full = plan.trained.kind == "full"
        self.lowest = 0
        self.n = 0
        self.saved: list[Tensor] = []
        self.static: list[Tensor] = []
        ranks, family = plan.trained.ranks, FAMILIES[plan.shape.family]
        self.after, self.head_norms = bool(family.after), family.head_norms
        self.groups = [names for _, names in family.groups]
        counts = [sum(name in ranks for name in group) for group in self.groups]
        self.rank = max(ranks.values(), default=0)
        self.down = [count * self.rank for count in counts]
        """Columns of x Aᵀ by group."""
        self.sizes = [(self.s.linear(group[0])[0], sum(self.s.linear(name)[1] for name in group)) for group in self.groups]
        both = list(zip(self.down, self.sizes, strict=True))
        self.room = [padded(columns, i) if wide else 0 for (columns, (i, _)), wide in zip(both, WIDE, strict=True)]
        self.under = [padded(columns, o) if plan.precision in ("bf16", "fp32") else 0 for columns, (_, o) in both]

    @property
    def beside(self) -> int:
        """Layer.beside."""
        return 0 if self.after else self.under[DOWN]

    def new(self, numbers: int, z: int, kind: str = "activations") -> Tensor:
        return self.memory.new(numbers * z, kind)

    # -- what stands throughout

    def bind(self, parameters: dict[str, Tensor]) -> None:
        """bind.py: the flat buffers, and frozen weights stacked with room beside them.

        parameters: the loaded base's tensors by name; those that are stacked or adopted are taken out.
        """
        size, z = self.plan.trained.count, self.z
        kinds = [("weights" if self.full else "adapter", 4), ("optimiser", 4), ("optimiser", 4), ("weights", z), ("gradients", z)]
        self.static = [self.new(size, bytes_, kind) for kind, bytes_ in kinds]
        if self.plan.accumulates:
            self.static.append(self.new(size, 4, "gradients"))
        if self.full:
            parameters.clear()
            return
        for name in [n for n in parameters if n.startswith("adapter")]:
            del parameters[name]
        self.static += [self.new(self.s.layer_biases, z, "weights") for _ in range(self.s.layers)]
        if self.plan.precision in ("bf16", "fp32"):
            for layer in range(self.s.layers):
                for index, group in enumerate(self.groups):
                    self._stack(parameters, [f"{layer}.{name}" for name in group], index)

    def _stack(self, parameters: dict[str, Tensor], names: list[str], index: int) -> None:
        if len(names) == 1 and not self.room[index] and not self.under[index]:
            return
        i, o = self.sizes[index]
        self.static.append(self.new((o + self.under[index]) * (i + self.room[index]), self.z, "weights"))
        for name in names:
            del parameters[name]

    def hold(self, tokens: int) -> None:
        """llama.hold: the largest of what backward needs, for as many tokens as a batch can have."""
        for _ in range(self.lowest, self.s.layers):
            for index in (QKV, GATE_UP):
                i, o = self.sizes[index]
                o += self.under[index] if index == GATE_UP else 0
                self.saved += [self.new(tokens * (i + self.room[index]), self.z), self.new(tokens * o, self.z)]
            self.saved.append(self.new(tokens * (self.s.heads + self.s.groups) * self.s.head if self.head_norms else 0, self.z))

    def try_attention(self, rows: int, width: int) -> None:
        """programs.fastest_attention: two kernels are captured and timed at the run's shape."""
        s, n = self.s, rows * width
        inputs = [self.new(n * heads * s.head, self.z) for heads in (s.heads, s.groups, s.groups)]
        for _ in range(2 if self.z == 2 else 0):
            with self.memory.side_stream():
                self._attend_and_back(n)
            self.memory.empty_cache()
            pool = self.memory.new_pool()
            with self.memory.capture(pool):
                self._attend_and_back(n)
            self.memory.drop_pool(pool)
        del inputs

    def _attend_and_back(self, n: int) -> None:
        self.n = n
        out = self.attend(n)
        grads = self.attend_back(n)
        del out, grads

    # -- a step

    def weight(self, index: int) -> Tensor:
        """What a group's weight takes for the call: a 4-bit one is dequantised into room of its own."""
        i, o = self.sizes[index]
        return self.new(o * (i + self.room[index]) if self.plan.precision == "nf4" else 0, self.z, "weights")

    def attend(self, n: int) -> list[Tensor]:
        """The kernel's output and its number a row (plain attention in fp32: its scores too)."""
        s = self.s
        out = self.new(n * s.heads * s.head, self.z)
        if self.z == 2:
            return [out, self.new(n * s.heads, 4)]
        queries, square = n * s.heads * s.head, n * s.heads * self.width
        repeated = [self.new(queries, 4) for _ in range(4)]
        mask = self.new(self.width**2, 4)
        raw, first = self.new(square, 4), self.new(square, 4)
        where = self.new(square, 1)
        weights = self.new(square, 4)
        del raw, first, where, mask
        return [out, *repeated, weights]

    def attend_back(self, n: int) -> list[Tensor]:
        """dq, dk, dv."""
        s, z = self.s, self.z
        queries, shared = n * s.heads * s.head, n * s.groups * s.head
        if z == 4:
            square = n * s.heads * self.width
            scores = [self.new(square, 4), self.new(square, 4)]
            whole = [self.new(queries, 4) for _ in range(3)]
            del scores
            grads = [self.new(queries, 4), self.new(shared, 4), self.new(shared, 4)]
            del whole
            return grads
        grads = [self.new(queries, z), self.new(shared, z), self.new(shared, z)]
        sums, wide = self.new(n * s.heads, 4), self.new(queries, 4)
        expanded = [self.new(queries, z), self.new(queries, z)] if s.heads != s.groups else []
        del sums, wide, expanded
        return grads

    def forward(self, save: bool) -> list[Any]:
        """Layer.forward: what it saves beside `hold`'s tensors; its output replaces its input."""
        n, s, z = self.n, self.s, self.z
        saved: list[Any] = [self.new(n, 4)]
        loose = [] if save else [self.new(n * (self.sizes[QKV][0] + self.room[QKV]), z)]
        w = self.weight(QKV)
        loose += [] if save else [self.new(n * self.sizes[QKV][1], z)]
        del w
        saved.append(self.new(n * (s.heads + s.groups) if self.head_norms else 0, 4))
        attended = self.attend(n)
        w = self.weight(OUT)
        self.add(OUT, saved)
        del w
        saved.append(self.new(n, 4))
        loose += [] if save else [self.new(n * (self.sizes[GATE_UP][0] + self.room[GATE_UP]), z)]
        w = self.weight(GATE_UP)
        loose += [] if save else [self.new(n * self.sizes[GATE_UP][1], z)]
        del w
        h = self.new(n * (s.inner + self.room[DOWN]), z)
        w = self.weight(DOWN)
        self.add(DOWN, saved)
        del w, h, loose
        return [*saved, *attended] if save else []

    def add(self, index: int, saved: list[Any]) -> None:
        """Layer._add: x Aᵀ; with a norm of its own, the product and a number a token."""
        saved.append(self.new(self.n * self.s.width if self.after else 0, self.z))
        saved.append(self.new(self.n * self.down[index], self.z))
        saved.append(self.new(self.n if self.after else 0, 4))

    def backward(self, box: list[Any], saved: list[Any], wanted: bool) -> Tensor | None:
        """Layer.backward."""
        n, s, z = self.n, self.s, self.z
        partial = NORM_PROGRAMS * s.width if self.full else 0
        beside = [0 if under else room for room, under in zip(self.room, self.under, strict=True)]
        dadded = self.new(n * (s.width + self.under[DOWN]) if self.after else 0, z)
        w = self.weight(DOWN)
        dh = self.new(n * (s.inner + beside[DOWN]), z)
        del w
        w = self.weight(GATE_UP)
        dn = self.new(n * (s.width + beside[GATE_UP]), z)
        del w
        dx2 = self.new(n * (s.width + (0 if self.after else self.under[OUT])), z)
        part = self.new(partial, 4)
        del part, dadded
        low = dn if beside[GATE_UP] else None  # a view of dn: it stays until the next product's is there
        del dn
        dadded = self.new(n * (s.width + self.under[OUT]) if self.after else 0, z)
        w = self.weight(OUT)
        dmixed = self.new(n * self.sizes[OUT][0], z)
        dxa = self.new(0 if self.under[OUT] else n * self.down[OUT], z)
        del w, low, dh
        grads = self.attend_back(n)
        dqkv = self.new(n * (self.sizes[QKV][1] + self.under[QKV]), z)
        del grads, dadded
        w = self.weight(QKV)
        columns = 0 if self.under[QKV] else n * self.down[QKV]
        dn = self.new(n * (s.width + beside[QKV]), z) if wanted or self.full else self.new(columns, z)
        del w, dxa
        dx = self.new(n * (s.width + self.beside), z) if wanted or self.full else None
        del dn, dqkv, dmixed, dx2
        box.clear()
        saved.clear()
        return dx

    def micro_batch(self, micro: MicroBatch) -> None:
        """Llama.step."""
        s, z, d = self.s, self.z, self.s.width
        virtual = self.plan.trained.virtual
        self.n, self.width = micro.rows * (micro.width + virtual), micro.width + virtual
        x = self.new(micro.rows * micro.width * d, z)
        before = self.new(micro.rows * virtual * d, z)
        x = self.new(self.n * d, z) if virtual else x
        saved = []
        for layer in range(s.layers):
            saved.append(self.forward(layer >= self.lowest))
        del before
        dense = micro.dense and not virtual
        m = self.n if dense else micro.labels
        x = x if dense else self.new(m * d, z)
        normed, rstd = self.new(m * d, z), self.new(m, 4)
        del x
        dnormed = self.loss(m)
        dpicked = self.new(m * (d + (self.beside if dense else 0)), z)
        dx: Any = dpicked if dense else self.new(self.n * (d + self.beside), z)
        del normed, dnormed, dpicked
        below = self.full or virtual > 0
        for layer in range(s.layers - 1, self.lowest - 1, -1):
            box = [dx]
            del dx
            dx = self.backward(box, saved.pop(), layer > self.lowest or below)
        del rstd
        if self.full:
            with self.new(s.vocabulary * d, 4):
                self.new(micro.rows * micro.width * d, 4)
        del dx

    def loss(self, m: int) -> Tensor:
        """Llama._head: the logits exist a chunk at a time."""
        dnormed = self.new(m * self.s.width, self.z)
        chunk = logits_rows(self.s.vocabulary)
        logits = self.new(min(chunk, m) * self.s.vocabulary, self.z, "logits")
        losses = [self.new(min(chunk, m - lo), 4) for lo in range(0, m, chunk)]
        del logits, losses
        return dnormed

    def run(self) -> None:
        """Stepper: inputs, `hold`, then warm-up and capture of every shape, the widest first."""
        micros = sorted({micro for step in self.plan.steps for micro in step}, key=lambda m: -m.rows * m.width)
        largest, virtual = micros[0], self.plan.trained.virtual
        inputs = [self.new(m.rows * m.width + 2 * m.labels, 8, "inputs") for m in micros]
        inputs += [self.new(m.rows * m.width, 16, "inputs") for m in micros if m.longest]
        self.hold(largest.rows * (largest.width + virtual))
        if self.constants.product_workspace and not largest.longest:
            self.width = largest.width + virtual
            self.try_attention(largest.rows, largest.width + virtual)
        pool = self.memory.new_pool()
        workspaces = []
        for micro in micros:
            with self.memory.side_stream():
                if micro is largest:
                    workspaces.append(self.new(self.constants.product_workspace, 1, "workspace"))
                self.micro_batch(micro)
            self.memory.empty_cache()
            with self.memory.capture(pool):
                if micro is largest:
                    workspaces.append(self.new(self.constants.product_workspace, 1, "workspace"))
                self.micro_batch(micro)
        del inputs, workspaces
