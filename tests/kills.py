"""Commands killed at random moments: started in warm forked children, killed with their process group, started again, and compared with an unkilled run."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

FORK = multiprocessing.get_context("fork")
HUNG_S = 300
"""A start that takes longer hangs."""
WORK, MIRROR = ("work", "results", "sweeps", "tuning"), ("mlflow.db*",)
"""Below a command's root: where its work is written, and where that is mirrored."""
AT_START = 1 / 24
"""The share of kills that may hit a start before it has written anything."""
SPREAD = 2.0
"""The longest delay: this times the work of an unkilled run, over the kills of a round. On average the kills of a round let all of the work pass once."""
LEFT = ("*.partial*", "*.damaged", ".trial", "checkpoints/*", "*-journal")
"""Files that only work that is not through has."""


@dataclass
class Counts:
    """What came of the kills of one command; all but the first three have to be nought."""

    kills: int = 0
    at_work: int = 0
    """Of these, after the killed start had written a first file of its work."""
    in_mlflow: int = 0
    """Of these, while MLflow's lock was held."""
    lost: int = 0
    doubled: int = 0
    runs_missing: int = 0
    runs_doubled: int = 0
    broken: int = 0
    """JSON and JSONL files that cannot be read."""
    different: int = 0
    """Files and figures that are not those of the unkilled run."""
    stuck_locks: int = 0
    left_over: int = 0
    bad_exits: int = 0

    @property
    def faults(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)[3:] if getattr(self, f.name)}


def table(counts: dict[str, Counts]) -> str:
    """The counts as a Markdown table, a command a row."""
    names = [f.name for f in fields(Counts)]
    total = Counts(*(sum(getattr(c, name) for c in counts.values()) for name in names))
    lines = [f"| command | {' | '.join(name.replace('_', ' ') for name in names)} |", f"| --- |{' --- |' * len(names)}"]
    return "\n".join(lines + [f"| {label} | {' | '.join(str(getattr(c, n)) for n in names)} |" for label, c in {**counts, "total": total}.items()])


@dataclass(frozen=True)
class Unkilled:
    """A run that nobody kills: its facts, and the seconds before its first file and from there to its end."""

    facts: dict[str, Any]
    start_s: float
    work_s: float


@dataclass
class Command:
    """What is killed. root: all that it writes lies below it.

    Args:
        start: starts it and returns the id of its process, which leads a process group of its own.
        facts: what it has to leave, by name: digests, figures. runs: the cells and trials that MLflow has to have, each once.
        doubled: names of what is there more than once. work: patterns of what it writes when it works.
    """

    root: Path
    start: Callable[[], int]
    facts: Callable[[], dict[str, Any]]
    runs: Callable[[], list[str]]
    doubled: Callable[[], list[str]]
    work: tuple[str, ...] = WORK
    notes: list[str] = field(default_factory=list)
    """What was wrong, in words."""

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    def unkilled(self) -> Unkilled:
        """Run it to its end."""
        clock, began = time.monotonic(), time.time_ns()
        pid = self.start()
        assert _until(pid, lambda: self._wrote(began, self.work)) is None, self.log.read_text()
        worked = time.monotonic()
        assert ended(pid, HUNG_S) == 0, self.log.read_text()
        return Unkilled(work_s=time.monotonic() - worked, start_s=worked - clock, facts=self.facts())

    def killed(self, draw: random.Random, kills: int, each: int, unkilled: Unkilled, counts: Counts) -> None:
        """Start until it is through, kill up to so many times, about `each` a round, and count what came of it.

        Nearly every delay begins with the first file that this start writes, and is drawn from the time that the unkilled run worked: however long a
        start takes on this machine, kills hit work, and each lets some of it pass. Of every second one the mirror does not count as a first file: a
        start mirrors first what a kill has left unmirrored, and most kills would hit that alone.
        """
        for _ in range(kills):
            at_start, share, began = draw.random() < AT_START, draw.random(), time.time_ns()
            first, pid = draw.choice([self.work, self.work + MIRROR]), self.start()
            code = None if at_start else _until(pid, lambda began=began, first=first: self._wrote(began, first))
            longest = unkilled.start_s if at_start else SPREAD * unkilled.work_s / each
            code = ended(pid, share * longest) if code is None else code
            if code is not None:
                counts.bad_exits += code != 0
                return
            counts.kills, counts.at_work = counts.kills + 1, counts.at_work + self._wrote(began, self.work + MIRROR)
            counts.in_mlflow += is_locked(self.root / "mlflow.db.lock")
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        pid = self.start()
        code = ended(pid, HUNG_S)
        counts.bad_exits += code != 0
        if code is None:  # it hangs: look at it with py-spy before this
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _wrote(self, began: int, patterns: tuple[str, ...]) -> bool:
        """Whether a file of these was written since a time in ns."""
        return any(written(path) > began for pattern in patterns for place in self.root.glob(pattern) for path in [place, *place.rglob("*")])

    def judge(self, wanted: dict[str, Any], counts: Counts) -> None:
        """Compare what is there with the unkilled run's, and look for what a kill could have left."""
        found, runs = self.facts(), Counter(self.runs())
        expected = Counter(mlflow_runs(self.root))
        self._count(counts, "lost", [name for name in wanted if name not in found])
        self._count(counts, "doubled", self.doubled())
        self._count(counts, "different", [name for name in found if name in wanted and found[name] != wanted[name] or name not in wanted])
        self._count(counts, "runs_missing", list((runs - expected).elements()))
        self._count(counts, "runs_doubled", list((expected - runs).elements()))
        self._count(counts, "broken", [str(path) for path in self.root.rglob("*.json*") if path.is_file() and not is_whole(path)])
        self._count(counts, "stuck_locks", [str(path) for path in self.root.rglob("*.lock") if path.is_file() and is_locked(path)])
        self._count(counts, "left_over", [str(path) for pattern in LEFT for path in self.root.rglob(pattern)])

    def _count(self, counts: Counts, name: str, which: list[str]) -> None:
        setattr(counts, name, getattr(counts, name) + len(which))
        self.notes += [f"{name}: {one}" for one in which]


def forked(main: Callable[[list[str]], int], words: list[str], log: Path) -> int:
    """Run a command in a warm child that leads a process group; its id. What it says is appended to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # whichever of the two is first
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        code = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int, seconds: float) -> int | None:
    """The exit code of a process that ends within so many seconds (-signal where one ended it); None of one that goes on."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.005)


def _until(pid: int, condition: Callable[[], bool]) -> int | None:
    """Wait until something is so; the exit code, if the process ends first."""
    end = time.monotonic() + HUNG_S
    while not condition():
        code = ended(pid, 0.01)
        if code is not None:
            return code
        assert time.monotonic() < end, "it hangs"
    return None


def written(path: Path) -> int:
    """When, in ns; 0 of what is gone meanwhile."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def is_whole(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(part)
    except ValueError:
        return False
    return True


def cell_facts(results: Path) -> dict[str, Any]:
    """Of every finished cell the digests of its predictions and of all of its artefact, and what it measured of quality."""
    return dict(_cell_facts(results))


def _cell_facts(results: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(results.rglob("result.json")):
        folder, raw = path.parent, json.loads(path.read_text())
        yield f"{folder.name} scores", [raw["status"], raw["scores"], raw["history"]]
        for member in [folder / "predictions.jsonl", *sorted(folder.glob("artefact/**/*"))]:
            if member.is_file():
                yield f"{folder.name} {member.relative_to(folder)}", hashlib.sha256(member.read_bytes()).hexdigest()


def mlflow_runs(root: Path) -> list[str]:
    """The cells and trials of the runs in root/mlflow.db; read in another process, since this one goes on to fork."""
    with FORK.Pool(1) as pool:
        return pool.apply(_mlflow_runs, (root,))


def _mlflow_runs(root: Path) -> list[str]:
    import mlflow

    from pipeline.records.mlflow import CELL, DIGEST

    if not (root / "mlflow.db").exists():
        return []
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=5000)
    return [run.data.tags[CELL] + ("" if DIGEST in run.data.tags else " (half written)") for run in found]
