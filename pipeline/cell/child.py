"""A cell, or any work, in a child process of its own: its memory is freed, its death survived, lack of memory recognised."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell import identity, inputs, launch, record
from pipeline.cell import run as cell_run
from pipeline.core import progress, settings, signals
from pipeline.core.files import UserError, check_writable
from pipeline.data import recipe
from pipeline.measure import turns
from pipeline.measure.clock import Stopwatch
from pipeline.measure.memory import child_rss, kernel_oom_kills, out_of_memory
from pipeline.records import failed
from pipeline.records.finished import name as cell_name
from pipeline.records.results import Result
from pipeline.scoring.answers import headline
from pipeline.teachers.synthetic import rows as synthetic
from pipeline.training.ranks import Place, Ranks

POLL_S = 0.1


class Ended(UserError):
    """A cell's process was ended by a signal, not for lack of memory: from outside."""


@dataclass(frozen=True)
class Outcome:
    """code: the child's exit code, 128 + signal if one ended it. out_of_memory: why, if that was the reason."""

    code: int
    out_of_memory: str | None = None


class Limit:
    """Ends the children of this process when so many seconds have passed, or when told to: by SIGTERM first, which a training answers with a checkpoint
    after the step at hand, and by SIGKILL when GRACE_S more have passed.

    Args:
        beat: called as often as a child is looked at.
    """

    def __init__(self, seconds: float, beat: Callable[[], object] | None = None) -> None:
        self.seconds, self.beat, self.reached = seconds, beat, False
        self.watch = Stopwatch()
        self._asked: dict[int, Stopwatch] = {}

    def end(self) -> None:
        """End the children that run, at their next look."""
        self.seconds = 0.0

    def enforce(self, child: Child) -> None:
        """Called several times a second while a child runs."""
        if self.beat:
            self.beat()
        if self.watch.peek() < self.seconds:
            return
        self.reached = True
        if child.pid not in self._asked:
            self._asked[child.pid] = Stopwatch()
            child.send(signal.SIGTERM)
        elif self._asked[child.pid].peek() > GRACE_S:
            child.send(signal.SIGKILL)


GRACE_S = 5.0
_limit: Limit | None = None


@contextlib.contextmanager
def limited(seconds: float, beat: Callable[[], object] | None = None) -> Iterator[Limit]:
    """Children that run inside end in time: GRACE_S before so many seconds they are asked to."""
    global _limit
    before, _limit = _limit, Limit(max(0.0, seconds - GRACE_S), beat)
    try:
        yield _limit
    finally:
        _limit = before


class Watcher:
    """Is told of an experiment's cells as they run; this one prints a line as each begins, and leaves their own output as it is."""

    log: Path | None = None
    """The file that takes what cells print; None: they print."""

    def begins(self, cfg: DictConfig, number: int, count: int) -> None:
        """The cell starts, which is the number-th of so many."""
        print(f"[{number}/{count}] {cell_name(cfg)}", flush=True)

    def runs(self, progress: progress.Progress | None) -> None:
        """Several times a second: how far the cell is, if it said so."""

    def ends(self, cfg: DictConfig, code: int, reason: str) -> None:
        """The cell ended with this exit code; reason: why, where it gave up."""

    def passes(self, cfg: DictConfig) -> str:
        """Why this cell is not to be run; empty: it is."""
        return ""


class Child:
    """A forked process that runs `work`. The caller must not have started threads or used a GPU.

    Args:
        log: takes what the child prints; None: it prints.
    """

    def __init__(self, work: Callable[[], int], memory_limit_bytes: int | None = None, log: Path | None = None) -> None:
        self.limit, self._kills = memory_limit_bytes, kernel_oom_kills()
        self._over: str | None = None
        self.outcome: Outcome | None = None
        """None as long as it runs."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        with signals.held_back():
            self.pid = launch.fork()
            if self.pid == 0:
                _become_child(work, parent, log)

    def poll(self) -> Outcome | None:
        """How it ended; None: it runs. One that has grown beyond its limit is ended."""
        if self.outcome is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.outcome = self._ended(status)
                return self.outcome
            resident = child_rss(self.pid)
            if self.limit and resident and resident > self.limit and self._over is None:
                self._over = f"ended at {resident} resident bytes, above memory_limit_gb"
                self.send(signal.SIGKILL)
            if _limit is not None:
                _limit.enforce(self)
        return self.outcome

    def send(self, number: int) -> None:
        """A signal, where it still runs."""
        if self.outcome is None:
            os.kill(self.pid, number)

    def _ended(self, status: int) -> Outcome:
        if os.WIFEXITED(status):
            return Outcome(os.WEXITSTATUS(status))
        number = os.WTERMSIG(status)
        after = kernel_oom_kills()
        if number == signal.SIGKILL and self._over is None and self._kills is not None and after is not None and after > self._kills:
            self._over = "ended by the kernel for lack of memory (signal 9)"
        return Outcome(128 + number, self._over)


def run_in_child(work: Callable[[], int], memory_limit_bytes: int | None = None, polled: Callable[[], object] | None = None,
                 log: Path | None = None) -> Outcome:
    """Run `work` in a child and wait for it. SIGTERM and SIGINT are handed on to it.

    Args:
        polled: is called several times a second while the child runs.
    """
    child = Child(work, memory_limit_bytes, log)
    with handed_on(lambda: [child]):
        while (outcome := child.poll()) is None:
            if polled:
                polled()
            pause()
    return outcome


def pause() -> None:
    """Until it is time to look again."""
    threading.Event().wait(POLL_S)


@contextlib.contextmanager
def handed_on(children: Callable[[], Sequence[Child]]) -> Iterator[None]:
    """SIGTERM and SIGINT go to these processes inside. A child that is forked inside has the handlers of before: what is sent to it is its own."""
    def hand_on(number: int) -> None:
        for child in children():
            child.send(number)

    with signals.handled(hand_on):
        yield


def _become_child(work: Callable[[], int], parent: int, log: Path | None) -> None:
    code = 1
    try:
        signals.restore()
        if log is not None:
            _print_into(log)
        launch.dies_with(parent)
        code = work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        progress.failed(str(error))
        code = 2
    except KeyboardInterrupt:
        code = launch.INTERRUPTED
    except BaseException as error:
        traceback.print_exc()
        progress.failed(f"{type(error).__name__}: {' '.join(str(error).split())}")
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # a second interrupt, or a full disk, would have it go on in its parent's frames
            os._exit(code)


def _print_into(log: Path) -> None:
    """What this process prints, also from C, goes to the end of a file. Who drew on the terminal before the fork may have put its own streams in the place
    of Python's; these wait for a lock that nobody gives back here, if it was taken at the fork."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(one, "w", 1, "utf-8", "backslashreplace", closefd=False) for one in (1, 2))


class CellRun:
    """A cell in a child process of its own, begun here. Raises UserError for bad input.

    Args:
        started: Unix time from which its start-up is counted.
        watcher: takes its output, and is told how it ended.
        place: this process's among ranks that were started elsewhere (torchrun), which all begin this cell.
    """

    def __init__(self, cfg: DictConfig, shared: inputs.Shared | None, started: float | None, watcher: Watcher, place: Place | None = None) -> None:
        for group in (settings, recipe, synthetic):
            group.read(cfg)  # a misspelt key is reported before anything is started
        inputs.check_ahead(cfg)
        folder = identity.folder_of(cfg)
        check_writable(folder)
        identity.check_free(cfg)
        identity.code(cfg)  # read once, before the fork: of the code as it runs
        self.cfg, self.watcher, self.channel, self.place = cfg, watcher, progress.Channel(), place

        def run(**more: Any) -> int:
            print(progress.fresh_line() + summary(cell_run.run(cfg, shared=shared, folder=folder, started=started, **more)))
            return 0

        def work() -> int:
            if place is not None:
                return _of_torchrun(cfg, run, place)
            count = launch.ranks_of(cfg)
            with turns.behind(shared.gate if shared else None):
                return launch.run_ranks(functools.partial(_as_rank, cfg, run), count) if count else run()

        with progress.watched(self.channel):
            self.child = Child(work, cfg.memory_limit_gb and int(cfg.memory_limit_gb * 2**30), watcher.log)

    def poll(self) -> int | None:
        """The exit code, 0 once the result is on disk; None: it runs.

        Raises:
            Ended: by a signal, not for lack of memory.
        """
        done = self.child.poll()
        if done is None:
            self.watcher.runs(self.channel.read())
            return None
        told, cfg = self.channel.read(), self.cfg
        if reason := done.out_of_memory or (told.reason if told and done.code == launch.OUT_OF_MEMORY and self.place is None else ""):
            write = record.write_oom if done.out_of_memory else functools.partial(record.write_oom, device=launch.device_of(cfg))
            done = run_in_child(lambda: print(summary(write(cfg, reason))) or 0, log=self.watcher.log)  # its imports stay out of this process
        self.watcher.ends(cfg, done.code, told.reason if told else "")
        if done.code != launch.INTERRUPTED:
            failed.note(cfg, told.reason if told and done.code else "")
        if done.code > 128 and done.code != launch.INTERRUPTED:
            what = f"gave up: {told.reason}" if told and told.reason else f"was ended by signal {done.code - 128}"
            raise Ended(f"cell {cell_name(cfg)} {what}; run the same command again, it resumes from its last checkpoint")
        return done.code


def _as_rank(cfg: DictConfig, run: Callable[..., int], place: Place) -> int:
    """A rank's part of a cell."""
    with contextlib.suppress(cell_run.Through):
        return run(ranks=Ranks.join(place, launch.device_of(cfg)))
    return 0


def _of_torchrun(cfg: DictConfig, run: Callable[..., int], place: Place) -> int:
    """The same; one that is out of memory writes the cell's row itself, and torchrun ends the others."""
    try:
        return _as_rank(cfg, run, place)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(summary(record.write_oom(cfg, f"rank {place.rank} of {place.count}: {str(error).splitlines()[0]}", launch.device_of(cfg))))
        return launch.OUT_OF_MEMORY


def run_cell(cfg: DictConfig, shared: inputs.Shared | None, started: float | None, watcher: Watcher | None = None,
             meanwhile: Callable[[], object] | None = None, place: Place | None = None) -> int:
    """One cell in a child process, or in several (train.parallel); 0 once its result is on disk.

    Args:
        watcher: is told how far it is.
        meanwhile: is done here once the child has begun.
        place: as CellRun has it.
    """
    cell = CellRun(cfg, shared, started, watcher or Watcher(), place)
    bar = progress.ScoringBar(cfg.train.progress and cell.watcher.log is None and (place is None or place.rank == 0))
    with handed_on(lambda: [cell.child]):
        if meanwhile:
            meanwhile()
        while (code := cell.poll()) is None:
            bar.show(cell.channel.read())
            pause()
    bar.close()
    return code


def summary(result: Result) -> str:
    """One line on a finished cell."""
    if result.status != "ok" or result.test is None or result.phases is None:
        return f"{result.cell}: {result.status} ({result.error})"
    test = result.test
    interval = test.interval(result.metric)
    bounds = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return (
        f"{result.cell}: test {result.metric} {headline(test, result.metric):.3f}{bounds} "
        f"on {test.rows} rows, train {result.phases.train_s:.1f} s, wall {result.phases.wall_s:.1f} s"
    )
