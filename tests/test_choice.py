"""pipeline/search/choice.py: which of a search's trials is taken; and the replay that the choice rests on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rates_choice
from pipeline.search import choice
from pipeline.search.space import Parameter, Space

SPACE = Space({"train.lr": Parameter(low=1e-5, high=1e-3, log=True)})


def trials(*found: tuple[float, float | None], rows: int | None = 100, nll: float | None = None) -> list[dict[str, Any]]:
    return [{"params": {"train.lr": lr}, "validation": value, "nll": nll, "validation_rows": rows} for lr, value in found]


def rate(found: list[dict[str, Any]], own: float, space: Space = SPACE) -> float:
    taken = choice.taken(found, space, {"train.lr": own})
    assert taken is not None
    return float(taken["params"]["train.lr"])


def test_of_what_lies_within_a_standard_error_the_nearest_is_taken():
    found = trials((1e-5, 0.40), (1e-4, 0.46), (3e-4, 0.50), (1e-3, 0.49))  # a standard error of 5 points
    assert rate(found, 1e-4) == 1e-4 and rate(found, 1e-3) == 1e-3 and rate(found, 1e-5) == 1e-4
    assert rate(trials((1e-5, 0.40), (1e-4, 0.44), (3e-4, 0.50)), 1e-5) == 3e-4, "what is told apart by more is not held back"
    assert rate(trials((1e-4, 0.46), (3e-4, 0.50), rows=10_000), 1e-4) == 3e-4
    assert rate(trials((1e-4, 0.46), (3e-4, 0.50), rows=None), 1e-4) == 3e-4, "without a number of rows the highest is"


def test_of_equally_near_ones_the_higher_is_taken_then_the_lower_loss():
    assert rate(trials((1e-5, 0.48), (1e-3, 0.50)), 1e-4) == 1e-3
    equal = [*trials((1e-5, 0.5), nll=0.9), *trials((1e-3, 0.5), nll=0.4)]
    assert rate(equal, 1e-4) == 1e-3 and rate(equal[::-1], 1e-4) == 1e-3


def test_trials_without_a_value_are_passed_over():
    assert rate(trials((1e-4, None), (1e-3, 0.3)), 1e-4) == 1e-3
    assert choice.taken(trials((1e-4, None)), SPACE, {"train.lr": 1e-4}) is None and choice.highest([]) is None


def test_the_standard_error_is_the_binomial_s():
    assert choice.standard_error(0.5, 100) == pytest.approx(0.05) and choice.standard_error(1.0, 100) == 0.0
    assert choice.standard_error(-3.0, 100) == 0.0 == choice.standard_error(0.5, None)


@pytest.mark.parametrize(("parameter", "one", "other", "distance"), [
    (Parameter(low=1e-5, high=1e-3, log=True), 1e-5, 1e-4, 0.5),
    (Parameter(low=1e-5, high=1e-3, log=True), 1e-3, 1e-2, 0.5),
    (Parameter(low=0.0, high=0.4), 0.1, 0.2, 0.25),
    (Parameter(choices=(1, 4, 16)), 4, 16, 0.5),
    (Parameter(choices=(0, 2, 4)), 0, 1, 0.25),
    (Parameter(choices=("linear", "cosine")), "linear", "cosine", 1.0),
    (Parameter(choices=(False, True)), True, True, 0.0),
    (Parameter(choices=(8,)), 8, 16, 1.0),
    (Parameter(low=1, high=8), None, 8, 1.0),
])
def test_a_distance_is_a_share_of_the_range(parameter, one, other, distance):
    assert parameter.distance(one, other) == pytest.approx(distance) == parameter.distance(other, one)


def test_distances_over_several_parameters_add_up():
    space = Space({"train.lr": Parameter(low=1e-5, high=1e-3, log=True), "r": Parameter(choices=(1, 4, 16)), "alpha": Parameter(times=2, of="r")})
    assert space.distance({"train.lr": 1e-4, "r": 16}, {"train.lr": 1e-5, "r": 4}) == pytest.approx(1.0)


# the replay


def test_the_replay_knows_luck_from_skill():
    """Test rows are the same at every rate but the first, validation rows differ by luck alone: the highest is no better than the nearest."""
    rows = [{"technique": "full", "model": "qwen2_0_5b", "task": "cqa", "lr": lr, "seed": seed,
             "validation": {"right": 50 + (7 * i + 3 * seed) % 5, "rows": 100, "nll": 1.0}, "test": {"right": 10 if i == 0 else 60, "rows": 100}}
            for seed in (0, 1) for i, lr in enumerate(3 * 10 ** (-7 + k / 2) for k in range(7))]
    found = rates_choice.grids(rows)
    assert len(found) == 2 and all(len(trials) == 7 for trials in found.values())
    for name in ("the highest", "within a standard error, the nearest"):
        one = rates_choice.judged(found, rates_choice.RULES[name], rates_choice.STARTS["the defaults"])
        assert (one["below"], one["above"], one["elsewhere"], one["worse"], one["better"]) == (0, 0, 0, 0, 0)
    bad = rates_choice.judged(found, rates_choice.RULES["no search"], lambda *_: 1e-9)
    assert bad["below"] == pytest.approx(50) and bad["above"] == 0


@pytest.mark.slow
def test_on_the_measured_grids_the_highest_loses_to_the_nearest_on_another_seed():
    rows = [json.loads(line) for line in Path("experiments/rates/cells.jsonl").read_text().splitlines()]
    found, start = rates_choice.grids(rows), rates_choice.STARTS["the defaults"]
    highest, nearest = (rates_choice.judged(found, rates_choice.RULES[name], start) for name in ("the highest", "within a standard error, the nearest"))
    assert nearest["elsewhere"] > highest["elsewhere"] and nearest["below"] < highest["below"] and nearest["worse"] < highest["worse"]
    assert Path("experiments/rates/choice.md").read_text().endswith(rates_choice.table(rows)) and math.isfinite(nearest["below"])
