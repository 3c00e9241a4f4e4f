"""Choice scoring with several adapters at once: every sequence is fed under each of them in one pass over the base.

Library. The semantics are pipeline.scoring's, whose reads it shares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from pipeline.choices import Items, Reads
from pipeline.data import pad
from pipeline.fast import ops
from pipeline.fast.llama import LOGITS_AT_ONCE, Group, Llama
from pipeline.fast.shapes import GRAIN


def choice_log_likelihoods(llama: Llama, slots: Sequence[int], total: int, items: Items, batch_tokens: int, pad_id: int) -> list[list[list[float]]]:
    """By slot: sum of token log-probabilities of every choice after its prompt, nats.

    Args:
        slots: whose adapters answer, of `total` that the model holds.
        batch_tokens: most tokens of a pass, all slots together (one row a slot at least).
    """
    model = _of(llama, slice(None) if len(slots) == total else list(slots))
    reads, count = Reads.of(items), len(slots)
    device = model.embedding.device
    found, places = [], []
    with torch.no_grad():
        for sequences, (rows, cols, targets, place) in reads.batches(max(1, batch_tokens // count)):
            ids = pad(sequences, pad_id)
            ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % GRAIN), value=pad_id)
            width = ids.shape[1] + model.virtual
            at, inverse = torch.unique(rows * width + cols + model.virtual, return_inverse=True)
            stride = len(ids) * width
            hidden, _ = model.hidden(ids.to(device).repeat(count, 1), False)
            wanted = (torch.arange(count)[:, None] * stride + at).reshape(-1).to(device)
            reading = (torch.arange(count)[:, None] * len(at) + inverse).to(device)
            found.append(_log_probabilities(model, hidden[wanted], reading, targets.to(device)))
            places.append(place)
    sums = torch.zeros(count, len(reads.places), dtype=torch.float64)
    sums.index_add_(1, torch.cat(places), torch.cat(found, 1).double().cpu())
    return [reads.by_item(row) for row in sums.tolist()]


def _log_probabilities(model: Llama, hidden: torch.Tensor, at: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p of targets [N] read off hidden [M, d] at [K, N]: [K, N] fp32. The logits exist a chunk at a time."""
    normed, _ = ops.rmsnorm(hidden, model.norm.weight, model.layers[0].eps, exact=True)
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

    def group(held: Group) -> Group:
        if held.a is None:
            return held
        return dataclasses.replace(held, a=held.a[slots], da=None, noise=None, low=[dataclasses.replace(low, b=low.b[slots]) for low in held.low])

    layers = [
        dataclasses.replace(x, qkv=group(x.qkv), out=group(x.out), gate_up=group(x.gate_up), down=group(x.down)) for x in llama.layers
    ]
    prompt = llama.prompt[slots] if llama.prompt is not None else None
    return dataclasses.replace(llama, layers=layers, prompt=prompt, noise=None)
