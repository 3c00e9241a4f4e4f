"""What changed between two result sets of one experiment, and which techniques and cells moved by more than seeds do.

Library of `python -m pipeline.compare`. Two runs of a technique are compared as two techniques are in the report (tiers.py): on the rows that
both answered, with the spread that the seeds of all techniques show, corrected for being many (Holm 1979). What ran twice with the same seed
on the same machine differs by less than that; what is told here would be remarkable even for other seeds.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.records import results
from pipeline.records.finished import NAME, Cell
from pipeline.records.results import Result
from pipeline.stats import tiers
from pipeline.stats.tiers import holm

SIDES = ("A", "B")
UNSAID = ("paths", "tracking", "train.progress", "seed", "train_rows")
"""Config keys that tell nothing of a result."""
HARDWARE = ("device", "gpu", "gpu_memory_bytes", "cpu", "cpu_count", "memory_bytes", "platform")
SAME_MACHINE = ("device", "gpu", "cpu", "cpu_count")
"""Hardware that must be the same for times and memory to be compared."""


@dataclass(frozen=True)
class Change:
    """Something that is not the same on both sides, and in how many of the shared cells."""

    kind: str
    """data, model, version, hardware, code or config."""
    what: str
    before: Any
    after: Any
    cells: int


@dataclass(frozen=True)
class Move:
    """Accuracy of B beyond A's, fractions."""

    name: str
    """A technique with its training rows, or a cell."""
    before: float
    after: float
    low: float
    high: float
    """95% interval of the difference, for this one alone."""
    corrected: float
    """p, corrected for all of its kind."""
    flips: int
    """Answers that are right on one side and wrong on the other, all seeds together."""

    @property
    def moved(self) -> bool:
        """By more than seed noise."""
        return self.corrected < tiers.SIGNIFICANT


@dataclass(frozen=True)
class Cost:
    """A mean over seeds that moved by more than its tolerance."""

    name: str
    figure: str
    before: float
    after: float


@dataclass
class Drift:
    """All that was found."""

    experiment: str
    shared: int
    only: dict[str, list[str]]
    """Cells that one side alone has a result of, by side."""
    lost: dict[str, list[str]]
    """Cells without scores (out of memory), by side."""
    changes: list[Change]
    techniques: list[Move] = field(default_factory=list)
    cells: list[Move] = field(default_factory=list)
    identical: int = 0
    """Cells whose every answer to the test rows is the same."""
    rows: int = 0
    """Test rows that the smallest group of techniques has in common."""
    covers_seeds: bool = True
    """False: in a group of techniques none has two seeds, so that nothing is known of their spread."""
    costs: list[Cost] = field(default_factory=list)
    uncosted: str | None = None
    """Why times and memory were not compared."""

    @property
    def moved(self) -> bool:
        """Whether any technique or cell moved by more than seed noise."""
        return any(m.moved for m in (*self.techniques, *self.cells))


TOLERANCES = {"train_s": 0.10, "latency_s": 0.10, "energy_j": 0.10, "peak_bytes": 0.02, "artefact_bytes": 0.0}
"""Relative changes that are not told. Artefacts are the same on every machine."""


def _figure(result: Result, name: str) -> float | None:
    if name == "train_s" and (result.packed or (result.work and result.work.resumed)):
        return None
    part = {"train_s": result.phases, "latency_s": result.inference, "energy_j": result.work, "peak_bytes": result.memory, "artefact_bytes": result.size}[name]
    value = getattr(part, name, None)
    return None if value is None else float(value)


def load(root: Path) -> dict[str, Cell]:
    """Cells by name. Raises UserError where there is none, or they are of several experiments."""
    found = {}
    for path in sorted(root.rglob("result.json")):
        parts = NAME.fullmatch(path.parent.name)
        if parts:
            label = parts["technique"] + (f"+{parts['variant']}" if parts["variant"] else "")
            found[path.parent.name] = Cell(results.read(path), path.parent, label, parts["rows"])
    if not found:
        raise UserError(f"{root} holds no result of a cell; name a folder such as results/quick")
    if len(names := {c.result.experiment for c in found.values()}) > 1:
        raise UserError(f"{root} holds results of several experiments ({', '.join(sorted(names))}); name the folder of one, such as {root}/{sorted(names)[0]}")
    return found


def compare(a: Path, b: Path, tolerance: float | None = None) -> Drift:
    """Compare two folders of results. tolerance: relative, in place of every figure's own but the artefact's.

    Raises:
        UserError: a folder holds no results or several experiments', the experiments differ, or no cell is in both.
    """
    sides = [load(a), load(b)]
    names = [next(iter(side.values())).result.experiment for side in sides]
    if names[0] != names[1]:
        raise UserError(f"{a} is of the experiment {names[0]}, {b} of {names[1]}; compare two result sets of one experiment")
    both = [name for name in sides[0] if name in sides[1]]
    if not both:
        raise UserError(f"{a} and {b} have no cell in common ({a} has {next(iter(sides[0]))}, {b} has {next(iter(sides[1]))})")
    only = {name: [c for c in side if c not in both] for name, side in zip(SIDES, sides, strict=True)}
    lost = {name: [c for c in both if side[c].result.status != "ok"] for name, side in zip(SIDES, sides, strict=True)}
    found = Drift(names[0], len(both), only, lost, changes([(sides[0][n].result, sides[1][n].result) for n in both]))
    pairs = [(sides[0][n], sides[1][n]) for n in both if n not in lost["A"] and n not in lost["B"]]
    _accuracies(found, pairs)
    _costs(found, pairs, tolerance)
    return found


def changes(pairs: Sequence[tuple[Result, Result]]) -> list[Change]:
    """What differs between the sides of cells, the same difference once."""
    counted: Counter[tuple[str, str, str, str]] = Counter()
    values: dict[tuple[str, str, str, str], tuple[Any, Any]] = {}
    for one, other in pairs:
        first, second = dict(_facts(one)), dict(_facts(other))
        for kind, what in dict.fromkeys([*first, *second]):
            before, after = first.get((kind, what)), second.get((kind, what))
            if before != after:
                key = (kind, what, repr(before), repr(after))
                counted[key] += 1
                values[key] = (before, after)
    return [Change(kind, what, *values[kind, what, one, other], number) for (kind, what, one, other), number in counted.items()]


def _facts(result: Result) -> Iterable[tuple[tuple[str, str], Any]]:
    known = result.provenance
    yield ("data", "data_sha256"), known.get("data_sha256")
    yield ("model", "model_sha256"), known.get("model_sha256")
    yield from ((("version", name), value) for name, value in {"python": known.get("python"), **(known.get("packages") or {})}.items())
    yield from ((("hardware", name), result.hardware.get(name)) for name in HARDWARE)
    yield from ((("code", name), known.get(name)) for name in ("git_commit", "git_dirty"))
    yield from ((("config", name), value) for name, value in _flat(result.config) if not name.startswith(UNSAID))


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _accuracies(found: Drift, pairs: Sequence[tuple[Cell, Cell]]) -> None:
    """Fill in the moves: groups of equal training rows share their seeds' spread."""
    groups: dict[str, dict[str, list[tuple[Cell, Cell]]]] = defaultdict(lambda: defaultdict(list))
    for pair in pairs:
        groups[pair[0].rows][pair[0].label].append(pair)
    techniques, cells = [], []
    rows = []
    for size, group in sorted(groups.items(), key=lambda item: (not item[0].isdecimal(), item[0].zfill(9))):
        told = _group(size, group)
        if told:
            techniques += told.techniques
            cells += told.cells
            rows.append(told.rows)
            found.identical += told.identical
            found.covers_seeds &= told.covers_seeds
    found.rows = min(rows, default=0)
    found.techniques, found.cells = _corrected(techniques), _corrected(cells)


@dataclass
class _Told:
    techniques: list[tuple[Move, float]]
    cells: list[tuple[Move, float]]
    rows: int
    identical: int
    covers_seeds: bool


def _group(size: str, group: Mapping[str, Sequence[tuple[Cell, Cell]]]) -> _Told | None:
    import numpy as np

    answers = {label: [(one.right(), other.right()) for one, other in pairs] for label, pairs in group.items()}
    answers = {label: runs for label, runs in answers.items() if all(one and other for one, other in runs)}
    common = sorted(set.intersection(*(set(side) for runs in answers.values() for pair in runs for side in pair))) if answers else []
    if not common:
        return None
    right = {label: np.array([[[side[i] for i in common] for side in pair] for pair in runs], dtype=float) for label, runs in answers.items()}
    fixed = {label for label in right if group[label][0][0].result.method in ("none", "teacher")}
    sides = [tiers.Technique.of(right[label][:, side], label in fixed) for label in right for side in (0, 1)]
    whole = tiers.differences(sides, [(2 * n + 1, 2 * n) for n in range(len(right))])
    singles, places = [*sides], []
    for number, label in enumerate(right):
        for one in right[label]:
            places.append((number, len(singles)))
            singles += [tiers.Technique(one[[side]], min(1, sides[2 * number + side].seeds), 0.0, 0.0) for side in (0, 1)]
    single = tiers.differences(singles, [(at + 1, at) for _, at in places])
    names = [pair[0].folder.name for label in right for pair in group[label]]
    return _Told(
        [_move(f"{label} ({size} rows)", right[label], told) for (label, told) in zip(right, whole, strict=True)],
        [_move(name, one[None], told) for name, one, told in zip(names, (one for label in right for one in right[label]), single, strict=True)],
        len(common), sum(bool((one[0] == one[1]).all()) for label in right for one in right[label]), tiers.Spreads.of(sides).known,
    )


def _move(name: str, right: Any, told: tuple[float, float, float]) -> tuple[Move, float]:
    point, half, p = told
    before, after = (float(right[:, side].mean()) for side in (0, 1))
    return Move(name, before, after, point - half, point + half, 1.0, int((right[:, 0] != right[:, 1]).sum())), p


def _corrected(moves: Sequence[tuple[Move, float]]) -> list[Move]:
    every = holm([p for _, p in moves])
    return [Move(**{**vars(move), "corrected": p}) for (move, _), p in zip(moves, every, strict=True)]


def _costs(found: Drift, pairs: Sequence[tuple[Cell, Cell]], tolerance: float | None) -> None:
    """Fill in what costs more or less than before; of times and memory only where the machines are the same."""
    other = next((k for k in SAME_MACHINE for one, two in pairs if one.result.hardware.get(k) != two.result.hardware.get(k)), None)
    if other:
        found.uncosted = f"the machines differ ({other}), so times, energy and memory are not comparable"
    by_name: dict[str, list[tuple[Cell, Cell]]] = defaultdict(list)
    for pair in pairs:
        by_name[f"{pair[0].label} ({pair[0].rows} rows)"].append(pair)
    for name, some in by_name.items():
        for figure, own in TOLERANCES.items():
            if other and own:
                continue
            before, after = (_mean([_figure(pair[side].result, figure) for pair in some]) for side in (0, 1))
            limit = own if tolerance is None or not own else tolerance
            if before is not None and after is not None and abs(after - before) > limit * abs(before):
                found.costs.append(Cost(name, figure, before, after))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None
