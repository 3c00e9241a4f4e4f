"""A model's layers by what they do, read from the model itself: keys and values, the feed-forward's last layer, norms. Names are as PEFT's
target_modules take them: a layer of every block by its place in the block."""

from __future__ import annotations

import re
from typing import Any

from pipeline.models.blocks import PLACES, blocks, linears, matrix

KEY_VALUE = re.compile(r"(^|_)(k|v|key|value|kv|qkv|q_k_v|query_key_value)(_|$)|^(c_attn|Wqkv)$")
"""What the attention's layers that make keys and values, queries with them or not, are called in transformers."""


def keys_and_values(model: Any) -> list[str]:
    """Layers that make the attention's keys and values; with the queries, where one layer makes all three."""
    layers = [name for block in blocks(model) for name, _ in linears(block)]
    return [name for name in dict.fromkeys(layers) if _in_attention(name) and KEY_VALUE.search(name.rpartition(".")[2])]


def down_projections(model: Any) -> list[str]:
    """The last layers of the feed-forwards: from their inner width to the model's. Experts that are one tensor have none."""
    names: dict[str, None] = {}
    for block in blocks(model):
        outer = {name: matrix_shape(module) for name, module in linears(block) if not _in_attention(name)}
        width = next((d_in for _, d_in in outer.values()), 0)
        last = {name.rpartition(".")[0]: name for name, (d_out, _) in outer.items() if d_out == width}  # of every module, the last that gives it
        names |= dict.fromkeys(last.values())
    return list(names)


def norms(model: Any) -> list[str]:
    """The norms of the blocks, and those before and behind them."""
    inside = {id(module) for block in blocks(model) for module in block.modules()}
    names = [name for block in blocks(model) for name, module in block.named_modules() if _is_norm(module)]
    names += [name for name, module in model.named_modules() if _is_norm(module) and id(module) not in inside]
    return list(dict.fromkeys(names))


def matrix_shape(module: Any) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, also of one with 4-bit weights."""
    if hasattr(module, "out_features"):
        return module.out_features, module.in_features
    rows, columns = matrix(module).shape
    return rows, columns


def _in_attention(name: str) -> bool:
    *modules, last = name.lower().split(".")
    return any(PLACES["attention"].search(module) for module in modules or [last])


def _is_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1
