"""The speed benchmarks' result files, table and command line."""

from __future__ import annotations

import json

import pytest

from benchmarks import speed, speed_files, speed_limits, speed_plan, speed_run, speed_targets
from benchmarks.speed_targets import OURS, Row, Side
from benchmarks.speed_workloads import Workload
from pipeline.core.files import UserError

RATE = {"matmul_flops_per_s": 1e12, "copy_bytes_per_s": 1e11}


def test_a_row_is_kept_beside_the_others(tmp_path):
    rows = speed_targets.KNOWN
    about = {"hardware": {"gpu": "A"}, "versions": {"torch": "1"}, "date": "2026-01-01", "command": "c", "git_commit": "x", "git_dirty": False}
    first = {"ratio": 2.0, "spread": [1.0, 3.0], "required": 8, "aim": 15, "what": "first"}
    nine = {"over": {"walls_s": [9.0, 9.9]}, "under": {"walls_s": [1.0, 1.1]}}
    speed_files.keep(tmp_path, rows["lora-1b-small"], {**first, "id": "lora-1b-small"}, about)
    speed_files.keep(tmp_path, rows["lora-135m-step"], {**first, "id": "lora-135m-step"}, about)
    speed_files.keep(tmp_path, rows["lora-135m-step"], {**first, "id": "lora-135m-step", "ratio": 8.8, **nine}, {**about, "date": "2026-01-02"})
    speed_files.keep(tmp_path, rows["lora-1b-small"], {"id": "lora-1b-small", "error": "lost"}, about)
    held = json.loads((tmp_path / "targets.json").read_text())
    assert [(row["id"], round(row["ratio"], 9), row["date"]) for row in held] == [("lora-135m-step", 9.0, "2026-01-02"), ("lora-1b-small", 2.0, "2026-01-01")]
    assert all(tuple(row) == speed_files.TARGET_KEYS for row in held)
    record = speed_files.rows(tmp_path / "speed-step.json")[1]
    assert record["ratio"] == 2.0 and record["last_failure"]["error"] == "lost", "a failed run does not displace a good one"
    text = speed_files.table(tmp_path)
    lines = text.splitlines()
    assert len(lines) == 4 and lines[2].startswith(
        "| `lora-135m-step` | first | **9.00x** (95%: 9.00 to 9.00; 9.00 to 9.00) | ≥ 8x, reached | ≥ 15x |"), "judged by its sides' repeats"
    assert lines[3].startswith("| `lora-1b-small` | first | 2.00x (no interval; 1.00 to 3.00) | ≥ 8x, not decided |"), "not bold: its repeats are not there"
    assert len({line.count("|") for line in lines}) == 1


def test_a_row_that_is_no_headline_stays_out_of_the_targets(tmp_path):
    row = speed_targets.KNOWN["qlora-over-lora"]
    speed_files.keep(tmp_path, row, {"id": row.id, "ratio": 1.0}, {})
    assert not (tmp_path / "targets.json").exists() and (tmp_path / "speed-wide.json").exists()


def test_the_wide_table_has_a_line_a_workload_and_leaves_open_what_was_not_measured(tmp_path):
    side = {"workload": {"steps": 4}, "tokens_per_s": 102400.0, "runs": [{"timed_s": 0.04, "peak_bytes": 2**30}]}
    slow = {"workload": {"steps": 4}, "runs": [{"timed_s": 0.1, "peak_bytes": 3 * 2**30}]}
    for kind, ratio in (("plain", 2.5), ("tuned", None)):
        row = speed_targets.KNOWN[f"full-135m-16x64-{kind}"]
        speed_files.keep(tmp_path, row, {"id": row.id, "ratio": ratio, "under": side, "over": slow if ratio else None}, {})
    assert speed_files.grid(tmp_path).splitlines()[2:] == ["| `full-135m-16x64` | 2.50x |  | 102,400 | 10.0 ms, 1.0 GiB | 25.0 ms, 3.0 GiB |  |"]
    with pytest.raises(UserError, match="holds no workload against peer"):
        speed_files.grid(tmp_path / "empty")


@pytest.mark.slow
def test_the_command_measures_a_row_and_prints_the_table(tmp_path, monkeypatch, capsys):
    workload = Workload("lora", "tiny", 4, 16, dtype="fp32")
    row = Row("cpu-lora", "a tiny one", Side("plain", workload), Side(OURS, workload), required=1.0, aim=2.0, set="cpu")
    monkeypatch.setitem(speed_targets.KNOWN, "cpu-lora", row)
    monkeypatch.setattr(speed_limits, "rates", lambda device, dtype: RATE)
    monkeypatch.setattr(speed_run, "BUSY", float("inf"))  # other tests run beside this one
    assert speed.main(["ids=cpu-lora", "repeats=1", "steps=2", f"out={tmp_path}", "device=cpu"]) == 0
    held = json.loads((tmp_path / "targets.json").read_text())
    assert held[0]["id"] == "cpu-lora" and held[0]["ratio"] > 0 and held[0]["hardware"]["device"] == "cpu" and "ids" not in held[0]
    record = speed_files.rows(tmp_path / "speed-cpu.json")[0]
    assert record["under"]["workload"]["steps"] == 2 and len(record["under"]["runs"][0]["losses"]) == 3
    assert record["loss"]["matched"] and record["loss"]["max_relative"] < 1e-5
    capsys.readouterr()
    assert speed.main(["table", f"out={tmp_path}"]) == 0
    assert "| `cpu-lora` | a tiny one |" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "told"), [
    (["ids=nothing"], "there is no benchmark 'nothing'"),
    (["ids=lora-1b-tuned-compil"], "did you mean 'lora-1b-tuned-compile'?"),
    (["repeat=3"], "does not take 'repeat=3'"),
    (["repeats=0"], "whole number of at least 1 for repeats"),
    (["peer_b=fast"], "liger, compile, liger+compile"),
    (["ids=,"], "names no benchmark"),
    (["sweep_steps=1", "ids=sweep8-135m", "plan=true"], "at least 2 for sweep_steps"),
])
def test_bad_words_are_refused_in_one_sentence(words, told, capsys):
    assert speed.main(words) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_the_plan_measures_nothing_and_names_every_row(tmp_path, capsys):
    assert speed.main([f"ids={','.join(speed_targets.HEADLINE)}", "plan=true", f"out={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert all(id in out for id in speed_targets.HEADLINE) and not list(tmp_path.iterdir())


def test_compiled_rows_are_rows_of_their_own(capsys):
    rows = speed.rows(speed.parse(["ids=lora-1b-tuned,lora-1b-plain", "peer_b=liger+compile", "steps=7"]), "cuda")
    assert [row.id for row in rows] == ["lora-1b-tuned-liger-compile", "lora-1b-plain"]
    assert rows[0].over.kind == "liger-compile" and rows[0].under.workload.steps == 7
    alone = speed.rows(speed.parse(["ids=lora-1b-tuned", "peer_b=compile"]), "cuda")
    assert [row.id for row in alone] == ["lora-1b-tuned-compile"] and alone[0].over.kind == "compile"
    assert speed_plan.side_s(rows[0].over, "cuda") > 100
    assert alone == speed.rows(speed.parse(["ids=lora-1b-tuned-compile"]), "cuda")
    assert "lora-1b-tuned-compile" in speed_targets.HEADLINE and "lora-1b-tuned-compile" not in speed_targets.SETS["all"]
