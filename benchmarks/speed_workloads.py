"""What the speed benchmarks run on: model shapes, techniques, batches. All sides of a comparison get the same ones.

Library of `python -m benchmarks.speed`. Weights are random and seeded, drawn on the device in the wanted dtype; tokens are
drawn from Zipf's law (Zipf, 1935), so that a loss curve has something to learn. Every token carries a label: of a row's T
tokens the last T - 1 are predicted, as transformers' causal loss shifts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.core.files import UserError

if TYPE_CHECKING:
    import torch

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {  # SmolLM2-135M
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
        "tie_word_embeddings": True, "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "1b": {  # Llama-3.2-1B
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256,
        "tie_word_embeddings": True, "max_position_embeddings": 131072, "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0},
    },
    "8b": {  # Llama-3.1-8B
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "tie_word_embeddings": False, "max_position_embeddings": 131072, "rope_parameters": {**LLAMA3_ROPE, "factor": 8.0},
    },
    "8b-half": {  # its first 16 layers: what one GPU trains whole, fp32 masters and all
        "hidden_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "tie_word_embeddings": False, "max_position_embeddings": 131072, "rope_parameters": {**LLAMA3_ROPE, "factor": 8.0},
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "gemma3-1b": {
        "model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "intermediate_size": 6912, "vocab_size": 262144, "tie_word_embeddings": True, "max_position_embeddings": 32768, "sliding_window": 512,
        "layer_types": ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(26)],
    },
    "phi3-mini": {  # Phi-3-mini-4k
        "model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 8192,
        "vocab_size": 32064, "tie_word_embeddings": False, "max_position_embeddings": 4096, "sliding_window": 2047,
    },
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 128,
        "tie_word_embeddings": True, "max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
OTHERS = ("qwen3-0.6b", "gemma3-1b", "phi3-mini")
"""Shapes of other families than Llama's."""
RATES = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3, "prompt_tuning": 3e-2, "step_by_step": 1e-4}
"""Learning rate of every technique."""
RANK, ALPHA, VIRTUAL, RATIONALE_WEIGHT, BASE_SEED = 16, 32, 20, 0.5, 0
STEPS = {"135m": (5, 20), "1b": (3, 10), "8b": (2, 5), "8b-half": (2, 5), "tiny": (1, 3), **dict.fromkeys(OTHERS, (3, 10))}
"""(warm-up, timed) optimiser steps of a shape."""


@dataclass(frozen=True)
class Workload:
    """One technique on one shape at one batch. AdamW, clipping at 1, cosine to 0 without warm-up of the rate, no activation checkpointing."""

    technique: str
    shape: str
    batch: int
    """Rows a step (step-by-step: half of them labels, half rationales)."""
    length: int
    """Tokens a row; a soft prompt comes on top."""
    dtype: str = "bf16"
    """bf16: a frozen base in bf16, trained base weights in fp32 under autocast; fp32: all in fp32."""
    warmup: int = 0
    """Steps before the timed ones, 0: the shape's default. They train like the others."""
    steps: int = 0
    seed: int = 0
    """Of the batches and the adapter; the base's weights are the same for all seeds."""
    rank: int = RANK
    alpha: int = ALPHA
    lr: float = 0.0
    """0: the technique's default."""

    def __post_init__(self) -> None:
        for key, value, known in (("technique", self.technique, RATES), ("shape", self.shape, SHAPES), ("dtype", self.dtype, ("bf16", "fp32"))):
            if value not in known:
                raise UserError(f"a benchmark workload has {key} {value!r}; choose one of {', '.join(known)}")
        warmup, steps = STEPS[self.shape]
        defaults = {"warmup": self.warmup or warmup, "steps": self.steps or steps, "lr": self.lr or RATES[self.technique]}
        for key, number in defaults.items():
            object.__setattr__(self, key, number)

    @property
    def name(self) -> str:
        return f"{self.technique}-{self.shape}-{self.batch}x{self.length}{'' if self.dtype == 'bf16' else '-' + self.dtype}"

    @property
    def tokens(self) -> int:
        """Tokens a step, soft prompts left out."""
        return self.batch * self.length

    @property
    def total(self) -> int:
        """Steps of a whole run, warm-up included: what the learning rate's schedule goes over."""
        return self.warmup + self.steps

    @property
    def trains_base(self) -> bool:
        return self.technique in ("full", "step_by_step")

    def torch_dtype(self) -> Any:
        import torch

        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    def batches(self, count: int) -> list[torch.Tensor]:
        """The first `count` steps' token ids [B, T], on the CPU; the same for all sides."""
        import torch

        vocabulary = SHAPES[self.shape]["vocab_size"]
        weights = 1.0 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.multinomial(weights, count * self.tokens, replacement=True, generator=generator)
        return list(drawn.view(count, self.batch, self.length))


def model_config(shape: str) -> Any:
    """The shape as transformers' config."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**{"model_type": "llama", **SHAPES[shape], "bos_token_id": None, "eos_token_id": None, "pad_token_id": None})


def base_model(workload: Workload, device: Any, attention: str = "sdpa") -> Any:
    """The seeded random base on `device`: in bf16 or fp32, or NF4 for qlora; eval mode, as a loaded model is."""
    import torch
    from transformers import AutoModelForCausalLM

    config = model_config(workload.shape)
    torch.manual_seed(BASE_SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=workload.torch_dtype(), attn_implementation=attention)
    if workload.technique == "qlora":
        quantise(model, workload.torch_dtype())
    return model.eval()


def quantise(model: Any, dtype: Any) -> None:
    """NF4 with double quantisation for all linear layers but the output layer, as from_pretrained leaves them; in place, a layer at a time."""
    import bitsandbytes as bnb
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.utils.quantization_config import QuantizationMethod

    output = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not torch.nn.Linear or layer is output:
                continue
            four = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            four.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=four)
            four = four.to(layer.weight.device)  # quantises
            if hasattr(four, "support_avx512bf16_for_cpu"):
                four.support_avx512bf16_for_cpu = False  # see pipeline/models/base.py
            setattr(parent, name, four)
    model.is_loaded_in_4bit = True
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def adapter_config(workload: Workload) -> Any:
    """The peft config of lora, qlora or prompt tuning; None where the base itself is trained."""
    if workload.trains_base:
        return None
    import peft

    if workload.technique == "prompt_tuning":
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    return peft.LoraConfig(task_type="CAUSAL_LM", r=workload.rank, lora_alpha=workload.alpha, lora_dropout=0.0, target_modules="all-linear")


def labels(ids: torch.Tensor) -> torch.Tensor:
    """[B, T] labels for transformers, whose loss shifts them: the tokens themselves, none for a row's first."""
    targets = ids.clone()
    targets[:, 0] = -100
    return targets
