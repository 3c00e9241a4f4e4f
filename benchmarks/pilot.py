"""The pilot behind the default labelling and learning rates: every technique on three labellings of the movie reviews.

    python -m benchmarks.pilot benchmarks/results/pilot.jsonl [minutes]

Needs the tasks vader_movies, vader_movies_3 and vader_movies_5 prepared, their lexicon rationales, and the model. The test split is
never read: validation rows beyond the first 200 stand in for it. Writes one JSON object a cell and goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from pipeline import cell, measure
from pipeline.config import compose
from pipeline.files import read_jsonl, write_jsonl

RATES = {
    "full": (5e-5, 1e-4, 2e-5, 2e-4), "lora": (1e-3, 2e-3, 5e-3, 5e-4), "qlora": (1e-3, 2e-3), "prompt_tuning": (3e-2, 1e-1, 3e-1, 1e-2),
    "step_by_step": (5e-5, 1e-4, 2e-4),
}
SHOTS = (4, 8, 16)
LABELLINGS = ("vader_movies_5", "vader_movies", "vader_movies_3")
ROWS, HELD_BACK = 200, 200


def settings() -> Iterator[tuple[str, str, str, int]]:
    """(task, technique, extra override, seed), the most useful first."""
    for task in LABELLINGS:
        yield task, "zero_shot", "seed=0", 0
        yield from ((task, "few_shot", f"method.k={k}", 0) for k in SHOTS)
        yield from ((task, technique, f"train.lr={rates[0]}", 0) for technique, rates in RATES.items())
    for seed, task in itertools.product((0, 1), LABELLINGS[:2]):
        yield from ((task, technique, f"train.lr={lr}", seed) for technique, rates in RATES.items() for lr in rates)


def stand_in(task: str, root: Path) -> None:
    """A copy of a prepared task whose test split is validation rows that training does not see."""
    source, target = Path("data") / task, root / task
    rows = read_jsonl(source / "validation.jsonl")
    write_jsonl(target / "train.jsonl", read_jsonl(source / "train.jsonl"))
    write_jsonl(target / "validation.jsonl", rows[:HELD_BACK])
    write_jsonl(target / "test.jsonl", rows[HELD_BACK:])
    (target / "manifest.json").write_bytes((source / "manifest.json").read_bytes())


def table(target: Path) -> None:
    """Print the accuracies found, one line a setting."""
    found: dict[tuple, list[float | None]] = defaultdict(list)
    for row in read_jsonl(target):
        found[row["task"], row["technique"], row["extra"]].append(row.get("held_back_accuracy"))
    for key, values in sorted(found.items()):
        print(*key, *(f"{v:.3f}" if v is not None else "oom" for v in values), sep="\t")


def main(target: Path, minutes: float = 600.0) -> None:
    """Run what is missing within the time."""
    done = {(r["task"], r["technique"], r["extra"], r["seed"]) for r in (read_jsonl(target) if target.exists() else [])}
    clock = measure.Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        for task in LABELLINGS:
            stand_in(task, Path(folder))
        for key in settings():
            if key in done or clock.peek() > 60 * minutes:
                continue
            done.add(key)
            task, technique, extra, seed = key
            cfg = compose([
                f"task={task}", "teacher=lexicon", f"technique={technique}", extra, f"seed={seed}", f"paths.data={folder}", f"train_rows={ROWS}",
                "train.epochs=2", "train.validations=1", "evaluate.forgetting=false", "evaluate.transfer_rows=0", "evaluate.latency_rows=0",
                "train.progress=false", "train.max_length=1024",
            ])
            result = cell.run(cfg)
            row = {"task": task, "technique": technique, "extra": extra, "seed": seed, "status": result.status, "error": result.error}
            if result.test and result.phases:
                row |= {"held_back_accuracy": result.test.accuracy, "nll": result.test.nll, "rows": result.test.rows, "train_s": result.phases.train_s,
                        "wall_s": result.phases.wall_s, "hardware": result.hardware["gpu"] or result.hardware["cpu"], "date": result.provenance["started"][:10]}
            print(row, flush=True)
            with open(target, "a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(float, sys.argv[2:]))
    table(Path(sys.argv[1]))
