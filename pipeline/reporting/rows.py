"""The rows of the comparison: one a technique and number of training rows, means over its seeds, and how they stand to each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from pipeline.records.finished import Cell, check_comparable
from pipeline.reporting.figures import FIGURES, QUANTISED, RESUMED, SHARED, Row, finished, notes_of
from pipeline.stats import tiers
from pipeline.stats.tiers import FEW, Runs

ONE_SEED = "One seed: tiers and p-values compare these weights, not the techniques; with another seed the techniques may come in another order."


def by_group(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by their number of training rows, the largest number first."""
    groups = sorted({r.group for r in rows}, key=lambda g: math.inf if g == "all" else int(g), reverse=True)
    return {group: [r for r in rows if r.group == group] for group in groups}


def make_rows(cells: Sequence[Cell]) -> list[Row]:
    """Rows sorted by the test metric, the best first, those without one last. Raises UserError where cells differ in task, model or metric."""
    check_comparable(cells, "move one of the two folders away, or run its cells again under another name: experiment=<name>")
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.label, cell.rows), []).append(cell)
    several, common = len({rows for _, rows in groups}) > 1, common_notes(cells)
    rows = [_row(sorted(group, key=lambda c: c.result.seed), several, common) for group in groups.values()]
    rows.sort(key=lambda r: (r.test is None, -(r.test or 0), r.name))
    answers = {r.name: {c.result.seed: c.right() for c in finished(r.cells)} for r in rows}
    for group in by_group(rows).values():
        compared = {r.name: r for r in _against_best(_against_zero_shot(group, answers), answers)}
        rows = [compared.get(r.name, r) for r in rows]
    return rows


def common_notes(cells: Sequence[Cell]) -> list[str]:
    """Notes of every cell that a model answered, said once for all of them."""
    having = [c.result.notes for c in finished(cells) if c.result.kind != "teacher"]
    return [note for note in dict.fromkeys(having[0]) if all(note in notes for notes in having)] if having else []


def _row(cells: list[Cell], several: bool, common: list[str]) -> Row:
    values = {key: one.over_seeds(cells) for key, one in FIGURES.items() if one.where is not None}
    label, rows = cells[0].label, cells[0].rows
    return Row(**values, name=f"{label} ({rows} rows)" if several else label, own_notes=tuple(n for n in notes_of(cells) if n not in common),
               cells=tuple(cells))


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
        comparison = trained if not row.teacher else tiers.compare(_some(answers, [row, base]), _fixed(rows))
        if comparison is None or not {row.name, base.name} <= set(comparison.means):
            return row
        one = comparison.between(row.name, base.name)
        return dataclasses.replace(row, against_zero_shot=one.difference, against_zero_shot_p=one.p)

    return [compared(r) for r in rows]


def _some(answers: Mapping[str, Runs], rows: Sequence[Row]) -> dict[str, Runs]:
    return {r.name: answers[r.name] for r in rows}


def _against_best(rows: list[Row], answers: Mapping[str, Runs]) -> list[Row]:
    """Say of every row how it stands to the best one; only where the headline metric is a share of the rows."""
    ranked = [r for r in rows if r.test is not None and not r.teacher]
    if not ranked or ranked[0].metric != "accuracy" or (comparison := tiers.compare(_some(answers, ranked), _fixed(ranked))) is None:
        return rows

    best = ranked[0].name if ranked[0].name in comparison.means else comparison.best

    def placed(row: Row) -> Row:
        if row.name not in comparison.means:
            return row
        if row.name == best:
            return dataclasses.replace(row, standing="best", letters=comparison.letters[row.name], covers_seeds=comparison.covers_seeds)
        one = comparison.between(row.name, best)
        row = dataclasses.replace(row, letters=comparison.letters[row.name], covers_seeds=comparison.covers_seeds)
        return dataclasses.replace(row, standing="below" if one.significant else "near", against_best_p=one.corrected)

    return [placed(r) for r in rows]


def timing_notes(rows: Sequence[Row]) -> list[str]:
    """What the marks at times stand for, those that occur."""
    resumed = [f"{RESUMED} resumed, or packed with other cells: no single run's time"]
    shared = [f"{SHARED} imports and base were read once for several cells: their start-up and load are missing from the total"]
    return resumed * any(r.timing for r in rows) + shared * any(r.shared_process for r in rows)


def tier_notes(rows: Sequence[Row]) -> list[str]:
    """What the letters of a group are: of these weights or of the techniques, and corrected how."""
    sizes = [sum(bool(r.letters) for r in group) for group in by_group(rows).values()]
    corrected = "corrected for all pairs: where techniques are alike, at most 5% of experiments show any difference"
    if max(sizes, default=0) > FEW:
        corrected = (f"of more than {FEW} techniques corrected as a false-discovery rate: of the differences shown at most 5% should be chance, "
                     "so a false one among them is no rarity")
    if any(r.one_seed for r in rows):
        return [f"{ONE_SEED} Letters are a test over the rows alone, {corrected.partition(':')[0]} (docs/statistics.md)"]
    return [f"tier: a test over seeds and rows, {corrected} (docs/statistics.md)"] if any(sizes) else []
