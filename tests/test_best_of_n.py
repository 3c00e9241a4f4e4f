"""Best of n: what is chosen, what the best of fewer would be, that it is better than what it draws from, and is served alike."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import compose
from pipeline.core.files import UserError, read_jsonl
from pipeline.records.results import read as read_result
from pipeline.scoring import best_of
from pipeline.serving import artefact, export

SHORT = ["experiment=mine", "train_rows=64", "train.batch_size=8", "train.validations=0"]


def by_hand(k: int, drawn: list[tuple[float, float]]) -> tuple[float, float]:
    """Means over all choices of k; of equal rewards the first."""
    bests = [max(chosen, key=lambda one: one[0]) for chosen in itertools.combinations(drawn, k)]
    return sum(b[0] for b in bests) / len(bests), sum(b[1] for b in bests) / len(bests)


def test_the_best_of_fewer_is_the_mean_over_all_choices_of_them():
    drawn = [(0.3, 1.0), (2.0, 0.0), (-1.0, 1.0), (0.7, 1.0), (0.1, 0.0)]
    for k in range(1, 6):
        assert best_of._best_of(k, drawn) == pytest.approx(by_hand(k, drawn))
    assert best_of._best_of(2, [(1.0, 1.0), (1.0, 0.0), (1.0, 0.0)]) == pytest.approx((1.0, 1 / 3)), "equal rewards share"


def test_the_curve_s_kl_is_that_of_the_best_of_k():
    points = best_of.curve([{"drawn": [[0.0, 1], [1.0, 0], [2.0, 0]]}, {"drawn": [[0.0, 0], [1.0, 1], [2.0, 1]]}])
    assert [p["k"] for p in points] == [1, 2, 3] and [p["kl"] for p in points] == pytest.approx([0.0, math.log(2) - 0.5, math.log(3) - 2 / 3])
    assert [p["reward"] for p in points] == pytest.approx([1.0, 5 / 3, 2.0]) and [p["gold_reward"] for p in points] == pytest.approx([0.5, 0.5, 0.5])
    assert best_of.curve([{"id": "1"}]) == []


def test_the_answer_of_the_highest_reward_is_given():
    scorer: Any = SimpleNamespace(task=SimpleNamespace(scoring="choice", answer_pattern=None))
    row = {"id": "a", "answer": "good", "choices": ["good", "bad"]}
    one = best_of.BestOf._chosen(scorer, row, ["bad", "good film", "none"], [0.1, 0.5, 0.2])
    assert (one["prediction"], one["correct"], one["output"], one["reward"]) == ("good", True, "good film", 0.5)
    assert one["drawn"] == [[0.1, 0], [0.5, 1], [0.2, 0]]


@pytest.mark.slow
def test_the_best_is_better_than_what_it_is_drawn_from_and_is_served_alike(overrides):
    for words in (["technique=full", "train.lr=1e-3", "train.epochs=1"], ["technique=reward_model", "train.lr=1e-2", "train.epochs=3"]):
        cfg = compose([*overrides, *SHORT, *words])
        cell_run.run(cfg, folder=identity.folder_of(cfg))
    cfg = compose([*overrides, *SHORT, "technique=best_of_n", "objective.n=8", "evaluate.adapters=[1]"])
    folder = identity.folder_of(cfg)
    cell_run.run(cfg, folder=folder)
    actual = read_result(folder)
    one, best = actual.best_of[0], actual.best_of[-1]
    assert (one["k"], best["k"], best["kl"]) == (1, 8, pytest.approx(math.log(8) - 7 / 8)) and actual.test
    assert best["gold_reward"] > one["gold_reward"] + 0.05 and best["reward"] > one["reward"]
    assert actual.test.accuracy == pytest.approx(best["gold_reward"], abs=0.05)
    assert (actual.kind, actual.objective, actual.status) == ("untrained", "best_of_n", "ok")
    assert set(actual.before) == {"mine/full-s0-n64", "mine/reward_model-s0-n64"}
    assert actual.labelled_rows == 64 + 12 and actual.inference and actual.inference.latency_s and actual.inference.adapters is None
    stored = [p for p in read_jsonl(folder / "predictions.jsonl") if p["split"] == "test"]
    assert [p["output"] for p in artefact.score_artefact(cfg, folder / "artefact", "test")[0]] == [p["output"] for p in stored]
    served = artefact.Artefact.at("best_of_n", folder / "artefact", cfg)
    assert not served.mixes and "chosen among drawn ones" in (export.refusal(served) or "")
    with pytest.raises(UserError, match="objective.reward=nobody, but .* holds no finished cell"):
        cell_run.run(compose([*overrides, *SHORT, "technique=best_of_n", "objective.reward=nobody"]))
