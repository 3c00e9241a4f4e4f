"""Techniques told apart: what is known exactly, what more seeds and more rows change, letters, and the level by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import norm

from benchmarks.tiers import MIXED, Setting, simulate
from pipeline.stats.tiers import FEW, Spreads, Technique, compare, correct, holm, letters, pairs_of, sign_flip


def runs(*accuracies: float, rows: int = 1000, seed: int = 0) -> dict[int, dict[str, bool]]:
    """One run an accuracy, each answering random rows right."""
    rng = np.random.default_rng(seed)
    return {i: {str(r): bool(hit) for r, hit in enumerate(rng.permutation(rows) < accuracy * rows)} for i, accuracy in enumerate(accuracies)}


def test_one_seed_is_tested_over_the_rows_exactly():
    one, other = runs(0.6, seed=1), runs(0.5, seed=2)
    actual = compare({"a": one, "b": other})
    assert actual is not None and not actual.covers_seeds and actual.best == "a" and actual.rows == 1000
    exact = sign_flip([one[0][i] - other[0][i] for i in one[0]])
    assert actual.between("a", "b").p == pytest.approx(exact) and actual.between("a", "b").difference == pytest.approx(0.1)
    back = actual.between("b", "a")
    assert (back.difference, back.low) == (pytest.approx(-0.1), pytest.approx(-actual.between("a", "b").high))


def test_seeds_that_agree_leave_the_rows_and_seeds_that_differ_take_away_what_is_told():
    steady = compare({"a": runs(0.6, 0.6, 0.6, 0.6, 0.6, seed=1), "b": runs(0.5, 0.5, 0.5, 0.5, 0.5, seed=2)})
    shaky = compare({"a": runs(0.7, 0.5, 0.6, 0.68, 0.52, seed=1), "b": runs(0.6, 0.4, 0.5, 0.58, 0.42, seed=2)})
    assert steady is not None and shaky is not None and steady.covers_seeds
    assert steady.pairs["a", "b"].significant and not shaky.pairs["a", "b"].significant
    assert shaky.means == pytest.approx(steady.means) and shaky.pairs["a", "b"].high > steady.pairs["a", "b"].high


def test_the_same_answers_are_no_difference_and_repeats_of_a_fixed_technique_are_one_run():
    same = runs(0.5)[0]
    actual = compare({"a": {0: same, 1: same, 2: same}, "b": {0: same}, "c": runs(0.5, 0.52, seed=4)}, fixed=["b"])
    assert actual is not None and actual.pairs[tuple(n for n in actual.means if n != "c")].p == 1.0  # type: ignore[index]
    repeated = Technique.of(np.array([[1.0, 0.0, 1.0]] * 3))
    assert (repeated.seeds, len(repeated.right)) == (0, 1) and Technique.of(np.array([[1.0, 0.0, 1.0]])).seeds == 1


def test_with_many_seeds_the_spread_is_as_good_as_known():
    sigma = 0.02
    spreads = Spreads.from_variances([sigma**2] * 4, [2000] * 4, [0.0] * 4)
    added, weights = spreads.mixture(0, 1, 5, 5)
    assert weights.sum() == pytest.approx(1.0)
    assert float((added * weights).sum()) == pytest.approx(2 * sigma**2 / 5, rel=0.1)
    assert spreads.mixture(0, 1, 0, 0)[0].max() == 0.0


def test_what_other_techniques_tell_of_the_spread_counts():
    """A technique with one seed takes its spread from the others; a few wild seeds of another make it less sure."""
    calm, wild = (Spreads.from_variances([0.0, sigma**2, sigma**2, sigma**2], [0, 4, 4, 4], [0.0] * 4) for sigma in (0.005, 0.05))
    means = [float((added * weights).sum()) for added, weights in (s.mixture(0, 1, 1, 5) for s in (calm, wild))]
    assert means[0] < means[1] / 5


def test_p_values_are_of_the_normal_where_only_the_rows_vary():
    rng = np.random.default_rng(3)
    one, other = (np.repeat((rng.random((1, 4000)) < p).astype(float), 2, 0) for p in (0.52, 0.5))
    third = (rng.random((3, 4000)) < 0.5).astype(float)
    p = pairs_of([Technique.of(one), Technique.of(other), Technique.of(third)])[0].p
    d = one[0] - other[0]
    assert p == pytest.approx(2 * norm.sf(abs(d.mean()) / (d.std(ddof=1) / 4000**0.5)), rel=1e-6)


def test_rows_that_not_all_answered_do_not_count_and_nobody_is_compared_over_none():
    actual = compare({"a": {0: {"x": True, "y": True}}, "b": {0: {"y": False, "z": True}}, "c": {}})
    assert actual is not None and actual.rows == 1 and set(actual.means) == {"a", "b"} and actual.means == {"a": 1.0, "b": 0.0}
    assert compare({"a": {0: {"x": True}}, "b": {0: {"y": True}}}) is None and compare({}) is None


@pytest.mark.parametrize("seed", range(20))
def test_letters_are_shared_by_exactly_those_that_are_not_apart(seed):
    rng = np.random.default_rng(seed)
    names = [str(i) for i in range(7)]
    apart = [pair for pair in itertools.combinations(names, 2) if rng.random() < 0.45]
    actual = letters(names, apart)
    for one, other in itertools.combinations(names, 2):
        assert bool(set(actual[one]) & set(actual[other])) is ((one, other) not in apart)
    assert all(actual.values()) and "a" in actual["0"]


def test_letters_of_known_cases():
    assert letters(["x", "y", "z"], []) == {"x": "a", "y": "a", "z": "a"}
    assert letters(["x", "y", "z"], [("x", "z")]) == {"x": "a", "y": "ab", "z": "b"}
    assert letters(["x", "y", "z"], [("x", "y"), ("x", "z"), ("y", "z")]) == {"x": "a", "y": "b", "z": "c"}


def test_few_techniques_are_corrected_by_holm_and_many_by_benjamini_and_hochberg():
    raw = [0.01, 0.04, 0.03, 0.9]
    assert correct(raw, FEW) == holm(raw)
    assert correct(raw, FEW + 1) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.9])  # 4p / rank, not above what follows


@pytest.mark.slow
def test_a_technique_far_behind_is_told_apart_among_many_with_one_seed_each():
    several = {f"s{i}": runs(0.55, 0.56, 0.565, seed=i) for i in range(6)}
    single = {f"o{i}": runs(0.56, seed=20 + i) for i in range(24)} | {"behind": runs(0.25, seed=50)}
    actual = compare(several | single)
    assert actual is not None and not set(actual.letters["behind"]) & set(actual.letters[actual.best])
    assert len({actual.letters[f"o{i}"] for i in range(24)}) == 1, "equal ones share their letters"


@pytest.mark.slow
def test_of_the_differences_told_among_many_techniques_few_are_false():
    assert simulate(Setting(FEW + 2, 3, 1000, 1.0, 5.0, (FEW + 2) // 2), 150, 1)["false"] <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("setting", [Setting(2, 3, 1000, 2.0), Setting(6, 3, 1000, 1.0), Setting(6, 2, 200, MIXED), Setting(2, 5, 200, 0.5)])
def test_the_same_technique_twice_is_separated_in_at_most_five_in_a_hundred(setting):
    assert simulate(setting, 400, 1)["any"] <= 0.05 + 2 * (0.05 * 0.95 / 400) ** 0.5


@pytest.mark.slow
def test_five_points_are_seen_where_seeds_agree_and_rows_are_many():
    assert simulate(Setting(6, 5, 10_000, 0.5, 5.0), 50, 1)["first"] > 0.95
