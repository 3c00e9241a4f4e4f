"""CUDA graphs of work over static tensors, one memory pool for all of a run's.

Library. Without CUDA the work is called again at every replay, so that the same code path runs, and is tested, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from pipeline.measure import turns


class Graphs:
    """Captures work and replays it.

    Captured work reads and writes tensors that exist before it; what it allocates lives in the pool, which the graphs share,
    because no two of them run at once and none reads what another has left there.
    """

    def __init__(self, device: Any) -> None:
        self.captures = torch.device(device).type == "cuda"
        self._pool: Any = None
        self._graphs: list[Any] = []

    def capture(self, work: Callable[[], Any]) -> Callable[[], None]:
        """A function that repeats `work`. On CUDA `work` runs once here to warm up, and is then captured: its effects on static tensors
        have happened once when this returns, and the caller undoes them.

        Raises:
            RuntimeError: the work cannot be captured (it waits for the device, for instance), or is out of memory.
        """
        turns.point()
        if not self.captures:
            return lambda: _call(work)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()):  # a capture that fails leaves its stream current
            try:
                self._record(graph, work)
            except BaseException:
                if self._pool is not None:
                    _end_capture(self._pool)
                self._pool = None
                raise
        self._graphs.append(graph)
        return graph.replay

    def _record(self, graph: Any, work: Callable[[], Any]) -> None:
        side = stream("warm-up")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the warm-up's memory is not needed beside the pool's
        turns.point()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()

    def close(self) -> None:
        """Give the pool's memory back."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool = None


_STREAMS: dict[tuple[str, int], Any] = {}


def stream(use: str) -> Any:
    """The process's CUDA stream for this use on the current device, the same at every call: products keep a workspace for every stream that they ever
    ran on."""
    key = use, torch.cuda.current_device()
    if key not in _STREAMS:
        _STREAMS[key] = torch.cuda.Stream()
    return _STREAMS[key]


def _call(work: Callable[[], Any]) -> None:
    work()


def _end_capture(pool: Any) -> None:
    """Undo what a failed capture leaves: an allocator that still allocates from the pool and frees nothing (the pool is lost), and a random generator
    that takes itself to be captured, until a capture that succeeds."""
    with suppress(RuntimeError):  # the capture had not begun
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    with suppress(RuntimeError), torch.cuda.stream(torch.cuda.current_stream()):
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            torch.zeros(1, device="cuda")
