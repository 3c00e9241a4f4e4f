"""Trained prompts of PEFT that need more than their config: prefix tuning, multitask prompts, P-tuning.

conf/method/prefix_tuning.yaml, cartridge.yaml, multitask_prompt.yaml, p_tuning.yaml. Soft prompts that PEFT does not have are in soft_prompts.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.methods.peft_adapter import PeftAdapter
from pipeline.models import architecture
from pipeline.models.base import load_tokenizer


@dataclass(frozen=True)
class PrefixTuning(PeftAdapter):
    """Trained keys and values before every layer's own (Li & Liang, 2021; with frozen first ones a cartridge, Eyuboglu et al., 2025), initialised with those
    that the base computes for a text.

    PEFT draws them from a normal distribution of deviation 1, which is far from what a layer computes: the base's answers are lost, and a few
    hundred rows do not recover them. The paper initialises with words' activations where rows are few (its section on initialisation).
    """

    text: str | None = None
    """The base first answers as if this text, repeated and cut to num_virtual_tokens tokens, came before every prompt. null: PEFT's random initialisation."""
    relative: bool = False
    """A step of Adam moves a layer's keys, and its values, by the learning rate times how far they vary over the text's tokens (prompts.sizes), as Adafactor
    scales its steps by the size of what it trains (Shazeer & Stern, 2018, section 8): one rate then means the same where sizes differ by layer and base.
    false: by the rate itself, as PEFT does, which is the same to a prefix that is begun at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is not None and not self.text.strip():
            raise UserError("method.text is empty; give words to start from, or null for a random initialisation")
        if self.text is not None and getattr(self.config, "prefix_projection", False):
            raise UserError("method.text cannot be reached through a projection; set method.config.prefix_projection=false, or method.text=null")

    def wrap(self, model: Any) -> Any:
        wrapped = super().wrap(model)
        if self.text is not None:
            from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

            ids = repeated_tokens(self.text, load_tokenizer(Path(model.config._name_or_path)), self.config.num_virtual_tokens)
            past = _keys_and_values(model, ids)
            initialize_kv_prefix_from_past_key_values(wrapped, past_key_values=past)
            if self.relative:
                from pipeline.methods.modules import prompts

                encoder = wrapped.prompt_encoder["default"]
                prompts.train_relative(encoder, prompts.sizes(encoder.embedding.weight.detach(), wrapped.active_peft_config.num_layers))
        return wrapped

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), "init": "random" if self.text is None else "text"}


def repeated_tokens(text: str, tokenizer: Any, tokens: int) -> list[int]:
    """The text's token ids, repeated and cut to `tokens` of them. Raises UserError for a text without tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("method.text has no tokens; give other words")
    return (ids * -(-tokens // len(ids)))[:tokens]


def _keys_and_values(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        past = model(**architecture.inputs(model, torch.tensor([ids], device=model.device)), use_cache=True).past_key_values
    return architecture.self_attention_cache(past)


@dataclass(frozen=True)
class MultitaskPrompt(PeftAdapter):
    """Multitask prompt tuning (Wang et al., 2023): a shared prompt times a task's rank-r factor. A cell has one task, number 0."""

    own_load = True

    def wrap(self, model: Any) -> Any:
        return _of_task_0(super().wrap(model))

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        model, state = super().load(base, folder)
        return _of_task_0(model), state


def _of_task_0(model: Any) -> Any:
    """PEFT wants task_ids in every forward; where none are given, all rows are of task 0."""
    import torch

    def fill(_: Any, args: tuple) -> tuple:
        indices, task_ids = args
        return indices, task_ids if task_ids is not None else torch.zeros(len(indices), dtype=torch.long, device=indices.device)

    for encoder in model.prompt_encoder.values():
        encoder.register_forward_pre_hook(fill)
    return model


@dataclass(frozen=True)
class PTuning(PeftAdapter):
    """P-tuning (Liu et al., 2021): a small network computes the soft prompt; its last output is served and stored."""

    changes_when_served = True

    def served(self, model: Any, dtype: Any) -> Any:
        encoder = model.prompt_encoder["default"]
        prompt = model.get_prompt_embedding_to_save("default").float()
        encoder.embedding.weight.data = prompt.to(encoder.embedding.weight.device)
        encoder.forward = encoder.embedding.forward
        return model
