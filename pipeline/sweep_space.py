"""What a sweep searches: the schema of conf/sweep/*.yaml, its points, and the cell config at a point.

Library. Strict: an unknown key, an empty space, or a setting that the cell does not have raises UserError naming it.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf

from pipeline.config import plain
from pipeline.files import UserError
from pipeline.settings import build

SAMPLERS = ("brute_force", "tpe", "random")
EXECUTORS = ("auto", "packed", "sequential")
PRUNERS = ("median", "successive_halving", "hyperband")
OBJECTIVES: dict[str, Literal["maximize", "minimize"]] = {"validation": "maximize", "peak_memory": "minimize"}
UNRELATED = ("sweep", "tracking", "paths", "variant", "pack", "search", "tune", "tuned", "price_per_hour", "currency", "train.progress",
             "train.checkpoint_every_s", "evaluate")
"""Config keys (or groups) that may differ between the runs of one study; evaluate, because trials see validation rows only."""

Point = dict[str, Any]


@dataclass(frozen=True)
class Dimension:
    """Either choices, or a range from low to high: of whole numbers if both are whole, else of floats."""

    choices: tuple[Any, ...] | None = None
    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = None
    log: bool = False

    def check(self) -> None:
        """Checked with its key's name by `_dimension`."""

    @property
    def size(self) -> int | None:
        """How many values there are; None: a continuum."""
        if self.choices is not None:
            return len(self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return (self.high - self.low) // int(self.step or 1) + 1
        return None if self.step is None or self.low is None or self.high is None else int((self.high - self.low) / self.step + 1e-9) + 1

    def suggest(self, trial: Any, key: str) -> Any:
        """A value from an Optuna trial."""
        if self.choices is not None:
            return trial.suggest_categorical(key, list(self.choices))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(key, self.low, self.high, step=self.step, log=self.log)


@dataclass(frozen=True)
class Sweep:
    """The config group sweep."""

    sampler: str
    """brute_force (every point of the choices once, in their order), tpe, or random (n_trials points drawn beforehand, none twice)."""
    space: dict[str, Any]
    """Config key of the cell -> {choices: [...]} or {low, high, step, log}."""
    link: dict[str, Any] = field(default_factory=dict)
    """Config key -> {times: number, of: key of the space}: set to that multiple in every trial."""
    objectives: tuple[str, ...] = ("validation",)
    """validation (the task's metric, up), or validation and peak_memory (bytes while training, down)."""
    n_trials: int | None = None
    """Trials with an answer to stop at; null: all points (brute_force only)."""
    timeout_s: float | None = None
    """No trial is started later than this."""
    seed: int = 0
    """Of the sampler."""
    confirm: bool = True
    """Run the best setting (each Pareto point for two objectives) as a cell that is scored on test."""
    executor: str = "auto"
    """sequential (a process a trial, the reference), packed (many trials at once over one base in one process), or auto: packed on a
    GPU where the technique allows it."""
    slots: int | None = None
    """Packed: trials at once; null: as many as the free memory holds."""
    count_errors: bool = False
    """A trial that ends with an error (not for bad input, nor ended from outside) counts as one without a value; else the search ends there."""
    pruner: str | None = None
    """Packed: Optuna's pruner, asked at every validation (train.validations); its trial's slot goes to the next one. null: none."""

    def check(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"sweep.sampler is {self.sampler!r}; choose one of {', '.join(SAMPLERS)}")
        if not self.space:
            raise UserError("sweep.space is empty; name at least one config key with choices or low and high")
        if not self.objectives or self.objectives[0] != "validation" or len(set(self.objectives)) != len(self.objectives):
            raise UserError(f"sweep.objectives is {list(self.objectives)}; choose [validation] or [validation, peak_memory]")
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise UserError(f"sweep.objectives names {name!r}; choose from {', '.join(OBJECTIVES)}")
        if self.executor not in EXECUTORS:
            raise UserError(f"sweep.executor is {self.executor!r}; choose one of {', '.join(EXECUTORS)}")
        if self.executor == "packed" and "peak_memory" in self.objectives:
            raise UserError("sweep.executor=packed cannot measure peak_memory: trials share it; choose sweep.executor=sequential or drop the objective")
        if self.slots is not None and self.slots < 1:
            raise UserError(f"sweep.slots is {self.slots}; it must be at least 1, or null")
        if self.pruner is not None and self.pruner not in PRUNERS:
            raise UserError(f"sweep.pruner is {self.pruner!r}; choose null or one of {', '.join(PRUNERS)}")
        if self.pruner is not None and (self.executor == "sequential" or len(self.objectives) > 1):
            raise UserError("sweep.pruner needs packed trials and one objective; set sweep.executor=packed and objectives [validation], or sweep.pruner=null")
        if self.n_trials is not None and self.n_trials < 1:
            raise UserError(f"sweep.n_trials is {self.n_trials}; it must be at least 1")
        if self.n_trials is None and self.sampler != "brute_force":
            raise UserError(f"sweep.n_trials is null, which only brute_force takes; set it for {self.sampler}")

    @property
    def dimensions(self) -> dict[str, Dimension]:
        return {key: _dimension(key, values) for key, values in self.space.items()}

    @property
    def directions(self) -> list[Literal["maximize", "minimize"]]:
        return [OBJECTIVES[name] for name in self.objectives]

    @property
    def settings(self) -> list[str]:
        """Config keys that a trial sets: those searched, then those linked."""
        return [*self.space, *self.link]

    def points(self) -> list[Point] | None:
        """All points in the order of the choices (the first n_trials of them); random: those drawn with the seed; None for tpe."""
        if self.sampler == "tpe":
            return None
        if self.sampler == "random":
            return self._drawn()
        choices = [d.choices or () for d in self.dimensions.values()]
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*choices)][: self.n_trials]

    def _drawn(self) -> list[Point]:
        """n_trials different points (all there are, if that is fewer), the same for the same seed, however many are asked for later."""
        import optuna

        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=self.seed))
        optuna.logging.set_verbosity(level)
        sizes = [d.size or math.inf for d in self.dimensions.values()]
        wanted = min(self.n_trials or 0, math.prod(sizes))
        found: list[Point] = []
        while len(found) < wanted:
            trial = study.ask()
            point = {key: d.suggest(trial, key) for key, d in self.dimensions.items()}
            if point not in found:
                found.append(point)
        return found

    @property
    def target(self) -> int:
        """Trials with an answer at which the sweep is through."""
        points = self.points()
        return len(points) if points is not None else self.n_trials or 0

    def order(self, point: Mapping[str, Any]) -> tuple[Any, ...]:
        """Sorts points: by the place of their choices, or by value."""
        return tuple(d.choices.index(point[key]) if d.choices else point[key] for key, d in self.dimensions.items())

    def complete(self, point: Mapping[str, Any]) -> Point:
        """The point and the settings linked to it."""
        return {**point, **{key: rule["times"] * point[rule["of"]] for key, rule in self.link.items()}}


def read(cfg: DictConfig) -> Sweep:
    """The checked sweep of a composed config, every key of which the cell has. Raises UserError naming the key."""
    sweep = build(Sweep, plain(cfg)["sweep"], "sweep")
    assert isinstance(sweep, Sweep)
    for key, dimension in sweep.dimensions.items():
        if sweep.sampler == "brute_force" and dimension.choices is None:
            raise UserError(
                f"sweep.space has a range for {key!r}, but brute_force goes through choices; give choices or choose sampler tpe"
            )
        _check_exists(cfg, key, "space")
    for key, rule in sweep.link.items():
        _check_link(sweep, key, rule)
        _check_exists(cfg, key, "link")
    return sweep


def _dimension(key: str, values: Any) -> Dimension:
    where = f"sweep.space {key!r}"
    if not isinstance(values, dict):
        raise UserError(f"{where} is {values!r}; write {{choices: [...]}} or {{low: ..., high: ...}}")
    found = build(Dimension, dict(values), f"sweep.space.{key}")
    assert isinstance(found, Dimension)
    if found.choices is not None:
        numbers = list(found.choices)
        if not numbers or len(set(numbers)) != len(numbers):
            raise UserError(f"{where} has choices {numbers}; list each value once, and at least one")
        if len(values) > 1:
            raise UserError(f"{where} has choices and a range; keep one of them")
    elif found.low is None or found.high is None or found.low > found.high or (found.log and found.low <= 0):
        raise UserError(f"{where} is {values}; write choices, or low and high with low <= high (above 0 for log)")
    else:
        numbers = [found.low, found.high]
    if found.step is not None and (found.step <= 0 or found.log):
        raise UserError(f"{where} has step {found.step}; a step is above 0, and does not go with log")
    if key.rpartition(".")[2] == "r":
        _check_ranks(where, numbers)
    return found


def _check_ranks(where: str, numbers: list[Any]) -> None:
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UserError(f"{where} contains {number!r}; a rank is a whole number of at least 1")


def _check_link(sweep: Sweep, key: str, rule: Any) -> None:
    where = f"sweep.link {key!r}"
    if (
        not isinstance(rule, dict)
        or set(rule) != {"times", "of"}
        or isinstance(rule["times"], bool)
        or not isinstance(rule["times"], int | float)
    ):
        raise UserError(f"{where} is {rule!r}; write {{times: <number>, of: <key of sweep.space>}}")
    if key in sweep.space:
        raise UserError(f"{where} is searched by sweep.space already; keep one of them")
    if rule["of"] not in sweep.space:
        raise UserError(f"{where} follows {rule['of']!r}, which sweep.space does not search; it has {', '.join(sweep.space)}")


def _check_exists(cfg: DictConfig, key: str, part: str) -> None:
    parent_key, _, name = key.rpartition(".")
    parent = OmegaConf.select(cfg, parent_key) if parent_key else cfg
    known = list(parent) if isinstance(parent, DictConfig) else []
    if name not in known:
        there = f"; {parent_key} has {', '.join(map(str, known))}" if known else ""
        lacks = f"which a cell of technique {cfg.technique.name!r} does not have{there}"
        raise UserError(f"sweep.{part} names {key!r}, {lacks}; choose another technique or sweep")
    if not OmegaConf.is_missing(parent, name) and isinstance(parent[name], DictConfig | ListConfig):
        raise UserError(f"sweep.{part} names {key!r}, which is a group of keys; name one of them")


def at(cfg: DictConfig, settings: Mapping[str, Any]) -> DictConfig:
    """A copy of the cell's config with these settings."""
    cell = copy.deepcopy(cfg)
    for key, value in settings.items():
        OmegaConf.update(cell, key, value, merge=False)
    return cell


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """The settings as Hydra overrides."""
    return [f"{key}={'null' if value is None else value}" for key, value in settings.items()]


def identity(cfg: DictConfig, sweep: Sweep) -> dict[str, Any]:
    """What must stay the same for a study to go on, flat: the cell's config but for the settings searched, and the space."""
    cell = {k: v for k, v in _flat(plain(cfg)).items() if not any(k == u or k.startswith(f"{u}.") for u in UNRELATED)}
    cell = {k: v for k, v in cell.items() if k not in sweep.settings}
    share = {"evaluate.validation_share": OmegaConf.select(cfg, "evaluate.validation_share")}
    searched = {
        "sweep.space": sweep.space,
        "sweep.link": sweep.link,
        "sweep.objectives": list(sweep.objectives),
        "sweep.sampler": sweep.sampler,
    }
    return {**cell, **share, **searched}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
