"""Which cell is which: the config that decides its outcome, what it reads, and the code that it runs.

Library. The one place that says whether two cells are the same. DVC (through pipeline.plan), pipeline.cells, checkpoints, studies, make adopt
and the commands that compare results ask it; a result keeps its own answer in `provenance`. A config key at its default is no part of it, so a
new key changes no cell; comments, docstrings and blank lines of code are no part either.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell import source
from pipeline.core import names, settings
from pipeline.core.compose import ROOT, build, plain
from pipeline.core.files import UserError, discard, discard_folder, read_object, sha256
from pipeline.data.recipe import Recipe
from pipeline.records.finished import cell_at, name, read_or_name
from pipeline.records.results import Result
from pipeline.records.results import read as read_result
from pipeline.scoring.per_row import source_of
from pipeline.teachers.synthetic import rows as synthetic
from pipeline.training.checkpoint import shards_of

CELL = "pipeline.cell.run"
"""The module whose imports are the code that every cell runs."""
READ = ("scoring/metrics/*/*.py", "scoring/news.txt")
"""Files under pipeline/ that cells read by their path."""
NO_PART = "pipeline.core."
"""The room whose code is none: it composes, checks and words what the identity holds itself. A default in core/settings.py says what the absence of
a key means and never changes (tests/test_plan.py pins them); the default that users get stands in conf/."""
SHOWN = 3
"""How many keys or files a message names."""

# The config


def decides(cfg: DictConfig) -> dict[str, Any]:
    """What of a cell's composed config decides its outcome, names of classes for dotted paths."""
    return deciding(plain(cfg))


def deciding(values: dict[str, Any]) -> dict[str, Any]:
    """The same of a config as plain data, such as a result's: the keys that settings.DECIDING lists, values at their default left out.

    Raises:
        UserError: it names a class that the table does not have.
    """
    config = {key: value for key, value in names.named(values).items() if key in settings.DECIDING and value is not None}
    decisive: dict[str, Any] = {}
    for key, value in config.items():
        left = _without_defaults(key, value) if isinstance(value, dict) else {} if value == settings.DECIDING[key] else {key: value}
        if left:
            decisive[key] = left if isinstance(value, dict) else value
    evaluate = decisive.get("evaluate", {})
    for condition, keys in settings.Evaluate.ONLY_WITH.items():
        for unused in keys if not config.get("evaluate", {}).get(condition) else ():
            evaluate.pop(unused, None)
    decisive.get("teacher", {}).pop("writer", None)  # what it wrote decides: `inputs`
    mixed = decisive.pop("synthetic", None)
    if mixed and synthetic.is_wanted(mixed):  # how its rows were written shows in them: `inputs`
        decisive["synthetic"] = {"name": mixed["name"], "share": mixed["share"]}
    return decisive


def _without_defaults(group: str, values: dict[str, Any]) -> dict[str, Any]:
    defaults = _defaults(group, values)
    ignored = settings.NOT_DECIDING.get(group, ())
    return {key: value for key, value in values.items() if key not in ignored and (key not in defaults or defaults[key] != value)}


def _defaults(group: str, values: dict[str, Any]) -> dict[str, Any]:
    """What the fields of a group are where the config is silent."""
    kind = {"task": Recipe, "model": settings.Model, "train": settings.Train, "evaluate": settings.Evaluate, "precision": settings.Precision,
            "technique": settings.Technique}.get(group)
    if group in ("method", "objective", "teacher"):
        kind = names.class_of(values, group)
    defaults = {}
    for field in dataclasses.fields(kind) if kind is not None and dataclasses.is_dataclass(kind) else ():
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if default is not dataclasses.MISSING:
            defaults[field.name] = list(default) if isinstance(default, tuple) else default
    return defaults


# What a cell reads


def inputs(cfg: DictConfig) -> dict[str, str | None]:
    """sha256 of what a cell reads, by name; None: it is not there. Where the folders lie is no part of it."""
    data, model = (folder / "manifest.json" for folder in (Path(cfg.paths.data) / cfg.task.name, Path(cfg.paths.models) / cfg.model.name))
    hashes = {"data": _digest(data), "model": _digest(model)}
    for path in reads(cfg):
        hashes["/".join(path.parts[-2:])] = _digest(path)
    return hashes


def reads(cfg: DictConfig) -> list[Path]:
    """Files besides data, rationales and base model whose content decides the outcome; of another cell its result.json stands for all of it."""
    start = [cell_at(cfg.start, cfg) / "result.json"] if cfg.start else []
    if "writer" in cfg.teacher.keys():  # noqa: SIM118 (`in` leaves an exception of OmegaConf's that keeps this frame and its callers alive)
        start.append(Path(cfg.paths.rationales) / cfg.task.name / cfg.teacher.name / "rationales.jsonl")
    own = source_of(cfg.task.metric if "metric" in cfg.task.keys() else "")  # noqa: SIM118 (as above; `get` does so, too)
    return start + ([own] if own else []) + synthetic.reads(cfg) + build(cfg.objective, "objective").reads(cfg)


def _digest(path: Path) -> str | None:
    """Of another cell: what it was made of and what it answered, so that a second run of it which measured other times is the same."""
    if not path.exists():
        return None
    if path.name != "result.json":
        return sha256(path)
    result = read_result(path)
    answers = path.parent / "predictions.jsonl"
    made = [result.provenance.get("identity"), _key(deciding(result.config)), sha256(answers) if answers.exists() else None]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def fingerprint(cfg: DictConfig) -> str:
    """Hash of the config and of what the cell reads; the code stands apart from it."""
    return _key({"config": decides(cfg), "inputs": inputs(cfg)})


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


# The code


def code(cfg: DictConfig) -> dict[str, str]:
    """Digest of every file that the cell runs, by its path below the project: what all cells run, its method's and its objective's."""
    digests = common_code() | own_code(deciding(plain(cfg)))
    source.keep()
    return digests


def common_code() -> dict[str, str]:
    """Digests of the files that every cell runs: what cell/run imports, directly or not, and what is read by its path."""
    read = {p for pattern in READ for p in (ROOT / "pipeline").glob(pattern)}
    return digests([*closure(CELL), *read])


def request_code(cfg: DictConfig) -> dict[str, str]:
    """The same of what answers its requests: without its objective, which no request runs."""
    return common_code() | own_code(deciding(plain(cfg)), ("method",))


def own_code(config: dict[str, Any], groups: Sequence[str] = ("method", "objective")) -> dict[str, str]:
    """Digests of the files of a cell's own method and objective, and of what they import beyond `common_code`."""
    modules = [names.TABLE[group][config[group]["type"]].rpartition(".")[0] for group in groups]
    common = set(closure(CELL))
    return digests(path for module in modules for path in closure(module) if path not in common)


def digests(paths: Iterable[Path]) -> dict[str, str]:
    """Path below the project -> digest, in order."""
    return {path.relative_to(ROOT).as_posix(): digest(path) for path in sorted(set(paths))}


@functools.cache
def digest(path: Path) -> str:
    """sha256 of what a Python file does (its syntax tree without docstrings: comments and layout do not count); of another file's bytes."""
    return source.look(path).digest if path.suffix == ".py" else sha256(path)[:16]


@functools.cache
def closure(module: str) -> tuple[Path, ...]:
    """The project's files that a module imports, at the top or within a function, directly or not; its own first."""
    seen: dict[Path, None] = {}
    todo = [module]
    while todo:
        one = todo.pop()
        path = _file(one)
        if path is None or path in seen or one.startswith(NO_PART):
            continue
        seen[path] = None
        todo += source.look(path).imports
    return tuple(seen)


def _file(module: str) -> Path | None:
    path = ROOT / f"{module.replace('.', '/')}.py"
    return path if path.exists() else None


# A result compared with a config


@dataclass(frozen=True)
class Difference:
    """What a finished cell and a config differ in. All three empty: the same cell."""

    config: list[str]
    """Keys: train.lr 0.001 -> 0.002."""
    inputs: list[str]
    """data, model, and names of other files that were read."""
    code: list[str]
    """Files; "all" where the result does not say (a result of schema 1)."""

    @property
    def other(self) -> bool:
        """Whether it is another cell: another config, or made of other data."""
        return bool(self.config or self.inputs)

    def __bool__(self) -> bool:
        return bool(self.config or self.inputs or self.code)

    def __str__(self) -> str:
        words = [few(self.config)] if self.config else []
        words += [f"other {few(self.inputs)}"] if self.inputs else []
        words += [f"older code ({few(self.code)})"] if self.code else []
        return "; ".join(words)


def difference(result: Result, cfg: DictConfig) -> Difference:
    """What a result and a config differ in; the code is compared for a result that is otherwise the same."""
    theirs, mine = dict(flat(deciding(result.config))), dict(flat(decides(cfg)))
    keys = [key for key in sorted(theirs.keys() | mine.keys()) if theirs.get(key) != mine.get(key)]
    config = [f"{key} {_shown(theirs.get(key))} -> {_shown(mine.get(key))}" for key in keys]
    there, here = _inputs_of(result), inputs(cfg)
    moved = [key for key in sorted(there) if there[key] != here.get(key) and not (key == "model" and _same_weights(result, cfg))]
    recorded, now = result.provenance.get("code"), code(cfg)
    older = ["all"] if not isinstance(recorded, dict) else [path for path in sorted(recorded.keys() | now.keys()) if recorded.get(path) != now.get(path)]
    return Difference(config, moved, older)


def _same_weights(result: Result, cfg: DictConfig) -> bool:
    """Whether a base is the same though its manifest, which also says where it came from, is another."""
    path, theirs = Path(cfg.paths.models) / cfg.model.name / "manifest.json", result.provenance.get("model_sha256")
    return theirs is not None and path.exists() and read_object(path).get("sha256") == theirs


def _inputs_of(result: Result) -> dict[str, Any]:
    stored = result.provenance.get("inputs")
    if isinstance(stored, dict):
        return stored
    return {"data": result.provenance["data_sha256"]} if "data_sha256" in result.provenance else {}


def standing(cfg: DictConfig) -> tuple[Result, Difference] | None:
    """The result that stands where the cell's would, and what the two differ in; None where there is none, or a damaged one, which is named."""
    result = read_or_name(folder_of(cfg) / "result.json")
    return None if result is None else (result, difference(result, cfg))


def check_free(cfg: DictConfig) -> None:
    """Raise UserError where another cell stands in the cell's folder and overwrite=true was not said."""
    if folder_of(cfg).is_symlink():
        raise UserError(f"{folder_of(cfg)} is a symbolic link, through which nothing is written; remove it, or keep it and choose variant=<a word>")
    there = standing(cfg)
    if there is None or not there[1].other or cfg.overwrite:
        return
    raise UserError(
        f"{folder_of(cfg)} holds another cell ({there[1]}); add overwrite=true to replace it, or keep both with experiment=<another name> or variant=<a word>"
    )


def check_adoptable(cells: Sequence[DictConfig]) -> None:
    """Raise UserError where a cell has no result, or one of another config, data, model or code, naming it."""
    missing, others = [], []
    for cfg in cells:
        there = standing(cfg)
        if there is None:
            missing.append(name(cfg))
        elif there[1]:
            others.append(f"{name(cfg)}: {there[1]}")
    if missing:
        raise UserError(f"{len(missing)} cells have no result ({few(missing)}); run python -m pipeline.cells experiments={cells[0].experiment} first")
    if others:
        raise UserError(f"{len(others)} results are not of today's cells ({few(others)}); run python -m pipeline.cells experiments={cells[0].experiment} again")


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values as dotted keys, in order; an empty mapping is a value."""
    if isinstance(values, dict) and (values or not prefix):
        for key, value in values.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def _shown(value: Any) -> str:
    text = "its default" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def few(words: Sequence[str]) -> str:
    """The first of so many words, and how many more there are."""
    return ", ".join(words[:SHOWN]) + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")


# Where a cell's files lie


def folder_of(cfg: DictConfig) -> Path:
    """Where the cell's files go."""
    return Path(cfg.paths.results) / cfg.experiment / name(cfg)


def provenance(cfg: DictConfig) -> dict[str, Any]:
    """What a result keeps: its identity, what it read and the code that it ran."""
    return {"identity": fingerprint(cfg), "inputs": inputs(cfg), "code": code(cfg)}


def checkpoint_of(cfg: DictConfig) -> Path:
    """The checkpoint to resume from: keyed by config, inputs and code, in a folder that DVC does not know."""
    return Path(cfg.paths.work) / "checkpoints" / f"{cfg.experiment}-{name(cfg)}-{fingerprint(cfg)}-{_key(code(cfg))[:8]}.pt"


def packed_of(cfg: DictConfig) -> Path:
    """Where the training of a cell that was packed with others (pack=true) waits for the cell to take it up."""
    return checkpoint_of(cfg).with_suffix(".packed")


def answers_of(cfg: DictConfig) -> Path:
    """Where the answers of a cell are kept while it scores."""
    return checkpoint_of(cfg).with_suffix(".answers")


def discard_training(cfg: DictConfig) -> None:
    """Remove what a training left to be resumed from: the cell's result stands for it now."""
    discard_folder(shards_of(checkpoint_of(cfg)))
    for left in (checkpoint_of(cfg), packed_of(cfg), answers_of(cfg)):
        discard(left)


# Plans, for DVC


def plan(cfg: DictConfig) -> dict[str, Any]:
    """A cell's plan: config (what decides its outcome), code (of its method and objective); memory_limit_gb decides whether there is one."""
    config = decides(cfg)
    limit = {} if cfg.memory_limit_gb is None else {"memory_limit_gb": cfg.memory_limit_gb}
    return {"config": config, "code": own_code(config), **limit}
