"""Models whose prompt an encoder reads, as pipeline.base_model leaves them, and naive scores to hold others against.

Library of test_encoder_decoder.py and test_encoder_decoder_adapters.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from architectures import write_model

from pipeline.core.files import write_json
from pipeline.core.settings import Precision, Task
from pipeline.data.rows import Encoder
from pipeline.models import architecture
from pipeline.models.base import load_model, load_tokenizer

CPU = torch.device("cpu")
T5S = ("t5", "t5-v1_1", "t5gemma")
SHORT = ["train_rows=16", "train.batch_size=8", "train.steps=2", "train.validations=0", "evaluate.test_rows=6"]


def stored(root: Path, name: str, tokenizer: Path) -> Path:
    """The folder of a shape of tests/architectures.py, made once."""
    folder = root / name
    if not folder.exists():
        write_model(name, tokenizer, folder)
        write_json(folder / "manifest.json", {"name": name, "sha256": name})
    return folder


def loaded(folder: Path, precision: str = "fp32") -> Any:
    return load_model(folder, Precision(precision), CPU)


def encoder_of(model: Any, folder: Path, **task: Any) -> Encoder:
    return Encoder(load_tokenizer(folder), Task(**{"name": "any", "scoring": "choice", **task}), 64, "error", architecture.start_id(model))


def overridden(overrides: list[str], folder: Path) -> list[str]:
    """The overrides with the model of a folder in the place of the tiny Llama."""
    return [*(o for o in overrides if not o.startswith(("paths.models=", "model="))), f"paths.models={folder.parent}", "model=local",
            f"model.name={folder.name}", f"model.source.path={folder}"]  # fmt: skip


def adapted(model: Any, kind: str) -> Any:
    """The model with an adapter that changes its answers."""
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig

    from pipeline.methods.peft_adapter import PeftAdapter

    configs = {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }
    return PeftAdapter(configs[kind]).wrap(model).eval() if kind != "base" else model


def naive(model: Any, prompt: Any, choice: list[int]) -> float:
    """Log-likelihood of one choice by the whole model, from all its logits."""
    with torch.no_grad():
        mask = torch.ones(1, len(prompt.source), dtype=torch.long)
        fed = torch.tensor([[*prompt, *choice[:-1]]])
        logits = model(input_ids=torch.tensor([prompt.source]), attention_mask=mask, decoder_input_ids=fed).logits[0]
    chances = torch.log_softmax(logits.double(), -1)
    return sum(float(chances[len(prompt) - 1 + i, token]) for i, token in enumerate(choice))
