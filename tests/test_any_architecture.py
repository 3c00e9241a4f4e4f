"""Models of other architectures than Llama: they load with the attention that they have, or are refused when they are registered; a result says how
much of them is rounded, pruned or adapted; a cell that has trained keeps its result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_architectures import write_architecture

from pipeline import base_model, train
from pipeline.cell import identity, requests
from pipeline.cell import run as cell_run
from pipeline.core.compose import compose
from pipeline.core.files import UserError, read_jsonl
from pipeline.core.settings import Precision
from pipeline.data.rows import Encoder
from pipeline.methods.low_rank import LowRank
from pipeline.methods.peft_adapter import PeftAdapter
from pipeline.methods.pruning import Pruning
from pipeline.models.base import attention_of, load_model, load_stored
from pipeline.models.reach import block_weights, quantised_weights
from pipeline.records.results import Result, read
from pipeline.serving.artefact import Artefact, Base, Multiplexer


@pytest.fixture(scope="module")
def folder_of(tiny, tmp_path_factory) -> Any:
    root = tmp_path_factory.mktemp("architectures")

    def made(kind: str) -> Path:
        return root / kind if (root / kind).exists() else write_architecture(root / kind, kind, tiny / "models" / "smollm2_135m")

    return made


def cell(overrides: list[str], *more: str) -> Result:
    cfg = compose([*overrides, "train_rows=16", "train.batch_size=8", "train.steps=2", "train.validations=0", "evaluate.test_rows=6", *more])
    return cell_run.run(cfg, folder=identity.folder_of(cfg))


def models(overrides: list[str], folder: Path) -> list[str]:
    """The overrides with a model of this folder in the place of the tiny Llama."""
    return [*(o for o in overrides if not o.startswith(("paths.models=", "model="))), f"paths.models={folder.parent}", "model=local",
            f"model.name={folder.name}", f"model.source.path={folder}"]  # fmt: skip


@pytest.mark.parametrize(("kind", "attention"), [("gemma2", "eager"), ("bloom", "eager"), ("gpt_oss", "eager"), ("mamba", None), ("llama", "sdpa")])
def test_a_model_loads_with_the_attention_that_it_has(folder_of, kind, attention):
    model = load_stored(folder_of(kind))
    assert attention_of(model) == attention
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[2, 3, 4]])).logits.isfinite().all()


@pytest.mark.slow
def test_a_result_says_which_attention(overrides, folder_of):
    found = cell(models(overrides, folder_of("gemma2")), "technique=lora")
    assert (found.size.attention, found.size.quantised_share, found.size.reached_share) == ("eager", None, pytest.approx(1.0))
    assert read(Path(compose(overrides).paths.results) / found.experiment / found.cell).size == found.size


# registration


def registered(overrides: list[str], folder: Path, tmp_path: Path) -> int:
    return base_model.main([*models(overrides, folder), f"paths.models={tmp_path}/models", "model.name=new"])


def test_a_model_that_loads_is_registered(overrides, folder_of, tmp_path):
    assert registered(overrides, folder_of("gemma2"), tmp_path) == 0
    assert (tmp_path / "models" / "new" / "manifest.json").exists()


def test_a_model_that_cells_could_not_load_is_refused(overrides, folder_of, tmp_path, capsys, monkeypatch):
    def refused(*_: Any, **__: Any) -> None:
        raise ValueError("no such attention")

    monkeypatch.setattr("pipeline.models.base._pretrained", refused)
    assert registered(overrides, folder_of("llama"), tmp_path) == 2
    assert "not once it is stored as cells read it: ValueError: no such attention" in capsys.readouterr().err
    assert not (tmp_path / "models" / "new").exists()


def test_a_model_that_wants_another_package_is_refused(overrides, folder_of, tmp_path, capsys):
    folder = Path(shutil.copytree(folder_of("llama"), tmp_path / "flash"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "flash_attention_2"}))
    assert registered(overrides, folder, tmp_path) == 2
    assert "cannot be loaded as a causal language model" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_refused(overrides, folder_of, tmp_path, capsys):
    folder = Path(shutil.copytree(folder_of("llama"), tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert registered(overrides, folder, tmp_path) == 2
    assert "weights that are not finite (model.layers.1.mlp.up_proj.weight)" in capsys.readouterr().err


# shares of the blocks


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_model_of_which_nothing_is_rounded_is_refused_by_name(folder_of, precision):
    with pytest.raises(UserError, match=f"FalconForCausalLM cannot be rounded to {precision}: .* its own are FalconLinear"):
        load_model(folder_of("falcon"), Precision(precision), torch.device("cpu"))


@pytest.mark.parametrize(("kind", "share"), [("llama", 1.0), ("gpt2", 1.0), ("mixtral", 0.111), ("qwen3_moe", 0.331)])
def test_the_share_of_the_blocks_that_is_rounded(folder_of, kind, share):
    whole = block_weights(load_stored(folder_of(kind)))
    rounded = load_model(folder_of(kind), Precision("nf4"), torch.device("cpu"))
    assert block_weights(rounded) == whole
    assert quantised_weights(rounded) / whole == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("method", [Pruning("magnitude", 0.5), LowRank(0.8)])
def test_the_share_of_the_blocks_that_is_compressed(folder_of, method):
    base = load_model(folder_of("mixtral"), Precision("fp32"), torch.device("cpu"))
    attention = sum(p.numel() for n, p in base.model.layers.named_parameters() if "self_attn" in n)
    method.prepare([], 0, base)
    assert method.reached_weights(method.wrap(base)) == attention
    assert "linear layer" in method.notes(base)[0]


def test_a_cell_on_experts_says_what_it_reaches(overrides, folder_of):
    words = models(overrides, folder_of("mixtral"))
    pruned = cell(words, "technique=magnitude_pruning")
    assert pruned.size.reached_share == pytest.approx(0.111, abs=1e-3)
    assert any(note.startswith("11% of the weights of the blocks, those of their experts counted in, is what the method reaches") for note in pruned.notes)
    rounded = cell(words, "technique=zero_shot_nf4")
    assert (rounded.size.quantised_share, rounded.size.reached_share) == (pytest.approx(0.111, abs=1e-3), None)
    adapted = cell(words, "technique=lora")
    assert adapted.size.reached_share > 0.99 and not any("experts" in note for note in adapted.notes)


def test_adapters_of_experts_take_turns(overrides, folder_of, tiny):
    words = [*models(overrides, folder_of("mixtral")), "technique=lora", "train.lr=3e-2"]
    found = cell(words, "evaluate.adapters=[2]", "precision=fp32")
    assert found.unmeasured == {} and found.inference.adapters_mixed is False and found.inference.adapters["2"] > 0
    cfg = compose([*words, "precision=fp32"])
    folder = Path(cfg.paths.results) / found.experiment / found.cell
    served = Multiplexer(Base.of(cfg), [Artefact.at("one", folder / "artefact", cfg)])
    rows = read_jsonl(tiny / "data" / "vader_movies" / "test.jsonl")[:3]
    given = served.answer([{"adapter": "one", "prompt": r["prompt"], "choices": r["choices"]} for r in rows])
    own = {p["id"]: p for p in read_jsonl(folder / "predictions.jsonl")}
    assert [g["scores"] for g in given] == [pytest.approx(own[r["id"]]["scores"], abs=1e-4) for r in rows]
    assert "cannot share a batch" in served.report[0]


# a result is kept


def test_a_cell_keeps_its_result_whatever_a_later_measurement_does(overrides, monkeypatch):
    def failing(*_: Any) -> None:
        raise NotImplementedError("merging is not there")

    monkeypatch.setattr(PeftAdapter, "merged", failing)
    monkeypatch.setattr(requests, "shared_latency", failing)
    found = cell(overrides, "technique=lora", "evaluate.adapters=[1]")
    assert found.status == "ok" and found.test is not None
    assert found.inference.latency_s > 0 and found.inference.merged_latency_s is None and found.inference.adapters is None
    reason = "NotImplementedError: merging is not there"
    assert found.unmeasured == {"adapters": reason, "merged_latency_s": reason}
    assert f"merged_latency_s was not measured: {reason}" in found.notes


@pytest.mark.parametrize("option", ["alora_invocation_tokens=[5]", "lora_bias=true"])
def test_lora_that_cannot_be_merged_gives_a_result(overrides, option):
    found = cell(overrides, "technique=lora", f"+method.config.{option}")
    assert found.status == "ok" and found.inference.latency_s > 0 and found.inference.merged_latency_s is None and found.unmeasured == {}


# answers and refusals


def test_an_answer_without_a_token_is_refused(tiny, overrides, tokenizer):
    from pipeline.core.settings import read as read_settings

    task = read_settings(compose(overrides)).task
    with pytest.raises(UserError, match="the answer '' encodes to no token"):
        Encoder(tokenizer, task, 64, "error").answer("", ends=True)
    assert Encoder(tokenizer, task, 64, "error").continuation("") == []


def test_a_refusal_of_a_file_prints_plainly(overrides, tmp_path, capsys):
    folder = tmp_path / "lora" / "one"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}))
    (folder / "training_params.json").write_text(json.dumps({"optimizer_type": "galore"}))
    words = [*overrides, "technique=peft_config", f"technique.path={folder}/adapter_config.json"]
    assert train.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder}/training_params.json has optimizer_type 'galore'")
