"""Scoring against naive loops over full logits, known answers of the metrics, and invariance to batching."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.core.settings import Precision, Task
from pipeline.data.rows import Encoder
from pipeline.models.base import load_model
from pipeline.scoring import scorer as scoring
from pipeline.scoring.answers import headline, score
from pipeline.scoring.reading import canonical, extract
from pipeline.scoring.scorer import Scorer, choice_log_likelihoods, generate, logits_at

CPU = torch.device("cpu")
PAD = 1
VIRTUAL = 5


def adapted(base: Any) -> Any:
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(3)
    return get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)).eval()


@pytest.fixture(scope="module", params=["base", "soft prompt"])
def model(request, tiny):
    base = load_model(tiny / "models" / "smollm2_135m", Precision("fp32"), CPU)
    return base if request.param == "base" else adapted(base)


def random_items(rows: int) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts of mixed length, choices of one to four tokens that share beginnings."""
    rng = random.Random(5)
    items = []
    for _ in range(rows):
        head = [rng.randrange(2, 30) for _ in range(3)]
        choices = [head[:1], head[:2], head, [*head, rng.randrange(2, 30)], [*head[:2], rng.randrange(2, 30)], [rng.randrange(2, 30)]]
        items.append(([rng.randrange(2, 30) for _ in range(rng.randint(1, 20))], rng.sample(choices, rng.randint(2, 6))))
    return items


def naive(model: Any, prompt: list[int], choice: list[int]) -> float:
    """Log-likelihood of one choice from the full logits of one row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *choice]])).logits[0]
    own = logits[logits.shape[0] - len(prompt) - len(choice) :]  # virtual tokens stand in front
    chances = torch.log_softmax(own.double(), -1)
    return sum(float(chances[len(prompt) - 1 + i, token]) for i, token in enumerate(choice))


def choices(model: Any, items: list, batch_tokens: int = 4096) -> list[list[float]]:
    return choice_log_likelihoods(model, items, batch_tokens, PAD, CPU, torch.float32)


def test_choice_log_likelihoods_equal_a_naive_loop(model):
    items = random_items(12)
    for (prompt, options), values in zip(items, choices(model, items), strict=True):
        assert values == pytest.approx([naive(model, prompt, c) for c in options], abs=1e-5)


def test_the_soft_prompt_takes_part(base):
    items = random_items(4)
    plain = choices(base, items)
    model = adapted(base)
    assert choices(model, items)[0] != pytest.approx(plain[0], abs=1e-3)
    assert model(input_ids=torch.tensor([[2, 3]])).logits.shape[1] == 2 + VIRTUAL


@pytest.mark.parametrize("batch_tokens", [1, 37, 200])
def test_batch_size_does_not_change_log_likelihoods(model, batch_tokens):
    items = random_items(12)
    for one, other in zip(choices(model, items, batch_tokens), choices(model, items), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def rows_passed(model: Any, work: Any) -> int:
    """Rows that went through the model in `work`."""
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True)
    try:
        work()
    finally:
        hook.remove()
    return sum(seen)


def test_choices_of_one_token_share_a_pass_over_the_prompt_and_longer_ones_their_beginning(base):
    assert rows_passed(base, lambda: choices(base, [([5, 6, 7], [[8], [9], [10]]), ([5], [[8], [9]])])) == 2
    assert rows_passed(base, lambda: choices(base, [([5, 6, 7], [[8], [8, 9], [8, 9, 10], [8, 9, 11]])])) == 1
    few = [([5, 6, 7, 8, 9, 10, 11, 12], [[8, 9], [10]])]
    assert rows_passed(base, lambda: choices(base, few)) == 1


def test_an_empty_choice_has_log_likelihood_0(base):
    (values,) = choices(base, [([5, 6], [[], [7]])])
    assert values[0] == 0 and values[1] < 0


def test_only_the_chosen_positions_reach_the_output_layer_and_the_hook_is_taken_off(model):
    ids = torch.randint(2, 30, (3, 7))
    rows, cols = torch.tensor([0, 2, 2]), torch.tensor([6, 0, 3])
    head, shapes = model.get_output_embeddings(), []
    watch = head.register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape)))
    with torch.no_grad():
        actual, full = logits_at(model, ids, rows, cols), model(input_ids=ids).logits[:, -7:]
    watch.remove()
    assert shapes[0][0] == 3 and actual.shape == (3, full.shape[-1]) and actual.dtype == torch.float32
    torch.testing.assert_close(actual, full[rows, cols], atol=1e-5, rtol=0)
    with pytest.raises(IndexError):
        logits_at(model, ids, rows, cols + 100)
    assert not head._forward_pre_hooks


def naive_greedy(model: Any, prompt: list[int], count: int, end: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + count:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == end:
                break
    return ids[len(prompt) :]


def generated(model: Any, tokenizer: Any, prompts: list[list[int]], count: int, batch_tokens: int = 4096) -> list[str]:
    return generate(model, prompts, count, batch_tokens, tokenizer, PAD, CPU, torch.float32)


@pytest.mark.parametrize("count", [4, 24])
@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_generation_equals_a_naive_greedy_loop_row_by_row(model, tokenizer, count, batch_tokens):
    prompts = [prompt for prompt, _ in random_items(8)]
    expected = [tokenizer.decode(naive_greedy(model, p, count, tokenizer.eos_token_id), skip_special_tokens=True) for p in prompts]
    assert len(set(expected)) > 1
    assert generated(model, tokenizer, prompts, count, batch_tokens) == expected


def test_an_answer_that_ends_early_comes_without_its_prompt(model, tokenizer):
    prompt = [5, 6, 7]
    tokens = naive_greedy(model, prompt, 8, -1)
    end = next(t for t in tokens[1:] if t != tokens[0])
    stops = SimpleNamespace(eos_token_id=end, batch_decode=tokenizer.batch_decode)
    (text,) = generated(model, stops, [prompt], 40)
    assert text == tokenizer.decode(tokens[: tokens.index(end) + 1], skip_special_tokens=True)


def task(**changes: Any) -> Task:
    return Task(**{"name": "t", "scoring": "choice", **changes})


def scorer(model: Any, tokenizer: Any, settings: Task, batch_tokens: int = 4096, prompt: Any = lambda p: p) -> Scorer:
    return Scorer(model, Encoder(tokenizer, settings, 64, "truncate"), settings, prompt, batch_tokens, CPU, torch.float32)


ROWS = [
    {"id": str(i), "prompt": f"Review: {' '.join(['film', 'plot', 'cast'][: 1 + i % 3])}\nSentiment:", "answer": "positive",
     "choices": ["negative", "positive", "the film", "the film story"]}
    for i in range(9)
]


@pytest.mark.parametrize("kind", ["choice", "generate"])
def test_batch_size_does_not_change_predictions(model, tokenizer, kind):
    settings = task(scoring=kind, max_new_tokens=6)
    whole, single = (scorer(model, tokenizer, settings, n).predict(ROWS) for n in (4096, 1))
    assert [p["prediction"] for p in whole] == [p["prediction"] for p in single]
    assert [p["id"] for p in whole] == [r["id"] for r in ROWS]


def test_the_scores_of_a_prediction_are_those_of_its_text(base, tokenizer):
    (actual,) = scorer(base, tokenizer, task()).predict(ROWS[2:3])
    ids = tokenizer(ROWS[2]["prompt"])["input_ids"]
    for choice, value in actual["scores"].items():
        assert value == pytest.approx(naive(base, ids, tokenizer(" " + choice)["input_ids"]), abs=1e-5)
    assert actual["prediction"] == max(actual["scores"], key=actual["scores"].get)


def test_the_technique_words_the_prompt(base, tokenizer):
    plain, worded = (
        scorer(base, tokenizer, task(), prompt=p).predict(ROWS[:1])[0]["scores"] for p in (lambda p: p, lambda p: f"story scene {p}")
    )
    assert plain != worded


def test_length_normalisation_picks_the_likelier_character(monkeypatch, base, tokenizer):
    monkeypatch.setattr(scoring, "choice_log_likelihoods", lambda *_: [[-4.0, -5.0]])
    row = {"id": "0", "prompt": "the", "answer": "certainly", "choices": ["no", "certainly"]}
    (total,) = scorer(base, tokenizer, task()).predict([row])
    (each,) = scorer(base, tokenizer, task(length_normalised=True)).predict([row])
    assert (total["prediction"], total["correct"]) == ("no", False)
    assert (each["prediction"], each["correct"]) == ("certainly", True)
    assert total["scores"] == each["scores"] == {"no": -4.0, "certainly": -5.0}


def test_no_rows_no_predictions(base, tokenizer):
    assert scorer(base, tokenizer, task()).predict([]) == []


@pytest.mark.parametrize(("output", "pattern", "answer"), [
    (" 7 apples\nand more", None, "7 apples"),
    ("\n\n", None, None),
    ("So 3 + 4 = 7.", r"-?\d+", "7"),
    ("nothing here", r"-?\d+", None),
    ("The answer is (b). The answer is (c).", r"answer is \((\w)\)", "c"),
    ("x = -1,000.5", r"-?\d[\d,]*(?:\.\d+)?", "-1,000.5"),
    ("yes", r"(no)|yes", "yes"),
])
def test_answers_are_extracted(output, pattern, answer):
    assert extract(output, pattern) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("42", "42.0", True),
        ("1,000", "1000", True),
        ("42.", "42", True),
        ("-3", "3", False),
        ("0.5", ".5", True),
        (".5", "5", False),
        ("Positive", "positive.", True),
        ("  new   york ", "New York", True),
        ("1e3", "1000", True),
        ("seven", "7", False),
        ("3.0001", "3", False),
    ],
)
def test_answers_are_compared_in_a_canonical_form(one, other, same):
    assert (canonical(one) == canonical(other)) is same


def chosen(pairs: list[tuple[str, str]], labels: str = "abc") -> list[dict]:
    """(answer, prediction) pairs as choice predictions; the right answer has log-likelihood -1."""
    return [{"id": str(i), "answer": a, "prediction": p, "correct": a == p, "scores": {c: -1.0 if c == a else -2.0 for c in labels}}
            for i, (a, p) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("hits", "rows", "low", "high"), [(8, 10, 0.490, 0.943), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (150, 200, 0.686, 0.805)]
)
def test_wilsons_interval(hits, rows, low, high):
    actual = score(chosen([("a", "a" if i < hits else "b") for i in range(rows)]), task())
    assert (actual.rows, actual.accuracy) == (rows, pytest.approx(hits / rows))
    assert (actual.accuracy_low, actual.accuracy_high) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))


def test_macro_f1_is_the_mean_over_classes():
    # a: 2 of 3 found, nothing else called a -> F1 0.8; b: 1 of 1, called twice -> 2/3; c: never right, never called -> 0
    actual = score(chosen([("a", "a"), ("a", "a"), ("a", "b"), ("b", "b")]), task())
    assert actual.macro_f1 == pytest.approx((0.8 + 2 / 3 + 0) / 3)
    assert actual.accuracy == 0.75 and actual.nll == pytest.approx(1.0) and actual.unanswered == 0
    assert headline(actual, "macro_f1") == actual.macro_f1 and headline(actual, "accuracy") == 0.75


def test_macro_f1_is_null_where_the_choices_differ_by_row():
    actual = score([*chosen([("a", "a")]), *chosen([("x", "y")], "xyz")], task())
    assert actual.macro_f1 is None and actual.accuracy == 0.5
    assert headline(actual, "macro_f1") == 0.5


def written(pairs: list[tuple[str, str | None, str]]) -> list[dict]:
    return [
        {"id": "0", "answer": a, "prediction": p, "correct": p is not None and canonical(p) == canonical(a), "output": o}
        for a, p, o in pairs
    ]


def test_generated_answers_count_as_wrong_where_there_is_none():
    actual = score(written([("7", "7.0", "7.0"), ("7", None, ""), ("8", "9", "9"), ("10", "10", "10")]), task(scoring="generate"))
    assert (actual.accuracy, actual.unanswered, actual.nll, actual.macro_f1, actual.rouge_l) == (0.5, 1, None, None, None)


def test_rouge_l_of_known_texts():
    pairs = [("the cat sat", "the cat", "the cat"), ("a dog", None, "")]
    actual = score(written(pairs), task(scoring="generate", metric="rouge_l"))
    assert actual.rouge_l == pytest.approx((2 * (2 / 2) * (2 / 3) / (1 + 2 / 3) + 0) / 2)
    assert headline(actual, "rouge_l") == actual.rouge_l


def test_a_teachers_answers_have_no_scores_and_no_output():
    answers = [
        {"id": "0", "answer": "positive", "prediction": "Positive", "correct": True},
        {"id": "1", "answer": "negative", "prediction": "", "correct": False},
    ]
    actual = score(answers, task())
    assert (actual.accuracy, actual.macro_f1, actual.nll) == (0.5, None, None)
    assert actual.accuracy_low < 0.5 < actual.accuracy_high
    assert score(answers, task(scoring="generate", metric="rouge_l")).rouge_l == pytest.approx(0.5)
