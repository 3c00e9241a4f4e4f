"""A soft prompt in a subspace of few dimensions. Library of pipeline/methods/soft_prompts.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class IntrinsicPrompt(nn.Module):
    """The prompt start [k, d] + Σ z_i · basis_i, of which z [n] alone is trained; in the place of PEFT's PromptEmbedding.

    Args:
        basis: [n, k, d].
    """

    basis: torch.Tensor

    def __init__(self, encoder: nn.Module, basis: torch.Tensor) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.register_buffer("basis", basis)
        self.z = nn.Parameter(torch.zeros(len(basis), device=basis.device))

    @property
    def embedding(self) -> nn.Embedding:
        """What PEFT reads of a prompt outside training: the encoder's own, as it started."""
        return self.encoder.embedding  # type: ignore[return-value]

    def prompt(self) -> torch.Tensor:
        """[k, d], fp32."""
        return self.embedding.weight.float() + torch.tensordot(self.z, self.basis, 1)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(indices, self.prompt())


def random_basis(n: int, start: torch.Tensor) -> torch.Tensor:
    """[n, k, d] of normal numbers as large as those of `start` [k, d], over √n."""
    return torch.randn(n, *start.shape, device=start.device) * start.float().square().mean().sqrt() / n**0.5


def fitted_basis(n: int, prompts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean [k, d], basis [n, k, d]) of trained prompts: their first n principal axes, each as long as the prompts' standard deviation along it."""
    stacked = torch.stack([p.float() for p in prompts])
    mean = stacked.mean(0)
    _, values, axes = torch.linalg.svd((stacked - mean).flatten(1), full_matrices=False)
    return mean, (values[:n, None] / (len(prompts) - 1) ** 0.5 * axes[:n]).view(n, *mean.shape)
