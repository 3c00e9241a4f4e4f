"""What the files of transformers' models export, remembered: at its import it reads all 1,700 of them twice, a third of the time that it takes.

Library of imports.py. A note lies where Python keeps compiled files, and none where it writes none (PYTHONDONTWRITEBYTECODE): then they are read once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import marshal
import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import cache_from_source
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core.files import UserError, atomic_path

READER, FUNCTION = "transformers.utils.import_utils", "create_import_structure_from_path"
"""Who reads them: {folder: {backends: {file: exported names}}}."""


class _Loader(SourceFileLoader):
    """Loads READER as ever; its FUNCTION then asks the note first."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if (read := getattr(module, FUNCTION, None)) is not None:
            setattr(module, FUNCTION, functools.partial(_exports, read, Path(self.path)))


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, _: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == READER else None
        if spec is not None and spec.origin and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.origin)
        return spec


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Within, an import of transformers asks the note; afterwards it reads as it always does."""
    if "transformers" in sys.modules:
        yield
        return
    sys.meta_path.insert(0, _Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(_Finder)
        reader: Any = sys.modules.get(READER)
        if isinstance(asked := getattr(reader, FUNCTION, None), functools.partial):
            setattr(reader, FUNCTION, asked.args[0])


def _exports(read: Callable[[Any], Any], reader: Path, path: Any) -> Any:
    """What `read` gives for a file or folder; all models' from the note, which is written where it is missing or of other files."""
    folder = Path(path).parent if os.path.isfile(path) else Path(path)
    if folder != reader.parent.parent / "models":
        return read(path)
    key, place = _key(reader, folder), _place()
    with contextlib.suppress(OSError, ValueError, TypeError, EOFError):  # none yet, or damaged
        known, found = marshal.loads(place.read_bytes())
        if known == key:
            return found
    found = read(str(folder))  # which remembers it in this process
    if not sys.dont_write_bytecode:
        with contextlib.suppress(UserError), atomic_path(place) as beside:  # a folder that cannot be written
            beside.write_bytes(marshal.dumps((key, found)))
    return found


def _place() -> Path:
    return Path(cache_from_source(__file__)).with_suffix(".models")


def _key(reader: Path, folder: Path) -> str:
    """A hash of where the files are, and of every one's name, size and time of change."""
    digest = hashlib.sha256(repr((str(folder), *_stamp(os.stat(reader)))).encode())
    for name in _files(str(folder)):
        digest.update(repr(name).encode())
    return digest.hexdigest()


def _files(folder: str) -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        every = sorted(entries, key=lambda entry: entry.name)
    for entry in every:
        if entry.name == "__pycache__":
            continue
        if entry.is_dir():
            yield from _files(entry.path)
        else:
            yield entry.path, *_stamp(entry.stat())


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns
