"""The verdict: what to take, when not to train, what is undecided and how much more would decide it, and its words."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pipeline.reporting.verdict import Saying, sentences
from pipeline.stats import tiers
from pipeline.stats.bootstrap import class_value, interval, macro_f1, mean
from pipeline.stats.verdict import Option, Verdict, decide

GIB = 2**30
MEMORY = {"full": 3.0 * GIB, "lora": 1.6 * GIB, "step_by_step": 3.2 * GIB}


def runs(right: int, rows: int, seeds: int = 1, blur: float = 8) -> tiers.Runs:
    """Answers of which about `right` are right, the same rows being easy for everybody."""
    answers = {}
    for seed in range(seeds):
        rng = random.Random(f"{right}/{seed}")
        order = sorted(range(rows), key=lambda i: i + rng.gauss(0, rows / blur))
        won = set(order[:right])
        answers[seed] = {str(i): i in won for i in range(rows)}
    return answers


def verdict(answers: dict[str, tiers.Runs]) -> Verdict:
    comparison = tiers.compare(answers, ["zero_shot"])
    assert comparison
    some = [Option(n, v, n == "zero_shot", n not in ("zero_shot", "few_shot"), MEMORY.get(n), 40.0 if n in MEMORY else None)
            for n, v in comparison.means.items()]
    return decide(some, comparison)


def test_a_tie_with_the_untouched_base_is_do_not_train_and_says_how_many_rows_would_tell():
    one = verdict({"zero_shot": runs(53, 76), "lora": runs(54, 76), "few_shot": runs(52, 76)})
    assert (one.kind, one.name) == ("do_not_train", "zero_shot")
    assert set(one.tied) == {"lora", "few_shot"}
    text = " ".join(sentences(one))
    assert text.startswith("Do not train yet: `zero_shot`, the untouched base, reaches 69.7% accuracy on 76 test rows")
    assert one.more_rows and f"about {one.more_rows:,} more test rows" in text and "5 points" in text
    assert "best" not in text


def test_the_untouched_base_comes_first_though_its_memory_was_not_measured():
    """An unknown memory of what is not trained counted as infinite."""
    one = verdict({"zero_shot": runs(140, 200), "lora": runs(142, 200)})
    assert one.option("zero_shot").memory is None and (one.kind, one.name) == ("do_not_train", "zero_shot")


def test_what_is_told_apart_from_the_base_is_taken_and_the_cheapest_of_those_that_are_as_good():
    one = verdict({"zero_shot": runs(52, 200), "full": runs(89, 200), "lora": runs(86, 200), "step_by_step": runs(82, 200)})
    assert (one.kind, one.name, one.lowest) == ("take", "lora", True)
    text = " ".join(sentences(one))
    assert text.startswith("Take `lora`: 43.0% accuracy on 200 test rows for 40 s of training and 1.60 GiB of memory, 17.0 points above the untouched base")
    assert "`full` is 1.5 points higher, which these data do not tell apart" in text
    assert one.more_rows and "more test rows" in text


def test_two_that_are_right_on_all_of_few_rows_may_still_differ():
    """Without a row on which they differ the rows' variance counted as nought: 24 rows would have shown 5 points."""
    one = verdict({"zero_shot": runs(12, 24), "full": runs(24, 24, 2), "lora": runs(24, 24, 2)})
    text = " ".join(sentences(one))
    assert one.kind == "take" and one.more_rows == 140 and "would have shown" not in text and "more test rows" in text
    many = verdict({"zero_shot": runs(250, 500), "full": runs(500, 500, 2), "lora": runs(500, 500, 2)})
    assert many.more_rows is None and "500 test rows are enough" in " ".join(sentences(many))


def test_seeds_too_far_apart_for_any_number_are_not_said_to_be_enough():
    """Both were "no more rows, no more seeds", and the words took the one for the other."""
    wide = {"zero_shot": runs(40, 200), "full": {s: runs(right, 200)[0] for s, right in enumerate((196, 120))}, "lora": {s: runs(right, 200)[0] for s, right in
            enumerate((128, 190))}}
    one = verdict(wide)
    text = " ".join(sentences(one))
    assert (one.more_rows, one.more_seeds, one.enough) == (None, None, False)
    assert "No reasonable number of rows or seeds would confirm" in text and "would have shown" not in text


def test_a_gap_that_is_larger_than_a_tie_and_not_confirmed_is_undecided():
    one = verdict({"zero_shot": runs(30, 60), "lora": runs(33, 60)})
    assert (one.kind, one.name, one.tied) == ("undecided", "lora", ("zero_shot",))
    text = " ".join(sentences(one))
    assert "Until then keep the untouched base" in text and one.more_rows and one.more_seeds == 2


def test_what_lies_below_the_base_comes_first_with_what_to_do_and_has_no_verdict():
    one = verdict({"zero_shot": runs(120, 200), "full": runs(60, 200), "lora": runs(160, 200)})
    assert one.below_base == ("full",) and (one.kind, one.name) == ("take", "lora") and "full" not in one.tied
    first = sentences(one, Saying(experiment="mine"))[0]
    assert first.startswith("`full` (30.0%) lies below the untouched base `zero_shot` (60.0%)")
    assert "no verdict on the technique" in first and "python -m pipeline.tune experiments=mine technique=full" in first


def test_a_single_technique_and_nothing_that_can_be_compared():
    alone = tiers.compare({"lora": runs(30, 60)})
    assert decide([Option("lora", 0.5)], alone).kind == "take"
    nothing = decide([Option("lora", 0.5)], None)
    assert (nothing.kind, nothing.name) == ("undecided", None) and sentences(nothing)[0].startswith("Undecided")


def test_the_rows_that_are_asked_for_do_decide():
    """Made-up rows with a true difference of 8 points: as many as the verdict asks for tell it apart about as often as POWER says."""
    rng = random.Random(3)

    def answers(rows: int) -> dict[str, tiers.Runs]:
        hard = [rng.random() for _ in range(rows)]
        return {name: {0: {str(i): h + rng.gauss(0, 0.2) < level for i, h in enumerate(hard)}} for name, level in (("zero_shot", 0.5), ("lora", 0.58))}

    asked = [one.more_rows + 60 for _ in range(40) if (one := verdict(answers(60))).kind == "undecided" and one.more_rows and one.name == "lora"]
    assert len(asked) > 10
    middle = sorted(asked)[len(asked) // 2]
    found = sum(verdict(answers(middle)).kind == "take" for _ in range(40))
    assert 0.5 <= found / 40 <= 1.0


@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_seeds_are_asked_for_where_the_seeds_differ(spread):
    rng = random.Random(5)
    base = {str(i): i < 500 for i in range(1000)}
    lora = {s: {str(i): i < 530 + 1000 * rng.choice((-1, 1)) * spread for i in range(1000)} for s in range(3)}
    lora[2] = {str(i): i < 530 - 2000 * spread for i in range(1000)}
    one = verdict({"zero_shot": {0: base}, "lora": lora})
    assert (one.kind == "take") is (spread == 0.0)
    assert spread == 0.0 or one.more_seeds or one.more_rows


def test_a_search_over_equals_calls_none_the_best():
    shares = {f"r={r}": 0.25 for r in (1, 2, 4, 8, 16, 32)}
    comparison = tiers.by_shares(shares, 12)
    one = decide([Option(name, value) for name, value in shares.items()], comparison, slack=0.0)
    assert one.name == "r=1" and len(one.tied) == 5
    text = " ".join(sentences(one, Saying(rows="validation rows")))
    assert "best" not in text and "more validation rows" in text and "seed" not in text


def test_shares_without_single_answers_differ_where_they_are_far_apart_alone():
    assert tiers.by_shares({"a": 0.9, "b": 0.2}, 40).between("a", "b").significant
    assert not tiers.by_shares({"a": 0.5, "b": 0.45}, 40).between("a", "b").significant


def test_macro_f1_has_a_paired_test_and_an_interval_of_its_own():
    """The draws' metric on the rows as they are is scikit-learn's; the same answers are no difference; a better set of answers is one."""
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300)
    poor, good = (np.where(rng.random(300) < right, truth, rng.integers(0, 3, 300)) for right in (0.3, 0.6))
    values = {name: {0: {str(i): class_value(int(t), int(p), 4) for i, (t, p) in enumerate(zip(truth, some, strict=True))}}
              for name, some in (("zero_shot", poor), ("lora", good))}
    one = tiers.compare(values, ["zero_shot"], macro_f1(4))
    assert one and one.means["lora"] == pytest.approx(f1_score(truth, good, labels=range(4), average="macro", zero_division=0))
    pair = one.between("lora", "zero_shot")
    assert pair.significant and 0 < pair.low < pair.difference < pair.high and not one.covers_seeds
    same = tiers.compare({"a": values["lora"], "b": values["lora"]}, [], macro_f1(4))
    assert same and same.between("a", "b").p == 1.0
    low, high = interval(np.array(list(values["lora"][0].values())), macro_f1(4))
    assert low < one.means["lora"] < high and high - low < 0.2


def test_the_bootstrap_of_a_mean_agrees_with_its_formula():
    rng = np.random.default_rng(1)
    rows = rng.random(400)
    low, high = interval(rows, mean)
    assert (high - low) / 2 == pytest.approx(1.96 * rows.std() / 20, rel=0.1)
    answers = {name: {s: {str(i): float(v) for i, v in enumerate(np.clip(rows + shift + rng.normal(0, 0.1, 400), 0, 1))} for s in range(3)}
               for name, shift in (("zero_shot", 0.0), ("lora", 0.05))}
    drawn, plain = (tiers.compare(answers, [], statistic) for statistic in (mean, None))
    assert drawn and plain and drawn.covers_seeds
    one, other = (c.between("lora", "zero_shot") for c in (drawn, plain))
    assert (one.difference, one.high - one.low) == (pytest.approx(other.difference), pytest.approx(other.high - other.low, rel=0.1))


def test_where_nothing_was_trained_nothing_is_said_against_training():
    said = " ".join(sentences(verdict({"zero_shot": runs(3, 60), "few_shot": runs(9, 60)})))
    assert "Nothing was trained: `few_shot` reaches 15.0%" in said and "Do not train" not in said and "this does not say" in said
    alone = decide([Option("zero_shot", 0.05, base=True, trained=False)], tiers.compare({"zero_shot": runs(3, 60)}, ["zero_shot"]))
    assert "Do not train" not in " ".join(sentences(alone))
