"""Weights as a GGUF file of Q8_0 holds them: blocks of 32 values along a row, each a signed byte times the block's scale in 16 bits.

Library of `pipeline.evaluate split=merged`. Rounded by the gguf package, whose Q8_0 is bit for bit ggml's own; which tensors are rounded is as in llama.cpp's
converter (`--outtype q8_0`): every matrix, embeddings among them, to 16 bits where a row is no multiple of 32; vectors stay as they are.
"""

from __future__ import annotations

from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""config.model_type of models whose matrices are all of linear layers and embeddings, which that converter stores as they are but for the order of rows."""


def suits(model: Any) -> bool:
    """Whether the model is of a family for which this is known to be what its GGUF file holds."""
    return model.config.model_type in FAMILIES


def to_q8_0(model: Any) -> Any:
    """The model, its weights rounded in place; what it computes stays in its own arithmetic (llama.cpp rounds activations, too)."""
    import torch

    for parameter in model.parameters():  # tied ones once
        if parameter.dim() > 1:
            parameter.data = torch.from_numpy(_rounded(parameter.detach().float().cpu().numpy())).to(parameter)
    return model


def _rounded(values: Any) -> Any:
    import gguf
    from gguf.quants import dequantize, quantize

    kind = gguf.GGMLQuantizationType.Q8_0 if values.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F16
    return dequantize(quantize(values, kind), kind)
