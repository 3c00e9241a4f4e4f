"""How good is the advice? A size, or a task, is hidden; advice without it is held against what was measured there.

    python -m benchmarks.advice results/data_size results/standard             writes benchmarks/results/advice.json and prints the table
    python -m benchmarks.advice results/data_size out=/tmp/advice.json

Size hidden: all trained cells of one size are taken away (not the smallest and not the largest: nothing is said beyond the sizes measured), and the
advice at that size is compared with them. Task hidden: advice from all other tasks, held against the hidden one's cells of every size; with one other
task there is no interval to be inside of. The transfer sets that cells answered count as tasks: other domains, but the same trained models, which is
easier than another task; domains=no leaves them out. regret: the best technique's mean accuracy less the recommended one's, points; null where there
is no advice or the recommended one was not measured on what is hidden. rivals: techniques that were measured there, so how hard the choice was.
covered: runs of what is hidden inside the interval that was given for their technique. width: of those intervals, points, on average.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.commands import words_entry
from pipeline.core.files import UserError, write_json
from pipeline.measure.machine import provenance
from pipeline.reporting.advice import Advice, Need, advise
from pipeline.reporting.evidence import Seen, gather, takes_no_rows

OUT = Path(__file__).parent / "results" / "advice.json"


def by_size(seen: Sequence[Seen]) -> Iterator[dict[str, Any]]:
    """A line for every hidden size."""
    for task, model in sorted({(s.task, s.model) for s in seen}):
        measured = [s for s in seen if (s.task, s.model) == (task, model)]
        sizes = sorted({s.rows for s in measured if not takes_no_rows(s)})
        for rows in sizes[1:-1]:
            hidden = [s for s in measured if s.rows == rows and not takes_no_rows(s)]
            left = [s for s in measured if s not in hidden]
            advice = advise(left, Need(rows, task=task, model=model))
            yield {"hidden": "size", "task": task, "rows": rows, **_judged(advice, [s for s in measured if s.rows == rows])}


def by_task(seen: Sequence[Seen]) -> Iterator[dict[str, Any]]:
    """A line for every hidden task at each of its sizes; the advice is of all other tasks of the model."""
    for task, model in sorted({(s.task, s.model) for s in seen}):
        others, hidden = ([s for s in seen if s.model == model and (s.task == task) is same] for same in (False, True))
        if not others:
            continue
        for rows in sorted({s.rows for s in hidden}):
            advice = advise(others, Need(rows, task=task, model=model))
            judged = _judged(advice, [s for s in hidden if s.rows == rows])
            yield {"hidden": "task", "task": task, "others": len({s.task for s in others}), "rows": rows, **judged}


def _judged(advice: Advice, truth: Sequence[Seen]) -> dict[str, Any]:
    means: dict[str, list[float]] = defaultdict(list)
    for one in truth:
        means[one.technique].append(one.accuracy)
    scores = {name: math.fsum(values) / len(values) for name, values in means.items()}
    best = max(scores, key=lambda name: scores[name])
    chosen = advice.chosen.technique if advice.chosen else None
    inside = [
        (c.accuracy.low <= one.accuracy <= c.accuracy.high, 100 * (c.accuracy.high - c.accuracy.low))
        for c in advice.candidates for one in truth
        if one.technique == c.technique and (advice.borrowed or not takes_no_rows(one))
        if c.accuracy and c.accuracy.low is not None and c.accuracy.high is not None
    ]
    regret = None if chosen not in scores else round(100 * (scores[best] - scores[chosen]), 2)
    return {"chosen": chosen, "best": best, "regret": regret, "rivals": len(scores), "covered": sum(within for within, _ in inside), "runs": len(inside),
            "width": round(math.fsum(width for _, width in inside) / len(inside), 1) if inside else None}


def domains(seen: Sequence[Seen]) -> list[Seen]:
    """The cells' transfer sets as tasks of their own."""
    rows_found = []
    for one in seen:
        for split, score in one.cell.result.scores.items():
            if split.startswith("transfer/") and score.accuracy is not None:
                cell = dataclasses.replace(one.cell, folder=one.cell.folder / "no predictions of the domain")
                rows_found.append(dataclasses.replace(one, task=f"{one.task}/{split[9:]}", accuracy=score.accuracy, test_rows=score.rows, cell=cell))
    return rows_found


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By what was hidden: lines, mean and largest regret, share of runs inside their intervals, lines without an answer."""
    totals = {}
    for kind in ("size", "task"):
        some = [line for line in lines if line["hidden"] == kind]
        regrets = [line["regret"] for line in some if line["regret"] is not None]
        runs = sum(line["runs"] or 0 for line in some)
        totals[kind] = {
            "lines": len(some), "without_answer": sum(line["chosen"] is None for line in some),
            "answer_not_measured": sum(line["chosen"] is not None and line["regret"] is None for line in some),
            "mean_regret": round(math.fsum(regrets) / len(regrets), 2) if regrets else None,
            "largest_regret": max(regrets, default=None), "runs": runs,
            "mean_width": round(math.fsum((line["width"] or 0) * line["runs"] for line in some) / runs, 1) if runs else None,
            "coverage": round(sum(line["covered"] or 0 for line in some) / runs, 3) if runs else None,
        }
    return totals


def table(totals: dict[str, Any]) -> str:
    """A `summary` as docs/advice.md has it."""
    lines = ["| hidden | cases | no answer | mean regret, points | largest | runs inside their intervals | mean width, points |",
             "| --- | --: | --: | --: | --: | --: | --: |"]
    for kind, one in totals.items():
        inside = f"{round(one['coverage'] * one['runs'])} of {one['runs']}"
        figures = (one["lines"], one["without_answer"], one["mean_regret"], one["largest_regret"], inside, one["mean_width"])
        lines.append(f"| a {kind} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines)


def run(words: Sequence[str]) -> int:
    """Judge, write, print."""
    roots = [Path(w) for w in words if "=" not in w]
    keys = dict(w.partition("=")[::2] for w in words if "=" in w)
    if unknown := next((k for k in keys if k not in ("out", "domains")), None):
        raise UserError(f"benchmarks.advice does not take {unknown}; it takes folders of results, out=<file> and domains=no")
    if missing := next((r for r in roots if not r.is_dir()), None):
        raise UserError(f"{missing} is no folder; name folders of results")
    seen = gather(roots)
    if not seen:
        raise UserError("there is no finished cell in what was named; run: python -m pipeline.cells experiments=data_size_quick")
    lines = [*by_size(seen), *by_task([*seen, *(domains(seen) if keys.get("domains") != "no" else [])])]
    hardware = sorted({s.cell.result.hardware.get("gpu") or s.cell.result.hardware.get("cpu") or "unknown" for s in seen})
    command = " ".join(["python -m benchmarks.advice", *(r.name for r in roots), *(["domains=no"] if keys.get("domains") == "no" else [])])
    about = {"date": provenance()["started"][:10], "cells": len(seen), "hardware_of_the_cells": hardware, "command": command}
    write_json(Path(keys.get("out", OUT)), {**about, "summary": summary(lines), "lines": lines})
    for line in lines:
        print(*(line.get(k) for k in ("hidden", "task", "rows", "chosen", "best", "regret", "rivals", "covered", "runs", "width")), sep="\t")
    print(summary(lines))
    return 0


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
