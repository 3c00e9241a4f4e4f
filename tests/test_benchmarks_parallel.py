"""benchmarks/parallel.py: its lines and their table; that it resumes, and that a case which fails loses no other."""

from __future__ import annotations

import json

import pytest

from benchmarks import parallel


def line(case, gpus, tokens_per_s, losses, batch, **more):
    return {"case": case, "technique": "lora", "shape": "1b", "way": "ddp", "gpus": gpus, "batch": batch, "length": 2048, "engine": "handwritten",
            "step_s": 0.05, "tokens_per_s": tokens_per_s, "losses": losses, "peak_bytes": [2**30] * gpus, "forecast_bytes": 2**29,
            "hardware": {"gpu": "a card"}, "date": "2026-01-01", **more}


def test_the_table_has_the_share_of_one_gpu_and_how_far_losses_are_apart(tmp_path):
    path = tmp_path / "parallel.jsonl"
    assert "not measured yet" in parallel.table(path)
    lines = [line("lora-1b", 1, 1000, [9.0], 2), line("lora-1b", 2, 1900, [4.0, 2.02], 4), line("curve-lora-1b", 1, 950, [4.0, 2.0], 4),
             {"case": "full-8b", "gpus": 2, "error": "its ranks ended with code 72 (72: out of memory)"}]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    table = parallel.table(path)
    assert "| `lora-1b` | 2 | DDP, handwritten | 1,900 | 95.0% | 50.0 ms | 1.0 (0.5) GiB | 1.00% | a card, 2026-01-01 |" in table
    assert "| `full-8b` | 2 | its ranks ended with code 72 (72: out of memory) |" in table
    assert {cells.count("|") for cells in table.splitlines()} == {len(parallel.COLUMNS) + 1}


def test_cases_run_on_the_gpus_they_are_for_and_names_are_their_own():
    names = [case.name for case in parallel.CASES]
    assert len(set(names)) == len(names)
    assert {case.name for case in parallel.CASES if not case.runs_on(one=True)} == {"full-8b"}
    assert {case.name for case in parallel.CASES if not case.runs_on(one=False)} == {"curve-lora-1b", "curve-full-1b"}


@pytest.mark.slow
def test_it_measures_what_is_missing_and_a_case_that_fails_loses_no_other(tmp_path, monkeypatch, capsys):
    out = tmp_path / "parallel.jsonl"
    words = [f"out={out}", "gpus=2", "device=cpu", "shape=tiny", "length=16", "only=lora-1b,full-1b,curve-full-1b"]
    measure = parallel.measure

    def failing(case, setting, ranks):
        if case.name == "full-tiny" and ranks.rank == 1:
            raise RuntimeError("CUDA out of memory")
        return measure(case, setting, ranks)

    monkeypatch.setattr(parallel, "measure", failing)
    assert parallel.main(words) == 0
    lines = {(one["case"], one["gpus"]): one for one in map(json.loads, out.read_text().splitlines())}
    assert set(lines) == {(case, n) for case in ("lora-tiny", "full-tiny") for n in (1, 2)} | {("curve-full-tiny", 1)}
    assert "72: out of memory" in lines["full-tiny", 2]["error"] and lines["lora-tiny", 2]["tokens_per_s"] > 0
    monkeypatch.setattr(parallel, "measure", measure)
    assert parallel.main([*words, "again=true"]) == 0
    added = [json.loads(one) for one in out.read_text().splitlines()][len(lines):]
    assert [(one["case"], one["gpus"]) for one in added] == [("full-tiny", 2)]
    assert added[0]["losses"] == pytest.approx(lines["curve-full-tiny", 1]["losses"], rel=1e-4)
