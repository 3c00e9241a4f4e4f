"""What transformers reads at its import, remembered: what its models' files export, all 1,700 of them twice, and which package comes from which
distribution, for which Python looks for every file of every one. Together more than half of the time that it takes.

Library of imports.py. Notes lie where Python keeps compiled files, and none where it writes none (PYTHONDONTWRITEBYTECODE): then all is read once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import marshal
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import cache_from_source
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core.files import UserError, atomic_path

READER, FUNCTION = "transformers.utils.import_utils", "create_import_structure_from_path"
"""Who reads the models' files: {folder: {backends: {file: exported names}}}."""
DISTRIBUTION = (".dist-info", ".egg-info")
"""How the folder (or file) that describes a distribution ends."""


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
    """Within, an import of transformers asks the notes; afterwards it reads as it always does."""
    if "transformers" in sys.modules:
        yield
        return
    about: Any = metadata
    read = about.packages_distributions
    sys.meta_path.insert(0, _Finder)
    about.packages_distributions = functools.partial(_distributions, read)
    try:
        yield
    finally:
        about.packages_distributions = read
        sys.meta_path.remove(_Finder)
        reader: Any = sys.modules.get(READER)
        if isinstance(asked := getattr(reader, FUNCTION, None), functools.partial):
            setattr(reader, FUNCTION, asked.args[0])


def _exports(read: Callable[[Any], Any], reader: Path, path: Any) -> Any:
    """What `read` gives for a file or folder; all models' from their note."""
    folder = Path(path).parent if os.path.isfile(path) else Path(path)
    if folder != reader.parent.parent / "models":
        return read(path)
    key = _key([(str(folder), *_stamp(os.stat(reader))), *_files(str(folder))])
    return _noted("models", key, lambda: read(str(folder)))  # which remembers it in this process


def _distributions(read: Callable[[], Any]) -> Any:
    """What importlib.metadata.packages_distributions gives: {package: its distributions}; from its note."""
    return _noted("packages", _key(_installed()), read)


def _noted(name: str, key: str, read: Callable[[], Any]) -> Any:
    """The note of this name; what `read` gives, which is then noted, where it is missing or of another key."""
    place = _place(name)
    with contextlib.suppress(OSError, ValueError, TypeError, EOFError):  # none yet, or damaged
        known, found = marshal.loads(place.read_bytes())
        if known == key:
            return found
    found = read()
    if not sys.dont_write_bytecode:
        with contextlib.suppress(UserError), atomic_path(place) as beside:  # a folder that cannot be written
            beside.write_bytes(marshal.dumps((key, found)))
    return found


def _place(name: str) -> Path:
    return Path(cache_from_source(__file__)).with_suffix(f".{name}")


def _key(stamps: Iterable[object]) -> str:
    """A hash of where files are, and of every one's name, size and time of change."""
    digest = hashlib.sha256()
    for stamp in stamps:
        digest.update(repr(stamp).encode())
    return digest.hexdigest()


def _installed() -> Iterator[tuple[str, int, int]]:
    """What describes a distribution in each place that Python imports from: installed anew or removed, it changes. A place that is a file is one."""
    for place in sys.path:
        with contextlib.suppress(OSError):  # it is not there
            if os.path.isdir(folder := place or os.curdir):
                with os.scandir(folder) as entries:
                    every = sorted((entry for entry in entries if entry.name.endswith(DISTRIBUTION)), key=lambda entry: entry.name)
                yield from ((os.path.abspath(entry.path), *_stamp(entry.stat())) for entry in every)
            else:
                yield place, *_stamp(os.stat(place))


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
