"""Is the memory forecast right? Measures trainings of many kinds on this GPU, fits few constants on at most 20, judges on the rest.

    python -m benchmarks.forecast measure seconds=540              what has no line yet, within the time; call it again to resume
    python -m benchmarks.forecast fit                              constants.json, table.csv, table.md, summary.json
    python -m benchmarks.forecast plan                             the configurations, in their order
    python -m benchmarks.forecast measure configs=scale out=experiments/scale     time and memory against the model's size, and
    python -m benchmarks.forecast table configs=scale out=experiments/scale       table.md: the forecast with experiments/forecast's constants beside them
    python -m benchmarks.forecast measure configs=tiny device=cpu out=/tmp/try    the same on a CPU, torch's live bytes as the counter

Keys: seconds (540), configs (all, scale or tiny), device (auto), out (experiments/forecast): measured.jsonl, a line a configuration, is there.
Exit codes: 0 done, 1 configurations are missing, 2 bad input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import forecast_configs, forecast_fit, forecast_measure
from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import UserError

OUT = Path(__file__).parent.parent / "experiments" / "forecast"
CONFIGS = {"all": forecast_configs.everything, "scale": forecast_configs.scale, "tiny": forecast_configs.tiny}
DEFAULTS = {"seconds": "540", "configs": "all", "device": "auto", "out": str(OUT)}


def parse(words: Sequence[str]) -> tuple[str, dict[str, str]]:
    """(measure, fit, table or plan; the keys). Raises UserError naming what is not known."""
    if not words or words[0] not in ("measure", "fit", "table", "plan"):
        raise UserError("benchmarks.forecast takes measure, fit, table or plan first")
    keys = DEFAULTS | key_values(words[1:], DEFAULTS, "benchmarks.forecast")
    if keys["configs"] not in CONFIGS or not keys["seconds"].isdecimal():
        raise UserError("benchmarks.forecast takes configs=all, configs=scale or configs=tiny, and whole seconds")
    return words[0], keys


def run(words: Sequence[str]) -> int:
    """Do what the command line asks for."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    what, keys = parse(words)
    configs = CONFIGS[keys["configs"]]()
    out = Path(keys["out"])
    measured = out / "measured.jsonl"
    if what == "plan":
        print("\n".join(c.name for c in configs), f"\n{len(configs)} configurations, {len(forecast_measure.missing(configs, measured))} to measure")
        return 0
    if what == "measure":
        left = forecast_measure.measure_all(configs, measured, float(keys["seconds"]), keys["device"])
        print(f"{len(configs) - left} of {len(configs)} configurations are measured")
        return 1 if left else 0
    if what == "table":
        forecast_fit.write_beside(configs, measured, OUT / "constants.json", out)
        return 0
    summary = forecast_fit.write(configs, measured, out)
    print(f"{summary['configurations']} configurations on {summary['hardware']}, fitted on {summary['fitted_on']} others: median error "
          f"{summary['median_error']:.2%}, 95th percentile {summary['p95_error']:.2%}")
    for engine, part in summary["by_engine"].items():
        print(f"  {engine}: {part}")
    return 0


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
