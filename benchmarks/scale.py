"""What it costs to hand out cells, step by step, and what that makes of 10, 1,000 and 100,000 of them: docs/scale.md.

    python -m benchmarks.scale measure                  time each step by itself on this machine -> benchmarks/results/scale.json
    python -m benchmarks.scale measure only=ray         Ray's steps alone (only=command: what the command does with a cell)
    python -m benchmarks.scale check cells=2000         run so many dummy cells on Ray here, prediction beside measurement -> the same file

A dummy cell is all of a cell's way but its work: its config is composed, compared and sent; a worker's host takes its lock, forks, waits `seconds` (0.05)
and writes a result's files; the command hears of it. The cells are those of `data_size` with other seeds. PostgreSQL is the tests' (tests/postgres.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from benchmarks.speed_files import FOLDER
from pipeline.cell import grid, identity, locks, record
from pipeline.cell.child import run_in_child
from pipeline.cell.room import AtOnce
from pipeline.core.commands import key_values, words_entry
from pipeline.core.compose import ROOT
from pipeline.core.files import UserError, read_json, write_json
from pipeline.fan import jobs as fan_jobs
from pipeline.fan import run as fan_run
from pipeline.fan.host import Host, check_same, code_of, sent
from pipeline.fan.jobs import BUSY, Job, Queue
from pipeline.measure import machine
from pipeline.measure.clock import Stopwatch
from pipeline.records import mlflow as tracking

FILE = FOLDER / "scale.json"
HERE = "benchmarks.scale"
WORDS = ["experiments=data_size", "technique=lora", "train_rows=100", "device=cpu", "ray.dashboard=false", "preflight=false"]
SECONDS = 0.05
"""What a dummy cell waits."""
REPEATS = 50
WARM = 10
"""Tasks after which both workers run."""
SEEDS = 10
"""Seeds of a technique and size in the predictions: cells that differ in nothing else are composed once."""


def nothing(cells: list[DictConfig], request: dict[str, Any], kept: Any) -> tuple[int, int]:
    """Work of a worker's: ends with the code that it is asked for, and leaves the id of its process."""
    import os

    return request["code"], os.getpid()


def dummy(cells: list[DictConfig], request: dict[str, Any], kept: Any) -> int:
    """Work of a worker's: a cell without its work."""
    import peft  # noqa: F401  (as `preload` has it: what cells import is imported before they fork)

    [cfg] = cells
    check_same(cfg, request)

    def work() -> int:
        threading.Event().wait(request["seconds"])
        write_result(cfg)
        return 0

    with locks.free([cfg]) as members:
        if not members:
            return BUSY
        return 0 if grid.is_done(cfg) else run_in_child(work).code


def write_result(cfg: DictConfig) -> None:
    """The files of a cell that was none, with the identity that makes it count as done."""
    about = {**machine.provenance(), **identity.provenance(cfg)}
    result = record.bare_result(cfg, status="ok", precision=cfg.precision.name, hardware={"device": "cpu"}, provenance=about, train_rows=cfg.train_rows)
    record.write(identity.folder_of(cfg), cfg, result, [{"id": "0", "split": "test", "correct": True}])


# Each step by itself


def measure_some(only: str) -> dict[str, float]:
    """Ray's steps alone, or those of the command."""
    with tempfile.TemporaryDirectory() as folder:
        return _on_ray(Path(folder)) if only == "ray" else _by_command(composed(Path(folder), REPEATS))


def measure() -> dict[str, float]:
    """Seconds of each step, by name, on this machine."""
    steps: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        watch = Stopwatch()
        composed(root, 1)
        steps["compose"] = watch.lap()
        cells = composed(root, REPEATS)
        steps["compose_seed"] = (watch.lap() - steps["compose"]) / (REPEATS - 1)
        steps["config_bytes"] = float(len(json.dumps(sent(cells[0]))))
        steps |= _by_command(cells)
        steps |= _on_host(cells, root)
        watch.lap()
        grid.to_run(cells)
        steps["look_done"] = watch.lap() / REPEATS
        steps |= _on_ray(root)
        steps |= _mirrored(cells[:40], root)
        steps |= _optuna(root)
        steps |= _dvc(root)
    return steps


def _by_command(cells: list[DictConfig]) -> dict[str, float]:
    """What the command does with every cell that is missing."""
    watch = Stopwatch()
    missing = grid.to_run(cells)
    looked = watch.lap() / len(cells)
    code_of(missing[0])  # the code's files are read once
    watch.lap()
    for cfg in missing:
        json.dumps({"cells": [sent(cfg)], "data or model": identity.fingerprint(cfg), "code": code_of(cfg)})
    return {"look_missing": looked, "send": watch.lap() / len(missing)}


def composed(root: Path, count: int) -> list[DictConfig]:
    """Cells that write below `root`."""
    paths = [f"paths.{name}={root}/{name}" for name in ("results", "work")]
    mirror = [f"tracking.uri=sqlite:///{root}/mlflow.db", f"tracking.artifacts={root}/artefacts"]
    return grid.compose_cells([[*WORDS, *paths, *mirror, f"seed={seed}"] for seed in range(count)])


def _on_host(cells: Sequence[DictConfig], root: Path) -> dict[str, float]:
    """A host's start, and a dummy cell on it beyond its wait."""
    host, watch = Host(1), Stopwatch()
    try:
        started = _ask(host, cells[0], root)
        first = watch.lap()
        for cfg in cells[1:]:
            started |= _ask(host, cfg, root)
        each = watch.lap() / (len(cells) - 1)
    finally:
        host.close()
    if started:
        raise UserError(f"a dummy cell ended with code {started}; its output is below {root / 'work'}")
    return {"host_start": first - each, "host_cell": each - SECONDS}


def _ask(host: Host, cfg: DictConfig, root: Path) -> int:
    request = {"work": f"{HERE}:dummy", "folder": str(ROOT), "log": str(root / "work/log"), "cells": [sent(cfg)], "seconds": SECONDS}
    return host.ask(request).code


def _on_ray(root: Path) -> dict[str, float]:
    """Ray's start and end with a task, and every task more, with two workers: by the times at which the command hears of them."""
    count, heard = 4 * REPEATS, root / "heard"

    def work() -> int:
        from pipeline.fan.cluster import dispatch

        every = [Job(f"nothing-{i}", f"{HERE}:nothing", [], extra={"code": 0}) for i in range(count)]
        watch, times = Stopwatch(), []
        code = dispatch([lambda cpus, gpus: Queue(every, 0)], fan_jobs.Ray(dashboard=False), root / "work", lambda job, code, value: times.append(watch.peek()))
        write_json(heard, times)
        return code

    watch = Stopwatch()
    with quiet():
        run_in_child(work)
    whole, times = watch.lap(), read_json(heard)
    each = (times[-1] - times[WARM]) / (count - 1 - WARM)
    return {"ray_start": whole - each * count, "ray_task": each}


def _mirrored(cells: Sequence[DictConfig], root: Path) -> dict[str, float]:
    """A run in MLflow's SQLite, and what a process that writes some needs before the first."""
    watch = Stopwatch()
    run_in_child(lambda: 0 if tracking.log_cell(identity.folder_of(cells[0]), cells[0]) else 1)
    watch.lap()  # it has made the database
    run_in_child(lambda: 0 if tracking.log_cell(identity.folder_of(cells[1]), cells[1]) else 1)
    first = watch.lap()
    run_in_child(lambda: 0 if all(tracking.log_cell(identity.folder_of(c), c) for c in cells[2:]) else 1)
    second = watch.lap()
    each = (second - first) / (len(cells) - 3)
    return {"mlflow_start": first - each, "mlflow_sqlite": each}


def _optuna(root: Path) -> dict[str, float]:
    """A trial asked for and told, in SQLite and in PostgreSQL."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def trial_s(url: str) -> float:
        study = optuna.create_study(storage=url, sampler=optuna.samplers.RandomSampler(seed=0))
        watch = Stopwatch()
        for _ in range(REPEATS // 2):
            trial = study.ask({"train.lr": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)})
            study.tell(trial, 0.5)
        return watch.lap() / (REPEATS // 2)

    steps = {"optuna_sqlite": trial_s(f"sqlite:///{root}/study.db")}
    with postgresql() as url:
        return steps | {"optuna_postgresql": trial_s(url("study"))}


@contextlib.contextmanager
def postgresql() -> Iterator[Callable[[str], str]]:
    """A PostgreSQL server of the tests'; yields what makes a database and returns its URL."""
    import os

    sys.path.insert(0, str(ROOT / "tests"))
    import postgres

    with postgres.running() as server:
        os.environ["PGPASSWORD"] = postgres.PASSWORD
        yield lambda name: server.url(name, "postgresql+psycopg")


def _dvc(root: Path) -> dict[str, float]:
    """A stage that `dvc commit` takes over: a folder of a cell's files, the lock file rewritten with each."""
    import subprocess

    count = 20
    repository = root / "dvc"
    (repository / "out").mkdir(parents=True)
    stages = {f"s{i}": {"cmd": "true", "outs": [f"out/{i}"]} for i in range(count)}
    (repository / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    for i in range(count):
        (repository / f"out/{i}").mkdir()
        for name in ("result.json", "predictions.jsonl", "history.csv"):
            (repository / f"out/{i}/{name}").write_text(f"{i} {name}" * 100)

    def dvc(*words: str) -> None:
        subprocess.run([Path(sys.executable).parent / "dvc", *words], cwd=repository, check=True, capture_output=True, env=None)

    dvc("init", "--no-scm", "--quiet")
    watch = Stopwatch()
    dvc("commit", "--force", "--quiet", "s0")
    first = watch.lap()
    dvc("commit", "--force", "--quiet")
    return {"dvc_start": first, "dvc_stage": max(0.0, (watch.lap() - first) / (count - 1))}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the children's lines on every job."""
    import os

    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


# The model


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of a fan-out: before the first cell, while cells run, after the last. limit: what holds the middle part up, workers or command."""

    cells: int
    workers: int
    cell_s: float
    before_s: float
    during_s: float
    mirror_s: float
    adopt_s: float
    limit: str

    @property
    def wall_s(self) -> float:
        return self.before_s + self.during_s


def predict(steps: dict[str, float], cells: int, workers: int, cell_s: float, beside: bool = False, seeds: int = SEEDS) -> Prediction:
    """What so many cells of `cell_s` seconds take on so many workers.

    The command composes and looks at every cell first, one after another; then it sends and takes in while workers work. beside: the command has no
    core of its own, so that its time comes on top of the workers', spread over all cores (a machine whose every core is a worker).
    """
    before = steps["compose"] * -(-cells // seeds) + cells * (steps["compose_seed"] + steps["look_missing"]) + steps["ray_start"] + steps["host_start"]
    command = cells * (steps["send"] + steps["ray_task"])
    work = cells * (cell_s + steps["host_cell"]) / min(workers, cells)
    during = work + command / workers if beside else max(command, work)
    return Prediction(cells, workers, cell_s, before, during, steps["mlflow_start"] + cells * steps["mlflow_sqlite"],
                      steps["dvc_start"] + cells * steps["dvc_stage"], "command" if command > work else "workers")


def check(count: int) -> dict[str, Any]:
    """Run dummy cells on Ray on this machine; seconds of both parts."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        watch = Stopwatch()
        cells = composed(root, count)
        cells = [OmegaConf.merge(cfg, {"tracking": {"enabled": False}}) for cfg in cells]  # type: ignore[misc]
        missing = grid.to_run(cells)
        composed_s = watch.lap()
        with quiet():
            code = run_in_child(lambda: _run(missing, root)).code
        ran_s = watch.lap()
        done = sum(grid.is_done(cfg) for cfg in cells)
    return {"id": f"dummy-{count}", "cells": count, "done": done, "code": code, "workers": machine.cpu_count() or 1, "cell_s": SECONDS,
            "compose_s": composed_s, "run_s": ran_s, "wall_s": composed_s + ran_s}


def _run(missing: Sequence[DictConfig], root: Path) -> int:
    from pipeline.fan.cluster import dispatch

    settings = fan_jobs.read_ray(missing[0])
    every = fan_run.cell_jobs(missing, settings, machine.cpu_count() or 1, 0, AtOnce())
    for job in every:
        job.work, job.extra = f"{HERE}:dummy", {"seconds": SECONDS}
    return dispatch([lambda cpus, gpus: Queue(every, 2)], settings, root / "work", lambda job, code, value: None)


def run(words: list[str]) -> int:
    """Measure, or check."""
    what, rest = words[0] if words else "", words[1:]
    if what not in ("measure", "check"):
        raise UserError("write `python -m benchmarks.scale measure`, or `check cells=2000`")
    about = {"date": now_date(), "hardware": f"{machine.cpu_count()} cores of {machine.cpu_name()}"}
    stored = read_json(FILE) if FILE.exists() else []
    rows = {row["id"]: row for row in stored}
    if what == "measure":
        only = key_values(rest, ("only",), HERE).get("only")
        if only not in (None, "ray", "command"):
            raise UserError(f"benchmarks.scale measure knows only=ray and only=command, not only={only}")
        rows["steps"] = {**rows.get("steps", {}), "id": "steps", **about, **(measure_some(only) if only else measure())}
    else:
        count = int({"cells": "2000", **key_values(rest, ("cells",), HERE)}["cells"])
        rows[f"dummy-{count}"] = {**check(count), **about}
    write_json(FILE, list(rows.values()))
    print(json.dumps(rows["steps" if what == "measure" else f"dummy-{count}"], indent=1))
    return 0


def now_date() -> str:
    """Today."""
    return str(machine.provenance()["started"])[:10]


# The tables of docs/scale.md

ABOUT = {
    "compose": "compose a cell's config", "compose_seed": "the same for another seed of it",
    "look_missing": "look for its result, which is not there", "look_done": "look for its result, which is there",
    "send": "hash what decides it, and turn it into JSON",
    "ray_start": "start Ray on this machine, run a task, and end it", "ray_task": "a Ray task, two workers taking turns",
    "host_start": "start a worker's host", "host_cell": "a dummy cell on its host, beyond its wait", "mlflow_start": "a process that writes to MLflow",
    "mlflow_sqlite": "a run in MLflow's SQLite", "optuna_sqlite": "a trial in Optuna's SQLite", "optuna_postgresql": "a trial in PostgreSQL",
    "dvc_start": "`dvc commit` of one stage", "dvc_stage": "each stage more",
}
CASES = ((10, 1), (1_000, 8), (100_000, 8), (100_000, 512))
CELL_S = 60.0
"""A cell of the predictions."""


def tables(stored: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Markdown by name: steps, predicted, checked."""
    rows = {row["id"]: row for row in stored}
    steps = rows["steps"]
    seconds = [["step", "seconds"], *([what, f"{steps[name]:.4f}"] for name, what in ABOUT.items())]
    head = ["cells", "workers", "before the first cell", "while cells run", "limited by", "MLflow's runs, beside it", "`make adopt`, after it"]
    cases = [predict(steps, cells, workers, CELL_S) for cells, workers in CASES]
    predicted = [head, *([f"{p.cells:,}", f"{p.workers:,}", *map(words_of, (p.before_s, p.during_s)), p.limit, *map(words_of, (p.mirror_s, p.adopt_s))]
                         for p in cases)]
    checked = [["cells", "done", "part", "predicted s", "measured s"]]
    for row in (row for row in stored if row["id"].startswith("dummy-")):
        guess = predict(steps, row["cells"], row["workers"], row["cell_s"], beside=True, seeds=row["cells"])
        started = steps["ray_start"] + steps["host_start"]
        parts = (("compose and look", guess.before_s - started, row["compose_s"]), ("run on Ray", guess.during_s + started, row["run_s"]),
                 ("all", guess.wall_s, row["wall_s"]))
        checked += [[f"{row['cells']:,}", f"{row['done']:,}", about, f"{predicted_s:.0f}", f"{measured_s:.0f}"] for about, predicted_s, measured_s in parts]
    return {"steps": markdown(seconds), "predicted": markdown(predicted), "checked": markdown(checked)}


def words_of(seconds: float) -> str:
    """A duration for people."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
