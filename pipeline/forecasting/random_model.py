"""A base of a given shape with random weights, in every precision, put on the device tensor by tensor as loading does.

Library of calibrate.py and benchmarks/forecast.py: what a training takes does not depend on the weights' values.
"""

from __future__ import annotations

from typing import Any

from pipeline.forecasting.shape import Shape


def config_of(shape: Shape) -> dict[str, Any]:
    """The keys of a Llama's config.json that make this shape."""
    return {
        "hidden_size": shape.width, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.groups,
        "head_dim": shape.head, "intermediate_size": shape.inner, "vocab_size": shape.vocabulary, "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.context or 8192, "attention_bias": bool(shape.biases),
    }


def random_base(config: dict[str, Any], precision: str, dtype: Any, device: Any) -> Any:
    """A frozen Llama in eval mode.

    Args:
        config: of transformers.LlamaConfig.
        precision: fp32, bf16, int8 or nf4. dtype: of the arithmetic.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    made = LlamaConfig(**{**config, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
    held = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, dtype=held, attn_implementation="sdpa")
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=made)  # its buffers are computed, not loaded
    output = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is torch.nn.Linear and module is not output and precision in ("nf4", "int8"):
                setattr(parent, name, _quantised(module, precision, dtype, device))
            else:
                _draw(module, device)
    model.tie_weights()
    if precision in ("nf4", "int8"):
        _mark(model, precision, dtype)
    return model.requires_grad_(False).eval()


def _draw(module: Any, device: Any) -> None:
    """Give a module's own parameters memory and values: small random ones, ones for norms."""
    import torch

    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            held = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, torch.nn.Parameter(held.normal_(0.0, 0.02) if held.ndim > 1 else held.fill_(1.0)))


def _quantised(module: Any, precision: str, dtype: Any, device: Any) -> Any:
    import bitsandbytes as bnb
    import torch

    weight = torch.empty(module.weight.shape, dtype=module.weight.dtype, device=device).normal_(0.0, 0.02)
    sizes = (module.in_features, module.out_features)
    made: Any
    if precision == "nf4":
        made = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made)
    else:
        made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
        made.weight = bnb.nn.Int8Params(weight.to("cpu"), requires_grad=False, has_fp16_weights=False)
    made = made.to(device)  # quantises
    if hasattr(made, "support_avx512bf16_for_cpu"):
        made.support_avx512bf16_for_cpu = False  # see pipeline/models/base.py
    return made


def _mark(model: Any, precision: str, dtype: Any) -> None:
    """What transformers leaves on a quantised model, and PEFT asks for."""
    from transformers.utils.quantization_config import QuantizationMethod

    from pipeline.core.settings import Precision, build
    from pipeline.models.base import quantisation

    setattr(model, "is_loaded_in_4bit" if precision == "nf4" else "is_loaded_in_8bit", True)
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    model.config.quantization_config = quantisation(precision, build(Precision, {"name": precision}, "precision"), dtype)
