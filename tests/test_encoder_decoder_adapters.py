"""Adapters, checks, refusals and commands on a base whose prompt an encoder reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, random_model
from encoder_decoder_models import SHORT, T5S, adapted, encoder_of, loaded, naive, overridden, stored
from peft import LoraConfig

from pipeline import check, evaluate, export, forecast
from pipeline.cell import identity, preflight
from pipeline.cell import run as cell_run
from pipeline.core.compose import build, compose
from pipeline.core.files import UserError, read_json, read_jsonl
from pipeline.forecasting.shape import NoForecast, read_shape
from pipeline.intake.project import check_folder
from pipeline.methods.bottleneck import Bottleneck
from pipeline.methods.peft_adapter import PeftAdapter
from pipeline.models import architecture, kinds
from pipeline.models.base import load_tokenizer
from pipeline.models.blocks import blocks, sublayer
from pipeline.serving.artefact import Artefact, Base, Multiplexer


@pytest.fixture(scope="module")
def folder_of(tiny, tmp_path_factory) -> Any:
    """Name of a shape in tests/architectures.py -> a model's folder."""
    root = tmp_path_factory.mktemp("encoder_decoders")
    return lambda name: stored(root, name, tiny / "models" / "smollm2_135m")


# where adapters stand


def test_blocks_are_the_encoders_and_the_decoders(folder_of):
    for name in T5S:
        model = loaded(folder_of(name))
        every = blocks(model)
        assert len(every) == 4 and {id(b) for b in every[:2]} == {id(b) for b in _lists(model.get_encoder())}
        assert all(sublayer(block, "attention") is not sublayer(block, "feed_forward") for block in every)
    model = loaded(folder_of("t5"))
    assert [type(sublayer(b, "feed_forward")).__name__ for b in blocks(model)] == ["T5DenseActDense"] * 4
    decoder = blocks(model)[-1]
    assert sublayer(decoder, "attention") is decoder.layer[0].SelfAttention, "not the one to what the encoder made"


def _lists(stack: Any) -> Any:
    return next(child for child in stack.children() if isinstance(child, torch.nn.ModuleList))


def test_keys_values_last_layers_and_norms_are_found(folder_of):
    model = loaded(folder_of("t5-v1_1"))
    assert set(kinds.keys_and_values(model)) == {f"layer.{place}.{part}" for place in ("0.SelfAttention", "1.EncDecAttention") for part in "kv"}
    assert set(kinds.down_projections(model)) == {"layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"}
    assert set(kinds.norms(model)) == {"layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm", "encoder.final_layer_norm", "decoder.final_layer_norm"}


def test_a_bottleneck_has_the_width_of_its_own_stack(tmp_path, tiny):
    """As in t5gemma-9b-2b, whose encoder is wider than its decoder."""
    module = ARCHITECTURES["t5gemma"][1]["encoder"]
    model = random_model("t5gemma", encoder=module | {"hidden_size": 96, "vocab_size": 31})
    wrapped = Bottleneck(["attention"], False, 4).wrap(model)
    assert [m.down.in_features for m in wrapped.modules() if type(m).__name__ == "Adapter"] == [96, 96, 64, 64]
    assert wrapped(**architecture.one_token(model)).logits.isfinite().all()


def test_a_soft_prompt_stands_before_what_the_encoder_reads(folder_of):
    """PEFT makes vectors for both parts of the model, and uses one half of them."""
    model = adapted(loaded(folder_of("t5")), "prompt")
    assert model.prompt_encoder["default"].embedding.weight.shape == (5, 64) and model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    lengths: list[int] = []
    model.get_encoder().register_forward_pre_hook(lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True)
    model(**architecture.one_token(model))
    assert lengths == [6]


def test_every_layer_of_the_decoder_has_a_prefix_of_its_own(folder_of):
    """PEFT's way for two parts gives layer i the prefix of layer 2i, around the end."""
    model = adapted(loaded(folder_of("t5")), "prefix")
    cache = model.get_prompt(1)
    assert len(cache.cross_attention_cache) == 0
    held = model.prompt_encoder["default"].embedding.weight.view(5, 2, 2, 4, 16)  # tokens, layers, key or value, heads, e
    for number, layer in enumerate(cache.self_attention_cache.layers):
        torch.testing.assert_close(layer.keys[0].transpose(0, 1), held[:, number, 0])
        torch.testing.assert_close(layer.values[0].transpose(0, 1), held[:, number, 1])


def test_a_prefix_from_text_begins_at_the_decoders_own_keys_and_values(folder_of, overrides):
    model = loaded(folder_of("t5"))
    cfg = compose([*overridden(overrides, folder_of("t5")), "technique=prefix_tuning", "method.text=the film", "method.config.num_virtual_tokens=2"])
    wrapped = build(cfg.method, "method").wrap(model)
    ids = torch.tensor([load_tokenizer(folder_of("t5"))("the film")["input_ids"]])
    with torch.no_grad():
        past = model(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values.self_attention_cache
    for layer, made in zip(past.layers, wrapped.get_prompt(1).self_attention_cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, made.keys)


def test_a_decoder_takes_no_encoder_decoders_adapter(base):
    with pytest.raises(UserError, match="task_type is 'SEQ_2_SEQ_LM', and LlamaForCausalLM is a causal language model: CAUSAL_LM"):
        PeftAdapter(LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules="all-linear")).wrap(copy.deepcopy(base))


@pytest.mark.slow
def test_an_untouched_encoder_decoder_forgot_nothing(folder_of, overrides):
    cfg = compose([*overridden([o for o in overrides if o != "evaluate.forgetting=false"], folder_of("t5")), *SHORT, "technique=lora", "train.steps=0",
                   "evaluate.probe_texts=3", "evaluate.probe_pairs=4", "evaluate.probe_lambada=0", "evaluate.forgetting=true", "precision=fp32"])
    result = cell_run.run(cfg, folder=identity.folder_of(cfg))
    assert (result.forgetting.perplexity, result.forgetting.pairs) == (result.forgetting.perplexity_base, result.forgetting.pairs_base)
    assert "their second halves" in result.forgetting.probes


# commands


REFUSED = ["ladder", "attention_fusion", "grpo", "rloo", "rlhf_grpo", "best_of_n", "reward_model", "on_policy_distillation", "wanda", "full_wanda",
           "low_rank_calibrated", "multitask_prompt", "retrieval_embedding"]


@pytest.mark.parametrize("technique", REFUSED)
def test_what_a_decoder_alone_can_have_is_refused_before_the_model_is_loaded(folder_of, overrides, technique, monkeypatch):
    monkeypatch.setattr("pipeline.cell.inputs.load_model", lambda *_, **__: pytest.fail("loaded"))
    cfg = compose([*overridden(overrides, folder_of("t5")), *SHORT, f"technique={technique}"])
    with pytest.raises(UserError, match=f"^technique={technique} on t5: .*, and the base is an encoder-decoder; choose another technique=<name>") as refused:
        cell_run.run(cfg)
    assert "\n" not in str(refused.value)


def test_preflight_says_so_too(folder_of, overrides):
    cfg = compose([*overridden(overrides, folder_of("t5")), *SHORT, "technique=ladder"])
    (found,) = preflight.findings([cfg], preflight.Shared())
    assert not found.ok and "technique=ladder on t5" in found.said


@pytest.mark.parametrize("technique", ["full", "lora", "prompt_tuning", "prefix_tuning", "step_by_step_prefixed", "adapter_houlsby", "ia3"])
def test_preflight_holds(folder_of, overrides, technique, capsys):
    words = [*overridden(overrides, folder_of("t5-v1_1")), *SHORT, f"technique={technique}", "objective.predict_prefix=film", "objective.explain_prefix=plot"]
    assert check.main(words if "step" in technique else words[:-2]) == 0
    assert "engine: eager" in capsys.readouterr().out


def test_a_fast_engine_that_is_asked_for_says_why_it_is_not_there(folder_of, overrides):
    cfg = compose([*overridden(overrides, folder_of("t5")), *SHORT, "technique=lora", "train.engine=fast"])
    work = cell_run.run(cfg, folder=identity.folder_of(cfg)).work
    assert (work.engine, work.engine_reason) == ("eager", "an encoder reads the prompt")


def test_there_is_no_forecast_and_it_says_so(folder_of, overrides, capsys):
    with pytest.raises(NoForecast, match="no forecast for the architecture t5"):
        read_shape(folder_of("t5") / "config.json")
    assert forecast.main([*overridden(overrides, folder_of("t5")), "technique=lora"]) == 0
    assert "no forecast for the architecture t5" in capsys.readouterr().out


@pytest.mark.parametrize("technique", ["lora", "full", "head_only"])
def test_an_export_answers_as_the_cell_did(folder_of, overrides, technique, tmp_path, capsys):
    from transformers import AutoModelForSeq2SeqLM

    words = [*overridden(overrides, folder_of("t5")), *SHORT, f"technique={technique}", "train.lr=1e-2", "precision=fp32"]
    cfg = compose(words)
    cell_run.run(cfg, folder=identity.folder_of(cfg))
    assert export.main([*words, f"cell={identity.folder_of(cfg)}", f"to={tmp_path}/out"]) == 0
    assert "AutoModelForSeq2SeqLM" in capsys.readouterr().out
    if technique == "lora":
        assert read_json(tmp_path / "out" / "export.json")["merged"]["verdict"] == "kept"
        assert evaluate.main([*words, f"cell={identity.folder_of(cfg)}", "split=merged"]) == 2
        assert "compares how a prompt is continued, and the base of lora-s0" in capsys.readouterr().err
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    encoder, row = encoder_of(model, folder_of("t5")), read_jsonl(Path(cfg.paths.data) / "vader_movies" / "test.jsonl")[0]
    told = next(p for p in read_jsonl(identity.folder_of(cfg) / "predictions.jsonl") if p["split"] == "test" and p["id"] == row["id"])
    assert {c: pytest.approx(naive(model, encoder.prompt(row["prompt"]), encoder.answer(c)), abs=1e-4) for c in row["choices"]} == told["scores"]


@pytest.mark.parametrize("scoring", ["choice", "generate"])
def test_adapters_of_one_base_answer_in_one_batch(folder_of, overrides, scoring):
    artefacts, own = [], {}
    written = ["task.scoring=generate", "+task.max_new_tokens=3"] if scoring == "generate" else []
    for seed in (0, 1):
        cfg = compose([*overridden(overrides, folder_of("t5")), *SHORT, "technique=lora", f"seed={seed}", "train.lr=3e-2", "precision=fp32", *written,
                       "evaluate.adapters=[2]"])
        found = cell_run.run(cfg, folder=identity.folder_of(cfg))
        assert found.unmeasured == {} and found.inference.adapters_mixed
        artefacts.append(Artefact.at(f"s{seed}", identity.folder_of(cfg) / "artefact", cfg))
        own[f"s{seed}"] = {p["id"]: p for p in read_jsonl(identity.folder_of(cfg) / "predictions.jsonl") if p["split"] == "test"}
    rows = read_jsonl(Path(cfg.paths.data) / "vader_movies" / "test.jsonl")[:5]
    served = Multiplexer(Base.of(cfg), artefacts)
    asked = [(f"s{i % 2}", row) for i, row in enumerate(rows)]
    given = served.answer([{"adapter": name, "prompt": row["prompt"], "choices": row["choices"]} for name, row in asked])
    key = "scores" if scoring == "choice" else "output"
    for (name, row), answer in zip(asked, given, strict=True):
        expected = own[name][row["id"]][key]
        assert answer[key] == ({k: pytest.approx(v, abs=1e-4) for k, v in expected.items()} if scoring == "choice" else expected)
    assert served.report == ["5 in one batch of 2 artefacts"]


def test_a_user_of_try_is_told_where_to_go(folder_of):
    with pytest.raises(UserError, match=r"is an encoder-decoder \(t5\), whose time and memory this command cannot plan"):
        check_folder(folder_of("t5"))
