"""One study searched on validation rows: trials one after another, then the best as a cell of its own."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from pipeline.cell import grid as cell_grid
from pipeline.cell import inputs, record
from pipeline.cell import run as cell_run
from pipeline.cell.child import run_in_child
from pipeline.cell.launch import BAD_INPUT, INTERRUPTED, OUT_OF_MEMORY
from pipeline.cell.packing import attempt
from pipeline.cell.room import AtOnce
from pipeline.core import locks as core_locks
from pipeline.core import signals
from pipeline.core.files import Unsuited, UserError, read_json, write_json
from pipeline.fan import jobs as fan_jobs
from pipeline.fan.run import cpu_share, gpu_share
from pipeline.measure.clock import Phases, Stopwatch, now
from pipeline.measure.machine import hardware, provenance
from pipeline.records import results
from pipeline.records.results import Result, Work
from pipeline.scoring import answers
from pipeline.search.space import Point, at
from pipeline.search.study import Study, Sweep, open_study, short

if TYPE_CHECKING:
    import optuna

    from pipeline.training.pack import Job, Running

TRIAL_FAILED = 77  # exit code of the process that talks to Ray, when a trial ended with an error
UNSUITED = 73  # exit code of a trial whose settings the input does not suit
NOT_ITS_OWN = (2, 128 + 9, 128 + 15)  # exit codes of bad input, and of a process that was ended from outside
LOCK_S = 5  # a sweep killed a moment ago may still hold its lock through a child that is ending
NO_GPU = "there is no GPU here, where packing would pay"
WAIT_S = 1.0
"""Between looks at what other processes of a shared study do."""
TPE_AT_ONCE = 10
"""Of a search that learns, no more than this: TPE draws its first ten at random anyway, and the others should know of some answers."""


@contextlib.contextmanager
def alone(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold the sweep's folder. Whoever holds it knows that a trial still marked as running is dead. shared: others search the same study, too."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a symbolic link, through which nothing is written; remove it, or set paths.sweeps to another folder")
    with contextlib.ExitStack() as stack:
        try:
            if not shared:
                stack.enter_context(core_locks.held(folder / ".lock", LOCK_S))
        except core_locks.Busy as error:
            raise UserError(f"another sweep is at work in {folder}, in {core_locks.holder(folder / '.lock')}; wait for it, or end it") from error
        yield


@dataclass
class Trials:
    """The trials of a study while they are searched, in this process."""

    study: Study
    cfg: DictConfig
    left_s: float | None
    """No trial is started later than this from now."""
    watch: Stopwatch = field(default_factory=Stopwatch)
    lap: Stopwatch = field(default_factory=Stopwatch)
    """Since a trial ended last."""

    beats: Stopwatch = field(default_factory=Stopwatch)
    """Since the last sign of life."""

    @property
    def wanted(self) -> bool:
        """Whether trials are to be answered still, and there is time to."""
        return self.in_time and self.study.answered < self.study.sweep.target

    @property
    def in_time(self) -> bool:
        return self.left_s is None or self.watch.peek() < self.left_s

    def claim(self, running: int = 0) -> tuple[optuna.Trial, Point] | None:
        """The next trial; None if no more is to be started beside those that run. Where other processes have the last ones, and none runs here, it waits:
        one of theirs may die."""
        while self.in_time:
            claimed = self.study.claim(running)
            if claimed or running or not self.study.shared or not self.wanted:
                return claimed
            threading.Event().wait(WAIT_S)
        return None

    def beat(self, trial_ids: Collection[int]) -> None:
        """Say that these trials are alive, as often as the others expect it."""
        if self.study.shared and self.beats.peek() > self.study.storage.heartbeat_s / 2:
            self.beats.lap()
            self.study.storage.beat(trial_ids)

    def ended(self, trial: optuna.Trial, chosen: Point, result: Result, pruned: bool = False) -> None:
        self.study.tell(trial, result, self.lap.lap(), pruned)
        self.study.write_trials()
        print(f"trial {self.study.answered} of {self.study.sweep.target}: {short(chosen)}: {_outcome(result, pruned)}", flush=True)


def search(study: Study, cfg: DictConfig, load: Callable[[], inputs.Shared]) -> None:
    """Run trials until `sweep.target` have an answer or the time is up. load: reads what the trials share, when the first one starts.

    Raises:
        UserError: a trial ended with an error (shown above it); started again, the search tries it once more.
    """
    if cfg.train.parallel != "none":
        raise UserError(f"train.parallel={cfg.train.parallel} is of cells, and a trial has one GPU; leave it out here (several trials at once: executor=ray)")
    sweep = study.sweep
    with study.turn():
        study.revive()
    study.write_trials()
    print(f"{study.answered} of {sweep.target} trials are done")
    trials, load = Trials(study, cfg, sweep.timeout_s), functools.cache(load)
    if sweep.executor == "ray":
        _on_ray(trials)
    elif study.answered < sweep.target:
        reason = refusal(sweep, cfg)
        if reason is None:
            reason = _packed(trials, load())
            with study.turn():
                study.revive()
        if reason:
            _not_packed(sweep, reason)
    if sweep.executor != "ray":
        _one_by_one(trials, load)


def refusal(sweep: Sweep, cfg: DictConfig) -> str | None:
    """Why the sweep is not packed, as far as that is known without touching a GPU."""
    import torch

    if sweep.executor == "sequential":
        return "sweep.executor asks for it"
    if "peak_memory" in sweep.objectives:
        return "the memory of a packed trial is not a single run's"
    if sweep.executor == "auto" and (cfg.device == "cpu" or torch.version.cuda is None):
        return NO_GPU
    return None


def _not_packed(sweep: Sweep, reason: str) -> None:
    if sweep.pruner:
        raise UserError(f"sweep.pruner needs packed trials, but {reason}; set sweep.pruner=null")
    if sweep.executor != "sequential":
        print(f"one trial after another, because {reason}", flush=True)


def _outcome(result: Result, pruned: bool) -> str:
    if result.status == "error":
        return f"{result.error}; it counts as a trial without a value"
    if result.status != "ok":
        return f"{'diverged' if result.status == 'diverged' else 'out of memory'} ({result.error})"
    value = f"validation {result.metric} {getattr(result.scores['validation'], result.metric):.3f}"
    train_s = result.phases.train_s if result.phases and result.phases.train_s else 0
    if result.packed:
        return f"{value}, " + (f"pruned at step {result.work.steps if result.work else 0}" if pruned else f"{train_s:.1f} s of the pack's steps")
    peak = result.memory.peak_bytes if result.memory else None
    return f"{value}{f', peak {peak / 2**30:.2f} GiB' if peak else ''}, train {train_s:.1f} s"


# one after another


def _one_by_one(trials: Trials, load: Callable[[], inputs.Shared]) -> None:
    study = trials.study
    scratch = study.folder / (f".trial-{socket.gethostname()}-{os.getpid()}" if study.shared else ".trial")
    while trials.wanted:
        shared = load()
        trials.lap.lap()  # reading is no trial's time
        if (claimed := trials.claim()) is None:
            break
        trial, chosen = claimed
        try:
            result = run_trial(at(trials.cfg, chosen), shared, scratch, short(chosen), study.sweep.count_errors,
                               functools.partial(trials.beat, [trial._trial_id]))
            trials.ended(trial, chosen, result)
        except BaseException:
            study.fail(trial.number)
            study.write_trials()
            raise


def run_trial(cfg: DictConfig, shared: inputs.Shared, scratch: Path, label: str, count_errors: bool = False,
              meanwhile: Callable[[], object] = lambda: None) -> Result:
    """One trial in a child process: its memory is its own, and running out of it is a result. `scratch` is emptied.

    Args:
        count_errors: an error of its own is a result, too, and so are settings that the input does not suit.
        meanwhile: called again and again until it ends.

    Raises:
        UserError: it ended otherwise: bad input and a full disk are no trial's own.
    """
    shutil.rmtree(scratch, ignore_errors=True)

    def work() -> int:
        try:
            results.write(scratch, cell_run.run(cfg, shared=shared, splits=("validation",), folder=None, started=now()))
        except Unsuited as error:
            print(f"error: {error}", file=sys.stderr)
            return UNSUITED
        return 0

    try:
        done = run_in_child(work, cfg.memory_limit_gb and int(cfg.memory_limit_gb * 2**30), meanwhile)
        if done.out_of_memory:
            return record.oom_result(cfg, done.out_of_memory, hardware("cpu"))
        if done.code == INTERRUPTED:
            raise KeyboardInterrupt
        if done.code and count_errors and done.code not in NOT_ITS_OWN:
            why = "its settings do not suit the input" if done.code == UNSUITED else f"ended with code {done.code}"
            return record.bare_result(cfg, status="error", error=why, hardware=hardware("cpu"), precision=cfg.precision.name)
        if done.code:
            raise UserError(f"the trial with {label} ended with code {done.code} (see above); fix the cause and run again")
        return results.read(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# packed


def _packed(trials: Trials, shared: inputs.Shared) -> str | None:
    """Packs of trials while more are wanted. Returns why trials are left for single runs, if they are.

    Raises:
        UserError: a trial ended with an error; or sweep.executor=packed, but the technique cannot be packed.
    """
    study, cfg, sweep = trials.study, trials.cfg, trials.study.sweep
    slots = sweep.slots
    while trials.wanted:
        with study.turn():
            study.revive()
        left_s = None if trials.left_s is None else trials.left_s - trials.watch.peek()

        def work(tell: Callable[[int], None], slots: int | None = slots, left_s: float | None = left_s) -> None:
            PackedTrials(open_study(study.folder, cfg, sweep), cfg, left_s).run(shared, slots, tell)

        ended = attempt(work, shared, cfg.memory_limit_gb)
        if ended.refused and sweep.executor == "packed":
            raise UserError(f"sweep.executor=packed, but {ended.refused}; choose auto or sequential")
        if ended.refused:
            return ended.refused
        if ended.out_of_memory:
            slots = ended.fewer()
            if slots is None:
                return "not even one trial fits beside what a pack needs"
            print(f"{ended.slots} trials at once ran out of memory; continuing with {slots}", flush=True)
    return None


@dataclass
class PackedTrials(Trials):
    """The trials of one pack, in its process."""

    running: dict[int, Any] = field(default_factory=dict)
    """Trials that are being tried, by number."""
    slots: int = 1

    def run(self, shared: inputs.Shared, slots: int | None, tell: Callable[[int], None]) -> None:
        from pipeline.cell.packing import Packing
        from pipeline.engine.parts import Unsupported

        sweep = self.study.sweep
        packing = Packing([at(self.cfg, settings) for settings in sweep.space.covers()], shared)
        if sweep.executor == "auto" and packing.parts.device.type != "cuda":
            raise Unsupported(NO_GPU)
        left = sweep.target - self.study.answered
        at_once = min(left, TPE_AT_ONCE) if sweep.sampler == "tpe" else left
        self.packing, self.about = packing, provenance()
        self.slots = min(slots, left) if slots else packing.slots(at_once)
        tell(self.slots)
        pack = packing.open(self.slots, left, self._prune)
        print(f"{self.slots} trials at once", flush=True)
        try:
            with signals.handled(pack.stop), self._heart():
                pack.run(self._take, self._done)
        finally:
            for running in self.running:
                self.study.fail(running)
            self.study.write_trials()
            pack.close()

    @contextlib.contextmanager
    def _heart(self) -> Iterator[None]:
        """A thread that says that the running trials are alive; this process does not fork."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(1):
                self.beat([trial._trial_id for trial in list(self.running.values())])

        thread = threading.Thread(target=beat, daemon=True)
        if self.study.shared:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            if self.study.shared:
                thread.join()

    def _take(self, free: int) -> list[Job]:
        jobs: list[Job] = []
        while len(jobs) < free and (claimed := self.claim(len(self.running))):
            trial, chosen = claimed
            self.running[trial.number] = trial
            jobs.append(self.packing.job(at(self.cfg, chosen), (trial, chosen)))
        return jobs

    def _prune(self, run: Running) -> bool:
        if self.study.sweep.pruner is None:
            return False
        trial = run.job.name.tag[0]
        trial.report(run.history[-1]["validation_metric"], run.step)
        return bool(trial.should_prune())

    def _done(self, run: Running) -> None:
        trial, chosen = run.job.name.tag
        self.ended(trial, chosen, self._result(run), run.pruned)
        del self.running[trial.number]

    def _result(self, run: Running) -> Result:
        member = run.job.name
        seen = run.tokens + run.padding
        work = Work(steps=run.step, tokens=run.tokens, padding_share=run.padding / seen if seen else None, engine="handwritten",
                    diverged_at=run.diverged_at)
        error = record.diverged(work, answers.finite(run.scores[1]))
        phases = Phases(run.seconds, 0, 0, 0, run.seconds, 0, 0, 0, 0)
        return record.bare_result(
            member.cfg, status="diverged" if error else "ok", error=error, precision=self.packing.parts.precision, scores={"validation": run.scores[0]},
            phases=phases, work=work, history=run.history, notes=run.notes, packed=True, slots=self.slots,
            hardware=hardware(self.packing.parts.device), provenance=self.about,
        )


# on Ray


def _on_ray(trials: Trials) -> None:
    """Trials as Ray's tasks, as many at once as the cluster holds, from a process of its own.

    Raises:
        UserError: a trial ended with an error, or no cluster answers.
    """
    study, cfg, sweep = trials.study, trials.cfg, trials.study.sweep
    settings = fan_jobs.read_ray(cfg)
    if not trials.wanted:
        return

    def work() -> int:
        from pipeline.fan.cluster import ClusterLost, dispatch

        own = Trials(open_study(study.folder, cfg, sweep), cfg, trials.left_s)
        try:
            code = dispatch([lambda cpus, gpus: RayTrials(own, settings, cpus, gpus)], settings, Path(cfg.paths.work), lambda job, code, value: None)
        except ClusterLost:
            return fan_jobs.LOST
        return TRIAL_FAILED if code else 0

    for left in reversed(range(settings.retries + 1)):
        code = run_in_child(work).code
        if code in (INTERRUPTED, 128 + signal.SIGTERM):
            raise KeyboardInterrupt
        if code == 0:
            return
        if code in (BAD_INPUT, TRIAL_FAILED):
            break
        with study.turn():
            study.revive()
        print(f"the Ray cluster was lost{'; starting again' if left else ''}", file=sys.stderr, flush=True)
    raise UserError(f"the trials on Ray ended with code {code} (see above); fix the cause and run again")


class RayTrials(fan_jobs.Queue):
    """The trials of a study as jobs, asked for as places are free: a search that learns then knows of the answers so far."""

    def __init__(self, trials: Trials, settings: fan_jobs.Ray, cpus: float, gpus: float) -> None:
        super().__init__([], settings.retries)
        self.trials, self.total = trials, trials.study.sweep.target
        self.gpus = gpu_share(trials.cfg, settings, gpus, AtOnce())
        self.cpus = cpu_share(settings, cpus, gpus, self.gpus)
        places = max(1, int(min(cpus / self.cpus, gpus / self.gpus if self.gpus else math.inf)))
        self.places = min(places, TPE_AT_ONCE) if trials.study.sweep.sampler == "tpe" else places
        self.running: dict[str, tuple[optuna.Trial, Point]] = {}

    def take(self) -> fan_jobs.Job | None:
        if job := super().take():
            return job
        trials = self.trials
        trials.beat([trial._trial_id for trial, _ in self.running.values()])
        if len(self.running) >= self.places or self.failed or not (claimed := trials.claim(len(self.running))):
            return None
        trial, chosen = claimed
        name = f"trial-{trial.number}"
        self.running[name] = claimed
        extra = {"label": short(chosen), "count_errors": trials.study.sweep.count_errors}
        return fan_jobs.Job(name, f"{__name__}:on_worker", [at(trials.cfg, chosen)], gpus=self.gpus, cpus=self.cpus, extra=extra)

    def through(self, job: fan_jobs.Job, code: int, value: Any) -> None:
        trial, chosen = self.running.pop(job.name)
        if code == 0:
            with tempfile.TemporaryDirectory() as arrived:
                write_json(Path(arrived) / "result.json", value)
                self.trials.ended(trial, chosen, results.read(arrived))
        elif code == OUT_OF_MEMORY:
            self.trials.ended(trial, chosen, record.oom_result(job.cells[0], "Ray ended its worker, since the machine was out of memory", hardware("cpu")))
        else:
            self.trials.study.fail(trial.number)
            self.trials.study.write_trials()


def on_worker(cells: list[DictConfig], request: dict[str, Any], kept: Any) -> tuple[int, Any]:
    """A trial on a worker: its result as JSON."""
    [cfg] = cells
    with tempfile.TemporaryDirectory() as scratch:
        result = run_trial(cfg, kept.of(cells, request), Path(scratch) / "trial", request["label"], request["count_errors"])
        results.write(Path(scratch) / "made", result)
        return 0, read_json(Path(scratch) / "made" / "result.json")


def study_name(cfg: DictConfig) -> str:
    return f"{cfg.technique.name}+{cfg.variant}" if cfg.variant else str(cfg.technique.name)


def of_grid(cfg: DictConfig, words: Collection[str]) -> DictConfig:
    """The cell's config with the first seed and train_rows of the experiment's grid, unless the words name them."""
    if "experiments" not in words:
        return cfg
    grid = cell_grid.grid(cfg.experiment)["grid"]
    wanted = {"seed": grid["seeds"][0], "train_rows": grid["train_rows"][0]}
    return at(cfg, {key: value for key, value in wanted.items() if key not in words})
