"""Bytes of live tensors on a CPU, counted at torch's dispatcher: what stands in for a GPU's allocator where there is none.

Library of `python -m benchmarks.forecast` and of the forecast's tests.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pipeline.models.base import int8_scales


class Live(TorchDispatchMode):
    """Counts the storages of every operation's outputs until they are gone. base: of the model, before. peak: the most at a time."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in [*model.parameters(), *model.buffers()]:
            self._take(tensor.data)
            for constant in _constants(tensor):
                self._take(constant)
        for scale in int8_scales(model):
            self._take(scale)
        self.base = self.peak = self.now

    def reset(self) -> None:
        """Count the peak from here on."""
        self.peak = self.now

    def _take(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.now += size
        weakref.finalize(storage, self._drop, size)
        self.peak = max(self.peak, self.now)

    def _drop(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._take(tensor)
        return out


def _constants(parameter: Any) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside a 4-bit weight."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    return [state.absmax, state.code, *([state.state2.absmax, state.state2.code, state.offset] if state.nested else [])]
