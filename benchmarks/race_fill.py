"""Filling the cache of finished runs on GPUs in little time: processes that share the devices take jobs from a list, each of which is done once.

Library of `python -m benchmarks.race fill` (docs/race.md has the command). A job is some seeds of a technique on a task and a base. What makes it cheap:

- the bases are read once, before the processes are forked; a process keeps the last base on its device and copies it there;
- seeds of an adapter that the engine packs train at once (pipeline/cell/packing.py);
- those of another technique go one after another through one capture of the step (benchmarks/race_runs.py), made for the rows of all of them;
- rows that are answered are turned to tokens once a job; no inference figures, probes, artefacts.

A job is locked by the process that does it, which a kill undoes, and its file is replaced atomically after every seed: started again, the fill goes on with
what is missing. Jobs come in the order of TECHNIQUES, cheap ones first, each on all tasks and bases before the next: what is there when the time is up is
a smaller cache, not a lopsided one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.race_cache import read, write
from benchmarks.race_runs import CHECKS, Bases, runs
from benchmarks.rates import NEEDS_TEACHER, TEACHERS
from pipeline.core.files import UserError, write_text
from pipeline.core.locks import Busy, held

EPOCHS, ROWS, TEST_ROWS = 2, 480, 1000
"""Of a run: epochs, training rows (a validation has a fifth as many), most test rows."""
WORDS = (f"train_rows={ROWS}", f"train.epochs={EPOCHS}", f"train.validations={CHECKS}",
         f"evaluate.test_rows={TEST_ROWS}", "evaluate.forgetting=false", "evaluate.transfer_rows=0", "tracking=none", "train.progress=false")
TASKS = ("trec", "vader_movies_5", "cqa", "esnli")
FIRST_SEED, NEXT, AGAIN = 1, 1000, 3
"""The first seed; what is added to the seed of a run that diverged, for the one that takes its place; how often that is done."""
AT_ONCE = 8
"""Seeds that are packed at once: as fast as 16 where a dozen processes share a device, and their memory fits."""
QUICK, SLOW = 16, 4
"""Seeds of a job: where they are packed or a run takes little; where a run takes long, so that no process has much left when the others are through."""
TECHNIQUES: dict[str, int] = {
    "zero_shot": QUICK, "few_shot": QUICK, "lora": QUICK, "rslora": QUICK, "prompt_tuning": QUICK, "prompt_tuning_text": QUICK, "full": QUICK, "qlora": QUICK,
    "pissa": QUICK, "olora": QUICK, "prompt_tuning_random": QUICK, "head_only": QUICK, "top_layers": QUICK, "bitfit_added": QUICK,
    "ln_tuning": QUICK, "frozen_embeddings": QUICK, "ia3": 8, "lora_plus": 8, "adapter_parallel": 8, "adapter_pfeiffer": 8,
    "adapter_houlsby": 8, "prefix_tuning": 8, "compacter": 8, "p_tuning": 8, "loftq": QUICK, "dora": 8, "lokr": 8, "vera": 8, "loha": 8, "oft": SLOW,
    "ladder": SLOW, "step_by_step_lora": QUICK, "step_by_step": QUICK, "qdora": SLOW, "adalora": SLOW, "boft": SLOW, "lora_int8": SLOW,
}
"""What `techniques=all` means, the cheap ones first (experiments/rates has seconds), and seeds of a job: where the set-up takes a minute, as LoftQ's
decompositions do, all of them. step_by_step asks for a teacher."""


@dataclass(frozen=True)
class Job:
    """Seeds of a technique on a task and a base."""

    model: str
    task: str
    technique: str
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.model}.{self.task}.{self.technique}.{self.seeds[0]}"


def jobs(models: Sequence[str], tasks: Sequence[str], techniques: Sequence[str], seeds: int) -> list[Job]:
    """All jobs, in the order in which they are taken."""
    every = range(FIRST_SEED, FIRST_SEED + seeds)
    return [Job(model, task, technique, tuple(every[first : first + size]))
            for technique in techniques for size in [TECHNIQUES.get(technique, QUICK)] for first in range(0, seeds, size)
            for model in reversed(models) for task in tasks if technique not in NEEDS_TEACHER or TEACHERS.get(task, "none") != "none"]


class Store:
    """Lines of runs by job: a file a job in a folder, and those of a package that are taken as they are."""

    def __init__(self, folder: Path, known: Path | None = None, retry: bool = False) -> None:
        """retry: what ended with an error is forgotten."""
        self.folder = folder
        self.known: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for line in read(known) if known is not None else []:
            if not (retry and "error" in line):
                self.known.setdefault((line["model"], line["task"], line["technique"]), []).append(line)
        for path in folder.glob("*.jsonl") if retry else ():
            write(path, [line for line in read(path) if "error" not in line])

    def path(self, job: Job) -> Path:
        return self.folder / f"{job.name}.jsonl"

    def own(self, job: Job) -> list[dict[str, Any]]:
        """The lines of its file."""
        return read(self.path(job)) if self.path(job).exists() else []

    def lacking(self, job: Job) -> list[int]:
        """Seeds to run: those without a line, and one for each that diverged; none where the technique does not go with the base."""
        lines = [*self.own(job), *self.known.get((job.model, job.task, job.technique), [])]
        if any("error" in line for line in lines):
            return []
        diverged = {line["seed"]: line["diverged_at"] is not None for line in lines}
        wanted = []
        for seed in job.seeds:
            tried = next((s for s in range(seed, seed + NEXT * (AGAIN + 1), NEXT) if not diverged.get(s, False)), None)
            if tried is not None and tried not in diverged:
                wanted.append(tried)
        return wanted

    def add(self, job: Job, lines: Sequence[dict[str, Any]]) -> None:
        """Atomically."""
        about = {"model": job.model, "task": job.task, "technique": job.technique}
        write_text(self.path(job), "".join(json.dumps(line) + "\n" for line in [*self.own(job), *(about | line for line in lines)]))

    def lock(self, job: Job) -> Path:
        return self.folder / "locks" / f"{job.name}.lock"

    def crashed(self, job: Job) -> bool:
        """Note that the job ended with an error of the device; whether that is the first time."""
        note = self.folder / "locks" / f"{job.name}.crashed"
        first = not note.exists()
        note.touch()
        return first

    def all(self) -> list[dict[str, Any]]:
        """Every line there is, sorted."""
        lines = [line for some in self.known.values() for line in some]
        lines += [line for path in sorted(self.folder.glob("*.jsonl")) for line in read(path)]
        by_run = {(line["model"], line["task"], line["technique"], line["seed"]): line for line in lines}
        return [by_run[key] for key in sorted(by_run)]


# the processes


@dataclass(frozen=True)
class Asked:
    """What `fill` was asked for. overrides: Hydra's words for every cell; gpus: which devices, none: this machine's CPU; processes: on each of them;
    limit_s: seconds after which no seed is begun; grace_s: after them, until processes are ended."""

    jobs: Sequence[Job]
    store: Store
    overrides: Sequence[str]
    gpus: Sequence[str] = ()
    processes: int = 1
    limit_s: float = math.inf
    grace_s: float = 20.0

    def words(self, job: Job) -> list[str]:
        return [*WORDS, *self.overrides, f"model={job.model}", f"task={job.task}", f"technique={job.technique}",
                f"teacher={TEACHERS.get(job.task, 'none')}"]


def fill(asked: Asked) -> int:
    """Do what is missing, in this process or in several. Returns how many seeds are still missing."""
    from pipeline.cell.inputs import preload
    from pipeline.core.compose import compose
    from pipeline.measure.clock import Stopwatch

    watch, missing = Stopwatch(), [job for job in asked.jobs if asked.store.lacking(job)]
    if missing:
        first = {job.model: job for job in missing}
        shared = preload([compose([*asked.words(job), f"seed={FIRST_SEED}"]) for job in first.values()])
        places = processes.places(asked.gpus, asked.processes)
        print(f"{watch.peek():.0f} s: {len(missing)} of {len(asked.jobs)} jobs are not done; {len(places)} processes", flush=True)
        processes.run(lambda: work(asked, shared, watch), places, watch, asked.limit_s, asked.grace_s)
    return sum(len(asked.store.lacking(job)) for job in asked.jobs)


def work(asked: Asked, shared: Any, watch: Any) -> None:
    """Take jobs that nobody else does until none is left or the time is up. One that fails for lack of memory is taken once more, with fewer at once."""
    bases, tried, parent = Bases(shared), Counter[str](), os.getppid()

    def over() -> bool:
        return watch.peek() > asked.limit_s or os.getppid() != parent  # nobody is left to wait for it

    while True:
        before = sum(tried.values())
        for job in asked.jobs:
            if over():
                return
            if tried[job.name] > 2 or not asked.store.lacking(job):
                continue
            with contextlib.suppress(Busy), held(asked.store.lock(job)):
                seeds = asked.store.lacking(job)
                if seeds:
                    _do(asked, job, seeds, bases, watch, over, AT_ONCE >> tried[job.name])
                    tried[job.name] += 1
        if sum(tried.values()) == before:
            return


DEVICE_ERROR = "CUDA error"
"""After one of these a process can use the device no more."""


def _do(asked: Asked, job: Job, seeds: Sequence[int], bases: Bases, watch: Any, over: Callable[[], bool], most: int) -> None:
    """A job's seeds, each added as it ends. A technique that does not go with the base has a line that says so; so has one that takes the device with it
    for the second time, the first time this process ends (an exception) and another takes the job."""
    from pipeline.measure.memory import out_of_memory

    begun, count = watch.peek(), 0
    try:
        for line in runs(asked.words(job), seeds, bases, most):
            asked.store.add(job, [line])
            count += 1
            if over():
                break
        said = f"{count} seeds"
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if DEVICE_ERROR in said and asked.store.crashed(job):
            raise
        if isinstance(error, UserError) or not out_of_memory(error):
            asked.store.add(job, [{"seed": seeds[0], "error": said}])
    bases.clean()
    print(f"{watch.peek():.0f} s: {job.name}: {said} in {watch.peek() - begun:.1f} s", flush=True)


# what is there


def lacks(store: Store, asked: Sequence[Job]) -> str:
    """Markdown: finished seeds of every technique by base and task, and what kept others away."""
    places = list(dict.fromkeys((job.model, job.task) for job in asked))
    wanted: Counter[tuple[str, str, str]] = Counter()
    missing: Counter[tuple[str, str, str]] = Counter()
    for job in asked:
        wanted[job.model, job.task, job.technique] += len(job.seeds)
        missing[job.model, job.task, job.technique] += len(store.lacking(job))
    errors = {(line["model"], line["task"], line["technique"]): line["error"] for line in store.all() if "error" in line}
    rows = ["| technique | " + " | ".join(f"{model} {task}" for model, task in places) + " |", "| --- |" + " --: |" * len(places)]
    for technique in dict.fromkeys(job.technique for job in asked):
        keys = [(model, task, technique) for model, task in places]
        cells = ["error" if key in errors else str(wanted[key] - missing[key]) if wanted[key] else "" for key in keys]
        rows.append(f"| {technique} | {' | '.join(cells)} |")
    said = [f"{' '.join(key)}: {error}" for key, error in sorted(errors.items())]
    return "\n".join([*rows, *said])


def package(store: Store, to: Path) -> int:
    """Write every finished run into one compressed file. Returns how many there are."""
    lines = store.all()
    if not lines:
        raise UserError(f"{store.folder} holds no finished run; fill it with python -m benchmarks.race fill")
    write(to, lines)
    print(f"{to}: {len(lines)} lines, {to.stat().st_size / 2**20:.1f} MiB", file=sys.stderr)
    return len(lines)
