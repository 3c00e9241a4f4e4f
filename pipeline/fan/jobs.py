"""What is handed to workers, and what is left of it: jobs in order, tried again on another worker a bounded number of times."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig

from pipeline.cell import identity
from pipeline.cell.launch import BAD_INPUT, INTERRUPTED
from pipeline.core.compose import plain
from pipeline.core.schema import AtLeast0, AtLeast1, Positive, Within
from pipeline.core.settings import build
from pipeline.records.finished import name as cell_name

BUSY, LOST, CROWDED = 70, 71, 73
"""What a job ends with besides a cell's codes: another process computes it; its worker died; it ran out of a GPU's memory beside other cells."""


@dataclass(frozen=True)
class Ray:
    """The config group ray."""

    address: str | None = None
    """Of a running cluster (auto, host:6379); null: one of this machine's CPUs and GPUs, which ends with the command."""
    dashboard: bool = True
    """Ray's pages, of a cluster that the command starts."""
    cpus: Annotated[float, Within(0, above=True)] | None = None
    """CPUs of a cell; null: of a cell on a GPU as many as there are for each, else one."""
    gpus: Annotated[float, Within(0, 1)] | None = None
    """GPUs of a cell; null: the share of one that its forecast asks for, a quarter at least, an eighth with 16 CPUs a GPU (with train.parallel: train.gpus).
    Cells on one GPU take turns."""
    retries: AtLeast0 = 2
    """How often a cell is tried again on another worker after its own died or it ended with an error."""
    store: Literal["shared", "objects"] = "shared"
    """shared: workers see this folder under its path. objects: code, data and models reach them by Ray, and results come back by it."""
    cache: str | None = None
    """objects: a worker's folder for what it was sent; null: alignscope below its folder for temporary files."""


@dataclass(frozen=True)
class Slurm:
    """The config group slurm. Keys beyond these are submitit's (`options`)."""

    jobs: AtLeast1 = 16
    """Jobs of the array at most; the missing cells are dealt out to them."""
    timeout_min: AtLeast1 = 240
    cpus: AtLeast1 = 8
    gpus: AtLeast0 = 1
    memory_gb: Positive | None = None
    partition: str | None = None
    options: dict | None = None
    """Further parameters of submitit's executor: slurm_account, slurm_qos, slurm_setup, slurm_additional_parameters, ..."""
    retries: AtLeast0 = 2
    """How often the cells that jobs left missing are submitted again."""


def read_ray(cfg: DictConfig) -> Ray:
    """The checked config group ray. Raises UserError naming the key."""
    made: Ray = build(Ray, plain(cfg)["ray"], "ray")
    return made


def read_slurm(cfg: DictConfig) -> Slurm:
    """The checked config group slurm. Raises UserError naming the key."""
    made: Slurm = build(Slurm, plain(cfg)["slurm"], "slurm")
    return made


@dataclass
class Job:
    """Work for one worker.

    work: "<module>:<function>", called as (cells, request, shared) in a process that keeps base models (pipeline/fan/host.py); it returns an exit code.
    needs: names of jobs that come first. brings: the folder that it writes for one cell, or None.
    """

    name: str
    work: str
    cells: Sequence[DictConfig]
    needs: frozenset[str] = frozenset()
    brings: Path | None = None
    gpus: float = 0
    cpus: float = 1
    extra: dict[str, Any] = field(default_factory=dict)
    """What `work` reads of its request besides the cells."""
    tries: int = 0
    avoid: set[str] = field(default_factory=set)
    """Nodes on which it failed."""
    held: Any = None


class Queue:
    """Jobs that wait, run and are done. The order is theirs; one that needs another comes after it."""

    def __init__(self, jobs: Iterable[Job], retries: int) -> None:
        self.retries = retries
        self.ready: deque[Job] = deque()
        self.blocked: list[Job] = []
        self.busy: list[Job] = []
        self.names: set[str] = set()
        """Of jobs that are not done."""
        self.done: set[str] = set()
        self.failed: dict[str, int] = {}
        jobs = list(jobs)
        self.names |= {job.name for job in jobs}
        for job in jobs:
            (self.blocked if job.needs & self.names else self.ready).append(job)
        self.total = len(jobs)

    @property
    def left(self) -> int:
        """Jobs that wait; those that run are the caller's."""
        return len(self.ready) + len(self.blocked) + len(self.busy)

    def take(self) -> Job | None:
        """The next job that nothing holds up, if there is one."""
        return self.ready.popleft() if self.ready else None

    def look_again(self) -> None:
        """Let those that another process was computing be tried again."""
        self.ready.extend(self.busy)
        self.busy.clear()

    def ended(self, job: Job, code: int, node: str | None = None) -> Literal["done", "again", "failed", "elsewhere"]:
        """What becomes of a job that ended with this code on this node."""
        if code == BUSY:
            self.busy.append(job)
            return "elsewhere"
        if code == CROWDED:
            job.gpus, job.extra["at_once"] = 1.0, 1
            self.ready.append(job)
            return "again"
        if code not in (0, BAD_INPUT, INTERRUPTED) and job.tries < self.retries:
            job.tries += 1
            job.avoid |= {node} if node else set()
            self.ready.append(job)
            return "again"
        self.names.discard(job.name)
        if code:
            self.failed[job.name] = code
        else:
            self.done.add(job.name)
        if self.blocked:
            self._unblock()
        return "failed" if code else "done"

    def through(self, job: Job, code: int, value: Any) -> None:
        """Called with every job that is done or failed, its code and the value that it left."""

    def _unblock(self) -> None:
        for job in list(self.blocked):
            if job.needs & self.failed.keys():
                self.blocked.remove(job)
                self.failed[job.name] = BAD_INPUT
                self.names.discard(job.name)
                print(f"{job.name}: not started, because {identity.few(sorted(job.needs & self.failed.keys()))} failed", flush=True)
            elif not job.needs & self.names:
                self.blocked.remove(job)
                self.ready.append(job)


def needs(cells: Sequence[DictConfig]) -> dict[str, frozenset[str]]:
    """By a cell's name the cells among these that it reads, such as the one it begins at."""
    folders = {identity.folder_of(cfg): cell_name(cfg) for cfg in cells}
    return {cell_name(cfg): frozenset(folders[p.parent] for p in identity.reads(cfg) if p.parent in folders) for cfg in cells}
