"""The schema of the config groups that are plain settings: frozen dataclasses, strict about keys and values.

Library. `read(cfg)` turns a composed config into `Settings`; a key that no field knows, a missing one or a value
out of range raises UserError with the key's full name, before any model is loaded. The YAMLs hold the defaults.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml
from omegaconf import DictConfig

from pipeline.core.compose import CONF, RENAMED, plain, renamed_key
from pipeline.core.files import UserError, closest


@dataclass(frozen=True)
class Task:
    """What a cell needs to know of a task; the rest of its YAML is for `prepare` alone."""

    name: str
    scoring: str
    """choice: the most likely of the row's choices; generate: greedy text, then extraction."""
    metric: str = "accuracy"
    """accuracy, macro_f1 or rouge_l: selects the checkpoint and heads the table."""
    format: str = "plain"
    """plain: prompt, then separator + answer; chat: the model's chat template around them."""
    separator: str = " "
    """Stands between prompt and answer in the plain format."""
    length_normalised: bool = False
    """Choice scoring by log-likelihood per character (lm-evaluation-harness's acc_norm) instead of the sum (acc)."""
    max_new_tokens: int = 32
    answer_pattern: str | None = None
    """Regular expression whose last match (first group, if any) in generated text is the answer."""
    transfer: tuple[str, ...] = ()
    """Names of further test sets in data/<task>/transfer/<name>.jsonl."""

    def check(self) -> None:
        _one_of("task.scoring", self.scoring, ("choice", "generate"))
        _one_of("task.metric", self.metric, ("accuracy", "macro_f1", "rouge_l"))
        _one_of("task.format", self.format, ("plain", "chat"))
        _at_least("task.max_new_tokens", self.max_new_tokens, 1)
        needs = {"macro_f1": "choice", "rouge_l": "generate"}.get(self.metric, self.scoring)
        if needs != self.scoring:
            raise UserError(f"task.metric={self.metric} needs task.scoring={needs}, not {self.scoring}; change one of them")
        try:
            re.compile(self.answer_pattern or "")
        except re.error as error:
            raise UserError(f"config key 'task.answer_pattern' is {self.answer_pattern!r}, no regular expression ({error}); mend it") from error


@dataclass(frozen=True)
class Train:
    lr: float
    epochs: float
    batch_size: int
    """Rows per optimiser step."""
    micro_batch_tokens: int
    """Most tokens (padding included) in one forward pass; a step's rows are split to fit."""
    steps: int | None = None
    """Optimiser steps; overrides epochs. 0 trains nothing but goes through save and load."""
    min_steps: int | None = None
    """Fewest optimiser steps: few rows are gone through more often than `epochs` says, until there are as many; null: as `epochs` says."""
    engine: str = "auto"
    """auto (fast on a GPU where technique and model allow it, eager elsewhere), fast (static shapes, CUDA graphs, hand-written steps) or eager."""
    padding_free: str = "auto"
    """The fast engine's rows, one after another without padding and with attention within a row: auto (on a GPU in 16 bits, where that is less work
    than rows of equal width), always (where the step is hand-written) or never."""
    optimizer: str = "adamw"
    """adamw, or paged_adamw: bitsandbytes' paged AdamW on a GPU, plain AdamW on the CPU (noted in the result)."""
    schedule: str = "cosine"
    warmup_share: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    validations: int = 1
    """How often validation runs, evenly spread, the last after the last step; 0: never, the last weights count."""
    max_length: int = 512
    """Most tokens of prompt and answer together; at most the model's context."""
    too_long: str = "error"
    """error, or truncate: cut the prompt's start (counted in the result's notes)."""
    checkpointing: bool = False
    """Keep a layer's input alone and go through the layer again on the way back (Chen et al., 2016): less memory, more time; stepped eagerly."""
    checkpoint_every_s: float = 120.0
    """Seconds between checkpoints in paths.work; 0: after every step."""
    progress: bool = True

    def check(self) -> None:
        _at_least("train.batch_size", self.batch_size, 1)
        _at_least("train.micro_batch_tokens", self.micro_batch_tokens, 1)
        _at_least("train.epochs", self.epochs, 0)
        _at_least("train.validations", self.validations, 0)
        _at_least("train.max_length", self.max_length, 2)
        for key, steps in (("steps", self.steps), ("min_steps", self.min_steps)):
            if steps is not None:
                _at_least(f"train.{key}", steps, 0)
        _at_least("train.weight_decay", self.weight_decay, 0)
        _at_least("train.checkpoint_every_s", self.checkpoint_every_s, 0)
        if not 0 <= self.warmup_share <= 1:
            raise UserError(f"config key 'train.warmup_share' is {self.warmup_share}; it is a share of the steps, from 0 to 1")
        for key in ("lr", "max_grad_norm"):
            if not getattr(self, key) > 0:
                raise UserError(f"config key 'train.{key}' is {getattr(self, key)}; it must be above 0")
        _one_of("train.engine", self.engine, ("auto", "fast", "eager"))
        _one_of("train.padding_free", self.padding_free, ("auto", "always", "never"))
        _one_of("train.optimizer", self.optimizer, ("adamw", "paged_adamw"))
        _one_of("train.schedule", self.schedule, ("cosine", "linear", "constant"))
        _one_of("train.too_long", self.too_long, ("error", "truncate"))


@dataclass(frozen=True)
class Evaluate:
    ONLY_WITH: ClassVar[dict[str, tuple[str, ...]]] = {"forgetting": ("probe_pairs", "probe_texts", "probe_lambada"), "latency_rows": ("adapters",)}
    """Settings that mean nothing without another one."""
    batch_tokens: int
    """Most tokens (padding included) in one scoring batch."""
    test_rows: int | None = None
    """The first so many rows of the test split, a fixed order; null: all."""
    validation_share: float = 0.2
    """Validation rows as a share of the training rows; they count as labelled data."""
    transfer_rows: int | None = None
    """Rows of every transfer set; 0: none, null: all."""
    forgetting: bool = False
    probe_pairs: int = 500
    probe_texts: int = 100
    probe_lambada: int = 0
    """Passages of LAMBADA (the file paths.lambada), the first so many; 0: none."""
    latency_rows: int = 16
    """One-row requests timed for the latency; 0: not measured."""
    adapters: tuple[int, ...] = ()
    """With so many adapters on one base, each answering a request of one batch, time the batch; empty: not measured."""

    def check(self) -> None:
        _at_least("evaluate.batch_tokens", self.batch_tokens, 1)
        for key in ("test_rows", "transfer_rows"):
            value = getattr(self, key)
            if value is not None:
                _at_least(f"evaluate.{key}", value, 1 if key == "test_rows" else 0)
        for key, least in (("probe_pairs", 1), ("probe_texts", 1), ("probe_lambada", 0), ("latency_rows", 0)):
            _at_least(f"evaluate.{key}", getattr(self, key), least)
        if any(type(n) is not int or n < 1 for n in self.adapters):
            raise UserError(f"evaluate.adapters is {list(self.adapters)}; list whole numbers of at least 1, or none: []")
        if not 0 < self.validation_share <= 0.2:
            raise UserError(f"evaluate.validation_share is {self.validation_share}; choose above 0, at most 0.2 (validation rows are labelled data)")


@dataclass(frozen=True)
class Precision:
    name: str
    """auto (bf16 on a GPU that has it, else fp32), fp32, bf16, int8 or nf4: how the base's weights are held."""
    compute: str = "auto"
    """auto, fp32 or bf16: the dtype of the arithmetic over a quantised base."""
    double_quantisation: bool = True

    def check(self) -> None:
        _one_of("precision.name", self.name, ("auto", "fp32", "bf16", "int8", "nf4"))
        _one_of("precision.compute", self.compute, ("auto", "fp32", "bf16"))


@dataclass(frozen=True)
class Model:
    name: str
    """The folder under models/."""
    source: dict | None = None
    init: str = "pretrained"
    """pretrained, or random: the same architecture and tokenizer with fresh weights."""
    init_seed: int = 0
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run. This run's config alone says so, no file of the model's."""
    allow_pickle: bool = False
    """Whether weights may be read from pickle files, which can run code."""
    licence: str | None = None
    note: str | None = None
    """A sentence for the results of its cells."""

    def check(self) -> None:
        _one_of("model.init", self.init, ("pretrained", "random"))


@dataclass(frozen=True)
class Technique:
    name: str
    family: str
    path: str | None = None
    """The adapter_config.json of technique=peft_config."""

    def check(self) -> None:
        """Any name will do."""


DECIDING: dict[str, Any] = {
    **dict.fromkeys(("task", "model", "teacher", "synthetic", "method", "objective", "precision", "train", "evaluate", "technique")),
    **dict.fromkeys(("seed", "train_rows", "start")),
    "device": "auto",
}
"""Keys of a config that decide a cell's outcome (pipeline/cell/identity.py), those at the top with their default; everything else says how and where."""
NOT_DECIDING = {"train": ("progress", "checkpoint_every_s")}
"""Keys within these groups that do not."""


@dataclass(frozen=True)
class Settings:
    task: Task
    model: Model
    train: Train
    evaluate: Evaluate
    precision: Precision
    technique: Technique


def read(cfg: DictConfig) -> Settings:
    """The checked settings of a composed config. Raises UserError naming the key."""
    raw = plain(cfg)
    _known_keys(raw)
    for key, hint, least in (("seed", int, 0), ("train_rows", int | None, 1), ("memory_limit_gb", float | None, 0), ("pack", bool, 0),
                             ("overwrite", bool, 0), ("adopt", bool, 0),
                             ("tuned", bool, 0), ("price_per_hour", float | None, 0), ("currency", str | None, None)):
        value = _coerce(raw[key], hint, key)
        if value is not None and least is not None:
            _at_least(key, value, least)
    if (raw["price_per_hour"] is None) != (raw["currency"] is None):
        raise UserError("price_per_hour and currency go together; set both, for example price_per_hour=2.5 currency=EUR, or neither")
    _one_of("device", raw["device"], ("auto", "cpu", "cuda"))
    _one_of("stale", raw["stale"], ("run", "keep"))
    own = {f.name for f in dataclasses.fields(Task)}
    raw["task"] = {k: v for k, v in raw["task"].items() if k in own}
    values = {f.name: build(typing.get_type_hints(Settings)[f.name], raw[f.name], f.name) for f in dataclasses.fields(Settings)}
    return Settings(**values)


def _known_keys(raw: dict[str, Any]) -> None:
    """An experiment file adds keys unchecked; those at the top and below paths and report must be conf/config.yaml's."""
    held = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    groups = [name for entry in held["defaults"] if isinstance(entry, dict) for name in entry]
    for values, known, prefix in ((raw, [*held, *groups], ""), *((raw[k], list(held[k]), f"{k}.") for k in ("paths", "report", "forecast"))):
        for key in values:
            if key not in known:
                raise UserError(f"unknown config key '{prefix}{key}'{closest(key, known)}; conf/config.yaml lists those there are")


def build(cls: Any, values: dict[str, Any], prefix: str) -> Any:
    """A settings dataclass from plain values; `prefix` is the config group, for the messages."""
    hints = typing.get_type_hints(cls)
    for key in values:
        if f"{prefix}.{key}" in RENAMED:
            raise UserError(renamed_key(f"{prefix}.{key}"))
        if key not in hints:
            raise UserError(f"unknown config key '{prefix}.{key}'{closest(key, hints)}; {prefix} takes {', '.join(hints)}")
    for field in dataclasses.fields(cls):
        if field.name not in values:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise UserError(f"config key '{prefix}.{field.name}' is missing; set it")
            continue
        values[field.name] = _coerce(values[field.name], hints[field.name], f"{prefix}.{field.name}")
    made = cls(**values)
    made.check()
    return made


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """The value if it is of the field's type (int passes for float, a list for a tuple)."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is tuple and isinstance(value, list):
            return tuple(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, kind) and (kind is bool) == isinstance(value, bool):
            return value
    wanted = " or ".join(getattr(o, "__name__", str(o)) for o in options).replace("NoneType", "null")
    raise UserError(f"config key '{key}' is {value!r}; it takes {wanted}")


def _one_of(key: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        raise UserError(f"config key '{key}' is {value!r}; choose one of {', '.join(options)}")


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise UserError(f"config key '{key}' is {value}; it must be at least {least}")
