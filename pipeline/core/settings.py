"""The schema of the config groups that are plain settings: frozen dataclasses, strict about keys and values.

Library. `read(cfg)` turns a composed config into `Settings`; a key that no field knows, a missing one or a value
out of range raises UserError with the key's full name, before any model is loaded. The YAMLs hold the defaults.
A field's type says which values it takes: `checked` holds every value against it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

import yaml
from omegaconf import DictConfig, OmegaConf

from pipeline.core.compose import CONF, RENAMED, plain, renamed_key
from pipeline.core.files import UserError, check_name, closest
from pipeline.core.schema import FILLED, NO_LIMIT, AtLeast0, AtLeast1, Filled, NotNegative, Positive, Within, checked

Seed = Annotated[int, Within(0, 2**63 - 1)]
"""What torch and Python draw from alike."""
Steps = Annotated[int, Within(0, 2**31 - 1)]


METRICS = {"accuracy": None, "macro_f1": "choice", "exact_match": None, "numeric": None, "token_f1": None, "rouge_l": "generate"}
"""A headline metric -> the scoring that it needs, if any."""
CUSTOM = "custom"
"""What a result calls a metric that is a function of its user's own: reading a result imports nothing."""
OWN = re.compile(r"[\w./~-]+:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Task:
    """What a cell needs to know of a task; the rest of its YAML is for `prepare` alone."""

    name: str
    scoring: Literal["choice", "generate"]
    """choice: the most likely of the row's choices; generate: greedy text, then extraction."""
    metric: str = "accuracy"
    """Selects the checkpoint and heads the table: accuracy, macro_f1, exact_match, numeric (a number within `tolerance`), token_f1, rouge_l, or
    module:function, a function of the user's own (docs/data.md)."""
    tolerance: NotNegative = 0.0
    """By how much a number may miss the reference (metric numeric): a share of it where it is above 1, else a difference."""
    format: Literal["plain", "chat", "transcript"] = "plain"
    """plain: prompt, then separator + answer; chat: the model's chat template around them, which conversations (messages) have anyway but for transcript:
    their turns as lines of text, for a model without a template."""
    messages: str | None = None
    """The column that holds a row's conversation; null: a row's prompt is a text."""
    separator: str = " "
    """Stands between prompt and answer in the plain format."""
    length_normalised: bool = False
    """Choice scoring by log-likelihood per character (lm-evaluation-harness's acc_norm) instead of the sum (acc)."""
    max_new_tokens: AtLeast1 = 32
    answer_pattern: str | None = None
    """Regular expression whose last match (first group, if any) in generated text is the answer."""
    stop: str | None = None
    """Words that end a generated answer, such as those with which the next question would begin; what follows them is no part of it. Plain format alone."""
    transfer: tuple[str, ...] = ()
    """Names of extra test sets in data/<task>/transfer/<name>.jsonl."""

    @property
    def chat(self) -> bool:
        """Whether the model's chat template stands around prompt and answer."""
        return self.format == "chat" or self.messages is not None and self.format != "transcript"

    @property
    def own_metric(self) -> bool:
        return self.metric not in METRICS

    @property
    def metric_name(self) -> str:
        """The field of a Score that holds the metric."""
        return CUSTOM if self.own_metric else self.metric

    def check(self) -> None:
        if self.own_metric and self.metric != CUSTOM and not OWN.fullmatch(self.metric):
            raise UserError(f"config key 'task.metric' is {self.metric!r}{closest(self.metric, METRICS)}; choose one of {', '.join(METRICS)}, or name a "
                            "function of your own: module:function")
        needs = METRICS.get(self.metric) or self.scoring
        if needs != self.scoring:
            raise UserError(f"task.metric={self.metric} needs task.scoring={needs}, not {self.scoring}; change one of them")
        if len({check_name(name, "config key 'task.transfer'") for name in self.transfer}) < len(self.transfer):
            raise UserError(f"config key 'task.transfer' is {list(self.transfer)}; name each set once")
        try:
            re.compile(self.answer_pattern or "")
        except re.error as error:
            raise UserError(f"config key 'task.answer_pattern' is {self.answer_pattern!r}, no regular expression ({error}); fix it") from error


@dataclass(frozen=True)
class Train:
    lr: Positive | None
    """The learning rate; null: reference_lr, carried over to the base by lr_power (pipeline/models/rates.py)."""
    epochs: Annotated[float, Within(0, 1e6)]
    batch_size: AtLeast1
    """Rows per optimiser step."""
    micro_batch_tokens: AtLeast1
    """Most tokens (padding included) in one forward pass; a step's rows are split to fit."""
    reference_lr: Positive | None = None
    """The learning rate for the reference base, SmolLM2-135M."""
    lr_power: Annotated[float, Within(-2, 2)] = 0.0
    """The rate is reference_lr times (size of the base's weights / of the reference's) to this power."""
    steps: Steps | None = None
    """Optimiser steps; overrides epochs. 0 trains nothing but goes through save and load."""
    min_steps: Steps | None = None
    """Fewest optimiser steps: few rows are gone through more often than `epochs` says, until there are as many; null: as `epochs` says."""
    engine: Literal["auto", "fast", "eager"] = "auto"
    """auto (fast on a GPU where technique and model allow it, eager elsewhere), fast (static shapes, CUDA graphs, hand-written steps) or eager."""
    padding_free: Literal["auto", "always", "never"] = "auto"
    """The fast engine's rows, one after another without padding and with attention within a row: auto (on a GPU in 16 bits, where that is less work
    than rows of equal width), always (where the step is hand-written) or never."""
    parallel: Literal["none", "ddp", "fsdp"] = "none"
    """One training over several GPUs (docs/scale.md): none, ddp (every GPU holds the model, gradients are summed) or fsdp (full fine-tuning whose weights,
    gradients and moments lie in parts on the GPUs). The optimiser step is the same for any number: its rows are dealt out, its loss is over all tokens."""
    gpus: AtLeast1 | None = None
    """With `parallel`: how many GPUs (on the CPU: processes); null: all that are visible."""
    optimizer: Literal["adamw", "paged_adamw"] = "adamw"
    """adamw, or paged_adamw: bitsandbytes' paged AdamW on a GPU, plain AdamW on the CPU (noted in the result)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_share: Annotated[float, Within(0, 1, why="a share of the steps")] = 0.1
    weight_decay: NotNegative = 0.0
    max_grad_norm: Annotated[float, Within(0, above=True), NO_LIMIT] = 1.0
    """Gradients are clipped to it; null or inf: not at all."""
    validations: AtLeast0 = 1
    """How often validation runs, evenly spread, the last after the last step; 0: never, the last weights count."""
    max_length: Annotated[int, Within(2)] = 512
    """Most tokens of prompt and answer together; at most the model's context."""
    too_long: Literal["error", "truncate"] = "error"
    """error, or truncate: cut the prompt's start (counted in the result's notes)."""
    checkpointing: bool = False
    """Keep a layer's input alone and compute the layer again in the backward pass (Chen et al., 2016): less memory, more time; stepped eagerly."""
    checkpoint_every_s: NotNegative = 120.0
    """Seconds between checkpoints in paths.work; 0: after every step."""
    progress: bool = True

    def check(self) -> None:
        if self.lr is None and self.reference_lr is None:
            raise UserError("config key 'train.lr' is missing; set it, or train.reference_lr")
        if self.gpus is not None and self.parallel == "none":
            raise UserError(f"train.gpus={self.gpus} says on how many GPUs one training runs, and train.parallel is none; set train.parallel=ddp or fsdp, "
                            "or leave train.gpus out")

    @property
    def learning_rate(self) -> float:
        """lr, which models/rates.py has filled in."""
        assert self.lr is not None
        return self.lr


@dataclass(frozen=True)
class Evaluate:
    ONLY_WITH: ClassVar[dict[str, tuple[str, ...]]] = {"forgetting": ("probe_pairs", "probe_texts", "probe_lambada"), "latency_rows": ("adapters",)}
    """Settings that mean nothing without another one."""
    batch_tokens: AtLeast1
    """Most tokens (padding included) in one scoring batch."""
    test_rows: AtLeast1 | None = None
    """The first so many rows of the test split, a fixed order; null: all."""
    validation_share: Annotated[float, Within(0, 0.2, above=True, why="validation rows are labelled data")] = 0.2
    """Validation rows as a share of the training rows; they count as labelled data."""
    transfer_rows: AtLeast0 | None = None
    """Rows of every transfer set; 0: none, null: all."""
    forgetting: bool = False
    probe_pairs: AtLeast1 = 500
    probe_texts: AtLeast1 = 100
    probe_lambada: AtLeast0 = 0
    """Passages of LAMBADA (the file paths.lambada), the first so many; 0: none."""
    latency_rows: AtLeast0 = 16
    """One-row requests timed for the latency; 0: not measured."""
    adapters: tuple[AtLeast1, ...] = ()
    """With so many adapters on one base, each answering a request of one batch, time the batch; empty: not measured."""


@dataclass(frozen=True)
class Precision:
    name: Literal["auto", "fp32", "bf16", "int8", "nf4"]
    """auto (bf16 on a GPU that has it, else fp32), fp32, bf16, int8 or nf4: how the base's weights are stored."""
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """auto, fp32 or bf16: the dtype of the arithmetic over a quantised base."""
    double_quantisation: bool = True


@dataclass(frozen=True)
class Model:
    name: str
    """The folder under models/."""
    source: dict | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained, or random: the same architecture and tokenizer with fresh weights."""
    init_seed: Seed = 0
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run. This run's config alone says so, no file of the model's."""
    allow_pickle: bool = False
    """Whether weights may be read from pickle files, which can run code."""
    licence: str | None = None
    note: str | None = None
    """A sentence for the results of its cells."""


@dataclass(frozen=True)
class Tracking:
    """The config group tracking: pipeline/records/mlflow.py."""

    enabled: bool
    uri: str = ""
    artifacts: str | None = None
    """Folder of the runs' files where `uri` is a local database; a server has its own place."""

    def check(self) -> None:
        if self.enabled and not self.uri:
            raise UserError("tracking.uri is empty; set it (sqlite:///mlflow.db or a server's address), or tracking=none")
        if urlsplit(self.uri).password:
            raise UserError("tracking.uri holds a password, which every result would keep; leave it out and set MLFLOW_TRACKING_USERNAME and "
                            "MLFLOW_TRACKING_PASSWORD")


@dataclass(frozen=True)
class Technique:
    name: str
    family: str
    path: str | None = None
    """The adapter_config.json of technique=peft_config."""


DECIDING: dict[str, Any] = {
    **dict.fromkeys(("task", "model", "teacher", "synthetic", "method", "objective", "precision", "train", "evaluate", "technique")),
    **dict.fromkeys(("seed", "train_rows", "start")),
    "device": "auto",
}
"""Keys of a config that decide a cell's outcome (pipeline/cell/identity.py), those at the top with their default; everything else says how and where."""
NOT_DECIDING = {"train": ("progress", "checkpoint_every_s", "parallel", "gpus")}
"""Keys within these groups that do not."""


@dataclass(frozen=True)
class Settings:
    task: Task
    model: Model
    train: Train
    evaluate: Evaluate
    precision: Precision
    technique: Technique


Axis = Annotated[tuple[int, ...], FILLED] | None
TOP = {
    "seed": Seed, "train_rows": AtLeast1 | None, "start": Filled | None, "variant": Filled | None, "memory_limit_gb": Positive | None, "pack": bool | None,
    "at_once": AtLeast1 | None, "latency": Literal["reuse", "measure"],
    "tuned": bool, "price_per_hour": NotNegative | None, "currency": str | None, "device": Literal["auto", "cpu", "cuda"],
    "launcher": Literal["ray", "slurm", "local"], "share": bool,
    "overwrite": bool, "adopt": bool, "stale": Literal["run", "keep"], "cell": Filled | None, "split": Filled, "suite": Filled | tuple[str, ...] | None,
    "suite_path": Filled | None, "suite_rows": AtLeast1 | None, "merged": bool, "requests": Filled | None, "to": Filled | None,
    "tune.techniques": tuple[str, ...] | None, "tune.trials": AtLeast1, "tune.seed": Seed, "tune.slots": AtLeast1 | None,
    "tune.executor": Literal["auto", "packed", "sequential", "ray"], "tune.storage": Filled | None, "tune.heartbeat_s": AtLeast1,
    "forecast.gpu_memory_gb": Positive | None, "forecast.model_config": Filled | None, "forecast.length": AtLeast1 | None, "forecast.calibrate": bool,
    "judge.cells": tuple[str, ...] | None, "judge.rows": AtLeast1 | None, "judge.reference": bool, "judge.criterion": Filled,
    "budget_hours": Positive | None, "within": Annotated[float, Within(0, 100, above=True, why="points of the metric")],
    "error": Annotated[float, Within(1e-4, 0.5, why="a chance")], "race.techniques": tuple[str, ...] | None, "race.rows": Literal["sample", "these"],
    "race.rates": AtLeast1, "race.screen_share": Annotated[float, Within(0, 1, why="a share")], "race.collapse": Positive | None, "race.seed": Seed,
    "race.seeds": AtLeast1, "race.at_once": AtLeast1,
    "report.target": Annotated[float, Within(0, 1)] | None, "report.train_rows": Axis, "report.seeds": Axis,
}
"""Config key outside the groups -> its type."""


def check_top(cfg: DictConfig) -> None:
    """Raise UserError for a value outside the groups of a cell that its key does not take: what every command may be given."""
    for key, hint in TOP.items():
        value = OmegaConf.select(cfg, key)
        checked(OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value, hint, key)
    build(Tracking, plain(cfg.tracking), "tracking")


def read(cfg: DictConfig) -> Settings:
    """The checked settings of a composed config. Raises UserError naming the key."""
    raw = plain(cfg)
    _known_keys(raw)
    check_top(cfg)
    if (raw["price_per_hour"] is None) != (raw["currency"] is None):
        raise UserError("price_per_hour and currency go together; set both, for example price_per_hour=2.5 currency=EUR, or neither")
    cells = {f.name for f in dataclasses.fields(Task)}
    raw["task"] = {k: v for k, v in raw["task"].items() if k in cells}
    return Settings(**{name: build(cls, raw[name], name) for name, cls in typing.get_type_hints(Settings).items()})


def _known_keys(raw: dict[str, Any]) -> None:
    """An experiment file adds keys unchecked; those at the top and below paths and report must be conf/config.yaml's."""
    for group, known in _keys_of_config().items():
        values, prefix = (raw[group], f"{group}.") if group else (raw, "")
        for key in values:
            if key not in known:
                raise UserError(f"unknown config key '{prefix}{key}'{closest(key, known)}; conf/config.yaml lists those there are")


@functools.cache
def _keys_of_config() -> dict[str, list[str]]:
    """The keys of conf/config.yaml: those at the top and the groups under "", those below a key under its name. Read once a process."""
    file = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    groups = [name for entry in file["defaults"] if isinstance(entry, dict) for name in entry]
    return {"": [*file, *groups], **{key: list(file[key]) for key in ("paths", "report", "forecast", "judge", "race")}}


def build(cls: Any, values: dict[str, Any], prefix: str) -> Any:
    """A settings dataclass from plain values.

    Its `check` method, if it has one, says what its type hints cannot: which fields go together.

    Args:
        prefix: the config group, for the messages.

    Raises:
        UserError: an unknown key, a missing one, a value that its field does not take.
    """
    types_of = typing.get_type_hints(cls, include_extras=True)
    hints = {field.name: types_of[field.name] for field in dataclasses.fields(cls)}
    for key in values:
        if f"{prefix}.{key}" in RENAMED:
            raise UserError(renamed_key(f"{prefix}.{key}"))
        if key not in hints:
            raise UserError(f"unknown config key '{prefix}.{key}'{closest(key, hints)}; {prefix} takes {', '.join(hints)}")
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"config key '{prefix}.{field.name}' is missing; set it")
    made = cls(**{key: checked(value, hints[key], f"{prefix}.{key}") for key, value in values.items()})
    if hasattr(made, "check"):
        made.check()
    return made


def check_fields(made: Any, prefix: str) -> None:
    """Raise UserError where a field of a dataclass has a value that its type does not take; a dataclass inside checks its own.

    prefix: the config group, for the message.
    """
    hints = typing.get_type_hints(type(made), include_extras=True)
    for field in dataclasses.fields(made):
        if not dataclasses.is_dataclass(hints[field.name]):
            checked(getattr(made, field.name), hints[field.name], f"{prefix}.{field.name}")
