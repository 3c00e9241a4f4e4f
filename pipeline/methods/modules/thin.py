"""A linear layer as two thin ones. Library of pipeline/methods/low_rank.py."""

from __future__ import annotations

from typing import Any

from torch import nn


class Thin(nn.Sequential):
    """x -> left · (right · x) + bias; `weight` and `bias` for models that read a layer's in the place of calling it (Mamba)."""

    @property
    def factors(self) -> tuple[Any, Any]:
        """The layers: left of d_out outputs, right of d_in inputs."""
        right, left = self
        return left, right

    @property
    def weight(self) -> Any:
        """[d_out, d_in], computed anew."""
        left, right = self.factors
        return left.weight @ right.weight

    @property
    def bias(self) -> Any:
        """[d_out], or None."""
        return self.factors[0].bias
