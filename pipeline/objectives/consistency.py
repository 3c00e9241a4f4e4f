"""Two passes that should agree: for models with random parts while they train. conf/objective/consistency.yaml; AdaMix's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.core.settings import NotNegative
from pipeline.data.rows import Batch
from pipeline.objectives.base import Objective
from pipeline.scoring.scorer import logits_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Consistency(Objective):
    """L = cross-entropy of one pass + consistency_weight · ½ (KL(A‖B) + KL(B‖A)) of two passes A and B, which route (AdaMix, Wang et al., 2022) or
    drop units (R-Drop, Liang et al., 2021, which averages the cross-entropies) at random. At the labelled positions; costs two passes a step."""

    own_loss = True

    consistency_weight: NotNegative

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        one, other = (torch.log_softmax(logits_of(model, batch), -1) for _ in range(2))
        divergence = ((one.exp() - other.exp()) * (one - other)).sum(-1) / 2  # both divergences at once
        return ((F.nll_loss(one, batch.targets, reduction="none") + self.consistency_weight * divergence) * batch.weights).sum()

    def hyperparameters(self) -> dict[str, Any]:
        return {"consistency_weight": self.consistency_weight}
