"""The published results below experiments/ as one compact file that ships with the package: what `alignscope fit` answers from in a fresh clone.

    python -m benchmarks.evidence                 write pipeline/intake/known/evidence.json
    python -m benchmarks.evidence check=true      write nothing; exit code 1 if the file is not what the tables say

Reads the Markdown tables of the pages in PAGES. A row is a technique at a number of training rows: accuracy with its interval, time and memory.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.tables import ROOT, markdown_tables
from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import UserError, write_text

FILE = ROOT / "pipeline/intake/known/evidence.json"
PAGES = {"experiments/data_size/h200.md": None, "experiments/techniques/table_h200.md": 1000, "experiments/quick/table_cpu.md": 160}
"""Page -> its training rows; None: each technique's name says them."""
NAME = re.compile(r"(\S+?)(?: \((\d+) rows\))?")
SIZES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SHARE = r"([\d.]+) \(([\d.]+)–([\d.]+)\)"


def run(words: Sequence[str]) -> int:
    """Write, or check."""
    check = ({"check": "false"} | key_values(words, ("check",), "benchmarks.evidence"))["check"] == "true"
    rows = [row for page, size in PAGES.items() for row in rows_of(page, size)]
    text = "[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n"
    same = FILE.exists() and FILE.read_text(encoding="utf-8") == text
    if not check:
        write_text(FILE, text)
    wrong = ", not what the pages say; run: python -m benchmarks.evidence" if check and not same else ""
    print(f"{FILE.relative_to(ROOT)}: {len(rows)} rows of {len(PAGES)} pages{wrong}")
    return int(bool(wrong))


def rows_of(page: str, size: int | None) -> list[dict[str, Any]]:
    """A row a technique and size. Raises UserError where the page has no such tables."""
    held = (ROOT / page).read_text(encoding="utf-8")
    device, date = ("NVIDIA H200" if "H200" in held else "2 cores of an AMD EPYC"), re.search(r"\d{4}-\d\d-\d\d", held)
    tables = [_table(t) for t in markdown_tables(ROOT / page)]
    results = next((t for t in tables if "Test accuracy, %" in t[0]), None)
    costs = next((t for t in tables if "Peak memory" in t[0]), None)
    if not results or not costs or not date:
        raise UserError(f"{page} has no table of results and costs")
    cost = {row["Technique"]: row for row in costs}
    made = []
    for row in results:
        name, share = NAME.fullmatch(row["Technique"]), re.match(SHARE, row["Test accuracy, %"])
        if name and share and "teacher" not in row["Technique"]:
            spent = cost.get(row["Technique"], {})
            made.append({
                "technique": name[1], "rows": int(name[2] or size or 0), "labelled": int(row["Labelled rows"].replace(",", "")),
                **{key: round(float(value) / 100, 4) for key, value in zip(("accuracy", "low", "high"), share.groups(), strict=True)},
                "train_s": _seconds(spent.get("Train, s", "")), "memory_bytes": _bytes(spent.get("Peak memory", "")),
                "task": "vader_movies_5", "model": "smollm2_135m", "device": device, "date": date[0], "source": page,
            })
    return made


def _table(text: str) -> list[dict[str, str]]:
    head, _, *lines = ([cell.strip(" `*") for cell in line.strip("| ").split(" | ")] for line in text.splitlines())
    return [dict(zip(head, line, strict=False)) for line in lines]


def _seconds(text: str) -> float | None:
    found = re.match(r"[\d,.]+", text)
    return float(found[0].replace(",", "")) if found else None


def _bytes(text: str) -> int | None:
    found = re.match(r"([\d.]+) (\w+)", text)
    return round(float(found[1]) * SIZES[found[2]]) if found and found[2] in SIZES else None


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
