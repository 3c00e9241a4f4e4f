"""True reward against learnt reward: where they part, what is said of it, what is drawn, and what a cell with its parts costs."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from report_cells import keep, result

from pipeline.records.finished import select
from pipeline.records.origins import Before, PairScore
from pipeline.records.results import Result
from pipeline.reporting import overoptimisation
from pipeline.reporting.charts import colours
from pipeline.reporting.figures import Row
from pipeline.reporting.page import drawings, page
from pipeline.reporting.rows import make_rows, options
from pipeline.reporting.text import markdown

PARTS = {"quick/full-s0-n200": Before("start", 100.0), "quick/reward_model-s0-n200": Before("reward", 50.0)}


def trained(name: str, gold: Any, learnt: bool = True, seed: int = 0, steps: int = 60) -> Result:
    """A cell of RL whose KL grows by 0.1 a step; gold(KL): its true reward; the learnt one is the KL's root above 2 + seed."""
    rng = random.Random(seed)
    points: list[dict[str, float]] = [
        {"step": s, "loss": -0.1, "lr": 1e-4, "kl": 0.1 * (s - 1), "gold_reward": gold(0.1 * (s - 1)) + rng.uniform(-0.02, 0.02),
         "reward": 2 + seed + math.sqrt(0.1 * (s - 1))} for s in range(1, steps + 1)
    ]
    before = PARTS if learnt else {"quick/full-s0-n200": PARTS["quick/full-s0-n200"]}
    return result(name, 150, seed, technique=name, family="preferences", objective=name, history=points, before=before, start="full")


def best(seed: int = 0) -> Result:
    points = [{"k": float(k), "kl": math.log(k) - (k - 1) / k, "reward": 1 + math.log(k), "gold_reward": 0.4 + 0.02 * math.log(k)} for k in (1, 2, 4, 8, 16)]
    return result("best_of_n", 120, seed, technique="best_of_n", family="preferences", kind="untrained", best_of=points, history=[], before=PARTS, start="full")


def rows_of(root: Path, *found: Result) -> list[Row]:
    for one in found:
        keep(root, one)
    grid = {"techniques": sorted({r.technique for r in found}), "seeds": [0, 1], "train_rows": [200]}
    return make_rows(select(root / "quick", grid)[0])


def falling(kl: float) -> float:
    return 0.4 + 0.2 * kl - 0.06 * kl * kl  # highest at 1.67


def test_where_the_true_reward_falls_and_the_learnt_one_rises_they_part(tmp_path):
    rows = rows_of(tmp_path, trained("rlhf_rloo", falling), trained("rlhf_rloo", falling, seed=1), trained("rlhf_grpo", lambda kl: 0.4 + 0.02 * kl),
                   trained("grpo", falling, learnt=False), best(), result("full", 140))
    curves = {c.row.name: c for c in overoptimisation.curves(rows)}
    assert set(curves) == {"rlhf_rloo", "rlhf_grpo", "grpo", "best_of_n"}
    parted = curves["rlhf_rloo"].parted
    assert parted and 1.2 < parted.kl < 2.2 and parted.gold == pytest.approx(falling(1.67), abs=0.02)
    assert curves["rlhf_grpo"].parted is None and curves["best_of_n"].parted is None
    assert not curves["grpo"].learnt and curves["grpo"].parted is None, "its reward is the true one"
    assert abs(curves["rlhf_rloo"].points[0].reward) < 0.3, "rewards of two seeds have scales of their own, and both are told above their start"
    said = {text.split("`")[1]: text for text in overoptimisation.sentences(rows)}
    assert set(said) == {"rlhf_rloo", "rlhf_grpo", "best_of_n"}
    assert "over-optimised from a KL of" in said["rlhf_rloo"] and said["rlhf_grpo"].endswith("they did not part.")
    assert "from 40.0% to 45.5% right" in said["best_of_n"] and "changed by +2.8 up to a KL of 1.8 nats" in said["best_of_n"]


def test_a_fall_within_the_noise_is_none(tmp_path):
    rows = rows_of(tmp_path, trained("rlhf_rloo", lambda kl: 0.5 - 0.001 * kl))
    assert overoptimisation.curves(rows)[0].parted is None


def test_the_report_draws_and_says_it_and_tells_the_cost_of_all_parts(tmp_path, drawn):
    pairs = {"test": PairScore(100, 100, 0.75, 1e-6, 0.031)}
    rows = rows_of(tmp_path, trained("rlhf_rloo", falling), best(), result("full", 140), result("zero_shot", 90),
                   result("reward_model", 130, technique="reward_model", family="preferences", pairs=pairs, start="full"))
    by_name = {r.name: r for r in rows}
    html, text = page("quick", rows, []), markdown("quick", rows, [])
    assert "True reward against learnt reward" in html and "over-optimised from a KL of" in html and "over-optimised from a KL of" in text
    assert {"true_reward", "learnt_reward"} <= set(drawings(rows, None))
    phases = by_name["rlhf_rloo"].results[0].phases
    assert phases and by_name["rlhf_rloo"].made_s == pytest.approx(150 + phases.warmup_s + phases.train_s) and by_name["full"].made_s is None
    assert "75.0 (calibration error 3.1)" in text
    chosen = {one.name: one for one in options(rows)}
    assert chosen["best_of_n"].trained and not chosen["zero_shot"].trained, "what it begins at and chooses by was trained"


@pytest.mark.slow
def test_without_a_learnt_reward_there_is_no_such_part(tmp_path):
    rows = rows_of(tmp_path, trained("grpo", falling, learnt=False), result("full", 140))
    assert overoptimisation.charts(rows, colours(rows)) == [] and "True reward against learnt reward" not in page("quick", rows, [])
