"""Processes that share this machine's GPUs for a limited time: forked where imports and models are read already, ended when the time is up.

Library of benchmarks/race_fill.py and benchmarks/slot.py.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

CRASHES = 2
"""How often a process that ended with an error is begun anew, on average."""


def places(gpus: Sequence[str], processes: int) -> list[str | None]:
    """A GPU for each process, so many on every one; None: the machine's CPU."""
    return [gpu for _ in range(processes) for gpu in gpus] if gpus else [None] * processes


def run(work: Callable[[], None], at: Sequence[str | None], watch: Any, limit_s: float, grace_s: float) -> None:
    """Do `work` in a process for each place, and end those that outlast the limit by more than the grace. One place without a GPU: in this process.

    Args:
        watch: measure.clock.Stopwatch, from which the limit counts.
    """
    if at == [None]:
        work()
        return
    forked = [_forked(work, gpu) for gpu in at]
    crashes = CRASHES * len(at)
    try:
        while watch.peek() < limit_s + grace_s:
            codes = [one.exitcode for one in forked]  # looked at once: one that ends from here on is seen the next time
            for place, code in enumerate(codes):
                if code and crashes and watch.peek() < limit_s:
                    crashes -= 1
                    forked[place], codes[place] = _forked(work, at[place]), None
            alive = [one.sentinel for one, code in zip(forked, codes, strict=True) if code is None]
            if not alive:
                break
            wait(alive, 1.0)
    finally:
        for one in forked:
            if one.is_alive():
                one.kill()
                one.join()


def _forked(work: Callable[[], None], gpu: str | None) -> Any:
    process = multiprocessing.get_context("fork").Process(target=_worker, args=(work, gpu))
    process.start()
    return process


def _worker(work: Callable[[], None], gpu: str | None) -> None:
    import torch

    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(1)
    try:
        work()
    except BaseException:
        traceback.print_exc()
        raise
