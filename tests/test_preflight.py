"""The checks before an experiment: each holds on what is sound and fails on what is broken, and an experiment does not begin where one fails."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import check
from pipeline.cell import checks, grid, identity, preflight
from pipeline.cell.inputs import Shared
from pipeline.core.compose import build, compose
from pipeline.core.files import read_jsonl
from pipeline.core.settings import Precision, Task, Train
from pipeline.data.rows import Encoded, Encoder, Example
from pipeline.methods.base import Method
from pipeline.models.base import load_model
from pipeline.objectives.base import Objective
from pipeline.scoring.scorer import Scorer
from pipeline.training.stepping import Run

CPU = torch.device("cpu")
TASK = Task("vader_movies", "choice")
TEXTS = ["Review: the film and a fine plot\nSentiment: positive", "Review: a poor plot\nSentiment: negative"]
SHORT = ["train.batch_size=8", "train_rows=16"]


@pytest.fixture(scope="module")
def load(tiny):
    held = load_model(tiny / "models" / "smollm2_135m", Precision("fp32"), CPU)
    return lambda: copy.deepcopy(held)


@pytest.fixture(scope="module")
def rows(tiny):
    return read_jsonl(tiny / "data" / "vader_movies" / "train.jsonl")[:8]


def wrapped(load: Any, technique: str = "lora") -> Any:
    return build(compose([f"technique={technique}"]).method, "method").wrap(load())


def encoder_of(tokenizer: Any, kind: type[Encoder] = Encoder) -> Encoder:
    return kind(tokenizer, TASK, 512, "error")


def scorer_of(tokenizer: Any, encoder: Encoder) -> Scorer:
    return Scorer(None, encoder, TASK, lambda p: p, 512, CPU, torch.float32)


def encoded(encoder: Encoder, rows: list[dict]) -> list[Encoded]:
    return [encoder.example(Objective().label_example(row, TASK)) for row in rows]


# the tokenizer


class Words:
    """A tokenizer that gives `ids(text)`, of a vocabulary of `size`."""

    unk_token_id, eos_token_id = 0, 1

    def __init__(self, ids: Any, size: int = 300) -> None:
        self.ids, self.size = ids, size

    def __len__(self) -> int:
        return self.size

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.ids(text)}


@pytest.mark.parametrize(("ids", "size", "embeddings", "said"), [
    (lambda t: [ord(c) % 200 + 2 for c in t], 300, 300, r"4\.\d tokens a word, and one that knows the language 0.7 to 2.5"),
    (lambda t: [7], 300, 300, r"0\.1 tokens a word"),
    (lambda t: [400] * len(t.split()), 500, 400, "gives token 400, and the model has 400 embeddings"),
    (lambda t: [5] * len(t.split()), 300, 1000, "has 300 tokens, and the model 1,000 embeddings"),
    (lambda t: [0, *[5] * len(t.split())], 300, 300, "% of the task's tokens are unknown to it"),
])
def test_a_tokenizer_that_is_not_the_model_s_is_told(ids, size, embeddings, said):
    found = checks.tokenizer(Words(ids, size), embeddings, TEXTS)
    assert not found.ok and checks.re.search(said, found.said) and "put the tokenizer that belongs to the weights" in found.said


def test_the_model_s_own_tokenizer_is_taken(tokenizer):
    assert checks.tokenizer(tokenizer, len(tokenizer), TEXTS).ok
    letters = Words(lambda t: [ord(c) % 200 + 2 for c in t])
    assert checks.tokenizer(letters, 300, ["这部电影很好看"]).ok, "no words are counted where none are written apart"


# texts and labels


class OtherSeparator(Encoder):
    """Trains on a text that is not scored."""

    def example(self, example: Example) -> Encoded:
        found = super().example(example)
        return dataclasses.replace(found, ids=(*found.ids[: found.start], 7, *found.ids[found.start :]), start=found.start + 1)


class OneEarly(Encoder):
    """The prompt's last token is a label, too."""

    def example(self, example: Example) -> Encoded:
        found = super().example(example)
        return dataclasses.replace(found, start=found.start - 1)


class TwoBegins(Encoder):
    def prompt(self, text: str) -> list[int]:
        return [self.tokenizer.bos_token_id, self.tokenizer.bos_token_id, *super().prompt(text)]


def test_the_text_that_is_trained_on_is_the_text_that_is_scored(tokenizer, rows):
    def found(kind: type[Encoder]) -> checks.Finding:
        encoder = encoder_of(tokenizer, kind)
        return checks.trained_as_scored(scorer_of(tokenizer, encoder), Objective(), rows, {})

    assert found(Encoder).ok
    other = found(OtherSeparator)
    assert not other.ok and f"row {rows[0]['id']!r} differs from its token" in other.said and "task.separator" in other.said


def test_two_begin_tokens_are_told(tokenizer, rows):
    begins = copy.deepcopy(tokenizer)
    begins.bos_token = begins.eos_token
    encoder = encoder_of(begins, TwoBegins)
    found = checks.trained_as_scored(scorer_of(begins, encoder), Objective(), rows, {})
    assert not found.ok and "begins with two '<eos>'" in found.said


def test_labels_sit_on_the_answers_tokens_alone(tokenizer, rows):
    examples = [Objective().label_example(row, TASK) for row in rows]
    assert checks.labels(encoder_of(tokenizer), examples).ok
    early = checks.labels(encoder_of(tokenizer, OneEarly), examples)
    assert not early.ok and "the loss falls on ': " in early.said
    lost = checks.labels(encoder_of(tokenizer), [Example("Review: fine", "excellent")])
    assert not lost.ok and "'excellent' comes back from its tokens as" in lost.said


# what goes through the model


def step(model: Any, flat: list[Encoded]) -> Any:
    from pipeline.data.rows import collate

    batch = collate(flat, {"label": sum(len(e.ids) - e.start for e in flat)}, 1)
    return lambda: Objective().loss(model, batch)


def test_every_trained_parameter_gets_a_gradient(load, tokenizer, rows):
    flat = encoded(encoder_of(tokenizer), rows)
    model = wrapped(load)
    found = checks.gradients(model, step(model, flat))
    assert found.ok and "28 trained tensors" in found.said
    idle = wrapped(load)
    idle.base_model.idle = torch.nn.Parameter(torch.ones(3))
    unreached = checks.gradients(idle, step(idle, flat))
    assert not unreached.ok and "idle is not reached from the loss" in unreached.said
    assert "nothing is trained" in checks.gradients(load(), step(load(), flat)).said


def test_an_adapter_that_cannot_leave_its_start_is_told(load, tokenizer, rows):
    """Both factors at zero: neither has a gradient, at the start."""
    model = wrapped(load)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()
    found = checks.gradients(model, step(model, encoded(encoder_of(tokenizer), rows)))
    assert not found.ok and "no trained parameter has a gradient at the start" in found.said


def test_a_row_s_loss_does_not_depend_on_its_neighbours(load, tokenizer, rows):
    flat = encoded(encoder_of(tokenizer), rows)

    def found(model: Any) -> checks.Finding:
        alone, together = (checks.losses(model, parts, 1, CPU, torch.float32) for parts in ([[e] for e in flat], [flat]))
        return checks.neighbours(alone, together, "fp32")

    assert found(load()).ok
    mixing = load()
    mixing.model.layers[0].register_forward_hook(lambda m, args, out: out + out.mean(0, keepdim=True))
    mixed = found(mixing)
    assert not mixed.ok and "a row's loss changes by" in mixed.said
    assert not checks.neighbours([1.0], [float("nan")], "fp32").ok
    rounded = [1.0] * 7 + [1.15]
    assert checks.neighbours([1.0] * 8, rounded, "bf16").ok, "one logit is rounded otherwise in another batch"
    assert not checks.neighbours([1.0] * 8, [1.15] * 8, "bf16").ok and not checks.neighbours([1.0] * 8, [1.0] * 7 + [1.3], "bf16").ok


@dataclasses.dataclass(frozen=True)
class ForgetsTheAdapter(Method):
    def merged(self, model: Any) -> Any:
        return model.unload()


def test_merged_is_attached(load, tokenizer, rows):
    flat = encoded(encoder_of(tokenizer), rows)
    for made, ok in ((build(compose(["technique=lora"]).method, "method"), True), (ForgetsTheAdapter(), False)):
        model = wrapped(load)
        checks.gradients(model, step(model, flat))
        found = checks.merged(made, model, [flat], 1, CPU, torch.float32, "fp32")
        assert found.ok == ok, found.said
    assert "method.merge=false" in found.said


def test_an_adapter_larger_than_its_base_is_merged_rightly_in_16_bits(load, tokenizer, rows):
    """Its rounding is not the merge's: right merges of some of PEFT's tuners failed the check in bf16."""
    flat = encoded(encoder_of(tokenizer), rows)
    for made, ok in ((build(compose(["technique=lora"]).method, "method"), True), (ForgetsTheAdapter(), False)):
        model = wrapped(load).bfloat16()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=2.0)
        found = checks.merged(made, model, [flat], 1, CPU, torch.bfloat16, "bf16")
        assert found.ok == ok and "tolerance 0.0025, 0.001" in found.said, found.said  # in bf16 they are 0.009 nats apart


def test_a_layer_that_remembers_its_dtype_is_merged_in_fp32_too(load, tokenizer, rows):
    """AdaMSS's casts its input to the dtype that the base had: its check ended in an error on every base in bf16."""
    made = build(compose(["technique=adamss"]).method, "method")
    model = made.wrap(load().bfloat16())
    found = checks.merged(made, model, [encoded(encoder_of(tokenizer), rows)], 1, CPU, torch.bfloat16, "bf16")
    assert found.ok, found.said


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_the_engine_s_first_loss_is_that_of_the_rows(load, tokenizer, rows, monkeypatch, engine):
    flat = encoded(encoder_of(tokenizer), rows[:4])
    settings = Train(1e-3, 1, batch_size=4, micro_batch_tokens=512, engine=engine, padding_free="always")
    run = Run(wrapped(load), build(compose(["technique=lora"]).method, "method"), Objective(), [], settings, 0, 1, CPU, torch.float32, 1)
    before = {n: p.clone() for n, p in run.model.named_parameters() if p.requires_grad}
    sound = checks.engine(run, [[e] for e in flat], "fp32")
    assert sound.ok and ("handwritten, rows one after another without padding" if engine == "fast" else "eager") in sound.said
    assert all(torch.equal(before[n], p) for n, p in run.model.named_parameters() if p.requires_grad), "nothing was changed"
    wrong: Any = SimpleNamespace(engine="eager", reason=None, streams=True, step=lambda step, factor: (9.0, 0, 0), close=lambda: None)
    monkeypatch.setattr(checks, "choose", lambda run: wrong)
    found = checks.engine(run, [[e] for e in flat], "fp32")
    assert not found.ok and "its first loss is 9.0000" in found.said and "train.padding_free=never" in found.said


# all of them, and the head of an experiment


def test_the_command_prints_every_check(overrides, capsys):
    assert check.main([*overrides, *SHORT, "technique=step_by_step"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["tokenizer:", "lengths:", "text:", "labels:", "engine:", "gradients:", "neighbours:"]


def test_texts_that_are_too_long_are_told_for_every_technique_of_a_grid_before_its_first_cell(overrides, capfd):
    """Rows fit into 14 tokens, the rationales behind them do not."""
    cells = [compose([*overrides, *SHORT, f"technique={name}", "train.max_length=14", "preflight=true"]) for name in ("zero_shot", "step_by_step")]
    assert grid.run_cells(cells) == 2
    told = capfd.readouterr()
    assert "preflight: step_by_step: lengths:" in told.err and "texts of the training rows are longer than 14 tokens" in told.err
    assert "raise train.max_length" in told.err and "zero_shot: " not in told.err and "no cell was started" in told.err
    assert not any(identity.folder_of(cfg).exists() for cfg in cells)


def test_what_held_is_not_asked_again(overrides, monkeypatch, tmp_path):
    seeds = [compose([*overrides, *SHORT, "technique=zero_shot", f"seed={seed}"]) for seed in (0, 1)]
    asked: list[int] = []
    real = preflight.findings
    monkeypatch.setattr(preflight, "findings", lambda group, shared: asked.append(len(group)) or real(group, shared))
    assert preflight.ahead(seeds, Shared()) == 0 and asked == [2], "seeds are looked at together"
    assert preflight.ahead(seeds, Shared()) == 0 and asked == [2]
    other = [compose([*overrides, *SHORT, "technique=zero_shot", "train.max_length=100"])]
    assert preflight.ahead(other, Shared()) == 0 and asked == [2, 1]


def test_a_technique_that_does_not_apply_is_a_finding(overrides):
    (last,) = [f for f in preflight.findings([compose([*overrides, *SHORT, "technique=bitfit"])], Shared()) if not f.ok]
    assert last.check == "applies" and last.said.startswith("technique=bitfit on llama: ")


@pytest.mark.slow
@pytest.mark.parametrize("technique", [
    "adalora", "prefix_tuning", "qlora", "lora_int8", "adamix", "dpo", "logit_distillation", "grpo", "full_wanda", "few_shot", "prompt_choice",
    "retrieval_embedding", "rationale_first", "task_distillation", "full", "from_scratch", "head_only",
])
def test_what_is_sound_passes(overrides, technique):
    """One of every kind of method, objective and precision; a start or a teacher that is still to come keeps none from being checked."""
    found = list(preflight.findings([compose([*overrides, *SHORT, f"technique={technique}"])], Shared()))
    assert found and all(finding.ok for finding in found), [finding for finding in found if not finding.ok]


def test_what_answers_without_a_model_has_nothing_to_check(overrides):
    assert list(preflight.findings([compose([*overrides, "technique=teacher"])], Shared())) == []


