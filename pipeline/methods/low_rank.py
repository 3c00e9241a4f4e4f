"""Every linear layer of the blocks replaced by the product of two thin ones, without training. conf/method/low_rank.yaml, low_rank_calibrated.yaml.

start=<cell> takes what another cell left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.data.rows import Example
from pipeline.methods.base import QUANTISED, Method, check_counts, save_weights
from pipeline.models.blocks import blocks, linears, matrix

WEIGHTS = "low_rank.safetensors"


@dataclass(frozen=True)
class LowRank(Method):
    """W ≈ U·V of the rank at which a layer keeps `share` of its numbers: the nearest such product (singular values; Eckart & Young, 1936).

    calibrated: nearest in what comes out on the calibration rows, ‖(W - U·V)·X‖, by taking W·L apart, L·Lᵀ = X·Xᵀ (DRONE, Chen et al., 2021;
    SVD-LLM, Wang et al., 2024), block after block.

    Raises:
        UserError: a value out of range, or weights that are quantised.
    """

    prepares = True

    share: float
    """Of a layer's numbers that are kept; a layer from d to k then has rank share · d·k / (d + k)."""
    calibrated: bool = False
    calibration_rows: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"method.share is {self.share}; it is above 0 and below 1")
        check_counts(self, "calibration_rows")

    @property
    def name(self) -> str:
        return "low_rank_calibrated" if self.calibrated else "low_rank"

    @property
    def decoder_only(self) -> str | None:
        return "calibration feeds rows to one stack of blocks" if self.calibrated else None

    def check(self, precision: str) -> None:
        if precision in QUANTISED:
            raise UserError(f"{self.name} takes weights apart, and {precision} ones are rounded; choose precision=auto, fp32 or bf16")

    def hyperparameters(self) -> dict[str, Any]:
        return {"share": self.share} | ({"calibration_rows": self.calibration_rows} if self.calibrated else {})

    def labelled_rows(self, train: int, validation: int) -> int:
        return min(self.calibration_rows, train) if self.calibrated else 0

    def prepare(self, examples: Sequence[Example], seed: int, base: Any) -> None:
        """Take the base's layers apart in place."""
        from pipeline.models.blocks import calibrate, rows

        if self.calibrated:
            calibrate(base, rows(examples, self.calibration_rows, base), lambda x: x.T @ x, self._replace)
        else:
            for block in blocks(base):
                self._replace(block, {})

    def _replace(self, block: Any, products: dict[str, Any]) -> None:
        for name, module in list(linears(block)):
            left, right = factors(matrix(module).float(), self._rank(module), products.get(name))
            _put(block, name, module, left.to(module.weight.dtype), right.to(module.weight.dtype))

    def _rank(self, module: Any) -> int:
        d_out, d_in = matrix(module).shape
        return max(1, int(self.share * d_out * d_in / (d_out + d_in)))

    def reached_weights(self, model: Any) -> int:
        from pipeline.methods.modules.thin import Thin

        return sum(m.weight.numel() for block in blocks(model) for m in block.modules() if isinstance(m, Thin))

    def notes(self, model: Any) -> list[str]:
        return [f"every linear layer of the blocks keeps {self.share:.0%} of its numbers, as two thin layers; embeddings and output layer are whole"]

    def save(self, model: Any, state: Any, folder: Path) -> None:
        save_weights(model.named_parameters(), folder / WEIGHTS)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        from safetensors.torch import load_file

        for block in blocks(base):
            for name, module in list(linears(block)):
                rank, (d_out, d_in) = self._rank(module), matrix(module).shape
                _put(block, name, module, module.weight.new_empty(d_out, rank), module.weight.new_empty(rank, d_in))
        weights = load_file(folder / WEIGHTS, device=str(base.device))
        for name, parameter in base.named_parameters():
            parameter.data.copy_(weights[name])
        return base.eval(), None


def factors(weight: Any, rank: int, product: Any = None) -> tuple[Any, Any]:
    """U [d_out, rank], V [rank, d_in] with U·V nearest to weight [d_out, d_in], fp32.

    Args:
        product: X·Xᵀ [d_in, d_in] of the inputs; None: the plain distance of the weights.
    """
    import torch

    if product is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        root = values[:rank].sqrt()
        return left[:, :rank] * root, root[:, None] * right[:rank]
    ridge = 1e-4 * product.diagonal().mean().double()  # inputs that no row has stay invertible
    lower = torch.linalg.cholesky(product.double() + ridge * torch.eye(len(product), device=product.device))
    left, values, right = torch.linalg.svd(weight.double() @ lower, full_matrices=False)
    root = values[:rank].sqrt()
    thin = torch.linalg.solve_triangular(lower, root[:, None] * right[:rank], upper=False, left=False)
    return (left[:, :rank] * root).float(), thin.float()


def _put(block: Any, name: str, module: Any, left: Any, right: Any) -> None:
    """Two layers in the place of one; the bias goes with the second."""
    import torch

    from pipeline.methods.modules.thin import Thin

    halves = ((right, False), (left, module.bias is not None))
    first, second = (torch.nn.Linear(w.shape[1], w.shape[0], bias=bias, device=w.device, dtype=w.dtype) for w, bias in halves)
    first.weight.data, second.weight.data = right.contiguous(), left.contiguous()
    if module.bias is not None:
        second.bias.data = module.bias.data
    parent, _, last = name.rpartition(".")
    setattr(block.get_submodule(parent), last, Thin(first, second).requires_grad_(False))
