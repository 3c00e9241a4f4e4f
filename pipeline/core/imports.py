"""transformers and PEFT without what they import and nothing here asks for.

Library. transformers takes scipy's optimisers for the losses of object detection, torchvision for images and videos and, in 5.17, scikit-learn with all of
scipy and pandas for assisted generation: as long as torch itself. PEFT takes bitsandbytes at its own import and whenever it wraps a model's layers, rounded
or not: it brings torch's compiler with it, takes as long as torch, and with a GPU build starts CUDA (a process that is forked later could not use it then).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

from pipeline.core import exports

KNOWN = (("peft.import_utils", "is_bnb_available"), ("peft.import_utils", "is_bnb_4bit_available"),
         ("transformers.utils.import_utils", "is_bitsandbytes_available"), ("accelerate.utils.imports", "is_bnb_available"),
         ("transformers.utils.import_utils", "is_scipy_available"), ("transformers.utils.import_utils", "is_sklearn_available"),
         ("transformers.utils.import_utils", "is_torchvision_available"))
"""Functions that remember whether a package can be imported."""
EVERY = ("transformers.modeling_utils", "transformers.generation.utils")
"""What every language model inherits from."""


def import_transformers() -> None:
    """Import what all models of transformers rest on."""
    if not sys.modules.keys() >= {*EVERY}:
        with absent("scipy"), absent("sklearn"), absent("torchvision"), exports.remembered():
            for module in EVERY:
                importlib.import_module(module)


def import_peft() -> None:
    """Import PEFT without bitsandbytes. It and transformers import that when a model is rounded, and so they still do."""
    import_transformers()  # what it makes of bitsandbytes at its own import, it shall
    if "peft" not in sys.modules:
        with absent("bitsandbytes"), absent("torchvision"):
            import peft  # noqa: F401


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
