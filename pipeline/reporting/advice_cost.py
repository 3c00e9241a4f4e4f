"""Memory and training time that a technique's cells, or the forecast, let one expect.

Library of advice.py. Memory: the forecast for the card that is asked for, within the error that 95 of 100 forecasts kept to
(experiments/forecast/summary.json); else what was measured. Time: measured, per optimiser step, on the machine that is named.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from pipeline.core.compose import ROOT
from pipeline.core.files import read_json
from pipeline.core.settings import Train
from pipeline.records.results import Result
from pipeline.reporting.evidence import Expected, Seen, takes_no_rows
from pipeline.training.loop import total_steps

SUMMARY = ROOT / "experiments" / "forecast" / "summary.json"


def expected_memory(ordered: Sequence[Seen], rows: int, card_gb: float | None) -> tuple[Expected | None, bool | None]:
    """(bytes at the peak, whether they fit the card; None: not known). Measured: the mean of the nearest size's runs, with their range.

    Args:
        ordered: a technique's cells, the nearest size first.
        card_gb: GiB of the card that is asked for; None: no limit.
    """
    told = _forecast(ordered[0].cell.result, rows, card_gb)
    if told is not None:
        return told
    peaks = [float(r.memory.peak_bytes) for r in _nearest(ordered) if r.memory and r.memory.peak_bytes and r.memory.kind.startswith("gpu")]
    if not peaks:
        return None, None
    mean = math.fsum(peaks) / len(peaks)
    basis = f"measured at {ordered[0].rows:,} rows of {ordered[0].task} on {ordered[0].cell.result.hardware.get('gpu')}, range of {_runs(len(peaks))}"
    return Expected(mean, min(peaks), max(peaks), basis), None if card_gb is None else max(peaks) <= card_gb * 2**30


def _forecast(result: Result, rows: int, card_gb: float | None) -> tuple[Expected, bool | None] | None:
    from pipeline.forecasting.cell import forecast_of

    if card_gb is None or not result.size or not result.size.trainable:
        return None
    hardware = {**result.hardware, "gpu": f"a card of {card_gb:g} GiB", "gpu_memory_bytes": int(card_gb * 2**30)}
    told = forecast_of(dataclasses.replace(result, config={**result.config, "train_rows": rows}, hardware=hardware))
    if told is None or told.memory is None:
        return None
    value, error = float(told.memory.total), _forecast_error()
    if error is None:
        return Expected(value, None, None, "forecast"), told.fits
    return Expected(value, value * (1 - error), value * (1 + error), f"forecast; 95 of 100 were within {100 * error:.1f}%"), told.fits


@functools.cache
def _forecast_error() -> float | None:
    return float(read_json(SUMMARY)["p95_error"]) if SUMMARY.exists() else None


def expected_time(ordered: Sequence[Seen], rows: int) -> Expected | None:
    """Seconds of training at the nearest size, in proportion to the optimiser steps; None where nothing is trained or no time stands by itself.

    The interval is a prediction interval of the times' logarithms: mean ± t(S-1) · sd · sqrt(1 + 1/S), S the runs; a single run has none.
    """
    times = [r.phases.train_s for one, r in zip(ordered, _nearest(ordered), strict=False) if r.phases and r.phases.train_s > 0 and not one.cell.timing]
    if not times or takes_no_rows(ordered[0]):
        return None
    result = ordered[0].cell.result
    machine = result.hardware.get("gpu") or result.hardware.get("cpu") or "an unknown machine"
    ratio, by = _steps_ratio(result, ordered[0].rows, rows)
    logs = [math.log(ratio * v) for v in times]
    middle = math.fsum(logs) / len(logs)
    basis = f"measured at {ordered[0].rows:,} rows of {ordered[0].task} on {machine}, {_runs(len(times))}, {by}"
    if len(times) == 1:
        return Expected(math.exp(middle), None, None, basis)
    from scipy.stats import t

    sd = math.sqrt(math.fsum((v - middle) ** 2 for v in logs) / (len(logs) - 1))
    half = float(t.ppf(0.975, len(logs) - 1)) * sd * math.sqrt(1 + 1 / len(logs))
    return Expected(math.exp(middle), math.exp(middle - half), math.exp(middle + half), basis)


def _steps_ratio(result: Result, measured: int, asked: int) -> tuple[float, str]:
    """Optimiser steps at `asked` rows to those at `measured`; of the rows where the result's config does not tell."""
    train = result.config.get("train") or {}
    if not {"epochs", "batch_size"} <= set(train):
        return asked / measured, "in proportion to the rows"
    told = Train(lr=0.0, epochs=train["epochs"], batch_size=train["batch_size"], micro_batch_tokens=1, steps=train.get("steps"),
                 min_steps=train.get("min_steps"))
    steps = [total_steps(told, n) for n in (measured, asked)]
    return (steps[1] / steps[0], "in proportion to the optimiser steps") if steps[0] else (1.0, "no step was trained")


def _nearest(ordered: Sequence[Seen]) -> list[Result]:
    return [s.cell.result for s in ordered if (s.rows, s.task) == (ordered[0].rows, ordered[0].task)]


def _runs(count: int) -> str:
    return f"{count} run{'s' if count > 1 else ''}"
