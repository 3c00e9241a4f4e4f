"""A cell in a child process, so that running out of memory is a row of the table and not the end of the experiment.

Library. The parent forks, waits, and tells what became of the child: on the CPU an allocation that the machine cannot
serve ends in signal 9 from the kernel, or from here where `memory_limit_gb` is set.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.files import UserError
from pipeline.measure import child_rss, kernel_oom_kills

POLL_S = 0.1
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """code: the child's exit code, 128 + signal if one ended it. out_of_memory: why, if that was the reason."""

    code: int
    out_of_memory: str | None = None


def run_in_child(work: Callable[[], int], memory_limit_bytes: int | None = None) -> Outcome:
    """Fork, run `work` in the child and wait for it. SIGTERM and SIGINT are handed on to the child.

    The caller must not have started threads or used a GPU.
    """
    kills = kernel_oom_kills()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _become_child(work, parent)
    return _wait(child, memory_limit_bytes, kills)


def _become_child(work: Callable[[], int], parent: int) -> None:
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # do not outlive a killed parent
        if os.getppid() != parent:
            os._exit(1)
        code = work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, limit: int | None, kills: int | None) -> Outcome:
    over = None
    before = {s: signal.signal(s, lambda number, _: os.kill(child, number)) for s in (signal.SIGTERM, signal.SIGINT)} if _main_thread() else {}
    try:
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            held = child_rss(child)
            if limit and held and held > limit and over is None:
                over = f"ended at {held} resident bytes, above memory_limit_gb"
                os.kill(child, signal.SIGKILL)
            threading.Event().wait(POLL_S)
    finally:
        for handled, handler in before.items():
            signal.signal(handled, handler)
    if os.WIFEXITED(status):
        return Outcome(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    after = kernel_oom_kills()
    if number == signal.SIGKILL and over is None and kills is not None and after is not None and after > kills:
        over = "ended by the kernel for lack of memory (signal 9)"
    return Outcome(128 + number, over)


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
