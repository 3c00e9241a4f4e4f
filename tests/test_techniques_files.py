"""technique=peft_config: PEFT's own files run unmodified, and leave results in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import peft_configs
from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.cell.identity import fingerprint
from pipeline.core.compose import ROOT, build, compose
from pipeline.core.files import UserError, read_json, read_jsonl
from pipeline.core.settings import read
from pipeline.methods.peft_adalora import AdaLora
from pipeline.methods.peft_lora import LoraFa, LoraPlus, Poly, RiemannianLora
from pipeline.methods.peft_prompts import MultitaskPrompt, PrefixTuning
from pipeline.records.finished import name as cell_name

DATA = ROOT / "tests" / "data" / "peft"
LORA = DATA / "lora" / "rank4" / "adapter_config.json"


def written(folder: Path, adapter: dict, training: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    if training is not None:
        (folder / "training_params.json").write_text(json.dumps(training))
    return folder / "adapter_config.json"


def door(path: Path, *overrides: str):
    return compose(["technique=peft_config", f"technique.path={path}", *overrides])


def test_the_files_decide_how_the_adapter_learns():
    cfg = door(LORA)
    train = read(cfg).train
    assert (train.lr, train.weight_decay, train.schedule, train.max_grad_norm, train.steps) == (5e-3, 0.0, "cosine", 0.5, 12)
    assert cfg.precision.name == "auto" and cell_name(cfg) == "peft_config+lora--rank4-s0-nall"
    other = door(DATA / "lora" / "plus" / "adapter_config.json")
    train = read(other).train
    assert (train.lr, train.weight_decay, train.schedule, train.batch_size, other.precision.name) == (1e-3, 0.1, "constant", 16, "fp32")
    assert read(door(LORA, "train.lr=7e-3", "train.steps=3")).train.lr == 7e-3, "the command line wins"


def test_without_training_params_peft_s_defaults_hold():
    train = read(door(DATA / "ia3" / "default" / "adapter_config.json")).train
    assert (train.lr, train.weight_decay, train.max_grad_norm, train.steps, train.batch_size) == (1e-4, 0.1, 1.0, None, 16)


def test_an_experiment_s_budget_wins():
    assert read(door(DATA / "lora" / "plus" / "adapter_config.json", "experiments=quick")).train.batch_size == 8


def test_the_door_is_the_technique_with_the_same_settings(overrides, tmp_path):
    same = ["technique=lora", "method.config.r=4", "method.config.lora_alpha=8", "method.config.target_modules=[q_proj,v_proj]", "train.lr=5e-3",
            "train.max_grad_norm=0.5", "train.steps=12"]
    cell_run.run(compose([*overrides, *same]), folder=tmp_path / "own")
    result = cell_run.run(compose([*overrides, "technique=peft_config", f"technique.path={LORA}"]), folder=tmp_path / "door")
    assert read_jsonl(tmp_path / "own" / "predictions.jsonl") == read_jsonl(tmp_path / "door" / "predictions.jsonl")
    assert result.method == "lora" and result.hyperparameters["r"] == 4 and result.work.steps == 12


def test_kinds_that_need_more_than_their_config(tmp_path):
    adalora = written(tmp_path / "a" / "x", {"peft_type": "ADALORA", "init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 3, "total_step": 12})
    made = build(door(adalora).method, "method")
    assert isinstance(made, AdaLora) and made.start_share is None and made.config.total_step == 12
    multitask = written(tmp_path / "m" / "x", {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 4, "num_tasks": 1})
    assert isinstance(build(door(multitask).method, "method"), MultitaskPrompt)
    plus = build(door(DATA / "lora" / "plus" / "adapter_config.json").method, "method")
    assert isinstance(plus, LoraPlus) and plus.lr_ratio == 8.0
    fixed = written(tmp_path / "l" / "fa", {"peft_type": "LORA"}, {"optimizer_type": "lora-fa", "optimizer_kwargs": {"r": 8, "lora_alpha": 8, "lr": 2e-4}})
    scaled = written(tmp_path / "l" / "r", {"peft_type": "LORA"}, {"optimizer_type": "riemannian", "optimizer_kwargs": {"reg": 0.5}})
    assert isinstance(build(door(fixed).method, "method"), LoraFa) and read(door(fixed)).train.lr == 2e-4
    assert (made := build(door(scaled).method, "method")) and isinstance(made, RiemannianLora) and made.reg == 0.5
    prefix = written(tmp_path / "p" / "x", {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, {"init_kv_cache_prefix": "Hello"})
    assert (made := build(door(prefix).method, "method")) and isinstance(made, PrefixTuning) and made.text == "Hello"
    poly = written(tmp_path / "y" / "x", {"peft_type": "POLY", "r": 4, "target_modules": ["q_proj"]})
    assert isinstance(build(door(poly).method, "method"), Poly)


def test_a_changed_file_is_another_cell(tmp_path):
    path = written(tmp_path / "lora" / "x", {"peft_type": "LORA", "r": 4})
    before = fingerprint(door(path)), identity.plan(door(path))
    written(tmp_path / "lora" / "x", {"peft_type": "LORA", "r": 4}, {"eval_steps": 1})
    after = fingerprint(door(path)), identity.plan(door(path))
    assert before[0] != after[0] and before[1] != after[1]


BAD = {
    "missing": (None, None, "is not a file; name an adapter_config.json"),
    "kind": ({"peft_type": "LORRA"}, None, "has peft_type 'LORRA', which this version of PEFT does not know; it knows .*LORA"),
    "rank": ({"peft_type": "LORA", "r": 0}, None, r"method\.config\.r is 0"),
    "key": ({"peft_type": "LORA"}, {"max_step": 5}, "unknown key 'max_step', did you mean 'max_steps'"),
    "optimizer": ({"peft_type": "LORA"}, {"optimizer_type": "SGD"}, r"has optimizer_type 'SGD'; this loop has AdamW, lora\+, lora-fa, riemannian"),
    "option": ({"peft_type": "LORA"}, {"optimizer_kwargs": {"betas": [0.9, 0.9]}}, r"has optimizer_kwargs\.betas; with AdamW this loop takes lr, weight_decay"),
    "schedule": ({"peft_type": "LORA"}, {"lr_scheduler": "step"}, "has lr_scheduler 'step'; this loop has cosine, null"),
    "dtype": ({"peft_type": "LORA"}, {"dtype": "fp8"}, "has dtype 'fp8'; this loop has float32"),
    "prefix": ({"peft_type": "LORA"}, {"init_kv_cache_prefix": "Hello"}, "has init_kv_cache_prefix, at whose text a prefix begins, and the adapter is LORA"),
    "corrected": ({"peft_type": "IA3"}, {"optimizer_type": "lora-fa"}, "gradients are corrected of LoRA's A and B, and the adapter is IA3"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_sentence_before_training(tmp_path, capsys, overrides, case):
    from pipeline import train

    adapter, training, message = BAD[case]
    path = written(tmp_path / "m" / "x", adapter, training) if adapter else tmp_path / "m" / "x" / "adapter_config.json"
    with pytest.raises(UserError, match=message):
        cfg = door(path)
        read(cfg)
        build(cfg.method, "method")
    if case in ("missing", "optimizer"):
        assert train.main([*overrides, "technique=peft_config", f"technique.path={path}"]) == 2
        assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_runs_and_leaves_peft_s_results(overrides, tmp_path, capsys, imports):
    folder = tmp_path / "configs"
    for source in ("lora/rank4", "ia3/default"):
        written(folder / source, read_json(DATA / source / "adapter_config.json"), {"max_steps": 4, "optimizer_kwargs": {"lr": 5e-3}})
    written(folder / "lora" / "broken", {"peft_type": "LORA"}, {"optimizer_type": "SGD"})
    code = peft_configs.main([
        *overrides, "experiments=quick", "task=vader_movies", f"paths.peft_results={tmp_path}/peft", "seed=0", "train_rows=32", "evaluate.test_rows=20",
        "train.validations=2", "technique=peft_config", f"technique.path={folder}",
    ])
    output = capsys.readouterr()
    assert code == 2 and "passed over: " in output.err and "SGD" in output.err, "one that cannot run stops no other"
    assert {p.name for p in (tmp_path / "peft").iterdir()} == {"lora--rank4.json", "ia3--default.json"}
    actual = read_json(tmp_path / "peft" / "lora--rank4.json")
    assert set(actual) == {"run_info", "train_info", "meta_info"}
    assert set(actual["run_info"]) == {"created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg"}
    assert set(actual["train_info"]) == {
        "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time", "file_size", "num_trainable_params",
        "num_total_params", "status", "metrics",
    }
    assert set(actual["meta_info"]) == {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"}
    assert actual["run_info"]["experiment_name"] == "lora/rank4" and actual["run_info"]["peft_config"] == read_json(LORA)
    assert actual["run_info"]["train_config"]["max_steps"] == 4 and actual["run_info"]["train_config"]["optimizer_kwargs"]["lr"] == 5e-3
    assert actual["train_info"]["status"] == "success" and actual["train_info"]["num_trainable_params"] == 2 * 4 * (64 + 64 + 64 + 32)
    last = actual["train_info"]["metrics"][-1]
    assert 0 <= last["test accuracy"] <= 1 and last["step"] == 4 and "valid accuracy" in actual["train_info"]["metrics"][0]


def test_the_report_shows_them_beside_the_grid(tmp_path):
    from dataclasses import replace

    from pipeline.records import finished
    from pipeline.records.results import Result, write

    bare = Result("quick", "c", "peft_config", "f", "lora", "labels", "fp32", "t", "m", 0, 32, "ok", "trained")
    for name in ("peft_config+lora--rank4-s0-n32", "lora-s0-n32", "vera+x-s0-n32"):
        write(tmp_path / name, replace(bare, cell=name))
    actual, missing = finished.select(tmp_path, {"techniques": ["lora"], "seeds": [0], "train_rows": [32]})
    assert [c.label for c in actual] == ["lora", "peft_config+lora--rank4"] and not missing


def test_a_path_without_configurations_is_named(tmp_path, capsys):
    assert peft_configs.main(["technique=peft_config", f"technique.path={tmp_path}", "experiments=quick"]) == 2
    assert "holds no adapter_config.json; name one, or a folder of <method>/<experiment>/adapter_config.json" in capsys.readouterr().err
    assert peft_configs.main(["experiments=quick"]) == 2
    assert "needs a file or folder; add technique=peft_config technique.path=" in capsys.readouterr().err


def test_a_forgotten_path_is_named(capsys):
    from pipeline import train

    assert train.main(["technique=peft_config"]) == 2
    assert "config key 'technique.path' is missing; set it" in capsys.readouterr().err
