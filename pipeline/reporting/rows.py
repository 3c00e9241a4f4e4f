"""The rows of the comparison: one a technique and number of training rows, means over its seeds.

Library of `python -m pipeline.report`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.records.finished import Cell
from pipeline.records.results import Result
from pipeline.reporting.means import figures_of
from pipeline.stats import tiers
from pipeline.stats.tiers import Runs

QUANTISED = ("int8", "nf4")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One technique at one number of training rows: means over its seeds. Fields up to `notes` are table.csv's columns.

    Shares, accuracies and their differences are fractions; a figure that was not measured is None.
    """

    name: str
    """Technique, and the number of training rows where the report has several."""
    technique: str
    family: str
    method: str
    kind: str
    """What it is: one of results.KINDS."""
    precision: str
    train_rows: int
    seeds: int
    status: str
    """ok, oom, or "oom in 1 of 3 seeds"."""
    metric: str
    test: float | None
    """The headline metric on the test rows."""
    accuracy: float | None
    accuracy_low: float | None
    """95% interval; with several seeds the lowest and highest bound of their intervals."""
    accuracy_high: float | None
    test_seed_low: float | None
    """Smallest and largest headline metric over seeds, if there are several."""
    test_seed_high: float | None
    test_rows: int | None
    standing: str = ""
    """To the best one at the same number of training rows. best; near: not told apart from it; below; empty: not compared."""
    letters: str = ""
    """Rows of a group that share a letter cannot be told apart (pipeline/stats/tiers.py); empty: not compared."""
    against_best_p: float | None = None
    """Corrected for all pairs of the group."""
    covers_seeds: bool | None = None
    """Whether that test covers the spread over seeds; None: not compared."""
    against_zero_shot: float | None = None
    against_zero_shot_p: float | None = None
    macro_f1: float | None
    validation: float | None
    transfer: float | None
    """Mean of the transfer sets."""
    labelled_rows: int | None
    """Labelled rows it used: training and validation rows; demonstrations alone for few-shot; none for an untouched base."""
    rationale_rows: int | None
    synthetic_rows: int | None
    """Rows that a teacher wrote, trained on beside the labelled ones."""
    train_s: float | None
    wall_s: float | None
    teacher_s: float | None
    tokens_per_s: float | None
    timing: str
    """resumed or packed: the times are no single run's, and table.csv leaves them empty."""
    shared_process: bool
    peak_bytes: float | None
    memory_kind: str | None
    trainable: float | None
    trainable_share: float | None
    artefact_bytes: float | None
    latency_s: float | None
    merged_latency_s: float | None
    request_peak_bytes: float | None
    merged_request_peak_bytes: float | None
    perplexity_change: float | None
    perplexity_change_16bit: float | None
    pairs_change: float | None
    pairs_change_16bit: float | None
    lambada_change: float | None
    lambada_change_16bit: float | None
    transfer_change: float | None = None
    """Mean of the transfer sets above zero-shot's."""
    energy_j: float | None
    host_energy_j: float | None = None
    cost: float | None = None
    """Of a cell, in `currency`; None without a price, or where its seeds were priced in several."""
    currency: str | None = None
    engine: str | None
    """What did the training steps (results.ENGINES); several seeds' that differ are all named."""
    diverged: int
    """Seeds whose training ended because its loss was not finite."""
    notes: str
    own_notes: tuple[str, ...]
    """Notes that not every row has."""
    cells: tuple[Cell, ...] = dataclasses.field(repr=False)

    @property
    def teacher(self) -> bool:
        """The teacher is no way of making the model do the task: it is shown, not compared."""
        return self.kind == "teacher"

    @property
    def begins(self) -> bool:
        """Whether it begins at what another cell trained, whose cost is not in its own."""
        return any(r.start for r in self.results)

    @property
    def group(self) -> str:
        """The grid's number of training rows ("200", "all"): rows of one group are compared with each other."""
        return self.cells[0].rows

    @property
    def results(self) -> list[Result]:
        return [c.result for c in self.cells]


def by_group(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by their number of training rows, the largest number first."""
    groups = sorted({r.group for r in rows}, key=lambda g: math.inf if g == "all" else int(g), reverse=True)
    return {group: [r for r in rows if r.group == group] for group in groups}


def make_rows(cells: Sequence[Cell]) -> list[Row]:
    """Rows sorted by the test metric, the best first, those without one last."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.label, cell.rows), []).append(cell)
    several, common = len({rows for _, rows in groups}) > 1, common_notes(cells)
    rows = [_row(sorted(group, key=lambda c: c.result.seed), several, common) for group in groups.values()]
    rows.sort(key=lambda r: (r.test is None, -(r.test or 0), r.name))
    answers = {r.name: {c.result.seed: c.right() for c in _ok(r.cells)} for r in rows}
    for group in by_group(rows).values():
        told = {r.name: r for r in _against_best(_against_zero_shot(group, answers), answers)}
        rows = [told.get(r.name, r) for r in rows]
    return rows


def common_notes(cells: Sequence[Cell]) -> list[str]:
    """Notes of every cell that a model answered, said once for all of them."""
    having = [c.result.notes for c in _ok(cells) if c.result.kind != "teacher"]
    return [note for note in dict.fromkeys(having[0]) if all(note in notes for notes in having)] if having else []


def _ok(cells: Iterable[Cell]) -> list[Cell]:
    return [c for c in cells if c.result.status == "ok"]


def _row(cells: list[Cell], several: bool, common: list[str]) -> Row:
    ok = _ok(cells)
    first, lost = (ok or cells)[0], len(cells) - len(ok)
    result, rows = first.result, f"{first.rows} rows"
    notes = dict.fromkeys(n for c in cells for n in [*c.result.notes, c.result.error] if n)
    work = [c.result.work for c in cells if c.result.work]
    return Row(
        technique=first.label, name=f"{first.label} ({rows})" if several else first.label, family=result.family, method=result.method,
        kind=result.kind, precision=result.precision, train_rows=result.train_rows, seeds=len(ok or cells), metric=result.metric, cells=tuple(cells),
        status="ok" if not lost else "oom" if not ok else f"oom in {lost} of {len(cells)} seeds", notes="; ".join(notes),
        own_notes=tuple(n for n in notes if n not in common), diverged=sum(w.diverged_at is not None for w in work),
        engine=", ".join(dict.fromkeys(w.engine for w in work if w.engine)) or None,
        **figures_of(ok),
    )


def _fixed(rows: Sequence[Row]) -> list[str]:
    """Names of the rows with nothing random in them."""
    return [r.name for r in rows if r.kind in ("teacher", "base")]


def zero_shot(rows: Sequence[Row]) -> Row | None:
    """The row that learning is counted from: the untouched base in the experiment's own precision, else in any."""
    return min((r for r in rows if r.kind == "base"), key=lambda r: (r.precision in QUANTISED, r.name), default=None)


def _against_zero_shot(rows: list[Row], answers: Mapping[str, Runs]) -> list[Row]:
    base = zero_shot(rows)
    trained = tiers.compare(_some(answers, [r for r in rows if not r.teacher]), _fixed(rows))

    def compared(row: Row) -> Row:
        if base and row.transfer is not None and base.transfer is not None:
            row = dataclasses.replace(row, transfer_change=row.transfer - base.transfer)
        if base is None or row.name == base.name:
            return row
        found = trained if not row.teacher else tiers.compare(_some(answers, [row, base]), _fixed(rows))
        if found is None or not {row.name, base.name} <= set(found.means):
            return row
        one = found.between(row.name, base.name)
        return dataclasses.replace(row, against_zero_shot=one.difference, against_zero_shot_p=one.p)

    return [compared(r) for r in rows]


def _some(answers: Mapping[str, Runs], rows: Sequence[Row]) -> dict[str, Runs]:
    return {r.name: answers[r.name] for r in rows}


def _against_best(rows: list[Row], answers: Mapping[str, Runs]) -> list[Row]:
    """Say of every row how it stands to the best one; only where the headline metric is a share of the rows."""
    ranked = [r for r in rows if r.test is not None and not r.teacher]
    if not ranked or ranked[0].metric != "accuracy" or (found := tiers.compare(_some(answers, ranked), _fixed(ranked))) is None:
        return rows

    best = ranked[0].name if ranked[0].name in found.means else found.best

    def placed(row: Row) -> Row:
        if row.name not in found.means:
            return row
        if row.name == best:
            return dataclasses.replace(row, standing="best", letters=found.letters[row.name], covers_seeds=found.covers_seeds)
        one = found.between(row.name, best)
        standing = "below" if one.told else "near"
        return dataclasses.replace(row, standing=standing, letters=found.letters[row.name], against_best_p=one.corrected, covers_seeds=found.covers_seeds)

    return [placed(r) for r in rows]
