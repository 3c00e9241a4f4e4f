"""What an adapter is before its first step, exactly as a run of its own begins: PEFT's own initialisation under the run's seed.

Library. Wrapping a model in PEFT takes a third of a second at 30 layers, so LoRA's default initialisation is drawn here after it
has been seen to give the same numbers as PEFT's.
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
class Start:
    """An adapter's weights on the CPU, what LoRA's product is multiplied by, its dropout and that one's seed."""

    weights: Weights
    scale: float = 1.0
    dropout: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class _Plan:
    """The names in the order in which PEFT draws them, the inputs and outputs of each; `dtype`: what PEFT rounds them to on its way."""

    modules: tuple[tuple[str, int, int], ...]
    dtype: Any


class Starts:
    """Gives adapters their start over one base, which is bare again after every call."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self._plans: dict[str, _Plan | None] = {}
        self._one = threading.Lock()

    def make(self, method: Method, seed: int) -> Start:
        """The start of a run of this method and seed. Raises UserError where the method does not fit the model."""
        config = method.config  # type: ignore[attr-defined]
        key = repr(sorted((k, str(v)) for k, v in vars(config).items() if k not in ("r", "lora_alpha", "use_rslora", "lora_dropout")))
        with self._one:  # PEFT changes the base while it wraps it, and draws from the generator that all threads share
            plan = self._plans.get(key)
            if plan is None:
                made = self._by_peft(method, seed)
                self._plans[key] = self._plan(config, made, seed)
                return made
        scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        return Start(_draw(plan, config.r, seed), scale, config.lora_dropout, seed)

    def template(self, method: Method, names: set[str], rank: int, dropout: float = 0.0) -> contextlib.AbstractContextManager[Any]:
        """A model with room for every run of a pack: LoRA of this rank on the union of their modules; inside the context only."""
        config = copy.deepcopy(method.config)  # type: ignore[attr-defined]
        if not config.is_prompt_learning:
            config.r, config.target_modules, config.init_lora_weights, config.lora_dropout = rank, sorted(names), True, dropout
        return self.wrapped(dataclasses.replace(method, config=config))  # type: ignore[call-arg]

    def names(self, method: Method) -> set[str]:
        """The modules that the method adapts."""
        return {name.removeprefix(PREFIX).removesuffix(A) for name in self._by_peft(method, 0).weights if name.endswith(A)}

    @contextlib.contextmanager
    def wrapped(self, method: Method, weights: Weights | None = None) -> Iterator[Any]:
        """The base in this method's adapter, with these weights; inside the context only."""
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

    def _by_peft(self, method: Method, seed: int) -> Start:
        torch.manual_seed(seed)
        with self.wrapped(method) as model:
            weights = {n: p.detach().float().to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad}
            scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
        if len(scales) > 1:
            raise Unsupported("LoRA with several scales has no hand-written step")
        return Start(weights, scales.pop() if scales else 1.0, getattr(method.config, "lora_dropout", 0.0), seed)  # type: ignore[attr-defined]

    def _plan(self, config: Any, made: Start, seed: int) -> _Plan | None:
        """How to draw such a start without PEFT; None where that does not give what PEFT gave."""
        if getattr(config, "init_lora_weights", None) is not True:
            return None
        names = [n.removesuffix(A) for n in made.weights if n.endswith(A)]
        modules = tuple((n, made.weights[n + A].shape[1], made.weights[n + B].shape[0]) for n in names)
        for dtype in (torch.float32, self.base.dtype):
            plan = _Plan(modules, dtype)
            drawn = _draw(plan, config.r, seed)
            if drawn.keys() == made.weights.keys() and all(torch.equal(drawn[n], w) for n, w in made.weights.items()):
                return plan
        return None


def _draw(plan: _Plan, rank: int, seed: int) -> Weights:
    """As PEFT's update_layer: A and B as torch.nn.Linear draws them, then A once more and B zero."""
    generator = torch.Generator().manual_seed(seed)
    found: Weights = {}
    for name, inputs, outputs in plan.modules:
        torch.empty((inputs + outputs) * rank).uniform_(generator=generator)
        a = torch.nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=math.sqrt(5), generator=generator)
        found[name + A] = a.to(plan.dtype).float()
        found[name + B] = torch.zeros(outputs, rank)
    return found


class Slots:
    """Puts adapters into the slots of a bound model, and takes them out."""

    def __init__(self, bound: Any) -> None:
        self.flat, self.pairs, self.llama = bound.flat, bound.pairs, bound.llama

    def put(self, slot: int, start: Start) -> None:
        """Everything that the slot held is forgotten. Places that the adapter does not have (a higher rank, other modules) are zero and stay zero."""
        self.flat.clear(slot)
        self.flat.scale[slot], self.flat.dropout[slot], self.flat.seed[slot] = start.scale, start.dropout, start.seed
        for view, value in self._views(slot, start.weights):
            view.copy_(value)
        self.flat.sync()

    def take(self, slot: int, like: Weights) -> Weights:
        """The slot's adapter on the CPU; `like`: its names and shapes."""
        return {name: view.to("cpu", copy=True) for (view, _), name in zip(self._views(slot, like), like, strict=True)}

    def _views(self, slot: int, weights: Weights) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for name, value in weights.items():
            if name == PROMPT:
                yield self.flat.master[slot].view(value.shape), value
                continue
            module, kind = re.fullmatch(rf"{re.escape(PREFIX)}(.*)\.lora_([AB])\.default\.weight", name).groups()  # type: ignore[union-attr]
            a, b = self.pairs[module]
            yield (a[slot, : value.shape[0]] if kind == "A" else b[slot, :, : value.shape[1]]), value
