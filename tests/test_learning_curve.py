"""Learning curves: known curves come back, known rows and crossovers, what cannot be told is not told."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from pipeline.stats.learning_curve import Measured, common_share, crossover, fit, fit_power, row_covariance, spreads

SIZES = (19, 48, 120, 300, 720, 1800)
MANY = 10**9  # test rows: their draw no longer matters


def power(a: float, b: float, c: float):
    return lambda n: a - b * n**-c


def cells(name: str, truth, sd: float = 0.0, seeds: int = 3, sizes=SIZES, test_rows: int = MANY, draw: int = 0) -> list[Measured]:
    rng = random.Random(f"{name}/{draw}")
    return [Measured(name, n, s, truth(n) + rng.gauss(0, sd), test_rows) for n in sizes for s in range(seeds)]


@pytest.mark.parametrize("law", [(0.62, 0.75, 0.35), (0.66, 2.2, 0.55), (0.9, 3.0, 1.1), (1.0, 0.8, 0.2)])
def test_an_exact_power_law_comes_back(law):
    curve = fit(cells("lora", power(*law)))["lora"]
    for n in (19, 60, 500, 1800):
        actual = curve.at(n)
        assert actual.value == pytest.approx(power(*law)(n), abs=2e-3) and actual.low - 1e-3 <= actual.value <= actual.high + 1e-3
        assert actual.high - actual.low < 3e-3
    assert curve.a == pytest.approx(law[0], abs=0.02) and curve.c == pytest.approx(law[2], rel=0.06)


def test_the_fit_is_the_best_within_its_bounds():
    """No worse than a general optimiser from many starts; a <= 1, b >= 0."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    n = np.array(SIZES, dtype=float)
    weights = np.array([1.0, 2, 3, 4, 5, 6])
    for _ in range(12):
        y = rng.uniform(0.3, 0.9) + rng.normal(0, 0.08, 6) + rng.uniform(-0.05, 0.1) * np.log(n / 19)
        a, drop, c = fit_power(SIZES, y[None], weights)[0]

        def loss(p, y=y):
            return float((weights * (y - p[0] + p[1] * (n / 19) ** -p[2]) ** 2).sum())

        best = min(
            minimize(loss, start, bounds=[(0, 1), (0, 3), (0.1, 2)], method="L-BFGS-B").fun
            for start in itertools.product((0.5, 0.9), (0.1, 0.5), (0.2, 1.0))
        )
        assert loss((a, drop, c)) <= best * 1.02 + 1e-5 and a <= 1 and drop >= 0 and 0.1 <= c <= 2


def test_accuracy_that_falls_is_flat_and_one_that_grows_without_end_stays_below_one():
    falling = fit(cells("full", lambda n: 0.6 - 0.02 * np.log(n)))["full"]
    assert falling.b == 0 and falling.value(19) == falling.value(1800)
    steep = fit(cells("full", lambda n: 0.2 + 0.105 * np.log(n)))["full"]
    assert steep.a == 1 and steep.value(10**9) <= 1


def test_rows_for_an_accuracy():
    curve = fit(cells("lora", power(0.62, 0.75, 0.35)))["lora"]
    actual = curve.rows_for(0.5)
    assert actual.rows == pytest.approx((0.75 / 0.12) ** (1 / 0.35), rel=0.03) and actual.low == pytest.approx(actual.high, rel=1e-2)
    assert (actual.smallest, actual.largest) == (19, 1800)
    beyond, at_once = curve.rows_for(0.6), curve.rows_for(0.3)
    assert (beyond.rows, beyond.low, beyond.high) == (None, None, None)
    assert (at_once.rows, at_once.low, at_once.high) == (19, 19, 19)


def test_an_interval_that_reaches_beyond_the_sizes_has_no_upper_end():
    curve = fit(cells("lora", power(0.62, 0.75, 0.35), sd=0.02))["lora"]
    actual = curve.rows_for(curve.value(1500))
    assert actual.rows == pytest.approx(1500, rel=0.01) and actual.low < 1500 and actual.high is None


def test_crossovers_of_known_curves():
    every = [
        *cells("lora", power(0.62, 0.75, 0.35)), *cells("full", power(0.66, 2.2, 0.55)), *cells("few_shot", lambda n: 0.45), *cells("weak", lambda n: 0.2),
        *cells("twin", power(0.62, 0.75, 0.35), sd=0.02), *cells("other", power(0.62, 0.75, 0.35), sd=0.02),
    ]
    curves = fit(every, constant={"few_shot", "weak"})
    actual = crossover(curves["few_shot"], curves["lora"])
    true = (0.75 / 0.17) ** (1 / 0.35)
    assert (actual.ahead, actual.behind, actual.verdict) == ("lora", "few_shot", "crosses")
    assert actual.rows == pytest.approx(true, rel=0.03) and actual.low == pytest.approx(actual.high, rel=0.05)
    assert actual.behind_until == pytest.approx(true, rel=0.03)
    assert crossover(curves["lora"], curves["full"]).ahead == "full"
    one = crossover(curves["weak"], curves["lora"])
    assert (one.ahead, one.verdict, one.rows, one.high, one.behind_until) == ("lora", "ahead", None, 19, None)
    twins = crossover(curves["twin"], curves["other"])
    assert (twins.verdict, twins.rows, twins.low, twins.high) == ("unclear", None, None, None)


def test_ahead_from_somewhere_where_the_beginning_cannot_be_told():
    curves = fit([*cells("lora", power(0.62, 0.75, 0.35), sd=0.02), *cells("few_shot", lambda n: 0.37, sd=0.02)], constant={"few_shot"})
    actual = crossover(curves["lora"], curves["few_shot"])
    assert (actual.verdict, actual.low, actual.rows) == ("ahead_from", 19, None) and 19 < actual.high < 100


def test_a_crossover_is_told_only_within_the_sizes_of_both():
    curves = fit([*cells("lora", power(0.62, 0.75, 0.35), sizes=SIZES[2:]), *cells("full", power(0.66, 2.2, 0.55), sizes=SIZES[:5])])
    actual = crossover(curves["lora"], curves["full"])
    assert (actual.smallest, actual.largest) == (120, 720)


def test_too_few_sizes_give_no_curve_unless_it_is_constant():
    every = [*cells("lora", power(0.6, 0.7, 0.4), sizes=SIZES[:2]), *cells("zero_shot", lambda n: 0.25, seeds=1, sizes=(300,))]
    assert list(fit(every, constant={"zero_shot"})) == ["zero_shot"] and fit([]) == {}


def test_the_same_seed_gives_the_same_curves():
    every = cells("lora", power(0.62, 0.75, 0.35), sd=0.02)
    one, two, other = (fit(every, seed=s)["lora"].at(100) for s in (0, 0, 1))
    assert one == two != other


def test_a_curve_that_is_no_power_law_is_said_not_to_fit():
    def step(n):
        return 0.3 if n < 500 else 0.6

    curve = fit(cells("lora", step, sd=0.005))["lora"]
    assert not curve.fits and curve.misfit_p < 1e-6
    straight = fit(cells("lora", power(0.62, 0.75, 0.35), sd=0.005))["lora"]
    assert straight.fits and curve.at(300).high - curve.at(300).low > 4 * (straight.at(300).high - straight.at(300).low)
    assert fit(cells("lora", step, seeds=1))["lora"].misfit_p is None


def test_the_band_narrows_with_seeds_as_means_do():
    """Two seeds leave twelve degrees of freedom at most; many seeds behave as 1/sqrt."""
    widths = {}
    for seeds in (2, 8, 32):
        actual = [fit(cells("lora", power(0.62, 0.75, 0.35), sd=0.03, seeds=seeds, draw=d))["lora"].at(300) for d in range(6)]
        widths[seeds] = np.mean([e.high - e.low for e in actual])
    assert 1.4 < widths[2] / widths[8] < 4 and 1.5 < widths[8] / widths[32] < 2.6


def test_the_spread_and_its_slope_are_estimated():
    rng = np.random.default_rng(0)
    groups = {("lora", n): [Measured("lora", n, s, 0.5 + 0.1 * n**-0.3 * rng.normal(), MANY) for s in range(400)] for n in SIZES}
    actual = spreads(groups)["lora"]
    assert actual.df == 6 * 399 and actual.slope == pytest.approx(0.3, abs=0.04) and actual.sd(100) == pytest.approx(0.1 * 100**-0.3, rel=0.08)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_what_the_sizes_of_a_seed_have_in_common_is_estimated(share):
    rng = np.random.default_rng(1)
    groups: dict = {("lora", n): [] for n in SIZES}
    for seed in range(400):
        own = rng.normal()
        for n in SIZES:
            groups["lora", n].append(Measured("lora", n, seed, 0.5 + 0.02 * (share**0.5 * own + (1 - share) ** 0.5 * rng.normal()), MANY))
    q, df, sizes = common_share(groups, spreads(groups))
    assert df == 399 and (q - 1) / (sizes - 1) == pytest.approx(share, abs=0.06)


def answers(chances: np.ndarray, rng) -> dict[str, bool]:
    return dict(zip(map(str, range(len(chances))), (rng.random(len(chances)) < chances).tolist(), strict=True))


def test_the_covariance_of_the_rows_leaves_out_what_differs_from_seed_to_seed():
    rng = np.random.default_rng(2)
    chances = rng.beta(1, 1, 4000)  # variance over rows 1/12, of answers 1/4
    groups = {("lora", n): [] for n in SIZES}
    for n, seed in itertools.product(SIZES, range(3)):
        right = answers(chances, rng)
        groups["lora", n].append(Measured("lora", n, seed, float(np.mean(list(right.values()))), 4000, right))
    cov = row_covariance(groups) * 4000
    assert np.diag(cov) == pytest.approx(np.full(6, 1 / 12), rel=0.1) and cov[0, 5] == pytest.approx(1 / 12, rel=0.1)


def test_rows_that_all_techniques_answer_widen_bands_and_not_differences():
    rng = np.random.default_rng(3)
    hard = rng.random(300)
    every = []
    for name, gain in (("lora", 0.03), ("full", 0.0)):
        for n, seed in itertools.product(SIZES, range(3)):
            right = answers((hard < power(0.62, 0.75, 0.35)(n) + gain).astype(float), rng)
            every.append(Measured(name, n, seed, sum(right.values()) / 300, 300, right))
    curves = fit(every)
    band, gaps = curves["lora"].at(300), curves["lora"].drawn([300]) - curves["full"].drawn([300])
    assert band.high - band.low > 0.09 and np.ptp(np.percentile(gaps, [2.5, 97.5])) < 0.06
    apart = fit([Measured(m.technique, m.rows, m.seed, m.accuracy, 300) for m in every])
    assert np.ptp(np.percentile(apart["lora"].drawn([300]) - apart["full"].drawn([300]), [2.5, 97.5])) > 0.1, "without predictions they count apart"


def test_one_seed_leaves_the_spread_out():
    curve = fit(cells("lora", power(0.62, 0.75, 0.35), sd=0.02, seeds=1, test_rows=2000))["lora"]
    assert curve.seeds == 1 and curve.spread.df == 0 and curve.at(300).high > curve.at(300).low


@pytest.mark.slow
@pytest.mark.parametrize("name", ["usual", "two seeds", "seeds common to all sizes", "500 test rows"])
def test_intervals_hold_the_truth_about_as_often_as_they_say(name):
    """python -m benchmarks.curves has the figures; here 150 experiments, so that a share of 95% is seen as 90.3% or more (3 standard errors)."""
    from benchmarks.curves import simulate

    actual = simulate(name, 150)
    assert min(actual[key] for key in ("band", "rows_for", "crossover")) >= 0.895, actual
    assert actual["twins"] <= 0.1, actual
