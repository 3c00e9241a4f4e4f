"""One study searched by several pipeline.sweep at once, over PostgreSQL or SQLite: none of the trials is lost or tried twice, whoever is killed."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import postgres
import pytest

from pipeline import sweep, tune
from pipeline.core.compose import compose
from pipeline.search import storage
from pipeline.search.study import open_study
from pipeline.search.study import read as read_sweep

FORK = multiprocessing.get_context("fork")
SHORT = ["technique=lora", "precision=fp32", "experiment=tried", "train_rows=16", "train.batch_size=8", "train.steps=6", "train.validations=1",
         "sweep.confirm=false", "sweep.heartbeat_s=1"]
SPACE = "+sweep.space={method.config.r: {choices: [1, 2, 4, 8, 16]}, train.lr: {choices: [1e-4, 2e-4, 4e-4, 8e-4, 1e-3, 2e-3, 4e-3, 8e-3]}}"
TRIALS, WORKERS = 40, 4


@pytest.fixture(scope="module")
def server():
    with postgres.running() as running:
        yield running


@pytest.fixture
def words(overrides: list[str], imports: None) -> list[str]:
    return [*overrides, *SHORT]


@pytest.fixture
def url(server, request, monkeypatch) -> str:
    monkeypatch.setenv("PGPASSWORD", postgres.PASSWORD)
    return server.url("study_" + "".join(c for c in request.node.name.lower() if c.isalnum())[-40:])


def workers(words: list[str], count: int = WORKERS) -> list:
    started = [FORK.Process(target=lambda: os._exit(sweep.main(words))) for _ in range(count)]
    for process in started:
        process.start()
    return started


def study(words: list[str]):
    cfg = compose(words)
    return open_study(Path(cfg.paths.sweeps) / "tried/lora", cfg, read_sweep(cfg))


def killed_at_random(words: list[str], started: list, seed: int) -> int:
    """Kill one of the workers once so many trials, a random number, have an answer. Returns that number."""
    draw = random.Random(seed)
    wanted, victim = draw.randint(1, TRIALS * 3 // 4), draw.choice(started)
    opened = study(words)
    while opened.answered < wanted:
        assert all(p.is_alive() for p in started)
        time.sleep(0.02)
    time.sleep(draw.random())
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    return wanted


def none_lost_none_doubled(words: list[str], tmp_path: Path) -> None:
    trials = study(words).stored.trials
    states = Counter(t.state.name for t in trials)
    answered = [tuple(sorted(t.params.items())) for t in trials if t.state.name == "COMPLETE"]
    assert len(answered) == TRIALS and len(set(answered)) == TRIALS and set(states) <= {"COMPLETE", "FAIL"}, states
    with open(tmp_path / "sweeps/tried/lora/trials.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert Counter(row["status"] for row in rows)["ok"] == TRIALS and {row["status"] for row in rows} <= {"ok", "died"}
    assert not list((tmp_path / "sweeps/tried/lora").glob(".trial*/result.json"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("executor", ["sequential", "packed"])
@pytest.mark.parametrize("seed", [0])
def test_four_workers_share_a_study_and_one_is_killed(words, url, tmp_path, executor, seed):
    more = [*words, SPACE, f"sweep.executor={executor}", f"sweep.storage={url}", *(["sweep.slots=3"] if executor == "packed" else [])]
    started = workers(more)
    killed_at_random(more, started, seed)
    for process in started:
        process.join(600)
    assert sorted(p.exitcode for p in started) == [-signal.SIGKILL, 0, 0, 0]
    none_lost_none_doubled(more, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_that_learns_is_shared_too(words, url, tmp_path):
    """TPE has no list of points: no more are asked for than wanted, though four ask at once."""
    space = "+sweep.space={method.config.r: {choices: [1, 2, 4]}, train.lr: {low: 1e-4, high: 1e-2, log: true}}"
    more = [*words, space, "sweep.sampler=tpe", "sweep.n_trials=10", "sweep.executor=sequential", f"sweep.storage={url}", "sweep.confirm=true"]
    started = workers(more)
    for process in started:
        process.join(600)
    assert [p.exitcode for p in started] == [0] * WORKERS
    assert Counter(t.state.name for t in study(more).stored.trials) == {"COMPLETE": 10}
    assert [p.parent.name for p in (tmp_path / "results/tried").glob("*/result.json")] == ["lora+best-s0-n16"]


@pytest.mark.slow
def test_a_sqlite_file_is_shared_on_one_machine(words, tmp_path):
    more = [*words, "sweep.space={method.config.r: {choices: [1, 2, 4, 8]}}", "sweep.executor=sequential", f"sweep.storage=sqlite:///{tmp_path}/shared.db"]
    started = workers(more, 2)
    for process in started:
        process.join(300)
    assert [p.exitcode for p in started] == [0, 0]
    assert Counter(t.state.name for t in study(more).stored.trials) == {"COMPLETE": 4}


@pytest.mark.slow
def test_tuning_is_shared_too(words, url, tmp_path, capfd):
    more = [*(w for w in words if not w.startswith("experiment=")), "experiments=quick", f"paths.tuning={tmp_path}/tuning", "tune.trials=3",
            "tune.executor=sequential", f"tune.storage={url}"]
    assert tune.main(more) == 0
    assert (tmp_path / "tuning/quick/lora-n16.yaml").exists() and not list((tmp_path / "sweeps").rglob("study.db"))


def test_a_trial_that_began_without_a_sign_of_life_or_missed_them_is_dead_and_three_deaths_are_an_answer(words, tmp_path, imports):
    more = [*words, "sweep.space={method.config.r: {choices: [1]}}", f"sweep.storage=sqlite:///{tmp_path}/shared.db"]
    opened = study(more)
    for death in range(3):
        with opened.turn():
            opened.revive()
        trial = opened.stored.ask(opened.sweep.space.distributions)  # its process ends before its first heartbeat
        assert trial.number == death
    with opened.turn():
        assert opened.storage.dead(opened.stored) == [2]
        opened.revive()
    assert [t.state.name for t in opened.stored.trials] == ["FAIL"] * 3 and opened.answered == 1
    assert [row["status"] for row in opened.rows()] == ["died", "died", "error"] and opened.claim() is None


def test_a_claimed_trial_is_alive_and_its_late_answer_is_left_out_once_another_has_taken_over(words, tmp_path, capfd):
    more = [*words, "sweep.space={method.config.r: {choices: [1]}}", f"sweep.storage=sqlite:///{tmp_path}/shared.db"]
    opened = study(more)
    with opened.turn():
        opened.revive()
    trial, _ = opened.claim()
    with opened.turn():
        assert opened.storage.dead(opened.stored) == []
    assert opened.claim() is None
    opened.fail(trial.number)
    opened.tell(trial, None, 0.0)  # type: ignore[arg-type]
    assert "taken over" in capfd.readouterr().out and opened.answered == 0 and opened.claim() is not None


@pytest.mark.parametrize(("url", "says"), [
    ("postgresql://me:secret@host/db", "holds a password"), ("mysql://me@host/db", "is of mysql"), ("what", "no URL of a database"),
])
def test_a_url_that_searches_cannot_share_is_refused(url, says):
    with pytest.raises(Exception, match=says):
        storage.check(url, "sweep.storage")


def test_a_database_that_does_not_answer_is_one_sentence(words, capfd):
    assert sweep.main([*words, "sweep.storage=postgresql://me@127.0.0.1:9/none"]) == 2
    error = capfd.readouterr().err
    assert "cannot write postgresql://me@127.0.0.1:9/none" in error and "start the database" in error and len(error.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shared", [False, True])
def test_trials_as_ray_tasks_are_those_of_single_runs(words, url, tmp_path, shared):
    few = "sweep.space={method.config.r: {choices: [1, 2, 4]}}"
    more = ["ray.dashboard=false", *([f"sweep.storage={url}"] if shared else [])]
    assert sweep.main([*words, few, "sweep.executor=ray", *more]) == 0
    rows = list(csv.DictReader((tmp_path / "sweeps/tried/lora/trials.csv").read_text().splitlines()))
    assert sweep.main([*words, few, "sweep.executor=sequential", f"paths.sweeps={tmp_path}/single"]) == 0
    single = list(csv.DictReader((tmp_path / "single/tried/lora/trials.csv").read_text().splitlines()))
    key = "method.config.r"
    assert sorted((r[key], r["validation"]) for r in rows) == sorted((r[key], r["validation"]) for r in single) and len(rows) == 3
    assert {r["status"] for r in rows} == {"ok"} and {r["packed"] for r in rows} == {"False"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tuning_takes_ray_and_counts_what_fails(words, tmp_path, capfd):
    more = [*(w for w in words if not w.startswith("experiment=")), "experiments=quick", f"paths.tuning={tmp_path}/tuning", "tune.trials=3",
            "tune.executor=ray", "ray.dashboard=false"]
    assert tune.main(more) == 0 and (tmp_path / "tuning/quick/lora-n16.yaml").exists()
