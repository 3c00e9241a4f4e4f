"""Tiny models of other architectures than conftest's Llama, in the folder of a tiny model: its tokenizer, random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline.core.files import sha256, write_json

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 256}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SIZES, "qwen2": SIZES, "phi3": SIZES, "olmo2": SIZES, "granite": SIZES, "starcoder2": SIZES,
    "gemma2": SIZES | {"head_dim": 16, "sliding_window": 64},
    "gemma3_text": SIZES | {"head_dim": 16, "sliding_window": 8},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64, "dropout": 0.0,
            "max_position_embeddings": 256},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 128},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "mixtral": SIZES | EXPERTS,
    "gpt_oss": SIZES | EXPERTS | {"head_dim": 16, "sliding_window": 64},
    "qwen3_moe": SIZES | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "deepseek_v3": SIZES | {"num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
                            "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                            "qk_nope_head_dim": 16, "v_head_dim": 16},
}


def write_architecture(folder: Path, kind: str, like: Path, **changes: Any) -> Path:
    """A tiny model of this model_type beside the tokenizer of the tiny model `like`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(like)
    config = AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1,
                                           "initializer_range": 0.15} | ARCHITECTURES[kind] | changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in like.glob("*token*.json"):
        shutil.copy(file, folder)
    write_json(folder / "manifest.json", {"name": folder.name, "sha256": sha256(folder / "model.safetensors")})
    return folder
