"""What a base is: a decoder alone, whose prompt comes before its answer, or an encoder that reads the prompt and a decoder that writes the answer (T5).

Library, and the one place that knows: loading, tokens, scoring, adapters and refusals ask here. A config of transformers says it (is_encoder_decoder).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, read_object


@dataclass(frozen=True)
class Architecture:
    """auto: the class of transformers that loads it. task: what PEFT calls its use. name: for people, with its article."""

    auto: str
    task: str
    name: str


DECODER = Architecture("AutoModelForCausalLM", "CAUSAL_LM", "a causal language model")
ENCODER_DECODER = Architecture("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "an encoder-decoder")

TASKS = {each.task: each.name for each in (DECODER, ENCODER_DECODER)}
"""What PEFT calls the use of either."""


def of(model: Any) -> Architecture:
    """Of a model, adapters around it or not."""
    return ENCODER_DECODER if getattr(model.config, "is_encoder_decoder", False) else DECODER


def of_folder(folder: Path) -> Architecture:
    """Of a model's folder, by its config.json; without one that can be read a decoder's, and who loads it says what is wrong."""
    with contextlib.suppress(UserError):
        return ENCODER_DECODER if read_object(folder / "config.json").get("is_encoder_decoder") else DECODER
    return DECODER


def has_encoder(model: Any) -> bool:
    """Whether an encoder reads the prompt."""
    return of(model) is ENCODER_DECODER


def has_dropout(model: Any) -> bool:
    """Whether a pass in training mode leaves out numbers that it draws: by a module, or by what the model's or an adapter's config says of a function."""
    configs = [model.config.get_text_config(), *(getattr(model, "peft_config", None) or {}).values()]
    said = {key: value for config in configs for key, value in vars(config).items() if "drop" in key and not key.startswith(("classifier", "summary"))}
    modules = [m.p for m in model.modules() if "Dropout" in type(m).__name__ and hasattr(m, "p")]
    return any(isinstance(share, float) and share > 0 for share in (*said.values(), *modules))


def start_id(model: Any) -> int | None:
    """The token that a decoder behind an encoder begins with, as generation takes it; None: a decoder alone."""
    if not has_encoder(model):
        return None
    config, decoder = model.config, model.config.get_text_config(decoder=True)
    places = ((model.generation_config, "decoder_start_token_id"), (config, "decoder_start_token_id"), (model.generation_config, "bos_token_id"),
              (config, "bos_token_id"), (decoder, "bos_token_id"), (config, "pad_token_id"))
    return next((value for place, key in places if (value := getattr(place, key, None)) is not None), 0)


def inputs(model: Any, ids: Any) -> dict[str, Any]:
    """What a forward pass over token ids [B, T] takes at least; with an encoder both it and the decoder read them."""
    return {"input_ids": ids, "decoder_input_ids": ids} if has_encoder(model) else {"input_ids": ids}


def one_token(model: Any) -> dict[str, Any]:
    """Inputs of a forward pass over token 0, to see whether the model runs."""
    import torch

    return inputs(model, torch.zeros(1, 1, dtype=torch.long, device=model.device))


def self_attention_cache(past: Any) -> Any:
    """The decoder's own keys and values in a cache of transformers, without those of what its encoder read."""
    return getattr(past, "self_attention_cache", past)
