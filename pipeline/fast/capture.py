"""CUDA graphs of work over static tensors, one memory pool for all of a run's.

Library. Elsewhere than on CUDA the work is simply called again at every replay, so the same code path runs and is tested on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Graphs:
    """Captures work and replays it.

    Captured work reads and writes tensors that exist before it; what it makes lives in the pool, which the graphs share,
    because no two of them run at once and none reads what another left there.
    """

    def __init__(self, device: Any) -> None:
        self.captures = torch.device(device).type == "cuda"
        self._pool: Any = None
        self._graphs: list[Any] = []

    def capture(self, work: Callable[[], Any]) -> Callable[[], None]:
        """A function that repeats `work`. On CUDA `work` runs once here to warm up and is recorded: its effects on static tensors
        happened once when this returns, and the caller undoes them.

        Raises:
            RuntimeError: the work cannot be captured (it waits for the device, for instance), or is out of memory.
        """
        if not self.captures:
            return lambda: _call(work)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the warm-up took is not needed beside the pool
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        self._pool = self._pool or graph.pool()
        self._graphs.append(graph)
        return graph.replay

    def close(self) -> None:
        """Give the pool's memory back."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool = None


def _call(work: Callable[[], Any]) -> None:
    work()
