"""The method that an adapter_config.json describes. conf/method/peft_config.yaml."""

from __future__ import annotations

from pipeline.core.peft_files import read_adapter, read_training
from pipeline.methods.peft_adalora import AdaLora
from pipeline.methods.peft_adapter import PeftAdapter
from pipeline.methods.peft_lora import LoraFa, LoraPlus, Poly, RiemannianLora
from pipeline.methods.peft_prompts import MultitaskPrompt, PrefixTuning, PTuning
from pipeline.methods.peft_shadow import Shadow

KINDS: dict[str, type[PeftAdapter]] = {"ADALORA": AdaLora, "MULTITASK_PROMPT_TUNING": MultitaskPrompt, "P_TUNING": PTuning, "POLY": Poly,
                                     "SHADOW": Shadow}


def from_file(path: str, sha256: str | None = None) -> PeftAdapter:
    """The method of an adapter_config.json, unmodified; training_params.json beside it may ask for LoRA+, LoRA-FA, Riemannian LoRA, or a prefix's text.

    Args:
        sha256: of both files; not used here; a change of the files thereby changes the cell's config.
    """
    config, training = read_adapter(path), read_training(path)
    kind = KINDS.get(config.peft_type.value, PeftAdapter)
    optimizer, options = training.get("optimizer_type"), training.get("optimizer_kwargs", {})
    if optimizer == "lora+":
        return LoraPlus(config, lr_ratio=options.get("loraplus_lr_ratio", 16.0))
    if optimizer == "lora-fa":
        return LoraFa(config)
    if optimizer == "riemannian":
        return RiemannianLora(config, reg=options.get("reg", 1e-2))
    if text := training.get("init_kv_cache_prefix"):
        return PrefixTuning(config, text=text)
    return kind(config)
