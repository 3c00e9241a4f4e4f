"""README's picture: what a terminal shows of `alignscope try` on a file of 77 labels, as an SVG.

    python -m benchmarks.picture                     writes docs/try.svg; some five minutes on two CPU cores
    python -m benchmarks.picture log=try.log         of what a run printed elsewhere, its first line the command

The rows are made up here, written to .work/picture/banking.csv as a user would have them.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import random
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import ROOT
from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import write_text

WIDTH = 126
LABELS, ROWS_A_LABEL = 77, 14
TROUBLES = ("lost", "blocked", "pending", "declined", "change", "where is", "how to")
THINGS = ("card", "transfer", "account", "refund", "payment", "top up", "exchange", "pin", "statement", "cash", "fee")
WAYS = (
    "Hello, my {thing} is {trouble}, what now?", "I have a question: {trouble} {thing}", "Please help me with {trouble} {thing} today",
    "It seems that {thing} {trouble} again", "Why is it {trouble} with my {thing}?", "About {thing}: {trouble}, since {day}",
    "{trouble} {thing}, please tell me more", "Can you look at my {thing}? {trouble} since {day}",
)
DAYS = ("Monday", "yesterday", "last week", "March", "this morning", "two days")
FOLDER = ROOT / ".work/picture"


def run(words: Sequence[str]) -> int:
    """Record the command and write the picture."""
    asked = {"log": ""} | key_values(words, ("log",), "benchmarks.picture")
    from rich.console import Console

    from pipeline import try_file
    from pipeline.intake import flow

    if asked["log"]:
        save(Path(asked["log"]).read_text(encoding="utf-8"))
        return 0
    os.environ["ALIGNSCOPE_ROOT"] = str(FOLDER)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where the hints find alignscope
    for made in ("experiments", "data", "results", "report"):  # of a run before this one, which the command would go on with
        shutil.rmtree(FOLDER / made, ignore_errors=True)
    (FOLDER / "experiments").mkdir(parents=True)
    (ROOT / "models").mkdir(exist_ok=True)  # in a fresh clone there are none yet
    models = FOLDER / "models"
    if not models.is_symlink():
        models.symlink_to(ROOT / "models")
    os.chdir(FOLDER)
    with open("banking.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "category"], *made_up()])
    console: Any = Console(record=True, width=WIDTH)
    console.print("$ alignscope try banking.csv --yes", style="bold")
    flow.make_console = lambda: console
    code: int = try_file.main(["banking.csv", "--yes"])
    save(console.export_text(styles=True))
    return code


def save(said: str) -> None:
    """Draw what a terminal took, wrapped at WIDTH as a terminal wraps it, without the fonts that rich would have a page fetch."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.from_ansi(said.rstrip()))
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="alignscope"), flags=re.DOTALL)
    write_text(ROOT / "docs/try.svg", drawn.replace("Fira Code", "DejaVu Sans Mono"))


def made_up() -> list[list[str]]:
    """[text, label] of 14 sentences each about 77 things that a bank's customer may want: 7 kinds of trouble with 11 things. Drawn with a fixed seed."""
    draw = random.Random(3)
    rows = []
    for trouble, thing in itertools.islice(itertools.product(TROUBLES, THINGS), LABELS):
        texts: set[str] = set()
        while len(texts) < ROWS_A_LABEL:
            said = draw.choice(WAYS).format(thing=thing, trouble=trouble, day=draw.choice(DAYS))
            texts.add(said + draw.choice(("", " Thanks.", " Thank you!", " It is urgent.")))
        rows += [[text, f"{trouble} {thing}".replace(" ", "_")] for text in sorted(texts)]
    draw.shuffle(rows)
    return rows


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
