"""The memory of full fine-tuning in parts (training/sharded.py, torch's FSDP2) on one GPU, tensor by tensor.

Library of memory.py. As eager.py, with weights in the arithmetic's dtype: a block's are gathered while it computes, the next one's with them, and its
gradients, summed in fp32, leave a part on each GPU.
"""

from __future__ import annotations

from typing import Any

from pipeline.forecasting.allocator import Allocator, Tensor
from pipeline.forecasting.eager import Eager
from pipeline.forecasting.modules import Back
from pipeline.forecasting.plan import Constants, Plan


class Sharded(Eager):
    """One of plan.ranks GPUs. Gathered weights and gradients of a block are one tensor each here, as they are sent."""

    def __init__(self, plan: Plan, memory: Allocator, constants: Constants) -> None:
        super().__init__(plan, memory, constants)
        self.hz = self.tz = self.z
        s = self.s
        self.block = s.layer_matrices + s.layer_biases + sum(s.norms.values())
        self.rest = s.parameters - s.layers * self.block
        self.masters: list[Tensor] = []
        self.kept: dict[Any, Tensor] = {}
        """The parts of the step's gradients, fp32."""
        self.made: list[Tensor] = []
        """Whole gradients of the block at hand."""
        self.sent: list[Tensor] = []

    def part(self, numbers: int) -> int:
        """Of so many numbers, those that lie here."""
        return -(-numbers // self.plan.ranks)

    def shard(self, parameters: dict[str, Tensor]) -> None:
        """Put the loaded weights in parts, block by block; parameters: theirs, which are freed."""
        for name in list(parameters):
            self.masters.append(self.new(self.part(parameters[name].numbers), 4, "weights"))
            del parameters[name]
        self.memory.empty_cache()

    def gathered(self, numbers: int) -> list[Tensor]:
        """Weights as they are computed with, gathered by way of what is sent."""
        with self.new(numbers, self.z, "weights"):
            return [self.new(numbers, self.z, "weights")]

    def weight_cast(self, name: str, numbers: int) -> Tensor | None:
        """It comes in the arithmetic's dtype."""
        return None

    def keep_grad(self, name: str, box: list[Any], numbers: int, z: int) -> None:
        """It waits, whole, for its block's others."""
        self.made.append(box.pop())

    def send(self, owner: Any, numbers: int) -> None:
        """A block's gradients are summed over the GPUs; what was sent stays until the next is."""
        sent = self.new(numbers, 4, "gradients")
        self.made.clear()
        part = self.new(self.part(numbers), 4, "gradients")
        self.kept.setdefault(owner, part)
        self.sent = [sent]

    def layer(self, x: Tensor, layer: int, needs: bool) -> tuple[Tensor, Back]:
        """A block forward with its own weights and the next one's, and the same backward."""
        weights = [self.gathered(self.block), self.gathered(self.block)]
        y, back = super().layer(x, layer, needs)
        del x
        weights.clear()

        def backward(box: list[Any]) -> Tensor | None:
            weights = [self.gathered(self.block), self.gathered(self.block)]
            dx = back(box)
            weights.clear()
            self.send(layer, self.block)
            return dx

        return y, backward

    def micro_batch(self, micro: Any) -> None:
        """The embedding, the last norm and the output layer stay whole from the forward pass's start to backward's end."""
        weights = self.gathered(self.rest)
        super().micro_batch(micro)
        del weights
        self.send("rest", self.rest)
        self.sent.clear()

    def embedding_grad(self) -> None:
        self.made.append(self.new(self.s.vocabulary * self.s.width, self.z, "gradients"))

    def states(self) -> list[Tensor]:
        """AdamW's two moments of every part."""
        return [self.new(self.part(numbers), 4, "optimiser") for numbers in (*[self.block] * self.s.layers, self.rest) for _ in range(2)]

    def sum_gradients(self) -> None:
        """They have been."""
        self.grads = self.kept

    @property
    def answering(self) -> int:
        """Bytes while the first GPU answers: its part of weights and moments, and a whole model in the arithmetic's dtype."""
        numbers = self.s.parameters
        return 12 * self.part(numbers) + self.z * numbers
