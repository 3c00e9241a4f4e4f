"""Adapters, side networks and soft prompts that are written here: what they train, where they begin, what they compute, what they leave."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from architectures import random_model

from pipeline.cell import run as cell_run
from pipeline.core.compose import build, compose
from pipeline.core.files import UserError, read_jsonl
from pipeline.core.settings import Precision
from pipeline.data.rows import Batch, Example
from pipeline.engine.bind import bind
from pipeline.engine.parts import Unsupported
from pipeline.models.base import load_model, parameters
from pipeline.serving import artefact as evaluate

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
D, LAYERS, INNER, KV = 64, 2, 128, 32  # conftest's tiny Llama
LABELS = [Example("Review: fine plot", "positive"), Example("Review: poor plot", "negative")]


@pytest.fixture(scope="module")
def load(tiny):
    """Gives a fresh tiny Llama."""
    held = load_model(tiny / "models" / "smollm2_135m", Precision("fp32"), CPU)
    return lambda: copy.deepcopy(held)


def gpt2() -> Any:
    """Another architecture: transposed linear layers with biases, learnt positions, one matrix for queries, keys and values."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=31, n_positions=32, bos_token_id=None, eos_token_id=1, attn_implementation="sdpa")
    return GPT2LMHeadModel(config).requires_grad_(False).eval()


@functools.cache
def method(name: str, *overrides: str) -> Any:
    return build(compose([f"technique={name}", *overrides]).method, "method")


def wrapped(name: str, model: Any, *overrides: str) -> Any:
    made = method(name, *overrides)
    torch.manual_seed(0)
    made.prepare(LABELS, 0, model)
    return made.wrap(model)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits.float()


def shaken(model: Any, size: float = 0.05) -> Any:
    """The model as if it had learnt something."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn_like(parameter)
    return model


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative error; soft tokens before the input are left out."""
    width = IDS.shape[1]
    return float((one[:, -width:] - other[:, -width:]).norm() / other[:, -width:].norm())


def side(w: int, reduction: int) -> int:
    """Parameters of the narrow Llama, of the ways down and up, and of the gates."""
    kv, inner = KV // reduction, INNER // reduction
    block = 2 * w * w + 2 * w * kv + 3 * w * inner + 2 * w
    return LAYERS * block + w + (LAYERS + 1) * D * w + w * D + LAYERS


TRAINED = {
    "adapter_houlsby": (["method.width=6"], LAYERS * 2 * (2 * 6 * D + 6 + D)),
    "adapter_pfeiffer": (["method.width=6"], LAYERS * (2 * 6 * D + 6 + D)),
    "adapter_parallel": (["method.width=6"], LAYERS * (2 * 6 * D + 6 + D)),
    "compacter": (["method.width=8"], LAYERS * 2 * (2 * (8 + D) + 8 + D) + 4**3),
    "adamix": (["method.width=6", "method.experts=3"], LAYERS * 2 * (3 * (6 * D + 6) + 6 * D + D)),
    "ladder": (["method.reduction=4"], side(16, 4)),
    "attention_fusion": ([], D + LAYERS + 2 * D),
    "ipt": (["method.dimensions=7"], 7),
    "warp": (["method.virtual_tokens=5"], 5 * D + 2 * D),
    "boft": ([], LAYERS * (4 * D + D + 4 * D + KV)),
}


@pytest.mark.parametrize("name", [n if n != "boft" else pytest.param(n, marks=pytest.mark.slow) for n in TRAINED])
def test_the_trainable_parameters_are_the_formula_s(load, name):
    overrides, expected = TRAINED[name]
    model = wrapped(name, load(), *overrides)
    assert parameters(model)[0] == expected
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


ON_BOTH = ["adapter_houlsby", "adapter_pfeiffer", "adapter_parallel", "compacter", "adamix", "ladder"]


@pytest.mark.parametrize("name", ON_BOTH)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_training_begins_at_the_base_and_can_leave_it(load, name, base):
    make = load if base == "llama" else gpt2
    model = wrapped(name, make(), *(["method.reduction=4"] if name == "ladder" else []))
    assert apart(logits(model), logits(make())) < 1e-6
    assert apart(logits(shaken(model)), logits(make())) > 1e-3


OTHERS = [  # (technique, architecture, keys of its config)
    *(("ladder", name, {}) for name in ("opt", "falcon", "deepseek_v3", "mamba", "gpt_oss", "gemma2")),
    ("ladder", "opt", {"word_embed_proj_dim": 32}), ("attention_fusion", "opt", {}), ("attention_fusion", "mamba", {}),
    *(("adapter_houlsby", name, {}) for name in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")), ("adapter_parallel", "mixtral", {}),
]


@pytest.mark.parametrize(("name", "architecture", "keys"), OTHERS)
def test_in_other_architectures_too_training_begins_at_the_base_and_moves_all_that_is_trained(name, architecture, keys):
    """Decoders that are called past model.base_model, heads of several widths, no attention, experts that are no linear layers."""
    base = random_model(architecture, **keys).requires_grad_(False)
    before = logits(base)
    more = {"ladder": ["method.reduction=4"], "attention_fusion": ["method.begin=12"]}.get(name, [])
    torch.manual_seed(0)
    model = method(name, *more).wrap(base)
    assert apart(logits(model), before) < 1e-4
    assert apart(logits(shaken(model, 10.0 if name == "attention_fusion" else 0.05)), before) > 1e-3
    model.train()(input_ids=IDS).logits.square().mean().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values()), [n for n, p in trained.items() if p.grad is None]


@pytest.mark.parametrize("architecture", ["opt", "mamba", "deepseek_v3", "gemma2"])
def test_a_ladder_s_cache_gives_the_texts_of_no_cache_in_other_architectures(architecture):
    model = shaken(wrapped("ladder", random_model(architecture).requires_grad_(False), "method.reduction=4"), 0.3).eval()
    texts = [model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=1,
                            eos_token_id=None) for cached in (True, False)]
    assert torch.equal(*texts)


FAST = ("compacter", "adamix", "ladder", "ipt", "warp")
"""One of every code path."""


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in [*ON_BOTH, "attention_fusion", "ipt", "warp"]])
def test_what_is_saved_gives_the_same_answers(load, tmp_path, name):
    made, more = method(name, *(["method.reduction=4"] if name == "ladder" else [])), ["method.reduction=4"] if name == "ladder" else []
    model = made.served(shaken(wrapped(name, load(), *more)), torch.float32)
    made.save(model, None, tmp_path)
    again = made.load(load(), tmp_path)[0]
    assert torch.equal(logits(again), logits(model)) and apart(logits(model), logits(load())) > 1e-3


# what single techniques compute


def test_a_hypercomplex_layer_is_the_sum_of_kronecker_products():
    from pipeline.methods.modules.adapters import Hypercomplex

    torch.manual_seed(0)
    layer = Hypercomplex(torch.nn.Parameter(torch.randn(4, 4, 4)), 12, 8, rank=2)
    expected = sum(torch.kron(layer.rule[i], layer.left[i] @ layer.right[i]) for i in range(4))
    assert torch.allclose(layer.weight, expected, atol=1e-5) and layer.weight.shape == (8, 12)


def test_compacter_shares_its_rule_among_all_layers(load, tmp_path):
    from safetensors.torch import load_file

    made, model = method("compacter"), wrapped("compacter", load())
    rules = {id(m.rule) for m in model.modules() if hasattr(m, "rule")}
    made.save(model, None, tmp_path)
    assert len(rules) == 1 and sum("rule" in name for name in load_file(tmp_path / "adapter.safetensors")) == 1


def test_adamix_draws_in_training_and_serves_the_average(load, tmp_path):
    made, model = method("adamix"), shaken(wrapped("adamix", load()), 0.2)
    torch.manual_seed(0)
    drawn = [model.train()(input_ids=IDS).logits.detach() for _ in range(6)]
    assert len({round(float(x.sum()), 4) for x in drawn}) > 1
    average = logits(model)
    served = made.served(model, torch.float32)
    assert apart(logits(served), average) < 1e-6 and not any(hasattr(m, "collapsed") for m in served.modules())
    made.save(served, None, tmp_path)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 4 * LAYERS * 2 * (2 * 16 * D + 16 + D) + 4096, "one adapter is stored"


def test_the_mean_of_experts_is_their_average_s_adapter():
    from pipeline.methods.modules.adapters import Experts, dense

    torch.manual_seed(0)
    layers = [dense(3, 2) for _ in range(4)]
    experts = Experts(layers).eval()
    x = torch.randn(5, 3)
    assert torch.allclose(experts(x), sum(layer(x) for layer in layers) / 4, atol=1e-6)
    one = experts.train()(x)
    assert any(torch.allclose(one, layer(x), atol=1e-6) for layer in layers)


class Fake(torch.nn.Module):
    """Answers with one table of logits after the other."""

    def __init__(self, *tables: torch.Tensor) -> None:
        super().__init__()
        self.tables, self.head = list(tables), torch.nn.Identity()

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"logits": self.head(self.tables.pop(0)[None])})


def test_the_consistency_loss_is_the_paper_s():
    a, b = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.0, 1.0, 3.0]])
    one, other = a.log_softmax(-1)[0], b.log_softmax(-1)[0]
    batch = Batch(torch.zeros(1, 1, dtype=torch.long), torch.tensor([0]), torch.tensor([0]), torch.tensor([1]), torch.tensor([2.0]), 1)
    apart_by = (one.exp() * (one - other)).sum() + (other.exp() * (other - one)).sum()
    loss = build(compose(["technique=adamix", "objective.consistency_weight=3"]).objective, "objective").loss(Fake(a, b), batch)
    assert float(loss) == pytest.approx(float(2 * (-one[1] + 3 * apart_by / 2)), rel=1e-5)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_nothing_goes_back_through_the_base_of_a_ladder(load, base):
    model = shaken(wrapped("ladder", load() if base == "llama" else gpt2(), "method.reduction=4"))
    model.requires_grad_(True).train()
    model(input_ids=IDS).logits.square().sum().backward()
    inside = {name: p.grad for name, p in model.named_parameters() if ".beside." not in name and "layers" in name + name.replace(".h.", ".layers.")}
    assert inside and all(grad is None for grad in inside.values())
    beside = {name: p.grad for name, p in model.named_parameters() if ".beside." in name}
    assert all(grad is not None and float(grad.abs().sum()) > 0 for grad in beside.values())


def test_a_ladder_s_cache_gives_the_texts_of_no_cache(load):
    model = shaken(wrapped("ladder", load(), "method.reduction=4"), 0.3).eval()
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])  # padded on the left
    texts = [model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=1, eos_token_id=None)
             for cached in (True, False)]
    assert torch.equal(*texts)


def test_attention_fusion_at_a_high_begin_is_the_base_and_reads_lower_layers_at_a_low_one(load):
    base = logits(load())
    assert apart(logits(wrapped("attention_fusion", load(), "method.begin=30")), base) < 1e-4
    mixed = wrapped("attention_fusion", load(), "method.begin=0").eval()
    with torch.inference_mode():
        states = mixed(input_ids=IDS, output_hidden_states=True)
        plain = load()(input_ids=IDS, output_hidden_states=True).hidden_states
        expected = mixed.get_output_embeddings()((mixed.model.norm(plain[1]) + plain[2]) / 2)
    assert apart(states.logits, expected) < 1e-4


def test_only_the_answers_rows_change_with_warp(load):
    model = wrapped("warp", load())
    before = logits(model)
    from pipeline.methods.modules import answers

    rows = answers.of(model)
    rows.rows.data += 1.0
    changed = (logits(model) - before).abs().amax((0, 1)) > 1e-6
    assert set(changed.nonzero()[:, 0].tolist()) == set(rows.ids.tolist()) and len(rows.ids) == 2


def test_ipt_moves_the_prompt_in_its_subspace_alone(load):
    model = wrapped("ipt", load(), "method.dimensions=3")
    encoder = model.prompt_encoder["default"]
    before = encoder.prompt().clone()
    encoder.z.data = torch.tensor([1.0, -2.0, 0.5])
    assert torch.allclose(encoder.prompt() - before, torch.einsum("n,nkd->kd", encoder.z, encoder.basis), atol=1e-6)
    moved = encoder.prompt().detach()
    served = method("ipt", "method.dimensions=3").served(model, torch.float32)
    assert torch.equal(served.prompt_encoder["default"].embedding.weight, moved)


def test_the_subspace_of_trained_prompts_holds_them():
    from pipeline.methods.modules.prompts import fitted_basis

    torch.manual_seed(0)
    prompts = [torch.randn(4, 5) for _ in range(4)]
    mean, basis = fitted_basis(3, prompts)
    rest = (prompts[0] - mean).flatten()
    z = torch.linalg.lstsq(basis.flatten(1).T, rest[:, None]).solution[:, 0]
    assert torch.allclose(torch.tensordot(z, basis, 1).flatten(), rest, atol=1e-5)


# the fast engine, and what does not go together


@pytest.mark.parametrize(("name", "reason"), [
    ("adapter_houlsby", "self_attn does more than its class says"), ("ladder", "module model does more than its class says"),
    ("ipt", "does not train prompt_encoder.default.embedding.weight"), ("warp", "lm_head does more than its class says"),
])
def test_the_hand_written_step_refuses_by_name(load, name, reason):
    with pytest.raises(Unsupported, match=reason):
        bind(wrapped(name, load(), *(["method.reduction=4"] if name == "ladder" else [])), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ladder", "compacter", "adapter_parallel", "warp", "ipt"])
def test_the_fast_engine_s_autograd_takes_the_eager_engine_s_steps(overrides, name):
    more = ["method.reduction=4"] if name == "ladder" else []
    losses = []
    for engine in ("eager", "fast"):
        short = ["train.steps=4", "train.batch_size=8", "train.validations=0", f"train.engine={engine}"]
        losses.append([h["loss"] for h in cell_run.run(compose([*overrides, f"technique={name}", *short, *more])).history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 4


@pytest.mark.parametrize(("name", "override", "message"), [
    ("adapter_houlsby", "method.places=[mlp]", r"method.places is \['mlp'\]; name one or more of attention, feed_forward, block"),
    ("adapter_houlsby", "method.width=0", "method.width is 0; it must be a whole number"),
    ("adapter_houlsby", "method.activation=swish", "method.activation is 'swish'; choose one of relu"),
    ("compacter", "method.width=6", "method.width=6 is no multiple of method.n=4"),
    ("adamix", "method.experts=1", "method.experts is 1; it must be a whole number of at least 2"),
    ("adamix", "method.shared=both", "method.shared is 'both'; choose down, up or null"),
    ("adamix", "objective.consistency_weight=-1", None),
    ("ladder", "method.reduction=1", "method.reduction is 1; it must be a whole number of at least 2"),
    ("ipt", "method.dimensions=0", "method.dimensions is 0"),
    ("ipt", "method.prompts=[a,b]", "2 prompts span at most 1 dimensions, and method.dimensions is 100; lower it"),
    ("warp", "method.virtual_tokens=0", "method.virtual_tokens is 0"),
])
def test_a_bad_value_is_named_before_a_model_is_loaded(name, override, message):
    if message is None:
        with pytest.raises(UserError, match="'objective.consistency_weight' is -1.0; it must be at least 0"):
            build(compose([f"technique={name}", override]).objective, "objective")
    else:
        with pytest.raises(UserError, match=message):
            method(name, override)


def test_a_model_that_a_technique_cannot_apply_to_is_told(load, tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    opt = OPTForCausalLM(OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, vocab_size=31, word_embed_proj_dim=16))
    with pytest.raises(UserError, match="OPTDecoderLayer has no module that is its feed_forward .*it has self_attn, .*fc1, fc2.*technique=lora"):
        wrapped("adapter_houlsby", opt)
    assert not opt.model.decoder.layers[0].self_attn._forward_hooks, "nothing was changed before"
    with pytest.raises(UserError, match="the model's width 64 is no multiple of method.n=3"):
        wrapped("compacter", load(), "method.n=3")
    with pytest.raises(UserError, match="the model's width 64 cannot be divided by method.reduction=64 into heads"):
        wrapped("ladder", load(), "method.reduction=64")
    with pytest.raises(UserError, match=r"holds no soft prompt; name finished cells of prompt_tuning"):
        wrapped("ipt", load(), f"method.prompts=[{tmp_path}/a,{tmp_path}/b]", "method.dimensions=1")
    many = [Example("x", " ".join(f"w{i}" for i in range(300)))]
    from pipeline.methods.modules import answers

    monkey = type("Tokens", (), {"__call__": lambda self, text, add_special_tokens: {"input_ids": list(range(len(text.split())))}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "load_tokenizer", lambda folder: monkey())
        with pytest.raises(UserError, match="WARP learns a vector for each token of the labels, and the training rows' answers have 300"):
            method("warp").prepare(many, 0, load())


def test_adapters_go_over_a_quantised_base(tiny):
    model = shaken(wrapped("adapter_houlsby", load_model(tiny / "models" / "smollm2_135m", Precision("nf4"), CPU)))
    model.train()(input_ids=IDS).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


LEARNT = {
    "adapter_houlsby": ["train.lr=1e-2"],
    "adapter_pfeiffer": ["train.lr=1e-2", "train.epochs=20", "method.activation=gelu", "train.weight_decay=0.1"],
    "adapter_parallel": ["train.lr=3e-3"],
    "compacter": ["train.lr=3e-2"],
    "adamix": ["train.lr=1e-2", "train.epochs=20"],
    "ladder": ["train.lr=1e-2", "method.reduction=4"],
    "ipt": ["train.lr=0.3", "train.epochs=30", "method.dimensions=512"],
    "warp": ["train.lr=3e-2", "train.epochs=30"],
    "boft": ["train.lr=3e-2", "train.epochs=20"],
}


@pytest.mark.parametrize("name", [n if n == "adapter_parallel" else pytest.param(n, marks=pytest.mark.slow) for n in LEARNT])
def test_the_separable_task_is_learnt_and_the_artefact_answers_alike(overrides, tmp_path, name):
    cfg = compose([*overrides, f"technique={name}", "train.epochs=12", "train.batch_size=8", "train.validations=3", *LEARNT[name]])
    result = cell_run.run(cfg, folder=tmp_path / "cell")
    assert result.test.accuracy >= 0.95, result.history[-3:]
    held = [p for p in read_jsonl(tmp_path / "cell" / "predictions.jsonl") if p["split"] == "test"]
    found, _ = evaluate.score_artefact(cfg, tmp_path / "cell" / "artefact", "test")
    for one, other in zip(found, held, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)


@pytest.mark.slow
def test_attention_fusion_learns_what_a_random_transformer_s_layers_show(overrides, tmp_path):
    """A query and two output rows over random features: the loss falls, 95% is not to be had."""
    base = cell_run.run(compose([*overrides, "technique=zero_shot"]))
    result = cell_run.run(compose([*overrides, "technique=attention_fusion", "train.lr=0.1", "train.epochs=30", "train.batch_size=8", "train.validations=3"]))
    assert result.test.nll < 0.3 * base.test.nll and result.test.accuracy_low > 0.5
