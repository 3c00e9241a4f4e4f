"""Advice as the lines that a reader gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from pipeline.records.results import Result
from pipeline.reporting import words as f
from pipeline.reporting.advice import Advice, Candidate
from pipeline.reporting.evidence import Expected

SHOWN_CELLS = 6


def told(advice: Advice) -> list[str]:
    """The answer, line by line."""
    need, chosen = advice.need, advice.chosen
    asked = [f"{need.train_rows:,} training rows"]
    asked += [f"{need.gpu_memory_gb:g} GiB"] if need.gpu_memory_gb is not None else []
    asked += [f"{need.hours:g} h"] if need.hours is not None else []
    asked += [f"at least {100 * need.metric_floor:g}%"] if need.metric_floor is not None else []
    lines = [f"{need.task or advice.task} with {advice.model}: {', '.join(asked)}", ""]
    if advice.borrowed:
        lines += [f"Nothing was measured on {need.task}. What follows is of {advice.task}: it tells which technique to try first.", ""]
    if chosen is None:
        lines.append(f"No evidence fits: {advice.reason}.")
    else:
        lines += [f"Take {chosen.technique}: {advice.reason}.", "", *_facts(chosen, need.train_rows, need.task or chosen.nearest.task)]
    others = [c for c in advice.candidates if c is not chosen and c.out is None]
    if others:
        lines += ["", "Others:", *(f"  {_line(c)}" for c in others)]
    gone = [c for c in advice.candidates if c.out is not None]
    if gone:
        lines += ["", "Ruled out:", *(f"  {c.technique}: {c.out}" for c in gone)]
    return lines


def failures(results: Sequence[Result], advice: Advice) -> list[str]:
    """Cells of the advice's task that ended out of memory: a result, but none of accuracy."""
    groups = Counter(
        (r.technique, r.train_rows, str(r.hardware.get("gpu") or r.hardware.get("cpu"))) for r in results
        if r.model == advice.model and r.task in (advice.need.task, *advice.task.split(", "))
    )
    lines = [f"  {name} at {rows:,} rows on {machine}: {count} cell{'s' if count > 1 else ''}" for (name, rows, machine), count in sorted(groups.items())]
    return ["", "Ended out of memory (so without an accuracy):", *lines] if lines else []


def _facts(chosen: Candidate, rows: int, task: str) -> list[str]:
    result = chosen.nearest.cell.result
    settings = ", ".join(f"{k} {v}" for k, v in result.hyperparameters.items())
    how = f"python -m pipeline.train experiments={result.experiment} technique={result.technique} task={task} train_rows={rows}"
    varied = "+" in chosen.nearest.cell.label or result.tuning is not None
    cells = [str(s.cell.folder) for s in chosen.evidence]
    more = f" and {len(cells) - SHOWN_CELLS} more" if len(cells) > SHOWN_CELLS else ""
    assert chosen.accuracy
    return [
        f"  expected accuracy   {_percent(chosen.accuracy)} of a new run ({chosen.accuracy.basis})",
        f"  memory              {_size(chosen.memory)}",
        f"  training time       {_duration(chosen.train_s)}",
        f"  settings            {settings or 'none'}",
        f"  to run it           {how}{' with the settings above' if varied else ''}",
        f"  evidence            {', '.join(cells[:SHOWN_CELLS])}{more}",
    ]


def _line(one: Candidate) -> str:
    assert one.accuracy
    apart = "told apart from the most accurate" if one.told_apart else "not told apart from the most accurate"
    return f"{one.technique}: {_percent(one.accuracy)}, memory {_size(one.memory)}, training {_duration(one.train_s)}; {apart}"


def _percent(value: Expected) -> str:
    if value.low is None or value.high is None:
        return f"{100 * value.value:.1f}% [no interval]"
    return f"{100 * value.value:.1f}% [{100 * value.low:.1f} to {100 * value.high:.1f}]"


def _duration(value: Expected | None) -> str:
    return "—" if value is None else f"{f.duration(value.value)}{_range(value, f.duration)} ({value.basis})"


def _size(value: Expected | None) -> str:
    return "— (neither forecast nor measured on a GPU)" if value is None else f"{f.size(value.value)}{_range(value, f.size)} ({value.basis})"


def _range(value: Expected, said: Callable[[float], str]) -> str:
    return " [one run tells no interval]" if value.low is None or value.high is None else f" [{said(value.low)} to {said(value.high)}]"
