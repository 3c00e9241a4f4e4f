"""What a technique answers wrong: wrong test rows beside the right answer, and which answers are taken for which.

Library of `python -m pipeline.report`. Results keep the rows' ids; their texts are read from the prepared data, where these are still the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.files import read_jsonl, sha256
from pipeline.records.finished import Cell
from pipeline.reporting.figures import Row, finished
from pipeline.reporting.vega import COLOUR, FONT, Spec

SHOWN = 8
"""Wrong rows of a technique on the page."""
LONGEST = 320
"""Characters of a text on the page."""
MOST_LABELS = 24
"""Answers that the picture of confusions has room for; of more, the commonest confusions are listed."""
LISTED = 12
NOTHING = "no answer"


@dataclass(frozen=True)
class Wrong:
    text: str
    """What was asked; empty where the prepared data are gone or others."""
    answer: str
    said: str


@dataclass(frozen=True)
class Mistakes:
    """Of one cell's test rows."""

    name: str
    cell: str
    rows: int
    count: int
    """Rows that were answered wrong."""
    wrong: list[Wrong]
    """The first of them."""
    pairs: list[tuple[str, str, int]]
    """(right answer, what was said, rows), the commonest confusions; empty where answers are free texts."""
    matrix: Spec | None
    """The picture, where there are few enough answers."""


def of_report(rows: Sequence[Row], data: Path | None) -> list[Mistakes]:
    """Of the technique that the verdict names and the highest one that was trained, the first seed of each."""
    verdict = rows[0].verdict if rows else None
    named = [r for r in rows if verdict and r.technique == verdict.name]
    trained = [r for r in rows if r.kind == "trained" and r.test is not None][:1]
    chosen = {r.name: r for r in [*named, *trained]}
    return [one for row in chosen.values() if (one := mistakes(row, data)) is not None]


def mistakes(row: Row, data: Path | None) -> Mistakes | None:
    """A row's mistakes; None where single answers are not kept, or none is wrong."""
    cell = next(iter(sorted(finished(row.cells), key=lambda c: c.result.seed)), None)
    predictions = cell.predictions() if cell else []
    lost = [p for p in predictions if not p["correct"]]
    if cell is None or not lost:
        return None
    texts = texts_of(cell, data)
    wrong = [Wrong(_short(texts.get(p["id"], "")), _short(p["answer"]), _short(p["prediction"] or p.get("output") or NOTHING)) for p in lost[:SHOWN]]
    labels, counts = confusion(predictions)
    pairs = [(right, said, count) for (right, said), count in counts.most_common() if right != said][:LISTED]
    matrix = _matrix(row.technique, labels, counts) if counts and len(labels) <= MOST_LABELS else None
    return Mistakes(row.name, cell.result.cell, len(predictions), len(lost), wrong, pairs, matrix)


def confusion(predictions: Sequence[dict]) -> tuple[list[str], Counter[tuple[str, str]]]:
    """(choices, rows by (right answer, what was said)); no rows where the choices are not the same for all, or answers are free texts."""
    labels = list(dict.fromkeys(choice for p in predictions for choice in sorted(p.get("scores") or ())))
    same = bool(labels) and all(set(p["scores"]) == set(labels) for p in predictions if p.get("scores"))
    return labels, Counter((p["answer"], p["prediction"] or NOTHING) for p in predictions) if same else Counter()


def texts_of(cell: Cell, data: Path | None) -> dict[str, str]:
    """{row id: what was asked} of the test rows; empty where the data that the cell saw are not there."""
    folder = data / cell.result.task if data else None
    if folder is None or not (folder / "test.jsonl").exists() or not (folder / "manifest.json").exists():
        return {}
    if cell.result.provenance.get("data_sha256") not in (None, sha256(folder / "manifest.json")):
        return {}
    return {row["id"]: row["prompt"] for row in read_jsonl(folder / "test.jsonl")}


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _matrix(name: str, labels: Sequence[str], counts: Counter[tuple[str, str]]) -> Spec:
    """Right answers down, what was said across; the shade is the share of the right answer's rows."""
    said = [*labels, *([NOTHING] if any(pair[1] == NOTHING for pair in counts) else [])]
    totals = Counter[str]()
    for (right, _), count in counts.items():
        totals[right] += count
    cells = [{"right": right, "said": one, "n": counts[right, one], "share": counts[right, one] / totals[right] if totals[right] else 0.0,
              "tip": f"{right} taken for {one} | {counts[right, one]} of {totals[right]} rows" if one != right else f"{right} | {counts[right, one]} of "
              f"{totals[right]} rows right"} for right in labels for one in said]
    size = 34 if len(said) <= 10 else 22
    axis = {"labelFont": FONT, "titleFont": FONT, "labelColor": COLOUR["ink"], "grid": False, "domain": False, "labelLimit": 110, "labelOverlap": False}
    x = {"field": "said", "type": "nominal", "sort": said, "axis": {**axis, "title": "said", "labelAngle": -40, "orient": "top"}}
    y = {"field": "right", "type": "nominal", "sort": list(labels), "axis": {**axis, "title": "right answer"}}
    shade = {"field": "share", "type": "quantitative", "scale": {"domain": [0, 1], "range": [COLOUR["band"], COLOUR["f1"]]}, "legend": None}
    ink = {"condition": {"test": "datum.share > 0.5", "value": "#fefefe"}, "value": "#222222"}  # on the shades, which are the same in dark mode
    return {
        "description": f"What {name} said, by the right answer", "data": {"values": cells}, "width": {"step": size}, "height": {"step": size},
        "layer": [
            {"mark": {"type": "rect"}, "encoding": {"x": x, "y": y, "color": shade, "description": {"field": "tip"}}},
            {"transform": [{"filter": "datum.n > 0"}], "mark": {"type": "text", "fontSize": 11, "aria": False},
             "encoding": {"x": x, "y": y, "text": {"field": "n"}, "color": ink}},
        ],
    }
