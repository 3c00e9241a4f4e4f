"""A linear layer as two thin ones. Library of pipeline/methods/low_rank.py."""

from __future__ import annotations

from torch import Tensor, nn


class Thin(nn.Sequential):
    """x -> left · (right · x) + bias; `weight` and `bias` for models that read a layer's in the place of calling it (Mamba)."""

    @property
    def weight(self) -> Tensor:
        """[d_out, d_in], computed anew."""
        return self[1].weight @ self[0].weight

    @property
    def bias(self) -> Tensor | None:
        return self[1].bias
