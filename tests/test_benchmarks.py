"""The speed benchmarks: workloads, equal losses on all sides, arithmetic of ratios and counts."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks import speed_eval, speed_limits, speed_ours, speed_peers, speed_run, speed_stats, speed_sweep, speed_targets
from benchmarks.speed_targets import OURS, EvalRow, Row, Side, SweepRow
from benchmarks.speed_workloads import RATES, SHAPES, Workload, adapter_config, base_model
from pipeline.files import UserError

RATE = {"bf16": {"matmul_flops_per_s": 1e12, "copy_bytes_per_s": 1e11}, "fp32": {"matmul_flops_per_s": 1e12, "copy_bytes_per_s": 1e11}}


def tiny(technique: str, **more) -> Workload:
    return Workload(technique, "tiny", 4, 16, dtype="fp32", **more)


def tiny_row(technique: str = "lora", **more) -> Row:
    return Row(f"tiny-{technique}", "a tiny one", Side("plain", tiny(technique, **more)), Side(OURS, tiny(technique, **more)), required=1.0, aim=2.0)


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Collecting garbage between sides takes a third of a second each time, for nothing at these sizes."""
    monkeypatch.setattr(speed_run.gc, "collect", lambda: 0)


@pytest.fixture
def settings():
    import torch

    return speed_run.Settings(torch.device("cpu"), repeats=2, limit_s=60.0, rates=RATE)


# the rows


def test_the_headline_rows_are_the_issue_s_table():
    required = {row.id: (row.required, row.aim) for row in speed_targets.TARGETS}
    assert required == {
        "lora-135m-step": (8, 15), "full-135m-step": (6, 10), "lora-1b-plain": (2.05, 2.6), "lora-1b-tuned": (1.6, 2.1), "qlora-1b-plain": (2.0, 2.5),
        "lora-over-full": (1.2, 1.35), "sweep8-135m": (15, 30), "sweep32-135m": (30, 60), "sweep8-1b": (4, 8), "lora-1b-memory": (3.0, 3.5),
        "lora-1b-small": (2.5, 4), "eval-choice": (5, 10), "eval-generate": (5, 10),
    }
    assert len(speed_targets.KNOWN) == len(speed_targets.TARGETS) + len(speed_targets.FURTHER) + len(speed_targets.CPU), "ids are unique"


def test_rows_that_share_a_side_are_measured_together():
    ids = "lora-1b-plain,lora-1b-small,lora-over-full,lora-1b-memory,sweep8-135m,lora-1b-tuned"
    together = [[row.id for row in group] for group in speed_targets.groups(speed_targets.chosen(ids))]
    assert together == [["lora-1b-plain", "lora-over-full", "lora-1b-memory", "lora-1b-tuned"], ["lora-1b-small"], ["sweep8-135m"]]


def test_two_groups_become_one_where_a_row_joins_them():
    groups = speed_targets.groups(speed_targets.chosen("lora-1b-plain,qlora-1b-plain,lora-1b-small,qlora-over-lora"))
    assert [[row.id for row in group] for group in groups] == [["lora-1b-plain", "qlora-1b-plain", "qlora-over-lora"], ["lora-1b-small"]]


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_shape_is_the_model_it_stands_for(name):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[name]))
    counted = sum(p.numel() for p in model.parameters())
    assert counted == {"135m": 134_515_008, "1b": 1_235_814_400, "8b": 8_030_261_248}.get(name, counted)
    inner = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")
    assert speed_limits.weights(name) == inner
    assert speed_limits.head_weights(name) == model.lm_head.weight.numel()


@pytest.mark.parametrize("technique", sorted(RATES))
def test_every_row_s_workloads_build_at_a_tiny_shape(technique):
    rows = [row for row in speed_targets.KNOWN.values() if isinstance(row, Row) and row.under.workload.technique == technique]
    assert rows
    for wanted in {side.workload for row in rows for side in (row.over, row.under)}:
        workload = dataclasses.replace(wanted, shape="tiny", batch=4, length=16, warmup=1, steps=1)
        batches = workload.batches(2)
        assert len(batches) == 2 and batches[0].shape == (4, 16) and not batches[0].equal(batches[1])
        assert batches[1].equal(workload.batches(2)[1]) and int(batches[0].max()) < SHAPES["tiny"]["vocab_size"]


def test_lora_s_weights_are_counted_as_peft_makes_them():
    import torch
    from peft import get_peft_model

    model = get_peft_model(base_model(tiny("lora"), torch.device("cpu")), adapter_config(tiny("lora")))
    assert speed_limits.adapter_weights(tiny("lora")) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_misspelt_workload_is_refused():
    with pytest.raises(UserError, match="technique 'lroa'; choose one of full, lora"):
        Workload("lroa", "tiny", 4, 16)


# all sides do the same


@pytest.mark.parametrize("technique", sorted(RATES))
def test_peers_and_ours_have_the_same_losses_in_fp32(technique, settings):
    workload = tiny(technique)
    runs = [speed_run.run_side(Side(kind, workload), settings.device) for kind in ("plain", "tuned", OURS)]
    plain = runs[0].losses
    assert len(plain) == workload.warmup + workload.steps == 4 and len(set(plain)) == 4
    for run in runs:
        assert run.losses == pytest.approx(plain, rel=1e-5)
        assert run.warmup_s > 0 and run.timed_s > 0
    assert plain != pytest.approx(speed_run.run_ours(tiny(technique, lr=0.5), settings.device).losses, rel=1e-5), "the optimiser acts"


def test_no_base_weight_but_the_quantised_ones_differs_between_techniques():
    import torch

    plain, four = (dict(base_model(tiny(t), torch.device("cpu")).named_parameters()) for t in ("lora", "qlora"))
    assert plain.keys() == four.keys()
    differ = {name for name in plain if plain[name].shape != four[name].shape or not plain[name].equal(four[name])}
    assert differ == {name for name in plain if "_proj" in name}


def test_step_by_step_weighs_the_two_tasks(settings):
    batch = speed_ours.training_batch(tiny("step_by_step"), tiny("step_by_step").batches(1)[0])
    labels = batch.rows < 2
    assert float(batch.weights[labels].sum()) == pytest.approx(1.0) and float(batch.weights[~labels].sum()) == pytest.approx(0.5)
    assert len(batch.targets) == 4 * 15 and batch.input_ids.shape == (4, 16)


# measuring


def test_a_row_is_measured_in_turn_and_recorded(settings, monkeypatch):
    order = []
    monkeypatch.setattr(speed_run, "run_side", lambda side, device: order.append(side.kind) or fake_run(0.8 if side.kind == "plain" else 0.2))
    row = tiny_row(warmup=1, steps=4)
    record = speed_run.record(row, speed_run.measure([row], settings), settings)
    assert order == ["plain", OURS, "plain", OURS]
    assert record["ratio"] == pytest.approx(4.0) and record["spread"] == pytest.approx([4.0, 4.0]) and record["loss"]["matched"]
    assert record["under"]["step_s"]["median"] == pytest.approx(0.05) and record["under"]["tokens_per_s"] == pytest.approx(64 / 0.05)
    assert record["under"]["limit"]["flops_per_s"] == pytest.approx(speed_limits.step_flops(row.under.workload) / 0.05)
    json.dumps(record, allow_nan=False)


def fake_run(timed_s: float, losses: tuple[float, ...] = (5.0, 4.0)) -> speed_peers.Run:
    return speed_peers.Run(0.1, 0.1, timed_s, list(losses), 1000, 10)


def test_a_lost_side_loses_its_rows_alone(settings, monkeypatch, capsys):
    def run_side(side, device):
        if side.workload.technique == "full":
            raise RuntimeError("broken kernel")
        return fake_run(1.0)

    monkeypatch.setattr(speed_run, "run_side", run_side)
    rows = [tiny_row("lora"), Row("over", "", Side(OURS, tiny("full")), Side(OURS, tiny("lora")))]
    sides = speed_run.measure(rows, settings)
    good, bad = (speed_run.record(row, sides, settings) for row in rows)
    assert good["ratio"] == 1.0 and "error" not in good
    assert "ratio" not in bad and "broken kernel" in bad["error"]
    assert "Traceback" in capsys.readouterr().err, "an error is shown, not swallowed"


def test_the_time_limit_ends_a_row(settings, monkeypatch):
    import threading

    monkeypatch.setattr(speed_run, "run_side", lambda side, device: threading.Event().wait(20))
    sides = speed_run.measure([tiny_row()], dataclasses.replace(settings, limit_s=0.1))
    assert {held.error for held in sides.values()} == {"time limit"}


def test_memory_is_a_ratio_of_peaks(settings, monkeypatch):
    monkeypatch.setattr(speed_run, "run_side", lambda side, device: dataclasses.replace(fake_run(1.0), peak_bytes=3000 if side.kind == "plain" else 1000))
    row = dataclasses.replace(tiny_row(), figure="peak_bytes")
    assert speed_run.record(row, speed_run.measure([row], settings), settings)["ratio"] == 3.0


# arithmetic


def test_ratios_and_spreads_of_known_numbers():
    found = speed_stats.ratio([8.0, 10.0, 9.0], [2.0, 2.0, 3.0])
    assert found == {"ratio": 4.0, "spread": [3.0, 5.0], "iqr": None, "ratios": [4.0, 5.0, 3.0]}
    assert speed_stats.ratio([8.0], [2.0, 4.0])["ratios"] == [4.0, 2.0], "one run against two"
    assert speed_stats.ratio([1.0, 2.0, 3.0, 4.0], [1.0] * 4)["iqr"] == [1.75, 3.25]
    assert speed_stats.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "iqr": None}


def test_curves_match_within_the_bound():
    assert speed_stats.curves([10.1, 9.0], [10.0, 9.0], "bf16") == {
        "matched": True, "max_relative": pytest.approx(0.01), "bound": 0.02, "steps": 2, "fell": pytest.approx(0.1)}
    assert not speed_stats.curves([10.1, 9.0], [10.0, 9.0], "fp32")["matched"]
    assert not speed_stats.curves([float("nan")], [10.0], "bf16")["matched"]
    assert speed_stats.curves([1.0] * 10 + [9.0], [1.0] * 11, "bf16")["matched"], "the first ten steps count"


def test_operations_of_a_small_model_by_hand():
    # tiny: d 64, 2 layers, kv 32, inner 128, 128 words; 4 rows of 16 tokens
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    attention = 3 * 2 * 4 * 16 * 16 * 64 * 2
    head = 4 * 15 * 128 * 64
    adapter = 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)) * 2
    assert speed_limits.step_flops(tiny("full")) == 6 * 64 * 2 * layer + 6 * head + attention
    assert speed_limits.step_flops(tiny("lora")) == 4 * 64 * 2 * layer + 4 * head + attention + 6 * 64 * adapter == speed_limits.step_flops(tiny("qlora"))
    assert speed_limits.step_flops(tiny("prompt_tuning")) == 4 * 4 * 36 * 2 * layer + 4 * head + 3 * 2 * 4 * 36 * 36 * 64 * 2
    assert speed_limits.step_bytes(tiny("full")) == (2 * layer + 128 * 64) * (8 + 8 + 24 + 4)


def test_one_b_lora_has_the_arithmetic_floor_of_the_design():
    flops = speed_limits.step_flops(Workload("lora", "1b", 8, 1024))
    assert flops / 790e12 == pytest.approx(0.052, rel=0.1), "DESIGN section 7: about 52 ms at 790 TFLOP/s"


def test_rates_and_distance_are_positive():
    import torch

    rate = speed_limits.rates(torch.device("cpu"), torch.float32)
    assert rate["matmul_flops_per_s"] > 1e8 and rate["copy_bytes_per_s"] > 1e7
    assert speed_limits.distance(10**9, 10**6, 0.01, RATE["fp32"]) == {
        "flops": 10**9, "flops_per_s": 1e11, "matmul_share": pytest.approx(0.1), "bytes": 10**6, "copy_share": pytest.approx(1e-3)}


# the sweep


def sweep_row(trials: int = 3, measured: int = 2) -> SweepRow:
    return SweepRow("tiny-sweep", "a tiny sweep", tiny("lora", warmup=1, steps=2), trials, measured, 15, 30)


def test_trials_are_the_same_for_both_sides_and_differ():
    assert speed_sweep.trials(4) == speed_sweep.trials(8)[:4]
    assert len({(t.r, t.lr) for t in speed_sweep.trials(8)}) == 8 and all(t.alpha == 2 * t.r for t in speed_sweep.trials(8))


def test_the_peer_s_sweep_leaves_the_base_as_it_was_for_the_next_trial(settings):
    workload = tiny("lora", warmup=1, steps=2)
    swept = speed_sweep.one_after_another(workload, 2, settings.device)
    for trial, found in zip(speed_sweep.trials(2), swept.found, strict=True):
        alone = speed_run.run_ours(trial.workload(workload), settings.device)
        assert found.losses == pytest.approx(alone.losses, rel=1e-5)
    assert len(swept.trial_s) == 2 and swept.found[0].validation != swept.found[1].validation


def test_the_sweep_is_measured_scaled_and_compared(settings, monkeypatch):
    def packed_sweep(workload, trials, validation, device):
        assert [tuple(v.shape) for v in validation] == [(4, 16)] * speed_sweep.VALIDATION_BATCHES
        return [speed_sweep.Found(t.number, [5.0, 4.0, 3.0], 4.0 + t.number) for t in trials]

    peer = speed_sweep.Pass(1.0, [2.0, 4.0], [speed_sweep.Found(n, [5.0, 4.0, 3.0], 4.0 + n) for n in range(2)])
    monkeypatch.setattr(speed_ours, "packed_sweep", packed_sweep)
    monkeypatch.setattr(speed_sweep, "one_after_another", lambda workload, count, device: peer)
    monkeypatch.setattr(speed_sweep, "process_s", lambda workload, device: 5.0)
    kept: dict = {}
    found = speed_sweep.measure(sweep_row(), settings, kept)
    assert found["over"]["wall_s"]["median"] == 1 + 3 * 3 and found["processes"]["wall_s"] == 15
    assert found["ratio"] > 15 and found["loss"]["matched"] and found["loss"]["trials"] == 2 and found["under"]["best"] == 0
    assert "the peer's time: 2 trials measured, scaled to 3" in found["notes"] and kept
    again = speed_sweep.measure(sweep_row(4), settings, kept)
    assert "the peer's trials were measured for another row of this session" in again["notes"]
    assert speed_sweep.scaled(peer, 2) == 7
    json.dumps(found, allow_nan=False)


def test_a_sweep_that_is_not_there_says_so_and_keeps_the_peer(settings, monkeypatch, capsys):
    def packed_sweep(*_):
        raise UserError("there is no packed sweep yet")

    monkeypatch.setattr(speed_ours, "packed_sweep", packed_sweep)
    monkeypatch.setattr(speed_sweep, "one_after_another", lambda workload, count, device: speed_sweep.Pass(1.0, [2.0], []))
    monkeypatch.setattr(speed_sweep, "process_s", lambda workload, device: 5.0)
    found = speed_sweep.measure(sweep_row(), settings, {})
    assert "no packed sweep yet" in found["error"] and "ratio" not in found and found["over"]["wall_s"]["median"] == 7


# evaluation


@pytest.mark.parametrize("scoring", ["choice", "generate"])
def test_both_ways_of_answering_agree_on_a_tiny_model(scoring, settings, tmp_path):
    row = EvalRow("tiny-eval", "a tiny one", scoring, shape="tiny", rows=24, batch_tokens=1024, new_tokens=4, dtype="fp32", required=5, aim=10)
    found = speed_eval.measure(row, settings, speed_eval.Source(tmp_path / "none", tmp_path / "none"))
    assert found["answers"]["identical"] == 1.0 and found["ratio"] > 0 and "error" not in found
    assert found["workload"]["rows"] == 24 and found["workload"]["model"] == "random tiny"
    json.dumps(found, allow_nan=False)


def test_differing_answers_are_counted_and_explained(settings, tmp_path):
    source = speed_eval.Source(tmp_path / "none", tmp_path / "none")
    items = [([1, 2], [[3], [4]]), ([1], [[3], [4]])]
    choice = EvalRow("x", "", "choice", shape="tiny", dtype="fp32")
    found = speed_eval.compare(choice, items, {"ours": [[-1.0, -2.0], [-3.0, -1.0]], "plain": [[-1.0, -2.0], [-1.0, -1.25]]}, source, settings.device, None)
    assert found == {"identical": 0.5, "different": 1, "largest_margin_nats": 0.25}
    generate = EvalRow("x", "", "generate", shape="tiny", dtype="fp32")
    found = speed_eval.compare(generate, items, {"ours": ["5 6", "7"], "plain": ["5 9", "7"]}, source, settings.device, None)
    assert found["identical"] == 0.5 and found["explained"] == 1 and found["largest_margin_logits"] > 0


def test_prepared_rows_and_weights_are_taken_where_they_are(tiny, settings):
    source = speed_eval.Source(tiny / "models" / "smollm2_135m", tiny / "data" / "vader_movies")
    row = EvalRow("x", "", "choice", rows=20, dtype="fp32", batch_tokens=512)
    assert source.real and len(source.items(row)) == 20 and len(source.items(row)[0][1]) == 2
    found = speed_eval.measure(row, settings, source)
    assert found["answers"]["identical"] == 1.0 and found["workload"]["model"] == "smollm2_135m"
    with pytest.raises(UserError, match="has 144 rows, x answers 2000"):
        source.items(dataclasses.replace(row, rows=2000))
