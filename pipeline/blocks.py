"""The places of a decoder-only model, whatever its architecture calls them: its blocks, their linear layers, attention and feed-forward.

Library of pipeline/methods and pipeline/layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipeline.files import UserError

PLACES = {"attention": re.compile(r"attn|attention"), "feed_forward": re.compile(r"mlp|ffn|feed_?forward|\bff\b|moe")}
"""What a block's own children are called in the architectures of transformers."""
BLOCK = "block"


def blocks(model: Any) -> Any:
    """The decoder's blocks. Raises UserError where there is no such list."""
    import torch

    wanted = getattr(model.config, "num_hidden_layers", None)
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted:
            return module
    raise UserError(f"{type(model).__name__} has no list of {wanted} layers to choose from; use technique=full or an adapter")


def linears(block: Any) -> Iterator[tuple[str, Any]]:
    """(name, module) of a block's linear layers: torch's, and GPT-2's Conv1D, whose weight is transposed."""
    import torch
    from transformers.pytorch_utils import Conv1D

    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            yield name, module


def matrix(module: Any) -> Any:
    """A linear layer's weight as a view [d_out, d_in]."""
    import torch

    return module.weight.data if isinstance(module, torch.nn.Linear) else module.weight.data.T


def sublayer(block: Any, place: str) -> Any:
    """A block's attention or feed_forward module, or the block. Raises UserError where the block has no one module for it."""
    if place == BLOCK:
        return block
    found = [module for name, module in block.named_children() if PLACES[place].search(name.lower()) and any(True for _ in linears(module))]
    if len(found) == 1:
        return found[0]
    there = ", ".join(name for name, _ in block.named_children())
    what = f"{type(block).__name__} has {'no' if not found else 'more than one'} module that is its {place} (it has {there})"
    raise UserError(f"{what}; choose other method.places, or an adapter of single layers such as technique=lora")
