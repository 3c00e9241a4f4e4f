"""A soft prompt in a subspace of few dimensions, and a prefix trained relative to its size. Library of pipeline/methods/soft_prompts.py, peft_prompts.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

ALIKE = 0.01
"""Of their root mean square, the deviation below which a layer's keys (values) are the same for all tokens, but for rounding."""


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


class TimesSize(nn.Module):
    """Makes a parameter size · what is trained. size: broadcast to the parameter's shape, nowhere 0."""

    size: torch.Tensor

    def __init__(self, size: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("size", size)

    def forward(self, trained: torch.Tensor) -> torch.Tensor:
        return trained * self.size

    def right_inverse(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter / self.size


def train_relative(encoder: nn.Module, size: torch.Tensor) -> None:
    """Have the encoder's one trained tensor [tokens, n] be trained over `size` [n]. Whoever reads it by its old name, as PEFT does when it answers and saves,
    reads the product."""
    (name,) = (name for name, parameter in encoder.named_parameters() if parameter.requires_grad)
    module, _, attribute = name.rpartition(".")
    parametrize.register_parametrization(encoder.get_submodule(module), attribute, TimesSize(size))


def sizes(prefix: torch.Tensor, layers: int) -> torch.Tensor:
    """[n] of a prefix [tokens, n = layers · (keys, values) · channels]: for each layer's keys, and its values, the median over channels of their standard
    deviation over tokens. What all tokens' keys have in common (a bias, a hundred times as large in some channels of Qwen2.5) changes no attention, and the
    median is moved by no outlying channel. Where tokens are alike, as of a text of one word, it is that of the root mean square; 1 where this is 0."""
    def median(per_channel: torch.Tensor) -> torch.Tensor:
        return per_channel.view(layers, 2, -1).median(-1, keepdim=True).values

    deviation, rms = median(prefix.std(0, correction=0)), median(prefix.square().mean(0).sqrt())
    size = torch.where(deviation > ALIKE * rms, deviation, torch.where(rms > 0, rms, 1.0))
    return size.expand(-1, -1, prefix.shape[1] // (2 * layers)).reshape(-1)
