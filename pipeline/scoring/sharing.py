"""What it costs that rows of one batch are answered by different adapters over one base: how long 1, 8 and 64 adapters take.

Library; a cell measures with it. PEFT's mixed-batch inference gives every row the adapter that `adapter_names` names for it; it has that for LoRA.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.measure import clock, turns
from pipeline.methods.base import Method
from pipeline.scoring import scorer as scoring

REPEATS = 3
"""Of a batch, at most."""
ENOUGH_S = 1.0
"""Seconds of a batch after which it is not repeated: what takes so long varies little, and 64 adapters take three of them."""


@dataclass(frozen=True)
class Shared:
    """What one base costs that many adapters share: seconds by number of requests ("1", "8", "64").

    adapters: every request by an adapter of its own. one_adapter: all by one adapter. mixed: whether `adapters` is one batch; else one request after another.
    """

    adapters: dict[str, float]
    one_adapter: dict[str, float]
    mixed: bool


def shared_latency(scorer: scoring.Scorer, method: Method, rows: Sequence[dict], counts: Sequence[int]) -> Shared | None:
    """Measure it on a cell's model with copies of its adapter, which are removed again; None where the method cannot share a base, or reasons first."""
    if method.sharing == "no" or scorer.alone or not counts or not rows:
        return None
    model, wrapped = scorer.model, hasattr(scorer.model, "peft_config")
    experts = any(getattr(config, "target_parameters", None) for config in getattr(model, "peft_config", {}).values())
    together = method.sharing == "together" and not experts  # PEFT's layers for experts take no mixed batch
    many = {n: [dict(rows[i % len(rows)]) for i in range(n)] for n in counts}
    one_adapter = {str(n): _seconds(functools.partial(_answer, scorer, batch, scoring.WHOLE), scorer) for n, batch in many.items()}
    if not wrapped:
        return Shared(dict(one_adapter), one_adapter, together)
    if not together:
        return Shared(_one_by_one(scorer, rows, counts), one_adapter, together)
    with contextlib.ExitStack() as stack:
        names = stack.enter_context(copied(model, max(counts)))
        adapters = {str(n): _seconds(functools.partial(_answer, scorer, batch, names[:n]), scorer) for n, batch in many.items()}
    return Shared(adapters, one_adapter, together)


def _answer(scorer: scoring.Scorer, rows: Sequence[dict], owners: Sequence[str]) -> None:
    items = scorer.items(rows)
    if scorer.task.scoring == "choice":
        scorer.log_likelihoods(items, owners)
    else:
        scorer.texts(items, owners)


def _seconds(call: Callable[[], None], scorer: scoring.Scorer) -> float:
    """Of a batch: the median of `REPEATS`, or of as many as take `ENOUGH_S`."""
    seconds = clock.latency_s(lambda _: call(), [None] * REPEATS, scorer.device, ENOUGH_S, functools.partial(_giving_way, scorer.model), turns.alone)
    assert seconds is not None
    return seconds


@contextlib.contextmanager
def _giving_way(model: Any) -> Iterator[None]:
    """Within, who waits to have the device alone goes first before each of the model's layers: 64 adapters take seconds for one pass, which is not captured."""
    from torch.nn import ModuleList

    layers = [layer for module in model.modules() if isinstance(module, ModuleList) for layer in module]
    hooks = [layer.register_forward_pre_hook(lambda *_: turns.point()) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _one_by_one(scorer: scoring.Scorer, rows: Sequence[dict], counts: Sequence[int]) -> dict[str, float]:
    """Requests one after another, the adapter chosen anew before each: seconds until so many were answered. More than there are rows are those again,
    and take as long again."""
    spent = [0.0]
    with turns.alone():
        watch = clock.Stopwatch(scorer.device)
        for row in rows[: max(counts)]:
            scorer.model.set_adapter(scorer.model.active_adapter)
            _answer(scorer, [row], scoring.WHOLE)
            spent.append(spent[-1] + watch.lap())
    return {str(n): n // len(rows) * spent[-1] + spent[n % len(rows)] for n in counts}


@contextlib.contextmanager
def copied(model: Any, count: int) -> Iterator[list[str]]:
    """Names of a PEFT model's adapter and of copies of it with weights of their own, `count` in all; the copies are gone afterwards.

    Written into the places that PEFT's layers list (and that their delete_adapter empties): its add_adapter looks through the whole model for each copy, and
    loading weights through all adapters that are there: most of the time that 64 of them took.
    """
    name = model.active_adapter
    names = [name, *(f"copy{number}" for number in range(1, count))]
    held = [place for layer in model.modules() if hasattr(layer, "adapter_layer_names") for place in _places(layer) if name in place]
    try:
        for copy_name in names[1:]:
            turns.point()
            for place in held:
                place[copy_name] = _copy(place[name])
            model.peft_config[copy_name] = copy.deepcopy(model.peft_config[name])
        yield names
    finally:
        for copy_name in names[1:]:
            for place in (*held, model.peft_config):
                if copy_name in place:
                    del place[copy_name]


def _places(layer: Any) -> Iterator[Any]:
    """What a layer of PEFT's holds by adapter: modules, parameters, numbers."""
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        if hasattr(place := getattr(layer, attribute, None), "__delitem__") and hasattr(place, "keys"):
            yield place


def _copy(part: Any) -> Any:
    """A module or parameter with numbers of its own; what holds none is shared."""
    from torch import Tensor
    from torch.nn import Module, Parameter

    if isinstance(part, Tensor):
        return Parameter(part.detach().clone(), requires_grad=False)
    if not isinstance(part, Module) or not any(True for _ in part.parameters()):
        return part
    if any(True for _ in part.children()) or any(True for _ in part.buffers()):
        return copy.deepcopy(part)
    twin = copy.copy(part)  # deepcopy takes ten times as long
    twin._parameters = {name: None if p is None else _copy(p) for name, p in part._parameters.items()}
    return twin
