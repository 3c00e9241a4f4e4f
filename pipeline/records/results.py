"""The result of one cell as frozen dataclasses, and their JSON. Units stand in the field names.

Library. `results/<experiment>/<cell>/result.json` is the truth; MLflow and the report are made from it.
A field that was not measured is null, never zero.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core.compose import with_todays_keys
from pipeline.core.files import UserError, check_name, read_json, write_json
from pipeline.measure.clock import Phases
from pipeline.measure.memory import Memory
from pipeline.records.origins import Before, PairScore, Synthetic, Teacher, Tuning
from pipeline.records.parallel import Parallel
from pipeline.records.score import NOT_METRICS, Score

SCHEMA = 2
BEFORE = 1
"""The last schema, which is still read."""
KINDS = ("trained", "untrained", "base", "teacher")
"""What a row is: a base that was trained; a base whose request or weights were changed without training; the base as it is; answers without a model."""
ENGINES = {"eager": "eager", "captured": "autograd", "handwritten": "hand-written step", "trl": "TRL's loop"}
"""What did the training steps, with its words for a reader; captured: autograd over static shapes, on a GPU in CUDA graphs (docs/fast.md)."""
NAMES = ("experiment", "cell", "technique", "task", "model")
"""Fields that become parts of paths."""
FACTS: dict[str, Any] = {
    **dict.fromkeys([f"hardware.{key}" for key in ("device", "gpu", "cpu", "platform", "cpu_model", "cpu_capability", "blas")], str | None),
    **dict.fromkeys([f"hardware.{key}" for key in ("gpu_memory_bytes", "memory_bytes", "cpu_count", "threads")], float | None),
    **dict.fromkeys([f"provenance.{key}" for key in ("git_commit", "data_sha256", "model_sha256", "started", "command", "python")], str | None),
    "provenance.packages": dict[str, Any] | None,
    **dict.fromkeys([f"config.{key}" for key in ("task", "model", "train", "evaluate", "precision", "technique", "paths")], dict[str, Any]),
}
"""What others read of the fields without a schema of their own."""
HISTORY = ("step", "loss", "lr", "validation_metric", "validation_nll")
"""Columns of a training curve as CSV."""
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}
AGAIN = "delete the cell's folder and run it again"


@dataclass(frozen=True)
class Work:
    """What training went through. A token is a real one; padding is counted apart."""

    steps: int = 0
    tokens: int = 0
    tokens_per_s: float | None = None
    padding_share: float | None = None
    step_s_median: float | None = None
    resumed: bool = False
    """True if any part ran in an earlier process: such times stay out of timing tables."""
    energy_j: float | None = None
    """Energy of the training steps (those of `Phases.train_s`): the GPU's counter, or on the CPU its packages and their memory."""
    host_energy_j: float | None = None
    """Beside a GPU: energy of the CPU packages and their memory in the same time."""
    energy_note: str | None = None
    """Why one of the two is null."""
    engine: str | None = None
    """One of ENGINES; null: nothing was trained."""
    engine_reason: str | None = None
    """Why a faster one was asked for and did not run."""
    widths: list[int] | None = None
    """Tokens of the rows, or of the streams, that the fast engine's steps were made for."""
    streams: bool = False
    """Whether its rows lay one after another in streams of tokens, without padding between them."""
    parallel: Parallel | None = None
    diverged_at: int | None = None
    """The optimiser step (from 1) whose loss, or the weights after it, were not finite, which ended training; null: it went through."""


@dataclass(frozen=True)
class Size:
    """Parameters are counted, bytes are on disk."""

    trainable: int
    total: int
    artefact_bytes: int
    model_bytes: int | None = None
    """Parameters and buffers of the loaded base in its precision."""
    served_bytes: int | None = None
    """Parameters and buffers of the model as it is served: adapters beside their base, weights rounded or taken apart; zeros count as numbers."""
    attention: str | None = None
    """The attention that transformers chose for the base: sdpa, or eager where its architecture has no other. Null: a model without attention."""
    quantised_share: float | None = None
    """Of the weights in the blocks' matrices, those that stood there in 8 or 4 bits; experts that are one tensor never do. Null: none did."""
    reached_share: float | None = None
    """Of the same weights, those that the method prunes, takes apart or puts an adapter beside. Null: it does not go by matrices."""


@dataclass(frozen=True)
class Inference:
    """One-row requests and full batches over the test rows, artefact attached; merged where it merges."""

    latency_s: float | None = None
    rows_per_s: float | None = None
    peak_bytes: int | None = None
    merged_latency_s: float | None = None
    request_peak_bytes: int | None = None
    """Peak memory while one-row requests are answered, of the counter that `Memory.kind` names."""
    merged_request_peak_bytes: int | None = None
    adapters: dict[str, float] | None = None
    """Seconds for N requests at once, each by an adapter of its own over one base, by N ("1", "8", "64")."""
    one_adapter: dict[str, float] | None = None
    """Seconds for the same requests as one batch, all by one adapter."""
    adapters_mixed: bool | None = None
    """Whether `adapters` is one mixed batch; False: the adapters take turns, one request after another."""
    requests_key: str | None = None
    """Hash of what seconds and memory of requests depend on (pipeline/cell/requests.py): cells of one key have the same figures. Null: they are the
    cell's own alone."""
    requests_from: str | None = None
    """The cell of this experiment, of the same key, that latency, request memory and adapters were measured in; null: this one."""


@dataclass(frozen=True)
class Neighbours:
    """Cells that were under way beside this one on its device."""

    cells: int
    """How many there may have been at once, this one among them."""
    turns: bool
    """Whether what is timed had the device to itself (training steps, the test rows' answers, requests): other seconds may be longer than alone.
    False (share=true): none of the cell's times is its own."""
    waited_s: float | None = None
    """Seconds of waiting for the device, no part of the wall clock."""
    alone_s: float | None = None
    """Seconds for which it had the device to itself, while the others waited."""
    mps: bool = False
    """Whether their kernels could run at once (a client of NVIDIA's MPS); else a GPU computes for one process at a time."""


@dataclass(frozen=True)
class Forgetting:
    """Probes of unrelated text and grammar, after against the untouched base (same precision, and 16 bits).

    Perplexity is per token of the probe text; pairs is the share of minimal pairs ranked right; lambada is the share of LAMBADA
    passages whose last word was said, its perplexity is per such word. Null: not probed, or what the model said was not finite.
    """

    perplexity: float | None
    perplexity_base: float | None
    pairs: float | None
    pairs_base: float | None
    perplexity_base_16bit: float | None = None
    pairs_base_16bit: float | None = None
    probes: str = ""
    lambada: float | None = None
    lambada_base: float | None = None
    lambada_base_16bit: float | None = None
    lambada_perplexity: float | None = None
    lambada_perplexity_base: float | None = None
    lambada_perplexity_base_16bit: float | None = None


@dataclass(frozen=True)
class Cost:
    """Wall clock (`Phases.wall_s`) at the config's price_per_hour."""

    amount: float
    currency: str
    per_hour: float


@dataclass(frozen=True)
class Result:
    """One cell: one technique x seed x train_rows of an experiment."""

    experiment: str
    cell: str
    technique: str
    family: str
    method: str
    objective: str
    precision: str
    task: str
    model: str
    seed: int
    train_rows: int
    status: str
    """ok, oom (out of memory: a result, keyed with the hardware), or diverged (the loss, the weights or the scores were not finite)."""
    kind: str
    """One of KINDS."""
    start: str | None = None
    """The cell that this one begins at (its folder or technique), whose rows and cost are not counted in this one's times."""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    metric: str = "accuracy"
    """The task's headline metric, a field of Score."""
    validation_rows: int = 0
    labelled_rows: int | None = None
    """Rows whose labels were used: training and validation rows, a taxonomy's examples; fewer for what trains nothing. Null: it did not finish."""
    takes_rows: bool = True
    """Whether more training rows make it another model: not the untouched base, a fixed number of demonstrations, a compressed base."""
    scores: dict[str, Score] = field(default_factory=dict)
    """By split: test, validation, and transfer/<set>."""
    phases: Phases | None = None
    memory: Memory | None = None
    work: Work | None = None
    size: Size | None = None
    inference: Inference | None = None
    forgetting: Forgetting | None = None
    teacher: Teacher | None = None
    before: dict[str, Before] = field(default_factory=dict)
    """The finished cells that this one is made of and that those are made of, by <experiment>/<cell>."""
    pairs: dict[str, PairScore] = field(default_factory=dict)
    """Of a reward model, by split: how it ranks pairs of answers."""
    best_of: list[dict[str, float]] = field(default_factory=list)
    """Where answers are chosen among drawn ones, of the best of k: k, kl (to the model that draws, nats), reward (learnt), gold_reward (true)."""
    synthetic: Synthetic | None = None
    """None: trained on labelled rows alone."""
    tuning: Tuning | None = None
    """None: not tuned by pipeline.tune."""
    cost: Cost | None = None
    """None: the config has no price_per_hour."""
    history: list[dict[str, float | None]] = field(default_factory=list)
    """Points of the training curve: step, loss, lr; validation points carry validation_metric and validation_nll (null: not measured)."""
    unmeasured: dict[str, str] = field(default_factory=dict)
    """Why measurements that were tried are null, by name: forgetting, adapters, merged_latency_s."""
    notes: list[str] = field(default_factory=list)
    """Sentences for people: truncated texts, fallbacks. Nothing reads a fact out of them."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """device, gpu, gpu_memory_bytes, cpu, cpu_count, memory_bytes, platform."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """packages, git_commit, git_dirty, data_sha256, model_sha256, started (UTC), command."""
    config: dict[str, Any] = field(default_factory=dict)
    """The composed config of the cell."""
    error: str | None = None
    packed: bool = False
    """Trained at once with others in one process: its times are a share of theirs, its memory is not its own."""
    slots: int | None = None
    """How many ran at once, if packed."""
    neighbours: Neighbours | None = None
    """None: the cell had its machine to itself."""
    shared_process: bool = False
    """Whether imports and base were read before the cell was forked: its start-up, load and wall clock leave them out."""
    schema: int = SCHEMA

    @property
    def test(self) -> Score | None:
        return self.scores.get("test")


def write(folder: str | Path, result: Result) -> None:
    write_json(Path(folder) / "result.json", dataclasses.asdict(result))


def read(path: str | Path) -> Result:
    """Read a result.json (or the cell's folder that holds it).

    Raises:
        UserError: missing, not JSON (Damaged), of another schema, or with a field that is unknown, missing or of another type; it names the file and the field.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "result.json"
    raw = read_json(path)
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema not in (SCHEMA, BEFORE):
        raise UserError(f"{path} was written by schema {schema}, this version reads schemas {BEFORE} and {SCHEMA}; delete the cell's folder and run it again")
    if schema == BEFORE:
        _fields(Result, raw, f"{path}: ")
        raw = _from_schema_1(raw, path)
    result: Result = _build(Result, raw, f"{path}: ")
    for name in NAMES:
        check_name(getattr(result, name), f"{path}: {name}")
    _check_values(result, f"{path}: ")
    if result.status == "ok" and result.work and result.work.diverged_at is not None:  # written before it was a status
        result = dataclasses.replace(result, status="diverged", error=f"training diverged at step {result.work.diverged_at}")
    return dataclasses.replace(result, config=with_todays_keys(result.config))


SHARED_1 = "imports and base model were read once for several cells: start-up and load times are not a single run's"
ENGINE_1 = re.compile(
    r"engine: (?P<way>eager|autograd|hand-written step)(, because (?P<reason>.*?))?(, captured in CUDA graphs)?"
    r"(; (?P<kind>widths|rows packed into streams of tokens) (?P<widths>\d{1,9}(, \d{1,9})*))?"
)
DIVERGED_1 = re.compile(r"training diverged: the loss (or its gradient )?was not finite at step (?P<step>\d{1,9}) of \d+")
"""Notes of schema 1 that are fields now; the first two are notes no more."""


def _from_schema_1(raw: dict, path: Path) -> dict:
    """A result of schema 1 with the fields that came since, from its notes and hyperparameters: the only place that looks into either."""
    notes, shown = raw.get("notes") or [], raw.get("hyperparameters") or {}
    untrained = {"none": "base", "teacher": "teacher"}.get(str(raw.get("method")), "untrained")
    kind = untrained if raw.get("objective") == "none" else "trained"
    fields = {
        "schema": SCHEMA, "kind": kind, "start": shown.get("start"), "shared_process": SHARED_1 in notes,
        "takes_rows": kind == "trained" or "labels_from" in shown or "start" in shown,
        "labelled_rows": _labelled_1(raw, kind, shown, path) if raw.get("status") == "ok" else None,
        "notes": [n for n in notes if n != SHARED_1 and not ENGINE_1.fullmatch(n)],
    }
    if isinstance(raw.get("work"), dict):
        fields["work"] = raw["work"] | (_steps_1(raw, notes) if kind == "trained" else {})
    return raw | fields


def _labelled_1(raw: dict, kind: str, shown: dict, path: Path) -> int:
    """What the report of schema 1 counted as labelled rows."""
    train, validation = raw.get("train_rows") or 0, raw.get("validation_rows") or 0
    beside = (raw.get("synthetic") or {}).get("examples", 0)
    if raw.get("tuning") or "start" in shown or (kind == "trained" and "labels_from" not in shown):
        return beside + train + validation
    counts = {key: _typed(int, shown.get(key, 0), f"{path}: hyperparameters.{key}") for key in ("calibration_rows", "k")}
    fixed = min(counts["calibration_rows"], train) or counts["k"]
    return beside + {"train": train, "validation": validation}.get(str(shown.get("labels_from")), fixed)


def _steps_1(raw: dict, notes: list[str]) -> dict[str, Any]:
    """The fields of Work on how training stepped."""
    engine = next((m for n in notes if (m := ENGINE_1.fullmatch(n))), None)
    diverged = next((m for n in notes if (m := DIVERGED_1.fullmatch(n))), None)
    at = {"diverged_at": int(diverged["step"]) if diverged else None}
    if engine is None:  # a run by TRL says so in its algorithm's name, a pack has no other engine
        by_trl = any(n.startswith("trained by TRL's ") for n in notes)
        return at | {"engine": "trl" if by_trl else "handwritten" if raw.get("packed") else "eager"}
    name = {"autograd": "captured", "hand-written step": "handwritten"}.get(engine["way"], "eager")
    widths = [int(w) for w in engine["widths"].split(", ")] if engine["widths"] else None
    return at | {"engine": name, "engine_reason": engine["reason"], "widths": widths, "streams": engine["kind"] not in (None, "widths")}


def _build(cls: Any, raw: dict, at: str) -> Any:
    """A dataclass from JSON. at: what the messages begin with, the file and the field that holds it."""
    values = _fields(cls, raw, at)
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"{at.rstrip(': .')} lacks a field ({error}); {AGAIN}") from error


def _fields(cls: Any, raw: dict, at: str) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(raw) - set(hints))
    if unknown:
        raise UserError(f"{at.rstrip(': .')} has the unknown field {unknown[0]!r} of {cls.__name__}; {AGAIN}")
    return {name: _typed(hints[name], value, f"{at}{name}") for name, value in raw.items()}


def _typed(hint: Any, value: Any, at: str) -> Any:
    """The value as its annotation wants it: int, float, bool, str, list, dict or a dataclass, or null. Raises UserError for any other."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = options[0]
    if kind is Any or (value is None and types.NoneType in options):
        return value
    plain, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    wanted: Any = dict if dataclasses.is_dataclass(plain) else (int, float) if plain is float else plain
    if not isinstance(value, wanted) or (isinstance(value, bool) and plain is not bool):
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:59]}…"
        raise UserError(f"{at} is {shown}, not {WORDS.get(plain, 'an object')}{' or null' if types.NoneType in options else ''}; fix it, or {AGAIN}")
    if dataclasses.is_dataclass(plain):
        return _build(plain, value, f"{at}.")
    if plain is list:
        return [_typed(inner[0], one, f"{at}[{number}]") for number, one in enumerate(value)]
    return {key: _typed(inner[1], one, f"{at}.{key}") for key, one in value.items()} if plain is dict else value


def _check_values(result: Result, at: str) -> None:
    """Raise UserError where a text is none of those that have a meaning, or a fact inside hardware, provenance or config is of another type."""
    metrics = tuple(f.name for f in dataclasses.fields(Score) if f.name not in NOT_METRICS)
    engines = [("work.engine", result.work.engine, tuple(ENGINES))] if result.work and result.work.engine is not None else []
    for name, value, known in [("kind", result.kind, KINDS), ("metric", result.metric, metrics), *engines]:
        if value not in known:
            raise UserError(f"{at}{name} is {value!r}, none of {', '.join(known)}; fix it, or {AGAIN}")
    for name, hint in FACTS.items():
        part, _, key = name.partition(".")
        if key in (facts := getattr(result, part)):
            _typed(hint, facts[key], f"{at}{name}")
    for name, number, low, high in _ranges(result):
        if not low <= number <= high:
            raise UserError(f"{at}{name} is {number}, not a number from {low}{' on' if high == math.inf else f' to {high}'}; fix it, or {AGAIN}")
    if unknown := next((n for n in (result.inference and result.inference.adapters) or {} if not n.isdecimal()), None):
        raise UserError(f"{at}inference.adapters has {unknown!r}, no number of requests; fix it, or {AGAIN}")
    try:
        datetime.fromisoformat(result.provenance.get("started") or "2000-01-01")
    except ValueError as error:
        raise UserError(f"{at}provenance.started is {result.provenance['started']!r}, no ISO time; fix it, or {AGAIN}") from error


def _ranges(result: Result) -> Iterator[tuple[str, float, float, float]]:
    """(field, its value, the lowest and the highest that mean anything) of what others divide by or take a logarithm of."""
    yield "train_rows", result.train_rows, 1 if result.status == "ok" else 0, math.inf  # 0: all, of a cell that did not come to count them
    for split, score in result.scores.items():
        yield f"scores.{split}.rows", score.rows, 1, math.inf
        yield f"scores.{split}.accuracy", score.accuracy, 0, 1
    for number, point in enumerate(result.history):
        yield f"history[{number}].step", point.get("step") or 0, 1, math.inf


def rank_key(metric: float, nll: float | None) -> tuple[float, float]:
    """What weights, prompts and trials are ranked by, the best the largest: the metric, then the lower nll; one that was not measured is the worst."""
    return metric, -math.inf if nll is None else -nll


def price(cfg: DictConfig, seconds: float) -> Cost | None:
    """What so many seconds cost by the config; None without a price."""
    return None if cfg.price_per_hour is None else Cost(cfg.price_per_hour * seconds / 3600, cfg.currency, cfg.price_per_hour)


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV under these columns, a header first; None is empty, a key that is no column is left out."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
