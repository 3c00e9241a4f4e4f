"""Scoring that shares tokens and runs over static shapes, against naive loops: equal scores, and what refuses."""

from __future__ import annotations

import copy
import inspect
import random
from typing import Any

import pytest
import torch
from scoring_models import CPU, KINDS, OWNERS, PAD, by_batches, items_of, of_kind, with_lora, with_loras, with_prompt

from pipeline.data.choices import Reads, arrange, joined
from pipeline.engine import answering, bind, passes, reuse
from pipeline.engine.graphs import Graphs
from pipeline.engine.parts import Unsupported
from pipeline.scoring import scorer as scoring
from pipeline.scoring.scorer import WHOLE, choice_log_likelihoods, generate


@pytest.fixture(scope="module", params=KINDS)
def model(request, base):
    return of_kind(request.param, base)


def naive(model: Any, items: list) -> list[list[float]]:
    """Log-likelihoods, each choice a sequence of its own."""
    found = []
    for prompt, choices in items:
        values = []
        for choice in choices:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *choice]])).logits[0]
            chances = torch.log_softmax(logits[logits.shape[0] - len(prompt) - len(choice) :].double(), -1)
            values.append(sum(float(chances[len(prompt) - 1 + i, token]) for i, token in enumerate(choice)))
        found.append(values)
    return found


def scores(model: Any, items: list, batch_tokens: int = 4096, notes: list[str] | None = None) -> list[list[float]]:
    return choice_log_likelihoods(model, items, batch_tokens, PAD, CPU, torch.float32, notes)


def same(found: list[list[float]], expected: list[list[float]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def fed(model: Any, work: Any) -> list[tuple[int, ...]]:
    """Shapes of the token ids that went through the model in `work`."""
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    try:
        work()
    finally:
        hook.remove()
    return seen


def tokens(shapes: list[tuple[int, ...]]) -> int:
    return sum(rows * width for rows, width in shapes)


@pytest.fixture
def static(monkeypatch):
    """Batches over static shapes on the CPU, as if launching a pass cost much and a capture little."""
    monkeypatch.setattr(answering, "STATIC", ("cpu",))
    monkeypatch.setattr(answering, "FEW", 10**9)
    monkeypatch.setattr(passes, "pass_tokens", lambda *_: 2000.0)
    monkeypatch.setattr(passes, "CAPTURE", 1)
    made: list[Any] = []
    record = Graphs.capture

    def capture(self: Graphs, work: Any) -> Any:
        made.append(work)
        return record(self, work)

    monkeypatch.setattr(Graphs, "capture", capture)
    return made


def test_a_tokens_mask_shows_it_the_trunk_its_ancestors_and_itself():
    (row,) = joined([([5, 6], [[7], [7, 8], [7, 8, 9], [7, 10, 11], [12]])])
    inputs = passes.Inputs(passes.Shape(2, 6, 8, 12, True), CPU)
    inputs.fill([row], PAD, 3)
    assert inputs.mask is not None
    assert inputs.mask[0, 0].int().tolist()[:5] == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0]]
    assert inputs.positions[0, :5].tolist() == [3, 4, 5, 6, 6] and inputs.ids[0].tolist() == [5, 6, 7, 8, 10, PAD]
    assert inputs.mask.any(-1).all(), "a token that sees nothing gives nan"


# the same scores


@pytest.mark.parametrize("demonstrations", [0, 40])
@pytest.mark.parametrize("batch_tokens", [1, 150, 4096])
def test_scores_are_those_of_a_naive_loop(model, demonstrations, batch_tokens):
    items = items_of(7, demonstrations)
    same(scores(model, items, batch_tokens), naive(model, items))


def test_demonstrations_and_prompts_are_fed_once(base):
    items = items_of(24, demonstrations=60)
    scores(base, items)  # once to learn that the model may share
    alone = sum(len(ids) for ids in Reads.of(items).sequences)
    shapes = fed(base, lambda: scores(base, items))
    assert shapes[0] == (1, 60) and sum(shape[0] for shape in shapes[1:]) == 24
    assert tokens(shapes) < alone / 5


@pytest.mark.parametrize("batch_tokens", [1, 150, 4096])
def test_rows_by_adapters_of_their_own_score_as_each_adapter_alone(base, static, batch_tokens):
    """Fed whole, in the batches of a model that is asked to share nothing, and never captured."""
    model, items = with_loras(base), items_of(9, demonstrations=40)
    found = choice_log_likelihoods(model, items, batch_tokens, PAD, CPU, torch.float32, owners=OWNERS)
    assert found == by_batches(model, items, batch_tokens, OWNERS)
    for name in set(OWNERS) - {"__base__"}:
        model.set_adapter(name)
        mine = [i for i, owner in enumerate(OWNERS) if owner == name]
        same([found[i] for i in mine], naive(model, [items[i] for i in mine]))
    mine = [i for i, owner in enumerate(OWNERS) if owner == "__base__"]
    same([found[i] for i in mine], naive(base, [items[i] for i in mine]))
    whole = choice_log_likelihoods(base, items, batch_tokens, PAD, CPU, torch.float32, owners=WHOLE)
    same(whole, naive(base, items))
    several, bare = (fed(by, lambda by=by, owners=owners: choice_log_likelihoods(by, items, batch_tokens, PAD, CPU, torch.float32, owners=owners))
                     for by, owners in ((model, OWNERS), (base, WHOLE)))
    assert several == bare and sum(rows for rows, _ in bare) == len(Reads.of(items).sequences) and not static


def test_an_empty_choice_alone_scores_0_beside_rows_of_other_adapters(base):
    found = choice_log_likelihoods(with_loras(base), [([5, 6], [[]]), ([5], [[7]])], 100, PAD, CPU, torch.float32, owners=["other", "wide"])
    assert found[0] == [0.0] and found[1][0] < 0
    assert choice_log_likelihoods(base, [([5, 6], [[]])], 100, PAD, CPU, torch.float32, owners=WHOLE) == [[0.0]]


def test_a_soft_prompt_is_put_before_whole_rows_where_passes_are_captured(base, static):
    """Elsewhere it is fed once (tests/test_many_choices.py)."""
    model, items = with_prompt(base), items_of(6, demonstrations=40)
    given = []
    hook = model.base_model.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs.get("past_key_values")), with_kwargs=True)
    scores(model, items)
    hook.remove()
    assert given and not any(given)


def test_a_model_that_takes_no_notice_of_the_mask_is_found_out(base):
    model = copy.deepcopy(base)
    whole = model.forward
    model.forward = lambda attention_mask=None, **inputs: whole(**inputs)
    model.forward.__signature__ = inspect.signature(whole)
    items = items_of(6)
    same(scores(model, items), naive(base, items))
    assert reuse._KNOWN[model] == "its scores change"


def test_a_model_that_fails_with_a_cache_is_scored_without(base):
    model = copy.deepcopy(base)
    whole = model.forward

    def forward_without(past_key_values: Any = None, position_ids: Any = None, attention_mask: Any = None, **inputs: Any) -> Any:
        if past_key_values is not None:
            raise TypeError("no cache here")
        return whole(attention_mask=attention_mask, position_ids=position_ids, **inputs)

    model.forward = forward_without
    items = items_of(5, demonstrations=40)
    same(scores(model, items), naive(base, items))
    assert reuse._KNOWN[model] == "it fails (no cache here)"


def test_a_diverged_model_scores_nan_and_is_not_judged_by_it(base):
    model = copy.deepcopy(base)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    assert all(v != v for values in scores(model, items_of(3)) for v in values)
    assert model not in reuse._KNOWN


@pytest.mark.parametrize(("change", "reason"), [
    ({"_attn_implementation": "eager"}, "sdpa"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "state"),
    ({"alibi": True}, "positions"),
    ({}, None),
])
def test_what_a_configuration_refuses(base, change, reason):
    model = copy.deepcopy(base)
    for key, value in change.items():
        object.__setattr__(model.config, key, value)
    found = reuse.refusal(model)
    assert found is None if reason is None else reason in str(found)


def test_rows_that_share_fit_into_a_window(base):
    model, items = copy.deepcopy(base), items_of(6)
    longest = max(len(prompt) + sum(map(len, choices)) for prompt, choices in items)

    def sums(groups, places):
        return [[-1.0] * places]

    for window, reason in ((longest, None), (longest - 1, "its attention slides over a window")):
        model.config.sliding_window = window
        groups = arrange(Reads.of(items), items, least=0)
        assert reuse.sharing_refused(model, torch.float32, items, groups, sums) == reason


# static shapes


@pytest.mark.parametrize("pass_tokens", [0, 10, 500, 5000, 1e6])
@pytest.mark.parametrize("rows", [1, 9, 400])
def test_a_plan_has_every_row_once_within_its_shape_and_budget(pass_tokens, rows):
    rng = random.Random(rows)
    lengths, extra = [rng.randint(3, 70) for _ in range(rows)], 10
    batches = passes.choose_batches(lengths, 512, pass_tokens, extra)
    assert sorted(i for part, _, _ in batches for i in part) == list(range(rows))
    for part, count, width in batches:
        assert max(lengths[i] for i in part) <= (width or 70) and len(part) <= (count or rows)
        assert len(part) == 1 or (count or len(part)) * (extra + (width or max(lengths[i] for i in part))) <= 512
    assert rows > 1 or batches == [([0], 0, 0)]


def test_captures_pay_where_the_device_would_wait_for_many_batches():
    lengths = [random.Random(1).randint(24, 96) for _ in range(2000)]

    def shapes(pass_tokens: float, rows: int = 2000) -> set[tuple[int, int]]:
        return {(count, width) for _, count, width in passes.choose_batches(lengths[:rows], 4096, pass_tokens)}

    assert 1 <= len(shapes(11000)) <= 3 and (0, 0) not in shapes(11000), "the 135M shape"
    assert shapes(600) == {(0, 0)}, "the 1B shape keeps the device busy"
    assert shapes(11000, rows=100) == {(0, 0)}, "three batches"


@pytest.mark.parametrize("demonstrations", [0, 40])
def test_static_shapes_change_no_score(base, static, demonstrations):
    items = items_of(30, demonstrations)
    expected = naive(base, items)
    scores(base, items[:2])
    shapes = fed(base, lambda: same(scores(base, items, 100), expected))
    assert static and len(set(shapes)) <= 6 < len(shapes), "the same shapes come again"


@pytest.mark.parametrize("demonstrations", [0, 40])
@pytest.mark.parametrize("batch_tokens", [150, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4096))])
def test_the_hand_written_forward_gives_the_same_scores_and_leaves_the_model_as_it_was(model, static, monkeypatch, demonstrations, batch_tokens):
    monkeypatch.setattr(answering, "FEW", 0)
    items = items_of(30, demonstrations)
    before = {name: (p.data_ptr(), p.stride(), p.clone()) for name, p in model.named_parameters()}
    known = type(model).__name__ != "GPT2LMHeadModel" and not getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    plain, whole = [], scoring.logits_at
    monkeypatch.setattr(scoring, "logits_at", lambda *args, **extra: plain.append(1) or whole(*args, **extra))
    same(scores(model, items, batch_tokens), naive(model, items))
    assert bool(plain) is not known, "transformers' own forward runs for what is not known, and only there"
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous() and torch.equal(parameter, before[name][2]) and not parameter.is_inference()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4, "every weight owns its memory again"


def test_a_model_that_somebody_hooked_into_keeps_its_own_forward(base):
    model = copy.deepcopy(base)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(Unsupported, match="model.layers.1.mlp"):
        bind.answering(model, torch.float32)
    with pytest.raises(Unsupported, match="model.layers.1.mlp"):
        bind.bind(model, torch.float32)


def test_a_model_in_training_answers_with_what_it_trains(base, monkeypatch):
    monkeypatch.setattr(answering, "STATIC", ("cpu",))
    model, items = with_lora(base), items_of(3)
    bound = bind.bind(model, torch.float32, dropout=True)
    bound.serve(model)
    bound.buffer.master.mul_(1.5)
    bound.buffer.sync()
    with answering.by_hand(model, torch.float32, CPU, 1) as written:
        assert written is not None and written.llama is bound.llama
        same(scores(model, items), naive(model, items))
    bound.release()
    with answering.by_hand(model, torch.float32, CPU, 1) as written:
        assert written is None


def test_single_token_choices_run_over_static_shapes_without_a_mask(base, static):
    items = [(prompt, [[3], [4], [5]]) for prompt, _ in items_of(60)]
    same(scores(base, items, 200), naive(base, items))
    assert static


def test_a_capture_that_fails_is_noted_once_and_the_scores_stand(base, static, monkeypatch, tokenizer):
    def fails(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Graphs, "capture", fails)
    items = items_of(40)
    notes: list[str] = []
    same(scores(base, items, 100, notes), naive(base, items))
    assert notes == ["choice scoring: eager, because the capture failed (operation not permitted when stream is capturing)"]
    generate(base, [prompt for prompt, _ in items], 4, 100, tokenizer, PAD, CPU, torch.float32, notes)
    assert len(notes) == 2 and notes[1].startswith("generation: eager, because the capture failed")


def test_a_scorers_notes_reach_its_owner(base, tokenizer, monkeypatch):
    from pipeline.core.settings import Task
    from pipeline.data.rows import Encoder

    def noting(*args: Any) -> list[list[float]]:
        args[-3].append("a note")
        return [[-1.0, -2.0]]

    monkeypatch.setattr(scoring, "choice_log_likelihoods", noting)
    task, notes = Task("t", "choice"), ["first"]
    scorer = scoring.Scorer(base, Encoder(tokenizer, task, 64, "truncate"), task, lambda p: p, 512, CPU, torch.float32, notes)
    scorer.predict([{"id": "0", "prompt": "the", "answer": "no", "choices": ["no", "yes"]}])
    assert notes == ["first", "a note"]


# answers in the middle of a training


@pytest.mark.parametrize("technique", ["top_layers", "frozen_embeddings", "lora"])
def test_a_validation_changes_no_step_after_it(overrides, technique, monkeypatch):
    from test_cell import run

    monkeypatch.setattr(answering, "STATIC", ("cpu",))
    monkeypatch.setattr(answering, "FEW", 1)
    words = [f"technique={technique}", "train.engine=fast", "train.epochs=3", "evaluate.latency_rows=0", "evaluate.forgetting=false"]
    words += ["method.top_layers=1"] if technique == "top_layers" else []
    unseen, seen = ([row["loss"] for row in run(overrides, *words, f"train.validations={n}").history] for n in (1, 6))
    assert seen == unseen and len(seen) == 12


def test_a_pinned_models_weights_keep_their_memory_and_answer_as_copies(base):
    model, items = copy.deepcopy(base), items_of(5)
    places = [p.data_ptr() for p in model.parameters()]
    bind.PINNED.add(model)
    bound = bind.answering(model, torch.float32)
    assert [p.data_ptr() for p in model.parameters()] == places
    ids = torch.tensor([items[0][0]])
    last = torch.tensor([0]), torch.tensor([ids.shape[1] - 1])
    with torch.no_grad():
        torch.testing.assert_close(answering.Forward(bound.llama)(ids, *last), model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)
    bound.release()
    assert [p.data_ptr() for p in model.parameters()] == places
    bind.PINNED.discard(model)
    bind.answering(model, torch.float32).release()
    assert [p.data_ptr() for p in model.parameters()] != places


def test_a_pinned_model_with_parts_in_fp32_keeps_its_memory_although_it_cannot_be_bound(base):
    model = copy.deepcopy(base).to(torch.bfloat16)
    model.model.layers[1].mlp.gate_proj.weight.data = model.model.layers[1].mlp.gate_proj.weight.data.float()
    places = [p.data_ptr() for p in model.parameters()]
    bind.PINNED.add(model)
    with pytest.raises(Unsupported, match="float32"):
        bind.answering(model, torch.bfloat16)
    assert [p.data_ptr() for p in model.parameters()] == places


def test_a_pinned_model_without_memory_for_a_copy_answers_by_itself(base, monkeypatch):
    model = copy.deepcopy(base)
    bind.PINNED.add(model)
    monkeypatch.setattr(bind, "free_bytes", lambda _: 1000)
    with pytest.raises(Unsupported, match="no memory for a copy"):
        bind.answering(model, torch.float32)
