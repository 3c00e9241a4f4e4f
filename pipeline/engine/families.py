"""What the architectures that the hand-written step knows have and Llama has not; a table, by transformers' model_type.

Library of parts.py and of forecasts, without torch. A config is known by the options that are read here or by the modules made of them; any other that
is set is refused.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

Groups = tuple[tuple[str, tuple[str, ...]], ...]
SPLIT: Groups = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")), ("self_attn", ("o_proj",)), ("mlp", ("gate_proj", "up_proj")), ("mlp", ("down_proj",)),
)
"""Linear maps of a decoder layer that read the same input, by the module that owns them: of attention in and out, of the feed-forward layer in and out."""
FUSED: Groups = (("self_attn", ("qkv_proj",)), SPLIT[1], ("mlp", ("gate_up_proj",)), SPLIT[3])
WIDE = (True, False, True, True)
"""Groups whose input is written by our own kernels, which leave room beside it for x Aᵀ."""
READ = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "query_pre_attn_scalar", "max_position_embeddings", "original_max_position_embeddings", "initializer_range", "use_cache", "pretraining_tp",
    "pad_token_id", "bos_token_id", "eos_token_id",
}
"""Options of a model's config that may have any value: read here, to be seen in its modules, or without effect on a pass over given tokens."""
ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Rotary positions that do not depend on how long a row is."""
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Heads:
    """Of a layer: H query heads, G key-value heads (grouped-query attention: Ainslie et al., 2023), the width e of one, and how they attend.

    scale: of the scores; None: 1 / sqrt(e). window: how many tokens, itself counted, a token attends to (Beltagy et al., 2020); 0: to all before it.
    """

    queries: int
    groups: int
    width: int
    scale: float | None = None
    window: int = 0

    def split(self, qkv: Any, t: int) -> Any:
        """q [R, H, T, e], k, v [R, G, T, e] of qkv [R·T, (H + 2G)·e], as views."""
        return qkv.view(-1, t, self.queries + 2 * self.groups, self.width).transpose(1, 2).split((self.queries, self.groups, self.groups), 1)

    def merge(self, output: Any) -> Any:
        """Heads' outputs [R, H, T, e] side by side, [N, H·e]."""
        return output.transpose(1, 2).reshape(-1, self.queries * self.width)


@dataclass(frozen=True)
class Family:
    """groups: the linear maps. norms: before attention and before the feed-forward layer. after: those over what each of the two adds.

    head_norms: RMSNorm of every query and key head (Henry et al., 2020). plus: norms apply 1 + weight. gelu: GELU in SiLU's place.
    large: its residual stream is so large that bf16 loses too much of it where autocast keeps it in fp32 (full fine-tuning, soft prompts): Gemma 3 270M's
    losses were up to 5% above the eager loop's in the first ten steps, two eager runs' within 1% (benchmarks/results/engine-parity.jsonl).
    """

    groups: Groups = SPLIT
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    after: tuple[str, ...] = ()
    head_norms: bool = False
    plus: bool = False
    gelu: bool = False
    large: bool = False


FAMILIES = {
    "llama": Family(), "mistral": Family(), "qwen2": Family(), "qwen3": Family(head_norms=True), "phi3": Family(groups=FUSED),
    "gemma3_text": Family(norms=("input_layernorm", "pre_feedforward_layernorm"), after=("post_attention_layernorm", "post_feedforward_layernorm"),
                          head_norms=True, plus=True, gelu=True, large=True),
}


def refused(config: Any) -> str | None:
    """Why a model of this config (transformers') has no hand-written step; None: as far as the config says, it has one."""
    if config.model_type not in FAMILIES:
        return f"the architecture {config.model_type} has no hand-written step"
    from transformers import PreTrainedConfig

    known = READ | {field.name for field in dataclasses.fields(PreTrainedConfig)}
    odd = next((f.name for f in dataclasses.fields(config) if f.name not in known and getattr(config, f.name) != f.default), None)
    if odd:
        return f"its config's {odd} has no hand-written step"
    if set(layer_types(config)) - {FULL, SLIDING}:
        return "its layers are not all of full or sliding-window attention"
    if any(kind not in ROTATIONS for kind in rotations(config).values()):
        return "its rotary positions depend on the length"
    return None


def layer_types(config: Any) -> list[str]:
    """Of every layer: FULL or SLIDING."""
    if types := getattr(config, "layer_types", None):
        return list(types)
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return [SLIDING if slides else FULL] * config.num_hidden_layers


def rotations(config: Any) -> dict[str, str]:
    """Kind of rotary positions (transformers' rope_type) by the layers' type; by "" where all layers have the same."""
    options = getattr(config, "rope_parameters", None) or {}
    apart = {name: options[name] for name in sorted({*layer_types(config)}) if isinstance(options.get(name), dict)}
    return {name: value.get("rope_type", "default") for name, value in (apart or {"": options}).items()}


def heads(config: Any, layer: int) -> Heads:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scalar = getattr(config, "query_pre_attn_scalar", None)
    window = config.sliding_window if layer_types(config)[layer] == SLIDING else 0
    return Heads(config.num_attention_heads, config.num_key_value_heads, width, scalar**-0.5 if scalar else None, window)
