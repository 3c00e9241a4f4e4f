"""Which technique to take, from the cells on disk: expected accuracy at a number of training rows, memory, time, and what they rest on.

Library of `python -m pipeline.advise`; docs/advice.md states the rules, `python -m benchmarks.advice` how they did where a size or a task was hidden.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from pipeline.core.compose import ROOT
from pipeline.core.files import UserError
from pipeline.records.results import Result
from pipeline.reporting import words as f
from pipeline.reporting.evidence import (
    Expected,
    Seen,
    Spread,
    expected_accuracy,
    expected_memory,
    expected_time,
    other_task,
    paired_apart,
    pooled_spread,
    sizes_in_words,
    takes_no_rows,
)
from pipeline.reporting.figures import CONTROLS
from pipeline.reporting.verdict import Saying, sentences
from pipeline.stats import learning_curve, tiers
from pipeline.stats.tiers import Comparison, Difference
from pipeline.stats.verdict import Option, Verdict, decide


@dataclass(frozen=True)
class Need:
    """What is asked for. gpu_memory_gb: GiB of the card; hours: for training one cell; metric_floor: a fraction. None: no limit."""

    train_rows: int
    gpu_memory_gb: float | None = None
    hours: float | None = None
    metric_floor: float | None = None
    task: str | None = None
    model: str | None = None


@dataclass
class Candidate:
    """A technique, what is expected of it, and why it is out (None: it is not)."""

    technique: str
    evidence: list[Seen]
    accuracy: Expected | None = None
    memory: Expected | None = None
    """Bytes at the peak."""
    train_s: Expected | None = None
    out: str | None = None
    standing: str = ""
    """To the verdict, in words; empty for what is out."""
    by_task: dict[str, float] = field(default_factory=dict)
    """Borrowed advice: what is expected on every task with evidence, fractions."""

    @property
    def nearest(self) -> Seen:
        """The cell whose settings are recommended."""
        return self.evidence[0]


@dataclass
class Advice:
    """candidates: all techniques with evidence, the recommended one first, those that are out last. chosen: None where no evidence fits."""

    need: Need
    task: str
    model: str
    candidates: list[Candidate] = field(default_factory=list)
    chosen: Candidate | None = None
    reason: str = ""
    """Why none; empty where there is a verdict."""
    verdict: Verdict | None = None
    """On those that are not out; its `name` is chosen (of an undecided one the leader)."""
    borrowed: bool = False
    """Nothing was measured on the task that was asked for; `task` names the ones with evidence, and intervals hold the spread between tasks."""


def advise(seen: Sequence[Seen], need: Need) -> Advice:
    """The advice of evidence on the task and model that are asked for; where there is none on the task, of the others with that model.

    Raises:
        UserError: there is no evidence on the model (the message names what there is), or nothing is named and there are several.
    """
    borrowed = need.task is not None and not any(s.task == need.task for s in seen if need.model in (None, s.model))
    if borrowed and any(need.model in (None, s.model) for s in seen):
        return _borrowed(seen, need)
    task, model = _pair(seen, need)
    advice = Advice(need, task, model, _candidates([s for s in seen if (s.task, s.model) == (task, model)], need))
    for one in advice.candidates:
        _limits(one, need)
    _choose(advice)
    return advice


def _candidates(seen: Sequence[Seen], need: Need) -> list[Candidate]:
    """Every technique with cells of one task and model, and what is expected of its accuracy."""
    by_technique: dict[str, list[Seen]] = defaultdict(list)
    for one in seen:
        by_technique[one.technique].append(one)
    spreads = {kind: pooled_spread([s for s in seen if takes_no_rows(s) is kind]) for kind in (False, True)}
    curves = _curves(seen)
    return [_candidate(name, cells, need, spreads[takes_no_rows(cells[0])], curves.get(name)) for name, cells in by_technique.items()]


def _borrowed(seen: Sequence[Seen], need: Need) -> Advice:
    """Advice on a task that nothing was measured on, from all others with the model."""
    model = _only_model(seen, need)
    of_model = [s for s in seen if s.model == model]
    tasks = sorted({s.task for s in of_model})
    spreads = {kind: pooled_spread([s for s in of_model if takes_no_rows(s) is kind]) for kind in (False, True)}
    by_technique: dict[str, list[Candidate]] = defaultdict(list)
    for task in tasks:
        for one in _candidates([s for s in of_model if s.task == task], need):
            by_technique[one.technique].append(one)
    common = _common_tasks(by_technique.values())
    advice = Advice(need, ", ".join(tasks), model, [_over_tasks(name, some, common, need, spreads) for name, some in by_technique.items()], borrowed=True)
    most = len(common)
    for one in advice.candidates:
        if one.out is None and len(common & set(one.by_task)) < most:
            one.out = f"was measured on {len(common & set(one.by_task))} of the {most} tasks that the others were measured on"
        _limits(one, need)
    if most <= 1 and need.metric_floor is not None:
        advice.reason = f"nothing was measured on {need.task}, and one other task does not tell whether {100 * need.metric_floor:g}% is reached"
        return advice
    _choose(advice)
    return advice


def _only_model(seen: Sequence[Seen], need: Need) -> str:
    there = sorted({s.model for s in seen if need.model in (None, s.model)})
    if len(there) > 1:
        raise UserError(f"there is evidence on several models ({', '.join(there)}); name one with model=")
    return there[0]


def _common_tasks(techniques: Iterable[Sequence[Candidate]]) -> frozenset[str]:
    """The tasks that techniques are ranked over: as many as any that is trained was measured on, of such sets the one that most have (then by name)."""
    sets = [frozenset(c.nearest.task for c in some if c.accuracy) for some in techniques if not takes_no_rows(some[0].nearest)]
    return max(sets, key=lambda one: (len(one), sum(one <= other for other in sets), sorted(one, reverse=True)), default=frozenset())


def _over_tasks(name: str, some: list[Candidate], common: frozenset[str], need: Need, spreads: dict[bool, Spread]) -> Candidate:
    """A technique over the tasks that all are ranked over; over its own where it has none of these."""
    expected = [c for c in some if c.accuracy]
    expected = [c for c in expected if c.nearest.task in common] or expected
    if not expected:
        return some[0]
    cells = _nearest_first([s for c in expected for s in c.evidence], need)
    by_task = {c.nearest.task: c.accuracy.value for c in expected if c.accuracy}
    return Candidate(name, cells, other_task(by_task, spreads[takes_no_rows(cells[0])]), by_task=by_task)


def _pair(seen: Sequence[Seen], need: Need) -> tuple[str, str]:
    there = sorted({(s.task, s.model) for s in seen if need.task in (None, s.task) and need.model in (None, s.model)})
    if len(there) == 1:
        return there[0]
    every = ", ".join(f"task={t} model={m}" for t, m in (there or sorted({(s.task, s.model) for s in seen}))) or "nothing at all"
    if there:
        raise UserError(f"there is evidence on several tasks or models ({every}); name one with task= and model=")
    asked = " ".join(f"{k}={v}" for k, v in (("task", need.task), ("model", need.model)) if v)
    raise UserError(f"no finished cell is evidence on {asked or 'any task'} (there is {every}); run an experiment on it first, such as "
                    "python -m pipeline.cells experiments=data_size_quick, or ask for what is published: alignscope fit --model Qwen/Qwen3-8B --card 16GB")


def _curves(seen: Sequence[Seen]) -> dict[str, learning_curve.Curve]:
    """Learning curves over training rows of every technique with three sizes; those that take no rows have none here."""
    measured = [learning_curve.Measured(s.technique, s.rows, s.seed, s.accuracy, s.test_rows) for s in seen if not takes_no_rows(s)]
    return learning_curve.fit(measured) if measured else {}


def _nearest_first(cells: Sequence[Seen], need: Need) -> list[Seen]:
    return sorted(cells, key=lambda s: (abs(math.log(s.rows / need.train_rows)), s.task, s.seed))


def _candidate(name: str, cells: list[Seen], need: Need, spread: Spread, curve: learning_curve.Curve | None) -> Candidate:
    candidate = Candidate(name, _nearest_first(cells, need), expected_accuracy(cells, need.train_rows, spread, curve))
    if candidate.accuracy is None:
        candidate.out = f"measured at {sizes_in_words(sorted({s.rows for s in cells}))} training rows, which says nothing of {need.train_rows:,}"
    return candidate


def _limits(candidate: Candidate, need: Need) -> None:
    """Fill in memory and time, and rule the candidate out where it exceeds a limit."""
    if candidate.accuracy is None:
        return
    if candidate.nearest.cell.result.family == CONTROLS:
        candidate.out = "is a control, made to gain nothing"
    candidate.memory, fits = expected_memory(candidate.evidence, need.train_rows, need.gpu_memory_gb)
    candidate.train_s = expected_time(candidate.evidence, need.train_rows)
    if candidate.out is not None:
        return
    if fits is False and candidate.memory:
        candidate.out = f"needs {candidate.memory.value / 2**30:.1f} GiB of {need.gpu_memory_gb:g} ({candidate.memory.basis})"
    elif need.hours is not None and candidate.train_s and candidate.train_s.value > 3600 * need.hours:
        candidate.out = f"trains {candidate.train_s.value / 3600:.1f} h of {need.hours:g} ({candidate.train_s.basis})"
    elif need.metric_floor is not None and (candidate.accuracy.value < need.metric_floor):
        candidate.out = f"is expected at {100 * candidate.accuracy.value:.1f}%, below {100 * need.metric_floor:g}%"


def _choose(advice: Advice) -> None:
    """The verdict (pipeline/stats/verdict.py) on those that are not out, at their expected accuracy."""
    live = sorted((c for c in advice.candidates if c.out is None), key=lambda c: -_value(c))
    gone = sorted((c for c in advice.candidates if c.out is not None), key=lambda c: -_value(c))
    trained = [c for c in advice.candidates if not takes_no_rows(c.nearest)]
    if trained and all(c.accuracy is None for c in trained):
        sizes = sorted({s.rows for c in trained for s in c.evidence})
        advice.candidates = [*live, *gone]
        advice.reason = f"trained techniques were measured at {sizes_in_words(sizes)} training rows, and nothing is said of {advice.need.train_rows:,}"
        return
    if not live:
        advice.candidates, advice.reason = gone, "nothing that was measured meets what is asked"
        return
    verdict = decide(_options(live), _compared(live))
    chosen = next(c for c in live if c.technique == verdict.name)
    for one in live:
        one.standing = _standing(one, verdict)
    advice.candidates, advice.chosen, advice.verdict = [chosen, *(c for c in live if c is not chosen), *gone], chosen, verdict


def _options(live: Sequence[Candidate]) -> list[Option]:
    """What can be chosen. Memory is what is expected; where that is not known of all, what one counter measured, as in the report."""
    measured = {c.technique: [r.memory for s in c.evidence if (r := s.cell.result).memory and r.memory.peak_bytes and s.rows == c.nearest.rows] for c in live}
    kinds = {memory.kind for some in measured.values() for memory in some if memory}
    peaks = {name: statistics.fmean(m.peak_bytes for m in some if m and m.peak_bytes) for name, some in measured.items() if some and len(kinds) == 1}
    known = all(c.memory for c in live if c.nearest.cell.result.kind == "trained")
    return [
        Option(c.technique, _value(c), (kind := c.nearest.cell.result.kind) == "base", kind == "trained",
               (c.memory.value if c.memory else None) if known else peaks.get(c.technique), c.train_s.value if c.train_s else None)
        for c in live
    ]


def _standing(one: Candidate, verdict: Verdict) -> str:
    if one.technique in verdict.below_base:
        return "below the untouched base: its settings do not suit, tune it first"
    weights = "" if verdict.evidence is None or verdict.evidence.covers_seeds else " (these weights)"
    return f"{'not told apart' if one.technique in verdict.tied else 'told apart'} from {verdict.name}{weights}"


def _value(candidate: Candidate) -> float:
    return candidate.accuracy.value if candidate.accuracy else -1.0


def _compared(live: Sequence[Candidate]) -> Comparison:
    """All that are not out, compared as the report compares: on the test rows that they answered at the nearest size that all were measured at.

    What has no such answers is told apart where the expected accuracies' intervals part; several other tasks, where the tasks do. `rows` is then 0.
    """
    by_rows = _on_rows(live)
    if by_rows is not None and len(by_rows.means) == len(live):
        means = {c.technique: _value(c) for c in live}
        return replace(by_rows, means=means)
    pairs = {}
    for one, other in itertools.combinations(live, 2):
        gap = _value(one) - _value(other)
        if by_rows is not None and {one.technique, other.technique} <= set(by_rows.means) and len(one.by_task) < 2:
            pairs[one.technique, other.technique] = by_rows.between(one.technique, other.technique)
        else:
            p = 0.0 if _part(one, other) else 1.0
            pairs[one.technique, other.technique] = Difference(gap, gap, gap, p, p)
    apart = [names for names, pair in pairs.items() if pair.significant]
    order = [c.technique for c in live]
    return Comparison({c.technique: _value(c) for c in live}, pairs, tiers.letters(order, apart), 0, by_rows.covers_seeds if by_rows else True)


def _on_rows(live: Sequence[Candidate]) -> Comparison | None:
    """Those with answers at a size that they share (what takes no rows has all sizes), tested over rows and seeds; None where there are none."""
    if any(len(c.by_task) > 1 for c in live):
        return None
    sizes = [{s.rows for s in c.evidence} for c in live if not takes_no_rows(c.nearest)]
    shared = [s.rows for c in live for s in c.evidence if all(s.rows in each for each in sizes)]
    if not shared:
        return None
    runs = {
        c.technique: {s.seed: s.cell.right() for s in c.evidence if s.rows == shared[0] or takes_no_rows(s) and s.rows == c.nearest.rows} for c in live
    }
    return tiers.compare(runs, [c.technique for c in live if c.nearest.cell.result.kind == "base"])


def _part(one: Candidate, other: Candidate) -> bool:
    """Whether two candidates differ by what is expected of them."""
    if len(one.by_task) > 1 or len(other.by_task) > 1:
        return paired_apart(one.by_task, other.by_task)
    high, low = sorted((one, other), key=lambda c: -_value(c))
    assert high.accuracy and low.accuracy
    return low.accuracy.high is not None and high.accuracy.low is not None and low.accuracy.high < high.accuracy.low


SHOWN_CELLS = 6


def answer(advice: Advice) -> list[str]:
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
        assert advice.verdict
        rows = "test rows" if advice.verdict.evidence and advice.verdict.evidence.rows else ""
        lines += [*(text.replace("`", "") for text in sentences(advice.verdict, Saying("expected accuracy" if not rows else "accuracy", rows))),
                  "", *_facts(chosen, need.train_rows, need.task or chosen.nearest.task)]
    others = [c for c in advice.candidates if c is not chosen and c.out is None]
    if others:
        lines += ["", "Others:", *(f"  {_line(c)}" for c in others)]
    gone = [c for c in advice.candidates if c.out is not None]
    if gone:
        lines += ["", "Ruled out:", *(f"  {c.technique}: {c.out}" for c in gone)]
    return lines


def failures(results: Sequence[Result], advice: Advice) -> list[str]:
    """Cells of the advice's task that ended out of memory or diverged: a result, but none of accuracy."""
    lines = []
    for status, heading in (("oom", "Ended out of memory"), ("diverged", "Diverged")):
        groups = Counter(
            (r.technique, r.train_rows, str(r.hardware.get("gpu") or r.hardware.get("cpu"))) for r in results
            if r.status == status and r.model == advice.model and r.task in (advice.need.task, *advice.task.split(", "))
        )
        lines += ["", f"{heading} (so without an accuracy):"] if groups else []
        lines += [f"  {name} at {rows:,} rows on {machine}: {count} cell{'s' if count > 1 else ''}" for (name, rows, machine), count in sorted(groups.items())]
    return lines


def _facts(chosen: Candidate, rows: int, task: str) -> list[str]:
    result = chosen.nearest.cell.result
    settings = ", ".join(f"{k} {v}" for k, v in result.hyperparameters.items())
    own = task == chosen.nearest.task and not (ROOT / "conf" / "task" / f"{task}.yaml").exists()  # written out in the experiment's file
    how = f"python -m pipeline.train experiments={result.experiment} technique={result.technique}"
    how += f" train_rows={rows}" if own else f" task={task} train_rows={rows}"
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
    return f"{one.technique}: {_percent(one.accuracy)}, memory {_size(one.memory)}, training {_duration(one.train_s)}; {one.standing}"


def _percent(value: Expected) -> str:
    if value.low is None or value.high is None:
        return f"{100 * value.value:.1f}% [no interval]"
    return f"{100 * value.value:.1f}% [{100 * value.low:.1f} to {100 * value.high:.1f}]"


def _duration(value: Expected | None) -> str:
    return "—" if value is None else f"{f.duration(value.value)}{_range(value, f.duration)} ({value.basis})"


def _size(value: Expected | None) -> str:
    return "— (neither forecast nor measured on a GPU)" if value is None else f"{f.size(value.value)}{_range(value, f.size)} ({value.basis})"


def _range(value: Expected, show: Callable[[float], str]) -> str:
    return " [one run tells no interval]" if value.low is None or value.high is None else f" [{show(value.low)} to {show(value.high)}]"
