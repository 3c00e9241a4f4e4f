"""PEFT's further tuners, by name: none is missing, each trains what its formula says, begins where its paper says, survives storing and merging, and
learns; what is computed here (LoRA-FA's and Riemannian LoRA's gradients, the tokens of aLoRA, CPT and trainable tokens) against PEFT and by hand."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.optimizers import create_lorafa_optimizer
from peft.optimizers.riemannian import create_riemannian_optimizer
from test_techniques import HIDDEN, INNER, KV, LAYERS, LINEAR
from tiny_architectures import write_architecture

from benchmarks.rates_tuners import MIDDLE
from pipeline.cell import run as cell_run
from pipeline.core.compose import CONF, ROOT, build, compose
from pipeline.core.files import UserError, read_jsonl
from pipeline.core.settings import Precision
from pipeline.data.rows import Example
from pipeline.methods import peft_options, peft_start
from pipeline.models.base import load_model, load_tokenizer, parameters
from pipeline.serving import artefact as serving

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
ROWS = [Example(f"Review: {word} film\nSentiment:", answer) for word, answer in [("fine", "positive"), ("poor", "negative")] * 8]
PAIRS = sum(8 * (i + o) for i, o in LINEAR)
"""Numbers of LoRA of rank 8 beside every linear layer of conftest's Llama."""
SMALL = {
    "c3a": ["method.config.block_size=16"], "road": ["method.config.group_size=16"], "vblora": ["method.config.vector_length=16"],
    "velora": ["method.config.velora_config.num_groups=16"],
}  # fmt: skip
"""Sizes that divide 64, 32 and 128."""
TRAINED: dict[str, int | None] = {
    "adamss": None, "adaption_prompt": LAYERS * (10 * HIDDEN + 1), "beft": LAYERS * KV, "c3a": sum(i * o // 16 for i, o in LINEAR), "deft": PAIRS,
    "delora": PAIRS + len(LINEAR), "fourierft": 1000 * len(LINEAR), "frod": None, "glora": 2 * PAIRS, "gralora": PAIRS, "hira": PAIRS,
    "hra": LAYERS * 2 * 8 * HIDDEN, "lily": None, "miss": sum(8 * o for _, o in LINEAR), "osf": None, "peanut": sum(2 * 8 * o for _, o in LINEAR),
    "poly": 4 * PAIRS + 4 * len(LINEAR), "psoft": len(LINEAR) * (32 * 31 // 2 + 2 * 32), "pvera": sum(2 * 256 + o for _, o in LINEAR), "randlora": None,
    "road": sum(o for _, o in LINEAR), "shadow": None, "shira": PAIRS, "supertuning": sum(i * o // 100 for i, o in LINEAR), "tinylora": 64 * len(LINEAR),
    "trainable_tokens": 2 * HIDDEN, "unilora": 16384, "vblora": 256 * 16 + sum(4 * 256 * (i + o) // 16 for i, o in LINEAR),
    "waveft": 1000 * len(LINEAR), "cartridge": 15 * LAYERS * 2 * KV, "cpt": None, "eva": PAIRS, "corda": PAIRS, "lora_ga": PAIRS, "alora": PAIRS,
    "bdlora": LAYERS * 8 * (5 * HIDDEN + (2 * HIDDEN + 2 * INNER + 2 * KV - HIDDEN) // 2 + (HIDDEN + INNER) // 2 + 2 * HIDDEN), "kasa": PAIRS + 8 * len(LINEAR),
    "mica": sum(8 * i for i, _ in LINEAR), "monteclora": None, "velora": PAIRS, "lora_fa": sum(8 * o for _, o in LINEAR), "lora_riemannian": PAIRS,
}  # fmt: skip
"""What each trains of the tiny Llama; None: no formula in one line (clusters, sparse supports, shared matrices)."""
ELSEWHERE_START = {"c3a": 0.06, "unilora": 0.03, "vblora": 0.03}
"""Those that begin at small random numbers -> how far from the base's answers at most (relative)."""
OWN_START = ("cartridge", "cpt", "kasa")
"""Those that begin at a text, at rows, or on a base without its smallest directions."""
UNMERGED = ("adaption_prompt", "beft", "lily", "poly", "shadow", "cartridge", "cpt", "alora")


def method(name: str, *overrides: str) -> Any:
    return build(compose([f"technique={name}", *SMALL.get(name, []), *overrides]).method, "method")


def wrapped(name: str, base: Any, *overrides: str) -> tuple[Any, Any]:
    """(method, model) over a copy of the base, as a cell makes it."""
    made, own = method(name, *overrides), copy.deepcopy(base)
    made.check("fp32")
    if made.prepares:
        made.prepare(ROWS, 0, own)
    torch.manual_seed(0)
    return made, made.wrap(own)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()[:, -ids.shape[1] :]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative error."""
    return float((one - other).norm() / other.norm())


def moved(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def types_of_conf() -> dict[str, str]:
    """Technique -> the peft_type of its method's config."""
    names = {config.__name__: str(getattr(kind, "value", kind)) for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    methods = {path.stem: yaml.safe_load(path.read_text()) for path in (CONF / "method").glob("*.yaml")}
    found = {}
    for path in (CONF / "technique").glob("*.yaml"):
        chosen = next(line["override /method"] for line in yaml.safe_load(path.read_text())["defaults"] if "override /method" in line)
        while isinstance(chosen, str) and "type" not in methods[chosen].get("config", {}):
            chosen = next((word for word in methods[chosen].get("defaults", ()) if word != "_self_"), None)
        if chosen:
            found[path.stem] = names[methods[chosen]["config"]["type"]]
    return found


def test_every_tuner_of_the_installed_peft_is_a_technique_or_is_refused_by_name():
    there, known = {*types_of_conf().values()}, {str(kind.value) for kind in peft.PeftType}
    missing = known - there - {*peft_options.ELSEWHERE}
    assert not missing, f"PEFT has {sorted(missing)}: write conf/technique/<name>.yaml and conf/method/<name>.yaml, and a row of docs/techniques.md"
    assert not there & {*peft_options.ELSEWHERE}


def test_the_new_ones_have_a_middle_for_the_grid_of_their_rates_and_a_row_in_the_experiments():
    """Where a default is still untuned, the grid that is to decide has it in its reach."""
    assert {*MIDDLE} == {*TRAINED}
    for name, middle in MIDDLE.items():
        train = yaml.safe_load((CONF / "technique" / f"{name}.yaml").read_text())["train"]
        assert middle / 10 <= (train.get("lr") or train["reference_lr"]) <= middle * 10, name
    for experiment, left in (("tuners", set()), ("tuners_qwen2_0_5b", {"adaption_prompt", "trainable_tokens"})):
        grid = yaml.safe_load((ROOT / f"experiments/{experiment}/params.yaml").read_text())["grid"]["techniques"]
        assert {*grid} >= {*TRAINED} - left


@pytest.mark.parametrize("name", TRAINED)
def test_a_tuner_trains_its_formula_begins_at_its_base_and_survives_storing_and_merging(base, tmp_path, name):
    made, model = wrapped(name, base)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    if TRAINED[name] is not None:
        assert parameters(model)[0] == TRAINED[name]
    start = apart(logits(model), logits(base))
    assert start > 0.1 if name in OWN_START else start < ELSEWHERE_START.get(name, 2e-6)
    model.train()(input_ids=IDS).logits.square().mean().backward()
    assert all(p.grad is not None for p in trained)
    before, cue = logits(model), ROWS_IDS if name == "alora" else IDS
    after = logits(moved(model), cue)
    assert apart(after, before if name != "alora" else logits(base, cue)) > 1e-3, "what is trained must reach the answers"
    made.save(model, None, tmp_path)
    assert apart(logits(made.load(copy.deepcopy(base), tmp_path)[0], cue), after) < 1e-5
    assert made.merges == (name not in UNMERGED)
    if made.merges:
        merged = made.merged(model)
        assert apart(logits(merged, cue), after) < 1e-4 and not hasattr(merged, "peft_config")


ROWS_IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module", autouse=True)
def rows_ids(tiny) -> None:
    """Tokens of two rows of ROWS, of one length."""
    global ROWS_IDS
    tokenizer = load_tokenizer(tiny / "models" / "smollm2_135m")
    ROWS_IDS = torch.tensor([tokenizer(row.prompt)["input_ids"] for row in ROWS[:2]])


LEARNT = {
    "adamss": ["train.lr=1.5e-2"], "c3a": [], "deft": ["train.lr=5e-3"], "delora": [], "fourierft": ["train.lr=3e-2"], "glora": ["train.lr=5e-3"],
    "gralora": [], "hira": [], "hra": ["train.lr=1e-2"], "lily": [], "miss": ["train.lr=3e-3"], "osf": ["train.lr=5e-4"], "peanut": ["train.lr=5e-3"],
    "poly": [], "psoft": [], "pvera": ["train.lr=3e-2"], "randlora": ["train.lr=1e-3"], "road": ["train.lr=3e-2"], "shadow": ["train.lr=3e-3"], "shira": [],
    "unilora": ["train.lr=1.5e-2"], "vblora": ["train.lr=1e-2"], "waveft": [], "cartridge": ["train.lr=3e-2", "train.epochs=40"],
    "cpt": ["train.lr=0.1", "train.epochs=30", "method.epsilon=20", "method.format_epsilon=20"], "eva": [], "corda": ["train.lr=5e-3"],
    "lora_ga": ["train.lr=5e-3"], "alora": [], "bdlora": [], "kasa": [], "mica": ["train.lr=3e-3"], "monteclora": [], "velora": [],
    "lora_fa": ["train.lr=5e-3"], "lora_riemannian": [],
}  # fmt: skip
LESS = {"adaption_prompt": ["train.lr=3e-2", "train.epochs=30"], "beft": ["train.lr=3e-2", "train.epochs=20"], "frod": ["train.lr=1e-2", "train.epochs=20"],
        "supertuning": ["train.lr=1e-2", "train.epochs=20"], "tinylora": ["train.lr=3e-2", "train.epochs=20"],
        "trainable_tokens": ["train.lr=0.1", "train.epochs=20"]}  # fmt: skip
"""Those with so few numbers of a model of width 64 that they fit some training rows and do not reach 95% of others."""
FAST = ("lora_fa",)
"""Of the code that is written here; the others are slow tests."""


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in (*LEARNT, *LESS)])
def test_the_separable_task_is_learnt_and_the_artefact_answers_alike(overrides, tmp_path, name):
    settings = ["train.epochs=12", "train.batch_size=8", "train.validations=3", *(LEARNT | LESS)[name], *SMALL.get(name, [])]
    cfg = compose([*overrides, f"technique={name}", *settings])
    result = cell_run.run(cfg, folder=tmp_path / "cell")
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert losses[-1] < 0.5 * losses[0] and (name in LESS or result.test.accuracy >= 0.95), result.history[-3:]
    stored = [p for p in read_jsonl(tmp_path / "cell" / "predictions.jsonl") if p["split"] == "test"]
    for one, other in zip(serving.score_artefact(cfg, tmp_path / "cell" / "artefact", "test")[0], stored, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)


@pytest.mark.slow
def test_what_is_made_of_training_rows_before_the_first_step_is_training_time(overrides, tmp_path, monkeypatch):
    """EVA took 47 s to find its directions on a GPU, and was said to cost least."""
    attached, seconds = peft_start.attached, 1.5

    def slowly(*given: Any) -> Any:
        time.sleep(seconds)
        return attached(*given)

    monkeypatch.setattr(peft_start, "attached", slowly)
    result = cell_run.run(compose([*overrides, "technique=eva", "train_rows=16", "train.steps=2"]), folder=tmp_path / "cell")
    assert result.phases.train_s >= seconds


# gradients that are corrected


def steps(model: Any, optimizer: Any, seen: list[torch.Tensor]) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        seen.append(torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_B" in n or "lora_A" in n]))


PEFTS: dict[str, Callable[[Any], Any]] = {
    "lora_fa": lambda model: create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-2),
    "lora_riemannian": lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-2, reg=1e-2, weight_decay=0.0, eps=1e-12),
}


@pytest.mark.parametrize("name", PEFTS)
def test_a_corrected_gradient_steps_as_pefts_own_optimizer(base, monkeypatch, name):
    """Adam over our corrected gradients is PEFT's optimiser, whose product in bf16 is taken in fp32 here."""
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    _, ours = wrapped(name, base)
    _, plain = wrapped("lora", base)
    theirs: list[torch.Tensor] = []
    mine: list[torch.Tensor] = []
    optimizer = PEFTS[name](plain)
    optimizer.param_groups[0]["eps"] = 1e-12  # the two add it in different places
    steps(plain, optimizer, theirs)
    steps(ours, torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0, eps=1e-12), mine)
    assert all((one - other).abs().max() < 1e-4 for one, other in zip(mine, theirs, strict=True))
    _, uncorrected = wrapped("lora", base)
    without: list[torch.Tensor] = []
    steps(uncorrected, torch.optim.AdamW([p for n, p in uncorrected.named_parameters() if "lora_B" in n or ("lora_A" in n and name != "lora_fa")], lr=1e-2,
                                         weight_decay=0.0, eps=1e-12), without)
    assert (without[-1] - mine[-1]).abs().max() > 1e-3


def test_what_corrects_gradients_is_not_trained_by_hand_or_in_a_pack(overrides, tmp_path):
    from pipeline.cell import inputs
    from pipeline.cell.packing import Packing
    from pipeline.engine.parts import Unsupported

    cfg = compose([*overrides, "technique=lora_fa", "train.engine=fast", "train.steps=2", "train.batch_size=4", "train.validations=0", "train_rows=8"])
    assert cell_run.run(cfg, folder=tmp_path / "cell").work.engine == "captured"
    with pytest.raises(Unsupported, match="LoraFa corrects its gradients"):
        Packing([cfg], inputs.Shared())


# tokens that are read off the rows


def test_alora_reads_what_stands_before_its_words_as_the_base_does(base):
    """The words that every prompt ends with are "film", "Sentiment" and ":"; from them on the adapter acts."""
    _, model = wrapped("alora", base)
    own, plain = logits(moved(model), ROWS_IDS), logits(base, ROWS_IDS)
    assert torch.equal(own[:, :-3], plain[:, :-3]) and (own[:, -3:] - plain[:, -3:]).abs().max() > 1e-2
    words = model.peft_config["default"].alora_invocation_tokens
    assert words == ROWS_IDS[0, -len(words) :].tolist() and len(words) == 3


def test_alora_says_what_is_wrong_where_prompts_end_differently(base):
    made, own = method("alora"), copy.deepcopy(base)
    made.prepare([Example("a fine film", "positive"), Example("a poor plot", "negative")], 0, own)
    with pytest.raises(UserError, match="these end differently; name the words' tokens in method.config.alora_invocation_tokens"):
        made.wrap(own)
    _, named = wrapped("alora", base, "method.config.alora_invocation_tokens=[5]")
    assert named.peft_config["default"].alora_invocation_tokens == [5]


def test_trainable_tokens_are_those_of_the_answers(base):
    _, model = wrapped("trainable_tokens", base)
    tokens = load_tokenizer(Path(base.config._name_or_path))(" positive negative", add_special_tokens=False)["input_ids"]
    assert sorted(model.peft_config["default"].token_indices) == sorted(tokens)
    _, one = wrapped("trainable_tokens", base, "method.most_tokens=1")
    assert parameters(one)[0] == HIDDEN


def test_cpt_stands_its_rows_before_the_prompt_and_moves_no_farther_than_epsilon(base):
    """At its start it is the base after the rows' text; however far a step goes, a prompt's token is within epsilon and an answer's stays."""
    made, model = wrapped("cpt", base)
    tokenizer = load_tokenizer(Path(base.config._name_or_path))
    text = "".join(f"{row.prompt} {row.answer}\n\n" for row in ROWS[:4])
    before = torch.tensor([tokenizer(text)["input_ids"]] * 2)
    assert apart(logits(model), logits(base, torch.cat((before, IDS), 1))[:, -IDS.shape[1] :]) < 1e-5
    delta = model.prompt_encoder["default"].delta_embedding.weight
    optimizer = torch.optim.SGD([delta], lr=1e3)
    for _ in range(2):
        model.train()(input_ids=IDS).logits.square().mean().backward()
        optimizer.step()
    logits(model)
    far = model.prompt_encoder["default"].delta_embedding.weight.detach().norm(dim=1)
    answers = torch.tensor([kind % 4 == 0 for kind in model.peft_config["default"].cpt_tokens_type_mask])
    bound = made.epsilon * (HIDDEN / 2048) ** 0.5
    assert far.max() <= bound * 1.001 and far.max() > bound * 0.9 and torch.equal(far[answers], torch.zeros(int(answers.sum())))


@pytest.mark.parametrize(("words", "reason"), [(["method.k=17"], "method.k=17, but there are 16 training rows"), (["method.k=0"], "takes at least one row"),
                                               (["method.k=16"], "more than half of the model's context; lower method.k")])
def test_rows_that_cannot_stand_before_a_prompt_are_refused(base, words, reason):
    long = [Example(" ".join(["film"] * 20), "positive")] * 16 if words == ["method.k=16"] else ROWS
    own = copy.deepcopy(base)
    with pytest.raises(UserError, match=reason):
        made = method("cpt", *words)
        made.prepare(long, 0, own)
        made.wrap(own)


def test_riemannian_lora_needs_a_damping():
    with pytest.raises(UserError, match="method.reg is 0.0; B begins at 0"):
        method("lora_riemannian", "method.reg=0.0")


# on other architectures


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "phi3", "gpt2", "qwen3_moe", "opt"])
def test_on_other_architectures_a_tuner_answers_or_is_refused_with_a_key_or_a_choice(tiny, tmp_path, kind):
    model = load_model(write_architecture(tmp_path / kind, kind, tiny / "models" / "smollm2_135m"), Precision("fp32"), torch.device("cpu"))
    refused = []
    for name in TRAINED:
        try:
            _, made = wrapped(name, model)
            assert logits(made).isfinite().all(), name
        except UserError as error:
            assert "method." in str(error) or "choose another" in str(error), (name, str(error))
            refused.append(name)
    assert len(refused) <= {"qwen2": 2, "gemma3_text": 4}.get(kind, 20), refused


def test_lily_says_that_it_mixes_a_batchs_rows(base):
    made, model = wrapped("lily", base)
    moved(model)
    assert apart(logits(model)[:1], logits(model, IDS[:1])) > 1e-6 and "depends on the rows beside it" in made.notes(model)[0]
    assert not method("lora").notes(model) and not method("lora").mixes_rows
