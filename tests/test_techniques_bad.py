"""What does not go together: a technique, a precision, a model or a value, told by name before any training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.core.compose import build, compose
from pipeline.core.files import UserError
from pipeline.core.settings import Precision
from pipeline.models.base import load_model


@pytest.fixture
def load(tiny):
    return lambda: load_model(tiny / "models" / "smollm2_135m", Precision("fp32"), torch.device("cpu"))


def method(name: str, *overrides: str) -> Any:
    return build(compose([f"technique={name}", *overrides]).method, "method")


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("pissa", "nf4", "init_lora_weights=pissa takes the base's weights apart, and nf4 ones are rounded already; choose precision=auto, fp32 or bf16"),
        ("olora", "int8", "init_lora_weights=olora takes the base's weights apart"),
        ("loha", "nf4", "PEFT's LOHA has no layer for nf4 weights"),
        ("lokr", "int8", "PEFT's LOKR has no layer for int8 weights"),
        ("loftq", "fp32", "LoftQ starts from what NF4 quantisation lost, but the base is fp32; choose precision=nf4"),
        ("top_layers", "nf4", "top_layers cannot train nf4 weights; choose precision=auto"),
        ("from_scratch", "int8", "full fine-tuning cannot train int8 weights"),
    ],
)
def test_a_precision_that_makes_no_sense_is_named(name, precision, message):
    with pytest.raises(UserError, match=message):
        method(name).check(precision)


def test_loftq_by_lora_s_own_key_is_sent_to_its_technique():
    with pytest.raises(UserError, match="takes the base's weights apart, and nf4 ones are rounded already; technique=loftq does it"):
        method("qlora", "+method.config.init_lora_weights=loftq", "+method.config.loftq_config.loftq_bits=4").check("nf4")


@pytest.mark.parametrize("name", ["vera", "oft", "ia3", "adalora", "qdora", "ln_tuning", "prefix_tuning", "p_tuning", "bitfit_added"])
def test_a_precision_that_makes_sense_is_not_refused(name):
    method(name).check("nf4")


@pytest.mark.parametrize("name", ["prompt_tuning_text", "prefix_tuning", "p_tuning", "multitask_prompt"])
def test_no_soft_prompt_can_be_merged(name):
    with pytest.raises(UserError, match=r"cannot be merged into the base; set method\.merge=false"):
        method(name, "method.merge=true")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("bitfit", [], "LlamaForCausalLM has no bias parameters, so BitFit has nothing to train; set method.add_biases=true"),
        ("top_layers", ["method.top_layers=3"], "method.top_layers=3, but the model has 2 layers; lower it"),
        ("loha", ["method.config.target_modules=[c_attn]"], "this adapter does not fit the model: .*c_attn"),
    ],
)
def test_a_model_that_a_technique_cannot_apply_to_is_told(load, name, overrides, message):
    with pytest.raises(UserError, match=message):
        method(name, *overrides).wrap(load())


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("top_layers", "method.top_layers=0", "method.top_layers is 0; it must be a whole number of at least 1"),
        ("head_only", "method.parts=[heads]", r"method.parts is \['heads'\]; name one or more of layers, final_norm, biases, head, embeddings"),
        ("head_only", "+method.add_biases=true", "put biases into method.parts"),
        ("adalora", "method.config.target_r=12", "AdaLoRA brings ranks down to it from init_r=12, so it is less"),
        ("adalora", "method.start_share=0.8", "leave no steps to take ranks in"),
        ("lora_plus", "method.lr_ratio=0.5", "method.lr_ratio is 0.5; LoRA"),
        ("retrieval", "method.by=tfidf", "method.by is 'tfidf'; choose bm25 or embedding"),
        ("retrieval", "method.k=0", "method.k is 0; it must be a whole number of at least 1"),
        ("prompt_choice", "method.templates=[hello]", "method.templates has 'hello'; every template holds {prompt}"),
    ],
)
def test_a_bad_value_is_named_before_a_model_is_loaded(name, override, message):
    with pytest.raises(UserError, match=message):
        method(name, override)


def test_an_encoder_decoder_is_told_when_the_model_is_fetched(tiny, tmp_path, capsys):
    from transformers import T5Config, T5ForConditionalGeneration

    from pipeline import base_model
    from pipeline.models.base import load_tokenizer

    T5ForConditionalGeneration(T5Config(vocab_size=31, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path / "t5")
    load_tokenizer(tiny / "models" / "smollm2_135m").save_pretrained(tmp_path / "t5")
    assert base_model.main(["model=local", f"model.source.path={tmp_path}/t5", f"paths.models={tmp_path}/models"]) == 2
    assert "t5 is an encoder-decoder, and every technique here is for decoder-only models" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
