"""What finished cells, and the forecast, say about a technique: its accuracy, memory and training time, and how much other tasks predict.

Library of advice.py. Memory: the forecast for the card that is asked for, within the error that 95 of 100 forecasts did not exceed
(experiments/forecast/summary.json); else what was measured. Time: measured, per optimiser step, on the machine that is named.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.compose import ROOT, compose, plain
from pipeline.core.files import UserError, read_json
from pipeline.core.settings import Train
from pipeline.records.finished import Cell, cells_below, read_all
from pipeline.records.results import Result
from pipeline.stats import learning_curve
from pipeline.training.loop import total_steps

NEAR = 1.25
"""Sizes that differ by no more than this factor count as the same."""
WIDEST = 0.35
"""An accuracy whose interval is wider, in fractions, is not known."""
SHRUNK = 4
"""A technique's own variance over seeds is drawn towards that of all as if they had so many degrees of freedom more."""
UNKNOWN_SPREAD = 0.03
"""Taken for the spread over seeds where no technique has two: the largest that is usual (0.5 to 3 points)."""
LEFT_OUT = ("best",)
"""Variants that are no technique of their own: a sweep's confirm cell."""
NOT_SETTINGS = ("start",)
"""Hyperparameters that name a cell of the same seed."""


@dataclass(frozen=True)
class Seen:
    technique: str
    """With the settings in which it differs from other cells of the technique on the model: "lora [epochs=3.0 r=8]"."""
    task: str
    model: str
    rows: int
    seed: int
    accuracy: float
    test_rows: int
    cell: Cell


@dataclass(frozen=True)
class Expected:
    """A figure with its 95% interval; low and high are None where nothing is known of its spread."""

    value: float
    low: float | None
    high: float | None
    basis: str
    error: float | None = None
    """The standard error of the value itself; the interval is of a new run."""
    carried: bool = False
    """Nothing was measured there: carried over from other tasks or bases."""

    @property
    def told(self) -> bool:
        """Whether it says anything: what is carried over with an interval wider than WIDEST, or without one, does not."""
        return not self.carried or self.low is not None and self.high is not None and self.high - self.low <= WIDEST


def gather(roots: Iterable[Path]) -> list[Seen]:
    """Every finished cell below the folders that answered test rows; cells of one technique with other settings are distinguished by their names."""
    cells = [cell for root in roots for cell in cells_below(root, lambda parts: parts["variant"] not in LEFT_OUT)]
    return _once(_told_apart([
        Seen(cell.label, r.task, r.model, r.train_rows, r.seed, r.test.accuracy, r.test.rows, cell) for cell in cells
        if (r := cell.result).status == "ok" and r.test and r.metric == "accuracy" and r.kind != "teacher"
    ]))


def without_accuracy(roots: Iterable[Path]) -> list[Result]:
    """Cells below the folders that ended out of memory or diverged."""
    return [r for root in roots for r in read_all(root) if r.status != "ok"]


def _told_apart(seen: Sequence[Seen]) -> list[Seen]:
    """Techniques that ran with several settings on a model, under a name for each: their mean would be of no technique at all."""
    groups: dict[tuple[str, str], list[Seen]] = defaultdict(list)
    for one in seen:
        groups[one.technique, one.model].append(one)
    renamed = []
    for (name, _), cells in groups.items():
        every = [_settings(s) for s in cells]
        keys = sorted({k for s in every for k in s if any(s.get(k) != other.get(k) for other in every)})
        for one, settings in zip(cells, every, strict=True):
            differing = " ".join(f"{k}={settings[k]}" for k in keys if settings.get(k) is not None)
            renamed.append(dataclasses.replace(one, technique=f"{name} [{differing or 'defaults'}]") if keys else one)
    return renamed


def _settings(one: Seen) -> dict[str, Any]:
    result = one.cell.result
    settings = {k: v for k, v in result.hyperparameters.items() if k not in NOT_SETTINGS}
    return settings | ({"synthetic_share": result.synthetic.share} if result.synthetic else {})


def _once(seen: Sequence[Seen]) -> list[Seen]:
    """Of cells that are the same run but for the experiment's name, the one with the most test rows (a GPU's first): a run again is not a new run."""
    best: dict[tuple[Any, ...], Seen] = {}
    for one in sorted(seen, key=lambda s: (-s.test_rows, not s.cell.result.hardware.get("gpu"))):
        best.setdefault((one.technique, one.task, one.model, one.rows, one.seed), one)
    return [one for one in seen if best[one.technique, one.task, one.model, one.rows, one.seed] is one]


@dataclass(frozen=True)
class Spread:
    """Standard deviation of a run's accuracy over seeds, and its degrees of freedom (0: assumed)."""

    sd: float
    df: int

    @property
    def t(self) -> float:
        """Half a 95% interval in standard deviations."""
        return _t(self.df) if self.df else 1.959964


def pooled_spread(seen: Sequence[Seen]) -> Spread:
    """Within tasks, models, techniques and sizes with several seeds; what is not random (all seeds alike) says nothing about those that are."""
    groups: dict[tuple[str, str, str, int], list[float]] = defaultdict(list)
    for one in seen:
        groups[one.task, one.model, one.technique, one.rows].append(one.accuracy)
    random = [values for values in groups.values() if any(v != values[0] for v in values)]
    df = sum(len(values) - 1 for values in random)
    squares = math.fsum(statistics.variance(values) * (len(values) - 1) for values in random)
    return Spread(math.sqrt(squares / df), df) if df else Spread(UNKNOWN_SPREAD, 0)


def own_spreads(seen: Sequence[Seen], pooled: Spread) -> dict[str, float]:
    """Variance of a run's accuracy over seeds, technique by technique, drawn towards the pooled one."""
    by_technique: dict[str, list[Seen]] = defaultdict(list)
    for one in seen:
        by_technique[one.technique].append(one)
    own = {name: pooled_spread(cells) for name, cells in by_technique.items()}
    return {name: (one.df * one.sd**2 + SHRUNK * pooled.sd**2) / (one.df + SHRUNK) for name, one in own.items()}


def takes_no_rows(one: Seen) -> bool:
    """Whether the technique is the same whatever the number of training rows."""
    return not one.cell.result.takes_rows


def sizes_in_words(sizes: Sequence[int]) -> str:
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"


def expected_accuracy(cells: Sequence[Seen], rows: int, spread: Spread, curve: learning_curve.Curve | None) -> Expected | None:
    """What a new run with `rows` training rows is expected to score; None where the sizes measured say nothing of it."""
    if all(takes_no_rows(s) for s in cells):
        return _mean(cells, spread, "takes no training rows")
    at = [s for s in cells if s.rows == rows]
    if not at and curve is not None and curve.sizes[0] <= rows <= curve.sizes[-1] and curve.fits:
        on = curve.at(rows)
        half = math.hypot((on.high - on.low) / 2, spread.t * spread.sd)
        basis = f"learning curve through {len(curve.sizes)} sizes, {sizes_in_words(curve.sizes)} rows"
        return Expected(on.value, *bounded(on.value, half), basis, (on.high - on.low) / 2 / 1.959964)
    at = at or [s for s in cells if max(s.rows, rows) <= NEAR * min(s.rows, rows)]
    if at:
        nearest = min({s.rows for s in at}, key=lambda n: abs(math.log(n / rows)))
        return _mean([s for s in at if s.rows == nearest], spread, f"measured at {nearest:,} rows")
    sizes = sorted({s.rows for s in cells})
    below, above = max((n for n in sizes if n < rows), default=None), min((n for n in sizes if n > rows), default=None)
    if below is None or above is None:
        return None
    low, high = (_mean([s for s in cells if s.rows == n], spread, "") for n in (below, above))
    assert low.low is not None and high.low is not None and low.high is not None and high.high is not None
    value = low.value + math.log(rows / below) / math.log(above / below) * (high.value - low.value)
    ends, error = (min(low.low, high.low), max(low.high, high.high)), max(low.error or 0.0, high.error or 0.0)
    return Expected(value, *ends, f"between {below:,} and {above:,} rows, even in the logarithm", error)


def _mean(cells: Sequence[Seen], spread: Spread, basis: str) -> Expected:
    value = statistics.fmean(s.accuracy for s in cells)
    same = len(cells) > 1 and all(s.accuracy == cells[0].accuracy for s in cells)
    sd = 0.0 if same or cells[0].cell.result.kind == "base" else spread.sd
    share = (value * cells[0].test_rows + 2) / (cells[0].test_rows + 4)  # two right and two wrong rows more, all right is not certain (Agresti and Coull, 1998)
    rows = share * (1 - share) / cells[0].test_rows
    half = spread.t * math.sqrt(sd**2 * (1 + 1 / len(cells)) + rows)
    return Expected(value, *bounded(value, half), f"{basis}, {_runs(len(cells))}", math.sqrt(sd**2 / len(cells) + rows))


def bounded(value: float, half: float) -> tuple[float, float]:
    """value ± half, within 0 and 1."""
    return max(0.0, value - half), min(1.0, value + half)


def paired_apart(best: Mapping[str, float], one: Mapping[str, float]) -> bool:
    """Whether they differ on the tasks that both were measured on: a paired t test at 5%. One task is not enough."""
    gaps = [best[task] - one[task] for task in best if task in one]
    return len(gaps) > 1 and abs(statistics.fmean(gaps)) > _t(len(gaps) - 1) * math.sqrt(statistics.variance(gaps) / len(gaps))


def _t(df: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, df))


SUMMARY = ROOT / "experiments" / "forecast" / "summary.json"


def expected_memory(ordered: Sequence[Seen], rows: int, card_gb: float | None, model: str) -> tuple[Expected | None, bool | None]:
    """(bytes at the peak, whether they fit the card; None: not known). Measured: the mean of the nearest size's runs, with their range; of another model none.

    Args:
        ordered: a technique's cells, the nearest first.
        card_gb: GiB of the card that is asked for; None: no limit.
        model: that is asked for.
    """
    result = _on_model(ordered[0].cell.result, model)
    forecast = _forecast(result, rows, card_gb) if result else None
    if forecast is not None or ordered[0].model != model:
        return forecast or (None, None)
    peaks = [float(r.memory.peak_bytes) for r in _nearest(ordered) if r.memory and r.memory.peak_bytes and r.memory.kind.startswith("gpu")]
    if not peaks:
        return None, None
    runs = f"range of {_runs(len(peaks))}" if len(peaks) > 1 else _runs(1)
    basis = f"measured at {ordered[0].rows:,} rows of {ordered[0].task} on {ordered[0].cell.result.hardware.get('gpu')}, {runs}"
    return Expected(statistics.fmean(peaks), min(peaks), max(peaks), basis), None if card_gb is None else max(peaks) <= card_gb * 2**30


def _on_model(result: Result, model: str) -> Result | None:
    """The cell as it would be with another model; None where conf/ has no such model."""
    if result.model == model:
        return result
    config = _config_of(model)
    return dataclasses.replace(result, model=model, config={**result.config, "model": config}) if config else None


@functools.cache
def _config_of(model: str) -> dict[str, Any] | None:
    try:
        return plain(compose([f"model={model}"]).model)
    except UserError:
        return None


def _forecast(result: Result, rows: int, card_gb: float | None) -> tuple[Expected, bool | None] | None:
    from pipeline.forecasting.cell import forecast_of

    if card_gb is None or not result.size or not result.size.trainable:
        return None
    hardware = {**result.hardware, "gpu": f"a card of {card_gb:g} GiB", "gpu_memory_bytes": int(card_gb * 2**30)}
    forecast = forecast_of(dataclasses.replace(result, config={**result.config, "train_rows": rows}, hardware=hardware))
    if forecast is None or forecast.memory is None:
        return None
    value, error = float(forecast.memory.total), _forecast_error()
    if error is None:
        return Expected(value, None, None, "forecast"), forecast.fits
    return Expected(value, value * (1 - error), value * (1 + error), f"forecast; 95 of 100 were within {100 * error:.1f}%"), forecast.fits


@functools.cache
def _forecast_error() -> float | None:
    return float(read_json(SUMMARY)["p95_error"]) if SUMMARY.exists() else None


def expected_time(ordered: Sequence[Seen], rows: int, model: str) -> Expected | None:
    """Seconds of training at the nearest size, in proportion to the optimiser steps; None where nothing is trained, no time stands by itself, or all are of
    another model.

    The interval is a prediction interval of the times' logarithms: mean ± t(S-1) · sd · sqrt(1 + 1/S), S the runs; a single run has none.
    """
    times = [r.phases.train_s for one, r in zip(ordered, _nearest(ordered), strict=False) if r.phases and r.phases.train_s > 0 and not one.cell.timing]
    if not times or takes_no_rows(ordered[0]) or ordered[0].model != model:
        return None
    result = ordered[0].cell.result
    machine = result.hardware.get("gpu") or result.hardware.get("cpu") or "an unknown machine"
    ratio, by = _steps_ratio(result, ordered[0].rows, rows)
    logs = [math.log(ratio * v) for v in times]
    middle = statistics.fmean(logs)
    basis = f"measured at {ordered[0].rows:,} rows of {ordered[0].task} on {machine}, {_runs(len(times))}, {by}"
    if len(times) == 1:
        return Expected(math.exp(middle), None, None, basis)
    half = _t(len(logs) - 1) * statistics.stdev(logs) * math.sqrt(1 + 1 / len(logs))
    return Expected(math.exp(middle), math.exp(middle - half), math.exp(middle + half), basis)


def _steps_ratio(result: Result, measured: int, asked: int) -> tuple[float, str]:
    """Optimiser steps at `asked` rows to those at `measured`; of the rows where the result's config does not say."""
    train = result.config.get("train") or {}
    if not {"epochs", "batch_size"} <= set(train):
        return asked / measured, "in proportion to the rows"
    settings = Train(lr=0.0, epochs=train["epochs"], batch_size=train["batch_size"], micro_batch_tokens=1, steps=train.get("steps"),
                 min_steps=train.get("min_steps"))
    steps = [total_steps(settings, n) for n in (measured, asked)]
    return (steps[1] / steps[0], "in proportion to the optimiser steps") if steps[0] else (1.0, "no step was trained")


def _nearest(ordered: Sequence[Seen]) -> list[Result]:
    first = ordered[0]
    return [s.cell.result for s in ordered if (s.rows, s.task, s.model) == (first.rows, first.task, first.model)]


def _runs(count: int) -> str:
    return f"{count} run{'s' if count > 1 else ''}"
