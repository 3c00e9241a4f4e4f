"""Commands killed (SIGKILL to the process group) at random moments and started again: nothing is lost, doubled or left over.

    python -m pytest -m slow tests/test_kills.py        prints the table of docs/reliability.md; 11 minutes on two cores
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kills
import pytest
import yaml
from kills import Command, Counts, cell_facts, ended, forked, mlflow_runs
from kills_dvc import WarmClone
from test_tune import Runs, tuned_file, words_in

from pipeline import cells, sweep, train, tune
from pipeline.cell import grid
from pipeline.records import mlflow, tuned

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SEED = 20261129
TECHNIQUES = ["zero_shot", "full", "lora", "prompt_tuning", "step_by_step", "dora"]
TUNED = ["lora", "prompt_tuning"]
LONGER = ["precision=fp32", "train_rows=64", "train.batch_size=8", "train.epochs=12", "train.validations=4", "train.checkpoint_every_s=0.05"]
SHORTER = ["precision=fp32", "train_rows=64", "train.batch_size=8", "train.epochs=3", "train.validations=1", "train.checkpoint_every_s=0.05"]
RANKS = [1, 2, 4, 8]
SEARCHED = ("method.config.r", "method.config.num_virtual_tokens", "train.lr")
TRIALS = 6

counted: dict[str, Counts] = {}


@pytest.fixture(scope="module")
def warm(imports: None) -> None:
    """What commands import, read once, so that kills do not hit imports alone."""
    import mlflow.store.tracking.sqlalchemy_store
    import mlflow.tracking.client  # noqa: F401
    import optuna.storages  # noqa: F401
    import sklearn.metrics  # noqa: F401


@pytest.fixture
def words(overrides: list[str], warm: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
    """Overrides that write below a folder, MLflow's database too; experiments=quick has a grid of its own."""
    monkeypatch.setattr(grid, "grid", lambda name: {"grid": {"techniques": TECHNIQUES, "seeds": [0], "train_rows": [64]}})

    def below(root: Path) -> list[str]:
        places = [f"paths.{name}={root}/{name}" for name in ("results", "work", "report", "sweeps", "tuning")]
        mlflow = [f"tracking.uri=sqlite:///{root}/mlflow.db", f"tracking.artifacts={root}/mlartifacts"]
        kept = [w for w in overrides if w != "tracking=none" and w.partition("=")[0] not in {place.partition("=")[0] for place in places}]
        return ["experiments=quick", *kept, *places, *mlflow]

    return below


def cells_command(root: Path, words: list[str]) -> Command:
    folder = root / "results"

    def again() -> list[str]:
        said = [line.partition(":")[0] for line in (root / "log.txt").read_text().splitlines() if ": test " in line]
        return [cell for cell, times in Counter(said).items() if times > 1]

    return Command(
        root, lambda: forked(cells.main, words, root / "log.txt"), lambda: cell_facts(folder),
        lambda: [f"quick/{path.parent.name}" for path in folder.rglob("result.json")], again,
    )


def train_command(root: Path, words: list[str]) -> Command:
    return dataclasses.replace(cells_command(root, words), start=lambda: forked(train.main, words, root / "log.txt"), doubled=list)  # it measures anew


def trials(root: Path) -> list[tuple[str, dict[str, str]]]:
    """(study, row) of every finished trial, from trials.csv."""
    found = []
    for path in sorted(root.glob("sweeps/*/*/trials.csv")):
        with open(path, newline="") as lines:
            found += [(f"{path.parent.parent.name}/sweep/{path.parent.name}", row) for row in csv.DictReader(lines)]
    return found


def answers(root: Path) -> list[tuple[str, list[str]]]:
    """(study and settings, answer) of the trials that have one."""
    known = [(f"{study} {[row.get(key) for key in SEARCHED]}", row) for study, row in trials(root) if row["status"] != "died"]
    return [(name, [row["status"], row["validation"], row["nll"]]) for name, row in known]


def search_command(main: Callable[[list[str]], int], root: Path, words: list[str]) -> Command:
    """A sweep or a tuning; both leave studies and what they chose."""

    def facts() -> dict[str, Any]:
        chosen = {f"{p.parent.name} best": [(b := yaml.safe_load(p.read_text()))["settings"], b["value"]] for p in root.glob("sweeps/*/*/best.json")}
        tuned = {p.name: [(t := yaml.safe_load(p.read_text()))["settings"], t["validation"], [[r["settings"], r["validation"]] for r in t["trials"]]]
                 for p in root.glob("tuning/*/*.yaml")}
        return {**dict(answers(root)), **chosen, **tuned, **cell_facts(root / "results")}

    def runs() -> list[str]:
        studies = [f"{path.parent.parent.name}/sweep/{path.parent.name}" for path in root.glob("sweeps/*/*/sweep.json")]
        cells = [f"{path.parent.parent.name}/{path.parent.name}" for path in root.rglob("results/*/*/result.json")]
        return studies + [f"{study}/{row['number']}" for study, row in trials(root)] + cells

    return Command(
        root, lambda: forked(main, words, root / "log.txt"), facts, runs,
        lambda: [name for name, times in Counter(name for name, _ in answers(root)).items() if times > 1],
    )


def kill_often(name: str, make: Callable[[Path], Command], tmp_path: Path, wanted: int, each: int) -> None:
    """Rounds of about `each` kills until there are as many as wanted; everything that is wrong is shown."""
    counts, draw = counted.setdefault(name, Counts()), random.Random(f"{SEED} {name}")
    reference, notes = make(tmp_path / "unkilled").unkilled(), []
    for number in itertools.count():
        if counts.kills >= wanted or counts.bad_exits:
            break
        command = make(tmp_path / f"round{number}")
        command.killed(draw, min(each, wanted - counts.kills), each, reference, counts)
        command.judge(reference.facts, counts)
        notes += command.notes or ([command.log.read_text()[-3000:]] if counts.bad_exits else [])
    assert not counts.faults and reference.facts, (counts, notes)


def test_cells(words, tmp_path):
    kill_often("pipeline.cells", lambda root: cells_command(root, [*words(root), *LONGER]), tmp_path, 48, 16)


def test_a_sweep(words, tmp_path):
    more = ["experiment=kills", "technique=lora", f"sweep.space={{method.config.r: {{choices: {RANKS}}}}}", *SHORTER]

    def make(root: Path) -> Command:
        return search_command(sweep.main, root, [w for w in words(root) if not w.startswith("experiments=")] + more)

    kill_often("pipeline.sweep", make, tmp_path, 28, 14)


def test_tuning(words, tmp_path):
    more = [f"tune.techniques=[{','.join(TUNED)}]", f"tune.trials={TRIALS}", *SHORTER]
    kill_often("pipeline.tune", lambda root: search_command(tune.main, root, [*words(root), *more]), tmp_path, 24, 12)


@pytest.mark.parametrize("name", ["train", "cells", "sweep", "tune"])
def test_a_kill_between_a_result_and_its_mirror_loses_no_run(name, words, tmp_path, monkeypatch):
    """At the first call of the mirror, the second and so on, until the command gets through."""
    mine, search = [*words(tmp_path), *SHORTER, "train.epochs=1"], ["experiment=kills", "technique=lora", "sweep.space={method.config.r: {choices: [1, 2]}}"]
    command = {
        "train": lambda: train_command(tmp_path, [*mine, "technique=lora", "seed=0"]), "cells": lambda: cells_command(tmp_path, mine),
        "sweep": lambda: search_command(sweep.main, tmp_path, [w for w in mine if not w.startswith("experiments=")] + search),
        "tune": lambda: search_command(tune.main, tmp_path, [*mine, f"tune.techniques=[{','.join(TUNED)}]", "tune.trials=2"]),
    }[name]()
    real, counts, killed = (mlflow.log_cell, mlflow.log_sweep), Counts(), 0
    for log in ("log_cell", "log_sweep"):
        if (log, name) not in (("log_sweep", "train"), ("log_sweep", "cells"), ("log_cell", "tune")):
            monkeypatch.setattr(mlflow, log, lambda *_: os.killpg(os.getpgrp(), signal.SIGKILL))
            assert ended(command.start(), kills.HUNG_S) == -signal.SIGKILL and mlflow_runs(tmp_path) != command.runs()
            monkeypatch.setattr(mlflow, "log_cell", real[0])
            killed += 1
    monkeypatch.setattr(mlflow, "log_sweep", real[1])
    assert killed and ended(command.start(), kills.HUNG_S) == 0
    command.judge(command.facts(), counts)
    assert not counts.faults and command.runs(), (counts, command.notes)


def test_an_interrupted_tuning_leaves_the_file_of_one_that_was_not(tmp_path, overrides, monkeypatch, imports):
    calls = []

    def accuracy(lr: float, r: int) -> float:
        calls.append(lr)
        if len(calls) == 6 + 2:
            raise KeyboardInterrupt
        return 0.9 - abs(math.log10(lr) + 3) / 10

    Runs(monkeypatch, accuracy)
    words = [*words_in(tmp_path, overrides), "+search={method.config.r: {choices: [8]}}"]
    assert tune.main(words) == 0
    whole = tuned_file(tmp_path)
    again = [*words, f"paths.sweeps={tmp_path}/again", f"paths.tuning={tmp_path}/again"]
    assert tune.main(again) == 130 and tune.main(again) == 0
    parted = tuned.read(tmp_path / "again/quick/lora-n160.yaml")
    assert [(t["settings"], t["validation"]) for t in parted.trials] == [(t["settings"], t["validation"]) for t in whole.trials]
    assert parted.settings == whole.settings and [t["number"] for t in parted.trials] != [t["number"] for t in whole.trials]


def test_dvc_repro(tiny, tmp_path, warm):
    clones: list[WarmClone] = []

    def make(root: Path) -> Command:
        clones.append(WarmClone(root, tiny, ["full", "lora", "prompt_tuning"]))
        results = root / "results"
        return Command(
            root, lambda: forked(clones[-1].become, ["repro"], root / "log.txt"), lambda: cell_facts(results),
            lambda: [f"kills/{path.parent.name}" for path in results.rglob("result.json")], list, (".work", "results"),
        )

    try:
        kill_often("dvc repro", make, tmp_path, 12, 12)
    finally:
        for clone in clones:
            clone.close()


def test_the_table(capsys):
    with capsys.disabled():
        print(f"\n{kills.table(counted)}")
    assert sum(c.kills for c in counted.values()) >= 100 and all(c.at_work >= 0.8 * c.kills for c in counted.values())
