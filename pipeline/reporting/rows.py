"""The rows of the comparison: one a technique and number of training rows, means over its seeds, and how they stand to each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.records import evaluations
from pipeline.records.finished import SEEDLESS, Cell, check_comparable
from pipeline.records.results import HISTORY, csv_text
from pipeline.reporting import evaluated
from pipeline.reporting.figures import CONTROLS, FIGURES, OTHER_MEMORY, QUANTISED, RESUMED, SHARED, Row, finished, notes_of
from pipeline.scoring.answers import by_row
from pipeline.stats import tiers
from pipeline.stats.tiers import FEW
from pipeline.stats.verdict import Option, Verdict, decide

ONE_SEED = "One seed: tiers and p-values compare these weights, not the techniques; with another seed the techniques may come in another order."


def by_group(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by their number of training rows, the largest number first."""
    groups = sorted({r.group for r in rows}, key=lambda g: math.inf if g == "all" else int(g), reverse=True)
    return {group: [r for r in rows if r.group == group] for group in groups}


def make_rows(cells: Sequence[Cell], beside: Path | None = None) -> list[Row]:
    """Rows sorted by the test metric, the best first, those without one last.

    Args:
        beside: where pipeline.evaluate writes (paths.evaluations); None: rows without what it wrote.

    Raises:
        UserError: cells differ in task, model or metric.
    """
    check_comparable(cells, "move one of the two folders away, or run its cells again under another name: experiment=<name>")
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.label, cell.rows), []).append(cell)
    several, common = len({rows for _, rows in groups}) > 1, common_notes(cells)
    rows = [_row(sorted(group, key=lambda c: c.result.seed), several, common, beside) for group in groups.values()]
    rows.sort(key=lambda r: (r.test is None, -(r.test or 0), r.name))
    for group in by_group(rows).values():
        compared = {r.name: r for r in _compared(group)}
        rows = [compared.get(r.name, r) for r in rows]
    return rows


def common_notes(cells: Sequence[Cell]) -> list[str]:
    """Notes of every cell that a model answered, said once for all of them."""
    having = [c.result.notes for c in finished(cells) if c.result.kind != "teacher"]
    return [note for note in dict.fromkeys(having[0]) if all(note in notes for notes in having)] if having else []


def _row(cells: list[Cell], several: bool, common: list[str], beside: Path | None) -> Row:
    values = {key: one.over_seeds(cells) for key, one in FIGURES.items() if one.where is not None}
    label, rows = cells[0].label, cells[0].rows
    found = tuple(evaluations.read(beside, c.result) for c in finished(cells)) if beside else ()
    own_notes = tuple(n for n in notes_of(cells) if n not in common)
    return Row(**(values | evaluated.merged(found)), evaluations=found, name=f"{label} ({rows} rows)" if several else label, own_notes=own_notes,
               cells=tuple(cells))


def zero_shot(rows: Sequence[Row]) -> Row | None:
    """The row that learning is counted from: the untouched base in the experiment's own precision, else in any."""
    return min((r for r in rows if r.kind == "base"), key=lambda r: (r.precision in QUANTISED, r.name), default=None)


def _compared(group: Sequence[Row]) -> list[Row]:
    """The rows of one number of training rows with how they stand to each other, and the verdict. A teacher is held against zero-shot alone."""
    base = zero_shot(group)
    competing = [r for r in group if r.test is not None and not r.teacher]
    comparison = comparison_of(competing)
    verdict = decide(options([r for r in competing if r.family != CONTROLS]), comparison) if competing else None
    rows = []
    for row in group:
        own = comparison if not row.teacher else comparison_of([r for r in (row, base) if r is not None])
        changes: dict[str, Any] = {"verdict": verdict}
        if base and row.transfer is not None and base.transfer is not None:
            changes["transfer_change"] = row.transfer - base.transfer
        if base and row is not base and own and {row.technique, base.technique} <= set(own.means):
            one = own.between(row.technique, base.technique)
            changes |= {"against_zero_shot": one.difference, "against_zero_shot_p": one.corrected}
        if comparison and verdict and row.technique in comparison.means:
            changes |= _placed(row, comparison, verdict)
        rows.append(dataclasses.replace(row, **changes))
    return rows


def _placed(row: Row, comparison: tiers.Comparison, verdict: Verdict) -> dict[str, Any]:
    """How a row stands to the others."""
    if row.family == CONTROLS:
        standing = "control"
    elif row.technique in verdict.below_base:
        standing = "lost"
    elif row.technique == verdict.name:
        standing = {"take": "take", "do_not_train": "no_training", "undecided": "leads"}[verdict.kind]
    else:
        standing = "tied" if row.technique in verdict.tied else "lower"
    highest = None if row.technique == comparison.best else comparison.between(row.technique, comparison.best).corrected
    standing = standing if len(comparison.means) > 1 else ""
    return {"standing": standing, "letters": comparison.letters[row.technique], "covers_seeds": comparison.covers_seeds, "against_best_p": highest}


def comparison_of(rows: Sequence[Row]) -> tiers.Comparison | None:
    """The rows compared by the headline metric on the test rows that all of them answered; None where single answers are not kept."""
    answers, statistic = {}, None
    for row in rows:
        by_seed = {c.result.seed: by_row(c.predictions(), row.metric) for c in finished(row.cells)}
        answers[row.technique] = {seed: values for seed, (values, _) in by_seed.items()}
        statistic = statistic or next((one for values, one in by_seed.values() if values), None)
    return tiers.compare(answers, [r.technique for r in rows if r.kind in SEEDLESS], statistic)


def options(rows: Sequence[Row]) -> list[Option]:
    """The rows as what can be chosen, the base in the experiment's own precision first. Memory counts where one counter measured it, time where it is
    a run's own."""
    kinds = {r.memory_kind for r in rows if r.peak_bytes is not None}
    one_counter = len(kinds) == 1
    return [
        Option(r.technique, r.test or 0.0, r.kind == "base", r.kind == "trained" or r.begins,
               r.peak_bytes if one_counter and r.timing not in OTHER_MEMORY else None, None if r.timing else r.made_s or r.train_s or None)
        for r in sorted(rows, key=lambda r: (r.precision in QUANTISED, r.name))
    ]


def timing_notes(rows: Sequence[Row]) -> list[str]:
    """What the marks at times stand for, those that occur."""
    resumed = [f"{RESUMED} resumed, or packed with other cells, or timed with others on the device, or trained by several GPUs: no single run's time"]
    shared = [f"{SHARED} imports and base were read once for several cells: their start-up and load are missing from the total"]
    cells = [c.result for r in rows for c in r.cells]
    beside = ["several cells were under way at once: training, test rows and requests were timed alone on the device, start-up, load, capture and probes "
              "beside other cells, and waiting is left out of the total"] * any(c.neighbours and c.neighbours.turns for c in cells)
    taken = ["latency and adapters of a cell may be those of another of its technique, of the same shapes, code and machine "
             "(inference.requests_from in its result)"] * any(c.inference and c.inference.requests_from for c in cells)
    return resumed * any(r.timing for r in rows) + shared * any(r.shared_process for r in rows) + beside + taken


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


def table_csv(rows: Sequence[Row]) -> str:
    """One line a row, plain numbers (fractions, seconds, bytes), empty where nothing was measured or a time is no single run's."""
    return csv_text(FIGURES, ({key: _plain(None if one.single and row.timing else one.value(row)) for key, one in FIGURES.items()} for row in rows))


def history_csv(histories: Mapping[str, Sequence[Mapping[str, float | None]]]) -> str:
    """The training curves of all cells, one line a point: the cell, the columns of results.HISTORY, and what a technique adds (reward)."""
    extra = sorted({key for points in histories.values() for point in points for key in point} - set(HISTORY))
    return csv_text(["cell", *HISTORY, *extra], ({"cell": cell, **point} for cell, points in histories.items() for point in points))


def _plain(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)
