"""The modules of a transformers model that the hand-written step knows, and their frozen weights stacked.

Library of bind.py. A model that is not known raises Unsupported with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipeline.engine import families, ops
from pipeline.engine.linear import Linears
from pipeline.engine.llama import Angles, Layer, Llama, Norm
from pipeline.engine.ops import Tensor

HEAD_NORMS = ("q_norm", "k_norm")
KNOWN = ("torch", "transformers", "peft", "bitsandbytes")
"""Packages whose modules and hooks a model may have."""


class Unsupported(Exception):
    """The reason why a model or technique is not supported here, one clause."""


class Parts:
    """The modules of a supported base, checked."""

    def __init__(self, base: Any, dtype: Any, move: bool = True) -> None:
        """move: whether weights may be given other memory than they have."""
        config = base.config
        if reason := families.refused(config):
            raise Unsupported(reason)
        if changed := next((name for name, module in base.named_modules() if _changed(module)), None):
            raise Unsupported(f"its module {changed or 'at the top'} does more than its class says")
        self.base, self.config, self.dtype, self.move = base, config, dtype, move
        self.model, self.layers = base.model, list(base.model.layers)
        self.family = families.FAMILIES[config.model_type]
        self.rotations = list(families.rotations(config))
        self.tied = base.lm_head.weight is self.model.embed_tokens.weight
        scale = getattr(self.model.embed_tokens, "embed_scale", None)
        self.scale = 1.0 if scale is None else float(scale.to(self.model.embed_tokens.weight.dtype))
        """What input embeddings are multiplied by."""
        self.moved: list[Any] = []
        """Frozen linear modules whose weights are now views of a stack."""
        self._angles: dict[int, Angles] = {}

    def groups(self) -> Iterator[tuple[int, int, list[tuple[str, Any]]]]:
        """(layer, index in Family.groups, [(name, module)]) of every stack of linear maps."""
        for at, layer in enumerate(self.layers):
            for index, (owner, names) in enumerate(self.family.groups):
                modules = [(f"model.layers.{at}.{owner}.{n}", getattr(getattr(layer, owner), n)) for n in names]
                odd = next((m for _, m in modules if not hasattr(m, "in_features")), None)
                if odd is not None:
                    raise Unsupported(f"a linear layer of it is a {type(odd).__name__}")
                yield at, index, modules

    def angles(self, t: int) -> Angles:
        """cos, sin of positions 0 to t - 1 in the arithmetic's dtype, made once for each t."""
        if t not in self._angles:
            device = self.model.embed_tokens.weight.device
            probe, at = torch.empty(0, device=device, dtype=self.dtype), torch.arange(t, device=device)[None]
            made = [self.model.rotary_emb(probe, at, *([name] if name else [])) for name in self.rotations]
            self._angles[t] = [(cos[0].to(self.dtype).contiguous(), sin[0].to(self.dtype).contiguous()) for cos, sin in made]
        return self._angles[t]

    def norms(self) -> list[Any]:
        family = self.family
        inside = [getattr(layer, name) for layer in self.layers for name in (*family.norms, *family.after)]
        heads = [getattr(layer.self_attn, name) for layer in self.layers for name in HEAD_NORMS] if family.head_norms else []
        return [*inside, *heads, self.model.norm]

    def frozen(self, weight: Any) -> Tensor:
        """A frozen weight, which has the arithmetic's dtype."""
        if weight.dtype != self.dtype:
            raise Unsupported(f"the base is held in {str(weight.dtype).removeprefix('torch.')}, the arithmetic is {str(self.dtype).removeprefix('torch.')}")
        return weight.detach()

    def build(self, groups: dict[tuple[int, int], Linears], norms: Callable[[Any], Norm], embedding: Tensor, head: Tensor, lowest: int) -> Llama:
        """The Llama of these stacks by (layer, index in Family.groups). norms: from a norm's module; lowest: as in Llama."""
        family, config, types = self.family, self.config, families.layer_types(self.config)

        def norm(module: Any) -> Norm:
            return dataclasses.replace(norms(module), eps=config.rms_norm_eps, plus=family.plus)

        layers = []
        for at, layer in enumerate(self.layers):
            qkv, out, gate_up, down = (groups[at, index] for index in range(4))
            first, second = (norm(getattr(layer, name)) for name in family.norms)
            rotation = self.rotations.index(types[at]) if types[at] in self.rotations else 0
            built = Layer(first, qkv, out, second, gate_up, down, families.heads(config, at), gelu=family.gelu, rotation=rotation)
            if family.after:
                built.after1, built.after2 = (norm(getattr(layer, name)) for name in family.after)
            if family.head_norms:
                built.q_norm, built.k_norm = (norm(getattr(layer.self_attn, name)) for name in HEAD_NORMS)
            layers.append(built)
        last = norm(self.model.norm)
        if bool((last.weight.float() + last.plus == 0).any()):  # it is `exact`: its backward could not read its input off its output
            raise Unsupported("its last norm multiplies a number by zero")
        return Llama(embedding, layers, last, head, self.angles, config.intermediate_size, self.scale, lowest)

    def frozen_build(self, groups: dict[tuple[int, int], Linears], lowest: int) -> Llama:
        """As `build`, with norms, embedding and head frozen."""
        embedding = self.frozen(self.model.embed_tokens.weight)
        return self.build(groups, lambda m: Norm(self.frozen(m.weight)), embedding, self.frozen(self.base.lm_head.weight), lowest)


def _changed(module: Any) -> bool:
    """Whether a hook or a replaced forward makes the module do something else than its class."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    makers = [getattr(getattr(hook, "func", hook), "__module__", "") for hook in hooks] + [type(module).__module__]
    return "forward" in vars(module) or any(maker.split(".")[0] not in KNOWN for maker in makers)


def stack(parts: Parts, modules: list[tuple[str, Any]], room: int = 0, under: int = 0) -> tuple[Callable[[], Tensor], Tensor | None, list[tuple[int, int]]]:
    """(weight [out + under, in + room], bias [out], (lo, hi) of each module's rows) of frozen linear modules, stacked.

    The last rows and columns are zeros to write adapters to (Linears.room, under); weights in 4 bits have no such rows. If parts.move, the
    modules' weights become views of the stack.
    """
    linear = [getattr(m, "base_layer", m) for _, m in modules]
    ends = [0]
    for module in linear:
        ends.append(ends[-1] + module.out_features)
    spans = list(zip(ends, ends[1:], strict=False))
    added = biases(modules)
    bias = torch.cat([parts.frozen(b) for b in added]) if added else None
    if all(hasattr(m.weight, "quant_state") for m in linear):
        if any(m.weight.quant_state.dtype != parts.dtype for m in linear):
            raise Unsupported("its 4-bit weights come back in another dtype than the arithmetic's")
        return _dequantised([m.weight for m in linear], spans, room), bias, spans
    if any(type(m.weight) is not torch.nn.Parameter for m in linear):
        raise Unsupported(f"weights of type {type(linear[0].weight).__name__} have no hand-written step")
    weights = [parts.frozen(m.weight) for m in linear]
    if len(weights) == 1 and not room and not under:
        return lambda: weights[0], bias, spans
    width = weights[0].shape[1]
    stacked = weights[0].new_zeros(ends[-1] + under, width + room)
    for module, weight, (lo, hi) in zip(linear, weights, spans, strict=True):
        stacked[lo:hi, :width] = weight
        if parts.move:
            module.weight.data = stacked[lo:hi, :width]
    parts.moved += linear if parts.move else []
    return lambda: stacked, bias, spans


def biases(modules: list[tuple[str, Any]]) -> list[Any]:
    """Those of linear modules that read the same input; none have, or all. Raises Unsupported for any other."""
    vectors = [bias for _, m in modules if (bias := getattr(m, "base_layer", m).bias) is not None]
    if vectors and (len(vectors) < len(modules) or len(modules) == 1):
        raise Unsupported("its linear layers have biases where the hand-written step has none")
    return vectors


def _dequantised(weights: list[Any], spans: list[tuple[int, int]], room: int) -> Callable[[], Tensor]:
    """A function that gives 4-bit weights in the arithmetic's dtype, stacked, in new memory at every call."""

    def weight() -> Tensor:
        width = weights[0].quant_state.shape[1]
        out = torch.empty(spans[-1][1], width + room, device=weights[0].device, dtype=weights[0].quant_state.dtype)
        if room:
            out[:, width:].zero_()
        for w, (lo, hi) in zip(weights, spans, strict=True):
            ops.dequantise_nf4_(out[lo:hi, :width], w.data, w.quant_state)
        return out

    return weight


def with_columns(weight: Callable[[], Tensor], pairs: list[tuple[Tensor, slice, slice]]) -> Callable[[], Tensor]:
    """`weight` with each tensor of `pairs` written into [rows, columns] of its result."""

    def written() -> Tensor:
        out = weight()
        for part, rows, columns in pairs:
            out[rows, columns] = part
        return out

    return written
