"""Scores of choices under several adapters at once: every row is fed under each of them in one pass over the base.

Library of pipeline/training/pack.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from pipeline.engine.layout import GRAIN, LOGITS_AT_ONCE
from pipeline.engine.linear import Linears
from pipeline.engine.llama import Llama
from pipeline.engine.passes import ChoiceScorer, Inputs


def choice_scorer(llama: Llama, slots: Sequence[int], total: int, batch_tokens: int, pad_id: int) -> ChoiceScorer:
    """A scorer under the adapters of `slots`, of the model's `total`. batch_tokens: most tokens of a pass, all slots together."""
    model, count = _of(llama, slice(None) if len(slots) == total else list(slots)), len(slots)
    return ChoiceScorer(model, max(1, batch_tokens // count), pad_id, model.embedding.device, log_p=functools.partial(_under_each, count), grain=GRAIN)


def _under_each(count: int, model: Llama, inputs: Inputs) -> torch.Tensor:
    """log p of the inputs' targets under each of `count` adapters [K, reads]."""
    rows, width = inputs.shape.rows, inputs.shape.width + model.virtual
    at, each = inputs.rows * width + inputs.cols + model.virtual, torch.arange(count, device=inputs.rows.device)[:, None]
    hidden, _ = model.hidden(inputs.ids.repeat(count, 1), False)
    return _log_probabilities(model, hidden[(each * (rows * width) + at).view(-1)], each * len(at) + inputs.inverse, inputs.targets)


def _log_probabilities(model: Llama, hidden: torch.Tensor, at: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p of targets [N] from hidden [M, d] at the rows `at` [K, N]: [K, N] fp32. The logits exist a chunk at a time."""
    normed, _ = model.norm.forward(hidden, exact=True)
    chunk = max(1, LOGITS_AT_ONCE // (2 * model.head.shape[0]))  # in fp32
    flat, wanted = at.reshape(-1), targets.repeat(len(at))
    order = torch.argsort(flat, stable=True)
    picked = torch.empty(len(flat), device=hidden.device)
    ends = torch.searchsorted(flat[order], torch.arange(0, len(normed) + chunk, chunk, device=flat.device)).tolist()
    for number, (lo, hi) in enumerate(zip(ends, ends[1:], strict=False)):
        logs = torch.log_softmax((normed[number * chunk : (number + 1) * chunk] @ model.head.t()).float(), -1)
        some = order[lo:hi]
        picked[some] = logs[flat[some] - number * chunk, wanted[some]]
    return picked.view(at.shape)


def _of(llama: Llama, slots: list[int] | slice) -> Llama:
    """The model with these adapters alone, and without their dropout."""

    def chosen(linears: Linears) -> Linears:
        if linears.a is None:
            return linears
        pairs = [dataclasses.replace(pair, b=pair.b[slots]) for pair in linears.pairs]
        return dataclasses.replace(linears, a=linears.a[slots], da=None, noise=None, pairs=pairs)

    layers = [
        dataclasses.replace(x, qkv=chosen(x.qkv), out=chosen(x.out), gate_up=chosen(x.gate_up), down=chosen(x.down)) for x in llama.layers
    ]
    prompt = llama.prompt[slots] if llama.prompt is not None else None
    return dataclasses.replace(llama, layers=layers, prompt=prompt, noise=None)
