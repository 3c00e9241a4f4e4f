"""The options of PEFT's adapters that the hand-written step knows; with any other it would train another method than the one asked for.

Library of bind.py, packs and forecasts, without torch. An option that this file does not name is refused wherever it is set, also one that a later
PEFT brings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

INFORMATION = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "tokenizer_name_or_path",
               "tokenizer_kwargs")
"""What says nothing about the arithmetic."""
READ = {
    "LORA": ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
             "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
    "PROMPT_TUNING": ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "prompt_tuning_init",
                      "prompt_tuning_init_text"),
}
"""By adapter: options that bind.py reads off the wrapped model, whatever they are, and those that only say how it is initialised."""
NAMES = {"LORA": "LoRA", "PROMPT_TUNING": "prompt tuning"}
KEEPS_BASE = ("gaussian", "orthogonal")
CHANGES_BASE = ("pissa", "olora", "loftq", "eva", "corda", "lora_ga")
"""LoRA's initialisations by name (the beginning of it), after which it trains as LoRA does; the second kind may write to the base's weights."""


def changed(config: Any) -> dict[str, Any]:
    """The options of a PEFT config (a dataclass) that are not at their default."""
    values = {field.name: (getattr(config, field.name), field) for field in dataclasses.fields(config)}
    return {name: value for name, (value, field) in values.items() if value != _default(field)}


def switched_on(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a PEFT config's file, whose defaults are not known without PEFT, that are neither empty nor off.

    An empty `…_config` is on, at its own defaults (`monteclora_config: {}`).
    """
    off: tuple[Any, ...] = (None, False, "none", [], {}, ())
    return {name: value for name, value in config.items() if value not in off or value == {} and name.endswith("_config")}


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def unknown(kind: str, options: Mapping[str, Any]) -> str | None:
    """An option that the hand-written step does not know, of those that are set; None: it knows all.

    Args:
        kind: PEFT's name of the adapter (LORA, PROMPT_TUNING).
        options: those that are set, by name (`changed`, `switched_on`).
    """
    if name := next((name for name in options if name not in (*INFORMATION, *READ[kind])), None):
        return name
    start = _start(options)
    return None if start.startswith((*KEEPS_BASE, *CHANGES_BASE)) else f"init_lora_weights={start}"


def _start(options: Mapping[str, Any]) -> str:
    start = options.get("init_lora_weights", True)
    return KEEPS_BASE[0] if start is None or isinstance(start, bool) else str(start).lower()


def refused(kind: str, options: Mapping[str, Any], shared: bool = False) -> str | None:
    """Why the hand-written step does not train this adapter; None: it does.

    Args:
        kind, options: as in `unknown`.
        shared: whether several such adapters share one base, which none may change.
    """
    if kind not in READ:
        return f"{kind} has no hand-written step"
    if option := unknown(kind, options):
        return f"{NAMES[kind]} with {option} has no hand-written step"
    if options.get("use_dora") and options.get("lora_dropout"):  # PEFT drops of what the frozen weights read, too
        return "LoRA with use_dora and lora_dropout has no hand-written step"
    if options.get("use_dora") and shared:
        return "LoRA with use_dora has a hand-written step for one run alone"
    start = _start(options)
    return f"init_lora_weights={start} changes the base, of which a pack has one" if shared and start.startswith(CHANGES_BASE) else None
