"""What the options of a PEFT config mean here: loss terms, masks and first weights that PEFT leaves to the caller, layers and sizes that a model
decides, and what is refused in one sentence."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from tiny_architectures import write_architecture

from pipeline.core.files import UserError
from pipeline.core.settings import Precision
from pipeline.data.rows import Example
from pipeline.methods.peft_adapter import PeftAdapter
from pipeline.methods.peft_lora import LoftQ
from pipeline.methods.peft_prompts import PrefixTuning
from pipeline.models.base import load_model

ROWS = torch.arange(2, 26).view(2, 12)
COMMON = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def lora(**more: Any) -> PeftAdapter:
    return PeftAdapter(peft.LoraConfig(**COMMON | more))


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ROWS).logits.float()


def stepped(method: PeftAdapter, model: Any, steps: int = 3) -> Any:
    """A wrapped model after some steps of SGD, with the method's hooks around each."""
    model.train()
    method.before_training(model, steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ROWS, labels=ROWS).loss.backward()
        optimizer.step()
        method.after_step(model, step)
    return model


@pytest.fixture(scope="module")
def model_of(tiny, tmp_path_factory) -> Any:
    """A tiny model of an architecture, in fp32; the same object for the same name, so what changes it takes a copy."""
    made: dict[str, Any] = {}

    def load(kind: str, **changes: Any) -> Any:
        name = f"{kind}{changes}"
        if name not in made:
            folder = write_architecture(tmp_path_factory.mktemp(kind) / kind, kind, tiny / "models" / "smollm2_135m", **changes)
            made[name] = load_model(folder, Precision("fp32"), torch.device("cpu"))
        return copy.deepcopy(made[name])

    return load


# layers by kind

IA3 = {
    "llama": {"k_proj", "v_proj", "down_proj"}, "qwen2": {"k_proj", "v_proj", "down_proj"}, "phi3": {"qkv_proj", "down_proj"},
    "olmo2": {"k_proj", "v_proj", "down_proj"}, "starcoder2": {"k_proj", "v_proj", "c_proj"}, "gpt_neox": {"query_key_value", "dense_4h_to_h"},
    "opt": {"k_proj", "v_proj", "fc2"}, "qwen3_moe": {"k_proj", "v_proj"}, "gpt2": {"c_attn", "c_proj"},
}  # fmt: skip
LN = {"phi3": 5, "olmo2": 9, "gpt_neox": 5, "opt": 5, "qwen3_moe": 9, "deepseek_v3": 9, "qwen2": 5}


@pytest.mark.parametrize("kind", IA3)
def test_ia3_finds_keys_values_and_the_feed_forwards_last_layer(model_of, kind):
    model = PeftAdapter(peft.IA3Config(task_type="CAUSAL_LM")).wrap(model_of(kind))
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "ia3_l")}
    assert {name.rpartition(".")[2] for name in layers if not name.endswith("default")} == IA3[kind]
    inner = {name.rpartition(".")[2] for name, m in layers.items() if m.is_feedforward}
    assert inner == IA3[kind] - {"k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"}
    assert not any("attn.c_proj" in name for name in layers)


@pytest.mark.parametrize("kind", LN)
def test_ln_tuning_trains_every_norm(model_of, kind):
    base = model_of(kind)
    norms = {n for n, p in base.named_parameters() if "norm" in n or ".ln_" in n}
    model = PeftAdapter(peft.LNTuningConfig(task_type="CAUSAL_LM")).wrap(base)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len({n.partition("ln_tuning_layers")[0] for n in trained}) == LN[kind] and len(trained) == len(norms)


def test_a_model_without_such_layers_is_refused_by_our_key(model_of):
    with pytest.raises(UserError, match=r"IA3 finds no layers .* MambaForCausalLM; name its modules in method.config.target_modules"):
        PeftAdapter(peft.IA3Config(task_type="CAUSAL_LM")).wrap(model_of("mamba"))


def test_an_adapter_without_modules_for_an_architecture_names_our_key(model_of):
    with pytest.raises(UserError, match="C3A on Olmo2ForCausalLM: .*; name other modules in method.config.target_modules"):
        PeftAdapter(peft.C3AConfig(task_type="CAUSAL_LM", block_size=8)).wrap(model_of("olmo2"))


# prompts


@pytest.mark.parametrize("config", [
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=3072, num_layers=28, num_attention_heads=24),
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=3072, prompt_tuning_init="SAMPLE_VOCAB"),
    peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=3072, encoder_hidden_size=32),
])  # fmt: skip
def test_a_prompt_of_another_models_file_takes_this_models_sizes(base, tmp_path, config):
    method = PeftAdapter(config)
    model = method.wrap(copy.deepcopy(base))
    before = answers(model)
    method.save(model, None, tmp_path)
    assert torch.allclose(answers(method.load(copy.deepcopy(base), tmp_path)[0]), before, atol=1e-5)


@pytest.mark.parametrize(("key", "config"), [
    ("token_indices", peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[3, 128000])),
    ("trainable_token_indices", peft.LoraConfig(**COMMON, trainable_token_indices=[3, 128000])),
    ("trainable_token_indices", peft.LoraConfig(**COMMON, trainable_token_indices={"embed_tokens": [-1]})),
])  # fmt: skip
def test_tokens_beyond_the_vocabulary_are_refused(base, key, config):
    with pytest.raises(UserError, match=rf"method\.config\.{key} names the token (128000|-1), and the model has 31"):
        PeftAdapter(config).wrap(copy.deepcopy(base))


def prefix(tokens: int) -> PrefixTuning:
    return PrefixTuning(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens), text="good bad")


@pytest.mark.parametrize(("kind", "changes"), [
    ("falcon", {}), ("falcon", {"multi_query": False}), ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("gemma3_text", {"sliding_window": 64}),
])  # fmt: skip
def test_a_prefix_has_the_caches_heads(model_of, tmp_path, kind, changes):
    base = model_of(kind, **changes)
    model = prefix(4).wrap(copy.deepcopy(base))
    before = answers(model)
    assert (before - answers(base)).abs().max() > 1e-2
    prefix(4).save(model, None, tmp_path)
    assert torch.allclose(answers(prefix(4).load(base, tmp_path)[0]), before, atol=1e-5)


@pytest.mark.parametrize(("kind", "reason"), [
    ("deepseek_v3", "keys and values of different widths"), ("gemma3_text", "sees 8 tokens back, .* lower method.config.num_virtual_tokens"),
    ("mamba", "keeps no keys and values"),
])  # fmt: skip
def test_a_prefix_that_the_model_cannot_have_is_refused(model_of, kind, reason):
    with pytest.raises(UserError, match=reason):
        prefix(16).wrap(model_of(kind))


# what does not run

def xlora() -> Any:
    return peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, adapters={"0": "none"})


@pytest.mark.parametrize(("make", "reason"), [
    (xlora, "PEFT's XLORA mixes LoRA adapters that are trained already"),
    (lambda: peft.LoraConfig(**COMMON, arrow_config=peft.ArrowConfig()), "arrow_config routes between"),
    (lambda: peft.LoraConfig(**COMMON, use_qalora=True), "use_qalora acts on GPTQ"),
    (lambda: peft.AdamssConfig(use_asa=True, asa_target_subspaces=1), "asa_target_subspaces=1 leaves"),
    (lambda: peft.LoraConfig(**COMMON, init_lora_weights="loftq", loftq_config=peft.LoftQConfig()), "technique=loftq does without"),
])  # fmt: skip
def test_what_does_not_run_is_refused_in_one_sentence(make, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=reason):
        PeftAdapter(make()).check("fp32")


def test_an_adapter_that_cannot_answer_is_refused_before_it_trains(base, monkeypatch):
    """But for LoRA beside linear layers, which answers wherever they do."""
    def broken(self: Any, *args: Any, **more: Any) -> Any:
        raise AttributeError("no such view")

    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "forward", broken)
    monkeypatch.setattr(peft.tuners.lora.layer.Embedding, "forward", broken)
    for more in ({"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}):
        with pytest.raises(UserError, match="this adapter does not fit the model: LORA on LlamaForCausalLM: no such view"):
            lora(**more).wrap(copy.deepcopy(base))
    lora().wrap(copy.deepcopy(base))


def test_the_trial_of_an_adapter_leaves_modes_and_random_numbers(base):
    torch.manual_seed(3)
    plain = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**COMMON, trainable_token_indices=[3]))
    after = torch.rand(1)
    torch.manual_seed(3)
    wrapped = lora(trainable_token_indices=[3]).wrap(copy.deepcopy(base))
    assert torch.equal(torch.rand(1), after)
    assert {n: m.training for n, m in wrapped.named_modules()} == {n: m.training for n, m in plain.named_modules()}


# sharing

SHARING = {
    "together": [{}, {"use_rslora": True}, {"init_lora_weights": "eva"}], "in_turn": [{"use_dora": True}, {"alora_invocation_tokens": [3]}],
    "no": [{"kasa_config": peft.KasaConfig()}, {"init_lora_weights": "lora_ga", "lora_ga_config": peft.LoraGAConfig()}, {"init_lora_weights": "pissa"},
           {"layer_replication": [[0, 2], [1, 2]]}, {"bias": "all"}],
}  # fmt: skip
OPTIONS = [(sharing, options) for sharing, each in SHARING.items() for options in each]


@pytest.mark.parametrize(("sharing", "options"), OPTIONS)
def test_what_changes_the_base_shares_it_with_nothing(base, sharing, options):
    method = lora(**options)
    assert method.sharing == sharing
    if sharing == "no" or "alora_invocation_tokens" in options:
        return
    mine = copy.deepcopy(base)
    before = answers(mine)
    method.wrap(mine).unload()
    assert torch.equal(answers(mine), before)


# loss terms and masks


def test_kasas_terms_are_part_of_the_loss(base):
    torch.manual_seed(0)
    method = lora(kasa_config=peft.KasaConfig(beta=0.3, gamma=0.2))
    model = method.wrap(copy.deepcopy(base)).train()
    assert method.acts_between_steps and method.plans_training
    model(input_ids=ROWS, labels=ROWS).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    model.base_model._get_kasa_loss().backward()
    terms = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    method.before_training(model, 1)
    for _ in range(2):  # the second micro-batch of a step adds none
        model(input_ids=ROWS, labels=ROWS).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, 2 * plain[name] + terms[name], atol=1e-5)
    assert any(t.abs().max() > 1e-3 for t in terms.values())


def test_montecloras_terms_are_part_of_the_loss(base):
    def moved(weight: float) -> torch.Tensor:
        torch.manual_seed(0)
        method = lora(monteclora_config=peft.MontecloraConfig(kl_loss_weight=weight, buffer_size=4))
        model = stepped(method, method.wrap(copy.deepcopy(base)))
        return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "std_prior" in n])

    assert (moved(1e-1) - moved(0.0)).abs().max() > 1e-4


def test_adamss_masks_its_subspaces(base):
    asa = {"use_asa": True, "asa_target_subspaces": 2, "init_warmup": 0, "final_warmup": 4, "mask_interval": 1}
    sizes = {"r": 4, "num_subspaces": 5, "subspace_rank": 1, "svd_threshold": 0.1, "target_modules": ["q_proj", "v_proj"]}
    config = peft.AdamssConfig(task_type="CAUSAL_LM", **sizes, **asa)
    method = PeftAdapter(config)
    model = method.wrap(copy.deepcopy(base))
    before = sum(p.requires_grad for p in model.parameters())
    assert method.acts_between_steps and sum(p.requires_grad for p in stepped(method, model, 5).parameters()) < before


# first weights from training rows

EXAMPLES = [Example(f"Review: good bad good {word} . Sentiment :", answer) for word, answer in [("good", "positive"), ("bad", "negative")] * 8]
FROM_DATA = {
    "eva": {"eva_config": peft.EvaConfig(rho=1.0)}, "lora_ga": {"lora_ga_config": peft.LoraGAConfig()}, "corda": {"corda_config": CordaConfig()},
}  # fmt: skip


@pytest.mark.parametrize("init", FROM_DATA)
def test_lora_begins_at_training_rows_and_is_served_on_the_untouched_base(base, tmp_path, init):
    method = lora(init_lora_weights=init, **FROM_DATA[init])
    assert method.prepares
    own = copy.deepcopy(base)
    method.prepare(EXAMPLES, 0, own)
    torch.manual_seed(0)
    model = method.wrap(own)
    assert torch.allclose(answers(model), answers(base), atol=1e-3)  # what it begins at is taken out of the base
    torch.manual_seed(0)
    plain = lora().wrap(copy.deepcopy(base))
    first = {n: p for n, p in model.named_parameters() if "q_proj.lora_A" in n}
    assert all((p - dict(plain.named_parameters())[n]).abs().max() > 1e-2 for n, p in first.items())
    stepped(method, model)
    before = answers(model)
    method.save(model, None, tmp_path)
    assert torch.equal(answers(model), before)
    assert torch.allclose(answers(method.load(copy.deepcopy(base), tmp_path)[0]), before, atol=1e-3)
    assert (before - answers(base)).abs().max() > 1e-2
    assert torch.allclose(answers(method.merged(model)), before, atol=1e-3)


def test_evas_first_directions_are_those_of_what_goes_in(base):
    method = lora(init_lora_weights="eva", **FROM_DATA["eva"])
    own = copy.deepcopy(base)
    method.prepare(EXAMPLES, 0, own)
    model = method.wrap(own)
    rows = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-3)


def test_loftq_leaves_experts_that_are_not_rounded(tiny, tmp_path):
    folder = write_architecture(tmp_path / "mixtral", "mixtral", tiny / "models" / "smollm2_135m")
    model = load_model(folder, Precision("nf4"), torch.device("cpu"))
    before = answers(model)
    config = peft.LoraConfig(**COMMON | {"target_modules": "all-linear", "r": 16})
    whole = load_model(folder, Precision("fp32"), torch.device("cpu"))
    after = answers(LoftQ(config).wrap(model))
    assert (after - answers(whole)).abs().mean() < (before - answers(whole)).abs().mean()


def test_an_initialisation_from_rows_needs_rows(base):
    method = lora(init_lora_weights="eva", **FROM_DATA["eva"])
    own = copy.deepcopy(base)
    method.prepare([], 0, own)
    with pytest.raises(UserError, match="init_lora_weights=eva begins at training rows; raise train_rows"):
        method.wrap(own)


def test_the_share_of_adapted_weights(model_of):
    everything = PeftAdapter(peft.LoraConfig(**COMMON | {"target_modules": "all-linear"}))
    base = model_of("gpt_oss")
    whole = sum(p.numel() for p in base.model.layers.parameters() if p.ndim > 1)
    attention = sum(p.numel() for n, p in base.model.layers.named_parameters() if "self_attn" in n and p.ndim > 1)
    assert everything.reached_weights(everything.wrap(base)) == attention < whole / 5




@pytest.mark.parametrize("rank", [2, 8])
def test_delora_s_first_step_changes_a_weight_by_a_twentieth_of_it_at_any_rank(model_of, rank):
    """PEFT's 15, set for a width of 3072 and rank 32, was a fifth of a small base's weights: it forgot all it knew in a step."""
    config = peft.DeloraConfig(task_type="CAUSAL_LM", r=rank, delora_lambda=0, target_modules=["q_proj", "up_proj"])
    model = PeftAdapter(config).wrap(copy.deepcopy(model_of("llama")))
    for layer in model.modules():
        if hasattr(layer, "delora_B"):
            layer.delora_B["default"].data.normal_()
            share = float(layer.get_delta_weight("default").norm() / layer.weight.norm())
            assert share == pytest.approx(0.048, rel=0.3)
