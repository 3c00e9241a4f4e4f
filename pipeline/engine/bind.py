"""From a transformers or PEFT model to the hand-written Llama over the same memory.

Library. No second copy of the weights stays: frozen weights are stacked once and the modules' weights become views of the stack,
trained ones become views of a ParameterBuffer's masters. A model that this file does not know raises Unsupported with the reason,
and the caller trains by autograd.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from pipeline.engine import ops, options
from pipeline.engine.buffer import ParameterBuffer, Region
from pipeline.engine.dora import Magnitudes
from pipeline.engine.families import WIDE
from pipeline.engine.layout import padded
from pipeline.engine.linear import Linears, LoraPair
from pipeline.engine.llama import Llama, Norm
from pipeline.engine.ops import Tensor
from pipeline.engine.parts import Parts, Unsupported, biases, stack, with_columns
from pipeline.measure.memory import free_bytes

COPY_SHARE = 0.5
"""Of the free memory that a copy of a pinned model's weights may take while it answers."""


@dataclass
class Bound:
    """A model bound to the hand-written step."""

    llama: Llama
    buffer: ParameterBuffer
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """LoRA: module name -> (A [K, r, in], B [K, out, r]) as views of the masters."""
    moved: list[Any] = field(default_factory=list)
    """Frozen modules whose weights are views of a stack."""

    def serve(self, model: Any) -> None:
        """Let `bound_to` find this for the model, whose parameters these are, until `release`."""
        _BOUND[model] = self

    def release(self) -> None:
        """Give every frozen module memory of its own for its weight again, laid out as before."""
        for model, bound in list(_BOUND.items()):
            if bound is self:
                del _BOUND[model]
        restore_weights(self.moved)


@dataclass
class Answering:
    """A model bound for answers alone."""

    llama: Llama
    moved: list[Any]

    def release(self) -> None:
        """As Bound.release."""
        restore_weights(self.moved)


_BOUND: WeakKeyDictionary[Any, Bound] = WeakKeyDictionary()
"""Model -> what trains it."""


PINNED: WeakSet[Any] = WeakSet()
"""Models whose weights must keep their memory, because a captured step reads it."""


def bound_to(model: Any, dtype: Any) -> Llama | None:
    """The Llama that trains this model at present in this dtype, to answer with; None: there is none, or it has soft prompts."""
    bound = _BOUND.get(model)
    return bound.llama if bound is not None and bound.llama.prompt is None and bound.llama.embedding.dtype == dtype else None


def restore_weights(modules: list[Any]) -> None:
    """Copy every module's weight out of the stack."""
    for module in modules:
        module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)


def bind(model: Any, dtype: Any, slots: int = 1, rank: int | None = None, accumulate: bool = False, dropout: bool = False, seed: int = 0) -> Bound:
    """Bind what `model` trains.

    Args:
        model: a PEFT model with LoRA or prompt tuning, or a plain model of which every parameter is trained.
        dtype: of the arithmetic.
        slots, rank: K runs at once, of at most this rank each (LoRA; the model's adapter says which modules).
            With one slot the model's parameters become the masters; with several the caller fills the slots.
        accumulate: several micro-batches a step.
        dropout: make room for dropout even if the model's adapter has none (the caller fills buffer.dropout and buffer.seed).
        seed: of the dropout.

    Raises:
        Unsupported: another architecture, adapter or option.
    """
    base, kind = _base(model, slots != 1)
    parts = Parts(base, dtype)
    if kind != "lora" and parts.family.large and dtype == torch.bfloat16:
        raise Unsupported("bf16 loses too much of its residual stream, which autocast keeps in fp32")
    if kind == "lora":
        dora = bool(model.active_peft_config.use_dora)
        trained = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if dora else [])]
        _check_trained(model, {f"base_model.model.{name}.{x}.default.weight" for name in _adapters(parts, dora) for x in trained})
        bound = _lora(parts, dtype, slots, rank, accumulate, dora)
        p = model.active_peft_config.lora_dropout
        if p or dropout:
            _set_dropout(bound, p, seed)
    elif kind == "prompt":
        _check_trained(model, {"prompt_encoder.default.embedding.weight"})
        bound = _prompt(model, parts, dtype, slots, accumulate)
    elif not all(p.requires_grad for p in model.parameters()):
        raise Unsupported("a part of the weights is frozen without an adapter")
    elif slots != 1:
        raise Unsupported("full fine-tuning runs are not packed: nothing of the base could be shared")
    else:
        bound = _full(parts, dtype, accumulate)
    return bound


def answering(model: Any, dtype: Any) -> Answering:
    """Bind `model` for answers: a plain one, or one with LoRA that is active and not merged. A pinned one's weights are copied, not moved.

    Raises:
        Unsupported: as bind, for soft prompts, and where there is no memory for a copy.
    """
    base, kind = _base(model)
    if kind == "prompt":
        raise Unsupported("a soft prompt stands before every row")
    parts = Parts(base, dtype, move=model not in PINNED)
    _adapters(parts)
    if not parts.move and _stacked_bytes(parts) > COPY_SHARE * free_bytes(next(base.parameters()).device):
        raise Unsupported("a captured step reads its weights, and there is no memory for a copy of them")
    groups = {}
    try:
        for layer, index, modules in parts.groups():
            weight, bias, spans = stack(parts, modules)
            groups[layer, index] = _adapted(Linears(weight, bias), modules, spans, dtype)
        return Answering(parts.frozen_build(groups, len(parts.layers)), parts.moved)
    except BaseException:
        restore_weights(parts.moved)
        raise


def _stacked_bytes(parts: Parts) -> int:
    """Of the copy; weights in 4 bits are not copied."""
    plain = [m for _, _, modules in parts.groups() for _, m in modules if not hasattr(getattr(m, "base_layer", m).weight, "quant_state")]
    return sum(m.in_features * m.out_features for m in plain) * parts.dtype.itemsize


def _adapted(linears: Linears, modules: list[tuple[str, Any]], spans: list[tuple[int, int]], dtype: Any) -> Linears:
    """`linears` with a copy of its modules' adapters as they are now, in the arithmetic's dtype."""
    members = [(m, span) for (_, m), span in zip(modules, spans, strict=True) if hasattr(m, "lora_A")]
    if any(m.merged or m.disable_adapters or m.active_adapters != ["default"] for m, _ in members):
        raise Unsupported("its adapters are merged or not active")
    if len({m.r["default"] for m, _ in members}) > 1:
        raise Unsupported("LoRA with several ranks has no hand-written step")
    if members:
        linears.a = torch.cat([m.lora_A["default"].weight.detach().to(dtype) for m, _ in members])[None]
        linears.pairs = [LoraPair(lo, hi, (m.lora_B["default"].weight.detach() * m.scaling["default"]).to(dtype)[None]) for m, (lo, hi) in members]
    return linears


def _base(model: Any, shared: bool = False) -> tuple[Any, str]:
    """(the base, full, lora or prompt). shared: as in options.refused."""
    config = getattr(model, "active_peft_config", None)
    if config is None:
        return model, "full"
    kind = config.peft_type.value
    if reason := options.refused(kind, options.changed(config), shared):
        raise Unsupported(reason)
    if model.active_adapters != ["default"] if kind == "LORA" else list(model.peft_config) != ["default"]:
        raise Unsupported("its adapter is not PEFT's default one alone")
    return (model.base_model.model, "lora") if kind == "LORA" else (model.base_model, "prompt")


def _check_trained(model: Any, known: set[str]) -> None:
    """Raise Unsupported unless exactly the known parameters are trained, by name."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if other := min(trained ^ known, default=None):
        what = f"it trains {other}, which" if other in trained else f"it does not train {other}, which otherwise"
        raise Unsupported(f"{what} has {'no' if other in trained else 'a'} hand-written step")


def _lora(parts: Parts, dtype: Any, slots: int, rank: int | None, accumulate: bool, dora: bool) -> Bound:
    adapted = _adapters(parts, dora)
    ranks = {m.r["default"] for m in adapted.values()}
    scales = {m.scaling["default"] for m in adapted.values()}
    if len(ranks) != 1 or len(scales) != 1:
        raise Unsupported("LoRA with several ranks or scales has no hand-written step")
    wide = rank or ranks.pop()
    rows = sum(m.out_features for m in adapted.values())
    regions = [Region(sum(wide * m.in_features for m in adapted.values())), Region(wide * rows, scaled=True), *([Region(rows)] if dora else [])]
    buffer = ParameterBuffer(slots, regions, next(iter(adapted.values())).weight.device, dtype, accumulate=accumulate)
    groups, pairs, copies = {}, {}, []
    at_a, at_b = 0, buffer.regions[0].size
    for layer, index, modules in parts.groups():
        count = sum(name in adapted for name, _ in modules)
        thin = count * wide if slots == 1 else 0
        room = padded(thin, modules[0][1].in_features) if WIDE[index] else 0
        four = any(hasattr(getattr(m, "base_layer", m).weight, "quant_state") for _, m in modules)
        under = 0 if four else padded(thin, sum(m.out_features for _, m in modules))
        weight, bias, spans = stack(parts, modules, room, under)
        linears = Linears(weight, bias, room=room, under=under)
        members = [(name, m, span) for (name, m), span in zip(modules, spans, strict=True) if name in adapted]
        if members:
            width, size = members[0][1].in_features, wide * members[0][1].in_features
            columns = []
            for j, (name, module, (lo, hi)) in enumerate(members):
                b = slice(at_b, at_b + (hi - lo) * wide)
                at_b = b.stop
                views = [numbers[:, b].view(slots, hi - lo, wide) for numbers in (buffer.compute, buffer.raw, buffer.master)]
                a = buffer.master[:, at_a + j * size : at_a + (j + 1) * size].view(slots, wide, width)
                linears.pairs.append(LoraPair(lo, hi, views[0], views[1]))
                pairs[name] = (a, views[2])
                columns.append((views[0][0], slice(lo, hi), slice(width + j * wide, width + (j + 1) * wide)))  # where B stands in W
                if slots == 1:
                    _adopt(module.lora_A["default"].weight, a[0])
                    _adopt(module.lora_B["default"].weight, views[2][0])
            span = slice(at_a, at_a + len(members) * size)
            linears.a, linears.da = (part[:, span].view(slots, len(members) * wide, width) for part in (buffer.compute, buffer.raw))
            at_a = span.stop
            if slots == 1 and all(one.hi == other.lo for one, other in zip(linears.pairs, linears.pairs[1:], strict=False)):
                linears.db = buffer.raw[0, b.stop - (linears.pairs[-1].hi - linears.pairs[0].lo) * wide : b.stop].view(-1, wide)
            if room and hasattr(members[0][1].base_layer.weight, "quant_state"):
                linears.weight = with_columns(weight, columns)
            elif room:
                copies += [(b_of, weight()[rows, cols]) for b_of, rows, cols in columns]
            if under:
                copies.append((linears.a[0], weight()[spans[-1][1] : spans[-1][1] + len(members) * wide, :width]))
        groups[layer, index] = linears
    buffer.scatter = ops.Scatter(copies)
    buffer.scale.fill_(scales.pop())
    if dora:
        _magnitudes(buffer, [g for g in groups.values() if g.pairs], [adapted[name].lora_magnitude_vector["default"].weight for name in pairs], wide)
    buffer.sync()
    lowest = min(layer for (layer, _), linears in groups.items() if linears.trained)
    return Bound(parts.frozen_build(groups, lowest), buffer, pairs, parts.moved)


def _magnitudes(buffer: ParameterBuffer, stacks: list[Linears], parameters: list[Any], rank: int) -> None:
    """Bind DoRA's magnitudes, the buffer's third region, which follow one another as the rows of B do."""
    at_b, at_m = buffer.regions[0].size, buffer.regions[0].size + buffer.regions[1].size
    m, dm = buffer.master[0, at_m:], buffer.raw[0, at_m:]
    for parameter, view in zip(parameters, m.split([len(p) for p in parameters]), strict=True):
        _adopt(parameter, view)
    buffer.renew = Magnitudes(stacks, m, dm, buffer.compute[0, at_b:at_m].view(-1, rank)).renew


def _adapters(parts: Parts, dora: bool = False) -> dict[str, Any]:
    """Name -> module with LoRA (or DoRA). Raises Unsupported for LoRA on any other module, and for its variants."""
    adapted = {name: module for _, _, modules in parts.groups() for name, module in modules if hasattr(module, "lora_A")}
    if variant := next((v for m in adapted.values() for v in m.lora_variant.values() if not (dora and type(v).__name__ == "DoraLinearVariant")), None):
        raise Unsupported(f"{type(variant).__name__} has no hand-written step")
    others = [n for n, m in parts.base.named_modules() if hasattr(m, "lora_A") and n not in adapted]
    if others:
        raise Unsupported(f"LoRA on {others[0]} has no hand-written step")
    return adapted


def _set_dropout(bound: Bound, p: float, seed: int) -> None:
    """Give all adapters dropout p, members numbered in the model's order."""
    buffer = bound.buffer
    buffer.dropout.fill_(p)
    buffer.seed.fill_(seed)
    noise = ops.Noise(buffer.dropout, buffer.seed, buffer.count, torch.zeros((), dtype=torch.long, device=buffer.seed.device))
    bound.llama.noise = noise
    member = 0
    for layer in bound.llama.layers:
        for linears in (layer.qkv, layer.out, layer.gate_up, layer.down):
            for pair in linears.pairs:
                pair.member, member = member, member + 1
            linears.noise = noise if linears.pairs else None


def _adopt(parameter: Any, view: Tensor) -> None:
    """Make a parameter this view of the masters, with its values copied."""
    view.copy_(parameter.data)
    parameter.data = view


def _prompt(model: Any, parts: Parts, dtype: Any, slots: int, accumulate: bool) -> Bound:
    embedding = model.prompt_encoder["default"].embedding.weight
    n, d = embedding.shape
    buffer = ParameterBuffer(slots, [Region(n * d)], embedding.device, dtype, accumulate=accumulate)
    if slots == 1:
        _adopt(embedding, buffer.master[0].view(n, d))
    buffer.sync()
    groups = {}
    for layer, index, modules in parts.groups():
        weight, bias, _ = stack(parts, modules)
        groups[layer, index] = Linears(weight, bias)
    llama = parts.frozen_build(groups, 0)
    llama.prompt, llama.dprompt = buffer.compute.view(slots, n, d), buffer.raw.view(slots, n, d)
    return Bound(llama, buffer, moved=parts.moved)


def _full(parts: Parts, dtype: Any, accumulate: bool) -> Bound:
    ordered: list[Any] = [parts.model.embed_tokens.weight]
    grouped: dict[tuple[int, int], tuple[list[Any], list[Any]]] = {}
    for layer, index, modules in parts.groups():
        grouped[layer, index] = [m.weight for _, m in modules], biases(modules)
        ordered += [p for several in grouped[layer, index] for p in several]
    ordered += [m.weight for m in parts.norms()] + ([] if parts.tied else [parts.base.lm_head.weight])
    if {id(p) for p in ordered} != {id(p) for p in parts.base.parameters()} or any(p.dtype != torch.float32 for p in ordered):
        raise Unsupported("it has parameters that the hand-written step does not know")
    buffer = ParameterBuffer(1, [Region(sum(p.numel() for p in ordered))], ordered[0].device, dtype, compute_copy=True, accumulate=accumulate)
    spans: dict[int, slice] = {}
    at = 0
    for parameter in ordered:
        spans[id(parameter)] = slice(at, at + parameter.numel())
        at += parameter.numel()
        _adopt(parameter, buffer.master[0, spans[id(parameter)]].view(parameter.shape))
    buffer.sync()

    def views(parameters: list[Any]) -> tuple[Tensor, Tensor]:
        span = slice(spans[id(parameters[0])].start, spans[id(parameters[-1])].stop)
        width = parameters[0].shape[1:]
        return buffer.compute[0, span].view(-1, *width), buffer.raw[0, span].view(-1, *width)

    groups = {}
    for key, (weights, added) in grouped.items():
        weight, dweight = views(weights)
        bias, dbias = views(added) if added else (None, None)
        groups[key] = Linears((lambda stacked: lambda: stacked)(weight), bias, dweight, dbias)
    embedding, dembedding = views([ordered[0]])
    head, dhead = (embedding, None) if parts.tied else views([parts.base.lm_head.weight])
    llama = parts.build(groups, lambda m: Norm(*views([m.weight])), embedding, head, 0)
    llama.dembedding, llama.dhead, llama.padding = dembedding, dhead, parts.model.embed_tokens.padding_idx
    return Bound(llama, buffer)
