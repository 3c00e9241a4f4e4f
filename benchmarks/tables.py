"""The tables and figures of README.md and docs/ that come from committed result files.

    python -m benchmarks.tables                 judge the speed files by today's rule, then write every table anew
    python -m benchmarks.tables check=true      write nothing; exit code 1, naming them, if a table or a figure is not its file's

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A figure in a sentence is followed by `<!-- FILE :: ROW :: FIELD -->`: FILE holds JSON or
Markdown tables, ROW is an entry's `id` or the first cell of a table's line (-: the file is one object), FIELD a path a.b or a column's head. The
figure is then that value, rounded to the digits it is written with; of JSON, % stands for a share of 1, ms for seconds, GiB for bytes. tests/test_prose.py
checks all of them.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import advice, choices, online_rl, parallel, race_means, race_replay, race_simulate, rank_rates, rounding, scale, speed_files, throughput, tiers
from benchmarks.rates import lines
from benchmarks.speed_files import FOLDER
from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import UserError, read_json, write_text

ROOT = Path(__file__).parent.parent
QUICK = ROOT / "experiments/quick/table_cpu.md"
SIMULATED = ("level", "one seed", "power", "many, level", "many, false", "many, any false", "many, power")
"""The tables of benchmarks.tiers, in its order."""
TABLES: dict[str, Callable[[], str]] = {
    "speed": lambda: speed_files.table(FOLDER),
    "speed, short": lambda: speed_files.table(FOLDER, speed_files.README_COLUMNS, speed_files.README),
    "speed of every workload": lambda: speed_files.grid(FOLDER),
    "advice": lambda: advice.table(read_json(FOLDER / "advice.json")["summary"]),
    "choices": lambda: choices.table(FOLDER / "choices.json"),
    "race, simulated": lambda: race_simulate.table(read_json(FOLDER / "race_simulated.json")["settings"]),
    "race, replayed": lambda: race_replay.table(read_json(FOLDER / "race_replayed.json")["lines"]),
    **{f"race, {name} {model}": functools.partial(race_means.table, ROOT / "experiments/race/cells.jsonl.xz", model, against)
       for name, against in (("means", ""), ("differences", "lora")) for model in ("smollm2_135m", "qwen2_0_5b")},
    "rank, rates": lambda: rank_rates.table(ROOT / "experiments/rank/results_h200.tar.xz"),
    "rounding": lambda: rounding.table(FOLDER / "rounding.json"),
    "quick, result": lambda: markdown_tables(QUICK)[0],
    "quick, cost": lambda: markdown_tables(QUICK)[1],
    **{f"tiers, {name}": functools.partial(lambda at: tiers.tables(read_json(FOLDER / "tiers.json")).split("\n\n")[2 * at + 1], at)
       for at, name in enumerate(SIMULATED)},
    **{f"scale, {name}": functools.partial(lambda name: scale.tables(read_json(FOLDER / "scale.json"))[name], name)
       for name in ("steps", "predicted", "checked")},
    "online RL": lambda: online_rl.table(FOLDER / "online_rl.json"),
    "throughput": lambda: "\n".join(throughput.table(lines(FOLDER / "throughput.jsonl"))),
    "parallel": lambda: parallel.table(FOLDER / "parallel.jsonl"),
}
BLOCK = re.compile(r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end -->)", re.S)
NUMBER = r"[-+−]?[\d,]*\.?\d+"
CLAIM = re.compile(rf"({NUMBER})\**\s?(%|x|ms|GiB)?\**<!-- (\S+) :: (\S[^>]*?) :: (\S[^>]*?) -->")
WHOLE = "-"
SCALE = {"%": 100.0, "ms": 1e3, "GiB": 2.0**-30}


def run(words: Sequence[str]) -> int:
    """Write, or check."""
    check = ({"check": "false"} | key_values(words, ("check",), "benchmarks.tables"))["check"] == "true"
    if not check:
        speed_files.refresh(FOLDER)
    stale = []
    for path in pages():
        text = path.read_text()
        new = BLOCK.sub(_filled, text)
        if new != text and not check:
            write_text(path, new)
        stale += [f"{path.relative_to(ROOT)}: the table {block[2]!r}" for block in BLOCK.finditer(text) if block[0] not in new and check]
        stale += [f"{path.relative_to(ROOT)}: {wrong}" for wrong in wrong_claims(new)]
    print("\n".join(stale) or "every table and every marked figure is its file's")
    return int(bool(stale))


def pages() -> list[Path]:
    """Every page that may hold a table or a marked figure."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").glob("*/*.md"))]


def _filled(block: re.Match[str]) -> str:
    if block[2] not in TABLES:
        raise UserError(f"a page asks for the table {block[2]!r}; there are {', '.join(TABLES)}")
    return f"{block[1]}\n{TABLES[block[2]]()}\n\n{block[4]}"


def wrong_claims(text: str) -> Iterator[str]:
    """A sentence for every marked figure that is not its file's."""
    for figure, unit, file, row, field in CLAIM.findall(text):
        found = value(file, row, field)
        told = _number(figure)
        digits = len(figure.partition(".")[2])
        scale = SCALE.get(unit, 1.0) if file.endswith(".json") else 1.0
        if abs(told - found * scale) > 0.5000001 * 10**-digits:
            yield f"{figure}{unit} is written where {file}, {row}, has {found * scale:.6g} as {field}"


def value(file: str, row: str, field: str) -> float:
    """The number that a mark names. Raises UserError where there is none."""
    path = ROOT / file
    if not path.exists():
        raise UserError(f"a figure names {file}, which is not there")
    at: Any = None
    if path.suffix == ".json":
        at = read_json(path)
        at = at if row == WHOLE else next((entry for entry in at if entry["id"] == row), None)
        for part in field.split("."):
            at = at[int(part)] if isinstance(at, list) else (at or {}).get(part)
    else:
        cells = (_line(table, row, field) for table in markdown_tables(path))
        at = next((_number(found[0]) for cell in cells if cell and (found := re.search(NUMBER, cell))), None)
    if not isinstance(at, int | float):
        raise UserError(f"{file} has no number {field} of {row}")
    return float(at)


def _number(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def _line(table: str, row: str, field: str) -> str | None:
    head, _, *lines = ([cell.strip(" `*") for cell in line.strip("| ").split(" | ")] for line in table.splitlines())
    return next((dict(zip(head, line, strict=False)).get(field) for line in lines if line[0] == row), None)


def markdown_tables(path: Path) -> list[str]:
    """The tables of a page, as they stand."""
    return [table.rstrip("\n") for table in re.findall(r"(?:^\|.*\n?)+", path.read_text(), re.M)]


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
