"""What is left of an adapter when it is merged into bf16, NF4 and int8: known answers at both ends, and what is told of them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import evaluate, export
from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import compose
from pipeline.core.files import read_json, read_jsonl, sha256, write_json
from pipeline.records import evaluations, results
from pipeline.serving import distances, gguf_rounding, merging
from pipeline.serving.artefact import Artefact, Base

SHORT = ["train_rows=16", "train.steps=8", "train.validations=0", "evaluate.latency_rows=0", "evaluate.test_rows=16", "precision=fp32"]


@pytest.fixture
def truth_of(overrides, tmp_path, capsys) -> Any:
    def measure(*words: str) -> tuple[dict[str, Any], Path]:
        cfg = compose([*overrides, *SHORT, *words])
        folder = identity.folder_of(cfg)
        cell_run.run(cfg, folder=folder)
        capsys.readouterr()
        asked = [*overrides, f"paths.evaluations={tmp_path}/evaluations", "evaluate.test_rows=16", f"cell={folder}", "split=merged"]
        assert evaluate.main(asked) == 0
        (file,) = (tmp_path / "evaluations").rglob("merged.json")
        known = evaluations.read(tmp_path / "evaluations", results.read(folder)).truth
        assert known and [dataclasses.asdict(one) for one in known.merged] == read_json(file)["merged"], "the report finds what was written"
        return read_json(file), folder

    return measure


def test_a_merged_adapter_is_the_adapter_in_fp32_and_nearly_so_in_16_bits(truth_of):
    found, folder = truth_of("technique=lora", "train.lr=3e-2")
    own = [p["correct"] for p in read_jsonl(folder / "predictions.jsonl") if p["split"] == "test"]
    assert found["attached"] == pytest.approx(sum(own) / 16) and found["rows"] == 16 and found["effect"] > 0.1
    by = {one["precision"]: one for one in found["merged"]}
    assert list(by) == ["fp32", "bf16", "nf4", "int8", "q8_0"]
    assert by["fp32"]["drift"] < 1e-6 and by["fp32"]["change"] == 0 and by["fp32"]["base_drift"] == 0 and by["fp32"]["left"] > 0.9999
    assert 1e-9 < by["bf16"]["drift"] < by["nf4"]["drift"] and by["bf16"]["drift"] < 1e-2
    assert 1 > by["bf16"]["left"] > by["nf4"]["left"] > 0.9 and 0 < by["bf16"]["base_drift"] < by["nf4"]["base_drift"]
    assert 1e-9 < by["q8_0"]["drift"] < by["nf4"]["drift"] and by["q8_0"]["left"] > 0.99
    assert {one["verdict"] for one in found["merged"]} == {"kept"}


CONSTANT = ["train.schedule=constant", "train.warmup_share=0"]


@pytest.fixture
def in_bf16_already(overrides, tiny, tmp_path) -> Path:
    """A base whose fp32 weights are numbers of bf16, as most bases' are: its folder, which the overrides name."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny / "models", tmp_path / "models")
    folder = tmp_path / "models" / "smollm2_135m"
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().float().save_pretrained(folder)
    write_json(folder / "manifest.json", {"name": folder.name, "sha256": sha256(folder / "model.safetensors")})
    overrides.append(f"paths.models={tmp_path}/models")
    return folder


def survivors(folder: Path, overrides: list[str]) -> float:
    """Share of the weights that the cell's adapter changes in fp32 which it changes in bf16, too."""
    cfg = compose([*overrides, *SHORT, "technique=lora"])
    artefact = Artefact.at("lora", folder / "artefact", cfg)
    before = {name: p.clone() for name, p in Base.of(cfg).model.named_parameters()}
    pairs = [(before[name], p) for name, p in artefact.method.merged(artefact.load(Base.of(cfg))[0]).named_parameters()]
    changed = [(a != b, a.bfloat16() != b.bfloat16()) for a, b in pairs]
    return sum(int((one & two).sum()) for one, two in changed) / sum(int(one.sum()) for one, _ in changed)


def test_an_adapter_smaller_than_rounding_is_told(truth_of, in_bf16_already, overrides):
    """Changes far below a 256th of the weights: the arithmetic of bf16 changes far more than the adapter, and that is not the merge's doing."""
    found, folder = truth_of("technique=lora", "train.lr=3e-6", *CONSTANT)
    by = {one["precision"]: one for one in found["merged"]}
    assert found["effect"] > distances.NOTHING and by["fp32"]["verdict"] == "kept"
    assert survivors(folder, overrides) < 0.05
    assert by["bf16"]["verdict"] == "rounded_away" and by["bf16"]["left"] < 0
    assert by["bf16"]["drift"] > 10 * found["effect"] and by["bf16"]["drift"] < 2 * by["bf16"]["base_drift"]
    assert by["nf4"]["verdict"] == by["int8"]["verdict"] == "rounded_away", "their steps are larger still"


def test_a_small_adapter_that_is_kept_is_no_false_alarm(truth_of, in_bf16_already, overrides):
    found, folder = truth_of("technique=lora", "train.lr=2e-4", *CONSTANT)
    by = {one["precision"]: one for one in found["merged"]}
    assert survivors(folder, overrides) > 0.5 and by["bf16"]["verdict"] == "kept" and by["bf16"]["left"] > 0.95
    assert by["nf4"]["verdict"] in ("rounded_away", "base_changed") and by["nf4"]["base_drift"] > found["effect"]


@pytest.mark.parametrize("technique", ["qlora", pytest.param("lora_int8", marks=pytest.mark.slow)])
def test_of_a_rounded_base_the_control_is_that_base_dequantised(truth_of, technique):
    found, _ = truth_of(f"technique={technique}", "train.lr=1e-2", *(["precision=nf4"] if technique == "qlora" else ["precision=int8"]))
    by = {one["precision"]: one for one in found["merged"]}
    assert by["fp32"]["verdict"] == "kept" and by["fp32"]["base_drift"] < 0.01, "no step from 16 bits to 4 is counted, which the cell took before"
    assert by["fp32"]["left"] > 0.98 and by["bf16"]["left"] > 0.98


@pytest.mark.parametrize(("effect", "drift", "base_drift", "left", "expected"), [
    (0.1, 0.001, 0.001, 0.99, "kept"), (0.1, 0.1, 0.0, 0.0, "rounded_away"), (0.1, 0.5, 0.02, 0.9, "too_much"), (1e-7, 0.5, 0.4, 0.0, "kept"),
    (1e-7, 0.5, 0.1, 0.0, "too_much"), (1e-5, 2e-4, 2e-4, -12, "rounded_away"), (0.05, 0.12, 0.1, 0.6, "base_changed"), (0.1, 0.05, 0.02, 0.49, "rounded_away"),
])
def test_what_is_told(effect, drift, base_drift, left, expected):
    assert distances.verdict(effect, drift, base_drift, left) == expected


def test_what_is_left_of_a_change():
    """By a change of known size: all, none, half and twice of it, and noise of its own size upon it."""
    drawn = torch.Generator().manual_seed(0)
    base, change, noise = (torch.randn(300, 64, generator=drawn) for _ in range(3))
    logits = {"attached": change, "merged": change, "gone": 0 * change, "half": change / 2, "twice": 2 * change, "noisy": change + noise}
    at = {name: (base + 0.1 * more).log_softmax(-1) for name, more in logits.items()}
    rounded = base.log_softmax(-1)
    found = {name: distances.left(rounded, at["attached"], rounded, at[name]) for name in at}
    assert [found[name] for name in ("merged", "gone", "half", "twice")] == pytest.approx([1, 0, 0.75, 0], abs=1e-4)
    assert found["noisy"] == pytest.approx(0, abs=0.05)
    shifted = (base + 3 * noise).log_softmax(-1)
    both = (base + 3 * noise + 0.1 * change).log_softmax(-1)
    assert distances.left(rounded, at["attached"], shifted, both) == pytest.approx(1, abs=1e-4), "what rounding does to the base is not the adapter's loss"


def test_a_base_in_16_bits_is_merged_in_32(truth_of, in_bf16_already, monkeypatch):
    """Else the merge itself rounds, and the row fp32 is that of bf16."""
    kept: list[float] = []
    inner = merging._keep
    monkeypatch.setattr(merging, "_keep", lambda model, base, folder: kept.append(in_bf16(model)) or inner(model, base, folder))
    found, _ = truth_of("technique=lora", "train.lr=2e-4", "precision=bf16", *CONSTANT)
    assert kept[0] == 1 and kept[1] < 0.8, "the base's weights are numbers of bf16, the merged ones are not"
    assert {one["precision"]: one["verdict"] for one in found["merged"]}["bf16"] == "kept"


def in_bf16(model: Any) -> float:
    """Share of the weights that are numbers of bf16."""
    pairs = [(int((p.bfloat16().float() == p.float()).sum()), p.numel()) for p in model.parameters()]
    return sum(same for same, _ in pairs) / sum(count for _, count in pairs)


@pytest.mark.parametrize(("technique", "precision"), [pytest.param("qlora", "nf4", marks=pytest.mark.slow), ("lora_int8", "int8")])
def test_export_of_a_rounded_base_judges_the_adapter_against_it_dequantised(overrides, tmp_path, technique, precision):
    cfg = compose([*overrides, *SHORT[:-1], f"technique={technique}", f"precision={precision}", "train.lr=1e-2"])
    cell_run.run(cfg, folder=identity.folder_of(cfg))
    assert export.main([*overrides, f"cell={identity.folder_of(cfg)}", f"to={tmp_path}/out"]) == 0
    about = read_json(tmp_path / "out" / "export.json")["merged"]
    assert about["verdict"] == "kept" and about["left"] > 0.9 and about["base_drift"] < 0.01
    assert precision == "nf4" or about["base_drift"] > 0, "8 bits round activations, too, which the merged model does not"


def test_export_warns_of_an_adapter_that_is_rounded_away(in_bf16_already, overrides, tmp_path, capsys):
    words = [*overrides, *SHORT[:-1], "precision=bf16"]
    for lr, lost in (("3e-6", True), ("3e-2", False)):
        cfg = compose([*words, "technique=lora", f"train.lr={lr}", f"variant=l{lr[0]}{lr[-1]}", *CONSTANT])
        cell_run.run(cfg, folder=identity.folder_of(cfg))
        capsys.readouterr()
        assert export.main([*words, f"cell={identity.folder_of(cfg)}", f"to={tmp_path}/out{lr}"]) == 0
        assert ("warning: merged, it is rounded away (" in capsys.readouterr().err) is lost
        about = read_json(tmp_path / f"out{lr}" / "export.json")["merged"]
        assert (about["verdict"], about["left"] < 0.5) == (("rounded_away", True) if lost else ("kept", False))


def test_what_cannot_be_merged_is_refused_by_name(overrides, tmp_path, capsys):
    cfg = compose([*overrides, *SHORT, "technique=prompt_tuning"])
    cell_run.run(cfg, folder=identity.folder_of(cfg))
    assert evaluate.main([*overrides, f"cell={identity.folder_of(cfg)}", "split=merged"]) == 2
    assert "cannot be merged: its soft prompt comes before" in capsys.readouterr().err


def test_distributions_are_those_at_the_answers_tokens(tiny, overrides):
    from pipeline.serving.artefact import rows_of, scorer_of

    cfg = compose([*overrides, "technique=zero_shot", "precision=fp32"])
    scorer = scorer_of("zero_shot", None, cfg)
    rows = rows_of(cfg, "test")[:3]
    found = merging.distributions(scorer, rows)
    expected = []
    for row in sorted(rows, key=lambda r: len(scorer.encoder.prompt(r["prompt"]))):
        prompt, said = scorer.encoder.prompt(row["prompt"]), scorer.encoder.answer(row["answer"])
        expected.append(scorer.model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
    both = torch.cat(expected)
    assert found.shape == both.shape and torch.allclose(found.sum(0), both.sum(0), atol=1e-3)


def gguf_file(model: Any, path: Path) -> None:
    """A Llama as llama.cpp's converter writes it with --outtype q8_0, without its tokenizer: names of the gguf package, rows of q and k in that order."""
    import gguf

    cfg, kind = model.config, gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    for add, value in ((writer.add_block_count, cfg.num_hidden_layers), (writer.add_context_length, cfg.max_position_embeddings),
                       (writer.add_embedding_length, cfg.hidden_size), (writer.add_feed_forward_length, cfg.intermediate_size),
                       (writer.add_head_count, cfg.num_attention_heads), (writer.add_head_count_kv, cfg.num_key_value_heads),
                       (writer.add_layer_norm_rms_eps, cfg.rms_norm_eps), (writer.add_rope_freq_base, cfg.rope_parameters["rope_theta"]),
                       (writer.add_vocab_size, cfg.vocab_size)):
        add(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, cfg.num_hidden_layers)
    for name, p in model.named_parameters():
        values, heads = p.detach().float().numpy(), {"q_proj": cfg.num_attention_heads, "k_proj": cfg.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            values = values.reshape(heads, 2, len(values) // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        stored = gguf.quants.quantize(values, kind.Q8_0) if values.ndim > 1 else values
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", stored, raw_dtype=kind.Q8_0 if values.ndim > 1 else kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_weights_of_gguf_are_those_that_transformers_reads_from_such_a_file(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny / "models" / "smollm2_135m"
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    gguf_file(plain, tmp_path / "tiny.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
    ids = torch.randint(plain.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    before = plain(ids).logits
    assert gguf_rounding.suits(plain)
    rounded = gguf_rounding.to_q8_0(plain)(ids).logits
    assert torch.equal(dict(rounded_weights(plain))["k_proj"], dict(rounded_weights(read))["k_proj"])
    assert torch.allclose(rounded, read(ids).logits, atol=1e-5) and (rounded - before).abs().max() > 1e-3


def rounded_weights(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name.split(".")[-2], p) for name, p in model.named_parameters()]
