"""Many choices as a tree: the answers and scores of feeding every choice, with fewer tokens; soft prompts are fed once."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from architectures import random_model
from scoring_models import CPU, PAD, items_of, of_kind, with_prompt
from test_fast_scoring import fed, naive, scores, tokens

from pipeline.data import choices
from pipeline.data.choices import Contest
from pipeline.engine import reuse
from pipeline.engine.branches import Search, Tree
from pipeline.scoring.scorer import choice_log_likelihoods


def many(rows: int, count: int = 40, demonstrations: int = 0, seed: int = 3) -> list:
    """Prompts of mixed length, and the same choices of one to six tokens for all, among them beginnings of others."""
    rng = random.Random(seed)
    some = {tuple(rng.randrange(2, 31) for _ in range(rng.randint(2, 5))) for _ in range(count)}
    listed = [list(one) for one in sorted(some)]
    listed += [listed[0][:1], listed[1][:2], [*listed[2], 7]]
    listed = [list(one) for one in dict.fromkeys(map(tuple, listed))]
    shots = [rng.randrange(2, 31) for _ in range(demonstrations)]
    return [([*shots, *(rng.randrange(2, 31) for _ in range(rng.randint(3, 20)))], listed) for _ in range(rows)]


def contest_of(items: list, seed: int = 0) -> Contest:
    rng = random.Random(seed)
    return Contest([[len(c) for c in listed] if seed else [1] * len(listed) for _, listed in items], [rng.randrange(len(listed)) for _, listed in items])


def searched(model: Any, items: list, contest: Contest, batch_tokens: int = 4096) -> list[list[float]]:
    return choice_log_likelihoods(model, items, batch_tokens, PAD, CPU, torch.float32, contest=contest)


def check(model: Any, items: list, contest: Contest, found: list[list[float]]) -> int:
    """Hold scores against those of every choice fed (which tests/test_fast_scoring.py holds against a naive loop); how many were given up."""
    given_up = 0
    for values, expected, lengths, needed in zip(found, scores(model, items), contest.lengths, contest.needed, strict=True):
        best = max(range(len(values)), key=lambda i: values[i] / lengths[i])  # noqa: B023 (used at once)
        assert best == max(range(len(values)), key=lambda i: expected[i] / lengths[i])  # noqa: B023
        assert values[best] == pytest.approx(expected[best], abs=1e-4) and values[needed] == pytest.approx(expected[needed], abs=1e-4)
        bounds = [i for i, (one, other) in enumerate(zip(values, expected, strict=True)) if abs(one - other) > 1e-4]
        assert all(values[i] > expected[i] and values[i] / lengths[i] < values[best] / lengths[best] for i in bounds)
        given_up += len(bounds)
    return given_up


@pytest.mark.parametrize("normalised", [0, 1])
@pytest.mark.parametrize("demonstrations", [0, 40])
@pytest.mark.parametrize("kind", ["base", "lora", "soft prompt", "prefix", "gpt2"])
def test_the_answers_of_feeding_every_choice(kind, base, demonstrations, normalised):
    model = with_prefix(base) if kind == "prefix" else of_kind(kind, base)
    items = many(9, demonstrations=demonstrations)
    contest = contest_of(items, normalised)
    for batch_tokens in (200, 4096):
        assert check(model, items, contest, searched(model, items, contest, batch_tokens)) > 20


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", "phi3", "gpt_neox", "mistral"])
def test_other_architectures(architecture):
    model = random_model(architecture).eval()
    items = [([token % model.config.vocab_size for token in prompt], listed) for prompt, listed in many(5)]
    check(model, items, contest_of(items), searched(model, items, contest_of(items)))


def test_nothing_is_given_up_where_every_score_is_wanted(base):
    items = many(6)
    for values, expected in zip(scores(base, items), naive(base, items), strict=True):
        assert values == pytest.approx(expected, abs=1e-5)


def test_few_choices_are_fed_as_ever(base, monkeypatch):
    items = items_of(6)
    monkeypatch.setattr("pipeline.engine.branches.BranchScorer.scores", lambda *_: pytest.fail("few choices are no search"))
    assert searched(base, items, contest_of(items)) == scores(base, items)


def test_choices_that_cannot_win_are_not_fed(base):
    items = many(24, count=80)
    contest = contest_of(items)
    searched(base, items, contest)  # once to learn that the model may share
    all_tokens, few = (tokens(fed(base, work)) for work in (lambda: scores(base, items), lambda: searched(base, items, contest)))
    assert few < all_tokens / 2


def test_a_model_that_may_not_share_is_not_searched(base, monkeypatch):
    monkeypatch.setattr("pipeline.scoring.scorer.sharing_refused", lambda *_, **__: "no", raising=False)
    monkeypatch.setattr(reuse, "sharing_refused", lambda *_, **__: "no")
    items = many(4)
    for values, expected in zip(searched(base, items, contest_of(items)), naive(base, items), strict=True):
        assert values == pytest.approx(expected, abs=1e-4)


def test_a_row_whose_scores_are_not_finite_has_none(base):
    search = Search(Tree([[3, 4], [5]]), [1, 1], 0)
    search.read(0, [float("nan"), -1.0])
    assert search.next() == [] and np.isnan(search.scores()).all()


def test_the_search_follows_the_likeliest_choice_then_what_could_still_win():
    tree = Tree([[3, 4, 5], [3, 6], [7, 8], [9, 10]])
    search = Search(tree, [1] * 4, None)
    search.read(0, [-1.0, -2.0, -9.0])  # the first tokens 3, 7 and 9
    assert search.next() == [1, 2]  # 3 and 3 4, of the likeliest choice
    search.columns |= {1: 0, 2: 1}
    search.read(1, [-1.0, -5.0])
    search.read(2, [-1.0])
    assert search.next() == [tree.paths[2, 1]], "7 could still be better than -3, 9 could not; 3 6 is known"
    search.columns[int(tree.paths[2, 1])] = 2
    search.read(int(tree.paths[2, 1]), [-0.5])
    assert search.next() == [] and search.scores() == [-3.0, -6.0, -2.5, -9.0]


def with_prefix(base: Any) -> Any:
    import copy

    from peft import PrefixTuningConfig, get_peft_model

    torch.manual_seed(4)
    return get_peft_model(copy.deepcopy(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()


@pytest.mark.parametrize("demonstrations", [0, 40])
@pytest.mark.parametrize("make", [with_prompt, with_prefix])
def test_a_soft_prompt_is_fed_once_for_all_rows(base, make, demonstrations):
    model, items = make(base), items_of(12, demonstrations)
    scores(model, items)
    seen = []
    hook = model.get_base_model().register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    found = scores(model, items)
    hook.remove()
    whole = [one for one in seen if one.get("past_key_values") is None and one.get("inputs_embeds") is not None]
    assert not whole, "no row brings the soft prompt with it"
    for values, expected in zip(found, naive(model, items), strict=True):
        assert values == pytest.approx(expected, abs=1e-5)
    assert max(len(listed) for _, listed in items) < choices.MANY
