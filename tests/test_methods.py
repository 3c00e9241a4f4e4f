"""What each method trains, saves, loads and merges, against formulas and against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cell import run as cell_run
from pipeline.core.compose import build, compose
from pipeline.core.files import UserError, folder_bytes, read_json, read_jsonl
from pipeline.core.settings import Precision
from pipeline.data.rows import Example
from pipeline.methods.base import Method
from pipeline.methods.full import Full
from pipeline.methods.none import FewShot, TeacherAnswers, Untouched
from pipeline.methods.peft_adapter import PeftAdapter
from pipeline.models.base import load_model, parameters
from pipeline.serving import artefact as evaluate

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
HIDDEN, LAYERS, VOCABULARY = 64, 2, 31
LINEAR = LAYERS * ([(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)])  # d_in, d_out of a tiny Llama's layers


@pytest.fixture
def load(tiny):
    return lambda precision="fp32": load_model(tiny / "models" / "smollm2_135m", Precision(precision), CPU)


def lora(r: int = 4, **changes: Any) -> PeftAdapter:
    from peft import LoraConfig

    merge = changes.pop("merge", False)
    return PeftAdapter(
        LoraConfig(**{"task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r, "target_modules": "all-linear", **changes}), merge
    )


def soft_prompt(tokens: int = 6, **changes: Any) -> PeftAdapter:
    from peft import PromptTuningConfig

    return PeftAdapter(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens), **changes)


def perturbed(method: PeftAdapter, base: Any) -> Any:
    """The wrapped base with what is trained moved off its initial value, as training would; the same each time."""
    torch.manual_seed(1)
    model = method.wrap(base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative error."""
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("r", [1, 2, 8])
def test_lora_trains_r_times_the_widths_of_every_linear_layer(load, r):
    trainable, total = parameters(lora(r).wrap(load()))
    assert trainable == sum(r * (d_in + d_out) for d_in, d_out in LINEAR)
    assert total - trainable == parameters(load())[1]


def test_lora_of_rank_2_on_512_by_512_trains_2048():
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = LlamaConfig(hidden_size=512, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, vocab_size=8)
    model = LlamaForCausalLM(sizes).requires_grad_(False)
    whole = parameters(model)[1]
    assert parameters(PeftAdapter(LoraConfig(r=2, target_modules=["q_proj"])).wrap(model)) == (2048, whole + 2048)


def test_lora_over_nf4_counts_every_value_of_the_base(load):
    trainable, total = parameters(lora(2).wrap(load("nf4")))
    assert trainable == sum(2 * (d_in + d_out) for d_in, d_out in LINEAR) and total - trainable == parameters(load())[1]


def test_prompt_tuning_trains_tokens_times_width(load):
    assert parameters(soft_prompt(6).wrap(load()))[0] == 6 * HIDDEN


def test_full_fine_tuning_trains_everything_in_fp32_and_serves_the_bases_dtype(load):
    base = load("bf16")
    model = Full().wrap(base)
    trainable, total = parameters(model)
    assert trainable == total and {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in Full().served(model, torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_adapter_weights_are_fp32_in_every_precision(load, precision):
    model = lora().wrap(load(precision))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# The tolerance is on the relative error of the logits: fp32 sums in another order; int8, where the attached base rounds
# its activations too and the merged one does not; bf16, where the sum of base and adapter is rounded once more.
@pytest.mark.parametrize(
    ("precision", "tolerance", "options"),
    [
        ("fp32", 1e-5, {}),
        ("nf4", 1e-5, {}),
        ("int8", 0.05, {}),
        ("bf16", 0.03, {}),
        ("fp32", 1e-5, {"use_dora": True}),
        ("nf4", 1e-5, {"use_dora": True}),
        ("fp32", 1e-5, {"use_rslora": True}),
    ],
)
def test_merged_and_attached_agree(load, precision, tolerance, options):
    method = lora(**options)
    model = perturbed(method, load(precision))
    attached = logits(model)
    assert apart(logits(load(precision)), attached) > 0.1, "the adapter does something"
    merged = method.merged(model)
    assert apart(logits(merged), attached) < tolerance
    assert not hasattr(merged, "peft_config") and not getattr(merged, "quantization_method", None)
    assert parameters(merged)[1] == parameters(load())[1]


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_one_evaluation_does_not_change_the_gradients_over_a_quantised_base(load, precision):
    def gradients(evaluate_first: bool) -> list[torch.Tensor]:
        model = perturbed(lora(), load(precision))
        if evaluate_first:
            logits(model)
        model.train()
        torch.nn.functional.cross_entropy(model(input_ids=IDS).logits.float().flatten(0, 1), IDS.flatten()).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain = gradients(False)
    assert all(float(g.abs().max()) > 0 for g in plain)
    for one, other in zip(plain, gradients(True), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


METHODS = {
    "zero_shot": [], "few_shot": ["method.k=3"], "full": [], "lora": [], "qlora": [], "prompt_tuning": [], "step_by_step": [],
    "lora merged": ["technique=lora", "method.merge=true"], "qlora merged": ["technique=qlora", "method.merge=true"],
    "step_by_step lora": ["technique=step_by_step", "method=lora"], "full bf16": ["technique=full", "precision=bf16"],
}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_is_what_was_scored(overrides, tmp_path, name):
    """Train a little, save, load onto an untouched base: the same predictions, to the last digit that is written."""
    given = METHODS[name] if name.partition(" ")[2] else [f"technique={name}", *METHODS[name]]
    cfg = compose([*overrides, *given, "train_rows=16", "train.epochs=2", "train.batch_size=8", "train.lr=5e-3"])
    result = cell_run.run(cfg, folder=tmp_path / "cell")
    assert result.test and result.test.nll and result.size
    stored = [p for p in read_jsonl(tmp_path / "cell" / "predictions.jsonl") if p["split"] == "test"]
    actual, score = evaluate.score_artefact(cfg, tmp_path / "cell" / "artefact", "test")
    assert [p["prediction"] for p in actual] == [p["prediction"] for p in stored]
    assert score.accuracy == result.test.accuracy and score.nll == pytest.approx(result.test.nll, abs=1e-6)
    for one, other in zip(actual, stored, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=2e-6)
    written = folder_bytes(tmp_path / "cell" / "artefact") - (tmp_path / "cell" / "artefact" / "artefact.json").stat().st_size
    assert result.size.artefact_bytes == written
    if name != "zero_shot":
        base = cell_run.run(compose([*overrides, "technique=zero_shot", *[g for g in given if g.startswith("precision")]]), splits=("test",))
        assert base.test and base.test.nll
        assert abs(base.test.nll - result.test.nll) > 1e-4, "the artefact does something"


def test_a_merged_artefact_is_a_whole_model_that_needs_no_adapter_library(overrides, tmp_path):
    cfg = compose([*overrides, "technique=qlora", "method.merge=true", "train.steps=2", "train.lr=5e-3"])
    cell_run.run(cfg, folder=tmp_path / "cell")
    artefact = tmp_path / "cell" / "artefact"
    assert not (artefact / "adapter_config.json").exists() and "quantization_config" not in read_json(artefact / "config.json")
    assert parameters(Full().load(load_model(artefact_base(cfg), Precision("fp32"), CPU), artefact)[0])[1] == VOCABULARY * HIDDEN + sum(
        d_in * d_out for d_in, d_out in LINEAR) + (2 * LAYERS + 1) * HIDDEN


def artefact_base(cfg: Any) -> Path:
    return Path(cfg.paths.models) / cfg.model.name


@pytest.mark.parametrize("value", [0, -1, -8])
@pytest.mark.parametrize("key", ["r", "num_virtual_tokens"])
def test_a_rank_or_prompt_below_1_is_named(key, value):
    technique = "lora" if key == "r" else "prompt_tuning"
    with pytest.raises(UserError, match=rf"method\.config\.{key} is {value}; it must be a whole number of at least 1"):
        build(compose([f"technique={technique}", f"method.config.{key}={value}"]).method, "method")


def test_a_rank_that_is_no_whole_number_is_named():
    for value in ("2.5", "many", "true"):
        with pytest.raises(UserError, match=r"'method\.config\.r' is .*; it takes int"):
            build(compose(["technique=lora", f"method.config.r={value}"]).method, "method")


def test_a_soft_prompt_cannot_be_merged():
    with pytest.raises(UserError, match=r"PROMPT_TUNING cannot be merged into the base; set method\.merge=false"):
        soft_prompt(merge=True)
    assert not soft_prompt().merges and lora().merges and not Full().merges


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_full_fine_tuning_of_a_quantised_base_is_refused(precision):
    with pytest.raises(
        UserError, match=rf"full fine-tuning cannot train {precision} weights; choose precision=auto, fp32 or bf16, or technique=qlora"
    ):
        Full().check(precision)
    Full().check("bf16")
    lora().check(precision)


def test_target_modules_that_the_model_lacks_are_one_sentence(load):
    with pytest.raises(UserError, match=r"this adapter does not fit the model: .*c_attn") as caught:
        lora(target_modules=["c_attn"]).wrap(load())
    assert "\n" not in str(caught.value)


def test_what_is_shown_of_a_method():
    assert lora(4, lora_dropout=0.1).hyperparameters() == {"r": 4, "alpha": 8, "dropout": 0.1}
    assert lora(4, use_dora=True, merge=True).hyperparameters() == {"r": 4, "alpha": 8, "dropout": 0.0, "use_dora": True, "merge": True}
    assert (
        soft_prompt(6).hyperparameters() == {"virtual_tokens": 6, "init": "RANDOM"}
        and FewShot(3).hyperparameters() == {"k": 3}
        and Full().hyperparameters() == {}
    )
    names = [m.name for m in (lora(), soft_prompt(), Full(), FewShot(1), Untouched(), TeacherAnswers())]
    assert names == ["lora", "prompt_tuning", "full", "few_shot", "none", "teacher"]


def test_equal_runs_leave_equal_bytes(load, tmp_path):
    """PEFT writes its sets in the order of hashes, which differs from process to process: many names are hardly ever in order by chance."""
    method = lora(target_modules="all-linear")
    method.save(method.wrap(load()), None, tmp_path)
    stored = read_json(tmp_path / "adapter_config.json")["target_modules"]
    assert len(stored) > 6 and stored == sorted(stored)
    assert method.load(load(), tmp_path)[0].peft_config["default"].target_modules == set(stored)


def test_two_cells_can_wrap_with_one_config(load):
    method = lora()
    before = repr(method.config)
    method.wrap(load())
    assert repr(method.config) == before, "PEFT writes into the config it is given; the method's own stays"


def shots(count: int) -> list[Example]:
    return [Example(f"prompt {i}", "abc"[i % 3]) for i in range(count)]


def test_demonstrations_are_drawn_by_seed_and_balanced():
    method = FewShot(6)
    chosen = method.prepare(shots(30), 0)
    assert sorted(c["answer"] for c in chosen) == list("aabbcc") and len({c["prompt"] for c in chosen}) == 6
    assert chosen == method.prepare(shots(30), 0) != method.prepare(shots(30), 1)
    assert {tuple(sorted(c["answer"] for c in FewShot(2).prepare(shots(30), s))) for s in range(20)} > {("a", "b")}, (
        "which answers come is drawn too"
    )
    orders = {tuple(c["answer"] for c in method.prepare(shots(30), s)) for s in range(10)}
    assert len(orders) > 1, "and so is their order"


def test_rare_answers_do_not_keep_k_from_being_reached():
    rows = [Example("rare", "a"), *[Example(f"common {i}", "b") for i in range(9)]]
    assert sorted(c["answer"] for c in FewShot(5).prepare(rows, 0)) == list("abbbb")


def test_more_demonstrations_than_rows():
    with pytest.raises(UserError, match=r"method\.k=8, but there are 5 training rows; lower k or raise train_rows"):
        FewShot(8).prepare(shots(5), 0)
    with pytest.raises(UserError, match=r"method\.k is 0; few-shot needs at least 1 demonstration"):
        FewShot(0)


def test_the_prompt_of_few_shot():
    state = [{"prompt": "p1", "answer": "a1"}, {"prompt": "p2", "answer": "a2"}]
    assert FewShot(2).prompt("p3", state) == "p1 a1\n\np2 a2\n\np3"
    assert FewShot(2, "\n", " = ").prompt("p3", state) == "p1 = a1\np2 = a2\np3"


def test_the_teacher_answers_from_its_rows():
    rationales: dict[str, dict] = {"1": {"answer": "yes"}, "2": {"answer": None}}
    assert TeacherAnswers().answers([{"id": "1"}, {"id": "2"}], rationales) == ["yes", ""]
    with pytest.raises(
        UserError, match=r"the teacher has no row for '3'; run python -m pipeline\.rationales for all rows"
    ):
        TeacherAnswers().answers([{"id": "3"}], rationales)


def test_the_defaults_train_nothing():
    method = Method()
    assert not method.trains and not method.merges and method.prompt("p", None) == "p" and method.load("base", Path())[0] == "base"
    with pytest.raises(UserError, match="leaves nothing that could be merged"):
        method.merged(None)
