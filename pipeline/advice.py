"""Which technique to take, from the cells on disk: expected accuracy at a number of training rows, memory, time, and what they rest on.

Library of `python -m pipeline.advise`; docs/advice.md tells the rules, `python -m benchmarks.advice` how they did where a size or a task was hidden.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline import learning_curve, tiers
from pipeline.advice_evidence import Expected, Seen, Spread, expected_accuracy, pooled_spread, said_sizes, takes_no_rows
from pipeline.files import UserError

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
    memory_bytes: float | None = None
    memory_from: str = ""
    train_s: Expected | None = None
    out: str | None = None
    told_apart: bool = True
    """From the most accurate that is not out; False for that one itself."""

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
    """Nothing was measured on the task that was asked for; `task` is the one with the most cells, which tells of the choice, not of the accuracy."""


def advise(seen: Sequence[Seen], need: Need) -> Advice:
    """The advice of evidence on the task and model that are asked for; where there is none on the task, of the task with the most cells.

    Raises:
        UserError: there is no evidence on the model (the message names what there is), or nothing is named and there are several.
    """
    borrowed = need.task is not None and not any(s.task == need.task for s in seen if need.model in (None, s.model))
    task, model = _most(seen, need) if borrowed else _pair(seen, need)
    own = [s for s in seen if (s.task, s.model) == (task, model)]
    by_technique: dict[str, list[Seen]] = defaultdict(list)
    for one in own:
        by_technique[one.technique].append(one)
    spreads = {kind: pooled_spread([s for s in own if takes_no_rows(s) is kind]) for kind in (False, True)}
    curves = _curves(own)
    candidates = [_candidate(name, cells, need, spreads[takes_no_rows(cells[0])], curves.get(name)) for name, cells in by_technique.items()]
    advice = Advice(need, task, model, candidates, borrowed=borrowed)
    if borrowed and need.metric_floor is not None:
        advice.reason = f"nothing was measured on {need.task}, and another task does not tell whether {100 * need.metric_floor:g}% is reached"
        return advice
    _choose(advice)
    return advice


def _most(seen: Sequence[Seen], need: Need) -> tuple[str, str]:
    counts = Counter((s.task, s.model) for s in seen if need.model in (None, s.model))
    return max(sorted(counts), key=lambda key: counts[key]) if counts else _pair(seen, need)


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
    measured = [learning_curve.Measured(s.technique, s.rows, s.seed, s.accuracy, s.test_rows) for s in own if not takes_no_rows(s)]
    return learning_curve.fit(measured) if measured else {}


def _candidate(name: str, cells: list[Seen], need: Need, spread: Spread, curve: learning_curve.Curve | None) -> Candidate:
    ordered = sorted(cells, key=lambda s: (abs(math.log(s.rows / need.train_rows)), s.seed))
    found = Candidate(name, ordered, expected_accuracy(cells, need.train_rows, spread, curve))
    if found.accuracy is None:
        sizes = sorted({s.rows for s in cells})
        found.out = f"measured at {said_sizes(sizes)} training rows, which says nothing of {need.train_rows:,}"
        return found
    found.memory_bytes, found.memory_from, fits = _memory(found.nearest, need)
    found.train_s = _time(ordered, need.train_rows)
    if fits is False and found.memory_bytes:
        found.out = f"needs {found.memory_bytes / 2**30:.1f} GiB of {need.gpu_memory_gb:g} ({found.memory_from})"
    elif need.hours is not None and found.train_s and found.train_s.value > 3600 * need.hours:
        found.out = f"trains {found.train_s.value / 3600:.1f} h of {need.hours:g} ({found.train_s.basis})"
    elif need.metric_floor is not None and (found.accuracy.value < need.metric_floor):
        found.out = f"is expected at {100 * found.accuracy.value:.1f}%, below {100 * need.metric_floor:g}%"
    return found


def _memory(one: Seen, need: Need) -> tuple[float | None, str, bool | None]:
    """(bytes, where from, whether they fit the card). A forecast for the card that is asked for, else what was measured on a GPU."""
    from pipeline.forecasting.cell import forecast_of

    result, card = one.cell.result, need.gpu_memory_gb
    if card is not None and result.size and result.size.trainable:
        hardware = {**result.hardware, "gpu": f"a card of {card:g} GiB", "gpu_memory_bytes": int(card * 2**30)}
        told = forecast_of(dataclasses.replace(result, config={**result.config, "train_rows": need.train_rows}, hardware=hardware))
        if told is not None and told.memory is not None:
            return float(told.memory.total), "forecast", told.fits
    if result.memory and result.memory.peak_bytes and result.memory.kind.startswith("gpu"):
        peak = float(result.memory.peak_bytes)
        return peak, f"measured on {result.hardware.get('gpu')}", None if card is None else peak <= card * 2**30
    return None, "not known", None


def _time(ordered: Sequence[Seen], rows: int) -> Expected | None:
    """Training seconds at the nearest size, in proportion to the rows: as many epochs as there."""
    nearest = [s for s in ordered if s.rows == ordered[0].rows and s.cell.result.phases and not s.cell.timing]
    times = [s.cell.result.phases.train_s for s in nearest if s.cell.result.phases]
    if not times or takes_no_rows(ordered[0]):
        return None
    ratio, hardware = rows / ordered[0].rows, ordered[0].cell.result.hardware
    machine = hardware.get("gpu") or hardware.get("cpu") or "an unknown machine"
    mean = math.fsum(times) / len(times)
    return Expected(ratio * mean, ratio * min(times), ratio * max(times), f"measured at {ordered[0].rows:,} rows on {machine}, in proportion")


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
    chosen = min(alike, key=lambda c: (c.memory_bytes if c.memory_bytes is not None else math.inf, c.train_s.value if c.train_s else 0.0, -_value(c)))
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
    """Whether the test rows of the nearest size that both have tell them apart (tiers.py); without such answers, whether their intervals part."""
    here = {s.rows for s in one.evidence}
    shared = next((s.rows for s in best.evidence if s.rows in here), None)
    if shared is not None:
        runs = {c.technique: {s.seed: s.cell.right() for s in c.evidence if s.rows == shared} for c in (one, best)}
        fixed = [c.technique for c in (one, best) if c.nearest.cell.result.method == "none"]
        found = tiers.compare(runs, fixed)
        if found is not None and len(found.means) == 2:
            return found.between(best.technique, one.technique).told
    assert one.accuracy and best.accuracy
    return one.accuracy.high is not None and best.accuracy.low is not None and one.accuracy.high < best.accuracy.low
