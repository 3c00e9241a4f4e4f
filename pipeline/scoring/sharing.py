"""What it costs that rows of one batch are answered by different adapters over one base: how long 1, 8 and 64 adapters take.

Library; a cell measures with it. PEFT's mixed-batch inference gives every row the adapter that `adapter_names` names for it; it has that for LoRA.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.measure import clock
from pipeline.methods.base import Method
from pipeline.scoring import scorer as scoring

REPEATS = 3


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
    if method.sharing == "no" or scorer.reasoning or not counts or not rows:
        return None
    model, wrapped = scorer.model, hasattr(scorer.model, "peft_config")
    experts = any(getattr(config, "target_parameters", None) for config in getattr(model, "peft_config", {}).values())
    together = method.sharing == "together" and not experts  # PEFT's layers for experts take no mixed batch
    many = {n: [dict(rows[i % len(rows)]) for i in range(n)] for n in counts}
    copies = _copies(model, max(counts)) if wrapped and together else []
    adapters: dict[str, float] = {}
    one_adapter: dict[str, float] = {}
    try:
        for count, batch in many.items():
            one_adapter[str(count)] = _seconds(functools.partial(_answer, scorer, batch, scoring.WHOLE), scorer.device)
            if wrapped and not together:
                adapters[str(count)] = _one_by_one(scorer, batch)
            elif wrapped:
                adapters[str(count)] = _seconds(functools.partial(_answer, scorer, batch, copies[: len(batch)]), scorer.device)
            else:
                adapters[str(count)] = one_adapter[str(count)]
    finally:
        for name in copies[1:]:
            model.delete_adapter(name)
    return Shared(adapters, one_adapter, together)


def _answer(scorer: scoring.Scorer, rows: Sequence[dict], owners: Sequence[str]) -> None:
    items = scorer.items(rows)
    if scorer.task.scoring == "choice":
        scorer.log_likelihoods(items, owners)
    else:
        scorer.texts(items, owners)


def _seconds(call: Callable[[], None], device: Any) -> float:
    seconds = clock.latency_s(lambda _: call(), [None] * REPEATS, device)
    assert seconds is not None
    return seconds


def _one_by_one(scorer: scoring.Scorer, rows: Sequence[dict]) -> float:
    """Requests one after another, the adapter chosen anew before each."""
    watch = clock.Stopwatch(scorer.device)
    for row in rows:
        scorer.model.set_adapter(scorer.model.active_adapter)
        _answer(scorer, [row], scoring.WHOLE)
    return watch.lap()


def _copies(model: Any, count: int) -> list[str]:
    """Names of the model's adapter and of copies of it, `count` in all."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    name = model.active_adapter
    weights = get_peft_model_state_dict(model, adapter_name=name)
    names = [name]
    for number in range(1, count):
        config = copy.deepcopy(model.peft_config[name])
        config.init_lora_weights, config.inference_mode = False, True
        model.add_adapter(f"copy{number}", config)
        set_peft_model_state_dict(model, weights, adapter_name=f"copy{number}")
        names.append(f"copy{number}")
    model.set_adapter(name)
    return names
