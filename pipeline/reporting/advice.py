"""Which technique to take, from the cells on disk: expected accuracy at a number of training rows, memory, time, and what they rest on.

Library of `python -m pipeline.advise` (advice_text.py has the words); docs/advice.md states the rules, `python -m benchmarks.advice` how they did where a size,
a task or a base was hidden.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from pipeline.core.files import UserError
from pipeline.reporting.evidence import (
    Expected,
    Seen,
    Spread,
    expected_accuracy,
    expected_memory,
    expected_time,
    own_spreads,
    paired_apart,
    pooled_spread,
    sizes_in_words,
    takes_no_rows,
)
from pipeline.reporting.figures import CONTROLS
from pipeline.stats import learning_curve, tiers
from pipeline.stats.tiers import Comparison, Difference
from pipeline.stats.transfer import Level, Transfer, transfer
from pipeline.stats.verdict import SLACK, Option, Verdict, decide

Place = tuple[str, str]
"""(task, model)."""


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
    """To the technique that the verdict names, in words; empty for what is out."""
    by_task: dict[str, float] = field(default_factory=dict)
    """Borrowed advice: what is expected on every task with evidence (the mean over bases; of a single task by base), fractions."""
    gap: tuple[float, float, float] | None = None
    """Borrowed advice: (mean, low, high) of what is expected beyond the recommended one, fractions."""

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
    borrowed: tuple[Place, ...] = ()
    """Nothing was measured on the task with the model: the places whose evidence stands in for it. Intervals hold the spread between places."""
    elsewhere: list[Candidate] = field(default_factory=list)
    """Trained techniques that were measured on other tasks or models alone, the highest first; the verdict does not know them."""


def advise(seen: Sequence[Seen], need: Need) -> Advice:
    """The advice of evidence on the task and model that are asked for; where there is none, of other tasks and models.

    Raises:
        UserError: there is no evidence at all, or nothing is named and there are several tasks or models.
    """
    task, model = place = _place(seen, need)
    here = [s for s in seen if (s.task, s.model) == place]
    if not here:
        return _borrowed(seen, need, place)
    advice = Advice(need, task, model, _candidates(here, need))
    for one in advice.candidates:
        _limits(one, need, model)
    _choose(advice)
    advice.elsewhere = _elsewhere(advice, _Others(seen, need, place))
    return advice


def _elsewhere(advice: Advice, others: _Others) -> list[Candidate]:
    """What is expected of trained techniques that were measured on other places alone; nothing where no trained one was measured on this one."""
    here = {c.technique for c in advice.candidates if c.accuracy and not takes_no_rows(c.nearest)}
    names = [name for name in others.trained if name not in here]
    if not here or not names:
        return []
    carried = others.carried(names)
    found = [others.candidate(name, carried) for name in names]
    for one in found:
        _limits(one, advice.need, advice.model)
    return sorted((one for one in found if one.out is None), key=lambda c: -_value(c))


def _candidates(seen: Sequence[Seen], need: Need) -> list[Candidate]:
    """Every technique with cells of one task and model, and what is expected of its accuracy."""
    by_technique: dict[str, list[Seen]] = defaultdict(list)
    for one in seen:
        by_technique[one.technique].append(one)
    spreads = {kind: pooled_spread([s for s in seen if takes_no_rows(s) is kind]) for kind in (False, True)}
    curves = _curves(seen)
    return [_candidate(name, cells, need, spreads[takes_no_rows(cells[0])], curves.get(name)) for name, cells in by_technique.items()]


class _Others:
    """What was measured anywhere, for one place: techniques' expected accuracies by place, and what they say of it. Techniques that are trained and those that
    take no rows have nothing in common here: where a base knows little, training may gain much."""

    def __init__(self, seen: Sequence[Seen], need: Need, place: Place) -> None:
        self.need, self.place = need, place
        self.places = sorted({(s.task, s.model) for s in seen})
        kinds = {kind: [s for s in seen if takes_no_rows(s) is kind] for kind in (False, True)}
        self.own = {name: variance for some in kinds.values() for name, variance in own_spreads(some, pooled_spread(some)).items()}
        self.by_technique: dict[str, list[Candidate]] = defaultdict(list)
        for at in self.places:
            for one in _candidates([s for s in seen if (s.task, s.model) == at], need):
                self.by_technique[one.technique].append(one)
        known = [name for name, some in self.by_technique.items() if any(c.accuracy for c in some)]
        self.trained, self.rowless = ([name for name in known if takes_no_rows(self.by_technique[name][0].nearest) is kind] for kind in (False, True))
        self.common = _common_places(self.by_technique.values())

    def carried(self, names: Sequence[str]) -> Transfer | None:
        """What these techniques, all trained or all without rows, are expected to score on the place; None of none. What takes no rows counts on the places
        that all are ranked over, so that an easy task on which nothing was trained lifts none."""
        rowless = bool(set(names) & set(self.rowless))
        cells = [(name, c, c.accuracy) for name in (self.rowless if rowless else self.trained) for c in self.by_technique[name] if c.accuracy]
        cells = [one for one in cells if not rowless or _at(one[1]) in self.common] or cells
        levels = [Level(*_at(c), name, expected.value, (expected.error or 0.0) ** 2) for name, c, expected in cells]
        return transfer(levels, [(*self.place, name) for name in names]) if levels else None

    def candidate(self, name: str, carried: Transfer | None) -> Candidate:
        """A technique by what is carried over, with its cells on the places that all are ranked over; on its own where it has none of these."""
        expected = [c for c in self.by_technique[name] if c.accuracy]
        expected = [c for c in expected if _at(c) in self.common] or expected
        if not expected or carried is None:
            return self.by_technique[name][0]
        cells = _nearest_first([s for c in expected for s in c.evidence], self.need, self.place)
        target = (*self.place, name)
        value, low, high = (min(1.0, max(0.0, end)) for end in (carried.value(target), *carried.interval(target, self.run_variance(name))))
        tasks, models = (len({one[part] for one in self.places}) for part in (0, 1))
        basis = f"carried over from {tasks} task{'s' if tasks > 1 else ''} on {models} model{'s' if models > 1 else ''}"
        return Candidate(name, cells, Expected(value, low, high, basis, carried=True), by_task=_by_task(expected))

    def run_variance(self, name: str) -> float:
        """Of one new run around what is expected of the technique: its seed (an untouched base has none), and the test rows."""
        cells = [s for c in self.by_technique[name] for s in c.evidence]
        share = statistics.fmean(s.accuracy for s in cells)
        seed = 0.0 if cells[0].cell.result.kind == "base" else self.own[name]
        return seed + share * (1 - share) / statistics.median(s.test_rows for s in cells)


def _borrowed(seen: Sequence[Seen], need: Need, place: Place) -> Advice:
    """Advice on a task and a model that nothing was measured on together."""
    others = _Others(seen, need, place)
    carried, rowless = others.carried(others.trained), others.carried(others.rowless)
    candidates = [others.candidate(name, rowless if name in others.rowless else carried) for name in others.by_technique]
    advice = Advice(need, *place, candidates, borrowed=tuple(others.places))
    most = len(others.common)
    for one in advice.candidates:
        there = len(others.common & {_at(c) for c in others.by_technique[one.technique] if c.accuracy})
        if one.out is None and there < most:
            one.out = f"was measured on {there} of the {most} tasks and models that the others were measured on"
        _limits(one, need, place[1])
    if all(takes_no_rows(c.nearest) for c in candidates):
        advice.reason = "nothing was trained where there is evidence, and what was not says nothing of training"
        return advice
    if need.metric_floor is not None and not any(c.accuracy and c.accuracy.told for c in advice.candidates if c.out is None):
        floor = f"{100 * need.metric_floor:g}%"
        advice.reason = f"nothing was measured on {place[0]} with {place[1]}, and what was elsewhere does not tell whether {floor} is reached"
        return advice
    _choose(advice)
    name = advice.chosen.technique if advice.chosen else ""
    for one in advice.candidates:
        if carried and name in others.trained and one.technique in others.trained and one.technique != name:
            one.gap = carried.gap((*place, one.technique), (*place, name))
    return advice


def above(one: Candidate, other: Candidate) -> bool:
    """Whether so much more is expected of it that it is worth a try."""
    return _value(one) > _value(other) + SLACK


def _at(candidate: Candidate) -> Place:
    return candidate.nearest.task, candidate.nearest.model


def _by_task(expected: Sequence[Candidate]) -> dict[str, float]:
    """Expected accuracy task by task, the mean over models; of a single task model by model."""
    single = len({_at(c)[0] for c in expected}) == 1
    values: dict[str, list[float]] = defaultdict(list)
    for one in expected:
        task, model = _at(one)
        values[model if single and len(expected) > 1 else task].append(_value(one))
    return {name: statistics.fmean(some) for name, some in values.items()}


def _common_places(techniques: Iterable[Sequence[Candidate]]) -> frozenset[Place]:
    """The places that techniques are ranked over: as many as any that is trained was measured on, of such sets the one that most have (then by name)."""
    sets = [frozenset(_at(c) for c in some if c.accuracy) for some in techniques if not takes_no_rows(some[0].nearest)]
    return max(sets, key=lambda one: (len(one), sum(one <= other for other in sets), sorted(one, reverse=True)), default=frozenset())


def _place(seen: Sequence[Seen], need: Need) -> Place:
    """The task and model that are asked for; what is not named must be the only one."""
    there = sorted({(s.task, s.model) for s in seen})
    if not there:
        asked = " ".join(f"{k}={v}" for k, v in (("task", need.task), ("model", need.model)) if v)
        raise UserError(f"no finished cell is evidence on {asked or 'any task'}; run an experiment on it first, such as "
                        "python -m pipeline.cells experiments=data_size_quick, or ask for what is published: alignscope fit --model Qwen/Qwen3-8B --card 16GB")
    fits = [(t, m) for t, m in there if need.task in (None, t) and need.model in (None, m)]
    if len(fits) == 1:
        return fits[0]
    every = ", ".join(f"task={t} model={m}" for t, m in fits or there)
    if fits:
        raise UserError(f"there is evidence on several tasks or models ({every}); name one with task= and model=")
    tasks, models = (sorted({one[part] for one in there}) for part in (0, 1))
    if need.task is None and len(tasks) > 1 or need.model is None and len(models) > 1:
        named, lacks = (f"task={need.task}", "model") if need.task else (f"model={need.model}", "task")
        raise UserError(f"no finished cell is evidence on {named} (there is {every}); name the {lacks}, too, and what was measured elsewhere is carried "
                        f"over: {lacks}=…")
    return need.task or tasks[0], need.model or models[0]


def _curves(seen: Sequence[Seen]) -> dict[str, learning_curve.Curve]:
    """Learning curves over training rows of every technique with three sizes; those that take no rows have none here."""
    measured = [learning_curve.Measured(s.technique, s.rows, s.seed, s.accuracy, s.test_rows) for s in seen if not takes_no_rows(s)]
    return learning_curve.fit(measured) if measured else {}


def _nearest_first(cells: Sequence[Seen], need: Need, place: Place | None = None) -> list[Seen]:
    """By number of rows, of the same model first, then of the same task."""
    task, model = place or ("", "")
    return sorted(cells, key=lambda s: (s.model != model, s.task != task, abs(math.log(s.rows / need.train_rows)), s.task, s.model, s.seed))


def _candidate(name: str, cells: list[Seen], need: Need, spread: Spread, curve: learning_curve.Curve | None) -> Candidate:
    candidate = Candidate(name, _nearest_first(cells, need), expected_accuracy(cells, need.train_rows, spread, curve))
    if candidate.accuracy is None:
        candidate.out = f"measured at {sizes_in_words(sorted({s.rows for s in cells}))} training rows, which says nothing of {need.train_rows:,}"
    return candidate


def _limits(candidate: Candidate, need: Need, model: str) -> None:
    """Fill in memory and time with the model, and rule the candidate out where it exceeds a limit."""
    if candidate.accuracy is None:
        return
    if candidate.nearest.cell.result.family == CONTROLS:
        candidate.out = "is a control, made to gain nothing"
    candidate.memory, fits = expected_memory(candidate.evidence, need.train_rows, need.gpu_memory_gb, model)
    candidate.train_s = expected_time(candidate.evidence, need.train_rows, model)
    if candidate.out is not None:
        return
    if fits is False and candidate.memory:
        candidate.out = f"needs {candidate.memory.value / 2**30:.3g} GiB of {need.gpu_memory_gb:g}"
    elif need.hours is not None and candidate.train_s and candidate.train_s.value > 3600 * need.hours:
        candidate.out = f"trains {candidate.train_s.value / 3600:.3g} h of {need.hours:g}"
    elif need.metric_floor is not None and candidate.accuracy.told and candidate.accuracy.value < need.metric_floor:
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
    measured = {
        c.technique: [r.memory for s in c.evidence if (r := s.cell.result).memory and r.memory.peak_bytes
                      and (s.rows, s.model) == (c.nearest.rows, c.nearest.model)] for c in live
    }
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
    return "not told apart" if one.technique in verdict.tied else "told apart"


def _value(candidate: Candidate) -> float:
    return candidate.accuracy.value if candidate.accuracy else -1.0


def _compared(live: Sequence[Candidate]) -> Comparison:
    """All that are not out, compared as the report compares: on the test rows that they answered at the nearest size that all were measured at.

    What has no such answers is told apart where the expected accuracies' intervals part; several other tasks, where the tasks do. `rows` is then 0, and
    there are no letters.
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
    return Comparison({c.technique: _value(c) for c in live}, pairs, {}, 0, by_rows.covers_seeds if by_rows else True)


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
