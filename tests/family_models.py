"""Tiny random models of every family that the hand-written step knows, each with what sets it apart."""

from __future__ import annotations

from typing import Any

import torch

V = 53
COMMON = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
WINDOW = 5
"""Tokens of a sliding window, below the tests' rows."""
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("Qwen2", {**SLIDING, "use_sliding_window": True}),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-windows": ("Qwen3", {"head_dim": 16, **SLIDING, "use_sliding_window": True}),
    "phi3": ("Phi3", {}),
    "phi3-partial": ("Phi3", {"rope_parameters": PARTIAL, "sliding_window": WINDOW}),
    "gemma3": ("Gemma3", {"head_dim": 12, "query_pre_attn_scalar": 20, **SLIDING}),
}
"""By name: the beginning of transformers' class names, and the config's options."""


def family(name: str, **options: Any) -> Any:
    """A model in fp32 whose norms and biases are not at their initial values."""
    import transformers

    begin, own = FAMILIES[name]
    config_class = getattr(transformers, f"{begin}TextConfig" if begin == "Gemma3" else f"{begin}Config")
    torch.manual_seed(0)
    config = config_class(**{**COMMON, **own, **options})
    model = getattr(transformers, f"{begin}ForCausalLM")._from_config(config, attn_implementation="sdpa")
    for key, parameter in model.named_parameters():
        if "norm" in key or key.endswith("bias"):
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return model.eval().requires_grad_(False)
