"""The settings that `python -m pipeline.tune` found: tuning/<experiment>/<technique>-n<train_rows>.yaml, which cells with tuned=true are composed of.

Library. technique=lora+tuned says technique=lora tuned=true, in a command as in the grid of experiments/<name>/params.yaml; such a cell
has the variant tuned (results/<experiment>/lora+tuned-s0-n160), so it stands beside the untuned one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from pipeline.core.compose import by_key, plain
from pipeline.core.files import UserError, write_text
from pipeline.core.names import class_of
from pipeline.records.results import Tuning

HEAD = "# Written by python -m pipeline.tune experiments={experiment} technique={technique} train_rows={train_rows}; tuned=true composes it.\n"


@dataclass(frozen=True)
class Edge:
    """A best value at the edge of its range, as pipeline/tune.py reports it."""

    key: str
    value: Any
    side: str
    """low or high."""
    widened: dict[str, Any] | None
    """The part that was added there and searched; None: there was no room for one, or the trials were spent when this came out best."""
    still: bool = False
    """Whether the best value lies at the end of the widened part too."""


@dataclass(frozen=True)
class Tuned:
    """One technique at one number of training rows, tuned."""

    experiment: str
    technique: str
    task: str
    model: str
    train_rows: int | None
    seed: int
    """Whose training rows the trials saw."""
    metric: str
    settings: dict[str, Any]
    """Config key -> value: what cells with tuned=true are set to."""
    searched: dict[str, Any]
    """Config key -> the range that the technique declares."""
    budget: int
    """Trials that every technique of the experiment may have."""
    validation: float
    """The taken trial's metric on the validation rows (pipeline/search/choice.py)."""
    edges: list[Edge]
    trials: list[dict[str, Any]]
    """Every trial that counts: number, part (declared or widened), status (ok, oom, diverged, error), diverged, its settings, validation (or None), and the
    rows that it was measured on (absent in older files)."""
    device_s: float
    """Wall clock of the trials, one after another or packed."""
    packed: bool
    hardware: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> list[float | None]:
        """The validation metric of the trials over the declared range."""
        return [t["validation"] for t in self.trials if t["part"] == "declared"]

    @property
    def failed(self) -> int:
        """Trials without a metric, or whose training diverged."""
        return sum(t["validation"] is None or bool(t["diverged"]) for t in self.trials)


def expected_best(values: Sequence[float | None]) -> list[float]:
    """Expected best validation metric after k = 1 … n random trials, from the n that were made.

    The expected maximum of k draws from the empirical distribution of the n values (Dodge et al., 2019, Show Your Work):
    with the values in ascending order v_1 … v_n, E_k = sum_i v_i * ((i / n)^k - ((i - 1) / n)^k). A trial without a value counts as 0.
    """
    ordered = sorted(v if v is not None else 0.0 for v in values)
    n = len(ordered)
    return [sum(v * ((i / n) ** k - ((i - 1) / n) ** k) for i, v in enumerate(ordered, 1)) for k in range(1, n + 1)]


def label(cfg: DictConfig) -> str:
    """Technique, with its variant, as tuned files and studies are named; the variant tuned is not part of it."""
    variant = str(cfg.variant or "").removesuffix("tuned").removesuffix("-")
    return f"{cfg.technique.name}+{variant}" if variant else str(cfg.technique.name)


def searches(cfg: DictConfig) -> Any:
    """The config's `search` as it is written (pipeline/search/space.py checks it). A method that trains nothing has no `train.` key to search.

    Raises:
        UserError: tune.only is no list of keys.
    """
    raw = plain(cfg)
    entries, only = raw.get("search") or {}, raw["tune"]["only"]
    if only is not None and not isinstance(only, list):
        raise UserError(f"tune.only is {only!r}; write a list of config keys: tune.only=[train.lr]")
    if only is not None and isinstance(entries, dict):
        entries = {key: entry for key, entry in entries.items() if (entry.get("of", key) if isinstance(entry, dict) else key) in only}
    if isinstance(entries, dict) and not class_of(raw["method"], "method").trains:
        return {key: entry for key, entry in entries.items() if not key.startswith("train.")}
    return entries


def path_of(cfg: DictConfig) -> Path:
    """The tuned file of a cell: of its own number of training rows, or of tune.rows."""
    rows = rows_of(cfg)
    return Path(cfg.paths.tuning) / cfg.experiment / f"{label(cfg)}-n{'all' if rows is None else rows}.yaml"


def rows_of(cfg: DictConfig) -> int | None:
    """The number of training rows that a cell's settings are tuned at; None: all there are."""
    at: int | None = cfg.train_rows if cfg.tune.rows is None else cfg.tune.rows
    return at


def write(path: Path, tuned: Tuned) -> None:
    raw = dataclasses.asdict(tuned)
    head = HEAD.format(**raw | {"train_rows": "null" if tuned.train_rows is None else tuned.train_rows})
    write_text(path, head + yaml.safe_dump(raw, sort_keys=False, width=140))


def read(path: Path) -> Tuned:
    """Read a tuned file. Raises UserError where it is broken or of another version."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Tuned(**{**raw, "edges": [Edge(**e) for e in raw["edges"]]})
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no tuned file ({' '.join(str(error).split())}); delete it and run: python -m pipeline.tune") from error


def read_all(folder: Path) -> dict[tuple[str, str], Tuned]:
    """The tuned files of an experiment (tuning/<experiment>) by technique (with its variant) and train_rows ("160" or "all")."""
    names = {path: path.stem.rpartition("-n") for path in sorted(folder.glob("*.yaml"))}
    return {(technique, rows): read(path) for path, (technique, _, rows) in names.items()}


def applied(cfg: DictConfig, words: Sequence[str]) -> DictConfig:
    """The config with its tuned settings, if tuned is true, and the variant tuned. words: the overrides that composed it.

    Raises:
        UserError: not tuned yet, tuned for another task or model, or a tuned key is given by hand.
    """
    if not cfg.get("tuned"):
        return cfg
    path = path_of(cfg)
    if not path.exists():
        rows = "null" if (at := rows_of(cfg)) is None else at
        raise UserError(f"{path} does not exist; run: python -m pipeline.tune experiments={cfg.experiment} technique={cfg.technique.name} train_rows={rows}")
    tuned = read(path)
    for key, mine, other in (("task", cfg.task.name, tuned.task), ("model", cfg.model.name, tuned.model)):
        if mine != other:
            raise UserError(f"{path} was tuned with {key}={other}, this cell has {key}={mine}; tune again, or leave out tuned=true")
    by_hand = by_key(words)
    for key, value in tuned.settings.items():
        if key in by_hand:
            raise UserError(f"{key} is given by hand, but tuned=true takes it from {path}; leave one of them out")
        if OmegaConf.select(cfg, key, default=tuned) is tuned:
            raise UserError(f"{path} sets {key!r}, which this cell does not have; tune again")
        OmegaConf.update(cfg, key, value, merge=False)
    OmegaConf.update(cfg, "variant", f"{cfg.variant}-tuned" if cfg.variant else "tuned")
    return cfg


def effort(cfg: DictConfig) -> Tuning | None:
    """What the tuning of a cell took; None for an untuned one."""
    if not cfg.get("tuned"):
        return None
    tuned = read(path_of(cfg))
    return Tuning(path_of(cfg).as_posix(), len(tuned.searched), len(tuned.trials), tuned.device_s, tuned.validation, tuned.seed)
