"""Whether a model takes masks, positions and cached keys and values, and the cache of a prefix that many rows share.

Library. `refusal` looks at a model's configuration, `sharing_refused` also compares scores once; `prefix_cache` makes the cache.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pipeline.data.choices import Group, Items, Reads, arrange
from pipeline.engine import answering

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Nats a token by which two ways to score may differ through rounding."""


@dataclass(frozen=True)
class SoftPrompt:
    """Vectors that stand before every row. inner: the model without them; tokens: how many; cache: makes their keys and values [1, heads, tokens, e]."""

    inner: Any
    tokens: int
    cache: Callable[[], DynamicCache]


SOFT = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")


def soft_prompt(model: Any, device: Any) -> SoftPrompt | None:
    """PEFT's soft prompt as what all rows follow; None where the model has none, one of another kind, or passes over it are captured."""
    adapter = getattr(model, "active_peft_config", None)
    kind = getattr(getattr(adapter, "peft_type", None), "value", None)
    if kind not in SOFT or torch.device(device).type in answering.STATIC:
        return None
    inner = model.get_base_model()

    def cache() -> DynamicCache:
        prompt = model.get_prompt(1)
        if kind == "PREFIX_TUNING":
            return cast("DynamicCache", prompt)
        filled = DynamicCache()
        inner(inputs_embeds=prompt.to(inner.get_input_embeddings().weight.dtype), past_key_values=filled, use_cache=True, logits_to_keep=1)
        return filled

    return SoftPrompt(inner, adapter.num_virtual_tokens, cache)  # type: ignore[union-attr]


def refusal(model: Any, soft: SoftPrompt | None = None) -> str | None:
    """Why the model takes no mask, positions and cache; None: no reason is known. soft: its soft prompt, where that is fed once for all rows."""
    adapter = getattr(model, "active_peft_config", None)
    if (getattr(adapter, "is_prompt_learning", False) and soft is None) or getattr(adapter, "is_adaption_prompt", False):
        return "a soft prompt stands before every row"
    if getattr(adapter, "alora_invocation_tokens", None):
        return "its adapter begins at a token of the prompt"
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return "its attention is not torch's (sdpa)"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds - {"sliding_attention"} or getattr(model, "_is_stateful", False):
        return "it holds a state besides keys and values"
    takes = inspect.signature(_inner(model).forward).parameters
    if getattr(config, "alibi", False) or not {"position_ids", "past_key_values", "attention_mask"} <= set(takes):
        return "it takes no positions"
    return None


def window_of(model: Any) -> int | None:
    """Tokens to which a token attends in some layers at least; None: to all before it everywhere."""
    config = model.config.get_text_config()
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


_KNOWN: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()
"""Model -> why sharing tokens changes its scores; None: it does not."""


def sharing_refused(model: Any, dtype: Any, items: Items, groups: Sequence[Group], sums: Callable[[Sequence[Group], int], list[list[float]]],
                    soft: SoftPrompt | None = None) -> str | None:
    """Why rows may not share tokens when this model scores them; None: they may.

    Beyond the configuration, the scores of two rows with and without sharing are compared, once for every model.

    Args:
        groups: the rows as they would share.
        sums: ChoiceScorer.sums of the model. soft: its soft prompt, where that is shared.
    """
    longest, reason = max(len(prompt) + sum(map(len, choices)) for prompt, choices in items), refusal(model, soft)
    longest += soft.tokens if soft else 0
    if (window := window_of(model)) and longest > window:
        reason = reason or "its attention slides over a window"
    if reason or model in _KNOWN:
        return reason or _KNOWN[model]
    largest = max((group for group in groups if group.shares), key=lambda group: len(group.rows))
    few = [items[i] for i in sorted({row.item for row in largest.rows}, key=lambda i: len(items[i][0]))[:2]]
    reads = Reads.of(few)
    (expected,) = sums(reads.apart(), len(reads.places))
    if not all(map(math.isfinite, expected)):  # of a diverged model nothing can be compared
        return "its scores are not finite"
    try:
        (scores,) = sums(arrange(reads, few, least=0, soft=soft is not None), len(reads.places))
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        if "out of memory" in str(error):
            raise
        _KNOWN[model] = f"it fails ({' '.join(str(error).split())[:120]})"
        return _KNOWN[model]
    limits = [TOLERANCE[dtype] * max(1, len(choice)) for _, choices in few for choice in choices]
    close = all(abs(a - b) <= limit for a, b, limit in zip(expected, scores, limits, strict=True))
    _KNOWN[model] = None if close else "its scores change"
    return _KNOWN[model]


class _PrefixLayer(DynamicLayer):
    """One layer's keys and values [1, heads, P, e], which precede those of every row; a row's own are not stored."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        rows = len(key_states)
        return torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], 2), torch.cat([self.values.expand(rows, -1, -1, -1), value_states], 2)


def prefix_cache(forward: Callable[..., Any], prefix: list[int], device: Any, before: DynamicCache | None = None) -> DynamicCache:
    """The cache of `prefix` (P tokens), for any number of batches of rows that follow it.

    Args:
        forward: (ids [1, P], rows [1], cols [1], extra inputs of the model) -> anything.
        before: of what the prefix follows, which is appended to; None: it is the beginning.
    """
    cache = DynamicCache() if before is None else before
    ids, zero = torch.tensor([prefix], device=device), torch.zeros(1, dtype=torch.long, device=device)
    if prefix:
        forward(ids, zero, torch.full((1,), len(prefix) - 1, device=device), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        layers[index] = prefixed = _PrefixLayer()
        prefixed.lazy_initialization(layer.keys, layer.values)
        prefixed.keys, prefixed.values = layer.keys, layer.values
    return cache
