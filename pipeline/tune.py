"""Give every technique of an experiment the same number of random trials on validation rows, and fix its best setting for all seeds.

    python -m pipeline.tune experiments=quick                                  all techniques of the grid
    python -m pipeline.tune experiments=quick technique=lora tune.trials=24    one technique, another budget
    python -m pipeline.tune experiments=quick 'tune.techniques=[lora,full]'    some
    python -m pipeline.cells experiments=quick tuned=true                      then: the tuned cells, beside the untuned ones

Writes tuning/<experiment>/<technique>-n<train_rows>.yaml (keep it in git: cells are composed of it) and studies under sweeps/. A number of training
rows is tuned by itself, with the grid's first seed: validation rows are labelled rows, and those of a larger set are not this one's to look at.

The budget is tune.trials, whatever becomes of them: a trial that runs out of memory, diverges or ends with an error is one of them; so is one
whose settings the input does not suit (more demonstrations than the context holds). Two thirds are drawn from the declared range
(conf/search/). If the best value then lies at an edge, the rest is drawn from there and beyond, once; else from the declared range. Started
again after a kill, it goes on where it was, with the same draws. Test rows are never read.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline import cell, cells, settings, sweep, sweep_space, tracking, tune_space, tuned
from pipeline.config import compose, entry, task_overrides
from pipeline.files import UserError
from pipeline.measure import provenance
from pipeline.sweep_study import open_study, trial_rows, write_best
from pipeline.tune_space import Space

FIRST_SHARE = 2 / 3
PARTS = ("declared", "widened")
OWN = ("technique", "seed", "train_rows")


def run(cfg: DictConfig) -> int:
    """Tune what the grid (or the command) names, one after another."""
    if cfg.tuned:
        raise UserError("pipeline.tune starts from untuned settings; leave out tuned=true (or +tuned)")
    settings.read(cfg)
    budget, done = _budget(cfg), {}
    chosen = [compose(o) for o in _each(cfg, task_overrides())]
    for one in chosen:
        _check(one, budget)
    shared = Shared()
    for one in chosen:
        found = tune(one, budget, shared)
        if found:
            done[tuned.path_of(one)] = found
    for path, result in done.items():
        print(f"{path}: {summary(result)}")
    return 0


def _check(cfg: DictConfig, budget: int) -> None:
    """Raise UserError for a bad space, before anything is searched."""
    settings.read(cfg)
    space = tune_space.read(cfg)
    if space.ranges:
        try:
            sweep_space.read(_searching(cfg, space, budget, 0))
        except UserError as error:
            raise UserError(f"search of {cfg.technique.name}: {error}") from error


def _budget(cfg: DictConfig) -> int:
    trials = cfg.tune.trials
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 2:
        raise UserError(f"tune.trials is {trials!r}; it is a whole number of at least 2")
    return trials


def _each(cfg: DictConfig, words: Sequence[str]) -> list[list[str]]:
    """The overrides of every technique and number of rows, with the grid's first seed unless one is given."""
    given = dict(w.split("=", 1) for w in words if "=" in w)
    if "experiments" not in given:
        raise UserError("pipeline.tune needs an experiment; add experiments=<name>, for example experiments=quick")
    grid = cells.grid(given["experiments"])["grid"]
    named = [given["technique"]] if "technique" in given else list(cfg.tune.techniques or grid["techniques"])
    techniques = dict.fromkeys(t.removesuffix(tuned.SUFFIX) for t in named)
    rows = [given["train_rows"]] if "train_rows" in given else grid["train_rows"]
    seed, rest = given.get("seed", grid["seeds"][0]), [w for w in words if w.partition("=")[0] not in OWN]
    return [[*rest, f"technique={t}", f"seed={seed}", f"train_rows={'null' if n is None else n}"] for n in rows for t in techniques]


@dataclass
class Shared:
    """What the searches of one base model read once."""

    model: str | None = None
    held: cell.Shared | None = None

    def of(self, cfg: DictConfig) -> cell.Shared:
        if self.held is None or self.model != cfg.model.name:
            self.model, self.held = cfg.model.name, cells.preload([cfg])
        return self.held


def tune(cfg: DictConfig, budget: int, shared: Shared) -> tuned.Tuned | None:
    """Search for one technique at one number of rows and write its tuned file; None where it has nothing to search.

    Raises:
        UserError: bad input, or no trial has a value.
    """
    space = tune_space.read(cfg)
    label = f"{tuned.label(cfg)}, {'all' if cfg.train_rows is None else cfg.train_rows} rows"
    if not space.ranges:
        print(f"{label}: skipped, it trains nothing and names nothing else to search")
        return None
    print(f"{label}: {budget} trials over {', '.join(space.ranges)}", flush=True)
    first = math.ceil(budget * FIRST_SHARE)
    try:
        trials = _part("declared", cfg, space, first, shared)
        added, edges = tune_space.widened(space, best_of(trials)["params"], _tried(trials))
        left = budget - len(trials)
        for e in edges:
            then = f"{left} trials go to {e.widened}" if e.widened else "there is no room to widen it"
            print(f"{label}: the best {e.key}, {_number(e.value)}, is at the {e.side} edge; {then}", flush=True)
        if any(e.widened for e in edges):
            trials += _part("widened", cfg, added, left, shared)
        else:
            trials = _part("declared", cfg, space, budget, shared)
            edges = [dataclasses.replace(e, widened=None) for e in tune_space.widened(space, best_of(trials)["params"], _tried(trials))[1]]
    finally:
        for folder in (_folder(cfg, part) for part in PARTS):
            if (folder / "sweep.json").exists():
                tracking.log_sweep(folder, cfg)
    found = _tuned(cfg, space, budget, trials, edges)
    tuned.write(tuned.path_of(cfg), found)
    return found


def _folder(cfg: DictConfig, part: str) -> Path:
    rows = "all" if cfg.train_rows is None else cfg.train_rows
    return Path(cfg.paths.sweeps) / cfg.experiment / f"{tuned.label(cfg)}-n{rows}-tune{'' if part == 'declared' else '-widened'}"


def _searching(cfg: DictConfig, space: Space, trials: int, further: int) -> DictConfig:
    """The cell's config with its sweep set to these random trials."""
    values = {"sampler": "random", "space": space.ranges, "link": space.links, "n_trials": trials, "seed": cfg.tune.seed + further, "confirm": False,
              "executor": cfg.tune.executor, "slots": cfg.tune.slots, "count_errors": True}
    return sweep_space.at(cfg, {"sweep": values})


def _part(part: str, cfg: DictConfig, space: Space, trials: int, shared: Shared) -> list[dict[str, Any]]:
    """Trials over one space, those that were made before included. Every one that counts, in the order they were asked for."""
    cfg, folder = _searching(cfg, space, trials, PARTS.index(part)), _folder(cfg, part)
    searched = sweep_space.read(cfg)
    with sweep.alone(folder):
        study = open_study(folder, cfg, searched)
        sweep.search(study, searched, cfg, folder, lambda: shared.of(cfg))
        rows = [row for row in trial_rows(study, searched) if row["status"] != "died"]
        if any(row["validation"] is not None for row in rows):
            write_best(folder, study, searched)
    return [{**row, "part": part, "params": {k: row[k] for k in searched.space}, "settings": {k: row[k] for k in searched.settings}} for row in rows]


def best_of(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The trial with the highest validation metric (ties: the lower loss of the right answers, then the earlier). Raises UserError if none has one."""
    valued = [t for t in trials if t["validation"] is not None]
    if not valued:
        raise UserError(f"none of {len(trials)} trials has a value (see above); mend the cause, delete their folder under sweeps/ and run again")
    return max(valued, key=lambda t: (t["validation"], -math.inf if t["nll"] is None else -t["nll"]))


def _tried(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [t["params"] for t in trials]


def _tuned(cfg: DictConfig, space: Space, budget: int, trials: Sequence[dict[str, Any]], edges: Sequence[tuned.Edge]) -> tuned.Tuned:
    best, about = best_of(trials), provenance()
    beyond = _tried([t for t in trials if t["part"] == best["part"] == "widened"])
    still = {e.key: bool(e.widened and beyond and tune_space.edge_of(e.widened, best["params"][e.key], [p[e.key] for p in beyond]) == e.side) for e in edges}
    kept = [{**{key: t[key] for key in ("number", "part", "status", "diverged", "validation", "nll")}, "settings": t["settings"]} for t in trials]
    return tuned.Tuned(
        experiment=cfg.experiment, technique=tuned.label(cfg), task=cfg.task.name, model=cfg.model.name, train_rows=cfg.train_rows, seed=cfg.seed,
        metric=cfg.task.get("metric", "accuracy"), settings=best["settings"], searched=space.ranges, budget=budget, validation=best["validation"],
        edges=[tuned.Edge(e.key, e.value, e.side, e.widened, still[e.key]) for e in edges], trials=kept,
        device_s=round(math.fsum(t["spent_s"] or 0.0 for t in trials), 3), packed=any(t["packed"] for t in trials), hardware=trials[-1]["hardware"],
        provenance={key: about[key] for key in ("started", "git_commit", "git_dirty", "packages")},
    )


def summary(found: tuned.Tuned) -> str:
    """One line on a tuned technique."""
    chosen = " ".join(f"{key}={_number(value)}" for key, value in found.settings.items())
    lost = f", {found.failed} without a value" if found.failed else ""
    edge = "".join(f"; {e.key} was at its {e.side} edge" + (" and is again" if e.still else "") for e in found.edges)
    return f"{chosen}; validation {found.metric} {found.validation:.3f}, {len(found.trials)} of {found.budget} trials{lost}, {found.device_s:.1f} s{edge}"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
