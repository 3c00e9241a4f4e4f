"""Small networks with a bottleneck inside the blocks of a frozen base: adapters behind or beside a sublayer, Compacter, AdaMix.

conf/method/adapter_houlsby.yaml, adapter_pfeiffer.yaml, adapter_parallel.yaml, compacter.yaml, adamix.yaml. Written here because PEFT has none
of them, and the library `adapters` needs an older transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.methods.base import Method, check_counts, load_weights, save_weights
from pipeline.models.blocks import BLOCK, PLACES, blocks, sublayer, width

WEIGHTS = "adapter.safetensors"
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")


@dataclass(frozen=True)
class Bottleneck(Method):
    """h + scale · up(f(down(x))) at the named sublayers of every block.

    serial: x is the sublayer's own output h (Houlsby et al., 2019: after attention and feed-forward; Pfeiffer et al., 2021: after the whole
    block, whose output a decoder, unlike their encoder, does not normalise: it is divided by its root mean square here). parallel: x is the
    sublayer's input (He et al., 2022). `up` starts at zero, so the first answers are the base's. Adapter
    weights are fp32 in every precision. Nothing merges: there is a nonlinearity in between.

    Raises:
        UserError: a value out of range, or a model whose blocks have no one module of the named kind.
    """

    trains = True

    places: list[str]
    """Of attention, feed_forward, block."""
    parallel: bool
    width: int
    """Of the bottleneck."""
    activation: str = "relu"
    scale: float = 1.0
    label: str = "bottleneck"
    """The method's name in the table."""

    def __post_init__(self) -> None:
        if not self.places or set(self.places) - {*PLACES, BLOCK}:
            raise UserError(f"method.places is {list(self.places)}; name one or more of {', '.join(PLACES)}, {BLOCK}")
        check_counts(self, "width")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"method.activation is {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}")

    @property
    def name(self) -> str:
        return self.label

    def hyperparameters(self) -> dict[str, Any]:
        shown = {"width": self.width, "places": ", ".join(self.places), "parallel": self.parallel}
        return shown | ({"scale": self.scale} if self.scale != 1 else {})

    def wrap(self, model: Any) -> Any:
        from pipeline.methods.modules.adapters import Adapter, attach

        places = [(sublayer(block, place), place == BLOCK, width(model, block)) for block in blocks(model) for place in self.places]  # before one is changed
        halves = {d: self._halves(d) for *_, d in places}
        for module, normalised, d in places:
            attach(module, Adapter(*next(halves[d]), self.activation, self.scale, normalised), self.parallel)
        return model

    def save(self, model: Any, state: Any, folder: Path) -> None:
        save_weights(_parameters(model), folder / WEIGHTS)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        model = self.served(self.wrap(base), base.dtype)
        load_weights(_parameters(model), folder / WEIGHTS, base.device)
        return model.requires_grad_(False).eval(), None

    def _halves(self, d: int) -> Iterator[tuple[Any, Any]]:
        """Endlessly the two layers of an adapter: from width d down to `width`, and up again."""
        from pipeline.methods.modules.adapters import dense

        while True:
            yield dense(d, self.width), dense(self.width, d, zero=True)


def _parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """The adapters' parameters, a shared one once."""
    from pipeline.methods.modules.adapters import NAME

    return ((name, p) for name, p in model.named_parameters() if NAME in name.split("."))


@dataclass(frozen=True)
class Compacter(Bottleneck):
    """Adapters whose two matrices are sums of n Kronecker products of a small matrix, which all layers share, and a low-rank one of their own
    (Mahabadi et al., 2021). At rank 1 a matrix from d to k takes k + d numbers, n of any size; all layers together n³ more."""

    n: int = 4
    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "n", "rank")
        if self.width % self.n:
            raise UserError(f"method.width={self.width} is no multiple of method.n={self.n}; change one of them")

    def hyperparameters(self) -> dict[str, Any]:
        return super().hyperparameters() | {"n": self.n, "rank": self.rank}

    def _halves(self, d: int) -> Iterator[tuple[Any, Any]]:
        import torch

        from pipeline.methods.modules.adapters import Hypercomplex

        if d % self.n:
            raise UserError(f"the model's width {d} is no multiple of method.n={self.n}, which Compacter needs; choose another n")
        rule = torch.nn.Parameter(torch.randn(self.n, self.n, self.n) / self.n**0.5)
        while True:
            yield Hypercomplex(rule, d, self.width, self.rank), Hypercomplex(rule, self.width, d, self.rank, zero=True)


@dataclass(frozen=True)
class AdaMix(Bottleneck):
    """M adapters in the place of one (Wang et al., 2022): training draws a down and an up layer for every forward pass, evaluation and the artefact
    have the averages of both, so what is served costs what one adapter costs. objective=consistency is the paper's loss."""

    changes_when_served = True

    experts: int = 4
    shared: str | None = "up"
    """The half that all experts of an adapter have in common: down, up, or null for neither."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "experts", least=2)
        if self.shared not in (None, "down", "up"):
            raise UserError(f"method.shared is {self.shared!r}; choose down, up or null")

    @property
    def name(self) -> str:
        return "adamix"

    def hyperparameters(self) -> dict[str, Any]:
        return super().hyperparameters() | {"experts": self.experts, "shared": self.shared}

    def served(self, model: Any, dtype: Any) -> Any:
        for module in model.modules():
            for name, child in list(module.named_children()):
                if hasattr(child, "collapsed"):
                    setattr(module, name, child.collapsed())
        return model

    def _halves(self, d: int) -> Iterator[tuple[Any, Any]]:
        from pipeline.methods.modules.adapters import Experts, dense

        while True:
            down = Experts([dense(d, self.width) for _ in range(1 if self.shared == "down" else self.experts)])
            up = Experts([dense(self.width, d, zero=True) for _ in range(1 if self.shared == "up" else self.experts)])
            yield down, up
