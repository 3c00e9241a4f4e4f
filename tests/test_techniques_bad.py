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
        ("lora", ["method.config.target_modules=[q_proj,nonsense]"], "target_modules names nonsense, which it does not have; there are: down_proj"),
        ("lora", ["+method.config.modules_to_save=[lm_head,nonsense]"], "method.config.modules_to_save names nonsense"),
        ("lora", ["+method.config.exclude_modules=[nonsense]"], "method.config.exclude_modules names nonsense"),
        ("lora", ["+method.config.target_parameters=[nonsense]"], "method.config.target_parameters names nonsense"),
        ("ia3", ["method.config.feedforward_modules=[nonsense]"], "method.config.feedforward_modules names nonsense"),
        ("lora", ["method.config.r=65"], "method.config.r is 65; the layers that it names have a rank of at most 64; lower it"),
        ("lora", ["method.config.r=100000"], "method.config.r is 100000; the layers"),
        ("lora", ["method.config.target_modules=[k_proj]", "method.config.r=33"], "have a rank of at most 32"),
        ("lora", ["+method.config.rank_pattern={q_proj:100000}"], "method.config.rank_pattern.q_proj is 100000; the layers"),
        ("loha", ["method.config.r=100000"], "method.config.r is 100000; the layers"),
        ("adalora", ["method.config.init_r=100000"], "method.config.init_r is 100000; the layers"),
        ("prompt_tuning", ["method.config.num_virtual_tokens=256"], "num_virtual_tokens is 256, but the model's context is 256 tokens; lower it"),
        ("prefix_tuning", ["method.config.num_virtual_tokens=100000"], "num_virtual_tokens is 100000, but the model's context"),
        ("lora", ["+method.config.layer_replication=[[0,99]]"], "this adapter does not fit the model: "),
        ("lora", ["+method.config.trainable_token_indices=[99999]"], "method.config.trainable_token_indices names the token 99999, and the model has 31"),
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
        *(("lora", f"method.config.lora_{key}", sentence) for key, sentence in (
            ("alpha=0", "lora_alpha is 0, by which the adapter is scaled; it must be above 0"), ("alpha=-16", "lora_alpha is -16, by which"),
            ("alpha=true", "lora_alpha' is True; it takes int"), ("alpha=nan", "lora_alpha' is nan; it takes"),
            ("dropout=-1", "lora_dropout is -1; it is a share from 0, below 1"), ("dropout=1", "lora_dropout is 1; it is a share"),
            ("dropout=true", "lora_dropout' is True; it takes float"), ("dropout=nan", "lora_dropout' is nan; it takes a finite number"),
        )),
        ("lora", "method.config.target_modules='('", r"method.config.target_modules is '\(', no regular expression"),
        ("lora", "+method.config.exclude_modules='('", r"method.config.exclude_modules is '\(', no regular expression"),
        ("lora", "method.config.target_modules=5", "'method.config.target_modules' is 5; it takes"),
        ("lora", "+method.config.modules_to_save=lm_head", "'method.config.modules_to_save' is 'lm_head'; it takes list or null"),
        ("lora", "+method.config.rank_pattern=5", "'method.config.rank_pattern' is 5; it takes dict or null"),
        ("lora", "+method.config.inference_mode=true", "inference_mode is True, with which nothing would be trained"),
        ("lora", "+method.config.peft_type=IA3", "method.config.type says which adapter it is; leave out peft_type"),
        ("lora", "method.config=null", "config group 'method.config' is None; it takes a type and its fields"),
        ("lora", "method.config=5", "config group 'method.config' is 5; it takes a type and its fields"),
        ("prompt_tuning_text", "method.config.prompt_tuning_init_text=''", "prompt_tuning_init_text is empty; give words"),
        ("oft", "method.config.oft_block_size=-1", "oft_block_size is -1; it must be at least 0"),
        ("lora_plus", "method.lr_ratio=inf", "'method.lr_ratio' is inf; it takes a finite number"),
        ("few_shot", "method.k=x", "'method.k' is 'x'; it takes int"),
        ("vera", "method.config.d_initial=nan", "'method.config.d_initial' is nan"),
        ("prompt_choice", "method.templates=[hello]", "method.templates has 'hello'; every template holds {prompt}"),
    ],
)
def test_a_bad_value_is_named_before_a_model_is_loaded(name, override, message):
    with pytest.raises(UserError, match=message):
        method(name, override)


@pytest.mark.parametrize("kind", ["SEQ_CLS", "null", "nonsense"])
def test_an_adapter_for_another_kind_of_model_is_refused(kind):
    with pytest.raises(UserError, match="task.type"):
        method("lora", f"method.config.task_type={kind}").check("fp32")
    method("lora").check("fp32")
