"""What the tests of scoring answer with and answer: tiny models of several kinds, and rows of several choices each."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch

PAD = 1
CPU = torch.device("cpu")
KINDS = ["base", "lora", "soft prompt", "gpt2"]


def with_lora(base: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return model.eval()


def with_prompt(base: Any) -> Any:
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(3)
    return get_peft_model(copy.deepcopy(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    config = GPT2Config(vocab_size=31, n_positions=128, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def of_kind(kind: str, base: Any) -> Any:
    return {"base": lambda: base, "lora": lambda: with_lora(base), "soft prompt": lambda: with_prompt(base), "gpt2": gpt2}[kind]()


def words(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(2, 31) for _ in range(rng.randint(low, high))]


def items_of(rows: int, demonstrations: int = 0, seed: int = 5) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts of mixed length after the same demonstrations; choices of one to four tokens, some the beginning of others."""
    rng = random.Random(seed)
    shots, found = words(rng, demonstrations, demonstrations), []
    for _ in range(rows):
        head = words(rng, 3, 3)
        choices = [head[:1], head[:2], [*head, 4], [*head[:2], 7], words(rng, 2, 4), words(rng, 4, 4), words(rng, 1, 1)]
        found.append(([*shots, *words(rng, 3, 20)], rng.sample(choices, rng.randint(3, 7))))
    return found
