"""A file of rows of any usual kind, told by its content: CSV with any separator and encoding, JSON, JSON Lines, Excel, Parquet, each also in gzip.

Library. `Table` is the source of a task that `alignscope try` made of a file (`source: {type: table, path: reviews.csv}`); `read` is what it rests on.
Cells of text files stay text ("007", "NA"), and a row that cannot be read is named by its line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.files import UserError, closest, sha256
from pipeline.core.schema import unwritable
from pipeline.data import shapes
from pipeline.data.sources import Loaded, parquet_rows

SAMPLE = 1 << 16
"""Bytes or characters that are looked at to tell encoding and separator."""
SEPARATORS = (",", ";", "\t", "|")
NO_TABLE = {
    b"\x89PNG": "a picture (PNG)", b"\xff\xd8\xff": "a picture (JPEG)", b"GIF8": "a picture (GIF)", b"%PDF": "a PDF", b"SQLite format 3": "an SQLite database",
    b"GGUF": "a model's weights (GGUF)", b"\xd0\xcf\x11\xe0": "a document of an old Office (.xls or .doc)", b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive", b"\x28\xb5\x2f\xfd": "a file in Zstandard", b"BZh": "a file in bzip2", b"\xfd7zXZ": "a file in XZ",
}
"""First bytes -> what such a file is."""
BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
MISSING = ("n/a", "na", "nan", "null", "none", "-", "?")
"""What stands, in any case, where a label is missing, or is an answer of its own (missing=keep)."""
Missing = Literal["error", "drop", "keep"]


@dataclass(frozen=True)
class Format:
    """How a file holds its rows. encoding, separator: of text files; sheet: of Excel's."""

    kind: Literal["csv", "json", "jsonl", "xlsx", "parquet"]
    encoding: str | None = None
    separator: str | None = None
    gzipped: bool = False
    sheet: str | None = None

    @property
    def words(self) -> str:
        """For people: "CSV, separated by ;, utf-8, in gzip"."""
        by = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}.get(self.separator or "", self.separator)
        kind = {"csv": "CSV", "json": "JSON", "jsonl": "JSON Lines", "xlsx": "Excel", "parquet": "Parquet"}[self.kind]
        parts = [kind, f"separated by {by}" if by else "", f"sheet {self.sheet}" if self.sheet else "", self.encoding or "", "in gzip" if self.gzipped else ""]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Table:
    """The rows of one file, as the training rows from which the rest is drawn.

    Args:
        label: the column that normalise and missing are about.
        normalise: spellings of a label that differ in case and spaces alone become its commonest one.
        missing: error; drop: leave out rows whose label is empty, N/A or the like; keep: such words are labels, and empty ones left out.
        encoding, separator: null tells them by the content.
    """

    path: str = ""
    label: str | None = None
    normalise: bool = False
    missing: Missing = "error"
    encoding: str | None = None
    separator: str | None = None

    def read(self, work: Path) -> Loaded:
        """Raises UserError: no such file, no table, a row that cannot be read (named)."""
        if not self.path:
            raise UserError("config key 'task.source.path' is missing; name the file of rows")
        rows = shapes.flat(read(Path(self.path), self.encoding, self.separator)[0], self.path)
        if self.label is not None:
            if rows and self.label not in rows[0]:
                raise UserError(f"{self.path} has no column {self.label!r}{closest(self.label, rows[0])}; there are: {', '.join(map(str, rows[0]))}")
            rows = [row for row in rows if self.missing == "error" or not is_missing(row.get(self.label), self.missing)]
            rows = normalised(rows, self.label) if self.normalise else rows
        return Loaded({"train": rows}, {"kind": "table", "sha256": {Path(self.path).name: sha256(self.path)}}, {"train": self.path})


def is_missing(value: Any, missing: Missing = "error") -> bool:
    """Whether a cell holds nothing, or (but with missing=keep) a word that says so."""
    word = "" if value is None else str(value).strip().casefold()
    return not word or missing != "keep" and word in MISSING


def spelling(value: Any) -> str:
    """What spellings of one label have in common: letters and digits, without case and spaces around or between."""
    return " ".join(str(value).replace("_", " ").split()).casefold()


def normalised(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """The rows with the commonest of the spellings of a value in the place of all."""
    spelt: dict[str, Counter[str]] = {}
    for row in rows:
        spelt.setdefault(spelling(row.get(column)), Counter())[str(row.get(column)).strip()] += 1
    common = {key: counts.most_common(1)[0][0] for key, counts in spelt.items()}
    return [{**row, column: common[spelling(row.get(column))]} for row in rows]


def read(path: Path, encoding: str | None = None, separator: str | None = None) -> tuple[list[dict[str, Any]], Format]:
    """(the rows by column, how the file holds them).

    Args:
        encoding, separator: of a text file; None: told by its content.

    Raises:
        UserError: no such file, something else than a table, a row that cannot be read. The message names file and line.
    """
    data, gzipped = _bytes(path)
    rows, form = _rows(path, data, encoding, separator)
    if not rows:
        raise UserError(f"{path} holds no rows; choose a file with a line of column names and rows below it")
    return rows, Format(**{**vars(form), "gzipped": gzipped})


def _bytes(path: Path) -> tuple[bytes, bool]:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.is_file())[:3]
        raise UserError(f"{path} is a folder; name one file in it{f', for example {path / inside[0]}' if inside else ''}")
    if not path.is_file():
        near = closest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError(f"there is no file {path}{near}; check the name and the folder that you are in")
    data = path.read_bytes()
    gzipped = data[:2] == b"\x1f\x8b"
    if gzipped:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is a damaged gzip file ({error}); get it anew") from error
    return data, gzipped


def _rows(path: Path, data: bytes, encoding: str | None, separator: str | None) -> tuple[list[dict[str, Any]], Format]:
    if not data.strip():
        raise UserError(f"{path} is empty; choose a file with rows")
    if what := next((words for magic, words in NO_TABLE.items() if data.startswith(magic)), None):
        raise UserError(f"{path} is {what}, no table; save the rows as CSV, JSON Lines, Excel (.xlsx) or Parquet")
    if data.startswith(b"PAR1"):
        return parquet_rows(path, data), Format("parquet")
    if data.startswith(b"PK"):
        return _excel(path, data)
    text, encoding = _decoded(path, data, encoding)
    start = text.lstrip()[:200].lower()
    if start.startswith(("<!doctype", "<html", "<?xml")):
        raise UserError(f"{path} is a web page or XML, no table; get the file that the page links to")
    if start[0] in "[{" and separator is None:
        return _json(path, text, encoding)
    return _csv(path, text, encoding, separator)


def _decoded(path: Path, data: bytes, encoding: str | None) -> tuple[str, str]:
    """(the text, its encoding): as asked for, by the mark at its start, UTF-8, or what its letters look like."""
    told = encoding or next((name for bom, name in BOMS.items() if data.startswith(bom)), None)
    if told is None and b"\0" in data[:SAMPLE] and not _looks_utf16(data):
        raise UserError(f"{path} holds binary data, no table; save the rows as CSV, JSON Lines, Excel (.xlsx) or Parquet")
    try:
        return data.decode(told or "utf-8"), (told or "utf-8").removesuffix("-sig")
    except (UnicodeDecodeError, LookupError) as error:
        if told is not None:
            raise UserError(f"{path} is not {told} ({error}); leave --encoding out, or name the one that it was saved in") from error
    import charset_normalizer

    best = charset_normalizer.from_bytes(data[: 1 << 20]).best()
    if best is None:
        raise UserError(f"the encoding of {path} cannot be told; save it as UTF-8, or name it with --encoding")
    try:
        return data.decode(best.encoding), best.encoding
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace"), "cp1252"


def _looks_utf16(data: bytes) -> bool:
    return data[1:SAMPLE:2].count(0) > 0.4 * len(data[1:SAMPLE:2]) or data[0:SAMPLE:2].count(0) > 0.4 * len(data[0:SAMPLE:2])


def _json(path: Path, text: str, encoding: str) -> tuple[list[dict[str, Any]], Format]:
    """One JSON value with the rows in it, or one object a line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        if text.lstrip().startswith("[") or len(lines) < 2:
            raise UserError(f"{path} is not JSON ({error}); mend it, or write one object a line (JSON Lines)") from error
        return [_object(path, n, line) for n, line in lines], Format("jsonl", encoding)
    if isinstance(value, dict):
        keys = [key for key, part in value.items() if isinstance(part, list) and part and all(isinstance(row, dict) for row in part)]
        if shapes.shape_of([value]) or not keys:
            return [value], Format("jsonl", encoding)
        value = value[keys[0]]
    for n, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {n} is {str(row)[:40]!r}, no object; write a list of objects, a key a column")
    return value, Format("json", encoding)


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line {number} is not JSON ({error}); mend or remove that line") from error
    if not isinstance(row, dict):
        raise UserError(f"{path} line {number} is no JSON object; write one object a line, a key a column")
    return row


def _csv(path: Path, text: str, encoding: str, separator: str | None) -> tuple[list[dict[str, Any]], Format]:
    csv.field_size_limit(1 << 30)
    separator, quoted = (separator, True) if separator else _dialect(text[:SAMPLE])
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=quoted)
    try:
        names = [name.strip() for name in next(lines, [])]
        while names and not names[-1]:
            names.pop()  # Excel's trailing separators
        if wrong := next((name for name, count in Counter(names).items() if count > 1), None):
            raise UserError(f"{path} has two columns that are called {wrong!r}; rename one")
        rows = []
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            while len(cells) > len(names) and not cells[-1].strip():
                cells.pop()
            if len(cells) != len(names):
                raise UserError(f"{path} line {lines.line_num} has {len(cells)} cells for {len(names)} columns ({', '.join(names)}); mend or remove that "
                                "line (a text that holds the separator stands in quotes), or name the separator with --separator")
            if reason := unwritable("".join(cells)):
                raise UserError(f"{path} line {lines.line_num} holds {reason}; mend or remove that line")
            rows.append(dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path} line {lines.line_num} cannot be read ({error}); mend or remove that line") from error
    return rows, Format("csv", encoding, separator)


def _dialect(sample: str) -> tuple[str, bool]:
    """(separator, whether quotes hold cells together), by the table that they make."""
    import clevercsv

    head = sample.partition("\n")[0]
    usual = [s for s in SEPARATORS if s in head]
    if not usual:
        return ",", True  # one column
    if len(usual) == 1:
        return usual[0], '"' in sample
    try:
        found = clevercsv.Sniffer().sniff("\n".join(sample.splitlines()[:200]), delimiters=list(usual))
    except clevercsv.Error:
        found = None
    if found is None or found.delimiter not in usual:
        return max(usual, key=head.count), '"' in sample
    return found.delimiter, '"' in sample


def _excel(path: Path, data: bytes) -> tuple[list[dict[str, Any]], Format]:
    import python_calamine

    try:
        book = python_calamine.CalamineWorkbook.from_filelike(io.BytesIO(data))
        sheet = next((s for s in book.sheet_names if book.get_sheet_by_name(s).to_python()), None)
    except Exception as error:  # the library has no common base for what a file may do wrong
        raise UserError(f"{path} is an archive and no Excel file ({' '.join(str(error).split())}); unpack it, and name the file inside") from error
    if sheet is None:
        return [], Format("xlsx")
    head, *body = book.get_sheet_by_name(sheet).to_python()
    names = [str(name).strip() for name in head]
    rows = [{n: _cell(c) for n, c in zip(names, cells, strict=False) if n} for cells in body if any(str(c).strip() for c in cells)]
    return rows, Format("xlsx", sheet=sheet if len(book.sheet_names) > 1 else None)


def _cell(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, (str, int, float, bool)) else str(value)
