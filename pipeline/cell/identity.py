"""Which cell is which: what of its config, code and inputs decides its outcome."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core import names
from pipeline.core.compose import ROOT, build, plain
from pipeline.core.files import sha256
from pipeline.records.finished import cell_at, name
from pipeline.teachers.synthetic import rows as synthetic

CODE = (
    "cell/identity.py", "cell/inputs.py", "cell/run.py", "data/choices.py", "data/rows.py", "engine/*.py", "measure/memory.py", "methods/*.py",
    "methods/modules/*.py", "models/base.py", "models/blocks.py", "objectives/*.py", "records/finished.py", "records/results.py", "scoring/answers.py",
    "scoring/scorer.py", "serving/artefact.py", "training/*.py",
)
ASIDE = ("paths", "tracking", "report", "sweep", "variant", "cell", "split", "requests", "to", "memory_limit_gb", "pack", "forecast", "search", "tune", "tuned",
         "price_per_hour", "currency", "writer")
"""Keys of a config that decide no cell's outcome."""


def folder_of(cfg: DictConfig) -> Path:
    """Where the cell's files go."""
    return Path(cfg.paths.results) / cfg.experiment / name(cfg)


def decides(cfg: DictConfig) -> dict[str, Any]:
    """What of a cell's config decides its outcome: not where files lie, how progress is shown or where it is tracked."""
    raw = {k: v for k, v in plain(cfg).items() if k not in ASIDE}
    raw["train"].pop("progress", None)
    raw["train"].pop("checkpoint_every_s", None)
    if raw["start"] is None:
        raw.pop("start")
    mixed = raw.pop("synthetic", None)
    if mixed and synthetic.wanted(cfg):  # how its rows were written shows in them: `reads`
        raw["synthetic"] = {"name": mixed["name"], "share": mixed["share"]}
    raw["teacher"].pop("writer", None)  # what it wrote decides: `reads`
    if raw["train"].get("min_steps") is None:  # cells that were run before there was such a key keep their results
        raw["train"].pop("min_steps", None)
    if not raw["train"].get("checkpointing"):
        raw["train"].pop("checkpointing", None)
    if not (raw["evaluate"].get("forgetting") and raw["evaluate"].get("probe_lambada")):
        raw["evaluate"].pop("probe_lambada", None)
    if not (raw["evaluate"].get("adapters") and raw["evaluate"].get("latency_rows")):
        raw["evaluate"].pop("adapters", None)
    return raw


def fingerprint(cfg: DictConfig) -> str:
    """Hash of what decides a cell's outcome: its config, data and base model, and the other cell that it begins at."""
    raw = decides(cfg)
    for path in reads(cfg):
        raw[path.as_posix()] = sha256(path) if path.exists() else None
    for path in (Path(cfg.paths.data) / cfg.task.name, Path(cfg.paths.models) / cfg.model.name):
        raw[path.name] = sha256(path / "manifest.json") if (path / "manifest.json").exists() else None
    return hashlib.sha256(json.dumps(raw, sort_keys=True, default=str).encode()).hexdigest()[:16]


def reads(cfg: DictConfig) -> list[Path]:
    """Files besides data, rationales and base model whose content decides the outcome; of another cell its result.json stands for all of it."""
    start = [cell_at(cfg.start, cfg) / "result.json"] if cfg.start else []
    if "writer" in cfg.teacher.keys():  # noqa: SIM118 (`in` leaves an exception of OmegaConf's that keeps this frame and its callers alive)
        start.append(Path(cfg.paths.rationales) / cfg.task.name / cfg.teacher.name / "rationales.jsonl")
    return start + synthetic.reads(cfg) + build(cfg.objective, "objective").reads(cfg)


def checkpoint_of(cfg: DictConfig) -> Path:
    """The checkpoint to resume from: keyed by the fingerprint and the code that trains, in a folder DVC does not know."""
    code = hashlib.sha256()
    for pattern in CODE:
        for path in sorted(Path(__file__).parent.parent.glob(pattern)):
            code.update(path.read_bytes())
    return Path(cfg.paths.work) / "checkpoints" / f"{name(cfg)}-{fingerprint(cfg)}-{code.hexdigest()[:8]}.pt"


def packed_of(cfg: DictConfig) -> Path:
    """Where the training of a cell that was packed with others (pack=true) waits for the cell to take it up."""
    return checkpoint_of(cfg).with_suffix(".packed")


PARTS = ("pipeline.models.blocks", "pipeline.models.blocks", "pipeline.methods.modules")
"""What methods are made of, and no cell imports by itself."""


def plan(cfg: DictConfig) -> dict[str, Any]:
    """config: what decides the cell's outcome, resolved; code: sha256 of the files that define its method and objective."""
    config = decides(cfg) | {"memory_limit_gb": cfg.memory_limit_gb}
    modules = {names.TABLE[group][config[group]["type"]].rpartition(".")[0] for group in ("method", "objective")}
    files = sorted(set().union(*(sources(module) for module in modules)))
    return {"config": config, "code": {p.relative_to(ROOT).as_posix(): sha256(p) for p in files}}


def sources(module: str) -> set[Path]:
    """The module's file, and the files of PARTS that it imports, directly or through one of them."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.exists():
        return set()
    found = {path}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                found |= sources(name) if name.startswith(PARTS) else set()
    return found
