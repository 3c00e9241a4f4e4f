"""Random models of given shapes in every precision, as pipeline.model leaves a loaded base. Library of `python -m benchmarks.forecast`."""

from __future__ import annotations

import contextlib
from typing import Any

from benchmarks.speed_workloads import quantise


def base_model(shape: dict[str, Any], precision: str, dtype: Any, device: Any) -> Any:
    """A frozen random Llama of this shape on the device, in eval mode.

    precision: fp32, bf16, int8 or nf4. dtype: of the arithmetic.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**{**shape, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
    held = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, dtype)
    with torch.device(device), _undrawn():
        model = AutoModelForCausalLM.from_config(config, dtype=held, attn_implementation="sdpa")
    fill(model)
    if precision == "nf4":
        quantise(model, dtype)
    elif precision == "int8":
        quantise_8(model)
    return model.requires_grad_(False).eval()


def _undrawn() -> Any:
    """Without drawing weights as the architecture does, where transformers lets that be: `fill` draws them."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        return contextlib.nullcontext()
    return no_init_weights()


def fill(model: Any) -> None:
    """Small random weights; norms stay at one."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(1.0)


def quantise_8(model: Any) -> None:
    """LLM.int8() for all linear layers but the output layer, as from_pretrained leaves them; in place, a layer at a time."""
    import bitsandbytes as bnb
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.utils.quantization_config import QuantizationMethod

    output = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not torch.nn.Linear or layer is output:
                continue
            eight = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
            eight.weight = bnb.nn.Int8Params(layer.weight.data.to("cpu"), requires_grad=False, has_fp16_weights=False)
            setattr(parent, name, eight.to(layer.weight.device))  # quantises
    model.is_loaded_in_8bit = True
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
