"""A model's answers by hand: the forward pass of llama.py over a transformers or PEFT model, for scoring and generation.

Library. `by_hand` binds a model for as long as answers are needed; a model that is bound for training answers with the weights in training.
A model that bind.py does not know runs its own forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.engine import invariant
from pipeline.engine.attention import AttentionForward, causal, masked_attention, windowed
from pipeline.engine.bind import answering, bound_to
from pipeline.engine.families import Heads
from pipeline.engine.linear import Linears
from pipeline.engine.llama import Angles, Llama, rows_of
from pipeline.engine.ops import Tensor
from pipeline.engine.parts import Unsupported

STATIC = ("cuda",)
"""Device types on which a model's own forward pass waits for kernel launches."""
FEW = 32
"""Rows below which binding a model costs more time than it saves."""
LEAST_TABLE = 64
"""Fewest positions of a table of cos and sin."""


class Forward:
    """Logits at chosen positions, with the signature of scorer.logits_at."""

    def __init__(self, llama: Llama) -> None:
        self.llama = llama

    def tables(self, length: int) -> Angles:
        """cos, sin [at least `length`, e] by rotation; lengths are rounded up to powers of two, so that few tables are made."""
        with torch.inference_mode(False):  # training may read the same tables
            return self.llama.angles(max(LEAST_TABLE, 1 << (length - 1).bit_length()))

    def __call__(self, ids: Tensor, rows: Tensor, cols: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                 past_key_values: Any = None, use_cache: bool = False) -> Tensor:
        """fp32 [N, V] at (rows, cols) [N] of ids [R, T].

        Args: as `hidden` has them.
        """
        return self.llama.logits(self.hidden(ids, rows, cols, attention_mask, position_ids, past_key_values))

    def log_p(self, ids: Tensor, rows: Tensor, cols: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities [N] fp32 of the targets [N] after (rows, cols) [N] of ids [R, T], in the operations of a training step."""
        return -self.llama.nll_after(self.hidden(ids, rows, cols), targets)

    def states(self, ids: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """What the output layer is given [N, d] at (rows, cols) [N] of ids [R, T]."""
        return self.llama.norm.forward(self.hidden(ids, rows, cols), exact=True)[0]

    def hidden(self, ids: Tensor, rows: Tensor, cols: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
               past_key_values: Any = None) -> Tensor:
        """States before the last norm [N, d] at (rows, cols) [N] of ids [R, T].

        Args:
            attention_mask: [R, 1, T, P + T], True where a token attends to another; None: causal.
            position_ids: [R, T]; None: 0 to T - 1. past_key_values: a transformers cache of P tokens, which T are appended to.
        """
        count, width = ids.shape
        if position_ids is None:
            angles = rows_of(self.tables(width), slice(width))
        else:
            longest = attention_mask.shape[-1] if attention_mask is not None else width
            angles = rows_of(self.tables(longest), position_ids.reshape(-1))
        attends: list[AttentionForward] = [MaskedAttention(width, attention_mask, past_key_values, layer) for layer in range(len(self.llama.layers))]
        if self.llama.invariant and attention_mask is None and past_key_values is None:
            attends = [invariant.Rows(width)] * len(attends)
        return self.llama.answer(ids.reshape(-1), angles, attends).view(count, width, -1)[rows, cols]


def without_adapters(llama: Llama) -> Llama:
    """The same model over the same memory as it was before its adapters were trained: what a policy's KL is measured to."""

    def bare(linears: Linears) -> Linears:
        if linears.a is None:
            return linears
        rows, columns = len(linears.weight()) - linears.under, linears.a.shape[2]
        return Linears(lambda: linears.weight()[:rows, :columns], linears.bias, invariant=linears.invariant)

    layers = [dataclasses.replace(x, qkv=bare(x.qkv), out=bare(x.out), gate_up=bare(x.gate_up), down=bare(x.down), reserved=None) for x in llama.layers]
    return dataclasses.replace(llama, layers=layers, noise=None)


@dataclass(frozen=True)
class MaskedAttention:
    """Attention of rows of T = `tokens` tokens, without backward: causal, or by `mask` [R, 1, T, P + T] (True where a token attends to another), after
    the tokens of `past` (a transformers cache of P tokens, which these are appended to). With a mask or a cache every row is to be shorter than the
    layer's window (reuse.refusal)."""

    tokens: int
    mask: Tensor | None = None
    past: Any = None
    layer: int = 0

    def forward(self, heads: Heads, qkv: Tensor, save: bool) -> tuple[Tensor, tuple]:
        q, k, v = heads.split(qkv, self.tokens)
        if self.past is not None:
            k, v = self.past.update(k, v, self.layer)
        mask = self.mask
        if mask is None and 0 < heads.window <= self.tokens:  # where transformers has a mask, too: another kernel may round otherwise
            mask = windowed(causal(self.tokens, qkv.device), heads.window)
        return heads.merge(masked_attention(q, k, v, mask, heads.scale)), ()


@contextmanager
def by_hand(model: Any, dtype: Any, device: Any, rows: int) -> Iterator[Forward | None]:
    """The model's hand-written forward pass inside the context; None where bind.py does not know the model, rows are few or the device gains nothing."""
    if torch.device(device).type not in STATIC:
        yield None
        return
    if (llama := bound_to(model, dtype)) is not None:
        yield Forward(llama)
        return
    bound = None
    if rows >= FEW:
        with torch.inference_mode(False), torch.no_grad(), suppress(Unsupported):
            bound = answering(model, dtype)
    try:
        yield Forward(bound.llama) if bound is not None else None
    finally:
        if bound is not None:
            with torch.inference_mode(False), torch.no_grad():
                bound.release()
