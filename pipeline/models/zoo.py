"""What the files of transformers' models define, remembered from one process to the next.

Library of imports.py. transformers reads the 2,200 files of its models twice at its own import, to know which of them has which class: a sixth of the
import. What an installed release's files define does not change, so here it is kept where Python keeps compiled files, and as it does: not where it
writes none (PYTHONDONTWRITEBYTECODE). A file of the installed package that is edited by hand needs this one to be removed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import marshal
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import cache_from_source
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core.files import UserError, atomic_path

MODULE, FUNCTION = "transformers.utils.import_utils", "create_import_structure_from_path"
"""Where transformers (5.17 to 5.23) does it; of a version that does not, nothing is remembered."""
INSTALLED = {"site-packages", "dist-packages"}


def remember() -> None:
    """Have the import of transformers that is to come, if it is, remember what it finds."""
    if "transformers" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds that one module, once, and gives it another function."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def patched(module: ModuleType) -> None:
                execute(module)
                if scan := getattr(module, FUNCTION, None):
                    setattr(module, FUNCTION, _remembered(scan, Path(str(module.__file__)).parent.parent / "models"))

            spec.loader.exec_module = patched  # type: ignore[method-assign]
        return spec


def _remembered(scan: Callable[[Any], Any], models: Path) -> Callable[[Any], Any]:
    """The function for the folder of all models; it goes on as before for that of one."""
    whole = {models, models / "__init__.py"}

    def found(path: Any) -> Any:
        if Path(path) not in whole or not INSTALLED & set(models.parts):
            return scan(path)
        place = Path(cache_from_source(str(models / "__init__.py"))).with_suffix(".found")
        key = f"{importlib.metadata.version('transformers')} {(models / '__init__.py').stat().st_mtime_ns}"
        with contextlib.suppress(OSError, ValueError, EOFError, TypeError):  # none yet, of another release, or damaged
            kept, structure = marshal.loads(place.read_bytes())
            if kept == key and isinstance(structure, dict):
                return structure
        structure = scan(path)
        if not sys.dont_write_bytecode:
            with contextlib.suppress(UserError), atomic_path(place) as beside:  # a folder that cannot be written
                beside.write_bytes(marshal.dumps((key, structure)))
        return structure

    return found
