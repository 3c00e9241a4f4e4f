"""What changed between two result sets of one experiment, and which techniques and cells moved by more than seeds do.

Library of `python -m pipeline.compare`. Two runs of a technique are compared as two techniques are in the report (tiers.py): on the rows that
both answered, with the spread that the seeds of all techniques show, corrected for being many (Holm 1979). What ran twice with the same seed
on the same machine differs by less than that; what is reported here would be remarkable even for other seeds.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cell.identity import deciding, flat
from pipeline.core.files import UserError
from pipeline.records.finished import Cell, cells_below, check_comparable
from pipeline.records.results import Result
from pipeline.reporting import words as f
from pipeline.reporting.figures import FIGURES
from pipeline.stats import tiers

SIDES = ("A", "B")
OF_THE_CELL = ("seed", "train_rows")
"""Config keys that both sides of a pair share by its name."""
HARDWARE = ("device", "gpu", "gpu_memory_bytes", "cpu", "cpu_count", "memory_bytes", "platform")
SAME_MACHINE = ("device", "gpu", "cpu", "cpu_model", "cpu_count", "threads")
"""Hardware that must be the same for times and memory to be compared."""
ARITHMETIC = {"cpu": ("cpu", "cpu_model", "threads", "cpu_capability", "blas"), "cuda": ("gpu",)}
"""Hardware that decides in which order a device adds, by device."""
ROUNDED_ROWS = (19, 200)
"""At most so many of so many test rows of `quick` were right on one side alone where a CPU cell was rounded otherwise: benchmarks/results/rounding.json."""


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


@dataclass(frozen=True)
class Rounding:
    """The sides' sums are not made in the same order, so that equal code, data and seeds do not give equal bits."""

    keys: list[str]
    """Hardware that differs."""
    alone: bool
    """Data, model, versions, code and settings are the same: what differs between equal cells is rounding and nothing else."""
    flips: int
    """Most test rows of a cell that are right on one side and wrong on the other."""


@dataclass
class Drift:
    """Everything in which the two folders differ."""

    experiment: str
    shared: int
    only: dict[str, list[str]]
    """Cells that one side alone has a result of, by side."""
    lost: dict[str, dict[str, str]]
    """Cells that came to no figure, each with its status (oom, diverged), by side."""
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
    rounding: Rounding | None = None
    """None: the sides' arithmetic is the same, as far as their results say."""

    @property
    def moved(self) -> bool:
        """Whether any technique or cell moved by more than seed noise."""
        return any(m.moved for m in (*self.techniques, *self.cells))


TOLERANCES = {"train_s": 0.10, "latency_s": 0.10, "energy_j": 0.10, "peak_bytes": 0.02, "artefact_bytes": 0.0}
"""Relative changes that are not reported. Artefacts are the same on every machine."""


def _figure(cell: Cell, key: str) -> float | None:
    return None if key == "train_s" and cell.timing else FIGURES[key].of(cell)


def load(root: Path) -> dict[str, Cell]:
    """Cells by name. Raises UserError where there is none, or they are of several experiments."""
    cells = {cell.folder.name: cell for cell in cells_below(root)}
    if not cells:
        raise UserError(f"{root} holds no result of a cell; name a folder such as results/quick")
    if len(names := {c.result.experiment for c in cells.values()}) > 1:
        raise UserError(f"{root} holds results of several experiments ({', '.join(sorted(names))}); name the folder of one, such as {root}/{sorted(names)[0]}")
    return cells


def compare(a: Path, b: Path, tolerance: float | None = None) -> Drift:
    """Compare two folders of results. tolerance: relative, in place of every figure's own but the artefact's.

    Raises:
        UserError: a folder holds no results or several experiments', the experiments differ, no cell is in both, or those that are differ in task,
            model or metric.
    """
    sides = [load(a), load(b)]
    names = [next(iter(side.values())).result.experiment for side in sides]
    if names[0] != names[1]:
        raise UserError(f"{a} is of the experiment {names[0]}, {b} of {names[1]}; compare two result sets of one experiment")
    both = [name for name in sides[0] if name in sides[1]]
    if not both:
        raise UserError(f"{a} and {b} have no cell in common ({a} has {next(iter(sides[0]))}, {b} has {next(iter(sides[1]))})")
    check_comparable([side[name] for name in both for side in sides], "move that cell out of both folders, or name two folders of the same task and model")
    only = {name: [c for c in side if c not in both] for name, side in zip(SIDES, sides, strict=True)}
    lost = {name: {c: side[c].result.status for c in both if side[c].result.status != "ok"} for name, side in zip(SIDES, sides, strict=True)}
    drift = Drift(names[0], len(both), only, lost, changes([(sides[0][n].result, sides[1][n].result) for n in both]))
    pairs = [(sides[0][n], sides[1][n]) for n in both if n not in lost["A"] and n not in lost["B"]]
    _accuracies(drift, pairs)
    _costs(drift, pairs, tolerance)
    drift.rounding = _rounding(drift, pairs)
    return drift


def changes(pairs: Sequence[tuple[Result, Result]]) -> list[Change]:
    """What differs between the sides of cells, the same difference once."""
    counted: Counter[tuple[str, str, str, str]] = Counter()
    values: dict[tuple[str, str, str, str], tuple[Any, Any]] = {}
    for one, other in pairs:
        first, second = dict(_facts(one)), dict(_facts(other))
        for kind, what in dict.fromkeys([*first, *second]):
            before, after = first.get((kind, what)), second.get((kind, what))
            unknown = what in ARITHMETIC["cpu"] and None in (before, after)  # a result from before this was recorded
            if before != after and not unknown:
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
    yield from ((("hardware", name), result.hardware[name]) for name in ARITHMETIC["cpu"] if name in result.hardware and name not in HARDWARE)
    yield from ((("code", name), known.get(name)) for name in ("git_commit", "git_dirty"))
    yield from ((("config", name), value) for name, value in flat(deciding(result.config)) if name not in OF_THE_CELL)


def _accuracies(drift: Drift, pairs: Sequence[tuple[Cell, Cell]]) -> None:
    """Fill in the moves: groups of equal training rows share their seeds' spread."""
    groups: dict[str, dict[str, list[tuple[Cell, Cell]]]] = defaultdict(lambda: defaultdict(list))
    for pair in pairs:
        groups[pair[0].rows][pair[0].label].append(pair)
    for size, group in sorted(groups.items(), key=lambda item: (not item[0].isdecimal(), item[0].zfill(9))):
        _moves(drift, size, group)
    drift.techniques, drift.cells = _corrected(drift.techniques), _corrected(drift.cells)


def _moves(drift: Drift, size: str, group: Mapping[str, Sequence[tuple[Cell, Cell]]]) -> None:
    """Add the moves of one group; their p is not corrected yet."""
    answers = {label: [side.right() for pair in pairs for side in pair] for label, pairs in group.items()}
    right = tiers.on_common_rows({label: runs for label, runs in answers.items() if all(runs)})  # both sides of a pair one after the other
    if not right:
        return
    fixed = [label for label in right if group[label][0][0].result.method in ("none", "teacher")]
    sides = {label: [tiers.Technique.of(runs[side::2], label in fixed) for side in (0, 1)] for label, runs in right.items()}
    both = [technique for pair in sides.values() for technique in pair]
    single = [tiers.Technique(run[None], min(1, sides[label][i % 2].seeds), 0.0, 0.0) for label, runs in right.items() for i, run in enumerate(runs)]
    drift.techniques += [_move(f"{label} ({size} rows)", right[label], pair) for label, pair in zip(right, _second_beyond_first(both), strict=True)]
    runs = [(pair[0].folder.name, right[label][2 * i : 2 * i + 2]) for label in right for i, pair in enumerate(group[label])]
    drift.cells += [_move(name, two, pair) for (name, two), pair in zip(runs, _second_beyond_first(both + single)[len(sides) :], strict=True)]
    drift.identical += sum(bool((two[0] == two[1]).all()) for _, two in runs)
    rows = len(runs[0][1][0])
    drift.rows = min(drift.rows or rows, rows)
    drift.covers_seeds &= any(technique.seeds > 1 for technique in both)


def _second_beyond_first(techniques: Sequence[tiers.Technique]) -> list[tiers.Pair]:
    """Every second one against the one before it; the spreads are estimated from the seeds of all."""
    return tiers.pairs_of(techniques, [(at + 1, at) for at in range(0, len(techniques), 2)])


def _move(name: str, right: Any, pair: tiers.Pair) -> Move:
    before, after = right[::2], right[1::2]
    return Move(name, float(before.mean()), float(after.mean()), pair.point - pair.half, pair.point + pair.half, pair.p, int((before != after).sum()))


def _corrected(moves: Sequence[Move]) -> list[Move]:
    return [dataclasses.replace(move, corrected=p) for move, p in zip(moves, tiers.holm([m.corrected for m in moves]), strict=True)]


def _costs(drift: Drift, pairs: Sequence[tuple[Cell, Cell]], tolerance: float | None) -> None:
    """Fill in what costs more or less than before; of times and memory only where the machines are the same."""
    other = next((c.what for c in drift.changes if c.kind == "hardware" and c.what in SAME_MACHINE), None)
    if other:
        drift.uncosted = f"the machines differ ({other}), so times, energy and memory are not comparable"
    by_name: dict[str, list[tuple[Cell, Cell]]] = defaultdict(list)
    for pair in pairs:
        by_name[f"{pair[0].label} ({pair[0].rows} rows)"].append(pair)
    for name, some in by_name.items():
        for figure, usual in TOLERANCES.items():
            if other and usual:
                continue
            before, after = (_mean([_figure(pair[side], figure) for pair in some]) for side in (0, 1))
            limit = usual if tolerance is None or not usual else tolerance
            if before is not None and after is not None and abs(after - before) > limit * abs(before):
                drift.costs.append(Cost(name, figure, before, after))


def _rounding(drift: Drift, pairs: Sequence[tuple[Cell, Cell]]) -> Rounding | None:
    """What the results say of the sides' arithmetic; of two devices everything is other."""
    devices = {str(side.result.hardware.get("device")) for pair in pairs for side in pair}
    decisive = ARITHMETIC.get(next(iter(devices)), ()) if len(devices) == 1 else ("device",)
    keys = [c.what for c in drift.changes if c.kind == "hardware" and c.what in decisive]
    alone = all(c.kind == "hardware" for c in drift.changes)
    return Rounding(keys, alone, max((m.flips for m in drift.cells), default=0)) if keys else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


SHOWN_CONFIG = 30


def headline(drift: Drift) -> str:
    moved = [m.name for m in drift.techniques if m.moved]
    alone = [m.name for m in drift.cells if m.moved]
    compared = len(drift.cells)
    if compared and drift.identical == compared:
        return f"All {compared} shared cells of {drift.experiment} gave the same answers."
    if not compared:
        return f"No shared cell of {drift.experiment} has predictions on both sides, so no accuracy can be compared."
    if not moved and not alone:
        return f"No technique of {drift.experiment} moved by more than {_noise(drift)} ({compared} cells, {drift.identical} with the same answers)."
    parts = [f"{len(moved)} of {len(drift.techniques)} techniques ({', '.join(moved)})"] if moved else []
    parts += [f"{len(alone)} of {compared} cells ({', '.join(alone)})"] if alone else []
    return f"Moved by more than {_noise(drift)} in {drift.experiment}: {' and '.join(parts)}."


def _noise(drift: Drift) -> str:
    """What a move has to exceed: with one seed a side, only that of drawing test rows is known."""
    return "seed noise" if drift.covers_seeds else "the test rows' noise (one seed: these weights, not the techniques)"


def markdown(drift: Drift) -> str:
    """Headline, what differs, what moved, as Markdown."""
    parts = [f"# {drift.experiment}: A against B", headline(drift), *_caveats(drift)]
    if drift.changes:
        parts += ["## What is not the same", _table(["what", "A", "B", "cells"], [_changed(c, drift.shared) for c in _shown(drift.changes)])]
    else:
        parts.append("Data, model, versions, hardware, code and settings are the same.")
    if drift.techniques:
        parts += ["## Test accuracy, %", _table(["technique", "A", "B", "B − A (95%)", "p", "answers that differ", ""], [_moved(m) for m in drift.techniques])]
    if alone := [m for m in drift.cells if m.moved]:
        parts += ["## Cells that moved", _table(["cell", "A", "B", "B − A (95%)", "p", "answers that differ", ""], [_moved(m) for m in alone])]
    if drift.costs:
        parts += ["## Costs that moved", _table(["technique", "figure", "A", "B", "B / A"], [_cost(c) for c in drift.costs])]
    return "\n\n".join(parts) + "\n"


def text(drift: Drift) -> str:
    return markdown(drift).replace("## ", "").replace("# ", "", 1)


def as_json(drift: Drift) -> str:
    """Everything, with the headline and whether anything moved."""
    return json.dumps({"headline": headline(drift), "moved": drift.moved, **dataclasses.asdict(drift)}, indent=1, default=str) + "\n"


FORMATS: dict[str, Callable[[Drift], str]] = {"text": text, "markdown": markdown, "json": as_json}


def _caveats(drift: Drift) -> list[str]:
    caveats = []
    for side, other in (("A", "B"), ("B", "A")):
        if drift.only[side]:
            caveats.append(f"In {side} alone: {', '.join(drift.only[side])}.")
        for status, words in (("oom", "Out of memory"), ("diverged", "Diverged")):
            if gone := [c for c, what in drift.lost[side].items() if what == status and c not in drift.lost[other]]:
                caveats.append(f"{words} in {side} alone: {', '.join(gone)}.")
    if any(c.kind == "data" for c in drift.changes):
        caveats.append("The data are not the same: rows are matched by their ids alone, and a move may be the data's.")
    if drift.techniques and not drift.covers_seeds:
        caveats.append("No technique has two seeds, so nothing is known of how much a seed matters: p is over test rows alone (McNemar's test), compares these "
                       "weights, not the techniques, and calls more a move than there is.")
    if drift.rounding:
        caveats.append(_rounded(drift.rounding, drift.rows))
    if drift.uncosted:
        caveats.append(f"{drift.uncosted[0].upper()}{drift.uncosted[1:]}.")
    return caveats


def _rounded(rounding: Rounding, rows: int) -> str:
    """What other arithmetic means for the figures."""
    what = {"device": "another device", "gpu": "another GPU"}.get(rounding.keys[0], "another CPU or other threads")
    measured = f" (one seed of quick: up to {ROUNDED_ROWS[0]} of {ROUNDED_ROWS[1]} rows, docs/statistics.md)"
    usual = measured if what.startswith("another CPU") else ""
    cause = "and nothing else differs" if rounding.alone else "beside what else is not the same"
    return (f"B ran on {what} ({', '.join(rounding.keys)}): figures may differ by rounding{usual}, {cause}. "
            f"Up to {rounding.flips} of a cell's {rows:,} rows are right on one side and wrong on the other.")


def _shown(changes: Sequence[Change]) -> list[Change]:
    """Settings last, and not more of them than one reads."""
    settings = [c for c in changes if c.kind == "config"]
    return [*(c for c in changes if c.kind != "config"), *settings[:SHOWN_CONFIG]]


def _changed(change: Change, shared: int) -> list[str]:
    number = "all" if change.cells == shared else f"{change.cells} of {shared}"
    return [f"{change.kind}: {change.what}", _short(change.before), _short(change.after), number]


def _short(value: object) -> str:
    text = "—" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _moved(move: Move) -> list[str]:
    apart = f"{100 * (move.after - move.before):+.1f} ({100 * move.low:+.1f} to {100 * move.high:+.1f})"
    return [move.name, f.percent(move.before), f.percent(move.after), apart, f"{move.corrected:.3f}", f"{move.flips:,}", "moved" if move.moved else ""]


def _cost(cost: Cost) -> list[str]:
    ratio = "—" if not cost.before else f"{cost.after / cost.before:.2f}"
    return [cost.name, cost.figure, f"{cost.before:,.4g}", f"{cost.after:,.4g}", ratio]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(r[i]) for r in (heads, *rows)) for i in range(len(heads))]
    lines = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in (heads, ["-" * w for w in widths], *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
