"""What techniques are expected to score where they were not measured: known answers, coverage under the model, repeatable."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pipeline.stats import transfer as module
from pipeline.stats.transfer import Level, transfer

NAMES = [f"t{k}" for k in range(8)]


def world(rng: np.random.Generator, tasks: int = 4, bases: int = 2) -> dict[tuple[str, str, str], float]:
    """Tasks 20 points apart, bases 5, techniques 6, and 2 more from place to place."""
    of_task, of_base, of_name = rng.normal(0.5, 0.2, tasks), rng.normal(0, 0.05, bases), rng.normal(0, 0.06, len(NAMES))
    return {
        (f"task{t}", f"base{b}", name): of_task[t] + of_base[b] + of_name[k] + rng.normal(0, 0.02)
        for t in range(tasks) for b in range(bases) for k, name in enumerate(NAMES)
    }


def levels(values: dict[tuple[str, str, str], float], sd: float = 0.01) -> list[Level]:
    return [Level(*place, value, sd**2) for place, value in values.items()]


def test_without_a_run_there_the_level_is_open_and_with_one_the_rest_follows():
    truth = world(np.random.default_rng(5))
    hidden = [place for place in truth if place[0] == "task3"]
    rest = {place: value for place, value in truth.items() if place not in hidden}
    before = transfer(levels(rest), hidden)
    anchor = ("task3", "base1", "t0")
    after = transfer(levels({**rest, anchor: truth[anchor]}), hidden)
    for place in hidden:
        if place[1] == "base1" and place != anchor:
            (low, high), (left, right) = before.interval(place, 1e-4), after.interval(place, 1e-4)
            assert high - low > 0.5 and right - left < 0.5 * (high - low)
            assert abs(after.value(place) - truth[place]) < 0.12, "techniques are 6 points apart, and 2 from place to place"


def test_what_was_measured_there_is_expected_there():
    truth = world(np.random.default_rng(6))
    place = ("task0", "base0", "t3")
    found = transfer(levels(truth, 0.001), [place])
    assert found.value(place) == pytest.approx(truth[place], abs=0.003)
    low, high = found.interval(place, 0.02**2)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.02, rel=0.1), "its own variance is what is left"


def test_gaps_are_surer_than_levels():
    truth = world(np.random.default_rng(7))
    rest = {place: value for place, value in truth.items() if place[0] != "task2"}
    best, worst = (choose(NAMES, key=lambda name: sum(v for p, v in rest.items() if p[2] == name)) for choose in (max, min))
    one, other = ("task2", "base0", best), ("task2", "base0", worst)
    found = transfer(levels(rest), [one, other])
    mean, low, high = found.gap(one, other)
    assert low < truth[one] - truth[other] < high and low > 0 and mean == pytest.approx(found.value(one) - found.value(other))
    assert high - low < 0.5 * np.subtract(*found.interval(one, 0.0)[::-1])


def test_the_conditional_is_that_of_two_normal_values():
    """One measured, one asked for, covariance c: mean c / (v + noise) · y, variance v - c² / (v + noise)."""
    mean, left = module._conditional(np.array([[4.0, 3.0], [3.0, 5.0]]), np.array([2.0]), np.array([1.0]))
    assert mean[0] == pytest.approx(0.5 + 3 / 5 * 2, abs=1e-6) and left[0, 0] == pytest.approx(5 - 9 / 5, abs=1e-6)


def test_the_covariance_is_the_models_and_a_place_scales_what_is_the_techniques_own():
    values = [("a", "x", "k"), ("a", "y", "k"), ("b", "x", "k"), ("a", "x", "m")]
    places = sorted({value[:2] for value in values})
    sds, scales = np.array([0.2, 0.1, 0.05, 0.06, 0.04, 0.03, 0.02]), np.array([0.0, 2.0, 0.0])  # of a x, a y, b x
    actual = module._Model(values, places).covariance(np.concatenate([np.log(sds), scales])) - module.LEVEL**2
    task, base, place, technique, with_task, with_base, rest = sds**2
    wide = math.exp(module.SCALE * 2.0)
    assert actual[0, 0] == pytest.approx(task + base + place + technique + with_task + with_base + rest)
    assert actual[1, 1] == pytest.approx(task + base + place + wide**2 * (technique + with_task + with_base + rest))
    assert actual[0, 1] == pytest.approx(task + wide * (technique + with_task)) and actual[0, 2] == pytest.approx(base + technique + with_base)
    assert actual[0, 3] == pytest.approx(task + base + place)


@pytest.mark.slow
def test_intervals_hold_under_the_model():
    """Of 24 worlds' hidden task on a base where one technique was measured."""
    inside, widths = [], []
    for seed, anchor in zip(range(24), itertools.cycle(NAMES), strict=False):
        rng = np.random.default_rng(100 + seed)
        truth = world(rng, tasks=4)
        asked = [place for place in truth if place[:2] == ("task3", "base0") and place[2] != anchor]
        known = {place: value + rng.normal(0, 0.01) for place, value in truth.items() if place[0] != "task3" or place[1:] == ("base0", anchor)}
        found = transfer(levels(known), asked)
        for place in asked:
            low, high = found.interval(place, 1e-4)
            inside.append(low < truth[place] + rng.normal(0, 0.01) < high)
            widths.append(high - low)
    assert np.mean(inside) > 0.92 and np.mean(widths) < 0.36, (np.mean(inside), np.mean(widths))


def test_the_same_evidence_says_the_same_and_none_says_nothing():
    truth = world(np.random.default_rng(8), tasks=2)
    asked = [("new", "base0", "t1")]
    assert transfer(levels(truth), asked).interval(asked[0], 0.0) == transfer(levels(truth), asked).interval(asked[0], 0.0)
    with pytest.raises(ValueError, match="nothing was measured"):
        transfer([], asked)
