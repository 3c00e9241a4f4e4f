"""The result of one cell as frozen dataclasses, and their JSON. Units stand in the field names.

Library. `results/<experiment>/<cell>/result.json` is the truth; MLflow and the report are made from it.
A field that was not measured is null, never zero.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core.compose import with_todays_keys
from pipeline.core.files import UserError, check_name, read_json, write_json
from pipeline.measure.clock import Phases
from pipeline.measure.memory import Memory

SCHEMA = 2
BEFORE = 1
"""The last schema, which is still read."""
KINDS = ("trained", "untrained", "base", "teacher")
"""What a row is: a base that was trained; a base whose request or weights were changed without training; the base as it is; answers without a model."""
ENGINES = {"eager": "eager", "captured": "autograd", "handwritten": "hand-written step", "trl": "TRL's loop"}
"""What did the training steps, with its words for a reader; captured: autograd over static shapes, on a GPU in CUDA graphs (docs/fast.md)."""
NAMES = ("experiment", "cell", "technique", "task", "model")
"""Fields that become parts of paths."""


@dataclass(frozen=True)
class Score:
    """How well one set of rows was answered. Fractions in [0, 1]; the interval is Wilson's at 95%."""

    rows: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    macro_f1: float | None = None
    rouge_l: float | None = None
    nll: float | None = None
    """Mean negative log-likelihood of the right answer, nats per row (choice scoring only)."""
    unanswered: int = 0
    """Rows from whose output no answer could be extracted (generate scoring only)."""


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
    diverged_at: int | None = None
    """The optimiser step (from 1) whose loss was not finite, which ended training; null: it went through."""


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


@dataclass(frozen=True)
class Forgetting:
    """Probes of unrelated text and grammar, after against the untouched base (same precision, and 16 bits).

    Perplexity is per token of the probe text; pairs is the share of minimal pairs ranked right; lambada is the share of LAMBADA
    passages whose last word was said, its perplexity is per such word.
    """

    perplexity: float
    perplexity_base: float
    pairs: float
    pairs_base: float
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
class Teacher:
    """Where the rationales came from: seconds count as complexity, rows as data."""

    name: str
    rows: int
    accuracy: float | None
    seconds: float | None


@dataclass(frozen=True)
class Synthetic:
    """Rows that a teacher wrote (pipeline.synthesize), trained on beside the labelled ones; `train_rows` does not count them."""

    name: str
    """conf/synthetic/<name>.yaml."""
    rows: int
    share: float
    """Of the training rows, as asked for."""
    teacher: str
    """Who wrote them."""
    seconds: float | None
    """That writing, and judging, the whole set took; it may hold more rows than were trained on."""
    examples: int = 0
    """Labelled examples that it was written from and that are no training rows: a taxonomy's. They count as labelled rows."""


@dataclass(frozen=True)
class Tuning:
    """The search (pipeline.tune) that a tuned cell's settings come from."""

    file: str
    """Where it stands: tuning/<experiment>/<technique>-n<train_rows>.yaml."""
    searched: int
    """Hyperparameters that were searched."""
    trials: int
    device_s: float
    """Wall clock of the trials."""
    validation: float
    """The best trial's metric on the validation rows."""
    seed: int
    """Whose training rows the trials saw."""


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
    """ok, or oom (out of memory: a result, keyed with the hardware)."""
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
    synthetic: Synthetic | None = None
    """None: trained on labelled rows alone."""
    tuning: Tuning | None = None
    """None: not tuned by pipeline.tune."""
    cost: Cost | None = None
    """None: the config has no price_per_hour."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Points of the training curve: step, loss, lr; validation points carry validation_<metric>."""
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
    shared_process: bool = False
    """Whether imports and base were read before the cell was forked: its start-up, load and wall clock leave them out."""
    schema: int = SCHEMA

    @property
    def test(self) -> Score | None:
        return self.scores.get("test")


def figures(result: Result) -> dict[str, float]:
    """The few figures that `dvc metrics show` lists, by name (the report writes them); what was not measured is left out."""
    found: dict[str, float | None] = {split: getattr(result.scores[split], result.metric) for split in ("test", "validation") if split in result.scores}
    for part, names in ((result.phases, ("train_s", "wall_s")), (result.memory, ("peak_bytes",)), (result.size, ("trainable", "artefact_bytes")),
                        (result.inference, ("latency_s",))):
        found |= {name: getattr(part, name) for name in names if part is not None}
    return {name: value for name, value in found.items() if value is not None}


def write(folder: str | Path, result: Result) -> None:
    """Write result.json in a cell's folder, whole or not at all."""
    write_json(Path(folder) / "result.json", dataclasses.asdict(result))


def read(path: str | Path) -> Result:
    """Read a result.json (or the cell's folder that holds it).

    Raises:
        UserError: missing, not JSON, of another schema, or with unknown or missing fields.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "result.json"
    raw = read_json(path)
    found = raw.get("schema") if isinstance(raw, dict) else None
    if found not in (SCHEMA, BEFORE):
        raise UserError(f"{path} was written by schema {found}, this version reads schemas {BEFORE} and {SCHEMA}; delete the cell's folder and run it again")
    result: Result = _build(Result, _from_schema_1(raw) if found == BEFORE else raw, path)
    result = dataclasses.replace(result, config=with_todays_keys(result.config))
    for field_name in NAMES:
        check_name(getattr(result, field_name), f"{path}: {field_name}")
    return result


SHARED_1 = "imports and base model were read once for several cells: start-up and load times are not a single run's"
ENGINE_1 = re.compile(
    r"engine: (?P<way>eager|autograd|hand-written step)(, because (?P<reason>.*?))?(, captured in CUDA graphs)?"
    r"(; (?P<kind>widths|rows packed into streams of tokens) (?P<widths>[\d, ]+))?"
)
DIVERGED_1 = re.compile(r"training diverged: the loss (or its gradient )?was not finite at step (?P<step>\d+) of \d+")
"""Notes of schema 1 that are fields now; the first two are notes no more."""


def _from_schema_1(raw: dict) -> dict:
    """A result of schema 1 with the fields that came since, from its notes and hyperparameters: the only place that looks into either."""
    notes, shown = raw.get("notes") or [], raw.get("hyperparameters") or {}
    untrained = {"none": "base", "teacher": "teacher"}.get(str(raw.get("method")), "untrained")
    kind = untrained if raw.get("objective") == "none" else "trained"
    fields = {
        "schema": SCHEMA, "kind": kind, "start": shown.get("start"), "shared_process": SHARED_1 in notes,
        "takes_rows": kind == "trained" or "labels_from" in shown or "start" in shown,
        "labelled_rows": _labelled_1(raw, kind, shown) if raw.get("status") == "ok" else None,
        "notes": [n for n in notes if n != SHARED_1 and not ENGINE_1.fullmatch(n)],
    }
    if isinstance(raw.get("work"), dict):
        fields["work"] = raw["work"] | (_steps_1(raw, notes) if kind == "trained" else {})
    return raw | fields


def _labelled_1(raw: dict, kind: str, shown: dict) -> int:
    """What the report of schema 1 counted as labelled rows."""
    train, validation = raw.get("train_rows") or 0, raw.get("validation_rows") or 0
    beside = (raw.get("synthetic") or {}).get("examples", 0)
    if raw.get("tuning") or "start" in shown or (kind == "trained" and "labels_from" not in shown):
        return beside + train + validation
    fixed = min(shown.get("calibration_rows", 0), train) or shown.get("k", 0)
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


def read_all(root: str | Path) -> list[Result]:
    """Every result below a folder, in path order."""
    return [read(p) for p in sorted(Path(root).rglob("result.json"))]


def _build(cls: Any, raw: dict, path: Path) -> Any:
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(raw) - set(hints))
    if unknown:
        raise UserError(f"{path} has the unknown field {unknown[0]!r} of {cls.__name__}; delete the cell's folder and run it again")
    values = {}
    for name, value in raw.items():
        kinds = [hints[name], *typing.get_args(hints[name])]
        inner = next((k for k in kinds if dataclasses.is_dataclass(k)), None)
        if inner and isinstance(value, dict):
            nested = typing.get_origin(hints[name]) is dict
            value = {k: _build(inner, v, path) for k, v in value.items()} if nested else _build(inner, value, path)
        values[name] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"{path} lacks a field ({error}); delete the cell's folder and run it again") from error


def price(cfg: DictConfig, seconds: float) -> Cost | None:
    """What so many seconds cost by the config; None without a price."""
    return None if cfg.price_per_hour is None else Cost(cfg.price_per_hour * seconds / 3600, cfg.currency, cfg.price_per_hour)


def history_csv(history: list[dict[str, float]]) -> str:
    """The training curve as CSV: step, loss, lr, validation_metric, validation_nll; header alone if nothing was trained."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ["step", "loss", "lr", "validation_metric", "validation_nll"], lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(history)
    return out.getvalue()
