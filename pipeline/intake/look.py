"""What a file of rows holds: its columns, which of them is the text and which the answer, and what is wrong with its rows. Needs no torch.

Library of `python -m pipeline.try_file`. `look` guesses, `Look.text`, `label` and `prompt` say what it took; every guess can be said otherwise.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.core.files import UserError, closest
from pipeline.data import shapes, sources, tables
from pipeline.data.near import normalised as same_text

Kind = Literal["choice", "number", "text", "pair"]
LABEL_WORDS = ("label", "labels", "category", "class", "intent", "sentiment", "answer", "target", "stars", "rating", "score", "topic", "tag", "output",
               "completion", "response", "summary", "type", "y")
TEXT_WORDS = ("text", "question", "prompt", "instruction", "message", "sentence", "review", "body", "content", "utterance", "query", "document", "input")
ID_WORDS = ("id", "index", "uuid", "idx", "row", "unnamed: 0", "source", "split", "url", "date")
FEWEST_ROWS = 30
"""Rows below which nothing can be compared: of fewer, a fifth is too few to test on."""
MOST_CHOICES = 300
MOST_SHORT = 60
"""Characters of a label, at most, for a column to hold choices."""
NUMBER = re.compile(r"[-+]?\$?\s*\d[\d,]*(\.\d+)?%?")
MARKED = re.compile(r"####\s*(-?[\d,.]+)\s*$")
"""GSM8K's answers end so."""
MOSTLY = 0.9
"""Of the answers, as many as end so for all to be numbers; the others are refused by their row."""
SHOWN = 3


@dataclass(frozen=True)
class Column:
    name: str
    distinct: int
    empty: int
    length: float
    """Characters, on average, of those that are not empty."""
    numeric: bool
    nested: bool
    """Whether cells are lists or objects."""


@dataclass(frozen=True)
class Look:
    """What was seen and taken. rows_left: rows once those without an answer are left out (missing=drop)."""

    path: str
    name: str
    form: str
    """How the file holds its rows, in words."""
    shape: str | None
    """A key of shapes.SHAPES."""
    count: int
    rows: list[dict[str, Any]]
    columns: list[Column]
    text: tuple[str, ...]
    label: str
    kind: Kind
    prompt: str
    labels: Counter[str] = field(default_factory=Counter)
    """Rows by label; of choices alone."""
    hub: bool = False
    missing_rows: tuple[int, ...] = ()
    """Numbers, from 1, of rows without an answer."""
    missing_words: tuple[str, ...] = ()
    """What stands there in the place of an answer, the commonest first; nothing: an empty cell."""
    duplicates: int = 0
    contradicting: list[tuple[str, str, str]] = field(default_factory=list)
    """(text, its label, its other label)."""
    near: list[list[str]] = field(default_factory=list)
    """Spellings of one label."""
    normalise: bool = False
    missing: tables.Missing = "error"
    metric: str | None = None
    """What was asked for; None: by the kind of answer."""


def name_of(path: str) -> str:
    """A project's name from its file's: letters, digits and _."""
    stem = Path(path).name
    while Path(stem).suffix.lower() in (".gz", ".csv", ".tsv", ".txt", ".json", ".jsonl", ".xlsx", ".parquet"):
        stem = Path(stem).stem
    return re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_").lower() or "mine"


def is_hub(word: str) -> bool:
    """Whether a word is the name of a data set of the hub rather than a file's: owner/name, and no such file."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", word)) and not Path(word).parent.exists() and Path(word).suffix not in (".csv", ".json", ".jsonl", ".xlsx")


def look(path: str, text: Sequence[str] = (), label: str | None = None, prompt: str | None = None, normalise: bool = False,
         missing: tables.Missing = "error", encoding: str | None = None, separator: str | None = None, work: Path = Path(".work")) -> Look:
    """Read a file and guess what is to be learnt from it.

    Args:
        text, label, prompt: columns and a template of them; what is not given is guessed.
        normalise, missing: as tables.Table has them.

    Raises:
        UserError: no table, no such column, none that could be an answer. The message names file, row or column, and the fix.
    """
    hub = is_hub(path)
    raw, form = (sources.Hub(path, splits={"train": "train"}).read(work).sets["train"], "a data set of the hub") if hub else _read(path, encoding, separator)
    shape = shapes.shape_of(raw)
    rows = shapes.flat(raw, path)
    columns = [_column(name, rows) for name in dict.fromkeys(key for row in rows for key in row)]
    _check_columns(path, columns, (*text, *([label] if label else [])))
    label = label or ("answer" if shape in (*shapes.TURNS, *shapes.PAIRED) else _guess_label(path, columns, rows, text))
    absent = [tables.is_missing(row.get(label), missing) for row in rows]
    missing_rows = tuple(n for n, is_absent in enumerate(absent, 1) if is_absent)
    left = [row for row, is_absent in zip(rows, absent, strict=True) if not is_absent]
    said = Counter(str(row.get(label)).strip() for row, is_absent in zip(rows, absent, strict=True) if is_absent and row.get(label) is not None)
    kind: Kind = "pair" if shape in shapes.PAIRED else _kind(left, label, next(c for c in columns if c.name == label))
    labels = Counter(str(row[label]).strip() for row in left) if kind == "choice" else Counter()
    near = [sorted(group, key=lambda w: -labels[w]) for group in _near(labels)]
    if normalise and kind == "choice":
        left = tables.normalised(left, label)
        labels, near = Counter(str(row[label]).strip() for row in left), []
    taken = tuple(text) or _guess_text(path, columns, label, shape)
    template = prompt or _template(taken, label, shape)
    keyed = [(same_text(" ".join(str(row.get(c, "")) for c in taken)), str(row[label]).strip()) for row in left]
    first: dict[str, str] = {}
    other: dict[str, tuple[str, str, str]] = {}
    for (key, answer), row in zip(keyed, left, strict=True):
        if first.setdefault(key, answer) != answer:
            other.setdefault(key, (str(row.get(taken[0], ""))[:60], first[key], answer))
    return Look(
        path, name_of(path), form, shape, len(rows), left, columns, taken, label, kind, template, labels, hub, missing_rows,
        tuple(word for word, _ in said.most_common() if word),
        len(keyed) - len(first), list(other.values()) if kind == "choice" else [], near, normalise, missing,
    )


def lines(seen: Look) -> list[str]:
    shape = f", {shapes.SHAPES[seen.shape]}" if seen.shape else ""
    told = [f"{seen.path}: {seen.count:,} rows ({seen.form}{shape})", f"  text    {', '.join(seen.text)}", f"  answer  {seen.label}: {_answers(seen)}"]
    told += [f"  prompt  {'the turns before it' if seen.shape in shapes.TURNS else repr(seen.prompt)}"]
    others = [c.name for c in seen.columns if c.name not in (*seen.text, seen.label, "choices", seen.shape)]
    told += [f"  unused  {', '.join(others[:8])}{' and others' if len(others) > 8 else ''}"] if others else []
    notes = []
    if seen.missing_rows:
        notes.append(f"{len(seen.missing_rows)} rows without an answer{_written(seen)}{' are left out' if seen.missing != 'error' else ''}")
    notes += [f"{seen.duplicates} texts stand there again; the first of each is kept"] if seen.duplicates else []
    if seen.contradicting:
        text, one, other = seen.contradicting[0]
        notes.append(f"{len(seen.contradicting)} of these with another answer (first: {text!r} is {one!r} and {other!r})")
    if seen.near:
        rest = f"; and {len(seen.near) - SHOWN} more" if len(seen.near) > SHOWN else ""
        notes.append(f"spelt in several ways: {'; '.join(', '.join(group) for group in seen.near[:SHOWN])}{rest}")
    return told + [f"  note    {note}" for note in notes]


def _written(seen: Look) -> str:
    return f", written {', '.join(map(repr, seen.missing_words[:SHOWN]))}" if seen.missing_words else ""


def _answers(seen: Look) -> str:
    if seen.kind == "choice":
        common = seen.labels.most_common()
        shown = ", ".join(f"{word} {count:,}" for word, count in common[:8])
        rest = f" and {len(common) - 8} more, down to {common[-1][0]} {common[-1][1]:,}" if len(common) > 8 else ""
        return f"one of {len(common)} labels ({shown}{rest})"
    if seen.kind == "pair":
        return "the better of two answers"
    if seen.kind == "number":
        return "a number, the last of its text"
    lengths = sorted(len(str(row[seen.label])) for row in seen.rows)
    return f"free text of {lengths[len(lengths) // 2]:,} characters (half are shorter), at most {lengths[-1]:,}" if lengths else "free text"


def _read(path: str, encoding: str | None, separator: str | None) -> tuple[list[dict[str, Any]], str]:
    rows, form = tables.read(Path(path), encoding, separator)
    return rows, form.words


def _column(name: str, rows: Sequence[dict[str, Any]]) -> Column:
    cells = [row.get(name) for row in rows]
    full = [str(c).strip() for c in cells if c is not None and str(c).strip()]
    nested = any(isinstance(c, (list, dict)) for c in cells)
    numeric = bool(full) and all(NUMBER.fullmatch(c) for c in full)
    return Column(str(name), len(set(full)), len(cells) - len(full), statistics.fmean(map(len, full)) if full else 0.0, numeric, nested)


def _check_columns(path: str, columns: Sequence[Column], asked: Sequence[str]) -> None:
    names = [column.name for column in columns]
    if wrong := next((name for name in asked if name not in names), None):
        raise UserError(f"{path} has no column {wrong!r}{closest(wrong, names)}; there are: {', '.join(names)}")


def _guess_label(path: str, columns: Sequence[Column], rows: Sequence[dict[str, Any]], text: Sequence[str]) -> str:
    """By its name and by how few values it has."""
    free = [c for c in columns if c.name not in text and not c.nested and c.distinct and not _is_id(c, len(rows))]
    named = {c: _rank(c.name, LABEL_WORDS) for c in free}
    few = {c: 2 <= c.distinct <= min(MOST_CHOICES, max(2, len(rows) // 2)) and c.length <= MOST_SHORT for c in free}
    candidates = [c for c in free if named[c] is not None or few[c]]
    if len(free) < 2 and not (text and free) or not candidates:
        held = "; ".join(f"{c.name}: {c.distinct} values, {c.length:.0f} characters each" for c in columns[:6])
        raise UserError(f"{path} has no column that could be an answer ({held}); add one, or name it with --label")
    longest = max(free, key=lambda c: c.length)
    candidates = [c for c in candidates if c is not longest or len(candidates) == 1 or named[c] is not None]

    def order(column: Column) -> tuple[int, int, float]:
        rank = named[column]
        return (0 if rank is not None and few[column] else 1 if rank is not None else 2, len(LABEL_WORDS) if rank is None else rank, column.length)

    return min(candidates, key=order).name


def _rank(name: str, words: Sequence[str]) -> int | None:
    parts = [name.casefold(), *re.split(r"[\W_]+", name.casefold())]
    return next((n for n, word in enumerate(words) if word in parts), None)


def _is_id(column: Column, rows: int) -> bool:
    counts = column.numeric and column.distinct == rows > 10 and column.length > 3 and _rank(column.name, LABEL_WORDS) is None
    return column.name.casefold() in ID_WORDS or column.name.casefold().endswith("_id") or counts


def _guess_text(path: str, columns: Sequence[Column], label: str, shape: str | None) -> tuple[str, ...]:
    names = [c.name for c in columns]
    if shape == "alpaca":
        return ("instruction", "input") if "input" in names and next(c for c in columns if c.name == "input").distinct else ("instruction",)
    if shape:
        return ("prompt",)
    free = [c for c in columns if c.name != label and c.distinct and not c.nested]
    if not free:
        raise UserError(f"{path} has no column of text beside {label!r}; name one with --text, or another answer with --label")
    named = [c for c in free if _rank(c.name, TEXT_WORDS) is not None]
    best = max(named or [c for c in free if c.name.casefold() not in ID_WORDS] or free, key=lambda c: (c.length, c.distinct))
    return (best.name,)


def _template(text: Sequence[str], label: str, shape: str | None) -> str:
    if shape in (*shapes.TURNS, *shapes.PAIRED, "completion"):
        return "{prompt}"
    if shape == "alpaca":
        return "\n\n".join(f"{{{column}}}" for column in text)
    return "\n".join(f"{column.capitalize()}: {{{column}}}" for column in text) + f"\n{label.replace('_', ' ').capitalize()}:"


def _kind(rows: Sequence[dict[str, Any]], label: str, column: Column) -> Kind:
    values = [str(row[label]).strip() for row in rows]
    distinct = len({tables.spelling(v) for v in values})
    if values and sum(bool(MARKED.search(v)) for v in values) >= MOSTLY * len(values):
        return "number"
    short = max(map(len, values), default=0) <= 2 * MOST_SHORT
    if distinct <= 2 or short and (distinct <= 20 or len(values) >= 2 * distinct and not (column.numeric and distinct > 30)):
        return "choice"
    return "number" if column.numeric else "text"


def _near(labels: Counter[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for word in labels:
        groups[tables.spelling(word)].append(word)
    return [group for group in groups.values() if len(group) > 1]


def _check_numbers(seen: Look) -> None:
    unmarked = [n for n, row in enumerate(seen.rows, 1) if not MARKED.search(str(row[seen.label]).strip())]
    if 0 < len(unmarked) < len(seen.rows) * (1 - MOSTLY) + 1 and not next(c for c in seen.columns if c.name == seen.label).numeric:
        which = ", ".join(map(str, unmarked[:SHOWN])) + (f" and {len(unmarked) - SHOWN} more" if len(unmarked) > SHOWN else "")
        end = str(seen.rows[unmarked[0] - 1][seen.label]).strip()[-30:]
        raise UserError(f"{seen.path}: the answers in {seen.label!r} end in a number after ####, but for {len(unmarked)} (row {which}; the first ends {end!r}"
                        "); fix or remove those rows")


def check(seen: Look) -> None:
    """Raise UserError for what keeps these rows from being compared on: too few, one class, too many, labels missing or spelt in several ways."""
    left = len(seen.rows)
    if seen.missing_rows and seen.missing == "error":
        which = ", ".join(map(str, seen.missing_rows[:SHOWN])) + (f" and {len(seen.missing_rows) - SHOWN} more" if len(seen.missing_rows) > SHOWN else "")
        raise UserError(f"{seen.path} has {len(seen.missing_rows)} rows without a value in {seen.label!r} (row {which}{_written(seen)}); fill them in, or "
                        f"leave them out with --missing drop{f'; where {seen.missing_words[0]!r} is an answer: --missing keep' if seen.missing_words else ''}")
    if left < FEWEST_ROWS:
        raise UserError(f"{seen.path} has {left} rows with an answer, and comparing needs {FEWEST_ROWS} at least (some to train on, some to test on, some to "
                        "choose by); add rows")
    if seen.kind == "number":
        _check_numbers(seen)
    if seen.kind != "choice":
        return
    if len(seen.labels) < 2:
        raise UserError(f"every row of {seen.path} has the answer {next(iter(seen.labels))!r} in {seen.label!r}; there is nothing to learn: add rows with "
                        "other answers, or name another column with --label")
    if len(seen.labels) > MOST_CHOICES:
        rare = sum(count < 3 for count in seen.labels.values())
        raise UserError(f"{seen.label!r} of {seen.path} has {len(seen.labels):,} different answers in {left:,} rows ({rare:,} of them in fewer than three "
                        f"rows), and choosing is for {MOST_CHOICES} at most; join rare ones, or name another column with --label")
    if seen.near and not seen.normalise:
        one = seen.near[0]
        raise UserError(f"{seen.label!r} of {seen.path} spells {len(seen.near)} labels in several ways (first: {', '.join(map(repr, one))}); make them one "
                        "with --normalise, or mend the file")
    share = len(seen.contradicting) / left
    if share > 0.1:
        raise UserError(f"{len(seen.contradicting)} texts of {seen.path} stand there with two answers (first: {seen.contradicting[0][0]!r} is "
                        f"{seen.contradicting[0][1]!r} and {seen.contradicting[0][2]!r}); mend the answers, or name other columns with --text and --label")
