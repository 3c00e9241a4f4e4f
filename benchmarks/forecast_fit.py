"""The forecast's constants from at most 20 measured configurations, judged on all others.

Library of `python -m benchmarks.forecast fit`. Which 20: of every engine the first so many in the order of a hash of their names
(SHARES), whatever their errors are. What is fitted: a factor and a fixed number of bytes for each engine (least squares of relative
errors), and the median of what the device holds beside the allocator; the workspace of products is read off the first one.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.forecast_configs import SHAPES, Config
from pipeline.core.files import UserError, read_json, read_jsonl, write_json, write_text
from pipeline.forecasting.memory import Memory
from pipeline.forecasting.plan import Constants, Plan

SHARES = {"eager": 8, "hand": 8, "captured": 4}
SCALES = (0.8, 1.3)
"""A factor outside says that the arithmetic is wrong, not that it needs a constant."""


@dataclass(frozen=True)
class Point:
    """A measured configuration and its plan."""

    config: Config
    row: dict[str, Any]
    plan: Plan

    @property
    def engine(self) -> str:
        return self.plan.engine

    @property
    def stepped(self) -> str:
        """The engine that ran, by the plan's names."""
        return "hand" if self.row["engine"] == "handwritten" else self.row["engine"]


def plan_of(config: Config, gpu: bool) -> Plan:
    """A configuration as the forecast sees it: from its composed config and its rows' lengths."""
    from pipeline.core.compose import compose, plain
    from pipeline.core.settings import read
    from pipeline.data.rows import Encoded
    from pipeline.forecasting.plan import training_plan
    from pipeline.forecasting.shape import shape_of
    from pipeline.forecasting.trained import trained

    cfg = compose(config.overrides)
    settings = read(cfg)
    shape = shape_of({"model_type": "llama", **SHAPES[config.shape]})
    rows = [[Encoded(range(fed + 1), fed + 1 - labels)] for fed, labels in config.lengths()]  # type: ignore[arg-type]
    return training_plan(shape, trained(plain(cfg)["method"], shape), settings.train, settings.precision, rows, 0, config.steps, gpu)


def points(configs: Sequence[Config], path: Path) -> tuple[list[Point], list[dict[str, Any]]]:
    """(what was measured, the lines that give no figure)."""
    known = {c.name: c for c in configs}
    rows = [row for row in read_jsonl(path) if row["name"] in known]
    good = [row for row in rows if row["status"] == "ok" and row["peak_bytes"]]
    good_points = [Point(known[row["name"]], row, plan_of(known[row["name"]], row["hardware"]["device"] == "cuda")) for row in good]
    return good_points, [row for row in rows if row not in good]


def chosen(every: Sequence[Point]) -> list[Point]:
    """Those that constants are fitted on."""
    ordered = sorted(every, key=lambda p: hashlib.sha256(p.config.name.encode()).hexdigest())
    return [p for engine, count in SHARES.items() for p in [q for q in ordered if q.engine == engine][:count]]


def fit(every: Sequence[Point], start: Constants) -> Constants:
    """The constants that these points give."""
    import numpy

    from pipeline.forecasting.memory import forecast

    scale, fixed = {}, {}
    for engine in SHARES:
        of_engine = [p for p in every if p.engine == engine and p.stepped == engine]
        if len(of_engine) < 3:
            continue
        simulated = [forecast(p.plan, start) for p in of_engine]
        measured = numpy.array([p.row["peak_bytes"] for p in of_engine], dtype=float)
        loaded = numpy.array([m.loaded for m in simulated], dtype=float)
        beyond = numpy.array([comparable(m, p.row) for m, p in zip(simulated, of_engine, strict=True)]) - loaded
        left = numpy.stack([beyond / measured, 1.0 / measured], axis=1)
        factor = float(numpy.clip(numpy.linalg.lstsq(left, (measured - loaded) / measured, rcond=None)[0][0], *SCALES))
        scale[engine] = round(factor, 4)
        weights = 1.0 / measured**2
        fixed[engine] = int(((measured - loaded - factor * beyond) * weights).sum() / weights.sum())
    return dataclasses.replace(start, scale=scale, fixed=fixed)


def before_fit(every: Sequence[Point]) -> Constants:
    """What is read off the machine."""
    spaces = [p.row["machine"]["product_workspace"] for p in every if p.row.get("machine", {}).get("product_workspace")]
    beside = [p.row["device_used_bytes"] - p.row["reserved_end"] for p in every if p.row.get("device_used_bytes") and p.row.get("reserved_end")]
    values: dict[str, Any] = {"cpu_process": 0} if not any(p.plan.gpu for p in every) else {}
    values |= {"product_workspace": int(statistics.median(spaces))} if spaces else {}
    values |= {"context": int(statistics.median(beside))} if beside else {}
    return Constants(**values)


def judge(every: Sequence[Point], constants: Constants) -> list[tuple[Point, Memory, float]]:
    """(point, forecast, relative error: forecast over measured, less one)."""
    from pipeline.forecasting.memory import forecast

    pairs = [(p, forecast(p.plan, constants)) for p in every]
    return [(p, m, comparable(m, p.row) / p.row["peak_bytes"] - 1) for p, m in pairs]


def comparable(memory: Memory, row: dict[str, Any]) -> int:
    """Of a forecast, the bytes that the row measured: where the living tensors were summed, there is no allocator that holds more than they are."""
    return memory.total - (memory.parts["allocator"] if row["kind"] == "live_bytes" else 0)


def quantile(values: Sequence[float], share: float) -> float:
    """By linear interpolation, as numpy's default."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def write(configs: Sequence[Config], path: Path, out: Path) -> dict[str, Any]:
    """Fit, judge, and write constants.json, table.csv, table.md and summary.json. Returns the summary.

    Raises:
        UserError: nothing measured.
    """
    if not path.exists():
        raise UserError(f"{path} is not there; run: python -m benchmarks.forecast measure")
    measured, without = points(configs, path)
    if not measured:
        raise UserError(f"{path} has no measured configuration; run: python -m benchmarks.forecast measure")
    inside = chosen(measured)
    constants = fit(inside, before_fit(measured))
    names = {p.config.name for p in inside}
    judged = judge(measured, constants)
    others = [(p, m, e) for p, m, e in judged if p.config.name not in names] or judged
    errors = [abs(e) for _, _, e in others]
    hardware = measured[0].row["hardware"]
    summary = {
        "configurations": len(others), "median_error": round(statistics.median(errors), 4), "p95_error": round(quantile(errors, 0.95), 4),
        "hardware": hardware["gpu"] or hardware["cpu"], "date": max(p.row["date"] for p in measured), "fitted_on": len(names),
        "without_constants": {"median_error": _median(measured, names, before_fit(measured)),
                              "constants": "the allocator's rules and cuBLAS's workspace alone"},
        "by_engine": {engine: _part([abs(e) for p, _, e in others if p.engine == engine]) for engine in SHARES},
        "other_engine_than_forecast": [p.config.name for p in measured if p.stepped != p.engine],
        "out_of_memory": [r["name"] for r in without if r["status"] == "oom"], "failed": [r["name"] for r in without if r["status"] != "oom"],
        "kind": measured[0].row["kind"], "versions": measured[0].row["versions"], "command": "python -m benchmarks.forecast fit",
    }
    table = rows(judged, names)
    write_json(out / "constants.json", dataclasses.asdict(constants))
    write_text(out / "table.csv", _csv(table))
    write_text(out / "table.md", _markdown(table, summary))
    write_json(out / "summary.json", summary)
    return summary


def write_beside(configs: Sequence[Config], path: Path, constants: Path, out: Path) -> None:
    """Write table.md: what was measured of each configuration, what ran out of memory among it, beside the forecast with constants of before.

    Raises:
        UserError: nothing measured, or no constants.
    """
    from pipeline.forecasting.memory import forecast

    if not path.exists():
        raise UserError(f"{path} is not there; run: python -m benchmarks.forecast measure")
    known, measured = Constants(**read_json(constants)), {row["name"]: row for row in read_jsonl(path)}
    there = [(config, measured[config.name]) for config in configs if config.name in measured]
    if not there:
        raise UserError(f"{path} has none of the configurations; run: python -m benchmarks.forecast measure with the same configs=")
    about = next(row for _, row in there if "hardware" in row)
    machine = about["hardware"]["gpu"] or about["hardware"]["cpu"]
    lines = ["# Time and memory against model size", "",
             f"{machine}, {about['date']}; {len(there)} of {len(configs)} configurations; the forecast's constants are of experiments/forecast.", "",
             "| shape | technique | rows x tokens | engine | ms a step | tokens/s | peak, GiB | forecast, GiB | error |",
             "| --- | --- | --- | --- | --: | --: | --: | --: | --: |"]
    for config, row in there:
        memory = forecast(plan_of(config, row.get("hardware", about["hardware"])["device"] == "cuda"), known)
        what = f"| {config.shape} | `{config.technique}` | {config.batch} x {config.length} |"
        if row["status"] != "ok":
            lines.append(f"{what} | | | {'out of memory' if row['status'] == 'oom' else row['status']} | {memory.total / 2**30:.2f} | |")
            continue
        told, peak, step_s = comparable(memory, row), row["peak_bytes"], row["train_s"] / row["steps"]
        lines.append(f"{what} {row['engine']} | {1000 * step_s:.1f} | {row['tokens'] / row['train_s']:,.0f} | {peak / 2**30:.2f} | {told / 2**30:.2f} | "
                     f"{told / peak - 1:+.1%} |")
    write_text(out / "table.md", "\n".join(lines) + "\n")


def _median(every: Sequence[Point], names: set[str], constants: Constants) -> float | None:
    errors = [abs(e) for p, _, e in judge(every, constants) if p.config.name not in names]
    return round(statistics.median(errors), 4) if errors else None


def _part(errors: Sequence[float]) -> dict[str, float] | None:
    if not errors:
        return None
    return {"configurations": len(errors), "median_error": round(statistics.median(errors), 4), "p95_error": round(quantile(errors, 0.95), 4),
            "max_error": round(max(errors), 4)}


def rows(judged: Sequence[tuple[Point, Memory, float]], names: set[str]) -> list[dict[str, Any]]:
    """One a configuration, the largest error first."""
    lines = []
    for p, m, error in sorted(judged, key=lambda one: -abs(one[2])):
        c = p.config
        lines.append({
            "configuration": c.name, "technique": c.technique, "shape": c.shape, "rows": c.batch, "length": c.length, "precision": p.row["precision"],
            "engine": p.stepped, "checkpointing": p.plan.checkpointing, "measured_bytes": p.row["peak_bytes"], "forecast_bytes": comparable(m, p.row),
            "error": round(error, 4), "used": "fit" if c.name in names else "judged", **{f"{k}_bytes": v for k, v in m.parts.items()},
        })
    return lines


def _csv(table: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def _markdown(table: Sequence[dict[str, Any]], summary: dict[str, Any]) -> str:
    lines = [
        "# Forecast against measured peak memory", "",
        f"{summary['hardware']}, {summary['date']}; `{summary['command']}` over `measured.jsonl`. Constants fitted on {summary['fitted_on']} configurations "
        f"(chosen by a hash of their names), judged on {summary['configurations']} others: median error {summary['median_error']:.1%}, "
        f"95th percentile {summary['p95_error']:.1%}.", "",
        "| configuration | engine | precision | measured, GiB | forecast, GiB | error | used |", "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [f"| `{r['configuration']}` | {r['engine']} | {r['precision']} | {r['measured_bytes'] / 2**30:.3f} | {r['forecast_bytes'] / 2**30:.3f} | "
              f"{r['error']:+.1%} | {r['used']} |" for r in table]
    return "\n".join(lines) + "\n"
