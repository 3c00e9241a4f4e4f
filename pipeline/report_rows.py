"""The rows of the comparison: one a technique and number of training rows, means over its seeds.

Library of `python -m pipeline.report`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import results, tiers
from pipeline.report_cells import Cell
from pipeline.report_stats import spread
from pipeline.results import Result
from pipeline.tiers import Runs


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
    """Rows of a group that share a letter cannot be told apart (pipeline/tiers.py); empty: not compared."""
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
    notes: str
    own_notes: tuple[str, ...]
    """Notes that not every row has."""
    cells: tuple[Cell, ...] = dataclasses.field(repr=False)

    @property
    def teacher(self) -> bool:
        """The teacher is no way of making the model do the task: it is shown, not compared."""
        return self.method == "teacher"

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
    having = [c.result.notes for c in _ok(cells) if c.result.method != "teacher"]
    shared = [note for note in dict.fromkeys(having[0]) if all(note in notes for notes in having)] if having else []
    return [note for note in shared if note != results.SHARED_PROCESS]


def _ok(cells: Iterable[Cell]) -> list[Cell]:
    return [c for c in cells if c.result.status == "ok"]


def _row(cells: list[Cell], several: bool, common: list[str]) -> Row:
    ok = _ok(cells)
    first, lost = (ok or cells)[0], len(cells) - len(ok)
    result, rows = first.result, f"{first.rows} rows"
    notes = dict.fromkeys(n for c in cells for n in [*c.result.notes, c.result.error] if n and n != results.SHARED_PROCESS)
    return Row(
        technique=first.label, name=f"{first.label} ({rows})" if several else first.label, family=result.family, method=result.method,
        precision=result.precision, train_rows=result.train_rows, seeds=len(ok or cells), metric=result.metric, cells=tuple(cells),
        status="ok" if not lost else "oom" if not ok else f"oom in {lost} of {len(cells)} seeds", notes="; ".join(notes),
        own_notes=tuple(n for n in notes if n not in common),
        **_accuracy(ok), **_data(ok), **_training(ok), **_model(ok), **_forgetting(ok),
    )


def _mean(cells: Iterable[Cell], get: Callable[[Result], float | None]) -> float | None:
    found = spread([get(c.result) for c in cells])
    return found.mean if found else None


def _accuracy(cells: list[Cell]) -> dict[str, Any]:
    tests = [c.result.test for c in cells if c.result.test]
    headline = spread([_headline(c.result, "test") for c in cells])
    return {
        "test": headline.mean if headline else None,
        "test_seed_low": headline.low if headline and headline.count > 1 else None,
        "test_seed_high": headline.high if headline and headline.count > 1 else None,
        "accuracy": _mean(cells, lambda r: r.test.accuracy if r.test else None),
        "accuracy_low": min((s.accuracy_low for s in tests), default=None),
        "accuracy_high": max((s.accuracy_high for s in tests), default=None),
        "test_rows": min((s.rows for s in tests), default=None),
        "macro_f1": _mean(cells, lambda r: r.test.macro_f1 if r.test else None),
        "validation": _mean(cells, lambda r: _headline(r, "validation")),
        "transfer": _mean(cells, _transfer),
    }


def _headline(result: Result, split: str) -> float | None:
    found = result.scores.get(split)
    return getattr(found, result.metric) if found else None


def _transfer(result: Result) -> float | None:
    found = spread([_headline(result, split) for split in result.scores if split.startswith("transfer/")])
    return found.mean if found else None


def _data(cells: list[Cell]) -> dict[str, Any]:
    if not cells:
        return {"labelled_rows": None, "rationale_rows": None, "teacher_s": None}
    result = cells[0].result
    taught = result.teacher if result.method != "teacher" else None
    return {
        "labelled_rows": _labelled_rows(cells[0]),
        "rationale_rows": taught.rows if taught else None,
        "teacher_s": _mean(cells, lambda r: r.teacher.seconds if r.teacher else None),
    }


def _labelled_rows(cell: Cell) -> int:
    """Training and validation rows; fewer for what trains nothing, unless pipeline.tune chose its settings on them."""
    result = cell.result
    fewer = cell.untrained or "labels_from" in result.hyperparameters
    return _untrained_rows(result) if fewer and result.tuning is None else result.train_rows + result.validation_rows


def _untrained_rows(result: Result) -> int:
    """Few-shot's demonstrations; all rows that retrieval or a choice of prompt reads; those that compression is calibrated on; none for the
    untouched base. What begins at another cell has used that one's rows."""
    shown = result.hyperparameters
    if "start" in shown:
        return result.train_rows + result.validation_rows
    read = {"train": result.train_rows, "validation": result.validation_rows}
    calibrated = min(int(shown.get("calibration_rows", 0)), result.train_rows)
    return read.get(str(shown.get("labels_from")), calibrated or int(shown.get("k", 0)))


def _training(cells: list[Cell]) -> dict[str, Any]:
    timed = [c for c in cells if not c.timing] or cells
    return {
        "train_s": _mean(timed, lambda r: r.phases.train_s if r.phases else None),
        "wall_s": _mean(timed, lambda r: r.phases.wall_s if r.phases else None),
        "tokens_per_s": _mean(timed, lambda r: r.work.tokens_per_s if r.work else None),
        "timing": timed[0].timing if timed else "",
        "shared_process": any(c.shared for c in timed),
        "energy_j": _mean(timed, lambda r: r.work.energy_j if r.work else None),
        "host_energy_j": _mean(timed, lambda r: r.work.host_energy_j if r.work else None),
        **_cost(timed),
        "peak_bytes": _mean(cells, lambda r: r.memory.peak_bytes if r.memory else None),
        "memory_kind": next((c.result.memory.kind for c in cells if c.result.memory and c.result.memory.peak_bytes is not None), None),
    }


def _cost(cells: list[Cell]) -> dict[str, Any]:
    currencies = {c.result.cost.currency for c in cells if c.result.cost}
    if len(currencies) != 1:
        return {}
    return {"cost": _mean(cells, lambda r: r.cost.amount if r.cost else None), "currency": currencies.pop()}


def _model(cells: list[Cell]) -> dict[str, Any]:
    with_model = [c for c in cells if c.result.size and c.result.size.total]  # a teacher's answers come without one
    return {
        "trainable": _mean(with_model, lambda r: r.size.trainable if r.size else None),
        "trainable_share": _mean(with_model, lambda r: r.size.trainable / r.size.total if r.size else None),
        "artefact_bytes": _mean(with_model, lambda r: r.size.artefact_bytes if r.size else None),
        "latency_s": _mean(cells, lambda r: r.inference.latency_s if r.inference else None),
        "merged_latency_s": _mean(cells, lambda r: r.inference.merged_latency_s if r.inference else None),
        "request_peak_bytes": _mean(cells, lambda r: r.inference.request_peak_bytes if r.inference else None),
        "merged_request_peak_bytes": _mean(cells, lambda r: r.inference.merged_request_peak_bytes if r.inference else None),
    }


def _forgetting(cells: list[Cell]) -> dict[str, Any]:
    return {
        "perplexity_change": _mean(cells, lambda r: _growth(r, "perplexity_base")),
        "perplexity_change_16bit": _mean(cells, lambda r: _growth(r, "perplexity_base_16bit")),
        "pairs_change": _mean(cells, lambda r: _change(r, "pairs", "pairs_base")),
        "pairs_change_16bit": _mean(cells, lambda r: _change(r, "pairs", "pairs_base_16bit")),
        "lambada_change": _mean(cells, lambda r: _change(r, "lambada", "lambada_base")),
        "lambada_change_16bit": _mean(cells, lambda r: _change(r, "lambada", "lambada_base_16bit")),
    }


def _growth(result: Result, base: str) -> float | None:
    before = getattr(result.forgetting, base, None)
    return result.forgetting.perplexity / before - 1 if result.forgetting and before else None


def _change(result: Result, probe: str, base: str) -> float | None:
    before, after = getattr(result.forgetting, base, None), getattr(result.forgetting, probe, None)
    return after - before if before is not None and after is not None else None


def _fixed(rows: Sequence[Row]) -> list[str]:
    """Names of the rows with nothing random in them."""
    return [r.name for r in rows if r.teacher or r.method == "none"]


def _against_zero_shot(rows: list[Row], answers: Mapping[str, Runs]) -> list[Row]:
    base = next((r for r in rows if r.method == "none"), None)
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
