"""Scalar rewards: a head beside a language model's output layer that says how good a text is, and what such a model is worth on held-out pairs.

Library. The head reads the state of a sequence's last token before the output layer. A model that has one answers a row with the choice of the
highest reward; its scores are log-softmax of the rewards over the row's choices, so that differences of two are the Bradley-Terry log odds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.choices import Items
from pipeline.data.rows import by_length, pad
from pipeline.models.base import autocast
from pipeline.records.origins import PairScore

if TYPE_CHECKING:
    import torch

HEAD = "reward_head"
FILE = "reward_head.safetensors"
BINS = 10
"""Equal bins of the claimed chance, from 0.5 to 1."""


def attach(model: Any) -> None:
    """Put a head on the model: a linear map to one number without a bias, fp32, trained, drawn from N(0, 1 / (d + 1)) as in Stiennon et al. (2020)."""
    import torch

    width = model.get_output_embeddings().weight.shape[1]
    head = torch.nn.Linear(width, 1, bias=False, device=model.device, dtype=torch.float32)
    torch.nn.init.normal_(head.weight, std=(width + 1) ** -0.5)
    _inner(model).add_module(HEAD, head)


def detach(model: Any) -> None:
    """Take it off again, where there is one."""
    if has_head(model):
        delattr(_inner(model), HEAD)


def has_head(model: Any) -> bool:
    return hasattr(_inner(model), HEAD)


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def save(model: Any, folder: Path, rest: Callable[[], None]) -> None:
    """Write the head, and by `rest` the model without it."""
    from safetensors.torch import save_file

    head = getattr(_inner(model), HEAD)
    detach(model)
    rest()
    _inner(model).add_module(HEAD, head)
    save_file({"weight": head.weight.detach().cpu().contiguous()}, folder / FILE)


def load(model: Any, folder: Path) -> None:
    """Put the head that `save` wrote on a model."""
    from safetensors.torch import load_file

    attach(model)
    head = getattr(_inner(model), HEAD)
    head.weight.data.copy_(load_file(folder / FILE)["weight"])
    head.requires_grad_(False)


def rewards_at(model: Any, input_ids: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """Rewards fp32 [N] of the sequences that end at (rows, cols) [N] of input_ids [B, T], right-padded; virtual tokens shift the columns."""
    width, kept = input_ids.shape[1], []

    def select(_: Any, args: tuple) -> tuple:
        hidden = args[0]
        kept.append(hidden[rows, cols + hidden.shape[1] - width])
        return (kept[0][:1],)  # the logits are not asked for

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        hook.remove()
    return read(model, kept[0])


def read(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Rewards fp32 [N] of what the output layer is given [N, d]."""
    return (states.float() * getattr(_inner(model), HEAD).weight.float()).sum(-1)  # a product under autocast would round to 16 bits


def rewards(model: Any, sequences: Sequence[Sequence[int]], batch_tokens: int, pad_id: int, device: Any, dtype: Any,
            forward: Callable[..., torch.Tensor] | None = None) -> list[float]:
    """Of every sequence of tokens, similar lengths together. forward: (ids [B, T], rows, cols [N]) -> rewards [N]; None: the model's own pass."""
    import torch

    forward = forward or functools.partial(rewards_at, model)

    found = [0.0] * len(sequences)
    model.eval()
    with torch.inference_mode(), autocast(device, dtype):
        for part in by_length([len(s) for s in sequences], batch_tokens):
            mine = [sequences[i] for i in part]
            ends = torch.tensor([len(s) - 1 for s in mine], device=device)
            values = forward(pad(mine, pad_id).to(device), torch.arange(len(mine), device=device), ends)
            for index, value in zip(part, values.tolist(), strict=True):
                found[index] = value
    return found


def relative(model: Any, items: Items, batch_tokens: int, pad_id: int, device: Any, dtype: Any) -> list[list[float]]:
    """log-softmax over every item's choices of their rewards after its prompt, nats."""
    values = iter(rewards(model, [[*prompt, *choice] for prompt, choices in items for choice in choices], batch_tokens, pad_id, device, dtype))
    return [_log_softmax([next(values) for _ in choices]) for _, choices in items]


def _log_softmax(values: Sequence[float]) -> list[float]:
    if not all(map(math.isfinite, values)):
        return [math.nan] * len(values)
    top = max(values)
    total = top + math.log(math.fsum(math.exp(v - top) for v in values))
    return [v - total for v in values]


def pair_score(predictions: Sequence[dict]) -> PairScore | None:
    """How the right answers rank among the others of their rows; None where no row has another one, or no reward is finite.

    Args:
        predictions: as Scorer.predict gives them, with finite `scores`.
    """
    by_row = [[p["scores"][p["answer"]] - score for choice, score in p["scores"].items() if choice != p["answer"]]
              for p in predictions if p.get("scores") and p["answer"] in p["scores"]]
    margins = [row for row in by_row if row]
    if not margins:
        return None
    shares = [sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in row) / len(row) for row in margins]
    accuracy = math.fsum(shares) / len(shares)
    spread = math.sqrt(sum((len(row) + 2) / (12 * len(row)) for row in margins)) / len(margins)  # of a mean of uniform ranks
    p_value = 0.5 * math.erfc((accuracy - 0.5) / spread / math.sqrt(2))
    flat = [m for row in margins for m in row]
    return PairScore(len(flat), len(margins), accuracy, p_value, calibration_error(flat))


def calibration_error(margins: Sequence[float]) -> float:
    """Expected calibration error (Guo et al., 2017) of rewards: |share right - mean claimed chance| over bins of the claimed chance, by the pairs in them.

    margins: reward of the right answer minus that of the wrong one; the claimed chance that the higher one is right is sigma(|margin|).
    """
    bins: dict[int, list[tuple[float, float]]] = {}
    for margin in margins:
        claimed = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        hit = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
        bins.setdefault(min(BINS - 1, int((claimed - 0.5) * 2 * BINS)), []).append((claimed, hit))
    return math.fsum(abs(math.fsum(hit - claimed for claimed, hit in one)) for one in bins.values()) / len(margins)
