"""The ranks of a cell that several GPUs train: started by the cell's process, one for each GPU, watched, and all ended when one fails.

Library of cell/child.py. What a rank could not do it says through a pipe, so that the cell gives up with one sentence: the cause's, not that of the ranks
that lost it. torchrun starts the ranks itself instead (ranks.of_torchrun), and ends them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from omegaconf import DictConfig

from pipeline.core import progress, signals
from pipeline.core.compose import plain
from pipeline.core.files import UserError
from pipeline.core.names import class_of
from pipeline.core.settings import read
from pipeline.measure import machine
from pipeline.measure.clock import Stopwatch
from pipeline.measure.memory import kernel_oom_kills, out_of_memory
from pipeline.training.ranks import Place

OUT_OF_MEMORY, BAD_INPUT, INTERRUPTED = 72, 2, 130
"""Exit codes of a cell, and of the processes that it starts: no memory; refused; ended by a signal."""
PR_SET_PDEATHSIG = 1
POLL_S = 0.05
GRACE_S = 1.0
"""How long after the first failure the others' are waited for: a rank that died is the cause of what its neighbours say."""
STOP_S = 120.0
"""How long ranks that were told to stop may take for the step at hand and its checkpoint, once one of them has."""
SAID = 3000
"""Bytes of what a rank says, at most: fewer than a pipe takes in one piece."""


def device_of(cfg: DictConfig) -> str:
    """cpu or cuda, told without torch."""
    return "cuda" if cfg.device != "cpu" and machine.visible_gpus() else "cpu"


def ranks_of(cfg: DictConfig) -> int:
    """How many ranks the cell is trained by; 0: it does without any.

    Raises:
        UserError: fewer GPUs than were asked for, a number that the CPU needs and was not given, or fewer rows a step than ranks.
    """
    train = read(cfg).train
    if train.parallel == "none" or not class_of(plain(cfg)["method"], "method").trains:
        return 0
    there = machine.visible_gpus() if device_of(cfg) == "cuda" else None
    if there is None and train.gpus is None:
        raise UserError(f"train.parallel={train.parallel} on the CPU needs the number of processes; add train.gpus=2, or set train.parallel=none")
    count = train.gpus or there or 1
    if there is not None and count > there:
        raise UserError(f"train.gpus={count}, but {there} GPUs are visible here; lower it, or leave it out to use them all")
    if count > train.batch_size:
        raise UserError(f"train.batch_size={train.batch_size} is fewer rows a step than the {count} GPUs; raise it or set train.gpus")
    return 0 if count == 1 and train.parallel == "ddp" else count


def declared(cfg: DictConfig) -> int:
    """How many ranks a cell that runs on another machine will have; 0: it does without any. Raises UserError where its config leaves that open."""
    train = read(cfg).train
    if train.parallel == "none" or not class_of(plain(cfg)["method"], "method").trains:
        return 0
    if train.gpus is None:
        raise UserError(f"train.parallel={train.parallel} on workers needs the number of GPUs that a cell is given; add train.gpus=2")
    return train.gpus


@dataclass(frozen=True)
class Failure:
    """How a rank ended other than well. kind: signal, memory, input or error; said: the sentence, or the trace."""

    rank: int
    kind: str
    said: str = ""
    number: int = 0

    @property
    def weight(self) -> int:
        """The cause comes first: a lost neighbour shows as an error."""
        return ("signal", "memory", "input", "error").index(self.kind)


def run_ranks(work: Callable[[Place], int], count: int) -> int:
    """Fork `count` ranks that do `work` on this machine, and wait for all. Returns 0, INTERRUPTED, OUT_OF_MEMORY (progress has the reason), 1 after an
    error whose trace was printed, or 128 + a signal that ended one.

    Raises:
        UserError: one did.
    """
    kills = kernel_oom_kills()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are all here
        places = [Place(rank, count, rank, f"file://{folder}/meeting") for rank in range(count)]
        reads, writes = os.pipe()
        os.set_blocking(reads, False)
        pids = {_fork(work, place, writes): place.rank for place in places}
        os.close(writes)
        with signals.handled(lambda number: _hand_on(pids, number)):
            codes, ended = _wait(pids)
        said = _said(reads)
    if not any(codes.values()):
        return 0
    failures = list(filter(None, (_failure(rank, code, said.get(rank), rank in ended) for rank, code in codes.items() if code not in (0, INTERRUPTED))))
    if not failures:
        return INTERRUPTED
    order = [*said, *range(count)]
    return _give_up(min(failures, key=lambda f: (f.weight, order.index(f.rank))), count, kills)


def _fork(work: Callable[[Place], int], place: Place, writes: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = fork()
    if pid == 0:
        _become_rank(work, place, parent, writes)
    return pid


def _become_rank(work: Callable[[Place], int], place: Place, parent: int, writes: int) -> None:
    code, kind, said = 1, "", ""
    try:
        dies_with(parent)
        if place.rank:
            progress.mute()
        code = work(place)
    except UserError as error:
        code, kind, said = BAD_INPUT, "input", str(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BaseException as error:
        memory = out_of_memory(error)
        code, kind = (OUT_OF_MEMORY, "memory") if memory else (1, "error")
        said = str(error).splitlines()[0] if memory else traceback.format_exc()
    finally:
        try:
            if kind:
                os.write(writes, (json.dumps({"rank": place.rank, "kind": kind, "said": said[-SAID:]}) + "\n").encode())
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # as in child.py
            os._exit(code)


def fork() -> int:
    """os.fork after OpenMP's worker threads were ended: a fork does not copy them, and the child's first parallel work would wait for them for ever."""
    machine.end_openmp_threads()
    return os.fork()


def dies_with(parent: int) -> None:
    """Have the kernel kill this process when its parent's thread ends, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _wait(pids: dict[int, int]) -> tuple[dict[int, int], set[int]]:
    """(by rank its exit code, minus the signal that ended it; the ranks that this process had to end). All are gone when it returns."""
    left, codes, ended = dict(pids), {}, set[int]()
    patience: float | None = None
    watch = Stopwatch()
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            rank = left.pop(pid)
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank] and patience is None:
                patience = STOP_S if codes[rank] == INTERRUPTED else GRACE_S
                watch.lap()
            elif codes[rank] not in (0, INTERRUPTED):
                patience = min(patience or GRACE_S, watch.peek() + GRACE_S)
        if left and patience is not None and watch.peek() > patience:
            ended |= set(left.values())
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            patience = float("inf")
        if left:
            threading.Event().wait(POLL_S)
    return codes, ended


def _said(reads: int) -> dict[int, dict[str, str]]:
    """By rank what it said as it gave up, the first first."""
    with os.fdopen(reads, "rb") as pipe:
        lines = (pipe.read() or b"").decode(errors="replace").splitlines()
    return {line["rank"]: line for line in map(json.loads, lines)}


def _failure(rank: int, code: int, said: dict[str, str] | None, ended: bool) -> Failure | None:
    if said is not None:
        return Failure(rank, said["kind"], said["said"])
    if ended:
        return None
    return Failure(rank, "signal", number=-code) if code < 0 else Failure(rank, "error", f"it ended with code {code}")


def _give_up(cause: Failure, count: int, kills: int | None) -> int:
    who = f"rank {cause.rank} of {count}"
    if cause.kind == "input":
        raise UserError(cause.said)
    if cause.kind == "memory":
        print(f"{who} is out of memory; the others were ended", file=sys.stderr)
        progress.failed(f"{who}: {cause.said}")
        return OUT_OF_MEMORY
    if cause.kind == "error":
        print(cause.said.rstrip(), file=sys.stderr)
        print(f"{who} failed; the others were ended", file=sys.stderr)
        progress.failed(f"{who}: {cause.said.rstrip().splitlines()[-1]}")
        return 1
    after = kernel_oom_kills()
    if cause.number == signal.SIGKILL and kills is not None and after is not None and after > kills:
        progress.failed(f"{who} was ended by the kernel for lack of memory (signal 9)")
        return OUT_OF_MEMORY
    progress.failed(f"{who} was ended by signal {cause.number}, and the others with it")
    return 128 + cause.number


def _hand_on(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
