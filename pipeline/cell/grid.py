"""An experiment's cells: its grid composed, those that are done separated from those that are missing, the missing ones run."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from pipeline.cell import identity, locks, packing
from pipeline.cell.ahead import Checks
from pipeline.cell.child import Child, Outcome, Watcher, handed_on, pause, run_cell, run_in_child
from pipeline.cell.composing import compose_cell, compose_cells
from pipeline.cell.inputs import Shared, check_ahead, preload
from pipeline.cell.pool import INTERRUPTED, Pool
from pipeline.cell.room import AtOnce
from pipeline.core.compose import SUFFIX, by_key, compose, experiments, explain, without
from pipeline.core.files import UserError, closest
from pipeline.measure.clock import now
from pipeline.measure.machine import hardware_here
from pipeline.records import mlflow as tracking
from pipeline.records import tuned
from pipeline.records.finished import name as cell_name
from pipeline.records.results import Result
from pipeline.teachers.synthetic import rows as synthetic

NO_ANSWER = 3  # exit code of a child that mirrors: nobody is there to write to


Limit = Callable[[Sequence[DictConfig]], AtOnce]
"""Of missing cells, how many may be under way at once; prints what will not fit."""


def run_missing(overrides: Sequence[str], limit: Limit | None = None) -> int:
    """Compose every cell of the grid and run the missing ones. Returns 0 if all have a result. limit: as run_cells has it."""
    every = tuned_already(grid_overrides(overrides))
    check_ahead(compose_cell(every[0]))
    return run_cells(compose_cells(every), limit=limit)


def run_cells(cells: Sequence[DictConfig], warn: Callable[[Sequence[DictConfig]], None] | None = None, watcher: Watcher | None = None,
              limit: Limit | None = None) -> int:
    """Run those of the cells that have no result, and mirror all that have one. Returns 0 if all have one then.

    Cells that another process computes are left to it; what it does not finish is run after all.

    Args:
        warn: is shown the missing ones before the first starts.
        watcher: is told of each as it runs; None: a line is printed.
        limit: asked of the missing ones, in a process of its own while this one reads the base; None: one cell at a time.

    Raises:
        UserError: another cell stands where one would be written, and overwrite=true was not said.
    """
    missing, mirror = begin(cells, warn)
    if not missing:
        return 0
    for cfg in missing:
        if cfg.pack is None:
            cfg.pack = cfg.share
    with contextlib.ExitStack() as stack, asked(limit, missing) as answer:
        checks: list[Checks] = []

        def begin_checks(shared: Shared) -> None:
            checks.append(stack.enter_context(Checks(missing, shared, answer())))

        shared = preload(missing, begin_checks) if cells[0].preflight else preload(missing)
        return run_here(missing, shared, mirror, watcher, answer(), *checks)


@contextlib.contextmanager
def asked(limit: Limit | None, missing: Sequence[DictConfig]) -> Iterator[Callable[[], AtOnce]]:
    """What waits for the limit's answer, which a child works out meanwhile; one at a time where it has none."""
    if limit is None:
        yield AtOnce
        return
    with tempfile.TemporaryFile("w+", encoding="utf-8") as note:

        def work() -> int:
            json.dump(dataclasses.asdict(limit(missing)), note)
            note.flush()
            return 0

        child = Child(work)

        def answer() -> AtOnce:
            with handed_on(lambda: [child]):
                while (done := child.poll()) is None:
                    pause()
            note.seek(0)
            return AtOnce(**json.load(note)) if done.code == 0 else AtOnce()

        yield answer


def begin(cells: Sequence[DictConfig], warn: Callable[[Sequence[DictConfig]], None] | None = None) -> tuple[list[DictConfig], Mirror]:
    """(the missing cells, the mirror, which has the finished ones). warn, raises: as run_cells has it."""
    missing = to_run(cells)
    print(f"{len(cells) - len(missing)} of {len(cells)} cells are done", flush=True)
    unfinished = {identity.folder_of(cfg) for cfg in missing}
    done = [cfg for cfg in cells if identity.folder_of(cfg) not in unfinished]
    clear(done)
    mirror = Mirror()
    mirror.put(done)
    for cfg in missing:
        check_ahead(cfg)
    if missing and warn:
        warn(missing)
    return missing, mirror


def run_here(missing: Sequence[DictConfig], shared: Shared, mirror: Mirror, watcher: Watcher | None = None, at_once: AtOnce | None = None,
             checks: Checks | None = None) -> int:
    """Run cells in children of this process, packs first; those that another process computes at this moment come last.

    Args:
        at_once: how many cells may be under way; None: one.
        checks: what may still run of the checks before them; cells load meanwhile where several may be under way, and nothing is packed.
    """
    watcher, at_once = watcher or Watcher(), at_once or AtOnce()
    at_once = dataclasses.replace(at_once, cells=min(at_once.cells, len(missing)))
    packs = packing.groups(missing, ("seed", "train_rows"))
    if checks and (packs or at_once.cells == 1):
        if code := checks.wait():
            return code
        checks = None
    for group in packs:
        with locks.free(group) as members:
            packing.train([cfg for cfg in members if not is_done(cfg)], shared)
    shown = bool(missing[0].train.progress) and watcher.log is None
    for cfg in missing:
        cfg.train.progress = False  # one bar stands for all
    with contextlib.ExitStack() as stack:
        if at_once.cells > 1:
            turns = None if missing[0].share else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="turns-")))
            threads = shared.threads and max(1, shared.threads // at_once.cells)
            shared = dataclasses.replace(shared, at_once=at_once.cells, turns=turns, threads=threads)
        mirrored = mirror.put if at_once.cells == 1 else mirror.begin
        if checks:
            shared = dataclasses.replace(shared, gate=checks.gate.path)
        pool = Pool(missing, shared, watcher, at_once, is_done, lambda cfg: mirrored([cfg]), shown, checks)
        code = pool.run()
    mirror.finish()
    if pool.checks:  # they have not passed
        return code
    for cfg in pool.elsewhere:
        if code == INTERRUPTED:
            return code
        with locks.waited(cfg):
            code = max(code, 0 if is_done(cfg) else _run_one(cfg, dataclasses.replace(shared, at_once=1, turns=None), mirror, watcher))
    if code != INTERRUPTED:
        mirror.put([cfg for cfg in missing if is_done(cfg)])
    return code


def _run_one(cfg: DictConfig, shared: Shared, mirror: Mirror, watcher: Watcher) -> int:
    code = run_cell(cfg, shared, now(), watcher)
    if code == 0:
        mirror.put([cfg])
    return code


def clear(done: Sequence[DictConfig]) -> None:
    """Remove the checkpoints of finished cells, which a process that was killed after the result left."""
    for cfg in done:
        folder = identity.checkpoint_of(cfg).parent
        if folder.is_dir() and any(folder.iterdir()):
            identity.discard_training(cfg)


class Mirror:
    """Mirrors cells and sweeps to MLflow as they come, from child processes: one that has imported mlflow is no longer small and fit to fork."""

    def __init__(self) -> None:
        self.answers = True
        self.tried: set[Path] = set()
        self._queue: list[DictConfig] = []
        self._child: Child | None = None

    @classmethod
    def silent(cls) -> Mirror:
        """One that mirrors nothing: for a worker's process, since the command that sent the cells mirrors them."""
        mirror = cls()
        mirror.answers = False
        return mirror

    def put(self, cells: Sequence[DictConfig]) -> None:
        """Mirror those of the cells that were not tried before. Raises KeyboardInterrupt: ended by a signal."""
        new = {identity.folder_of(cfg): cfg for cfg in cells if cfg.tracking.enabled and identity.folder_of(cfg) not in self.tried}
        if not new or not self.answers:
            return
        self.tried |= new.keys()
        self._in_child(lambda: all(tracking.log_cell(*each) for each in new.items()))

    def begin(self, cells: Sequence[DictConfig]) -> None:
        """The same without waiting for it: the next call that finds the child before it through begins another one with what has come since."""
        self._queue += cells
        if self._child is not None and self._child.poll() is None:
            return
        self._take_in()
        new = {identity.folder_of(cfg): cfg for cfg in self._queue if cfg.tracking.enabled and identity.folder_of(cfg) not in self.tried}
        self._queue.clear()
        if new and self.answers:
            self.tried |= new.keys()
            self._child = Child(lambda: 0 if all(tracking.log_cell(*each) for each in new.items()) else NO_ANSWER)

    def finish(self) -> None:
        """Wait for what was begun. Raises KeyboardInterrupt: ended by a signal."""
        if self._child is not None:
            with handed_on(lambda: [self._child] if self._child else []):
                while self._child.poll() is None:
                    pause()
        self._take_in()

    def _take_in(self) -> None:
        child, self._child = self._child, None
        if child is not None and child.outcome is not None:
            self._ended(child.outcome)

    def sweeps(self, cfg: DictConfig, *folders: Path) -> None:
        """Mirror those of the sweeps that have begun, as far as they have come. Raises KeyboardInterrupt: ended by a signal."""
        begun = [folder for folder in folders if (folder / "sweep.json").exists()]
        if begun and cfg.tracking.enabled and self.answers:
            self._in_child(lambda: all(tracking.log_sweep(folder, cfg) for folder in begun))

    def _in_child(self, work: Callable[[], bool]) -> None:
        self._ended(run_in_child(lambda: 0 if work() else NO_ANSWER))

    def _ended(self, done: Outcome) -> None:
        if done.code in (INTERRUPTED, 128 + signal.SIGTERM):
            raise KeyboardInterrupt
        self.answers = done.code != NO_ANSWER


def grid(experiment: str) -> dict[str, Any]:
    """experiments/<name>/params.yaml, with `synthetic` and the techniques of `after` at the end of grid.techniques.

    Of an experiment that is one file (`alignscope try` writes such), experiments/<name>.yaml says the same. Its grid may have `variants`, too: a list of
    {technique, variant: a word for the cells' names, words: overrides}, for settings that no technique is named after.

    Raises:
        UserError: it is missing or lacks a key.
    """
    params, shown = own_grid(experiment), f"experiments/{experiment}.yaml"
    if params is None:
        path, shown = experiments() / experiment / "params.yaml", f"experiments/{experiment}/params.yaml"
        if not path.exists():
            names = [p.parent.name for p in experiments().glob("*/params.yaml")]
            raise UserError(f"{shown} does not exist{closest(experiment, names)}; choose experiments=<name> of a folder under experiments/")
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in ("techniques", "seeds", "train_rows"):
        if not (params.get("grid") or {}).get(key):
            raise UserError(f"{shown} has no grid.{key}; list at least one")
    after = [one["technique"] for one in params["grid"].get("after") or []]
    params["grid"]["techniques"] = [*params["grid"]["techniques"], *(params["grid"].get("synthetic") or []), *after]
    return params


def own_grid(experiment: str) -> dict[str, Any] | None:
    """What params.yaml would say of an experiment whose grid stands in its own experiments/<name>.yaml; None where it does not."""
    path = experiments() / f"{experiment}.yaml"
    if not path.exists():
        return None
    try:
        with open(path, encoding="utf-8") as file:
            held = yaml.safe_load(file)
    except yaml.YAMLError as error:
        raise UserError(explain(error)) from error
    if not isinstance(held, dict) or not isinstance(held.get("grid"), dict):
        return None
    chosen = {key.rpartition("/")[2]: option for entry in held.get("defaults") or [] if isinstance(entry, dict) for key, option in entry.items()}
    names = {key: (held.get(key) or {}).get("name") or chosen.get(key) for key in ("task", "model", "teacher")}
    return {"experiment": experiment, **names, "synthetic": None, "grid": dict(held["grid"])}


def grid_overrides(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every cell; technique, seed and train_rows given by hand narrow the grid."""
    chosen = by_key(overrides)
    if "experiments" not in chosen:
        raise UserError("pipeline.cells needs an experiment; add experiments=<name>, for example experiments=quick")
    axes = grid(chosen["experiments"])["grid"]
    rest = without(overrides, "technique", "variant", "seed", "train_rows")
    seeds, rows = ([chosen[key]] if key in chosen else axes[plural] for key, plural in (("seed", "seeds"), ("train_rows", "train_rows")))
    every = entries(axes, chosen)
    if chosen.get("tuned", "").lower() == "true":
        every = _searched(every, rest)
    return [[*rest, *entry, f"seed={s}", f"train_rows={n}"] for n, entry, s in itertools.product(rows, every, seeds)]


def entries(axes: Mapping[str, Any], chosen: Mapping[str, str]) -> list[list[str]]:
    """The words of every technique of a grid, then of every variant; technique and variant given by hand narrow it. The technique's word comes first.

    Args:
        chosen: overrides by key.
    """
    variants = [[f"technique={one['technique']}", f"variant={one['variant']}", *one["words"]] for one in axes.get("variants") or []]
    techniques = [[f"technique={t}"] for t in ([chosen["technique"]] if "technique" in chosen else axes["techniques"])]
    if "variant" not in chosen:
        return techniques if "technique" in chosen else [*techniques, *variants]
    own, plain = f"variant={chosen['variant']}", {words.removesuffix(SUFFIX) for (words,) in techniques}
    known = [entry for entry in variants if entry[1] == own and ("technique" not in chosen or entry[0].removesuffix(SUFFIX) in plain)]
    return known or [[*entry, own] for entry in techniques]


def tuned_already(every: list[list[str]]) -> list[list[str]]:
    """The cells that can be composed: of tuned ones those that pipeline.tune has done, the others named; all where it has done none."""
    if by_key(every[0]).get("tuned", "").lower() != "true":
        return every
    paths: dict[tuple[str, ...], Path] = {}
    for words in every:
        alike = tuple(without(words, "seed"))
        if alike not in paths:
            paths[alike] = tuned.path_of(compose(words))
    waits = {alike: path.stem for alike, path in paths.items() if not path.exists()}
    if not waits or len(waits) == len(paths):
        return every
    print(f"not tuned yet, and left out: {', '.join(waits.values())}; python -m pipeline.tune experiments={by_key(every[0])['experiments']} tunes all")
    return [words for words in every if tuple(without(words, "seed")) not in waits]


def _searched(every: Iterable[Sequence[str]], rest: Sequence[str]) -> list[list[str]]:
    """The entries of a grid that have something to search; the others have no tuned cell."""
    has_space = {entry: bool(tuned.searches(compose([*rest, *entry]))) for entry in dict.fromkeys((e[0].removesuffix(SUFFIX), *e[1:]) for e in every)}
    if without := [entry[0].partition("=")[2] for entry, searched in has_space.items() if not searched]:
        print(f"nothing is searched for {', '.join(without)}: the untuned cell stands")
    return [list(entry) for entry, searched in has_space.items() if searched]


def check_params(experiment: str, cells: Sequence[DictConfig]) -> None:
    """Raise UserError where params.yaml, from which DVC knows what a cell reads, names another task, model or teacher."""
    known = grid(experiment)
    for key in ("task", "model", "teacher"):
        composed = {c[key].name for c in cells}
        if composed != {known.get(key)}:
            raise UserError(
                f"experiments/{experiment}/params.yaml has {key}: {known.get(key)}, but its cells compose {', '.join(sorted(composed))}; "
                f"make experiments/{experiment}.yaml and params.yaml agree"
            )
    mixed = {c.synthetic.name for c in cells if synthetic.wanted(c)}
    if not mixed <= {known.get("synthetic")}:
        raise UserError(
            f"experiments/{experiment}/params.yaml has synthetic: {known.get('synthetic')}, but its cells train on {', '.join(sorted(mixed))}; "
            "name that set there, one an experiment"
        )


def to_run(cells: Sequence[DictConfig]) -> list[DictConfig]:
    """Those without a result; those whose code alone is older are named, and among them unless stale=keep."""
    missing, older = [], {}
    for cfg in cells:
        identity.check_free(cfg)
        there = identity.standing(cfg)
        if there is None or there[1].other or not counts_here(there[0], cfg):
            missing.append(cfg)
        elif there[1].code:
            older[cell_name(cfg)] = there[1]
            missing += [cfg] if cfg.stale == "run" else []
    if older:
        files = sorted({file for difference in older.values() for file in difference.code})
        action = "they are kept (stale=keep)" if cells[0].stale == "keep" else "they run again (stale=keep keeps them)"
        print(f"{len(older)} of {len(cells)} cells are of older code ({identity.few(files)}): {identity.few(list(older))}; {action}")
    return missing


def is_done(cfg: DictConfig) -> bool:
    """Whether the cell has a result of this config, data, model and code (and, if it ran out of memory, of this hardware and limit)."""
    there = identity.standing(cfg)
    return there is not None and not there[1] and counts_here(there[0], cfg)


def stands(cfg: DictConfig) -> bool:
    """Whether the cell need not run: it is done, or but for older code it is, and stale=keep."""
    there = identity.standing(cfg)
    return there is not None and not there[1].other and (cfg.stale == "keep" or not there[1].code) and counts_here(there[0], cfg)


def counts_here(result: Result, cfg: DictConfig) -> bool:
    """Whether a result says what this machine would: one that ran out of memory, of its own hardware and limit alone."""
    if result.status != "oom":
        return True
    here = hardware_here(result.hardware.get("device", "cpu"))
    return result.config.get("memory_limit_gb") == cfg.memory_limit_gb and bool(here) and all(result.hardware.get(key) == here[key] for key in here)
