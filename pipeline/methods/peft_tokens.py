"""Adapters of PEFT whose config names tokens, which are read off the training rows: aLoRA's invocation, the embeddings of the answers' tokens,
the rows that stand before every prompt (CPT). conf/method/alora.yaml, trainable_tokens.yaml, cpt.yaml.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.data.rows import Example
from pipeline.methods import peft_start
from pipeline.methods.peft_adapter import PeftAdapter
from pipeline.models import architecture
from pipeline.models.base import load_tokenizer, most_tokens

INPUT, ANSWER, BETWEEN = 2, 4, 1
"""CPT's kinds of token, modulo 4: a row's prompt, its answer (which stays as it is), and what stands between two rows."""


@dataclass(frozen=True)
class ALora(PeftAdapter):
    """LoRA that acts from the words between question and answer on (Activated LoRA, Greenewald et al., 2025).

    What stands before them is read as the base reads it, so that its keys and values are shared between adapters. The words are the tokens that all
    training prompts end with; config.alora_invocation_tokens names others. A prompt without them is answered by the base.
    """

    prepares = True

    cue_tokens: int = 8
    """At most so many of them, the last ones."""

    def wrap(self, model: Any) -> Any:
        examples = peft_start.taken(model)
        named = self.config.alora_invocation_tokens
        return _row_by_row(super().wrap(model) if named else PeftAdapter(self._named(model, examples)).wrap(model))

    def _named(self, model: Any, examples: Sequence[Example]) -> Any:
        tokenizer = load_tokenizer(Path(model.config._name_or_path))
        ends = [tokenizer(e.prompt)["input_ids"][::-1] for e in examples]
        cue = [each[0] for each in itertools.takewhile(lambda each: len({*each}) == 1, zip(*ends, strict=False))][: self.cue_tokens]
        if not cue:
            raise UserError("aLoRA begins at the words that all training prompts end with, and these end differently; name the words' tokens in "
                            "method.config.alora_invocation_tokens")
        return _with(self.config, alora_invocation_tokens=cue[::-1])


def _row_by_row(model: Any) -> Any:
    """The wrapped model, if all of its adapted layers are handed rows of tokens, [B, T, width]: where the adapter begins is a place in a row (not in OPT)."""
    import torch
    from peft.tuners.lora import LoraLayer

    flat: set[str] = set()
    base = model.get_base_model()
    layers: list[tuple[str, Any]] = [(name.rpartition(".")[2], module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    hooks = [module.register_forward_pre_hook(lambda _, args, name=name: flat.add(name) if args[0].dim() < 3 else None) for name, module in layers]
    with torch.no_grad():
        base(**architecture.one_token(base))
    for hook in hooks:
        hook.remove()
    if flat:
        raise UserError(f"aLoRA begins at a place in a row, and {type(base).__name__} hands {', '.join(sorted(flat))} the tokens of all rows as one; "
                        "name other layers in method.config.target_modules")
    return model


@dataclass(frozen=True)
class TrainableTokens(PeftAdapter):
    """Trains the embeddings of the training rows' answers' tokens alone, and with tied embeddings their rows of the output layer.

    config.token_indices names others.
    """

    prepares = True

    most_tokens: int = 64
    """At most so many, the most frequent ones."""

    def wrap(self, model: Any) -> Any:
        examples = peft_start.taken(model)
        return super().wrap(model) if self.config.token_indices else PeftAdapter(self._named(model, examples)).wrap(model)

    def _named(self, model: Any, examples: Sequence[Example]) -> Any:
        tokenizer = load_tokenizer(Path(model.config._name_or_path))
        counts = Counter(i for e in examples for i in tokenizer(f" {e.answer}", add_special_tokens=False)["input_ids"])
        if not counts:
            raise UserError("trainable_tokens trains the tokens of the training rows' answers; raise train_rows, or name method.config.token_indices")
        return _with(self.config, token_indices=sorted(i for i, _ in counts.most_common(self.most_tokens)))

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), "most_tokens": self.most_tokens}


@dataclass(frozen=True)
class Cpt(PeftAdapter):
    """k training rows stand before every prompt, as vectors that move no farther than epsilon from their words (Blau et al., 2024).

    The paper also learns to predict the answers of the rows that stand there; here the loss is that of the training rows' answers alone.
    config.cpt_token_ids with its masks names other tokens.
    """

    prepares = True

    k: int = 4
    epsilon: float = 0.1
    """How far a token of a row's prompt may move, times the root of width / 2048; format_epsilon: one between rows."""
    format_epsilon: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise UserError(f"method.k is {self.k}; it takes at least one row")

    @property
    def acts_between_steps(self) -> bool:
        """PEFT gives its vectors other memory in every forward pass, which a captured step does not see."""
        return True

    def wrap(self, model: Any) -> Any:
        return PeftAdapter(self._named(model, peft_start.taken(model))).wrap(model)

    def _named(self, model: Any, examples: Sequence[Example]) -> Any:
        if len(examples) < self.k:
            raise UserError(f"method.k={self.k}, but there are {len(examples)} training rows; lower k or raise train_rows")
        tokenizer = load_tokenizer(Path(model.config._name_or_path))
        tokens: list[tuple[int, int]] = []
        for row, example in enumerate(examples[: self.k]):
            parts = ((example.prompt, INPUT), (f" {example.answer}", ANSWER), ("\n\n", BETWEEN))
            tokens += [(i, 4 * row + kind) for text, kind in parts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        if most_tokens(model, 2 * len(tokens)) < 2 * len(tokens):
            raise UserError(f"the {self.k} rows before every prompt take {len(tokens)} tokens, more than half of the model's context; lower method.k")
        return _with(self.config, cpt_token_ids=[i for i, _ in tokens], cpt_mask=[1] * len(tokens), cpt_tokens_type_mask=[kind for _, kind in tokens],
                     num_virtual_tokens=len(tokens), opt_projection_epsilon=self.epsilon, opt_projection_format_epsilon=self.format_epsilon)

    def hyperparameters(self) -> dict[str, Any]:
        return {"k": self.k, "epsilon": self.epsilon}


def _with(config: Any, **values: Any) -> Any:
    """A copy of a config of PEFT with other values."""
    config = copy.deepcopy(config)
    for key, value in values.items():
        setattr(config, key, value)
    return config
