"""transformers and PEFT without what they import and nothing here asks for.

Library. transformers takes scipy's optimisers for the losses of object detection, torchvision for images and videos and, in 5.17, scikit-learn with all of
scipy and pandas for assisted generation: as long as torch itself. For marks on functions that are never compiled here it takes all of torch's compiler.
PEFT takes bitsandbytes at its own import and whenever it wraps a model's layers, rounded or not: it brings torch's compiler with it, takes as long as torch,
and with a GPU build starts CUDA (a process that is forked later could not use it then).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import threading
from collections.abc import Iterator
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from types import FunctionType, ModuleType
from typing import Any

from pipeline.core import exports

KNOWN = (("peft.import_utils", "is_bnb_available"), ("peft.import_utils", "is_bnb_4bit_available"),
         ("transformers.utils.import_utils", "is_bitsandbytes_available"), ("accelerate.utils.imports", "is_bnb_available"),
         ("transformers.utils.import_utils", "is_scipy_available"), ("transformers.utils.import_utils", "is_sklearn_available"),
         ("transformers.utils.import_utils", "is_torchvision_available"))
"""Functions that remember whether a package can be imported."""
EVERY = ("transformers.modeling_utils", "transformers.generation.utils")
"""What every language model inherits from."""
COMPILER, MARKS = "torch._dynamo", ("allow_in_graph", "assume_constant_result", "disable")
"""torch's compiler, and its marks on functions, which do what they did wherever nothing is compiled."""
ALONE = f"{COMPILER}._trace_wrapped_higher_order_op"
"""A module of the compiler's that transformers takes something from, and that takes nothing from the others."""
_TURN = threading.Lock()


def import_transformers() -> None:
    """Import what all models of transformers rest on."""
    if not sys.modules.keys() >= {*EVERY}:
        defer_compiler()
        with absent("scipy"), absent("sklearn"), absent("torchvision"), exports.remembered():
            for module in EVERY:
                importlib.import_module(module)


def import_peft() -> None:
    """Import PEFT without bitsandbytes. It and transformers import that when a model is rounded, and so they still do."""
    import_transformers()  # what it makes of bitsandbytes at its own import, it shall
    if "peft" not in sys.modules:
        with absent("bitsandbytes"), absent("torchvision"):
            import peft  # noqa: F401


def defer_compiler() -> None:
    """Have torch's compiler imported when more is asked of it than marks on functions, which are put on then."""
    import torch

    spec = None if COMPILER in sys.modules else find_spec(COMPILER)
    if spec is not None:
        sys.modules[COMPILER] = torch._dynamo = _Deferred(spec)
        sys.meta_path.insert(0, _Finder())
        alone = PathFinder.find_spec(ALONE, spec.submodule_search_locations)
        if alone is not None and alone.loader is not None:
            sys.modules[ALONE] = module_from_spec(alone)
            alone.loader.exec_module(sys.modules[ALONE])


class _Deferred(ModuleType):
    """Stands in for a package until something is asked of it that is no mark; then for that package, which was imported as it would have been."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__loader__, self.__file__, self.__package__ = spec, spec.loader, spec.origin, spec.name
        self.__dict__["_marks"] = []

    def __getattr__(self, name: str) -> Any:
        if name in MARKS and sys.modules.get(self.__name__) is self:
            return functools.partial(self._mark, name)
        if name.startswith("__") and name != "__path__":  # which is looked at first by who imports a module inside the package; others by who looks at all
            raise AttributeError(name)
        return getattr(self._package(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):
            super().__setattr__(name, value)
        else:
            setattr(self._package(), name, value)

    def __dir__(self) -> list[str]:
        return dir(self._package())

    def _package(self) -> ModuleType:
        with _TURN:
            first = sys.modules.get(self.__name__) is self
            if first:
                del sys.modules[self.__name__]
        try:
            package = importlib.import_module(self.__name__)
        except BaseException:
            if first:
                sys.modules[self.__name__] = self
            raise
        if first:
            for name in [name for name in sys.modules if name.rpartition(".")[0] == self.__name__]:
                setattr(package, name.rpartition(".")[2], sys.modules[name])
            for mark in self._marks:
                mark(package)
        return package

    def _mark(self, name: str, function: Any = None, *args: Any, **more: Any) -> Any:
        """A mark as a decorator, with or without arguments. Until the package is there a marked function is the function."""
        if function is None:
            return lambda function: self._mark(name, function, *args, **more)
        if not isinstance(function, FunctionType):
            return getattr(self._package(), name)(function, *args, **more)
        marked = function

        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            return marked(*given, **named)

        def mark(package: ModuleType) -> None:
            nonlocal marked
            marked = getattr(package, name)(function, *args, **more)

        self._marks.append(mark)
        return call if name == "disable" else function


class _Finder(Loader):
    """Finds what a package that was deferred has imported meanwhile, for whoever asked for a module inside it, by which it was imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in sys.modules and name.startswith(f"{COMPILER}.") and target is None else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It has run."""


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
