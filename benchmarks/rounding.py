"""How far a cell's figures move when the same sums are rounded otherwise: other threads, torch's code for another processor, other products of MKL.

    python -m benchmarks.rounding                                     every trained technique of `quick` under every variant; an hour on a core
    python -m benchmarks.rounding techniques=prompt_tuning            one of them; the others' rows stay
    python -m benchmarks.rounding table                               the table from benchmarks/results/rounding.json

Keys: techniques (a comma-separated list), work (.work/rounding: where the cells go; finished ones are not run again), out (benchmarks/results/rounding.json).
A variant is a process's environment alone: code, data, model, seed and versions are the same, and so is the cell's identity.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed_files import FOLDER, origin, rows
from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import UserError, write_json
from pipeline.records.finished import Cell, cells_below

FIRST = "1 thread"
VARIANTS: dict[str, dict[str, str]] = {
    FIRST: {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "torch for AVX2": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2"},
    "MKL for any processor": {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"},
}
TECHNIQUES = "zero_shot,few_shot,full,lora,qlora,prompt_tuning,step_by_step"
DEFAULTS = {"techniques": TECHNIQUES, "work": ".work/rounding", "out": str(FOLDER / "rounding.json")}
COLUMNS = ("technique", "variant", "test accuracy", "rows answered otherwise", "right on one side alone", "first loss that differs", "losses apart, at most")


def run(words: Sequence[str]) -> int:
    """Run what is missing and write the comparison; or print the table."""
    keys = DEFAULTS | key_values([w for w in words if w != "table"], DEFAULTS, "benchmarks.rounding")
    out = Path(keys["out"])
    if "table" in words:
        print(table(out))
        return 0
    about = origin("cpu")
    for technique, variant in itertools.product(keys["techniques"].split(","), VARIANTS):
        one, other = (_cell(Path(keys["work"]), technique, name) for name in (FIRST, variant))
        record = {"id": f"{technique}, {variant}", "technique": technique, "variant": variant, "environment": VARIANTS[variant], **apart(one, other)}
        record |= {**about, "hardware": other.result.hardware}
        write_json(out, [*(row for row in rows(out) if row["id"] != record["id"]), record])
        print(" | ".join(_line(record)), flush=True)
    return 0


def _cell(work: Path, technique: str, variant: str) -> Cell:
    """The finished cell, run now if it is not there. Raises UserError where it did not finish."""
    folder = work / variant.replace(" ", "_")
    words = ["experiments=quick", f"technique={technique}", "tracking=none", f"paths.results={folder}", f"paths.work={folder}/work"]
    code = subprocess.run([sys.executable, "-m", "pipeline.cells", *words], env={**os.environ, **VARIANTS[variant]}, check=False).returncode
    found = cells_below(folder / "quick", lambda parts: parts["technique"] == technique)
    if code or not found:
        raise UserError(f"{folder}/quick has no finished cell of {technique} (exit code {code}); see the lines above")
    return found[0]


def apart(one: Cell, other: Cell) -> dict[str, Any]:
    """What differs between two runs of a cell: answers in rows, losses in shares of the first run's. first_step: null where no loss differs."""
    given, right = [_given(c) for c in (one, other)], [c.right() for c in (one, other)]
    losses = [[(p["step"], p["loss"]) for p in c.result.history] for c in (one, other)]
    drift = [(step, abs(b - a) / abs(a)) for (step, a), (_, b) in zip(*losses, strict=True)]
    return {
        "accuracy": other.result.scores["test"].accuracy, "rows": len(right[0]),
        "answers": sum(given[0][i] != given[1][i] for i in given[0]), "flips": sum(right[0][i] != right[1][i] for i in right[0]),
        "first_step": next((step for step, share in drift if share), None), "loss_share": max((share for _, share in drift), default=None),
    }


def _given(cell: Cell) -> dict[str, str]:
    """{row id: the answer} of the test split."""
    lines = map(json.loads, (cell.folder / "predictions.jsonl").read_text().splitlines())
    return {r["id"]: r["prediction"] for r in lines if r["split"] == "test"}


def table(path: Path) -> str:
    """Markdown. Raises UserError where nothing was measured."""
    measured = [row for row in rows(path) if row["variant"] != FIRST]
    if not measured:
        raise UserError(f"{path} holds no rows; run: python -m benchmarks.rounding")
    places = [list(VARIANTS), TECHNIQUES.split(",")]
    measured.sort(key=lambda row: [place.index(row[key]) for key, place in zip(("technique", "variant"), reversed(places), strict=True)])
    return "\n".join(f"| {' | '.join(line)} |" for line in (COLUMNS, ["---"] * len(COLUMNS), *map(_line, measured)))


def _line(row: dict[str, Any]) -> list[str]:
    step, share = row["first_step"], row["loss_share"]
    losses = ["—", "—"] if share is None else [f"step {step}" if step else "none", f"{share:.1g}" if share else "0"]
    return [f"`{row['technique']}`", row["variant"], f"{row['accuracy']:.1%}", f"{row['answers']} of {row['rows']}", str(row["flips"]), *losses]


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
