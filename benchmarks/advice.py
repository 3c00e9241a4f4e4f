"""How good is the advice? A size, a task or a base is hidden; advice without it is held against what was measured there.

    python -m benchmarks.advice results/data_size results/standard             writes benchmarks/results/advice.json and prints the table
    python -m benchmarks.advice results/data_size out=/tmp/advice.json
    python -m benchmarks.advice experiments/race/cells.jsonl.xz experiments/rates/cells.jsonl out=benchmarks/results/advice_elsewhere.json processes=2

Size hidden: all trained cells of one size are taken away (not the smallest and not the largest: nothing is said beyond the sizes measured), and the
advice at that size is compared with them. Task hidden: it is taken away on every base, and advice from the other tasks is asked for on each base; base hidden:
likewise, on each task. With `measured` one run of one technique on that task and base is left, each trained technique in turn: what is judged are the intervals
of all others, and the technique that one would take who follows the advice (the measured one, or the one that is expected above it). The transfer sets that
cells answered count as tasks: other domains, but the same trained models, which is easier than another task; domains=no leaves them out.

A file of lines is a cache of runs (benchmarks/race_cache.py, benchmarks/rates.py): of a technique's rates the one nearest to its default, of its seeds SEEDS as
evidence, all as truth. Memory and times are not in it, so of techniques that are as good the highest is taken, not the cheapest.

regret: the best technique's mean accuracy less the recommended one's, points; null where there is no advice or the recommended one was not measured on what is
hidden. rivals: techniques that were measured there, so how hard the choice was. told: runs of what is hidden whose technique had an interval of at most
evidence.WIDEST; covered: those inside it; width: of these intervals, points, on average; untold: the other runs.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.race_cache import read
from benchmarks.rates_fit import defaults
from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import UserError, write_json
from pipeline.measure.machine import provenance
from pipeline.records.finished import Cell
from pipeline.records.results import Result, Score
from pipeline.reporting.advice import Advice, Need, above, advise
from pipeline.reporting.evidence import Seen, gather, takes_no_rows

OUT = Path(__file__).parent / "results" / "advice.json"
SEEDS = 3
"""Of a cache, as evidence: what an experiment has."""
UNTRAINED = {"zero_shot": "base", "few_shot": "untrained"}
"""Kinds (results.KINDS) of a cache's techniques that train nothing."""


def by_size(seen: Sequence[Seen]) -> Iterator[dict[str, Any]]:
    """A line for every hidden size."""
    for task, model in sorted({(s.task, s.model) for s in seen}):
        measured = [s for s in seen if (s.task, s.model) == (task, model)]
        sizes = sorted({s.rows for s in measured if not takes_no_rows(s)})
        for rows in sizes[1:-1]:
            hidden = [s for s in measured if s.rows == rows and not takes_no_rows(s)]
            left = [s for s in measured if s not in hidden]
            advice = advise(left, Need(rows, task=task, model=model))
            yield {"hidden": "size", "task": task, "model": model, "rows": rows, **_judged(advice, [s for s in measured if s.rows == rows])}


def elsewhere(seen: Sequence[Seen], truth: Sequence[Seen] | None = None, measured: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """A line for every task, and every base, that is hidden, at each of its bases (tasks) and sizes.

    Args:
        truth: what is judged by; None: the evidence itself.
        measured: instead, a line for each of these of which a run was measured there.
    """
    for kind in ("task", "base"):
        for task, model in sorted({(s.task, s.model) for s in seen}):
            hidden_here = [s for s in truth or seen if (s.task, s.model) == (task, model)]
            others = [s for s in seen if (s.task != task if kind == "task" else s.model != model)]
            for rows in sorted({s.rows for s in hidden_here}) if others else ():
                actual = [s for s in hidden_here if s.rows == rows]
                for technique in measured or (None,):
                    known = next(([s] for s in seen if (s.task, s.model, s.rows, s.technique) == (task, model, rows, technique)), [])
                    if known or technique is None:
                        advice = advise([*others, *known], Need(rows, task=task, model=model))
                        about = {"hidden": kind, "measured": technique, "task": task, "model": model, "rows": rows}
                        yield {**about, "others": len({s.task if kind == "task" else s.model for s in others}), **_judged(advice, actual)}


def _judged(advice: Advice, truth: Sequence[Seen]) -> dict[str, Any]:
    means: dict[str, list[float]] = defaultdict(list)
    for one in truth:
        means[one.technique].append(one.accuracy)
    scores = {name: math.fsum(values) / len(values) for name, values in means.items()}
    best = max(scores, key=lambda name: scores[name])
    chosen = advice.chosen.technique if advice.chosen else None
    if advice.chosen and (first := next(iter(advice.elsewhere), None)) and above(first, advice.chosen):
        chosen = first.technique
    runs = [
        (c.accuracy, one.accuracy) for c in advice.elsewhere or advice.candidates for one in truth
        if one.technique == c.technique and c.accuracy and (advice.borrowed or not takes_no_rows(one))
    ]
    told = [(low <= actual <= high, high - low) for expected, actual in runs if expected.told and (low := expected.low) is not None and (high := expected.high)]
    regret = None if chosen not in scores else round(100 * (scores[best] - scores[chosen]), 2)
    return {"chosen": chosen, "best": best, "regret": regret, "rivals": len(scores), "covered": sum(inside for inside, _ in told), "told": len(told),
            "untold": len(runs) - len(told), "width": round(100 * math.fsum(width for _, width in told) / len(told), 1) if told else None}


def cached(path: Path) -> tuple[list[Seen], list[Seen]]:
    """(evidence, truth) of a cache of runs; raises UserError where it holds none."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in read(path):
        if line.get("test", {}).get("rows") and "right" in line["test"]:
            groups[line["model"], line["task"], line["technique"]].append(line)
    evidence, truth = [], []
    for (model, _, technique), lines in sorted(groups.items()):
        rates = sorted({line["lr"] for line in lines if line["lr"]})
        rate = min(rates, key=lambda one: abs(math.log(one / defaults(technique, model)))) if len(rates) > 1 else next(iter(rates), None)
        runs = [_seen(line) for line in sorted(lines, key=lambda line: line["seed"]) if line["lr"] == rate]
        evidence += runs[:SEEDS]
        truth += runs
    if not truth:
        raise UserError(f"{path} holds no finished run")
    return evidence, truth


def _seen(line: dict[str, Any]) -> Seen:
    """A run of a cache as a cell that keeps no files."""
    from scipy.stats import binomtest

    name, rows, seed = line["technique"], line["train_rows"], line["seed"]
    kind = UNTRAINED.get(name, "trained")
    right, of = line["test"]["right"], line["test"]["rows"]
    score = Score(of, right / of, *binomtest(right, of).proportion_ci(method="wilson"))
    result = Result("cache", f"{name}-s{seed}-n{rows}", name, "", "", "", "bf16", line["task"], line["model"], seed, rows, "ok", kind,
                    takes_rows=kind == "trained", scores={"test": score}, hardware={"gpu": line.get("device")})
    return Seen(name, line["task"], line["model"], rows, seed, float(score.accuracy or 0.0), score.rows, Cell(result, Path("no files"), name, str(rows)))


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
    """By what was hidden (with the source, and whether a run was left): lines, mean and largest regret, share of runs inside their intervals."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[_kind(line)].append(line)
    return {kind: _totals(some) for kind, some in groups.items()}


def _kind(line: dict[str, Any]) -> str:
    return (f"{line['source']}, " if line.get("source") else "") + line["hidden"] + (", a run measured" if line.get("measured") else "")


def _totals(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
    regrets = [line["regret"] for line in some if line["regret"] is not None]
    told = sum(line["told"] for line in some)
    return {
        "lines": len(some), "without_answer": sum(line["chosen"] is None for line in some),
        "answer_not_measured": sum(line["chosen"] is not None and line["regret"] is None for line in some),
        "mean_regret": round(math.fsum(regrets) / len(regrets), 2) if regrets else None,
        "largest_regret": max(regrets, default=None), "told": told, "untold": sum(line["untold"] for line in some),
        "mean_width": round(math.fsum((line["width"] or 0) * line["told"] for line in some) / told, 1) if told else None,
        "coverage": round(sum(line["covered"] for line in some) / told, 3) if told else None,
    }


def table(totals: dict[str, Any]) -> str:
    """A `summary` as docs/advice.md has it."""
    lines = ["| hidden | cases | no answer | mean regret, points | largest | runs with an interval | inside it | mean width, points |",
             "| --- | --: | --: | --: | --: | --: | --: | --: |"]
    for kind, one in totals.items():
        runs = one["told"] + one["untold"]
        inside = "—" if one["coverage"] is None else f"{100 * one['coverage']:.1f}%"
        width = "—" if one["mean_width"] is None else one["mean_width"]
        figures = (one["lines"], one["without_answer"], one["mean_regret"], one["largest_regret"], f"{one['told']:,} of {runs:,}", inside, width)
        lines.append(f"| {kind} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines)


def _of_cache(path: Path, technique: str | None) -> list[dict[str, Any]]:
    evidence, truth = cached(path)
    return [{"source": path.parent.name, **line} for line in elsewhere(evidence, truth, [technique] if technique else ())]


def run(words: Sequence[str]) -> int:
    """Judge, write, print."""
    roots = [Path(w) for w in words if "=" not in w]
    keys = key_values([w for w in words if "=" in w], ("out", "domains", "processes"), "benchmarks.advice")
    processes = keys.get("processes", "1")
    if not processes.isdecimal() or int(processes) < 1:
        raise UserError(f"processes={processes} is no number of processes; write processes=2")
    if missing := next((r for r in roots if not r.exists()), None):
        raise UserError(f"{missing} does not exist; name folders of results, or caches of runs")
    seen = gather([r for r in roots if r.is_dir()])
    caches = {r: cached(r)[1] for r in roots if not r.is_dir()}
    if not seen and not caches:
        raise UserError("there is no finished cell in what was named; run: python -m pipeline.cells experiments=data_size_quick")
    lines = [*by_size(seen), *elsewhere([*seen, *(domains(seen) if keys.get("domains") != "no" else [])])]
    jobs = [(path, technique) for path, truth in caches.items() for technique in [None, *sorted({s.technique for s in truth if not takes_no_rows(s)})]]
    with ProcessPoolExecutor(int(processes)) as pool:
        lines += [line for some in pool.map(_of_cache, *zip(*jobs, strict=True)) for line in some] if jobs else []
    machines = [s.cell.result.hardware for s in [*seen, *itertools.chain(*caches.values())]]
    hardware = sorted({machine.get("gpu") or machine.get("cpu") or "unknown" for machine in machines})
    named = [*(r.name if r.is_dir() else str(r) for r in roots), *(["domains=no"] if keys.get("domains") == "no" else [])]
    command = " ".join(["python -m benchmarks.advice", *named])
    cells = len(seen) + sum(map(len, caches.values()))
    about = {"date": provenance()["started"][:10], "cells": cells, "hardware_of_the_cells": hardware, "command": command}
    write_json(Path(keys.get("out", OUT)), {**about, "summary": summary(lines), "lines": lines})
    for line in lines:
        if not line.get("measured"):
            print(*(line.get(k) for k in ("hidden", "task", "model", "rows", "chosen", "best", "regret", "rivals", "covered", "told", "width")), sep="\t")
    print(table(summary(lines)))
    return 0


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
