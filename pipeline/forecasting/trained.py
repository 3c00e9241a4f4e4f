"""What a technique trains, from its config alone: how many numbers, and where in the model they are.

Library. Counts are those of `size.trainable` in a result (tests/test_forecast_trained.py compares every technique of conf/ with the
real model). What memory it takes is known for the kinds that eager.py and fast.py walk through; others have counts alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.core.files import read_json
from pipeline.core.names import class_of, name_of
from pipeline.engine import options
from pipeline.forecasting.shape import LLAMAS, NoForecast, Shape

IA3_TARGETS, IA3_INNER = ("k_proj", "v_proj", "down_proj"), ("down_proj",)
NOTHING = ("untouched", "few_shot", "teacher", "retrieval", "prompt_choice")


@dataclass(frozen=True)
class Trained:
    """kind: full (parts of the base itself), lora, soft (a prompt before the rows), ia3, ln, none; other: counts alone."""

    kind: str
    count: int
    name: str
    parts: frozenset[str] = frozenset()
    """full: of embedding, layers, norm, head, biases."""
    first: int = 0
    """full: the first layer that is trained."""
    own_head: bool = False
    """full: an output layer of its own where the base has a tied one."""
    ranks: dict[str, int] = field(default_factory=dict)
    """lora: rank by linear map."""
    dropout: float = 0.0
    by_hand: bool = True
    """lora: whether the fast engine's hand-written step has it."""
    virtual: int = 0
    added_biases: bool = False
    sizes: tuple[int, ...] = ()
    """Numbers of each trained tensor of a soft prompt."""


def trained(method: dict[str, Any], shape: Shape) -> Trained:
    """What a method's config (with its `type`) trains of a model. Raises NoForecast: a method that this file does not know."""
    owner = name_of(method, "method")
    if owner in NOTHING:
        return Trained("none", 0, owner)
    if owner == "full":
        return Trained("full", shape.parameters, "full", frozenset({"embedding", "layers", "norm", "head"}))
    if owner == "selective":
        return _selective(method, shape)
    if owner == "from_file":
        path = Path(method["path"])
        return _adapter(read_json(path / "adapter_config.json" if path.is_dir() else path), shape, True)
    if owner == "alora":  # it names its tokens when it has read the rows
        raise NoForecast("no forecast for LoRA with alora_invocation_tokens")
    declared = class_of(method, "method")
    if declared.peft and not declared.corrects_gradients:
        kind = name_of(method["config"], "peft", "method.config").removesuffix("Config")
        config = {k: v for k, v in method["config"].items() if k not in ("type", "_target_")}
        return _adapter({**config, "peft_type": PEFT_NAMES.get(kind, kind.upper())}, shape, not declared.own_optimizer_groups)
    raise NoForecast(f"no forecast for method {owner}")


PEFT_NAMES = {"PromptTuning": "PROMPT_TUNING", "PromptEncoder": "P_TUNING", "PrefixTuning": "PREFIX_TUNING", "LNTuning": "LN_TUNING",
              "MultitaskPromptTuning": "MULTITASK_PROMPT_TUNING"}
"""PEFT's config classes whose peft_type in its files is not their name in capitals."""


def _selective(method: dict[str, Any], shape: Shape) -> Trained:
    parts = {{"final_norm": "norm", "embeddings": "embedding"}.get(part, part) for part in method["parts"]}
    first = shape.layers - (method.get("top_layers") or shape.layers)
    if not parts & {"layers", "biases"}:
        first = shape.layers
    own_head = "head" in parts and "embedding" not in parts and shape.tied
    what = Trained("full", 0, method.get("label", "selective"), frozenset(parts), first, own_head, added_biases=bool(method.get("add_biases")))
    what = replace(what, count=sum(_base_sizes(what, shape)))
    return replace(what, first=0) if "embedding" in parts else what


def _targets(config: dict[str, Any], shape: Shape) -> tuple[str, ...]:
    wanted = config.get("target_modules")
    if wanted == "all-linear":
        return shape.linears
    if wanted is None:
        return ("q_proj", "v_proj")
    if isinstance(wanted, str) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        raise NoForecast("no forecast for an adapter whose modules are chosen by a pattern")
    unknown = [name for name in wanted if name not in shape.linears]
    if unknown:
        raise NoForecast(f"no forecast for an adapter on {unknown[0]}")
    return tuple(name for name in shape.linears if name in wanted)


def _adapter(config: dict[str, Any], shape: Shape, one_rate: bool) -> Trained:
    """one_rate: all that it trains learns at one rate."""
    kind = config["peft_type"]
    if kind == "LORA":
        return _lora(config, shape, one_rate)
    if kind in SOFT:
        virtual = config["num_virtual_tokens"]
        sizes = tuple(SOFT[kind](config, shape))
        return Trained("soft", sum(sizes), kind.lower(), virtual=virtual, sizes=sizes, by_hand=kind == "PROMPT_TUNING")
    if shape.family not in LLAMAS:
        raise NoForecast(f"no forecast for method {kind.lower()} on {shape.family}")
    if kind == "IA3":
        targets = tuple(config.get("target_modules") or IA3_TARGETS)
        inner = config.get("feedforward_modules") or IA3_INNER
        if any(name not in shape.linears for name in targets):
            raise NoForecast("no forecast for IA3 on other modules than a layer's linear maps")
        count = shape.layers * sum(shape.linear(name)[0 if name in inner else 1] for name in targets)
        return Trained("ia3", count, "ia3", ranks=dict.fromkeys(targets, 1))
    if kind == "LN_TUNING" and config.get("target_modules") is None:
        return Trained("ln", (2 * shape.layers + 1) * shape.width, "ln_tuning")
    if kind == "PREFIX_TUNING":
        if config.get("prefix_projection"):
            raise NoForecast("no forecast for prefix tuning with a projection")
        return Trained("other", config["num_virtual_tokens"] * shape.layers * 2 * shape.groups * shape.head, "prefix_tuning")
    if kind not in COUNTS:
        raise NoForecast(f"no forecast for method {kind.lower()}")
    each = sum(COUNTS[kind](config, *shape.linear(name)) for name in _targets(config, shape))
    return Trained("other", shape.layers * each, kind.lower())


def _lora(config: dict[str, Any], shape: Shape, one_rate: bool) -> Trained:
    rank, targets = config["r"], _targets(config, shape)
    if odd := options.unknown("LORA", options.switched_on(config)):
        raise NoForecast(f"no forecast for LoRA with {odd}")
    count = shape.layers * sum(rank * sum(shape.linear(name)) for name in targets)
    if config.get("use_dora"):
        return Trained("other", count + shape.layers * sum(shape.linear(name)[1] for name in targets), "dora")
    return Trained("lora", count, "lora", ranks=dict.fromkeys(targets, rank), dropout=float(config.get("lora_dropout") or 0.0),
                   by_hand=one_rate)


def _multitask(config: dict[str, Any], shape: Shape) -> list[int]:
    n, tasks, ranks = config["num_virtual_tokens"], config.get("num_tasks", 1), config.get("num_ranks", 1)
    return [n * shape.width, tasks * n * ranks, tasks * ranks * shape.width]


def _encoder(config: dict[str, Any], shape: Shape) -> list[int]:
    d, h = shape.width, config.get("encoder_hidden_size") or shape.width
    if config.get("encoder_reparameterization_type", "MLP") != "MLP":
        raise NoForecast("no forecast for P-tuning with an LSTM")
    return [config["num_virtual_tokens"] * d, d * h, h, h * h, h, h * d, d]


def _factors(size: int, wanted: int) -> tuple[int, int]:
    """Two factors of `size`, the first the smaller, as LoKr (LyCORIS) chooses them: at most `wanted`, or next to the square root (-1)."""
    most = math.isqrt(size) if wanted == -1 else min(wanted, size)
    if wanted > 0 and size % wanted == 0:
        return wanted, size // wanted
    small = max(n for n in range(1, most + 1) if size % n == 0)
    return tuple(sorted((small, size // small)))  # type: ignore[return-value]


def _lokr(config: dict[str, Any], i: int, o: int) -> int:
    rank, wanted = config["r"], config.get("decompose_factor", -1)
    (out_small, out_large), (in_small, in_large) = _factors(o, wanted), _factors(i, wanted)
    both = config.get("decompose_both") and rank < max(out_small, in_small) / 2
    first = rank * (out_small + in_small) if both else out_small * in_small
    return first + (rank * (out_large + in_large) if rank < max(out_large, in_large) / 2 else out_large * in_large)


def _oft(config: dict[str, Any], i: int, o: int) -> int:
    size = config.get("oft_block_size") or i // config["r"]
    return i // size * (size * (size - 1) // 2)


SOFT: dict[str, Callable[[dict[str, Any], Shape], list[int]]] = {
    "PROMPT_TUNING": lambda config, shape: [config["num_virtual_tokens"] * shape.width], "MULTITASK_PROMPT_TUNING": _multitask, "P_TUNING": _encoder,
}
COUNTS: dict[str, Callable[[dict[str, Any], int, int], int]] = {
    "ADALORA": lambda c, i, o: c["init_r"] * (i + o + 1),
    "LOHA": lambda c, i, o: 2 * c["r"] * (i + o),
    "LOKR": _lokr,
    "VERA": lambda c, i, o: c["r"] + o,
    "OFT": _oft,
}
"""Trained numbers of one linear map, by PEFT's name of the adapter."""


def parameter_sizes(what: Trained, shape: Shape) -> list[int]:
    """Numbers of every trained tensor; none for a kind that has counts alone."""
    if what.kind == "soft":
        return list(what.sizes)
    if what.kind == "lora":
        return [rank * size for _ in range(shape.layers) for name, rank in what.ranks.items() for size in shape.linear(name)]
    if what.kind == "ia3":
        return [shape.linear(name)[0 if name in IA3_INNER else 1] for _ in range(shape.layers) for name in what.ranks]
    if what.kind == "ln":
        return [shape.width] * (2 * shape.layers + 1)
    return _base_sizes(what, shape) if what.kind == "full" else []


def _base_sizes(what: Trained, shape: Shape) -> list[int]:
    whole = shape.vocabulary * shape.width
    sizes = [whole] if "embedding" in what.parts else []
    for _ in range(what.first, shape.layers):
        if "layers" in what.parts:
            sizes += [i * o for i, o in map(shape.linear, shape.linears)]
        if {"layers", "biases"} & what.parts:
            sizes += [shape.linear(name)[1] for name in (shape.linears if what.added_biases else shape.biases)]
        if "layers" in what.parts:
            sizes += shape.norms.values()
    sizes += [shape.width] if "norm" in what.parts else []
    return sizes + ([whole] if "head" in what.parts and (not shape.tied or what.own_head) else [])
