"""How much of a decoder's blocks a technique reaches: experts that are one tensor are no linear layers, and most methods pass over them."""

from __future__ import annotations

from typing import Any

from pipeline.core.files import UserError
from pipeline.models.base import quantised, values
from pipeline.models.blocks import blocks


def block_weights(model: Any) -> int | None:
    """Numbers in the matrices of the blocks: their parameters of two or more dimensions, each once. None where the model has no list of blocks."""
    matrices = _matrices(model)
    return sum(values(p) for p in matrices) if matrices is not None else None


def quantised_weights(model: Any) -> int:
    """Those of them that are rounded to 8 or 4 bits."""
    return sum(values(p) for p in _matrices(model) or () if quantised(p))


def adapted_weights(model: Any) -> int:
    """Those of them that a layer of PEFT stands beside."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for block in blocks(model) for module in block.modules() if isinstance(module, BaseTunerLayer)]
    adapted = [layer.get_param() if hasattr(layer, "get_param") else getattr(layer.get_base_layer(), "weight", None) for layer in layers]
    return sum({id(p): values(p) for p in adapted if p is not None and p.ndim > 1}.values())


def has_experts(model: Any) -> bool:
    """Whether the blocks have tensors that hold one matrix an expert."""
    return any(p.ndim == 3 and min(p.shape) > 1 for p in _matrices(model) or ())


def share(reached: int, whole: int | None) -> float | None:
    """reached / whole; None where nothing is reached, or nothing is known of the whole."""
    return reached / whole if reached and whole else None


def _matrices(model: Any) -> list[Any] | None:
    try:
        return list({id(p): p for block in blocks(model) for p in block.parameters() if p.ndim > 1}.values())
    except UserError:
        return None
