"""From a file to an answer on four files of different kinds, timed: where `alignscope try` spends a quarter of an hour on a CPU.

    python -m benchmarks.journeys                    labels, maths, chats and pairs, one after another; up to an hour
    python -m benchmarks.journeys maths threads=2    one of them

labels: 77 labels, made up (benchmarks/picture.py). maths: SVAMP's questions, the solution of a teacher with "#### 42" at its end. chats: TREC's questions as
OpenAI's messages with a system turn. pairs: CommonsenseQA, the answer and one of the wrong ones. The last three read ../shared/data. Works below
.work/journeys/, each time anew; the model is fetched before the clock starts. Prints of each the wall clock, the processor's time of all its processes (what
a machine with two free cores needs is little more than half of it), the load before and after, and what each cell's stages took.
"""

from __future__ import annotations

import csv
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.picture import made_up
from benchmarks.tables import ROOT
from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import UserError, read_jsonl, write_jsonl
from pipeline.measure.clock import Stopwatch

FOLDER, SHARED = ROOT / ".work/journeys", ROOT / "../shared/data"
ASK = "Say what kind of answer the question asks for: abbreviation, description, number, person, place or thing."
STAGES = ("startup_s", "load_s", "train_s", "validate_s", "evaluate_s", "save_s")


def labels(path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "category"], *made_up()])


def maths(path: Path) -> None:
    rows = [row for row in _shared("svamp", "train", "validation", "test") if row["teacher_answer"] is not None and row["answer"] == int(row["answer"])]
    write_jsonl(path, [{"question": row["question"], "answer": f"{row['teacher_rationale']}\n#### {int(row['answer'])}"} for row in rows])


def chats(path: Path) -> None:
    said = [(row["question"], row["answer"]) for row in _shared("trec", "train")][:2000]
    write_jsonl(path, [{"messages": [{"role": role, "content": text} for role, text in (("system", ASK), ("user", asked), ("assistant", answer))]}
                       for asked, answer in said])


def pairs(path: Path) -> None:
    draw, rows = random.Random(0), list(_shared("cqa", "train"))[:1500]
    wrong = [draw.choice([choice for choice in row["choices"] if choice != row["answer"]]) for row in rows]
    write_jsonl(path, [{"prompt": row["question"], "chosen": row["answer"], "rejected": other} for row, other in zip(rows, wrong, strict=True)])


def _shared(name: str, *splits: str) -> Iterator[dict[str, Any]]:
    for split in splits:
        yield from read_jsonl(SHARED / name / f"{split}.jsonl")


FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "labels": ("labels.csv", labels), "maths": ("maths.jsonl", maths), "chats": ("chats.jsonl", chats), "pairs": ("pairs.jsonl", pairs),
}


def run(words: Sequence[str]) -> int:
    """Time those that are named, or all."""
    names = [word for word in words if "=" not in word] or list(FILES)
    asked = {"threads": "2"} | key_values([word for word in words if "=" in word], ("threads",), "benchmarks.journeys")
    if unknown := next((name for name in names if name not in FILES), None):
        raise UserError(f"there is no journey {unknown}; choose from {', '.join(FILES)}")
    (ROOT / "models").mkdir(exist_ok=True)
    if not (ROOT / "models/smollm2_135m/manifest.json").exists():
        subprocess.run([sys.executable, "-m", "pipeline.base_model", "model=smollm2_135m"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return max(journey(name, asked["threads"]) for name in names)


def journey(name: str, threads: str) -> int:
    """One file, from nothing to the answer. Returns the command's exit code."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "experiments").mkdir(parents=True)
    (folder / "models").symlink_to(ROOT / "models")
    file, make = FILES[name]
    make(folder / file)
    env = {**os.environ, "ALIGNSCOPE_ROOT": str(folder), "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    before, load, watch = resource.getrusage(resource.RUSAGE_CHILDREN), os.getloadavg()[0], Stopwatch()
    code = subprocess.run([sys.executable, "-m", "pipeline", "try", file, "--yes"], cwd=folder, env=env).returncode
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), watch.lap()
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"\n{name}: exit {code}, wall {wall:.0f} s, processor {used:.0f} s, {threads} threads, load {load:.1f} before and {os.getloadavg()[0]:.1f} after")
    for path in sorted(folder.glob("results/*/*/result.json")):
        phases = json.loads(path.read_text(encoding="utf-8"))["phases"]
        print(f"  {path.parent.name:<24}" + "  ".join(f"{stage[:-2]} {phases[stage]:.0f}" for stage in STAGES), flush=True)
    return code


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
