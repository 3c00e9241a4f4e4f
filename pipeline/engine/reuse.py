"""What a model allows beyond the plain forward pass: masks and positions of one's own, keys and values kept from before.

Library. `refusal` reads a model's configuration, `sharing_refused` also compares scores once; `keep` holds the keys and values of
tokens that many rows follow.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pipeline.data.choices import Group, Items, Reads, arrange

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Nats a token by which two ways to score may differ through rounding."""


def refusal(model: Any, longest: int, slides: bool = True) -> str | None:
    """Why the model cannot be given a mask, positions and a cache; None: nothing speaks against it.

    Args:
        longest: tokens of the longest row.
        slides: whether a window of attention is no matter as long as every row fits in.
    """
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False) or getattr(adapter, "is_adaption_prompt", False):
        return "a soft prompt stands before every row"
    if getattr(adapter, "alora_invocation_tokens", None):
        return "its adapter begins at a token of the prompt"
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return "its attention is not torch's (sdpa)"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if kinds - {"sliding_attention"} or getattr(model, "_is_stateful", False):
        return "it holds a state besides keys and values"
    if window and getattr(config, "use_sliding_window", True) and (not slides or longest > window):
        return "its attention slides over a window"
    takes = inspect.signature(_inner(model).forward).parameters
    if getattr(config, "alibi", False) or not {"position_ids", "past_key_values", "attention_mask"} <= set(takes):
        return "it takes no positions"
    return None


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


_KNOWN: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()
"""Model -> why sharing changes what it computes; None: it does not."""


def sharing_refused(model: Any, dtype: Any, items: Items, groups: Sequence[Group], sums: Callable[[Sequence[Group], int], list[list[float]]]) -> str | None:
    """Why the rows of a model's scoring may not share tokens; None: they may.

    What the configuration does not tell, the scores do: of two rows with and without sharing, once for every model.

    Args:
        groups: the rows as they would share.
        sums: (rows, number of places) -> scores, by adapter; the model answers with one.
    """
    reason = refusal(model, max(len(prompt) + sum(map(len, choices)) for prompt, choices in items))
    if reason or model in _KNOWN:
        return reason or _KNOWN[model]
    largest = max((group for group in groups if group.shares), key=lambda group: len(group.rows))
    few = [items[i] for i in sorted({row.item for row in largest.rows}, key=lambda i: len(items[i][0]))[:2]]
    reads = Reads.of(few)
    (expected,) = sums(reads.apart(), len(reads.places))
    if not all(map(math.isfinite, expected)):  # a model that diverged shows nothing
        return "its scores are not finite"
    try:
        (found,) = sums(arrange(reads, few, least=0), len(reads.places))
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        if "out of memory" in str(error):
            raise
        _KNOWN[model] = f"it fails ({' '.join(str(error).split())[:120]})"
        return _KNOWN[model]
    limits = [TOLERANCE[dtype] * max(1, len(choice)) for _, choices in few for choice in choices]
    close = all(abs(a - b) <= limit for a, b, limit in zip(expected, found, limits, strict=True))
    _KNOWN[model] = None if close else "its scores change"
    return _KNOWN[model]


class _Kept(DynamicLayer):
    """One layer's keys and values [1, heads, P, d], put before those of every row and not kept longer."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        rows = len(key_states)
        return torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], 2), torch.cat([self.values.expand(rows, -1, -1, -1), value_states], 2)


def keep(forward: Callable[..., Any], prefix: list[int], device: Any) -> DynamicCache:
    """The cache to feed rows with that follow `prefix`; it can be fed any number of times.

    Args:
        forward: (ids [1, P], rows [1], cols [1], further inputs of the model) -> anything.
    """
    cache = DynamicCache()
    ids = torch.tensor([prefix], device=device)
    forward(ids, torch.zeros(1, dtype=torch.long, device=device), torch.full((1,), len(prefix) - 1, device=device), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        layers[index] = kept = _Kept()
        kept.lazy_initialization(layer.keys, layer.values)
        kept.keys, kept.values = layer.keys, layer.values
    return cache
