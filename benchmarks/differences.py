"""Planned comparisons over experiments: how much one technique is beyond another, cell by cell of a question's grids, with intervals.

    python -m benchmarks.differences experiments=step_by_step_cqa,step_by_step_svamp pairs=full:step_by_step,lora:step_by_step_lora to=FILE.json
    … results=/tmp/results       where the finished cells lie (results/)
    … tuned=false                untuned cells (a name that stands for itself, such as zero_shot, is never marked as tuned)
    … figure=perplexity          of what was forgotten, not of test answers: the change against the untouched base (perplexity: relative; pairs, lambada: share)

A pair one:other asks for other - one. Both answered the same test rows, so rows are paired; seeds are random; the interval is for that pair alone, and the
corrected p-value for all lines together (Holm). A figure of forgetting has one value a seed, and its interval is Welch's over them. `all` is the mean over the
experiments and sizes that have the pair: of these tasks and bases, not of others.
Prints a Markdown table; `to` keeps its figures (python -m benchmarks.differences table FILE.json prints them again).
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.commands import key_values, words_entry
from pipeline.core.compose import MARK, SUFFIX
from pipeline.core.files import UserError, read_json, write_json
from pipeline.records.finished import Cell, cells_below
from pipeline.reporting import values
from pipeline.stats import tiers

OWN = {"results": "results", "tuned": "true", "figure": "test", "to": ""}
FIGURES = {"perplexity": values.growth_of("perplexity_base"), "pairs": values.change_of("pairs", "pairs_base"),
           "lambada": values.change_of("lambada", "lambada_base")}
Z = 1.959964


def lines(root: Path, experiments: Sequence[str], pairs: Sequence[tuple[str, str]], tuned: bool = True,
          figure: str = "test") -> list[dict[str, Any]]:
    """A line for each experiment, number of rows and pair that has cells, then one a pair over all of them. Shares, not percent.

    Raises:
        UserError: an experiment has no finished cell.
    """
    made = [line for experiment in experiments for line in _of_experiment(root / experiment, pairs, tuned, figure)]
    for line, corrected in zip(made, tiers.holm([line["p"] for line in made]), strict=True):
        line["corrected"] = corrected
    return made + list(_over_all(made, pairs))


def _of_experiment(folder: Path, pairs: Sequence[tuple[str, str]], tuned: bool, figure: str) -> Iterator[dict[str, Any]]:
    cells = [cell for cell in cells_below(folder) if cell.result.status == "ok" and cell.result.test is not None]
    if not cells:
        raise UserError(f"{folder} holds no finished cell; run its cells first, or set results=FOLDER")
    by_rows: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_rows[cell.rows].append(cell)
    for rows, some in sorted(by_rows.items(), key=lambda item: (item[0] == "all", int(item[0]) if item[0].isdecimal() else 0)):
        runs: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
        for cell in some:
            runs[cell.label][cell.result.seed] = {row: float(right) for row, right in cell.right().items()}
        named = [(one, other, _label(one, runs, tuned), _label(other, runs, tuned)) for one, other in pairs]
        asked = [(one, other, first, second) for one, other, first, second in named if first and second]
        if figure != "test":
            yield from _of_seeds(some, rows, asked, FIGURES[figure])
            continue
        there = {label for *_, one, other in asked for label in (one, other)}
        compared = tiers.compare({label: runs[label] for label in sorted(there)}, {c.label for c in some if c.untrained}) if there else None
        for one, other, first, second in asked:
            if compared is not None:
                seeds = min(len(runs[first]), len(runs[second]))
                yield _line(some[0], rows, (one, other), compared, first, second) | {"seeds": seeds}


def _label(name: str, runs: Any, tuned: bool) -> str | None:
    """The label of a technique's or variant's cells; None: there are none."""
    marked = f"{name}-{MARK}" if "+" in name else f"{name}{SUFFIX}"
    return next((label for label in ((marked, name) if tuned else (name,)) if label in runs), None)


def _of_seeds(some: Sequence[Cell], rows: str, asked: Sequence[tuple[str, str, str, str]], figure: Callable[[Cell], float | None]) -> Iterator[dict[str, Any]]:
    """Lines of a figure that a cell has one value of; none where a technique has it of less than two seeds."""
    import numpy as np
    from scipy.stats import ttest_ind

    known: dict[str, list[float]] = defaultdict(list)
    for cell in some:
        value = figure(cell)
        if value is not None:
            known[cell.label].append(value)
    for one, other, first, second in asked:
        if min(len(known[first]), len(known[second])) < 2:
            continue
        a, b = (np.array(known[label]) for label in (second, first))
        difference = float(a.mean() - b.mean())
        low, high, p = difference, difference, float(difference == 0)  # where no seed differs from another
        if a.std() or b.std():
            test = ttest_ind(a, b, equal_var=False)
            (low, high), p = map(float, test.confidence_interval()), float(test.pvalue)
        yield {**_about(some[0], rows, (one, other)), "one_is": float(b.mean()), "other_is": float(a.mean()), "seeds": min(len(a), len(b)),
               "difference": difference, "low": low, "high": high, "p": p}


def _line(cell: Cell, rows: str, pair: tuple[str, str], compared: tiers.Comparison, one: str, other: str) -> dict[str, Any]:
    found = compared.between(other, one)
    return {**_about(cell, rows, pair), "one_is": compared.means[one], "other_is": compared.means[other], "test_rows": compared.rows,
            "difference": found.difference, "low": found.low, "high": found.high, "p": found.p}


def _about(cell: Cell, rows: str, pair: tuple[str, str]) -> dict[str, Any]:
    result = cell.result
    return {"experiment": result.experiment, "task": result.task, "model": result.model, "train_rows": rows, "one": pair[0], "other": pair[1]}


def _over_all(made: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """The mean of a pair's differences, whose errors are taken to be independent: other rows, other seeds."""
    for one, other in pairs:
        mine = [line for line in made if (line["one"], line["other"]) == (one, other)]
        if len(mine) < 2:
            continue
        mean = math.fsum(line["difference"] for line in mine) / len(mine)
        half = math.sqrt(math.fsum(((line["high"] - line["low"]) / 2) ** 2 for line in mine)) / len(mine)
        p = math.erfc(abs(mean) / half * Z / math.sqrt(2)) if half else float(mean == 0)
        yield {"experiment": "all", "one": one, "other": other, "lines": len(mine), "difference": mean, "low": mean - half, "high": mean + half, "p": p}


def table(made: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    rows = ["| experiment | training rows | is beyond | % | % | points [95%] | p, corrected | seeds |", "| --- | --: | --- | --: | --: | --: | --: | --: |"]
    for line in made:
        points = f"{_signed(line['difference'])} [{_signed(line['low'])}, {_signed(line['high'])}]"
        if line["experiment"] == "all":
            what = f"| all {line['lines']} | | {line['other']} beyond {line['one']} | | | {points} | {line['p']:.2g} (this one) | |"
        else:
            shares = " | ".join(f"{100 * line[key]:.1f}" for key in ("other_is", "one_is"))
            what = (f"| {line['experiment']} | {line['train_rows']} | {line['other']} beyond {line['one']} | {shares} | {points} | {line['corrected']:.2g} "
                    f"| {line['seeds']} |")
        rows.append(what)
    return "\n".join(rows)


def _signed(share: float) -> str:
    points = round(100 * share, 1)
    return f"{points:+.1f}".replace("-", "−") if points else "0.0"


def run(words: Sequence[str]) -> int:
    """The table of finished cells, or of a file."""
    if words and words[0] == "table":
        print(table(read_json(Path(words[1]))["lines"]))
        return 0
    given = OWN | key_values(words, ("experiments", "pairs", *OWN), "benchmarks.differences")
    if "experiments" not in given or "pairs" not in given:
        raise UserError("name what is compared: experiments=a,b pairs=full:step_by_step,lora:step_by_step_lora")
    pairs = [tuple(pair.split(":")) for pair in given["pairs"].split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"pairs={given['pairs']} is not of the form one:other,one:other")
    if given["figure"] not in ("test", *FIGURES):
        raise UserError(f"figure={given['figure']} is none of test, {', '.join(FIGURES)}")
    made = lines(Path(given["results"]), given["experiments"].split(","), pairs, given["tuned"] == "true", given["figure"])  # type: ignore[arg-type]
    if not made:
        raise UserError("none of the pairs has finished cells of both techniques with the same number of training rows; run them, or name other pairs")
    if given["to"]:
        write_json(given["to"], {"command": f"python -m benchmarks.differences {' '.join(words)}", "lines": made})
    print(table(made))
    return 0


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
