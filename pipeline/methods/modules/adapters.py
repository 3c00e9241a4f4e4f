"""Bottleneck adapters as torch modules, and the hooks that put them behind or beside a module of a frozen model.

Library of pipeline/methods/bottleneck.py. Shapes: [..., d] in and out, k the bottleneck's width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

NAME = "bottleneck"
"""What the adapter is called inside the module that it adapts."""
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh,
}


class Adapter(nn.Module):
    """scale · (up · f(down · x + b) + b'); `up` starts at zero, so an adapted model starts as its base.

    Args:
        normalised: divide x by its root mean square first.
    """

    def __init__(self, down: nn.Module, up: nn.Module, activation: str, scale: float, normalised: bool) -> None:
        super().__init__()
        self.down, self.up, self.activation, self.scale, self.normalised = down, up, ACTIVATIONS[activation], scale, normalised

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.to(self.down.bias.dtype)  # type: ignore[arg-type]
        if self.normalised:
            h = nn.functional.rms_norm(h, h.shape[-1:])
        return self.scale * self.up(self.activation(self.down(h))).to(x.dtype)


def dense(width_in: int, width_out: int, zero: bool = False) -> nn.Linear:
    """A linear layer with a bias of zeros. zero: its weight too."""
    layer = nn.Linear(width_in, width_out)
    nn.init.zeros_(layer.bias)
    if zero:
        nn.init.zeros_(layer.weight)
    return layer


class Hypercomplex(nn.Module):
    """A linear layer W = sum over i of A_i ⊗ (s_i · t_i): LPHM of Compacter (Mahabadi et al., 2021, equation 8).

    Args:
        rule: A [n, n, n], shared by all layers of the model.
        zero: whether W starts at zero (s does).

    s [n, d_out/n, r], t [n, r, d_in/n]; with r = 1 that is d_in + d_out numbers, whatever n is.
    """

    def __init__(self, rule: nn.Parameter, width_in: int, width_out: int, rank: int, zero: bool = False) -> None:
        super().__init__()
        n = len(rule)
        self.rule = rule
        self.left = nn.Parameter(torch.zeros(n, width_out // n, rank) if zero else torch.randn(n, width_out // n, rank) / rank**0.5)
        self.right = nn.Parameter(torch.randn(n, rank, width_in // n) / width_in**0.5)
        self.bias = nn.Parameter(torch.zeros(width_out))

    @property
    def weight(self) -> torch.Tensor:
        """[d_out, d_in]"""
        n, high, _ = self.left.shape
        return torch.einsum("iab,icr,ird->acbd", self.rule, self.left, self.right).reshape(n * high, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Experts(nn.Module):
    """M linear layers of which training draws one for every forward pass and evaluation takes the average (AdaMix, Wang et al., 2022).

    The draw stays on the device, so that a step can be captured in a CUDA graph.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.average()
        if self.training and len(self.weight) > 1:
            drawn = torch.randint(len(self.weight), (1,), device=x.device)
            weight, bias = self.weight.index_select(0, drawn)[0], self.bias.index_select(0, drawn)[0]
        return nn.functional.linear(x, weight, bias)

    def average(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the average layer."""
        return self.weight.mean(0), self.bias.mean(0)

    def collapsed(self) -> nn.Linear:
        """The average as a plain layer."""
        layer = nn.Linear(self.weight.shape[2], self.weight.shape[1], device=self.weight.device)
        layer.weight.data, layer.bias.data = (value.detach() for value in self.average())
        return layer


def attach(module: Any, adapter: Adapter, parallel: bool) -> None:
    """Put an adapter behind a module's output (serial) or beside the module, from its input to its output (parallel)."""
    module.add_module(NAME, adapter.to(next(module.parameters()).device))
    module.register_forward_hook(functools.partial(_add, parallel), with_kwargs=True)


def _add(parallel: bool, module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
    """As a forward hook: the module's output with the adapter's added to it."""
    h = output[0] if isinstance(output, tuple) else output
    x = (args[0] if args else kwargs["hidden_states"]) if parallel else h
    h = h + getattr(module, NAME)(x)
    return (h, *output[1:]) if isinstance(output, tuple) else h
