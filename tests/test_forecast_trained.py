"""What a technique trains, by arithmetic, against the real model; a model's parameters and quantised bytes against the real ones."""

from __future__ import annotations

import re

import pytest

from benchmarks.speed_workloads import SHAPES
from pipeline.core.compose import CONF, build, compose, plain
from pipeline.data.rows import Example
from pipeline.forecasting.shape import NoForecast, matrix_parts, nf4_parts, read_shape, shape_of, tensors
from pipeline.forecasting.trained import parameter_sizes, trained
from pipeline.intake import known_models

SMOLLM2 = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
           "vocab_size": 49152, "tie_word_embeddings": True}
LLAMA_8B = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336, "vocab_size": 128256}
LLAMA_1B = {**LLAMA_8B, "hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64, "intermediate_size": 8192, "tie_word_embeddings": True}
QWEN2_HALF = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
              "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True}
ADAPTER = "peft_adapter"
FAST = ("lora", "full", "ia3", "ln_tuning", "prompt_tuning_random", "lokr", "oft", "p_tuning", "bitfit_added")
TECHNIQUES = sorted(p.stem for p in CONF.glob("technique/*.yaml") if p.stem not in ("peft_config", "retrieval_documents"))
EXAMPLES = [Example(f"Review: the {word} plot . Sentiment :", answer) for word, answer in [("good", "positive"), ("bad", "negative")] * 8]
NEEDED = {"top_layers": ["method.top_layers=1"], "prompt_tuning_text": ["method.config.prompt_tuning_init=RANDOM"]}


@pytest.mark.parametrize(("config", "parameters"), [
    (SMOLLM2, 134_515_008), (LLAMA_8B, 8_030_261_248), (LLAMA_1B, 1_235_814_400), (QWEN2_HALF, 494_032_768),
    (SHAPES["qwen3-0.6b"], 596_049_920), (SHAPES["gemma3-1b"], 999_885_952), (SHAPES["phi3-mini"], 3_821_079_552),
])
def test_known_models_have_their_known_number_of_parameters(config, parameters):
    assert shape_of(config).parameters == parameters


@pytest.mark.parametrize("name", known_models.models())
def test_the_shapes_that_ship_count_the_parameters_that_transformers_makes_of_them(name):
    """By formula, against a model that transformers makes of the same config without memory (torch's meta device)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known = known_models.models()[name]
    config = AutoConfig.for_model(**{key: value for key, value in known.config.items() if key != "rope_scaling"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of(known.config).parameters == sum(p.numel() for p in model.parameters())
    assert known.source and set(known.unconfirmed) <= set(known.config) & {"dtype", "tie_word_embeddings"}


def test_the_shapes_that_ship_are_as_large_as_their_names_say():
    """A wrong width, depth or vocabulary gives another size; names are rounded, up to Llama-3.2-1B with 1.24."""
    sized = {name: re.search(r"-(\d+(?:\.\d+)?)([MB])\b", name, re.IGNORECASE) for name in known_models.models()}
    assert [name for name, size in sized.items() if size is None] == ["microsoft/Phi-3-mini-4k-instruct", "microsoft/phi-4"]
    for name, size in sized.items():
        if size:
            said = float(size[1]) * {"M": 1e6, "B": 1e9}[size[2].upper()]
            assert 0.9 * said <= shape_of(known_models.models()[name].config).parameters <= 1.25 * said, name


def test_the_tiny_models_parameters_and_bytes_are_the_real_ones(tiny):
    from pipeline.models.base import load_stored, parameters

    folder = tiny / "models" / "smollm2_135m"
    shape, model = read_shape(folder / "config.json"), load_stored(folder)
    assert shape.parameters == parameters(model)[1]
    assert sum(size for *_, size in tensors(shape, "fp32")) == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (576, 192), (1536, 576)])
def test_four_bit_bytes_are_those_of_bitsandbytes_tensors(size, double):
    import torch
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(size), quant_type="nf4", compress_statistics=double)
    stored = [packed, state.absmax, state.code, *([state.state2.absmax, state.state2.code, state.offset.reshape(1)] if double else [])]
    assert nf4_parts(size[0] * size[1], double) == [t.numel() * t.element_size() for t in stored]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_quantised_models_bytes_are_the_real_ones(tiny, precision):
    from pipeline.core.settings import Precision
    from pipeline.models.architecture import one_token
    from pipeline.models.base import device_of, load_model, memory_bytes

    folder = tiny / "models" / "smollm2_135m"
    model = load_model(folder, Precision(precision), device_of("cpu"))
    actual, buffers = memory_bytes(model), sum(b.numel() * b.element_size() for b in model.buffers())
    assert sum(size for *_, size in tensors(read_shape(folder / "config.json"), precision, compute=4)) == actual - buffers
    model(**one_token(model))
    assert memory_bytes(model) == actual, "a layer that was used has its scales elsewhere"


def test_int8_keeps_a_scale_a_row():
    assert matrix_parts(shape_of(SMOLLM2), "k_proj", "int8") == [576 * 192, 4 * 192]


@pytest.mark.parametrize("technique", [t if t in FAST else pytest.param(t, marks=pytest.mark.slow) for t in TECHNIQUES])
def test_a_technique_trains_as_many_numbers_as_the_arithmetic_says(tiny, technique):
    from pipeline.core.files import UserError
    from pipeline.methods.peft_adapter import PeftAdapter
    from pipeline.models.base import load_stored, parameters

    folder = tiny / "models" / "smollm2_135m"
    shape = read_shape(folder / "config.json")
    cfg = compose([f"technique={technique}", *NEEDED.get(technique, [])])
    try:
        actual = trained(plain(cfg)["method"], shape)
    except NoForecast as reason:
        pytest.skip(str(reason))
    method = build(cfg.method, "method")
    base = load_stored(folder).requires_grad_(False)
    if method.prepares:
        method.prepare(EXAMPLES, 0, base)
    try:
        model = PeftAdapter.wrap(method, base) if technique == "loftq" else method.wrap(base)
    except UserError:
        assert actual.count == 0
        return
    assert actual.count == (parameters(model)[0] if method.trains else 0)
    if actual.kind in ("lora", "full", "soft", "ia3", "ln"):
        assert sorted(parameter_sizes(actual, shape)) == sorted(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("config", "reason"), [
    ({**SMOLLM2, "model_type": "gpt2"}, "architecture gpt2"), ({**SMOLLM2, "model_type": "gemma3"}, "architecture gemma3"),
])
def test_other_architectures_have_no_forecast(config, reason):
    with pytest.raises(NoForecast, match=reason):
        shape_of(config)


@pytest.mark.parametrize(("method", "reason"), [
    ({"type": "bottleneck"}, "method bottleneck"),
    ({"type": ADAPTER, "config": {"type": "XLoraConfig"}}, "method xlora"),
    ({"type": ADAPTER, "config": {"type": "LoraConfig", "r": 8, "modules_to_save": ["lm_head"]}}, "modules_to"),
    ({"type": "alora", "config": {"type": "LoraConfig", "r": 8, "alora_invocation_tokens": []}}, "alora_invocation_tokens"),
    ({"type": ADAPTER, "config": {"type": "LoraConfig", "r": 8, "monteclora_config": {}}}, "monteclora_config"),
    ({"type": ADAPTER, "config": {"type": "LoraConfig", "r": 8, "alora_invocation_tokens": [3, 4]}}, "alora_invocation_tokens"),
    ({"type": ADAPTER, "config": {"type": "LoraConfig", "r": 8, "init_lora_weights": "mica"}}, "mica"),
    ({"type": ADAPTER, "config": {"type": "LoraConfig", "r": 8, "target_modules": "q.*"}}, "pattern"),
])
def test_what_is_not_known_is_not_guessed(method, reason):
    with pytest.raises(NoForecast, match=reason):
        trained(method, shape_of(SMOLLM2))
