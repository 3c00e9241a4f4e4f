"""transformers and PEFT without what they import and nothing here asks for.

Library. transformers takes scipy's optimisers for the losses of object detection, torchvision for images and videos and, in 5.17, scikit-learn with all of
scipy and pandas for assisted generation: as long as torch itself. For a few marks on functions that torch's compiler is to leave alone it takes all of
that. PEFT takes bitsandbytes at its own import and whenever it wraps a model's layers, rounded or not: it brings torch's
compiler with it, takes as long as torch, and with a GPU build starts CUDA (a process that is forked later could not use it then).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core import exports

KNOWN = (("peft.import_utils", "is_bnb_available"), ("peft.import_utils", "is_bnb_4bit_available"),
         ("transformers.utils.import_utils", "is_bitsandbytes_available"), ("accelerate.utils.imports", "is_bnb_available"),
         ("transformers.utils.import_utils", "is_scipy_available"), ("transformers.utils.import_utils", "is_sklearn_available"),
         ("transformers.utils.import_utils", "is_torchvision_available"))
"""Functions that remember whether a package can be imported."""
EVERY = ("transformers.modeling_utils", "transformers.generation.utils")
"""What every language model inherits from."""


COMPILER = "torch._dynamo"


def import_transformers() -> None:
    """Import what all models of transformers rest on."""
    if not sys.modules.keys() >= {*EVERY}:
        with absent("scipy"), absent("sklearn"), absent("torchvision"), exports.remembered(), uncompiled():
            for module in EVERY:
                importlib.import_module(module)


def import_peft() -> None:
    """Import PEFT without bitsandbytes. It and transformers import that when a model is rounded, and so they still do."""
    import_transformers()  # what it makes of bitsandbytes at its own import, it shall
    if "peft" not in sys.modules:
        with absent("bitsandbytes"), absent("torchvision"):
            import peft  # noqa: F401


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Within, torch's compiler is not imported where functions are marked as not for it: for transformers' import and for making its models."""
    if COMPILER in sys.modules:
        yield
        return
    import torch

    sys.modules[COMPILER] = stand_in = _Marks(COMPILER)
    stand_in.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]  # a module of it may be imported alone
    try:
        yield
    finally:
        if sys.modules.get(COMPILER) is stand_in:
            del sys.modules[COMPILER]


class _Marks(ModuleType):
    """Stands in for torch's compiler where functions are marked as not for it. Whatever else is asked of it imports the compiler."""

    @staticmethod
    def disable(work: Any = None, *_: Any, **__: Any) -> Any:
        return (lambda work: work) if work is None else work

    allow_in_graph = assume_constant_result = disable

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        return getattr(importlib.import_module(COMPILER), name)


@contextlib.contextmanager
def absent(package: str) -> Iterator[None]:
    """Within, the package cannot be imported, unless it was already; afterwards nobody remembers that."""
    if package in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules[package] = None  # an import of it fails
    _forget()
    try:
        yield
    finally:
        del sys.modules[package]
        _forget()


def _forget() -> None:
    for module, function in KNOWN:
        clear = getattr(getattr(sys.modules.get(module), function, None), "cache_clear", None)
        if clear:
            clear()
