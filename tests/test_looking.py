"""Looking as often as one likes: chances over fixed looks, the gap of two techniques, and the confidence sequence without a model."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from pipeline.stats import betting
from pipeline.stats.looking import LOOKS, NONE, PSEUDO, Answers, critical, log_ever_crossed


def chance(z: float, ratio: float, looks: tuple[int, ...] = LOOKS) -> float:
    return float(np.exp(log_ever_crossed(np.array([z]), np.array([ratio]), looks))[0])


def test_where_the_rows_dominate_all_looks_are_one():
    assert chance(2.0, 1e-3) == pytest.approx(norm.sf(2.0), rel=0.1)


def test_where_seeds_dominate_looks_add_up_at_most():
    assert norm.sf(3.0) < chance(3.0, 1e5) <= len(LOOKS) * norm.sf(3.0) * 1.01
    assert chance(2.5, 1e5) > chance(2.5, 1.0) > chance(2.5, 1e-3)


@pytest.mark.parametrize("ratio", [0.01, 1.0, 30.0])
def test_the_chance_that_is_told_holds_the_one_that_is_simulated(ratio):
    rng = np.random.default_rng(0)
    looks, draws = (1, 2, 4, 8), 200_000
    seeds = np.sqrt(ratio) * rng.standard_normal((draws, looks[-1])).cumsum(1)
    means = rng.standard_normal(draws)[:, None] + np.array([seeds[:, s - 1] / s for s in looks]).T
    for z in (1.5, 2.5):
        crossed = float((means > z * np.sqrt(1 + ratio / np.array(looks))).any(1).mean())
        assert crossed <= chance(z, ratio, looks) * 1.03 <= 1.25 * crossed


def test_what_is_critical_is_crossed_with_that_chance():
    assert chance(float(critical(0.003, np.array([3.0]))[0]), 3.0) == pytest.approx(0.003, rel=0.05)
    assert chance(-1.0, 1.0) == 1.0


def answers_of(levels: list[float], seeds: int, rows: int = 1000, spread: float = 0.01, these: bool = False) -> Answers:
    rng = np.random.default_rng(1)
    answers, hard = Answers(len(levels), rows, LOOKS, these), rng.random(rows)
    for k, level in enumerate(levels):
        for _ in range(seeds):
            answers.add(k, (hard + 0.1 * rng.standard_normal(rows) < level + spread * rng.standard_normal()).astype(float))
    return answers


def test_a_gap_is_symmetric_and_small_chances_go_with_large_differences():
    answers = answers_of([0.8, 0.7, 0.79], 4)
    gap = answers.gap(0, [1, 2], 4)
    back = answers.gap(1, [0], 4)
    assert gap.point[0] == pytest.approx(-back.point[0]) and gap.common[0] == pytest.approx(back.common[0])
    below, within = gap.chance_below(0.0), gap.chance_below(0.05)
    assert below[0] < 0.02 < below[1] and (within <= below).all() and back.chance_below(0.0)[0] == 1.0


def test_more_seeds_narrow_the_seeds_part_and_leave_the_rows():
    answers = answers_of([0.8, 0.79], 8, spread=0.03)
    few, many = answers.gap(0, [1], 2), answers.gap(0, [1], 8)
    assert many.common[0] == pytest.approx(few.common[0], rel=0.8) and many.by_seed[0] == few.by_seed[0]


def test_on_these_rows_alone_there_is_no_rows_part():
    assert answers_of([0.8, 0.79], 4, these=True).gap(0, [1], 4).common[0] == NONE


def test_two_that_disagree_on_no_row_are_not_known_to_be_equal():
    answers = Answers(2, 100)
    right = (np.arange(100) < 70).astype(float)
    for _ in range(4):
        answers.add(0, right)
        answers.add(1, right)
    gap = answers.gap(0, [1], 4)
    assert gap.common[0] == pytest.approx(PSEUDO / 100**2) and gap.chance_below(0.01)[0] > 0.05 > gap.chance_below(0.1)[0]


def test_what_a_seed_does_to_all_cancels():
    rng = np.random.default_rng(2)
    shifts = 0.05 * rng.standard_normal(6)
    together, apart = Answers(4, 2000), Answers(4, 2000)
    hard = rng.random(2000)
    for k in range(4):
        for s in range(6):
            noise = 0.05 * rng.standard_normal(2000)
            together.add(k, (hard + noise < 0.7 + shifts[s]).astype(float))
            apart.add(k, (hard + noise < 0.7 + 0.05 * rng.standard_normal()).astype(float))
    assert together.gap(0, [1], 6).by_seed[0] < 0.25 * apart.gap(0, [1], 6).by_seed[0]


def test_an_arm_with_nothing_random_adds_no_spread():
    answers = answers_of([0.8, 0.79, 0.78], 4, spread=0.03)
    fixed = Answers(3, 1000)
    for k in range(3):
        for run in answers.runs[k][: 1 if k == 2 else 4]:
            fixed.add(k, run, fixed=k == 2)
    assert fixed.gap(0, [2], 4).by_seed[0] < 0.8 * answers.gap(0, [2], 4).by_seed[0]
    assert fixed.gap(2, [0], 4).by_seed[0] == pytest.approx(fixed.gap(0, [2], 4).by_seed[0], rel=0.01)
    assert fixed.seeds(2) == LOOKS[-1] and len(fixed.by_seed(0, 2)) == 4


# without a model


def test_capital_does_not_grow_where_the_mean_is_what_is_tested():
    rng = np.random.default_rng(3)
    reached = [betting.ever(rng.choice([-1.0, 0.02, 0.05], 60, p=[0.02, 0.5, 0.48]) - 0.0, -0.02 + 0.5 * 0.02 + 0.48 * 0.05) > np.log(20) for _ in range(1000)]
    assert np.mean(reached) <= 0.05


def test_the_bound_rises_with_evidence_and_says_nothing_of_few():
    values = 0.05 + 0.01 * np.random.default_rng(4).standard_normal(300)
    few, some, many = (betting.lower(values[:n], 0.05) for n in (2, 50, 300))
    assert -1 <= few < -0.7 and few < some < many < 0.05 and many > 0.02
    assert betting.lower([], 0.05) == -1.0


def test_a_single_collapse_is_never_ruled_out_by_a_few_seeds():
    assert betting.lower([0.05] * 8, 0.05) < -0.3


def test_the_seeds_that_it_takes():
    assert betting.seeds_for(-0.01, 0.01, 0.05) is None
    assert 40 < (betting.seeds_for(0.05, 0.02, 0.05) or 0) < 200 < (betting.seeds_for(0.01, 0.02, 0.05) or 0)
