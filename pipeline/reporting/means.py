"""The figures of a row: means over the cells of its seeds, by the names of Row's fields.

Library of rows.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pipeline.records.finished import Cell
from pipeline.records.results import Result
from pipeline.stats.spread import spread


def figures_of(cells: list[Cell]) -> dict[str, Any]:
    """Means of finished cells; what none of them measured is None."""
    return {**_accuracy(cells), **_data(cells), **_training(cells), **_model(cells), **_forgetting(cells)}


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
        return {"labelled_rows": None, "rationale_rows": None, "synthetic_rows": None, "teacher_s": None}
    result = cells[0].result
    taught = result.teacher if result.kind != "teacher" else None
    return {
        "labelled_rows": result.labelled_rows,
        "rationale_rows": taught.rows if taught else None,
        "synthetic_rows": result.synthetic.rows if result.synthetic else None,
        "teacher_s": _mean(cells, _teacher_s),
    }


def _teacher_s(result: Result) -> float | None:
    """Seconds for rationales and for synthetic rows."""
    known = [part.seconds for part in (result.teacher, result.synthetic) if part is not None and part.seconds is not None]
    return sum(known) if known else None


def _training(cells: list[Cell]) -> dict[str, Any]:
    timed = [c for c in cells if not c.timing] or cells
    return {
        "train_s": _mean(timed, lambda r: r.phases.train_s if r.phases else None),
        "wall_s": _mean(timed, lambda r: r.phases.wall_s if r.phases else None),
        "tokens_per_s": _mean(timed, lambda r: r.work.tokens_per_s if r.work else None),
        "timing": timed[0].timing if timed else "",
        "shared_process": any(c.result.shared_process for c in timed),
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
