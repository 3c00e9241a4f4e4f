"""The sweep's and the evaluation's benchmarks: both sides at a tiny shape, scaling, agreement of trials and answers."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks import speed_eval, speed_ours, speed_run, speed_sweep
from benchmarks.speed_targets import EvalRow, SweepRow
from benchmarks.speed_workloads import Workload
from pipeline.core.files import UserError

RATE = {"matmul_flops_per_s": 1e12, "copy_bytes_per_s": 1e11}


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Collecting garbage between sides takes a third of a second each time, for nothing at these sizes."""
    monkeypatch.setattr(speed_run.gc, "collect", lambda: 0)


@pytest.fixture
def settings():
    import torch

    return speed_run.Settings(torch.device("cpu"), repeats=2, limit_s=60.0, rates={"fp32": RATE})


# the sweep


def sweep_row(trials: int = 3, measured: int = 2) -> SweepRow:
    return SweepRow("tiny-sweep", "a tiny sweep", Workload("lora", "tiny", 4, 16, dtype="fp32", warmup=1, steps=2), trials, measured, 15, 30)


def test_trials_are_the_same_for_both_sides_and_differ():
    assert speed_sweep.trials(4) == speed_sweep.trials(8)[:4]
    assert len({(t.r, t.lr) for t in speed_sweep.trials(8)}) == 8 and all(t.alpha == 2 * t.r for t in speed_sweep.trials(8))


def test_the_peer_s_sweep_leaves_the_base_as_it_was_for_the_next_trial(settings):
    workload = Workload("lora", "tiny", 4, 16, dtype="fp32", warmup=1, steps=2)
    swept = speed_sweep.one_after_another(workload, 2, settings.device)
    for trial, actual in zip(speed_sweep.trials(2), swept.found, strict=True):
        alone = speed_run.run_ours(trial.workload(workload), settings.device)
        assert actual.losses == pytest.approx(alone.losses, rel=1e-5)
    assert len(swept.trial_s) == 2 and swept.found[0].validation != swept.found[1].validation


def test_the_sweep_is_measured_scaled_and_compared(settings, monkeypatch):
    def packed_sweep(workload, trials, validation, device):
        assert [tuple(v.shape) for v in validation] == [(4, 16)] * speed_sweep.VALIDATION_BATCHES
        return [speed_sweep.Found(t.number, [5.0, 4.0, 3.0], 4.0 + t.number) for t in trials]

    peer = speed_sweep.Pass(1.0, [2.0, 4.0], [speed_sweep.Found(n, [5.0, 4.0, 3.0], 4.0 + n) for n in range(2)])
    monkeypatch.setattr(speed_ours, "packed_sweep", packed_sweep)
    monkeypatch.setattr(speed_sweep, "one_after_another", lambda workload, count, device: peer)
    monkeypatch.setattr(speed_sweep, "process_s", lambda workload, device: 5.0)
    saved: dict = {}
    actual = speed_sweep.measure(sweep_row(), settings, saved)
    assert actual["over"]["wall_s"]["median"] == 1 + 3 * 3 and actual["processes"]["wall_s"] == 15
    assert actual["ratio"] > 15 and actual["loss"]["matched"] and actual["loss"]["trials"] == 2 and actual["under"]["best"] == 0
    assert "the peer's time: 2 trials measured, scaled to 3" in actual["notes"] and saved
    again = speed_sweep.measure(sweep_row(4), settings, saved)
    assert "the peer's trials were measured for another row of this session" in again["notes"]
    assert speed_sweep.scaled(peer, 2) == 7
    json.dumps(actual, allow_nan=False)


def test_a_sweep_that_is_not_there_says_so_and_keeps_the_peer(settings, monkeypatch, capsys):
    def packed_sweep(*_):
        raise UserError("there is no packed sweep yet")

    monkeypatch.setattr(speed_ours, "packed_sweep", packed_sweep)
    monkeypatch.setattr(speed_sweep, "one_after_another", lambda workload, count, device: speed_sweep.Pass(1.0, [2.0], []))
    monkeypatch.setattr(speed_sweep, "process_s", lambda workload, device: 5.0)
    actual = speed_sweep.measure(sweep_row(), settings, {})
    assert "no packed sweep yet" in actual["error"] and "ratio" not in actual and actual["over"]["wall_s"]["median"] == 7


# evaluation


@pytest.mark.parametrize("scoring", ["choice", "generate"])
def test_both_ways_of_answering_agree_on_a_tiny_model(scoring, settings, tmp_path):
    row = EvalRow("tiny-eval", "a tiny one", scoring, shape="tiny", rows=24, batch_tokens=1024, new_tokens=4, dtype="fp32", required=5, aim=10)
    actual = speed_eval.measure(row, settings, speed_eval.Source(tmp_path / "none", tmp_path / "none"))
    assert actual["answers"]["identical"] == 1.0 and actual["ratio"] > 0 and "error" not in actual
    assert actual["workload"]["rows"] == 24 and actual["workload"]["model"] == "random tiny"
    json.dumps(actual, allow_nan=False)


def test_differing_answers_are_counted_and_explained(settings, tmp_path):
    source = speed_eval.Source(tmp_path / "none", tmp_path / "none")
    items = [([1, 2], [[3], [4]]), ([1], [[3], [4]])]
    choice = EvalRow("x", "", "choice", shape="tiny", dtype="fp32")
    actual = speed_eval.compare(choice, items, {"ours": [[-1.0, -2.0], [-3.0, -1.0]], "plain": [[-1.0, -2.0], [-1.0, -1.25]]}, source, settings.device, None)
    assert actual == {"identical": 0.5, "different": 1, "largest_margin_nats": 0.25}
    generate = EvalRow("x", "", "generate", shape="tiny", dtype="fp32")
    actual = speed_eval.compare(generate, items, {"ours": ["5 6", "7"], "plain": ["5 9", "7"]}, source, settings.device, None)
    assert actual["identical"] == 0.5 and actual["explained"] == 1 and actual["largest_margin_logits"] > 0


def test_the_peer_is_compared_with_itself_in_smaller_batches(settings, tmp_path, monkeypatch):
    source, row = speed_eval.Source(tmp_path / "none", tmp_path / "none"), EvalRow("x", "", "choice", shape="tiny", dtype="fp32", batch_tokens=512)
    asked = []

    def answer(side, row, *rest):
        asked.append((side, row.batch_tokens))
        return [[0.0, -1.0], [-2.0, -1.0]]

    monkeypatch.setattr(speed_eval, "answer", answer)
    items = [([1, 2], [[3], [4]]), ([1], [[3], [4]])]
    assert speed_eval.rebatched(row, items, [[0.0, -1.0], [-1.0, -2.0]], 0, source, settings.device, None) == 0.5
    assert asked == [("plain", 256)]


def test_prepared_rows_and_weights_are_taken_where_they_are(tiny, settings):
    source = speed_eval.Source(tiny / "models" / "smollm2_135m", tiny / "data" / "vader_movies")
    row = EvalRow("x", "", "choice", rows=20, dtype="fp32", batch_tokens=512)
    assert source.real and len(source.items(row)) == 20 and len(source.items(row)[0][1]) == 2
    actual = speed_eval.measure(row, settings, source)
    assert actual["answers"]["identical"] == 1.0 and actual["workload"]["model"] == "smollm2_135m"
    with pytest.raises(UserError, match="has 144 rows, x answers 2000"):
        source.items(dataclasses.replace(row, rows=2000))
