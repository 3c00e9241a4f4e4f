"""Every technique tuned with the same number of trials, over the space that its config declares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell import grid as cell_grid
from pipeline.cell import inputs
from pipeline.core import settings
from pipeline.core.compose import SUFFIX, by_key, without
from pipeline.core.files import UserError
from pipeline.core.settings import build
from pipeline.measure.machine import provenance
from pipeline.records import tuned
from pipeline.records.tuned import Edge
from pipeline.search import choice
from pipeline.search.space import Parameter, Space, declared, is_number, own_point
from pipeline.search.study import Sweep, counted, number, open_study
from pipeline.search.trials import alone, search

FIRST_SHARE = 2 / 3
PARTS = ("declared", "widened")
OUTER = 0.25
"""A value in the outer quarter of its range, on its own scale, is at the edge if no trial was further out."""


def check(cfg: DictConfig, budget: int) -> None:
    """Raise UserError for a bad space, before anything is searched."""
    settings.read(cfg)
    space = declared(cfg)
    if space.searched:
        _sweep(cfg, space, budget)


def budget_of(cfg: DictConfig) -> int:
    trials = cfg.tune.trials
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 2:
        raise UserError(f"tune.trials is {trials!r}; it is a whole number of at least 2")
    return trials


def each_technique(cfg: DictConfig, words: Sequence[str]) -> list[list[str]]:
    """The overrides of every technique and number of rows, with the grid's first seed unless the words name one."""
    values = by_key(words)
    if "experiments" not in values:
        raise UserError("pipeline.tune needs an experiment; add experiments=<name>, for example experiments=quick")
    grid = cell_grid.grid(values["experiments"])["grid"]
    entries = cell_grid.entries(grid, values)
    if "technique" not in values and cfg.tune.techniques:
        entries = [entry for t in cfg.tune.techniques for entry in cell_grid.entries(grid, {**values, "technique": t})]
    untuned = dict.fromkeys((entry[0].removesuffix(SUFFIX), *entry[1:]) for entry in entries)
    rows = [values["train_rows"]] if "train_rows" in values else grid["train_rows"] if cfg.tune.rows is None else [cfg.tune.rows]
    seed, rest = values.get("seed", grid["seeds"][0]), without(words, "technique", "variant", "seed", "train_rows")
    return [[*rest, *entry, f"seed={seed}", f"train_rows={'null' if n is None else n}"] for n in rows for entry in untuned]


@dataclass
class Shared:
    """What searches share: what those of one base model read once, and the mirror."""

    model: str | None = None
    loaded: inputs.Shared | None = None
    mirror: cell_grid.Mirror = field(default_factory=cell_grid.Mirror)

    def of(self, cfg: DictConfig) -> inputs.Shared:
        if self.loaded is None or self.model != cfg.model.name:
            self.model, self.loaded = cfg.model.name, inputs.preload([cfg])
        return self.loaded


def tune(cfg: DictConfig, budget: int, shared: Shared) -> tuned.Tuned | None:
    """Search for one technique at one number of rows and write its tuned file; None where it has nothing to search.

    Raises:
        UserError: bad input, or no trial has a value.
    """
    space = declared(cfg)
    label = f"{tuned.label(cfg)}, {'all' if cfg.train_rows is None else cfg.train_rows} rows"
    if not space.searched:
        print(f"{label}: skipped, it trains nothing and names nothing else to search")
        return None
    print(f"{label}: {budget} trials over {', '.join(space.searched)}", flush=True)
    first = math.ceil(budget * FIRST_SHARE) if _widens(space) else budget
    try:
        trials = _part("declared", cfg, space, first, shared)
        added, edges = widened(space, trials)
        left = budget - len(trials)
        for e in edges:
            then = f"{left} trials go to {e.widened}" if e.widened else "there is no room to widen it"
            print(f"{label}: the best {e.key}, {number(e.value)}, is at the {e.side} edge; {then}", flush=True)
        if left and any(e.widened for e in edges):
            trials += _part("widened", cfg, added, left, shared)
            edges = [replace(e, still=_still(e, added, trials)) for e in edges]
        else:
            trials = _part("declared", cfg, space, budget, shared)
            edges = [replace(e, widened=None) for e in widened(space, trials)[1]]
    finally:
        shared.mirror.sweeps(cfg, *(_folder(cfg, part) for part in PARTS))
    result = _tuned(cfg, space, budget, trials, edges)
    tuned.write(tuned.path_of(cfg), result)
    return result


def _folder(cfg: DictConfig, part: str) -> Path:
    rows = "all" if cfg.train_rows is None else cfg.train_rows
    return Path(cfg.paths.sweeps) / cfg.experiment / f"{tuned.label(cfg)}-n{rows}-tune{'' if part == 'declared' else '-widened'}"


def _sweep(cfg: DictConfig, space: Space, trials: int, part: str = "declared") -> Sweep:
    """Random trials over the space; the parts are drawn with seeds of their own."""
    values = {"sampler": "random", "space": space, "n_trials": trials, "seed": cfg.tune.seed + PARTS.index(part), "confirm": False,
              "executor": cfg.tune.executor, "slots": cfg.tune.slots, "storage": cfg.tune.storage, "heartbeat_s": cfg.tune.heartbeat_s, "count_errors": True}
    sweep: Sweep = build(Sweep, values, "tune")
    return sweep


def _part(part: str, cfg: DictConfig, space: Space, trials: int, shared: Shared) -> list[dict[str, Any]]:
    """Trials over one space, those that were made before included. Every one that counts, in the order of the draws: a kill changes nothing."""
    folder = _folder(cfg, part)
    with alone(folder, cfg.tune.storage is not None):
        study = open_study(folder, cfg, _sweep(cfg, space, trials, part))
        search(study, cfg, lambda: shared.of(cfg))
        drawn = study.sweep.points or []
        rows = [row for row in study.rows() if row["status"] != "died"]
        rows.sort(key=lambda row: drawn.index(point) if (point := space.point(row)) in drawn else len(drawn))
        if any(row["validation"] is not None for row in rows):
            study.write_best()
    return [{**row, "part": part, "params": space.point(row), "settings": {key: row[key] for key in space.keys}} for row in rows]


def best_of(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The trial with the highest validation metric. Raises UserError if none has one."""
    best = choice.highest(trials)
    if best is None:
        raise UserError(f"none of {len(trials)} trials has a value ({counted(t['status'] for t in trials)}; see above), so nothing is tuned; "
                        "fix the cause, delete their folder under sweeps/ and run again")
    return best


def _tuned(cfg: DictConfig, space: Space, budget: int, trials: Sequence[dict[str, Any]], edges: list[Edge]) -> tuned.Tuned:
    best_of(trials)
    taken, about = choice.taken(trials, space, own_point(cfg, space)), provenance()
    assert taken is not None
    rows = [{key: t[key] for key in ("number", "part", "status", "diverged", "validation", "nll", "validation_rows", "settings")} for t in trials]
    return tuned.Tuned(
        experiment=cfg.experiment, technique=tuned.label(cfg), task=cfg.task.name, model=cfg.model.name, train_rows=cfg.train_rows, seed=cfg.seed,
        metric=cfg.task.get("metric", "accuracy"), settings=taken["settings"], searched={key: space.entries[key] for key in space.searched},
        budget=budget, validation=taken["validation"], edges=edges, trials=rows,
        device_s=round(math.fsum(t["spent_s"] or 0.0 for t in trials), 3), packed=any(t["packed"] for t in trials), hardware=trials[-1]["hardware"],
        provenance={key: about[key] for key in ("started", "git_commit", "git_dirty", "packages")},
    )


def summary(result: tuned.Tuned) -> str:
    chosen = " ".join(f"{key}={number(value)}" for key, value in result.settings.items())
    lost = f", {result.failed} without a value" if result.failed else ""
    edge = "".join(f"; {e.key} was at its {e.side} edge" + (" and is again" if e.still else "") for e in result.edges)
    return f"{chosen}; validation {result.metric} {result.validation:.3f}, {len(result.trials)} of {result.budget} trials{lost}, {result.device_s:.1f} s{edge}"


# edges and widening


def widened(space: Space, trials: Sequence[dict[str, Any]]) -> tuple[Space, list[Edge]]:
    """The space with every range whose best value is at its edge replaced by the part from there on and beyond, and those edges."""
    parameters, edges, best = dict(space.parameters), [], best_of(trials)["params"]
    for key, parameter in space.searched.items():
        side = edge_of(parameter, best[key], [t["params"][key] for t in trials])
        if side:
            beyond = _beyond(parameter, best[key], side)
            parameters[key] = beyond or parameter
            edges.append(Edge(key, best[key], side, beyond.entry if beyond else None))
    return Space(parameters), edges


def edge_of(parameter: Parameter, value: Any, tried: Sequence[Any]) -> str | None:
    """low or high: the first or last of choices, or in the outer quarter of a range with no trial further out. None: inside, or without order."""
    if parameter.choices is not None:
        ordered = sorted(parameter.choices) if all(map(is_number, parameter.choices)) else []
        return None if len(ordered) < 2 or value not in (ordered[0], ordered[-1]) else "low" if value == ordered[0] else "high"
    scale = math.log if parameter.log else float
    low, high = map(scale, parameter.extremes)
    if low == high:
        return None
    place = (scale(value) - low) / (high - low)
    if place <= OUTER and value <= min(tried):
        return "low"
    return "high" if place >= 1 - OUTER and value >= max(tried) else None


def _widens(space: Space) -> bool:
    """Whether anything could be added at an edge; where not, the whole budget is one part, which a pack can begin at once."""
    return any(_beyond(one, end, side) for one in space.searched.values() for end in one.extremes if (side := edge_of(one, end, [end])))


def _still(edge: Edge, added: Space, trials: Sequence[dict[str, Any]]) -> bool:
    """Whether the best value of all is one of the widened part, and at the end of it, too."""
    best, beyond = best_of(trials), [t["params"][edge.key] for t in trials if t["part"] == "widened"]
    if not edge.widened or best["part"] != "widened":
        return False
    return edge_of(added.parameters[edge.key], best["params"][edge.key], beyond) == edge.side


def _beyond(parameter: Parameter, value: Any, side: str) -> Parameter | None:
    """What is added at an edge, within its limits; None where there is no room."""
    least = -math.inf if parameter.least is None else parameter.least
    most = math.inf if parameter.most is None else parameter.most
    smallest = min(parameter.extremes)
    if smallest > 0 or parameter.choices is None and smallest == 0:
        least = max(least, 1 if parameter.whole else 0)
    if parameter.choices is not None:
        choices = _more_choices(parameter, side, least, most)
        return replace(parameter, choices=tuple(choices)) if choices else None
    return _more_range(parameter, value, side, least, most)


def _more_choices(parameter: Parameter, side: str, least: float, most: float) -> list[Any]:
    """Half as many choices again, by the same ratio or the same step; none where there is neither, or no room."""
    ordered = sorted(parameter.extremes, reverse=side == "low")
    pairs = list(itertools.pairwise(ordered))
    ratios = {round(b / a, 9) for a, b in pairs} if 0 not in ordered else set()
    steps = {round(b - a, 9) for a, b in pairs}
    choices: list[Any] = []
    if len(ratios) != 1 and len(steps) != 1:
        return choices
    last, ratio, step = ordered[-1], min(ratios, default=1), min(steps)
    for _ in range(max(1, len(ordered) // 2)):
        last = last * ratio if len(ratios) == 1 else last + step
        if not least <= last <= most or parameter.whole and last != round(last):
            break
        choices.append(round(last) if parameter.whole else float(f"{last:.6g}"))
    return choices


def _more_range(parameter: Parameter, value: Any, side: str, least: float, most: float) -> Parameter | None:
    """From the best value to half of the range's width, on its own scale, beyond its end; None where there is no room beyond."""
    (low, high), log = parameter.extremes, parameter.log
    reach = math.sqrt(high / low) if log else (high - low) / 2
    if side == "high":
        start, end = value, min(most, high * reach if log else high + reach)
    else:
        start, end = max(least, low / reach if log else low - reach), value
    start, end = (math.ceil(start), math.floor(end)) if parameter.whole else (float(f"{start:.6g}"), float(f"{end:.6g}"))
    if (end <= high if side == "high" else start >= low) or log and start <= 0:
        return None
    return replace(parameter, low=start, high=end)
