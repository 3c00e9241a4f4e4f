"""The race's benchmarks: races with known truth, the cache's format and how it is filled, and the policies that are replayed on it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import race as command
from benchmarks import race_cache, race_replay, race_simulate
from benchmarks.race_simulate import EFFECTS, Setting, World
from benchmarks.rates import lines
from pipeline.core.files import UserError, read_json


def test_the_simulated_truth_is_the_truth():
    for effect, draw in EFFECTS.items():
        rng = np.random.default_rng(1)
        draws = np.array([draw(rng, 0.01, k % 2) for k in range(20_000)])
        assert abs(draws.mean()) < 0.0006, effect
    setting = Setting(2, 4000, 2.0, "edge", together=0.0, sd=0.5)
    found = []
    for number in range(30):
        world = World(setting, np.random.default_rng(number))
        found.append([world.run(arm, 0)[0].mean() - world.means[arm] for arm in (0, 1)])
    assert abs(np.mean(found)) < 0.003


def test_a_simulated_statement_is_wrong_where_it_says_so():
    line = race_simulate.simulate(Setting(2, 400, 5.0, "edge", "normal", 0.5), 3, 12)
    assert line["wrong"] <= 0.25 and line["interval"][1] > line["wrong"] and 0 < line["spent"] <= 1.01
    assert race_simulate.table([line]).count("\n") == 1  # it is none of the settings, and no line of the table


def test_bits_come_back():
    right = np.array([0, 0, 1, 0, 1, 1, 1])
    assert (race_cache.unpacked(race_cache.packed(right)) == right).all()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "cells.jsonl"
    rng = np.random.default_rng(0)
    made = []
    for task in ("trec", "cqa"):
        for number, level in enumerate((0.9, 0.7, 0.69, 0.5)):
            hard = np.random.default_rng(5).random(300)
            for seed in range(6):
                right = hard + 0.05 * rng.standard_normal(300) < level + 0.01 * rng.standard_normal()
                curve = [[share, level - 0.1 * (1 - share), None] for share in (0.25, 0.5, 0.75, 1.0)]
                made.append({"model": "m", "task": task, "technique": f"t{number}", "seed": seed, "seconds": 2.0 + number, "source": "drawn", "curve": curve,
                             "test": {"bits": race_cache.packed(right)}})
    made.append({"model": "m", "task": "cqa", "technique": "few", "seed": 0, "seconds": 1.0, "curve": [[1.0, 0.5, None]], "test": {"bits": "1f"}})
    path.write_text("\n".join(map(race_cache.json.dumps, made)) + "\n")
    return path


def test_a_technique_with_fewer_seeds_is_left_out(drawn):
    first = race_cache.worlds(drawn)[0]
    assert (first.task, first.names, first.right.shape, first.shares) == ("cqa", ["t0", "t1", "t2", "t3"], (4, 6, 300), (0.25, 0.5, 0.75, 1.0))
    assert first.means[0] == pytest.approx(0.9, abs=0.04)


def test_a_cache_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no finished run; fill it with"):
        race_cache.worlds(tmp_path / "none.jsonl")


def test_every_policy_is_replayed_and_the_race_names_the_best_for_less_than_the_grid(drawn, tmp_path):
    assert command.main(["replay", f"cells={drawn}", "times=2", f"to={tmp_path}/replayed.json", "arms=4"]) == 0
    found = read_json(tmp_path / "replayed.json")
    by_policy = {(s["policy"], s["within"], s["task"]): s for s in found["lines"]}
    ours, grid = by_policy["race", 5.0, "trec"], by_policy["full grid", 5.0, "trec"]
    assert ours["wrong"] == 0 and ours["undecided"] == 0 and ours["hours"] < 0.7 < grid["hours"] == 1.0 and ours["regret"] == 0
    assert {policy for policy, _, _ in by_policy} == set(race_replay.POLICIES)
    assert race_replay.table(found).count("| held out |") == race_replay.table(found).count("| seen |") == 3 * len(race_replay.POLICIES)


@pytest.mark.parametrize("technique", ["lora", "zero_shot"])
def test_the_cache_is_filled_resumed_and_not_paid_for_twice(technique, overrides, tmp_path, capsys):
    out = tmp_path / "cells.jsonl"
    given = [*overrides, "train_rows=32", "train.batch_size=8", "evaluate.test_rows=20"]
    given = [word for word in given if not word.startswith(("task=", "teacher="))]
    for seeds in (2, 3):
        for claim in out.with_suffix(".claims").glob("*"):
            claim.unlink()
        words = ["fill", f"out={out}", "tasks=vader_movies", f"techniques={technique}", f"seeds={seeds}", "--", *given]
        assert command.main(words) == 0
    runs = lines(out)
    assert [run["seed"] for run in runs] == [1, 2, 3] and not any("error" in run for run in runs)
    assert all(len(run["curve"]) == race_cache.CHECKS and run["test"]["rows"] == 20 and run["seconds"] > 0 for run in runs)
    assert runs[0]["slots"] == (2 if technique == "lora" else 1)  # seeds of an adapter at once
    assert race_cache.worlds(out)[0].right.shape == (1, 3, 20)
