"""An adapter's initial weights: those that PEFT gives a single run of the same seed.

Library. Wrapping a model in PEFT takes a third of a second at 30 layers, so LoRA's default initialisation is drawn here, once that
has given the same numbers as PEFT.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.engine.parts import Unsupported
from pipeline.methods.base import Method

Weights = dict[str, torch.Tensor]
"""PEFT's parameter name -> value, fp32."""
A, B = ".lora_A.default.weight", ".lora_B.default.weight"
PREFIX = "base_model.model."
PROMPT = "prompt_encoder.default.embedding.weight"


@dataclass(frozen=True)
class AdapterInit:
    """An adapter's initial weights on the CPU; LoRA's scale (alpha / r) and dropout; seed: of the dropout."""

    weights: Weights
    scale: float = 1.0
    dropout: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class _DrawOrder:
    """modules: (name, in, out) in the order in which PEFT draws them; dtype: what PEFT rounds them to before fp32."""

    modules: tuple[tuple[str, int, int], ...]
    dtype: Any


class AdapterInitializer:
    """Initialises adapters for one base, which has no adapter before and after every call."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self._orders: dict[str, _DrawOrder | None] = {}
        self._one = threading.Lock()

    def make(self, method: Method, seed: int) -> AdapterInit:
        """The initial adapter of a run of this method and seed. Raises UserError where the method does not fit the model."""
        config = method.config  # type: ignore[attr-defined]
        key = repr(sorted((k, str(v)) for k, v in vars(config).items() if k not in ("r", "lora_alpha", "use_rslora", "lora_dropout")))
        with self._one:  # PEFT changes the base while it wraps it, and draws from the generator that all threads share
            order = self._orders.get(key)
            if order is None:
                made = self._by_peft(method, seed)
                self._orders[key] = self._draw_order(config, made, seed)
                return made
        scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        return AdapterInit(_draw(order, config.r, seed), scale, config.lora_dropout, seed)

    def template(self, method: Method, names: set[str], rank: int, dropout: float = 0.0) -> contextlib.AbstractContextManager[Any]:
        """A context with the base in an adapter that fits every run of a pack: LoRA of this rank on `names`, the union of their modules."""
        config = copy.deepcopy(method.config)  # type: ignore[attr-defined]
        if not config.is_prompt_learning:
            config.r, config.target_modules, config.init_lora_weights, config.lora_dropout = rank, sorted(names), True, dropout
        return self.wrapped(dataclasses.replace(method, config=config))  # type: ignore[call-arg]

    def names(self, method: Method) -> set[str]:
        return {name.removeprefix(PREFIX).removesuffix(A) for name in self._by_peft(method, 0).weights if name.endswith(A)}

    @contextlib.contextmanager
    def wrapped(self, method: Method, weights: Weights | None = None) -> Iterator[Any]:
        """A context with the base in this method's adapter, with these weights (None: as initialised)."""
        assert not hasattr(self.base, "peft_config"), "one adapter at a time is around the base"
        model = method.wrap(self.base)
        try:
            for name, parameter in model.named_parameters():
                if weights and name in weights:
                    parameter.data.copy_(weights[name])
            yield model
        finally:
            if not method.soft_prompt:
                model.unload()
            if hasattr(self.base, "peft_config"):
                del self.base.peft_config

    def _by_peft(self, method: Method, seed: int) -> AdapterInit:
        torch.manual_seed(seed)
        with self.wrapped(method) as model:
            weights = {n: p.detach().float().to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad}
            scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
        if len(scales) > 1:
            raise Unsupported("LoRA with several scales has no hand-written step")
        return AdapterInit(weights, scales.pop() if scales else 1.0, getattr(method.config, "lora_dropout", 0.0), seed)  # type: ignore[attr-defined]

    def _draw_order(self, config: Any, made: AdapterInit, seed: int) -> _DrawOrder | None:
        """How to draw such weights without PEFT; None where that does not give what PEFT gave."""
        if getattr(config, "init_lora_weights", None) is not True:
            return None
        names = [n.removesuffix(A) for n in made.weights if n.endswith(A)]
        modules = tuple((n, made.weights[n + A].shape[1], made.weights[n + B].shape[0]) for n in names)
        for dtype in (torch.float32, self.base.dtype):
            order = _DrawOrder(modules, dtype)
            drawn = _draw(order, config.r, seed)
            if drawn.keys() == made.weights.keys() and all(torch.equal(drawn[n], w) for n, w in made.weights.items()):
                return order
        return None


def _draw(order: _DrawOrder, rank: int, seed: int) -> Weights:
    """As PEFT's update_layer: A and B as torch.nn.Linear draws them, then A once more and B zero."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, inputs, outputs in order.modules:
        torch.empty((inputs + outputs) * rank).uniform_(generator=generator)
        a = torch.nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=math.sqrt(5), generator=generator)
        weights[name + A] = a.to(order.dtype).float()
        weights[name + B] = torch.zeros(outputs, rank)
    return weights


class Slots:
    """Puts adapters into the slots of a bound model, and takes them out."""

    def __init__(self, bound: Any) -> None:
        self.buffer, self.pairs, self.llama = bound.buffer, bound.pairs, bound.llama

    def put(self, slot: int, init: AdapterInit) -> None:
        """Replace the slot's adapter by this one. Numbers beyond it (a lower rank, fewer modules) are zero and stay zero."""
        self.buffer.clear(slot)
        self.buffer.scale[slot], self.buffer.dropout[slot], self.buffer.seed[slot] = init.scale, init.dropout, init.seed
        for view, value in self._views(slot, init.weights):
            view.copy_(value)
        self.buffer.sync()

    def take(self, slot: int, like: Weights) -> Weights:
        """The slot's weights on the CPU. like: weights of the same names and shapes."""
        return {name: view.to("cpu", copy=True) for (view, _), name in zip(self._views(slot, like), like, strict=True)}

    def _views(self, slot: int, weights: Weights) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for name, value in weights.items():
            if name == PROMPT:
                yield self.buffer.master[slot].view(value.shape), value
                continue
            module, kind = re.fullmatch(rf"{re.escape(PREFIX)}(.*)\.lora_([AB])\.default\.weight", name).groups()  # type: ignore[union-attr]
            a, b = self.pairs[module]
            yield (a[slot, : value.shape[0]] if kind == "A" else b[slot, :, : value.shape[1]]), value
