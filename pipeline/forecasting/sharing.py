"""How many cells one GPU holds at once, by the forecast of their memory."""

from __future__ import annotations

from omegaconf import DictConfig

from pipeline.forecasting.cell import card_at_hand, forecast

RESERVE = 0.9
"""The share of a card's memory that cells may plan to take together."""
MOST = 8
"""More at once than these gain nothing: each waits for the others' kernels."""


def at_once(cfg: DictConfig) -> int:
    """How many cells of this config fit on one GPU, at least 1; 1 where there is no forecast.

    The GPU is the one that forecast.gpu_memory_gb describes, or this machine's.
    """
    card = card_at_hand(cfg)
    estimate = forecast(cfg, card, batches=False, time=False) if card.gpu else None
    if estimate is None or estimate.memory is None:
        return 1
    return max(1, min(MOST, int(card.memory_bytes * RESERVE / estimate.memory.total)))
