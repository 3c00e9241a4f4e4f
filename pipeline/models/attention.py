"""transformers' attention as it runs here: a captured step computes what the same call computes uncaptured.

Library. `register` puts both functions in the place of transformers' "sdpa" (its AttentionInterface and AttentionMaskInterface). While a CUDA graph
is captured, transformers (5.17 to 5.23) cannot see whether positions hold several sequences, takes it that they do, and makes a dense mask where it
otherwise leaves causality to the kernel: slower, and the gradients of cuDNN's masked kernel are not finite for some heads (docs/fast.md, "A mask that
was none").
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def register() -> None:
    """Take the place of transformers' sdpa, once a process."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("sdpa", attention)
    AttentionMaskInterface.register("sdpa", mask)


def mask(*args: Any, **how: Any) -> Any:
    """transformers.masking_utils.sdpa_mask; in a capture None (the kernel is causal) for rows of one sequence each without padding or window."""
    from transformers.masking_utils import sdpa_mask

    if _capturing() and not args and _plain(**how):
        return None
    return sdpa_mask(*args, **how)


def _plain(q_length: int, kv_length: int, attention_mask: Any = None, local_size: int | None = None, use_vmap: bool = False, **how: Any) -> bool:
    """Whether the mask is the causal one: every query its own key, no padding, no window as short as the row, no function of the model's own."""
    causal = "allow_is_bidirectional_skip" not in how
    return causal and attention_mask is None and q_length == kv_length and not use_vmap and (local_size is None or kv_length < local_size)


def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **how: Any) -> Any:
    """transformers' sdpa_attention_forward; with a mask (or T5's bias, which becomes one), and a backward pass to come, by any of torch's kernels but
    cuDNN's."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    masked = attention_mask is not None or how.get("position_bias") is not None
    if not masked or not query.is_cuda or not (query.requires_grad or key.requires_grad or value.requires_grad):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)


def _capturing() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
