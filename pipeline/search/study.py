"""One search: its settings (the config group sweep), its Optuna study, opened or resumed, and its files trials.csv and best.json."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf

from pipeline.cell import identity
from pipeline.core.compose import RENAMED, plain
from pipeline.core.files import UserError, atomic_path, sha256, write_json, write_text
from pipeline.core.settings import AtLeast1, Within, build
from pipeline.measure.machine import provenance
from pipeline.records.results import Result, csv_text
from pipeline.search.space import Point, Space, at, overrides, parse

if TYPE_CHECKING:
    import optuna

OBJECTIVES: dict[str, Literal["maximize", "minimize"]] = {"validation": "maximize", "peak_memory": "minimize"}
NOT_RANKED = ("task.name", "task.metric", "model.name")
"""Config keys in which the trials of one study are all the same."""
NUMBERS = ("train_s", "tokens_per_s", "peak_bytes", "memory_kind", "packed", "slots", "nll", "validation_rows", "diverged", "hardware", "spent_s")
"""What a trial keeps of its result besides its objectives, as Optuna user attributes and columns of trials.csv.

packed: `slots` trials trained at once; train_s is then the trial's share of the time of their steps, and its memory is not measured.
nll: of the right answers of the validation rows. spent_s: wall clock since the trial before it had ended (packed: since some other one had),
so that their sum is what the search took.
"""


@dataclass(frozen=True)
class Sweep:
    sampler: Literal["brute_force", "tpe", "random"]
    """brute_force (every point of the choices once, in their order), tpe, or random (n_trials points drawn beforehand, none twice)."""
    space: Space
    """Config key of the cell -> an entry, as pipeline/search/space.py says."""
    objectives: tuple[str, ...] = ("validation",)
    """validation (the task's metric, up), or validation and peak_memory (bytes while training, down)."""
    n_trials: AtLeast1 | None = None
    """Trials with an answer to stop at; null: all points (brute_force only)."""
    timeout_s: float | None = None
    """No trial is started later than this."""
    seed: Annotated[int, Within(0, 2**31 - 1)] = 0
    """Of the sampler."""
    confirm: bool = True
    """Run the best setting (each Pareto point for two objectives) as a cell that is scored on test."""
    executor: Literal["auto", "packed", "sequential"] = "auto"
    """sequential (a process a trial, the reference), packed (many trials at once over one base in one process), or auto: packed on a
    GPU where the technique allows it."""
    slots: AtLeast1 | None = None
    """Packed: trials at once; null: as many as the free memory holds."""
    count_errors: bool = False
    """A trial that ends with an error (not for bad input, nor ended from outside) counts as one without a value; else the search ends there."""
    pruner: Literal["median", "successive_halving", "hyperband"] | None = None
    """Packed: Optuna's pruner, asked at every validation (train.validations); its trial's slot goes to the next one. null: none."""

    def check(self) -> None:
        if not self.space.searched:
            raise UserError("sweep.space is empty; name at least one config key with choices or low and high")
        for key, parameter in self.space.searched.items():
            if key in NOT_RANKED:
                raise UserError(f"sweep.space searches {key!r}, but no ranking may mix trials of several tasks, models or metrics; leave it out and sweep each")
            if self.sampler == "brute_force" and parameter.choices is None:
                raise UserError(f"sweep.space has a range for {key!r}, but brute_force goes through choices; give choices or choose sampler tpe")
        if self.objectives not in (("validation",), ("validation", "peak_memory")):
            raise UserError(f"sweep.objectives is {list(self.objectives)}; choose [validation] or [validation, peak_memory]")
        if self.executor == "packed" and "peak_memory" in self.objectives:
            raise UserError("sweep.executor=packed cannot measure peak_memory: trials share it; choose sweep.executor=sequential or drop the objective")
        if self.pruner is not None and (self.executor == "sequential" or len(self.objectives) > 1):
            raise UserError("sweep.pruner needs packed trials and one objective; set sweep.executor=packed and objectives [validation], or sweep.pruner=null")
        if self.n_trials is None and self.sampler != "brute_force":
            raise UserError(f"sweep.n_trials is null, which only brute_force takes; set it for {self.sampler}")

    @property
    def directions(self) -> list[Literal["maximize", "minimize"]]:
        return [OBJECTIVES[name] for name in self.objectives]

    @functools.cached_property
    def points(self) -> list[Point] | None:
        """The first n_trials points in the order of the choices; random: as many different ones, the same for the same seed; None for tpe."""
        if self.sampler == "tpe":
            return None
        if self.sampler == "brute_force":
            return list(self.space.grid())[: self.n_trials]
        points: list[Point] = []
        draws = self.space.draw(self.seed)
        while len(points) < min(self.n_trials or 0, self.space.size):
            if (point := next(draws)) not in points:
                points.append(point)
        return points

    @property
    def target(self) -> int:
        """Trials with an answer at which the sweep is through."""
        return len(self.points) if self.points is not None else self.n_trials or 0


def read(cfg: DictConfig) -> Sweep:
    """The checked sweep of a composed config, every key of which the cell has. Raises UserError naming the key."""
    values = plain(cfg)["sweep"]
    if "space" in values:
        values["space"] = parse(values["space"], "sweep.space", cfg)
    sweep: Sweep = build(Sweep, values, "sweep")
    return sweep


def open_study(folder: Path, cfg: DictConfig, sweep: Sweep) -> Study:
    """The study in folder/study.db, made if need be.

    Raises:
        UserError: the file cannot be written, is no study, or belongs to another config, space, data or model.
    """
    import optuna
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = folder / "study.db"
    name = f"{cfg.experiment}/{folder.name}"
    try:
        _create(path)
        study = optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name=name,
            directions=sweep.directions,
            pruner=_pruner(sweep),
            load_if_exists=True,
        )
    except (OperationalError, sqlite3.OperationalError) as error:  # of the place, not of what the file holds
        raise UserError(f"cannot write {path} ({str(error).splitlines()[0]}); free space or fix paths.sweeps, then run again") from error
    except (SQLAlchemyError, sqlite3.DatabaseError, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be opened as an Optuna study ({str(error).splitlines()[0]}); delete {folder} to start anew"
        ) from error
    # A seeded sampler starts over in every process, so a resumed search would draw the points it has already tried.
    seed = sweep.seed + len(study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=seed) if sweep.sampler == "tpe" else optuna.samplers.RandomSampler(seed=seed)
    _check_same(study, cfg, sweep, folder)
    if not study.trials or not (folder / "sweep.json").exists():
        write_json(folder / "sweep.json", _description(cfg, sweep))
    return Study(study, sweep, folder)


def _create(path: Path) -> None:
    """Make an empty database of Optuna's, whole or not at all.

    Raises:
        UserError: a symbolic link is there. sqlite3.DatabaseError: a file that is no database of Optuna's, which is left as it is.
    """
    import optuna

    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, through which nothing is written; remove it, or set paths.sweeps to another folder")
    if not path.exists():
        with atomic_path(path) as beside:
            optuna.storages.RDBStorage(f"sqlite:///{beside}").engine.dispose()
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'studies'").fetchall():
            raise sqlite3.DatabaseError("it has no table of studies")


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    import optuna

    kinds: dict[str | None, type[optuna.pruners.BasePruner]] = {
        None: optuna.pruners.NopPruner, "median": optuna.pruners.MedianPruner, "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
    }
    return kinds[sweep.pruner]()


def _check_same(study: optuna.Study, cfg: DictConfig, sweep: Sweep, folder: Path) -> None:
    """Raise UserError if the study is another one's: of other inputs, another space, or a cell that decides otherwise."""
    wanted = _identity(cfg, sweep)
    stored = study.user_attrs.get("identity")
    if stored is None:
        study.set_user_attr("identity", wanted)
        return
    stored = _unified(stored)
    for key in [*stored, *wanted]:
        if stored.get(key) != wanted.get(key) and (key in wanted or _decides(cfg, key, stored[key])):
            raise UserError(
                f"{folder / 'study.db'} was made with {key}={stored.get(key)}, now it is {wanted.get(key)}; "
                f"delete {folder} to start anew, or set paths.sweeps to another folder"
            )


def _identity(cfg: DictConfig, sweep: Sweep) -> dict[str, Any]:
    """What must stay the same for a study to go on, flat: what decides its trials but the settings searched, the space, data and model."""
    decides = {k: v for k, v in identity.flat(identity.decides(cfg)) if k not in sweep.space.keys and not k.startswith("evaluate.")}
    share = {"evaluate.validation_share": OmegaConf.select(cfg, "evaluate.validation_share")}  # the only rows that trials score
    searched = {"sweep.space": sweep.space.entries, "sweep.objectives": list(sweep.objectives), "sweep.sampler": sweep.sampler}
    inputs = {"data": Path(cfg.paths.data) / cfg.task.name, "model": Path(cfg.paths.models) / cfg.model.name}
    manifests = {kind: folder / "manifest.json" for kind, folder in inputs.items()}
    digests = {f"the {kind} (sha256)": sha256(path) if path.exists() else None for kind, path in manifests.items()}
    flat: dict[str, Any] = json.loads(json.dumps(decides | share | searched | digests, default=str))
    return flat


def _unified(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A study's identity as today's are: earlier ones had links beside the space, entries as they were written, and keys by their old names."""
    entries = stored["sweep.space"] | stored.get("sweep.link", {})
    bare = {key: {name: v for name, v in entry.items() if v is not None and v is not False} for key, entry in entries.items()}
    return {**{RENAMED.get(key, key): value for key, value in stored.items() if key != "sweep.link"}, "sweep.space": bare}


def _decides(cfg: DictConfig, key: str, value: Any) -> bool:
    """Whether a cell with this value would be another one: earlier studies stored every key of the config, and a default may be left out today."""
    return identity.decides(at(cfg, {key: value}, new_keys=True)) != identity.decides(cfg)


def _description(cfg: DictConfig, sweep: Sweep) -> dict[str, Any]:
    about = provenance()
    return {
        **{key: cfg[key] for key in ("experiment", "seed", "train_rows")}, **{key: cfg[key].name for key in ("technique", "task", "model")},
        "metric": cfg.task.get("metric", "accuracy"), "sampler": sweep.sampler, "space": sweep.space.entries, "objectives": list(sweep.objectives),
        "settings": sweep.space.keys, "provenance": {key: about[key] for key in ("started", "git_commit", "git_dirty")},
    }


@dataclass(frozen=True)
class Study:
    """The trials of a sweep, in folder/study.db."""

    stored: optuna.Study
    sweep: Sweep
    folder: Path

    @property
    def answered(self) -> int:
        """Trials that completed, were pruned, ran out of memory, diverged or ended with an error that counts. One that died has no answer."""
        return sum(_has_answer(trial) for trial in self.stored.trials)

    def revive(self) -> None:
        """Fail the trials that a dead process left running, and enqueue what has no answer yet.

        Brute force enqueues every point here: Optuna's BruteForceSampler would never try one again that died.
        """
        for trial in self.stored.trials:
            if trial.state.name == "RUNNING":
                self.fail(trial.number)
        points = self.sweep.points
        if points is None:
            dead = [_point(t) for t in self.stored.trials if t.state.name == "FAIL" and not _has_answer(t)]
            points = [point for point in dead if set(point) == set(self.sweep.space.searched)]
        known = [_point(t) for t in self.stored.trials if t.state.name == "WAITING" or _has_answer(t)]
        for point in points:
            if point not in known:
                self.stored.enqueue_trial(point)
                known.append(point)

    def ask(self) -> tuple[optuna.Trial, Point]:
        """The next trial, and the settings that it is to have."""
        trial = self.stored.ask(self.sweep.space.distributions)
        return trial, self.sweep.space.complete(self.sweep.space.point(trial.params))

    def fail(self, number: int) -> None:
        import optuna

        self.stored.tell(number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)

    def tell(self, trial: optuna.Trial, result: Result, spent_s: float, pruned: bool = False) -> None:
        """Keep what became of a trial. The value of one that the pruner ended is the last that it reported."""
        import optuna

        measured = numbers(result) | {"spent_s": spent_s}
        for key, value in {"status": "pruned" if pruned else result.status, **measured}.items():
            trial.set_user_attr(key, value)
        if pruned:
            self.stored.tell(trial, state=optuna.trial.TrialState.PRUNED)
        elif result.status != "ok":
            trial.set_user_attr("error", result.error)
            self.fail(trial.number)
        else:
            self.stored.tell(trial, self._values(result, measured))

    def _values(self, result: Result, measured: Mapping[str, Any]) -> list[float]:
        values = {"validation": getattr(result.scores["validation"], result.metric), "peak_memory": measured["peak_bytes"]}
        for name in self.sweep.objectives:
            if values[name] is None:
                raise UserError(f"the objective {name} was not measured on this machine; leave it out of sweep.objectives")
        return [values[name] for name in self.sweep.objectives]

    def rows(self) -> list[dict[str, Any]]:
        """Finished trials as rows: number, state, status (ok, pruned, oom, diverged, error, died), settings, objectives, seconds, started, numbers."""
        return [self._row(t) for t in self.stored.trials if t.state.is_finished() and set(_point(t)) == set(self.sweep.space.searched)]

    def _row(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        has_answer, objectives = _has_answer(trial), self.sweep.objectives
        status = "diverged" if _diverged(trial) else trial.user_attrs["status"] if has_answer else "died"
        values = None if _diverged(trial) else trial.values
        return {
            "number": trial.number, "state": trial.state.name, "status": status,
            **self.sweep.space.complete(_point(trial)), **dict(zip(objectives, values or [None] * len(objectives), strict=True)),
            "seconds": trial.duration.total_seconds() if has_answer and trial.duration else None, "started": _utc(trial.datetime_start),
            **{key: trial.user_attrs.get(key) for key in NUMBERS},
        }

    def write_trials(self) -> None:
        columns = ["number", "state", "status", *self.sweep.space.keys, *self.sweep.objectives, "seconds", "started", *NUMBERS]
        write_text(self.folder / "trials.csv", csv_text(columns, self.rows()))

    def table(self) -> str:
        shown = ["number", "status", *self.sweep.space.keys, *self.sweep.objectives, "seconds"]
        rows = [[key.rpartition(".")[2] for key in shown]]
        rows += [["" if row[key] is None else number(row[key]) for key in shown] for row in self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(shown))]
        return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows)

    def write_best(self) -> dict[str, Any]:
        """best.json: the highest validation score (ties: the smaller memory objective, then the choice listed first); and the front."""
        trials, sweep = self.stored.trials, self.sweep
        complete = [t for t in trials if t.state.name == "COMPLETE" and not _diverged(t)]
        if not complete:
            raise UserError(f"no trial of {self.folder} has a value ({counted(row['status'] for row in self.rows())}; see {self.folder / 'trials.csv'}), "
                            "so there is nothing to confirm; search lower learning rates, smaller settings or a bigger machine")
        several = len(sweep.objectives) > 1
        candidates = [t for t in self.stored.best_trials if not _diverged(t)] or complete if several else complete
        front = sorted(candidates, key=lambda t: (-t.values[0], *t.values[1:], sweep.space.order(t.params)))
        last = max(t.datetime_complete for t in trials if _has_answer(t) and t.datetime_complete)
        best = {**_choice(front[0], sweep), "variant": "best", "front": [_choice(t, sweep) for t in front] if several else None, "finished": _utc(last)}
        write_json(self.folder / "best.json", best)
        return best


def _has_answer(trial: optuna.trial.FrozenTrial) -> bool:
    return trial.state.name in ("COMPLETE", "PRUNED") or trial.user_attrs.get("status") in ("oom", "diverged", "error")


def _diverged(trial: optuna.trial.FrozenTrial) -> bool:
    """Of earlier studies, too, where such a trial is complete and has a value."""
    return bool(trial.user_attrs.get("diverged"))


def counted(statuses: Iterable[str]) -> str:
    """How many there are of each: 3 diverged, 1 oom."""
    return ", ".join(f"{count} {status}" for status, count in Counter(statuses).items())


def _point(trial: optuna.trial.FrozenTrial) -> Point:
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def numbers(result: Result) -> dict[str, Any]:
    scored, memory = result.scores.get("validation"), result.memory
    nll = scored.nll if scored else None
    return {
        "validation_rows": scored.rows if scored else None,
        "train_s": result.phases.train_s if result.phases else None, "tokens_per_s": result.work.tokens_per_s if result.work else None,
        "peak_bytes": memory.peak_bytes if memory else None, "memory_kind": memory.kind if memory else None,
        "packed": result.packed, "slots": result.slots, "nll": nll if nll is not None and math.isfinite(nll) else None,
        "hardware": result.hardware.get("gpu") or result.hardware.get("cpu"), "diverged": result.status == "diverged",
    }


def short(values: Point) -> str:
    """The settings for people: the last part of each key, and its value."""
    return " ".join(f"{key.rpartition('.')[2]}={number(value)}" for key, value in values.items())


def number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _utc(moment: datetime | None) -> str | None:
    """Optuna's times are local and carry no offset."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds") if moment else None


def _choice(trial: optuna.trial.FrozenTrial, sweep: Sweep) -> dict[str, Any]:
    chosen = sweep.space.complete(trial.params)
    return {
        "params": trial.params, "value": trial.values[0], "values": dict(zip(sweep.objectives, trial.values, strict=True)), "trial": trial.number,
        "overrides": overrides(chosen), "settings": chosen, "variant": short(trial.params).replace("=", "").replace(" ", "-"),
    }
