"""Forecast beside measured: peak memory and training time of each row, as they would have been forecast before it ran.

Library of page.py. A row that has no forecast says why; without any measured figure there is nothing to show.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pipeline.forecasting.cell import Forecast, forecast_of
from pipeline.reporting import words as f
from pipeline.reporting.rows import Row

HEADS = ("technique", "peak memory", "forecast", "error", "training", "forecast")


def lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line a row that was trained: its name and family, the texts under HEADS, the memory's relative error, and why there is no forecast."""
    found = []
    for row in rows:
        cells = [c.result for c in row.cells if c.result.status == "ok" and c.result.memory and c.result.memory.peak_bytes and not c.untrained]
        if not cells:
            continue
        told = forecast_of(cells[0])
        peak = statistics.median(c.memory.peak_bytes for c in cells if c.memory and c.memory.peak_bytes)
        memory = told.memory.total if told and told.memory else None
        error = memory / peak - 1 if memory else None
        texts = [f.size(peak), f.size(memory), f"{f.signed(100 * error)}%" if error is not None else f.DASH, f.duration(row.train_s), _time(told)]
        reason = told.reason if told else "its model or data are not here"
        found.append({"name": row.name, "family": row.family, "texts": texts, "error": error, "reason": reason})
    return found


def _time(told: Forecast | None) -> str:
    if told is None or told.train_s is None:
        return f.DASH
    low, middle, high = told.train_s
    return f"{f.duration(middle)} [{f.duration(low)}, {f.duration(high)}]"


def part(rows: Sequence[Row]) -> dict[str, Any]:
    """What the template forecast.html reads."""
    found = lines(rows)
    errors = [abs(line["error"]) for line in found if line["error"] is not None]
    middle = f"{100 * statistics.median(errors):.1f}%" if errors else None
    return {"forecasts": found if errors else [], "forecast_heads": HEADS, "forecast_error": middle}
