"""Which technique to take, from the cells on disk: expected accuracy at a number of training rows, memory, time, and what they rest on.

Library of `python -m pipeline.advise`; docs/advice.md tells the rules, `python -m benchmarks.advice` how they did where a size or a task was hidden.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.core.files import UserError
from pipeline.reporting.advice_cost import expected_memory, expected_time
from pipeline.reporting.evidence import Expected, Seen, Spread, expected_accuracy, other_task, paired_apart, pooled_spread, said_sizes, takes_no_rows
from pipeline.stats import learning_curve, learning_noise, tiers

SLACK = 0.02
"""What is expected this much below the most accurate, and is not told apart from it, may be recommended for costing less. Not being told apart alone
will not do: with few seeds it holds of techniques that are 15 points worse (benchmarks/advice.py showed it)."""


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
    told_apart: bool = True
    """From the most accurate that is not out; False for that one itself."""
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
    """Why this one, or why none."""
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


def _candidates(own: Sequence[Seen], need: Need) -> list[Candidate]:
    """Every technique with cells of one task and model, and what is expected of its accuracy."""
    by_technique: dict[str, list[Seen]] = defaultdict(list)
    for one in own:
        by_technique[one.technique].append(one)
    spreads = {kind: pooled_spread([s for s in own if takes_no_rows(s) is kind]) for kind in (False, True)}
    curves = _curves(own)
    return [_candidate(name, cells, need, spreads[takes_no_rows(cells[0])], curves.get(name)) for name, cells in by_technique.items()]


def _borrowed(seen: Sequence[Seen], need: Need) -> Advice:
    """Advice on a task that nothing was measured on, from all others with the model."""
    model = _only_model(seen, need)
    own = [s for s in seen if s.model == model]
    tasks = sorted({s.task for s in own})
    spreads = {kind: pooled_spread([s for s in own if takes_no_rows(s) is kind]) for kind in (False, True)}
    found: dict[str, list[Candidate]] = defaultdict(list)
    for task in tasks:
        for one in _candidates([s for s in own if s.task == task], need):
            found[one.technique].append(one)
    advice = Advice(need, ", ".join(tasks), model, [_over_tasks(name, some, need, spreads) for name, some in found.items()], borrowed=True)
    most = max((len(c.by_task) for c in advice.candidates if not takes_no_rows(c.nearest)), default=0)
    for one in advice.candidates:
        if one.out is None and len(one.by_task) < most:
            one.out = f"was measured on {len(one.by_task)} of the {most} tasks that the others were measured on"
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


def _over_tasks(name: str, some: list[Candidate], need: Need, spreads: dict[bool, Spread]) -> Candidate:
    told = {c.nearest.task: c.accuracy.value for c in some if c.accuracy}
    if not told:
        return some[0]
    cells = _nearest_first([s for c in some if c.accuracy for s in c.evidence], need)
    return Candidate(name, cells, other_task(told, spreads[takes_no_rows(cells[0])]), by_task=told)


def _pair(seen: Sequence[Seen], need: Need) -> tuple[str, str]:
    there = sorted({(s.task, s.model) for s in seen if need.task in (None, s.task) and need.model in (None, s.model)})
    if len(there) == 1:
        return there[0]
    every = ", ".join(f"task={t} model={m}" for t, m in (there or sorted({(s.task, s.model) for s in seen}))) or "nothing at all"
    if there:
        raise UserError(f"there is evidence on several tasks or models ({every}); name one with task= and model=")
    asked = " ".join(f"{k}={v}" for k, v in (("task", need.task), ("model", need.model)) if v)
    raise UserError(f"no finished cell is evidence on {asked or 'any task'} (there is {every}); run an experiment on it first, such as "
                    "python -m pipeline.cells experiments=data_size_quick")


def _curves(own: Sequence[Seen]) -> dict[str, learning_curve.Curve]:
    """Learning curves over training rows of every technique with three sizes; those that take no rows have none here."""
    measured = [learning_noise.Measured(s.technique, s.rows, s.seed, s.accuracy, s.test_rows) for s in own if not takes_no_rows(s)]
    return learning_curve.fit(measured) if measured else {}


def _nearest_first(cells: Sequence[Seen], need: Need) -> list[Seen]:
    return sorted(cells, key=lambda s: (abs(math.log(s.rows / need.train_rows)), s.task, s.seed))


def _candidate(name: str, cells: list[Seen], need: Need, spread: Spread, curve: learning_curve.Curve | None) -> Candidate:
    found = Candidate(name, _nearest_first(cells, need), expected_accuracy(cells, need.train_rows, spread, curve))
    if found.accuracy is None:
        found.out = f"measured at {said_sizes(sorted({s.rows for s in cells}))} training rows, which says nothing of {need.train_rows:,}"
    return found


def _limits(found: Candidate, need: Need) -> None:
    """Fill in memory and time, and rule the candidate out where it exceeds a limit."""
    if found.accuracy is None:
        return
    found.memory, fits = expected_memory(found.evidence, need.train_rows, need.gpu_memory_gb)
    found.train_s = expected_time(found.evidence, need.train_rows)
    if found.out is not None:
        return
    if fits is False and found.memory:
        found.out = f"needs {found.memory.value / 2**30:.1f} GiB of {need.gpu_memory_gb:g} ({found.memory.basis})"
    elif need.hours is not None and found.train_s and found.train_s.value > 3600 * need.hours:
        found.out = f"trains {found.train_s.value / 3600:.1f} h of {need.hours:g} ({found.train_s.basis})"
    elif need.metric_floor is not None and (found.accuracy.value < need.metric_floor):
        found.out = f"is expected at {100 * found.accuracy.value:.1f}%, below {100 * need.metric_floor:g}%"


def _choose(advice: Advice) -> None:
    """The most accurate that is not out, or what needs least memory of those close to it that cannot be told from it."""
    live = sorted((c for c in advice.candidates if c.out is None), key=lambda c: -_value(c))
    gone = sorted((c for c in advice.candidates if c.out is not None), key=lambda c: -_value(c))
    trained = [c for c in advice.candidates if not takes_no_rows(c.nearest)]
    if trained and all(c.accuracy is None for c in trained):
        sizes = sorted({s.rows for c in trained for s in c.evidence})
        advice.candidates = [*live, *gone]
        advice.reason = f"trained techniques were measured at {said_sizes(sizes)} training rows, and nothing is said of {advice.need.train_rows:,}"
        return
    if not live:
        advice.candidates, advice.reason = gone, "nothing that was measured meets what is asked"
        return
    best = live[0]
    for one in live:
        one.told_apart = one is not best and _apart(one, best)
    alike = [c for c in live if not c.told_apart and _value(c) >= _value(best) - SLACK]
    chosen = min(alike, key=lambda c: (c.memory.value if c.memory else math.inf, c.train_s.value if c.train_s else 0.0, -_value(c)))
    advice.candidates, advice.chosen = [chosen, *(c for c in live if c is not chosen), *gone], chosen
    if len(alike) == 1:
        advice.reason = "the most accurate" + (", and told apart from the others" if all(c.told_apart for c in live if c is not best) else "")
    elif chosen is best:
        advice.reason = f"the most accurate; of those within {100 * SLACK:g} points that cannot be told from it none needs less memory"
    else:
        close = f"not told apart from {best.technique} ({100 * _value(best):.1f}%), within {100 * SLACK:g} points of it"
        advice.reason = f"{close}, and needs the least memory of these"


def _value(candidate: Candidate) -> float:
    return candidate.accuracy.value if candidate.accuracy else -1.0


def _apart(one: Candidate, best: Candidate) -> bool:
    """Whether the test rows of the nearest size that both have tell them apart (tiers.py); without such answers, whether their intervals part.

    Over several other tasks: whether the tasks do.
    """
    if len(one.by_task) > 1 or len(best.by_task) > 1:
        return paired_apart(best.by_task, one.by_task)
    here = {s.rows for s in one.evidence}
    shared = next((s.rows for s in best.evidence if s.rows in here), None)
    if shared is not None:
        runs = {c.technique: {s.seed: s.cell.right() for s in c.evidence if s.rows == shared} for c in (one, best)}
        fixed = [c.technique for c in (one, best) if c.nearest.cell.result.kind == "base"]
        found = tiers.compare(runs, fixed)
        if found is not None and len(found.means) == 2:
            return found.between(best.technique, one.technique).told
    assert one.accuracy and best.accuracy
    return one.accuracy.high is not None and best.accuracy.low is not None and one.accuracy.high < best.accuracy.low
