"""What a whole cell takes, scoring included: seconds from the tokens that go through the model and how fast the machine multiplies; memory from forecast.

Library of the plan of `alignscope try` and of `alignscope fit`. A forecast of seconds is rough: within a factor of two on the CPUs that its constants
were tried on (docs/try.md), a guess on a card that nobody timed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core.compose import plain
from pipeline.core.files import UserError, read_object
from pipeline.data.choices import MANY
from pipeline.forecasting.cell import Card, forecast
from pipeline.forecasting.shape import NoForecast, Shape, read_shape
from pipeline.measure.speed import matmul_flops

CPU_SHARE = 0.5
"""Of the speed of a large product, what the products of a small model's step reach. This and the next four: by `python -m benchmarks.scoring` (docs/try.md)."""
SEARCHED = 0.25
"""Of the tokens of many choices, those that are fed: they are searched as a tree, and branches that cannot win are given up."""
AT_ONCE = 16
"""Rows whose work a step of writing takes besides that of its own rows: it reads all the weights."""
LEAD = 250
"""Tokens before all rows, fed once, with which a row's own take twice as long: their keys and values are read for every row."""
SPOKEN = 1.5
"""Of the tokens of a right answer, those that are written until a text ends, where something but the most tokens ends it."""
CARDS = {"H200": 300e12, "H100": 280e12, "A100": 130e12, "L40": 90e12, "4090": 80e12, "3090": 35e12, "A10": 60e12, "L4": 50e12, "T4": 25e12, "V100": 50e12}
"""Card -> floating-point operations a second in 16 bits that training of a model reaches there: a guess, but for the H200."""
OTHER_CARD = 60e12
BACKWARD = {"full": 3.4, "selective": 2.6, "pruning": 3.4}
OTHER_BACKWARD = 2.2
"""Of a training step, its work in forward passes: forward, backward through activations and (of what is trained) through weights."""
PASSES = {"step_by_step": 2.0, "step_by_step_unlabelled": 2.0, "dpo": 4.6, "orpo": 2.0, "kto": 3.3, "logit_distillation": 1.4, "rationale_first": 2.0,
          "grpo": 12.0, "rloo": 12.0, "rlhf_grpo": 16.0, "rlhf_rloo": 16.0, "reward_model": 4.0, "on_policy_distillation": 4.0}
"""Of an objective, its forward passes to one of a row's label."""
ROWS_AT_ONCE = 64
"""Rows that are answered before they are kept (cell/evaluation.py, on a CPU)."""
CPU_CELL_S, GPU_CELL_S = 6.0, 8.0
"""Seconds of a cell besides: loading, setting up, saving."""
PROCESS_BYTES = 700 << 20
"""Of a process with torch and transformers."""


@dataclass(frozen=True)
class Work:
    """What there is to train on and to answer; tokens are means over rows.

    choices: tokens of all of a row's choices together, those that they share counted once, 0 where the answer is written; count: how many choices there are;
    new: the most tokens that are written.
    """

    prompt: float
    answer: float
    choices: float
    new: int
    longest: int
    train_rows: int
    validation_rows: int
    test_rows: int
    epochs: float
    count: int = 0


@dataclass(frozen=True)
class Machine:
    """flops: of the products of a step; basis: how that is known."""

    card: Card
    flops: float
    basis: str


@dataclass(frozen=True)
class Whole:
    """What a cell takes. train_s, score_s, total_s: None where the model's size is not known; memory_bytes: None where nothing is forecast."""

    technique: str
    train_s: float | None
    score_s: float | None
    total_s: float | None
    memory_bytes: int | None
    fits: bool | None
    memory_basis: str
    reason: str = ""
    """Why it is not to be run; empty: it is."""


def machine_of(card: Card) -> Machine:
    """How fast a card, or this machine's processor, is."""
    if not card.gpu:
        return Machine(card, _cpu_flops() * CPU_SHARE, "forecast from a product timed on this machine")
    known = next((name for name in CARDS if name in card.name), None)
    flops = CARDS[known] if known else OTHER_CARD
    return Machine(card, flops, f"a guess for {f'an {known}' if known else 'a card of that size'}")


_cpu_flops = functools.cache(matmul_flops)


def parameters_of(config: Path) -> tuple[int, int] | None:
    """(parameters that every token goes through, those of the output layer) by a config.json; None where it does not say."""
    try:
        shape: Shape = read_shape(config)
        return shape.layers * shape.layer_matrices, shape.vocabulary * shape.width
    except NoForecast:
        held = read_object(config)
    except UserError:
        return None
    named = (("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"))
    width, layers = (next((held[k] for k in keys if isinstance(held.get(k), int)), None) for keys in named)
    return (12 * layers * width**2, held.get("vocab_size", 50_000) * width) if width and layers else None


@dataclass(frozen=True)
class Need:
    """Memory of a technique's cell, with why it is None in `basis`, and what its time is reckoned from."""

    technique: str
    values: dict[str, Any]
    size: tuple[int, int] | None
    memory_bytes: int | None
    fits: bool | None
    basis: str


def need(cfg: DictConfig, work: Work, config: Path, machine: Machine) -> Need:
    """What a technique's cell takes in memory; half a second. config: the model's config.json. Nothing need be prepared."""
    values, size = plain(cfg), parameters_of(config)
    return Need(cfg.technique.name, values, size, *_memory(cfg, work, config, machine, _trains(values["method"]), size))


def whole(needed: Need, work: Work, machine: Machine) -> Whole:
    """The same with its time for these rows."""
    values, size = needed.values, needed.size
    method, trains = values["method"], _trains(values["method"])
    known = (needed.memory_bytes, needed.fits, needed.basis)
    if size is None:
        return Whole(needed.technique, None, None, None, *known)
    body, head = (2 * n / machine.flops for n in size)
    score_s = _row_s(work, values, body, head) * (work.test_rows + work.validation_rows)
    passes = PASSES.get(str(values["objective"]["type"]), 1.0) * BACKWARD.get(method["type"], OTHER_BACKWARD)
    train_s = work.train_rows * work.epochs * ((work.prompt + work.answer) * body + work.answer * head) * passes if trains else 0.0
    return Whole(needed.technique, train_s, score_s, train_s + score_s + (GPU_CELL_S if machine.card.gpu else CPU_CELL_S), *known)


def _row_s(work: Work, values: dict[str, Any], body: float, head: float) -> float:
    """Seconds of a row's scoring. body, head: of a token in the layers, and in the output layer."""
    method = values["method"]
    shots = method.get("k", 0) if method["type"] in ("few_shot", "retrieval", "prompt_choice") else 0
    before = min(shots * (work.prompt + work.answer), max(0.0, values["train"]["max_length"] - work.prompt))  # what is longer loses its start
    once = method["type"] == "few_shot"  # all rows have the same demonstrations
    prompt, after = (work.prompt, 1 + before / LEAD) if once else (work.prompt + before, 1.0)
    if work.choices:
        fed = work.choices * (SEARCHED if work.count >= MANY else 1)
        return ((prompt + fed) * body + fed * head) * after
    task = values["task"]
    ends = bool(_trains(method) or task.get("stop") or task.get("format", "plain") != "plain")
    written = min(float(work.new), SPOKEN * work.answer) if ends else work.new
    together = max(1.0, min(values["evaluate"]["batch_tokens"] / (prompt + work.new + (before / 4 if once else 0)), work.test_rows, ROWS_AT_ONCE))
    return (prompt * body + written * (body + head) * (1 + AT_ONCE / together)) * after


def _trains(method: dict[str, Any]) -> bool:
    return method["type"] not in ("untouched", "few_shot", "teacher", "prompt_choice", "retrieval", "quantised", "low_rank")


def _memory(cfg: DictConfig, work: Work, config: Path, machine: Machine, trains: bool, size: tuple[int, int] | None) -> tuple[int | None, bool | None, str]:
    if trains:
        asked = copy.deepcopy(cfg)
        asked.forecast.model_config, asked.forecast.length, asked.train_rows = str(config), max(2, work.longest), work.train_rows
        try:
            told = forecast(asked, machine.card, batches=False, time=False)
        except UserError as error:
            return None, None, str(error)
        if told.memory is None:
            return None, None, told.reason or ""
        return told.memory.total, told.fits, "forecast"
    if size is None:
        return None, None, "the model's size is not known"
    weights = sum(size) * {"nf4": 0.55, "int8": 1.1}.get(cfg.precision.name, 2 if machine.card.gpu else 4)
    total = int(weights + PROCESS_BYTES)
    return total, total <= machine.card.memory_bytes, "forecast"


def with_reason(one: Whole, reason: str) -> Whole:
    return dataclasses.replace(one, reason=reason)
