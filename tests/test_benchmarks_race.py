"""The race's benchmarks: races with known truth, the cache's format and how it is filled, and the policies that are replayed on it."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections import Counter

import numpy as np
import pytest

from benchmarks import processes, race_blocks, race_cache, race_fill, race_replay, race_runs, race_simulate
from benchmarks import race as command
from benchmarks.race_simulate import EFFECTS, Setting, World
from pipeline.cell.inputs import preload
from pipeline.core.compose import compose
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


def test_blocks_are_run_once_and_their_races_do_not_depend_on_how_they_are_cut(tmp_path, monkeypatch):
    setting = Setting(2, 400, 5.0, "edge", "normal", 0.5)
    monkeypatch.setattr(race_simulate, "settings", lambda: [setting])
    monkeypatch.setattr(race_simulate, "SIZES", {2: 3})
    for races, run in ((6, 2), (12, 2), (12, 0)):  # blocks that the file lacks
        given = race_simulate.wanted(races, 69)
        assert len(list(race_blocks.run(tmp_path / "blocks.jsonl", given, race_simulate.block, 1, float("inf")))) == run
    ends = race_blocks.ends(tmp_path / "blocks.jsonl")
    whole = race_simulate.block(race_blocks.Block((0,), 0, 12, setting))
    (found,) = ends.values()
    assert [found[number] for number in range(12)] == whole
    line = race_simulate.summary(ends)[0]
    assert line["races"] == 12 and line["wrong"] <= 0.25 and line["interval"][1] > line["wrong"] and 0 < line["spent"] <= 1.01
    assert race_simulate.table([line]).count("\n") == 2


def test_blocks_end_when_the_time_is_up_and_go_on_later_in_several_processes(tmp_path, monkeypatch):
    given = race_simulate.wanted(2, 2)
    assert len(list(race_blocks.run(tmp_path / "blocks.jsonl", given, race_simulate.block, 1, 0.0))) == 1
    assert len(list(race_blocks.run(tmp_path / "blocks.jsonl", given, race_simulate.block, 2, float("inf")))) == len(given) - 1


def test_settings_of_twenty_techniques_come_first():
    arms = [block.task.arms for block in race_simulate.wanted(1, 69)]
    assert arms == sorted(arms, key=lambda count: (count == 69, count != 20, -count)) and {2, 6, 20, 69} == set(arms)


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
    found = read_json(tmp_path / "replayed.json")["lines"]
    by_policy = {(s["policy"], s["within"], s["task"]): s for s in found}
    ours, grid = by_policy["race", 5.0, "trec"], by_policy["full grid", 5.0, "trec"]
    assert ours["wrong"] == 0 and ours["undecided"] == 0 and ours["hours"] < 0.7 < grid["hours"] == 1.0 and ours["regret"] == 0
    least = by_policy["least grid that states it", 5.0, "trec"]
    assert least["wrong"] == least["undecided"] == 0 and least["hours"] < 1 and ours["hours_of_rates"] < ours["hours"]
    assert {policy for policy, _, _ in by_policy} == set(race_replay.POLICIES)
    assert race_replay.table(found).count("| held out |") == race_replay.table(found).count("| seen |") == 3 * len(race_replay.POLICIES)


@pytest.fixture
def cells(overrides):
    """Hydra's words for a cache of tiny runs."""
    given = [word for word in overrides if not word.startswith(("task=", "teacher=", "model="))]
    return [*given, "train_rows=32", "train.batch_size=8", "evaluate.test_rows=20"]


@pytest.mark.parametrize("technique", ["lora", pytest.param("zero_shot", marks=pytest.mark.slow)])
def test_the_cache_is_filled_resumed_and_not_paid_for_twice(technique, cells, tmp_path, capsys):
    asked = [f"out={tmp_path}/cells", "tasks=vader_movies", f"techniques={technique}", "models=smollm2_135m"]
    assert command.main(["fill", *asked, "seeds=2", "limit_s=-1", "--", *cells]) == 1, "a plan of benchmarks.lease goes on with what is missing"
    for seeds in (2, 3):
        assert command.main(["fill", *asked, f"seeds={seeds}", "--", *cells]) == 0
    assert command.main(["package", *asked, "seeds=4", f"to={tmp_path}/cells.jsonl.xz"]) == 0
    assert f"| {technique} | 3 |" in capsys.readouterr().out
    runs = race_cache.read(tmp_path / "cells.jsonl.xz")
    assert [run["seed"] for run in runs] == [1, 2, 3] and not any("error" in run for run in runs)
    assert all(len(run["curve"]) == race_runs.CHECKS and run["test"]["rows"] == 20 and run["seconds"] > 0 for run in runs)
    assert runs[0]["slots"] == (2 if technique == "lora" else 1)  # seeds of an adapter at once
    assert race_cache.worlds(tmp_path / "cells.jsonl.xz")[0].right.shape == (1, 3, 20)
    assert command.main(["fill", f"known={tmp_path}/cells.jsonl.xz", *asked[1:], f"out={tmp_path}/more", "seeds=3", "--", *cells]) == 0
    assert not list((tmp_path / "more").glob("*.jsonl"))  # a package's runs are taken as they are


@pytest.mark.parametrize("technique", ["full", pytest.param("lora_plus", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_seeds_that_share_a_capture_end_as_each_by_itself(technique, cells, tiny):
    words = [*race_fill.WORDS, *cells, "train.engine=fast", "task=vader_movies", "model=smollm2_135m", f"technique={technique}", "train.lr=3e-3"]
    configs = [compose([*words, f"seed={seed}"]) for seed in (1, 2, 3)]
    bases = race_runs.Bases(preload(configs[:1]))
    together = race_runs.Captured(configs, bases)
    lines_together = [together.line(number) for number in range(3)]
    assert not together.anew and together.same_start is (technique == "full")
    for cfg, line in zip(configs, lines_together, strict=True):
        alone = race_runs.Captured([cfg], bases).line(0)
        assert (alone["curve"], alone["test"]) == (line["curve"], line["test"])
    assert lines_together[0]["test"] != lines_together[1]["test"]


@pytest.mark.slow
def test_a_start_that_is_taken_to_be_every_seeds_is(cells):
    for technique in race_runs.DECOMPOSED:
        words = [*race_fill.WORDS, *cells, "task=vader_movies", "model=smollm2_135m", f"technique={technique}"]
        configs = [compose([*words, f"seed={seed}"]) for seed in (1, 2)]
        captured = race_runs.Captured(configs, race_runs.Bases(preload(configs[:1])))
        first, second = map(captured._initial, (0, 1))
        assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first), technique


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A store's jobs, run by processes that pretend: each notes its seed and is killed where `kills` says so, once."""
    log, kills = tmp_path / "log", tmp_path / "kills"

    def runs(words, seeds, bases, most):
        for seed in seeds:
            with log.open("a") as file:
                file.write(f"{words[-2]} {seed}\n")
            if kills.exists() and f"{words[-2]} {seed}" in kills.read_text():
                kills.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
            yield {"seed": seed, "diverged_at": 3 if seed == 2 else None}

    monkeypatch.setattr(race_fill, "runs", runs)
    monkeypatch.setattr("pipeline.cell.inputs.preload", lambda cells: None)
    jobs = race_fill.jobs(["smollm2_135m"], ["trec", "cqa"], ["full", "dora"], 5)
    return race_fill.Asked(jobs, race_fill.Store(tmp_path / "cells"), [], processes=3), log, kills


@pytest.mark.slow
def test_processes_share_the_work_and_a_killed_one_costs_its_seed_alone(pretended, monkeypatch):
    asked, log, kills = pretended
    monkeypatch.setattr(processes, "CRASHES", 0)
    kills.write_text("technique=full 5")
    assert race_fill.fill(dataclasses.replace(asked, gpus=["0"], processes=1)) > 0
    assert race_fill.fill(asked) == 0
    begun = Counter(log.read_text().splitlines())
    twice = {line for line, count in begun.items() if count > 2}  # two tasks have the same line
    assert twice == {"technique=full 5"} and begun["technique=full 5"] == 3
    assert begun["technique=dora 1002"] == 2  # takes the place of seed 2, which diverged
    assert len(asked.store.all()) == 2 * 2 * 6


@pytest.mark.slow
def test_a_killed_process_is_begun_anew(pretended):
    asked, _, kills = pretended
    kills.write_text("technique=full 5")
    assert race_fill.fill(dataclasses.replace(asked, gpus=["0"], processes=1)) == 0


@pytest.mark.slow
def test_what_does_not_go_with_a_base_is_said_once_and_tried_again_when_asked(cells, tmp_path, capsys):
    asked = [f"out={tmp_path}/cells", "tasks=vader_movies", "techniques=bitfit", "models=smollm2_135m", "seeds=2"]
    for words in (asked, asked, [*asked, "retry=true"]):
        assert command.main(["fill", *words, "--", *cells]) == 0
    said = capsys.readouterr().out
    assert said.count("BitFit has nothing to train") == 2 + 3  # as it happens, and below each table
    with pytest.raises(UserError, match="name the folder of finished runs"):
        command.run(["fill", "seeds=2"])
