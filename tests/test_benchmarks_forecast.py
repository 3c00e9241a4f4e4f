"""The harness that measures, fits and judges the forecast: what it covers, that it goes on where it stopped, and that a fit finds known constants."""

from __future__ import annotations

import json

import pytest

from benchmarks import forecast as entry
from benchmarks import forecast_configs, forecast_fit, forecast_measure
from pipeline.core.files import read_json, read_jsonl, write_jsonl
from pipeline.forecasting.memory import forecast
from pipeline.forecasting.plan import Constants


def test_the_configurations_span_the_axes():
    actual = forecast_configs.everything()
    assert len(actual) >= 90 and len({c.name for c in actual}) == len(actual)
    assert {c.shape for c in actual[:60]} == {"135m", "360m", "1b", "3b", "8b"}, "any first part is spread"
    assert {"full", "lora", "qlora", "prompt_tuning_random", "ia3", "bitfit_added", "ln_tuning"} <= {c.technique for c in actual}
    more = {m for c in actual for m in c.more}
    assert {"train.checkpointing=true", "precision=fp32", "method.config.r=64"} <= more and any(c.ragged for c in actual) and any(c.parts > 1 for c in actual)
    assert {c.engine for c in actual} == {"auto", "eager"} and any(c.technique == "lora_int8" for c in actual)


def test_quantiles_are_those_of_linear_interpolation():
    assert forecast_fit.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5 and forecast_fit.quantile([1.0, 2.0], 0.95) == pytest.approx(1.95)
    assert forecast_fit.quantile([7.0], 0.95) == 7.0


@pytest.mark.parametrize("words", [["show"], ["measure", "second=3"], ["measure", "configs=few"], []])
def test_bad_words_are_told(words, capsys):
    assert entry.main(words) == 2 and "benchmarks.forecast" in capsys.readouterr().err


def made_up(config, factor, fixed):
    """A line that a card with these constants would have written."""
    plan = forecast_fit.plan_of(config, True)
    output = forecast(plan, Constants())
    engine = {"hand": "handwritten"}.get(plan.engine, plan.engine)
    return {
        "name": config.name, "status": "ok", "kind": "gpu_reserved",
        "peak_bytes": int(output.loaded + factor[plan.engine] * (output.total - output.loaded) + fixed),
        "precision": plan.precision, "engine": engine, "hardware": {"device": "cuda", "gpu": "NVIDIA Test", "cpu": "x"}, "versions": {}, "date": "2026-11-23",
        "machine": {"product_workspace": 32 * 2**20}, "device_used_bytes": 2**30 + 500, "reserved_end": 2**30,
    }


@pytest.mark.slow
def test_a_fit_finds_the_constants_and_judges_on_the_others(tmp_path):
    configs = [c for c in forecast_configs.everything() if c.shape in ("135m", "360m")]
    factor, fixed = {"eager": 1.05, "hand": 0.97, "captured": 1.1}, 3 * 10**7
    rows = [made_up(c, factor, fixed) for c in configs[:48]]
    rows.append({"name": configs[48].name, "status": "oom", "error": "CUDA out of memory", "hardware": rows[0]["hardware"]})
    write_jsonl(tmp_path / "measured.jsonl", rows)
    summary = forecast_fit.write(configs, tmp_path / "measured.jsonl", tmp_path)
    assert summary["fitted_on"] == 20 and summary["configurations"] == 28 and summary["out_of_memory"] == [configs[48].name]
    assert summary["median_error"] < 1e-3 and summary["p95_error"] < 2e-3 and summary["hardware"] == "NVIDIA Test"
    stored = read_json(tmp_path / "constants.json")
    assert stored["scale"] == pytest.approx(factor, abs=2e-3) and stored["fixed"]["eager"] == pytest.approx(fixed, rel=0.05) and stored["context"] == 500
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert len(table) == 49 and sum(line.endswith("fit") or ",fit," in line for line in table) == 20


@pytest.mark.slow
def test_measuring_goes_on_where_it_stopped_and_agrees_on_a_cpu(tmp_path, capsys):
    import subprocess
    import sys

    from pipeline.core.compose import ROOT

    words = [sys.executable, "-m", "benchmarks.forecast", "measure", "configs=tiny", "device=cpu", f"out={tmp_path}"]
    path, configs = tmp_path / "measured.jsonl", forecast_configs.tiny()
    write_jsonl(path, [{"name": c.name, "status": "died", "error": "made up"} for c in configs[4:]])
    assert subprocess.run(words, cwd=ROOT, check=False, capture_output=True).returncode == 0
    actual = read_jsonl(path)
    assert [r["name"] for r in actual] == [c.name for c in configs[4:] + configs[:4]] and not forecast_measure.missing(configs, path)
    assert entry.main(["fit", "configs=tiny", f"out={tmp_path}"]) == 0 and "median error" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["median_error"] < 0.02 and summary["kind"] == "live_bytes" and len(summary["failed"]) == len(configs) - 4
