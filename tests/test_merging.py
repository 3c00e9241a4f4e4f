"""An adapter folded into its base answers as the adapter beside it: tied matrices, rounded bases, transposed layers; what cannot be folded says so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_architectures import write_architecture

from pipeline import export
from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import compose
from pipeline.core.files import UserError
from pipeline.core.settings import Precision
from pipeline.methods.peft_adapter import PeftAdapter
from pipeline.models.base import load_model

ROWS = torch.arange(2, 26).view(2, 12)


def method(**config: Any) -> PeftAdapter:
    made = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8} | config)
    return PeftAdapter(made)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ROWS).logits.float()


def moved(model: Any) -> Any:
    """The model with an adapter that changes its answers."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


TIED = {
    "lm_head": {"target_modules": ["q_proj", "lm_head"]}, "embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "neither": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("name", TIED)
def test_merging_leaves_the_answers_of_a_model_with_a_tied_output_layer(base, name):
    wanted = method(**TIED[name])
    model = moved(wanted.wrap(copy.deepcopy(base)))
    before = logits(model)
    assert (before - logits(base)).abs().max() > 0.1
    plain = wanted.merged(model)
    assert (logits(plain) - before).abs().max() < 1e-4
    assert plain.config.tie_word_embeddings is (name == "neither")
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) is (name == "neither")


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_rounded_gpt2_merges_into_transposed_layers_again(tiny, tmp_path, precision):
    from transformers import AutoModelForCausalLM

    folder = write_architecture(tmp_path / "gpt2", "gpt2", tiny / "models" / "smollm2_135m")
    rounded = load_model(folder, Precision(precision), torch.device("cpu"))
    wanted = method(target_modules=["c_attn"])
    model = moved(wanted.wrap(rounded))
    before = logits(model)
    plain = wanted.merged(model)
    plain.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    close = 1e-3 if precision == "nf4" else 0.3
    assert (logits(loaded) - before).abs().max() < close < (before - logits(load_model(folder, Precision("fp32"), torch.device("cpu")))).abs().max()


def cell(overrides: list[str], *more: str) -> Path:
    cfg = compose([*overrides, "train_rows=16", "train.batch_size=8", "train.steps=12", "train.validations=0", "evaluate.test_rows=8",
                   "evaluate.latency_rows=0", "train.lr=3e-2", *more])
    cell_run.run(cfg, folder=identity.folder_of(cfg))
    return identity.folder_of(cfg)


HEAD = ["technique=lora", "method.config.target_modules=[q_proj,lm_head]"]


def test_an_exported_model_with_an_adapted_head_answers_as_the_cell(overrides, tmp_path):
    from transformers import AutoModelForCausalLM

    from pipeline.records.results import read
    from pipeline.serving.artefact import Artefact, Base

    folder = cell(overrides, *HEAD)
    assert export.main([*overrides, f"cell={folder}", f"to={tmp_path}/exported"]) == 0
    cfg = compose([*overrides, *HEAD])
    attached = Artefact.at(read(folder).cell, folder / "artefact", cfg).load(Base.of(cfg))[0]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert (logits(exported) - logits(attached)).abs().max() < 1e-3


def test_an_export_whose_answers_are_not_the_cells_is_refused(overrides, tmp_path, capsys, monkeypatch):
    folder = cell(overrides, *HEAD)
    monkeypatch.setattr(PeftAdapter, "merged", lambda self, model: model.merge_and_unload())  # both ends of the tied matrix change
    assert export.main([*overrides, f"cell={folder}", f"to={tmp_path}/exported"]) == 2
    assert "nats a token from the cell's" in capsys.readouterr().err and not (tmp_path / "exported").exists()


@pytest.mark.parametrize(("key", "value"), [("alora_invocation_tokens", [3]), ("lora_bias", True), ("layer_replication", [[0, 2], [1, 2]])])
def test_what_cannot_be_folded_is_declared(key, value):
    wanted = method(target_modules=["q_proj"], **{key: value})
    assert not wanted.merges
    with pytest.raises(UserError, match="cannot be merged"):
        PeftAdapter(wanted.config, merge=True)
