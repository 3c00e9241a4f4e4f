"""Which technique to take with so many rows, so much memory and so much time: an answer from the cells on disk and the forecast.

    python -m pipeline.advise train_rows=500 gpu_memory_gb=16 hours=2
    python -m pipeline.advise train_rows=500 metric_floor=0.5 task=vader_movies_5 model=smollm2_135m results=results/data_size

Keys: train_rows; gpu_memory_gb, hours (of training one cell), metric_floor (a fraction), task, model, results (a folder, results). A task or a model that
nothing was measured on is answered from others, as far as they tell. Exit codes: 0 there is an answer, 1 no evidence fits, 2 bad input. docs/advice.md has the
rules and how well they did.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import UserError
from pipeline.reporting.advice import Need, advise
from pipeline.reporting.advice_text import answer, failures
from pipeline.reporting.evidence import gather, without_accuracy

KEYS = ("train_rows", "gpu_memory_gb", "hours", "metric_floor", "task", "model", "results")


def parse(words: Sequence[str]) -> tuple[Need, Path]:
    """(what is asked for, the folder of results). Raises UserError naming the key."""
    asked = key_values(words, KEYS, "pipeline.advise")
    if not asked.get("train_rows", "").isdecimal() or int(asked["train_rows"]) < 1:
        raise UserError(f"train_rows={asked.get('train_rows', '')} is no number of rows; say how many labelled rows you train on: train_rows=500")
    numbers = {key: _number(key, asked[key]) for key in ("gpu_memory_gb", "hours", "metric_floor") if key in asked}
    if numbers.get("metric_floor", 0) > 1:
        raise UserError(f"metric_floor={asked['metric_floor']} is no fraction; 80% is metric_floor=0.8")
    root = Path(asked.get("results", "results"))
    if not root.is_dir():
        raise UserError(f"{root} is no folder; name one that holds results: results=results/data_size")
    return Need(int(asked["train_rows"]), **numbers, task=asked.get("task"), model=asked.get("model")), root


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UserError(f"{key}={text} is no number above 0")
    return value


def run(words: Sequence[str]) -> int:
    need, root = parse(words)
    advice = advise(gather([root]), need)
    print("\n".join([*answer(advice), *failures(without_accuracy([root]), advice)]))
    return 0 if advice.chosen else 1


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
