"""Which of seven rates a search should take: rules replayed on the grids of experiments/rates/cells.jsonl.

Library of `python -m benchmarks.rates choice`. A grid's validation rows choose a rate, its test rows say what that was worth, and so do the grid's other
seed's where it has one (the held-out half). The one-standard-error rule is the product's (pipeline/search/choice.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import rates_fit
from pipeline.search import choice
from pipeline.search.space import Parameter, Space

KEY, LOST = "train.lr", 3.0
"""LOST: points of accuracy from which a choice is told of as worse or better than the default."""
SPACE = Space({KEY: Parameter(low=1e-7, high=1.0, log=True)})
STARTS: dict[str, Callable[[str, str], float]] = {
    "the defaults": rates_fit.defaults, "the defaults before 2026-11-29, one rate for every base": lambda technique, _: rates_fit.BEFORE[technique],
    "five times the defaults": lambda technique, model: 5 * rates_fit.defaults(technique, model),
}
"""What a search starts from: the rate that is a technique's own."""
Rule = Callable[[list[dict[str, Any]], float], dict[str, Any]]
"""(trials, the technique's own rate) -> the trial that is taken."""


def _nearest(trials: list[dict[str, Any]], own: float) -> dict[str, Any]:
    return min(trials, key=lambda t: abs(math.log(t["params"][KEY] / own)))


def _always(found: dict[str, Any] | None) -> dict[str, Any]:
    assert found is not None
    return found


RULES: dict[str, Rule] = {
    "no search": _nearest,
    "the highest": lambda trials, _: _always(choice.highest(trials)),
    "the lowest loss": lambda trials, _: min(trials, key=lambda t: math.inf if t["nll"] is None else t["nll"]),
    "within a standard error, the nearest": lambda trials, own: _always(choice.taken(trials, SPACE, {KEY: own})),
}


def grids(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str, int], list[dict[str, Any]]]:
    """(technique, model, task, seed) -> trials, the lowest rate first, with `test`, the accuracy on test rows; a run that diverged answers nothing right."""
    found: dict[tuple[str, str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in sorted((row for row in rows if row["lr"] is not None and "error" not in row), key=lambda row: row["lr"]):
        seen = {"validation": 0.0, "nll": None, "validation_rows": None, "test": 0.0}
        if "validation" in row:
            right, test = row["validation"], row["test"]
            seen = {"validation": right["right"] / right["rows"], "nll": right["nll"], "validation_rows": right["rows"], "test": test["right"] / test["rows"]}
        found[row["technique"], row["model"], row["task"], row.get("seed", 0)].append({"params": {KEY: row["lr"]}, **seen})
    return {key: trials for key, trials in found.items() if len(trials) >= 7}


def judged(found: dict[tuple[str, str, str, int], list[dict[str, Any]]], rule: Rule, start: Callable[[str, str], float]) -> dict[str, float]:
    """In points of accuracy on test rows, means over grids: below the best of seven rates; above the start, and the same on the grid's other seed; shares of
    grids in % that lie LOST points below and above the start."""
    below, above, elsewhere = [], [], []
    for (technique, model, task, seed), trials in found.items():
        own = start(technique, model)
        taken, default = rule(trials, own), _nearest(trials, own)
        below.append(max(t["test"] for t in trials) - taken["test"])
        above.append(taken["test"] - default["test"])
        other = {t["params"][KEY]: t["test"] for t in found.get((technique, model, task, 1 - seed), ())}
        if other:
            elsewhere.append(other[taken["params"][KEY]] - other[default["params"][KEY]])
    points = 100 * np.array(above)
    return {"grids": len(points), "below": 100 * float(np.mean(below)), "above": float(points.mean()), "elsewhere": 100 * float(np.mean(elsewhere)),
            "worse": 100 * float((points < -LOST).mean()), "better": 100 * float((points > LOST).mean())}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a start and rule."""
    found = grids(rows)
    lines = ["| the technique's own rate | what is taken | grids | below the best of seven | above its own rate | the same on another seed | "
             f"{LOST:g} points worse | {LOST:g} points better |", "| --- | --- |" + " --: |" * 6]
    for name, start in STARTS.items():
        for rule, function in RULES.items():
            one = judged(found, function, start)
            figures = f"{one['below']:.2f} | {one['above']:+.2f} | {one['elsewhere']:+.2f} | {one['worse']:.0f}% | {one['better']:.0f}%".replace("-", "−")
            lines.append(f"| {name} | {rule} | {one['grids']} | {figures} |")
    return "\n".join(lines) + "\n"


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text(f"{HEAD}\n{table(rows)}", encoding="utf-8")


HEAD = """# Which of a search's trials to take

`python -m benchmarks.rates choice`: the grids of [cells.jsonl](cells.jsonl) (15 techniques, 12 pairs of base and task, seven rates; the held-out half with two
seeds) as searches of seven trials. 128 validation rows (svamp 100) choose a rate, 400 test rows (svamp 200) say what it was worth, in points of accuracy; where
there is another seed, it is asked, too. *The nearest*: of the rates within a standard error of the highest the one nearest to the technique's own, which is
what `pipeline.tune` and the screening of `pipeline.race` take. The defaults were fitted on half of these pairs, validation and test rows together.
"""
