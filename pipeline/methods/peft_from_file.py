"""The method that an adapter_config.json describes. conf/method/peft_config.yaml."""

from __future__ import annotations

from pipeline.core.peft_files import read_adapter, read_training
from pipeline.methods.peft_adalora import AdaLora
from pipeline.methods.peft_adapter import PeftAdapter
from pipeline.methods.peft_lora import LoraPlus, Poly
from pipeline.methods.peft_prompts import MultitaskPrompt, PTuning
from pipeline.methods.peft_shadow import Shadow

KINDS: dict[str, type[PeftAdapter]] = {"ADALORA": AdaLora, "MULTITASK_PROMPT_TUNING": MultitaskPrompt, "P_TUNING": PTuning, "POLY": Poly,
                                     "SHADOW": Shadow}


def from_file(path: str, sha256: str | None = None) -> PeftAdapter:
    """The method of an adapter_config.json, unmodified; training_params.json beside it may ask for LoRA+.

    Args:
        sha256: of both files; not used here; a change of the files thereby changes the cell's config.
    """
    config, training = read_adapter(path), read_training(path)
    kind = KINDS.get(config.peft_type.value, PeftAdapter)
    if training.get("optimizer_type") == "lora+":
        return LoraPlus(config, lr_ratio=training["optimizer_kwargs"].get("loraplus_lr_ratio", 16.0))
    return kind(config)
