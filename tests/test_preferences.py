"""DPO, ORPO and KTO: where pairs come from, each loss by hand and against TRL's own, how steps are split, and that they learn."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.cell import run as cell_run
from pipeline.cell.identity import fingerprint
from pipeline.core.compose import build, compose
from pipeline.core.files import UserError, read_jsonl, write_jsonl
from pipeline.core.settings import Precision, Task, Train
from pipeline.data.rows import Encoder
from pipeline.models.architecture import has_dropout
from pipeline.models.base import load_model, load_tokenizer
from pipeline.objectives.base import TrainingContext
from pipeline.objectives.preferences import Dpo, Kto, Orpo, log1mexp
from pipeline.serving import artefact as evaluate
from pipeline.training import stepping

CPU = torch.device("cpu")
TASK = Task("t", "choice")
ROWS: list[dict] = [
    {"id": str(i), "prompt": f"Review: {'film ' * (i + 1)}\nSentiment:", "answer": good,
     "choices": ["negative", "positive", "the plot of a story"], "fields": {}}
    for i, good in enumerate(["positive", "negative", "the plot of a story", "positive"])
]


@pytest.fixture(scope="module")
def encoder(tiny):
    return Encoder(load_tokenizer(tiny / "models" / "smollm2_135m"), TASK, 64, "error")


def a_model(tiny: Any, noise: float = 0.0) -> Any:
    model = load_model(tiny / "models" / "smollm2_135m", Precision("fp32"), CPU)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return model


def prepared(objective: Any, model: Any, encoder: Encoder, rows: list[dict] = ROWS) -> list:
    examples = [[encoder.example(e) for e in objective.examples(row, TASK, None)] for row in rows]
    settings: Any = SimpleNamespace(evaluate=SimpleNamespace(batch_tokens=64))
    context: Any = TrainingContext(None, settings, model, encoder, rows, CPU, torch.float32, None)  # type: ignore[arg-type]
    return [e for row in objective.prepared(examples, context).examples for e in row]


def log_p(model: Any, example: Any) -> tuple[float, int]:
    """Sum over the answer's tokens, one sequence at a time, and how many there are."""
    with torch.no_grad():
        chances = torch.log_softmax(model(input_ids=torch.tensor([example.ids])).logits[0], -1)
    places = range(example.start, len(example.ids))
    return float(sum(chances[i - 1, example.ids[i]] for i in places)), len(places)


def total(objective: Any, model: Any, flat: list, micro_batch_tokens: int) -> tuple[float, int]:
    actual = list(objective.batches(flat, Train(0.1, 1, 4, micro_batch_tokens), 1))
    with torch.no_grad():
        return float(sum(objective.loss(model, b) for b in actual)), len(actual)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(objective: Any, flat: list, base: Any, model: Any) -> float:
    """The papers' formulas over the pairs, in plain numbers."""
    now, then = [log_p(model, e) for e in flat], [log_p(base, e)[0] for e in flat]
    moved = [a[0] - b for a, b in zip(now, then, strict=True)]
    chosen, rejected = moved[::2], moved[1::2]
    if isinstance(objective, Dpo):
        return sum(-math.log(sigma(objective.beta * (c - r))) for c, r in zip(chosen, rejected, strict=True)) / len(chosen)
    if isinstance(objective, Orpo):
        mean = [value / count for value, count in now]
        odds = [m - math.log(1 - math.exp(m)) for m in mean]
        nll = -sum(v for v, _ in now[::2]) / sum(n for _, n in now[::2])
        return nll - objective.weight * sum(math.log(sigma(c - r)) for c, r in zip(odds[::2], odds[1::2], strict=True)) / len(chosen)
    others = [e.mismatched for e in flat]
    drift = max(0.0, sum(log_p(model, e)[0] - log_p(base, e)[0] for e in others) / len(others))
    good = [objective.desirable_weight * (1 - sigma(objective.beta * (c - drift))) for c in chosen]
    bad = [objective.undesirable_weight * (1 - sigma(objective.beta * (drift - r))) for r in rejected]
    return sum(good + bad) / len(flat)


KINDS = [Dpo(beta=0.3), Orpo(weight=0.4), Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)]


@pytest.mark.parametrize("objective", KINDS, ids=lambda o: o.name)
def test_the_loss_is_the_paper_s_however_a_step_is_split(tiny, encoder, objective):
    base, model = a_model(tiny), a_model(tiny, 0.05)
    flat = prepared(objective, base, encoder)
    expected = by_hand(objective, flat, base, model)
    whole, one = total(objective, model, flat, 4096)
    split, several = total(objective, model, flat, 40)
    assert one == 1 < several and whole == pytest.approx(expected, abs=1e-5) and split == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("objective", "start"), [(Dpo(), math.log(2)), (Kto(), 0.5)])
def test_at_the_start_nothing_has_moved(tiny, encoder, objective, start):
    """log 2 and 1/2: the model is its own reference."""
    model = a_model(tiny)
    assert total(objective, model, prepared(objective, model, encoder), 64)[0] == pytest.approx(start, abs=1e-6)


def test_a_mismatched_sequence_has_its_own_prompt_and_another_row_s_answer(tiny, encoder):
    flat = prepared(Kto(), a_model(tiny), encoder)
    for i, example in enumerate(flat):
        other = flat[i - 2]
        assert example.mismatched.ids == (*example.ids[: example.start], *other.ids[other.start :])


def test_odds_of_a_probability_that_rounds_to_1_are_finite_and_have_a_gradient():
    x = torch.tensor([0.0, -1e-9, -0.1, -5.0, -200.0], requires_grad=True)
    actual = log1mexp(x)
    assert actual[2:].tolist() == pytest.approx([math.log(1 - math.exp(v)) for v in (-0.1, -5.0)] + [0.0])
    actual.sum().backward()
    assert torch.isfinite(actual).all() and torch.isfinite(x.grad).all()


def test_a_row_is_compared_with_wrong_choices_drawn_by_its_id():
    assert [(e.answer, e.group) for e in Dpo(wrong_choices=None).examples(ROWS[0], TASK, None)] == [
        ("positive", "chosen"), ("negative", "rejected"), ("positive", "chosen"), ("the plot of a story", "rejected")]
    drawn = {Dpo().examples({**ROWS[0], "id": str(i)}, TASK, None)[1].answer for i in range(9)}
    assert drawn == {"negative", "the plot of a story"} and Dpo().examples(ROWS[0], TASK, None) == Dpo().examples(ROWS[0], TASK, None)
    with pytest.raises(UserError, match="row 'x' has no wrong choice .* objective.pairs=<file.jsonl>"):
        Dpo().rows([{"id": "x", "choices": None}], {}, None, 0)


@pytest.mark.parametrize(
    ("line", "says"),
    [({"prompt": "p", "chosen": "a"}, "line 2 of .* has no text 'rejected'"),
     ({"prompt": "p", "chosen": "a", "rejected": "a"}, "line 2 of .* prefers a text to itself")],
)
def test_a_bad_line_of_a_pairs_file_is_named(tmp_path, line, says):
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}, line])
    with pytest.raises(UserError, match=says):
        Dpo(pairs=str(tmp_path / "pairs.jsonl")).rows([], {}, None, 0)
    with pytest.raises(UserError, match="objective.pairs=nowhere does not exist"):
        Dpo(pairs="nowhere").rows([], {}, None, 0)


def test_a_pairs_file_is_drawn_from_as_rows_are(tmp_path, overrides):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(9)])
    objective = Dpo(pairs=str(path))
    actual = objective.rows([], {}, 5, 1)
    assert actual == objective.rows([], {}, 9, 1)[:5] and actual != objective.rows([], {}, 5, 2)
    prompt = actual[0]["prompt"]
    assert [(e.prompt, e.answer) for e in objective.examples(actual[0], Task("t", "generate"), None)] == [(prompt, "a"), (prompt, "b")]
    with pytest.raises(UserError, match="has 9 pairs; ask for at most that"):
        objective.rows([], {}, 10, 1)
    cfg = compose([*overrides, "technique=dpo", f"objective.pairs={path}"])
    before = fingerprint(cfg)
    write_jsonl(path, [{"prompt": "p", "chosen": "a", "rejected": "c"}])
    assert fingerprint(cfg) != before, "its content decides the outcome"


@pytest.mark.parametrize(
    "change",
    ["technique=dpo objective.beta=0", "technique=orpo objective.weight=-1", "technique=kto objective.desirable_weight=0",
     "technique=dpo objective.wrong_choices=0"],
)
def test_values_out_of_range_are_refused(change):
    with pytest.raises(UserError, match=r"'objective\.\w+' is -?\d"):
        build(compose(change.split()).objective, "objective")


@pytest.mark.parametrize(("name", "method"), [("kto", "full"), *(pytest.param(n, "lora", marks=pytest.mark.slow) for n in ("dpo", "orpo", "kto"))])
def test_the_separable_task_is_learnt_and_the_artefact_answers_alike(overrides, tmp_path, name, method):
    rate = {"full": 3e-3, "lora": 1e-2}[method]
    cfg = compose([*overrides, f"technique={name}", f"method={method}", "train.epochs=8", "train.batch_size=8", "train.validations=2", f"train.lr={rate}"])
    result = cell_run.run(cfg, folder=tmp_path / "cell")
    assert result.test.accuracy >= 0.95 and result.family == "preferences" and result.objective == name
    stored = [p for p in read_jsonl(tmp_path / "cell" / "predictions.jsonl") if p["split"] == "test"]
    assert [p["prediction"] for p in evaluate.score_artefact(cfg, tmp_path / "cell" / "artefact", "test")[0]] == [p["prediction"] for p in stored]


# the fast engine


def moved(tiny: Any, encoder: Encoder, objective: Any, method: str, engine: str, *words: str, micro: int = 4096, steps: int = 4,
          rows: list[dict] = ROWS, **more: Any) -> Any:
    """(the engine, its losses, weights before and after) of a training from weights that are not the reference's."""
    model = build(compose([f"method={method}", *words]).method, "method")
    torch.manual_seed(0)
    wrapped = model.wrap(a_model(tiny))
    flat = iter(prepared(objective, wrapped, encoder, rows))
    examples = [[next(flat) for _ in objective.examples(row, TASK, None)] for row in rows]
    generator = torch.Generator().manual_seed(3)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    before = {n: p.detach().clone() for n, p in trained.items()}
    settings = Train(1e-3, 1, 3, micro, engine=engine, **more)
    run = stepping.Run(wrapped, model, objective, examples, settings, 0, steps, CPU, torch.float32, encoder.pad_id)
    way = stepping.choose(run)
    made = [way.step(step, 1.0) for step in range(steps)]
    after = {n: p.detach().clone() for n, p in trained.items()}
    way.close()
    return way, [float(loss) for loss, *_ in made], [m[1] for m in made], before, after


ALL = [*KINDS, Dpo(beta=0.3, wrong_choices=None)]
"""The last as technique sft_dpo has it."""
DORA = "method.config.use_dora=true"


@pytest.mark.parametrize(("objective", "method", "words", "engine", "more"), [
    *((objective, method, [], "handwritten", {}) for objective in ALL for method in ("lora", "full")),
    *((objective, "lora", [], "handwritten", {"micro": 40}) for objective in KINDS),
    (KINDS[2], "lora", [], "handwritten", {"padding_free": "always"}),
    (KINDS[0], "prompt_tuning", [], "handwritten", {}),
    (KINDS[2], "lora", [DORA], "handwritten", {}),
    (KINDS[2], "ia3", [], "captured", {}),
])
def test_fast_steps_have_the_loss_and_the_gradient_of_the_eager_ones(tiny, encoder, objective, method, words, engine, more):
    eager = moved(tiny, encoder, objective, method, "eager", *words, **{k: v for k, v in more.items() if k != "padding_free"})
    fast = moved(tiny, encoder, objective, method, "fast", *words, **more)
    assert fast[0].engine == engine and fast[0].streams == ("padding_free" in more), fast[0].reason
    assert fast[1] == pytest.approx(eager[1], rel=1e-4) and len(set(fast[1])) > 1 and fast[2] == eager[2]
    for name, weights in eager[4].items():
        assert float((fast[4][name] - weights).norm()) <= 1e-4 * float(weights.norm()), name


def test_a_mismatched_sequence_may_be_longer_than_all_that_are_trained_on(tiny, encoder):
    long = "film " * 20
    rows = [{"id": "short", "prompt": "Review:", "answer": f"{long}positive", "choices": [f"{long}positive", f"{long}negative"], "fields": {}},
            {"id": "long", "prompt": f"Review: {long}", "answer": "positive", "choices": ["positive", "negative"], "fields": {}}]
    eager, fast = (moved(tiny, encoder, Kto(), "lora", engine, steps=2, rows=rows) for engine in ("eager", "fast"))
    assert fast[0].engine == "handwritten" and fast[1] == pytest.approx(eager[1], rel=1e-4)


def test_where_two_passes_would_draw_other_masks_the_eager_loop_remains(tiny, encoder):
    dry = moved(tiny, encoder, Dpo(), "lora", "fast", steps=1)
    wet = moved(tiny, encoder, Dpo(), "lora", "fast", "method.config.lora_dropout=0.3", steps=1)
    assert dry[0].engine == "handwritten"
    assert (wet[0].engine, wet[0].reason) == ("eager", "dropout draws anew in each of the two passes that a step of this objective takes")
    model = a_model(tiny)
    assert not has_dropout(model)
    model.config.attention_dropout = 0.1  # of a function, in no module
    assert has_dropout(model)


# against TRL


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


def laid_out(flat: list) -> dict[str, torch.Tensor]:
    """Chosen sequences, then rejected ones, as TRL's collators have them."""
    width = max(len(e.ids) for e in flat)
    rows = [*flat[::2], *flat[1::2]]
    ids = torch.tensor([[*e.ids, *[1] * (width - len(e.ids))] for e in rows])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in rows])
    answer = torch.tensor([[0] * e.start + [1] * (len(e.ids) - e.start) + [0] * (width - len(e.ids)) for e in rows])
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": answer}


@pytest.mark.slow
def test_dpo_is_trl_s(trl, tiny, encoder, tmp_path):
    from datasets import Dataset

    base, model, objective = a_model(tiny), a_model(tiny, 0.05), Dpo(beta=0.3)
    flat = prepared(objective, base, encoder)
    args = trl.DPOConfig(output_dir=str(tmp_path), beta=0.3, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    data = Dataset.from_list([{"prompt": "the film", "chosen": " positive", "rejected": " negative"}])
    trainer = trl.DPOTrainer(model=model, ref_model=base, args=args, train_dataset=data, processing_class=encoder.tokenizer)
    with torch.no_grad():
        theirs = trainer._compute_loss(trainer.model, laid_out(flat), False)
    assert total(objective, model, flat, 64)[0] == pytest.approx(float(theirs), abs=1e-5)


@pytest.mark.slow
def test_orpo_s_odds_ratio_is_trl_s(trl, tiny, encoder):
    from trl.experimental.orpo import ORPOTrainer

    model, objective = a_model(tiny, 0.05), Orpo(weight=0.4)
    flat = prepared(objective, model, encoder)
    mean = torch.tensor([value / count for value, count in (log_p(model, e) for e in flat)])
    stand_in: Any = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device=CPU))
    theirs = ORPOTrainer.odds_ratio_loss(stand_in, mean[::2], mean[1::2])[0]
    only_labels = total(Orpo(weight=1e-9), model, flat, 64)[0]
    assert total(objective, model, flat, 64)[0] - only_labels == pytest.approx(float(-theirs.mean()), abs=1e-5)


@pytest.mark.slow
def test_kto_is_trl_s(trl, tiny, encoder, tmp_path):
    from datasets import Dataset

    base, model = a_model(tiny), a_model(tiny, 0.05)
    objective = Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    flat = prepared(objective, base, encoder)
    args = trl.KTOConfig(output_dir=str(tmp_path), beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, use_cpu=True, bf16=False, report_to="none",
                         gradient_checkpointing=False, per_device_train_batch_size=2)
    data = Dataset.from_list([{"prompt": "the film", "completion": f" {w}", "label": w == "positive"} for w in ("positive", "negative")])
    trainer = trl.KTOTrainer(model=model, ref_model=base, args=args, train_dataset=data, processing_class=encoder.tokenizer)
    own, other = laid_out(flat), laid_out([e.mismatched for e in flat])
    batch = {**own, **{f"KL_{k}": v for k, v in other.items()}, "label": torch.arange(len(flat)) < len(flat) // 2}
    with torch.no_grad():
        theirs = trainer._compute_loss(trainer.model, batch, False)
    assert total(objective, model, flat, 64)[0] == pytest.approx(float(theirs), abs=1e-5)


# single answers


SINGLES = [{"prompt": "a", "completion": "positive", "label": True}, {"prompt": "b", "completion": "negative", "label": False},
           {"prompt": "b", "completion": "positive", "label": True}, {"prompt": "c", "completion": "the plot", "label": True}]


def test_kto_takes_single_answers_and_the_rarer_kind_again(tmp_path, encoder):
    write_jsonl(tmp_path / "singles.jsonl", SINGLES)
    objective = Kto(pairs=str(tmp_path / "singles.jsonl"))
    rows = objective.rows([], {}, None, 0)
    assert len(rows) == 3 and all(row["worse_prompt"] == "b" for row in rows)
    examples = {row["prompt"]: objective.examples(row, TASK, None) for row in rows}
    assert {k: [(e.prompt, e.answer, e.group) for e in v] for k, v in examples.items()} == {
        "a": [("a", "positive", "chosen"), ("b", "negative", "rejected")], "b": [("b", "positive", "chosen"), ("b", "negative", "rejected")],
        "c": [("c", "the plot", "chosen"), ("b", "negative", "rejected")],
    }


def test_what_compares_takes_single_answers_of_one_prompt(tmp_path):
    write_jsonl(tmp_path / "singles.jsonl", SINGLES)
    rows = Dpo(pairs=str(tmp_path / "singles.jsonl")).rows([], {}, None, 0)
    assert [(row["prompt"], row["answer"], row["choices"]) for row in rows] == [("b", "positive", ["positive", "negative"])]
    write_jsonl(tmp_path / "apart.jsonl", [SINGLES[0], SINGLES[1]])
    with pytest.raises(UserError, match="apart.jsonl has no prompt with a good and a bad completion.*technique=kto"):
        Dpo(pairs=str(tmp_path / "apart.jsonl")).rows([], {}, None, 0)
    write_jsonl(tmp_path / "good.jsonl", [SINGLES[0]])
    with pytest.raises(UserError, match="good.jsonl has none with label false; KTO learns from both kinds"):
        Kto(pairs=str(tmp_path / "good.jsonl")).rows([], {}, None, 0)
    write_jsonl(tmp_path / "broken.jsonl", [*SINGLES, {"prompt": "d", "completion": "", "label": True}])
    with pytest.raises(UserError, match="row 5 of .*broken.jsonl is no"):
        Kto(pairs=str(tmp_path / "broken.jsonl")).rows([], {}, None, 0)
