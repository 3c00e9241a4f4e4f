"""Weights set to zero without training: by magnitude, or by Wanda. conf/method/magnitude_pruning.yaml, wanda.yaml.

start=<cell> prunes what another cell left. In memory a zero takes as much room as any number; the artefact holds a bit for every weight and the
values of those that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.data.rows import Example
from pipeline.methods.base import QUANTISED, Method, check_counts
from pipeline.models.blocks import blocks, linears, matrix

WEIGHTS = "pruned.safetensors"
VALUES, MASK = "#values", "#mask"
GROUPS = {"2:4": (2, 4), "4:8": (4, 8)}


@dataclass(frozen=True)
class Pruning(Method):
    """Zeros in the linear layers of the blocks; embeddings, output layer and norms stay.

    magnitude: the smallest |W| of a matrix become zero (Han et al., 2015, without their retraining). wanda: the smallest |W_ij| · ‖x_j‖₂ of every
    output row do, x_j the layer's j-th input over the calibration rows (Sun et al., 2023), block after block.

    Raises:
        UserError: a value out of range, or weights that are quantised.
    """

    prepares = True

    by: str
    sparsity: float
    """Share of the weights that become zero."""
    pattern: str | None = None
    """null, or how many of how many neighbours in a row become zero: 2:4 or 4:8, which some GPUs multiply faster (torch's to_sparse_semi_structured)."""
    calibration_rows: int = 128
    """Of the training rows; wanda alone reads them."""

    def __post_init__(self) -> None:
        if self.by not in ("magnitude", "wanda"):
            raise UserError(f"method.by is {self.by!r}; choose magnitude or wanda")
        if not 0 < self.sparsity < 1:
            raise UserError(f"method.sparsity is {self.sparsity}; it is a share, above 0 and below 1")
        if self.pattern is not None and (self.pattern not in GROUPS or self.sparsity != 0.5):
            raise UserError(f"method.pattern is {self.pattern!r} at method.sparsity={self.sparsity}; choose null, or 2:4 or 4:8 at a sparsity of 0.5")
        check_counts(self, "calibration_rows")

    @property
    def name(self) -> str:
        return "wanda" if self.by == "wanda" else "magnitude_pruning"

    @property
    def decoder_only(self) -> str | None:
        return "calibration feeds rows to one stack of blocks" if self.by == "wanda" else None

    def check(self, precision: str) -> None:
        if precision in QUANTISED:
            raise UserError(f"{self.name} compares weights, and {precision} ones are rounded; choose precision=auto, fp32 or bf16")

    def hyperparameters(self) -> dict[str, Any]:
        shown = {"sparsity": self.sparsity} | ({"pattern": self.pattern} if self.pattern else {})
        return shown | ({"calibration_rows": self.calibration_rows} if self.by == "wanda" else {})

    def labelled_rows(self, train: int, validation: int) -> int:
        return min(self.calibration_rows, train) if self.by == "wanda" else 0

    def prepare(self, examples: Sequence[Example], seed: int, base: Any) -> None:
        from pipeline.models.blocks import calibrate, rows

        if self.by == "wanda":
            calibrate(base, rows(examples, self.calibration_rows, base), lambda x: x.square().sum(0), self._prune)
        else:
            for block in blocks(base):
                self._prune(block, {})

    def _prune(self, block: Any, squares: dict[str, Any]) -> None:
        for name, module in linears(block):
            weight = matrix(module)
            scores = weight.float().abs() * squares[name].sqrt() if name in squares else weight.float().abs()
            weight[self._weakest(scores)] = 0

    def _weakest(self, scores: Any) -> Any:
        """Where the lowest scores are, bool as scores [d_out, d_in]: of groups of neighbours, of every row (wanda) or of the whole matrix."""
        import torch

        fewest, group = GROUPS[self.pattern] if self.pattern else (0, 0)
        if group and scores.shape[1] % group:
            raise UserError(f"a layer has {scores.shape[1]} inputs, which method.pattern={self.pattern} does not divide; set method.pattern=null")
        parts = scores.reshape(-1, group) if group else scores if self.by == "wanda" else scores.reshape(1, -1)
        lowest = parts.topk(fewest or int(parts.shape[1] * self.sparsity), largest=False).indices
        return torch.zeros_like(parts, dtype=torch.bool).scatter_(1, lowest, True).view(scores.shape)

    def reached_weights(self, model: Any) -> int:
        return sum(weight.numel() for weight in _weights(model))

    def notes(self, model: Any) -> list[str]:
        zeros, every = sum(int((w == 0).sum()) for w in _weights(model)), self.reached_weights(model)
        what = f"{zeros / every:.1%} of the {every:,} weights of the blocks' linear layers are zero"
        return [f"{what}; in memory they take as much room as others, in the artefact a bit each"]

    def save(self, model: Any, state: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        pruned = {id(module.weight) for block in blocks(model) for _, module in linears(block)}
        tensors: dict[str, Any] = {}
        for name, parameter in model.named_parameters():
            value = parameter.detach()
            if id(parameter) in pruned:
                tensors |= {name + MASK: packed(value != 0), name + VALUES: value[value != 0]}
            else:
                tensors[name] = value.contiguous()
        save_file(tensors, folder / WEIGHTS)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        from safetensors.torch import load_file

        tensors = load_file(folder / WEIGHTS, device=str(base.device))
        for name, parameter in base.named_parameters():
            if name in tensors:
                parameter.data.copy_(tensors[name])
            else:
                mask = unpacked(tensors[name + MASK], parameter.numel()).view(parameter.shape)
                parameter.data.zero_()[mask] = tensors[name + VALUES].to(parameter.dtype)
        return base.eval(), None


def _weights(model: Any) -> list[Any]:
    return [matrix(module) for block in blocks(model) for _, module in linears(block)]


def packed(mask: Any) -> Any:
    """bool [...] -> uint8 [ceil(n / 8)], the first value in the highest bit."""
    import torch

    flat = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(7, -1, -1, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpacked(bits: Any, count: int) -> Any:
    """The first `count` values of `packed`, bool."""
    import torch

    return (bits[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device) & 1).reshape(-1)[:count].bool()
