"""What the tests of scoring answer with and answer: tiny models of several kinds, and rows of several choices each."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch

from pipeline.data.choices import Reads
from pipeline.data.rows import by_length, pad
from pipeline.scoring.scorer import logits_at

PAD = 1
CPU = torch.device("cpu")
KINDS = ["base", "lora", "soft prompt", "gpt2"]


def with_lora(base: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return model.eval()


def with_loras(base: Any) -> Any:
    """Adapters "default", "other" and "wide"."""
    from peft import LoraConfig

    model = with_lora(base)
    for rank, name in ((2, "other"), (6, "wide")):
        model.add_adapter(name, LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return model.eval()


OWNERS = ["default", "other", "__base__", "wide", "other", "default", "wide", "__base__", "other"]


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
    shots, actual = words(rng, demonstrations, demonstrations), []
    for _ in range(rows):
        head = words(rng, 3, 3)
        choices = [head[:1], head[:2], [*head, 4], [*head[:2], 7], words(rng, 2, 4), words(rng, 4, 4), words(rng, 1, 1)]
        actual.append(([*shots, *words(rng, 3, 20)], rng.sample(choices, rng.randint(3, 7))))
    return actual


def by_batches(model: Any, items: list, batch_tokens: int, owners: list[str]) -> list[list[float]]:
    """Log-likelihoods by PEFT's batches of several adapters, every read from logits of its own: what is served, to the last bit."""
    reads = Reads.of(items)
    actual = [[0.0] * len(choices) for _, choices in items]
    for part in by_length([len(ids) for ids in reads.sequences], batch_tokens):
        at = [(row, *read) for row, index in enumerate(part) for read in reads.at[index]]
        rows, cols, targets, places = torch.tensor(at).T
        names = [owners[reads.places[reads.at[index][0][2]][0]] for index in part]
        with torch.inference_mode():
            logits = logits_at(model, pad([reads.sequences[i] for i in part], PAD), rows, cols, adapter_names=names)
        for value, place in zip(torch.log_softmax(logits, -1)[range(len(at)), targets].tolist(), places.tolist(), strict=True):
            item, choice = reads.places[place]
            actual[item][choice] += value
    return actual
