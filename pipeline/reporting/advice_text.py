"""Advice in words: the answer of `python -m pipeline.advise`, line by line.

Library; advice.py decides.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence

from pipeline.core.compose import ROOT
from pipeline.records.results import Result
from pipeline.reporting import words as f
from pipeline.reporting.advice import Advice, Candidate, above
from pipeline.reporting.evidence import Expected
from pipeline.reporting.verdict import Saying, alike, sentences

SHOWN_CELLS = 6
WIDTH = 100  # of lines that name many techniques


def answer(advice: Advice) -> list[str]:
    need, chosen = advice.need, advice.chosen
    asked = [f"{need.train_rows:,} training rows"]
    asked += [f"{need.gpu_memory_gb:g} GiB"] if need.gpu_memory_gb is not None else []
    asked += [f"{need.hours:g} h"] if need.hours is not None else []
    asked += [f"at least {100 * need.metric_floor:g}%"] if need.metric_floor is not None else []
    lines = [f"{need.task or advice.task} with {advice.model}: {', '.join(asked)}", ""]
    if advice.borrowed:
        there = ", ".join(f"{task} with {model}" for task, model in advice.borrowed)
        use = f"What follows is of {there}: it tells which technique to try first." if chosen else f"There is evidence on {there}."
        lines += [f"Nothing was measured on {advice.task} with {advice.model}. {use}", ""]
    if chosen is None:
        lines.append(f"No evidence fits: {advice.reason}.")
    else:
        lines += [*(text.replace("`", "") for text in _verdict(advice, chosen)), "", *_facts(advice, chosen)]
    others = [c for c in advice.candidates if c is not chosen and c.out is None]
    if others:
        lines += ["", "Others:", *_table(others, advice)]
    if advice.elsewhere:
        lines += ["", "Not measured here, expected from other tasks and models, and no part of the verdict:", *_table(advice.elsewhere, advice)]
        first = advice.elsewhere[0]
        if chosen and above(first, chosen):
            lines += [f"  {first.technique} is expected above {chosen.technique}; try it: {_command(first, advice)}"]
    gone = [c for c in advice.candidates if c.out is not None]
    if gone:
        lines += ["", "Ruled out:", *_ruled_out(gone)]
    bases = _bases([*others, *advice.elsewhere, *gone])
    return lines + (["", *bases] if bases else [])


def _verdict(advice: Advice, chosen: Candidate) -> list[str]:
    """The report's sentences; where the level is not known, what is expected of the differences."""
    verdict = advice.verdict
    assert verdict and chosen.accuracy
    rows = "test rows" if verdict.evidence and verdict.evidence.rows else ""
    saying = Saying("expected accuracy" if not rows else "accuracy", rows)
    if chosen.accuracy.told:
        return sentences(verdict, saying)
    if verdict.kind == "do_not_train":
        return [f"Do not train yet: {chosen.technique} is expected to be as good. How well it will answer is not known.", *alike(verdict)]
    base = verdict.base
    ahead = chosen.accuracy.value - base.value if base else 0.0
    gap = f", {f.percent(abs(ahead))} points {'above' if ahead >= 0 else 'below'} the untouched base" if base else ""
    return [f"Try {chosen.technique} first: it is expected among the best{gap}. How well it will answer is not known; one run tells.", *alike(verdict)]


def failures(results: Sequence[Result], advice: Advice) -> list[str]:
    """Cells of the advice's task that ended out of memory or diverged: a result, but none of accuracy."""
    lines = []
    for status, heading in (("oom", "Ended out of memory"), ("diverged", "Diverged")):
        groups = Counter(
            (r.technique, r.train_rows, str(r.hardware.get("gpu") or r.hardware.get("cpu"))) for r in results
            if r.status == status and (r.task, r.model) in ((advice.task, advice.model), *advice.borrowed)
        )
        lines += ["", f"{heading} (so without an accuracy):"] if groups else []
        lines += [f"  {name} at {rows:,} rows on {machine}: {count} cell{'s' if count > 1 else ''}" for (name, rows, machine), count in sorted(groups.items())]
    return lines


def _unsettled(figure: Expected | None, limit: float | None, what: str) -> str:
    return f"; whether it {what.format(limit)} is not known" if figure is None and limit is not None else ""


def _facts(advice: Advice, chosen: Candidate) -> list[str]:
    result, need = chosen.nearest.cell.result, advice.need
    settings = ", ".join(f"{k} {v}" for k, v in result.hyperparameters.items())
    varied = "+" in chosen.nearest.cell.label or result.tuning is not None
    cells = [str(s.cell.folder) for s in chosen.evidence]
    more = f" and {len(cells) - SHOWN_CELLS} more" if len(cells) > SHOWN_CELLS else ""
    assert chosen.accuracy
    told = [] if chosen.accuracy.told else [f"  what would tell     a run of {chosen.technique} there: the others are expected from it"]
    return [
        f"  expected accuracy   {_percent(chosen.accuracy)} of a new run ({chosen.accuracy.basis})",
        *told,
        f"  memory              {_size(chosen.memory)}{_unsettled(chosen.memory, need.gpu_memory_gb, 'fits {:g} GiB')}",
        f"  training time       {_duration(chosen.train_s)}{_unsettled(chosen.train_s, need.hours, 'ends within {:g} h')}",
        f"  settings            {settings or 'none'}",
        f"  to run it           {_command(chosen, advice)}{' with the settings above' if varied else ''}",
        f"  evidence            {', '.join(cells[:SHOWN_CELLS])}{more}",
    ]


def _command(one: Candidate, advice: Advice) -> str:
    """What trains the technique on what was asked for."""
    result, rows = one.nearest.cell.result, advice.need.train_rows
    own = advice.task == one.nearest.task and not (ROOT / "conf" / "task" / f"{advice.task}.yaml").exists()  # written out in the experiment's file
    command = f"python -m pipeline.train experiments={result.experiment} technique={result.technique}"
    command += "" if own else f" task={advice.task}"
    command += "" if advice.model == one.nearest.model else f" model={advice.model}"
    return command + f" train_rows={rows}"


def _table(some: Sequence[Candidate], advice: Advice) -> list[str]:
    """A line a technique under a head: what is expected, beyond the recommended one where that is known better, memory, training, and the standing."""
    gaps, stand = any(one.gap for one in some), any(one.standing for one in some)
    name = advice.verdict.name if advice.verdict else ""
    weights = " (these weights)" if advice.verdict and advice.verdict.evidence and not advice.verdict.evidence.covers_seeds else ""
    head = ["technique", "expected accuracy", *[f"points above {name}"] * gaps, "memory", "training", f"from {name}{weights}" if stand else ""]
    lines = [head, *([one.technique, _percent(one.accuracy), *[_gap(one)] * gaps, _ranged(one.memory, f.size), _ranged(one.train_s, f.duration), one.standing]
                     for one in some if one.accuracy)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return ["  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _gap(one: Candidate) -> str:
    return "" if one.gap is None else f"{f.points(one.gap[0])} [{f.points(one.gap[1])} to {f.points(one.gap[2])}]"


def _ruled_out(gone: Sequence[Candidate]) -> list[str]:
    """Why each is out, those with the same reason in one line."""
    by_reason: dict[str, list[str]] = {}
    for one in gone:
        by_reason.setdefault(str(one.out), []).append(one.technique)
    lines = (f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)]


def _bases(some: Sequence[Candidate]) -> list[str]:
    """What the memory and the times of a table rest on: what most rest on first, and of which ones it is another."""
    lines = []
    for what, figures in (("memory", [(c.technique, c.memory) for c in some]), ("training time", [(c.technique, c.train_s) for c in some])):
        names: dict[str, list[str]] = {}
        for name, figure in figures:
            if figure is not None:
                names.setdefault(figure.basis, []).append(name)
        most, *others = sorted(names, key=lambda basis: -len(names[basis])) or [""]
        line = "; ".join(filter(None, [most, *(f"of {f.listed(names[basis])}: {basis}" for basis in others)]))
        lines += textwrap.wrap(f"{what}: {line}", WIDTH, subsequent_indent="  ", break_on_hyphens=False) if line else []
    return lines


def _percent(value: Expected | None) -> str:
    if value is None or value.low is None or value.high is None:
        return "not known"
    if not value.told:
        return f"not known [{100 * value.low:.0f} to {100 * value.high:.0f}%]"
    return f"{100 * value.value:.1f}% [{100 * value.low:.1f} to {100 * value.high:.1f}]"


def _duration(value: Expected | None) -> str:
    if value is None:
        return f.DASH
    return f"{_ranged(value, f.duration)}{' [one run tells no interval]' if value.low is None else ''} ({value.basis})"


def _size(value: Expected | None) -> str:
    return "— (neither forecast nor measured on a GPU)" if value is None else f"{_ranged(value, f.size)} ({value.basis})"


def _ranged(value: Expected | None, show: Callable[[float], str]) -> str:
    """A figure with its range, where it has one of any width."""
    if value is None:
        return f.DASH
    if value.low is None or value.high is None:
        return show(value.value)
    low, high = show(value.low), show(value.high)
    return show(value.value) + (f" [{low} to {high}]" if low != high else "")
