"""README's picture: what a terminal shows of `alignscope try` on movie reviews, as an SVG.

    python -m benchmarks.picture                     writes docs/try.svg; minutes on two CPU cores
    python -m benchmarks.picture rows=64 test_rows=100
    python -m benchmarks.picture log=try.log         of what a run printed elsewhere, its first line the command

The rows are those of the task vader_movies (fetched from the package registry), written to .work/picture/reviews.csv as a user would have them.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import ROOT
from pipeline.core.commands import call, key_values, words_entry
from pipeline.core.compose import compose
from pipeline.core.files import write_text

WIDTH, ROWS = 118, 900
FOLDER = ROOT / ".work/picture"


def run(words: Sequence[str]) -> int:
    """Record the command and write the picture."""
    asked = {"rows": "96", "test_rows": "150", "log": ""} | key_values(words, ("rows", "test_rows", "log"), "benchmarks.picture")
    from rich.console import Console
    from rich.text import Text

    from pipeline import try_file
    from pipeline.intake import flow

    if asked["log"]:
        drawn: Any = Console(record=True, width=WIDTH)
        drawn.print(Text(Path(asked["log"]).read_text(encoding="utf-8").rstrip()))
        save(drawn)
        return 0
    rows = reviews()
    os.environ["ALIGNSCOPE_ROOT"] = str(FOLDER)
    (FOLDER / "experiments").mkdir(parents=True, exist_ok=True)
    models = FOLDER / "models"
    if not models.exists():
        models.symlink_to(ROOT / "models")
    os.chdir(FOLDER)
    with open("reviews.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "label"], *rows])
    console: Any = Console(record=True, width=WIDTH)
    console.print(Text("$ alignscope try reviews.csv", style="bold"))
    flow.make_console = lambda: console
    code: int = try_file.main(["reviews.csv", "--yes", "--techniques", "zero_shot,few_shot,lora", "--rows", asked["rows"], "--test-rows", asked["test_rows"]])
    save(console)
    return code


def save(console: Any) -> None:
    """Write what was recorded, without the fonts that rich would have a page fetch."""
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="alignscope"), flags=re.DOTALL)
    write_text(ROOT / "docs/try.svg", drawn.replace("Fira Code", "DejaVu Sans Mono"))


def reviews() -> list[list[str]]:
    """[text, label] of the first rows of vader_movies, which is prepared where it is not."""
    data = ROOT / "data/vader_movies/train.jsonl"
    if not data.exists():
        words = ["task=vader_movies"]
        call("prepare", compose(words), words)
    lines = Path(data).read_text(encoding="utf-8").splitlines()[:ROWS]
    return [[row["fields"]["text"], row["answer"]] for row in map(json.loads, lines)]


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
