"""table.md: the comparison as text, aligned so that a terminal shows it too.

Library of `python -m pipeline.report`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from pipeline.reporting.figures import columns, interval, remarks, timing_notes
from pipeline.reporting.rows import Row, common_notes
from pipeline.reporting.text import CURVES, opening, warnings

TABLES = (
    ("name", "labelled_rows", "synthetic_rows", "test", "letters", "test_seed_high", "against_zero_shot"),
    ("name", "train_s", "wall_s", "tokens_per_s", "peak_bytes", "trainable", "artefact_bytes"),
    ("name", "macro_f1", "validation", "transfer", "perplexity_change", "pairs_change", "lambada_change", "latency_s"),
)


def markdown(experiment: str, rows: Sequence[Row], missing: Sequence[str], further: Sequence[str] = ()) -> str:
    """The opening, further sentences, three tables (result, cost, further figures; columns aligned, for a terminal too), and the notes."""
    shown, unmeasured = columns(rows)
    by_key = {c.key: c for c in shown}
    lines = [f"# {experiment}: alignment techniques compared", "", *_paragraph(opening(rows, further))]
    lines += ["", *_paragraph(further[CURVES:])] if further[CURVES:] else []
    for keys in TABLES:
        kept = [by_key[k] for k in keys if k in by_key]
        table = [[c.title for c in kept], *([row.name, *(_joined(c.main(row), c.small(row)) for c in kept[1:])] for row in rows)]
        if keys is TABLES[0]:
            table = [[*table[0], ""], *([*line, "; ".join(remarks(row))] for line, row in zip(table[1:], rows, strict=True))]
        lines += ["", *_aligned(table)]
    lines += ["", *(f"- {text}" for text in [*warnings(rows, missing), *_footnotes(rows, [c.title for c in unmeasured])])]
    return "\n".join(lines).rstrip() + "\n"


def _footnotes(rows: Sequence[Row], unmeasured: Sequence[str]) -> list[str]:
    cells = [c for r in rows for c in r.cells]
    notes = [f"not measured: {', '.join(unmeasured)}"] if unmeasured else []
    notes += timing_notes(rows)
    if any(interval(r) for r in rows):
        notes.append("brackets after accuracy: 95% interval; with several seeds from the lowest to the highest bound of theirs")
    own: dict[str, list[str]] = {}
    for row, note in ((r, n) for r in rows for n in [*r.own_notes, *(f"engine: {c.engine}" for c in r.cells if c.engine)]):
        names = own.setdefault(note, [])
        names.extend([row.name] if row.name not in names else [])
    return notes + common_notes(cells) + [f"{', '.join(names)}: {note}" for note, names in own.items()]


def _paragraph(sentences: Sequence[str], width: int = 110) -> list[str]:
    return textwrap.wrap(" ".join(sentences), width, break_long_words=False, break_on_hyphens=False)


def _joined(main: str, small: str) -> str:
    return f"{main} ({small})" if small else main


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in table]
    widths = [max(3, *(len(line[i]) for line in safe)) for i in range(len(safe[0]))]
    left = [i == 0 or not safe[0][i] for i in range(len(widths))]
    rule = "|" + "|".join("-" * (w + 2) if to_left else "-" * (w + 1) + ":" for w, to_left in zip(widths, left, strict=True)) + "|"
    lines = [[c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(line, widths, left, strict=True)] for line in safe]
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return [head, rule, *body]
