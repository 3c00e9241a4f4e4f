"""What is logged to MLflow of a cell or a sweep: params, metrics, tags and files, all taken from the result files.

Library; knows MLflow's vocabulary but not MLflow. The names are fixed, so that runs of different machines line up. Everything here is a function of
files, so a mirror made after the fact equals the one made live.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, check_name, folder_bytes, read_json, read_object, sha256
from pipeline.records import results
from pipeline.records.results import Result

LONGEST = 5000  # characters of a param or tag; MLflow refuses more than 6,000
SCORES = ("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "rouge_l", "exact_match", "numeric", "token_f1", "custom", "nll")
SHORT = {"lora_alpha": "alpha"}
HEADLINES = ("2_train_time_s", "3_peak_memory_gib", "4_r")
"""After 1_test_<metric>: what a list or a comparison of runs begins with, as names are sorted there; r is a param. All else is behind a prefix."""
LOGGED_BYTES = 64 << 20
"""Artefacts up to this size are logged as a model that MLflow loads; larger ones stay in results/ alone."""


@dataclass(frozen=True)
class Metric:
    """One point: value at `step`, stamped in Unix milliseconds."""

    key: str
    value: float
    timestamp_ms: int
    step: int = 0


@dataclass(frozen=True)
class Dataset:
    """A data set input. `sha256` is of the task's manifest.json, which lists the digest of every file."""

    name: str
    context: str
    """training or testing"""
    sha256: str
    uri: str
    rows: int


@dataclass(frozen=True)
class Run:
    """One MLflow run, keyed by `cell` ("<experiment>/<cell>")."""

    cell: str
    experiment: str
    name: str
    start_ms: int
    end_ms: int | None
    status: str
    """FINISHED, FAILED, or RUNNING (a sweep that is not through)."""
    params: dict[str, str]
    tags: dict[str, str]
    metrics: list[Metric] = field(default_factory=list)
    datasets: list[Dataset] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    """Kept as config.yaml."""
    metric: str = ""
    """The experiment's headline metric."""
    model: Path | None = None
    """A finished cell's folder whose artefact is to be logged as a model."""

    def digest(self) -> str:
        """Hex sha256 of everything the run is to hold: equal means up to date."""
        model = self.model and sha256(self.model / "artefact")
        content = dataclasses.asdict(self) | {"files": {p.name: sha256(p) for p in self.files}, "model": model}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def cell_run(folder: str | Path) -> Run:
    """The run of one finished cell, from results/<experiment>/<cell>/.

    Raises:
        UserError: result.json is missing, broken or of another schema.
    """
    folder = Path(folder)
    result = results.read(folder)
    start = _milliseconds(result.provenance.get("started"))
    end = start + round(1000 * result.phases.wall_s) if result.phases else start
    named = ("technique", "method", "objective", "precision", "train_rows", "labelled_rows", "seed", "model", "task")
    return Run(
        cell=f"{result.experiment}/{result.cell}", experiment=result.experiment, name=result.cell, start_ms=start, end_ms=end,
        status="FINISHED" if result.status == "ok" else "FAILED",
        params=_texts({HEADLINES[2]: result.hyperparameters.get("r")} | {SHORT.get(k, k): v for k, v in result.hyperparameters.items()}
                      | {k: getattr(result, k) for k in named}),
        tags=_cell_tags(result),
        metrics=[Metric(key, float(value), end) for key, value in _cell_metrics(result).items()] + _curves(result, start, end),
        datasets=_datasets(result),
        files=_own(folder / "result.json", folder / "predictions.jsonl"),
        config=result.config, metric=result.metric,
        model=folder if result.status == "ok" and _loggable(folder / "artefact") else None,
    )


def _loggable(artefact: Path) -> bool:
    """Whether an artefact is there, small enough, and made of files of its own."""
    return (artefact / "artefact.json").exists() and not any(p.is_symlink() for p in artefact.rglob("*")) and folder_bytes(artefact) <= LOGGED_BYTES


def _own(*paths: Path) -> list[Path]:
    """Those that are there. Raises UserError for a symbolic link: what it leads to is not the cell's to be sent."""
    if link := next((path for path in paths if path.is_symlink()), None):
        raise UserError(f"{link} is a symbolic link, whose content is not sent to MLflow; put the file itself there")
    return [path for path in paths if path.exists()]


def _cell_tags(result: Result) -> dict[str, str]:
    beside = result.neighbours
    return _texts({
        **{k: getattr(result, k) for k in ("experiment", "technique", "family", "kind", "seed", "status", "packed", "shared_process", "error")},
        **{k: result.provenance.get(k) for k in ("git_commit", "git_dirty")},
        "hardware": hardware_name(result.hardware), "memory_kind": result.memory.kind if result.memory else None,
        **{k: getattr(result.work, k, None) for k in ("resumed", "engine", "engine_reason")},
        "requests_from": getattr(result.inference, "requests_from", None),
        "neighbours": beside and f"{beside.cells}, {'in turns' if beside.turns else 'no time is its own'}{', MPS' * beside.mps}",
        "mlflow.source.git.commit": result.provenance.get("git_commit"), "mlflow.note.content": "\n\n".join(result.notes) or None,
    })


def hardware_name(hardware: dict[str, Any]) -> str | None:
    """The GPU's name, else the CPU's with its number of cores."""
    if hardware.get("gpu"):
        return str(hardware["gpu"])
    return f"{hardware['cpu']} ({hardware.get('cpu_count')} cores)" if hardware.get("cpu") else None


def _cell_metrics(result: Result) -> dict[str, float]:
    peak = result.memory.peak_bytes if result.memory else None
    metrics: dict[str, Any] = {  # first: where runs are compared, MLflow begins with the metric that was logged first
        f"1_test_{result.metric}": getattr(result.test, result.metric) if result.test else None,
        HEADLINES[0]: result.phases.train_s if result.phases else None, HEADLINES[1]: None if peak is None else round(peak / 2**30, 3),
    }
    for split, score in result.scores.items():
        metrics |= {f"{split}/{name}": getattr(score, name) for name in SCORES}
    parts: list[tuple[str, Any]] = [
        ("phases", result.phases), ("forgetting", result.forgetting), ("size", result.size), ("inference", result.inference),
        ("inference/adapters", result.inference and result.inference.adapters), ("teacher", result.teacher), ("synthetic", result.synthetic),
        ("train", result.work), ("train", result.memory),
    ]
    for name, part in parts:
        metrics |= {f"{name}/{k}": v for k, v in (part if isinstance(part, dict) else dataclasses.asdict(part) if part else {}).items()}
    metrics["train/time_s"] = metrics[HEADLINES[0]]
    return {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _curves(result: Result, start: int, end: int) -> list[Metric]:
    """history/<name> by training step; a point's time is its share of the run, which any mirror can recompute."""
    steps = [int(point["step"] or 0) for point in result.history]
    last = max(steps, default=0) or 1
    return [
        Metric(f"history/{key}", float(value), start + round((end - start) * step / last), step)
        for step, point in zip(steps, result.history, strict=True) for key, value in point.items() if key != "step" and value is not None
    ]


def _datasets(result: Result) -> list[Dataset]:
    digest = result.provenance.get("data_sha256")
    splits = [("train", "training", result.train_rows)] + ([("test", "testing", result.test.rows)] if result.test else [])
    return [Dataset(f"{result.task}-{split}", context, digest, f"data/{result.task}/{split}.jsonl", rows) for split, context, rows in splits if digest]


def sweep_runs(folder: str | Path) -> tuple[Run, list[Run]]:
    """The parent run of a sweep and one child a finished trial, from sweep.json, trials.csv and best.json.

    Raises:
        UserError: sweep.json is missing, or the folder's files are not those of a sweep.
    """
    folder = Path(folder)
    try:
        return _sweep_runs(folder)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{folder / 'sweep.json'} and the files beside it are none of a sweep ({type(error).__name__}: {error}); remove that folder") from error


def _sweep_runs(folder: Path) -> tuple[Run, list[Run]]:
    sweep = read_object(folder / "sweep.json")
    check_name(sweep["experiment"], f"{folder / 'sweep.json'}: experiment")
    best_path = folder / "best.json"
    best = read_json(best_path) if best_path.exists() else None
    start = _milliseconds(sweep["provenance"]["started"])
    end = max(start, _milliseconds(best["finished"])) if best else None
    params = _texts({k: sweep[k] for k in ("technique", "task", "model", "seed", "train_rows", "sampler")})
    tags = _texts({k: sweep[k] for k in ("experiment", "technique", "seed")} | {"git_commit": sweep["provenance"].get("git_commit")})
    key = f"{sweep['experiment']}/sweep/{folder.name}"
    trials = folder / "trials.csv"
    rows = list(csv.DictReader(io.StringIO(trials.read_text(encoding="utf-8")))) if trials.exists() else []
    parent = Run(
        cell=key, experiment=sweep["experiment"], name=f"{folder.name} sweep", start_ms=start, end_ms=end, status="FINISHED" if best else "RUNNING",
        params=params | _texts({"space": json.dumps(sweep["space"]), "objectives": ", ".join(sweep["objectives"])}),
        tags=tags | {"status": "ok" if best else "running"},
        metrics=[Metric(f"best/{k}", float(v), end or 0) for k, v in best["values"].items()] if best else [],
        files=_own(folder / "sweep.json", best_path) if best else [],
    )
    return parent, [_trial_run(row, sweep, key, params, tags) for row in rows]


def _trial_run(row: dict[str, str], sweep: dict[str, Any], key: str, params: dict[str, str], tags: dict[str, str]) -> Run:
    start = _milliseconds(row["started"])
    end = start + round(1000 * float(row["seconds"] or 0))
    named = {f"validation/{sweep['metric']}": row.get("validation"), "train/peak_bytes": row["peak_bytes"], "train/time_s": row["train_s"],
             "train/tokens_per_s": row["tokens_per_s"]}
    settings = {key.rpartition(".")[2]: row[key] or None for key in sweep["settings"]}
    return Run(
        cell=f"{key}/{row['number']}", experiment=sweep["experiment"], name=f"{key.rpartition('/')[2]} trial {row['number']}", start_ms=start, end_ms=end,
        status="FINISHED" if row["status"] in ("ok", "pruned") else "FAILED",
        params=params | _texts({SHORT.get(name, name): value for name, value in settings.items()}),
        tags=tags | _texts({"status": row["status"], "memory_kind": row["memory_kind"] or None, "packed": row.get("packed") or None}),
        metrics=[Metric(k, float(v), end) for k, v in named.items() if v],
    )


def _milliseconds(moment: str | None) -> int:
    """ISO time -> Unix milliseconds; without an offset it is UTC."""
    if not moment:
        return 0
    at = datetime.fromisoformat(moment)
    return round(1000 * (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp())


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {k: str(v)[:LONGEST] for k, v in values.items() if v is not None}
