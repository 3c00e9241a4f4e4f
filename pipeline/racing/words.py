"""What a race says: the statement with its error, what is open and what it would take, who left and why; for the terminal, race.md and the page alike.

Library of `python -m pipeline.race`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.racing.drive import Driver
from pipeline.racing.entrants import Entrant
from pipeline.racing.policy import Open
from pipeline.stats import betting

ERRORS = (0.2, 0.1, 0.05, 0.02, 0.01)
WITHINS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
"""That the price of more certainty is told for: chances of error, points."""


@dataclass(frozen=True)
class Line:
    name: str
    rank: int
    level: float | None
    seeds: int
    collapsed: str
    hours: float
    state: str


@dataclass(frozen=True)
class Told:
    """All that page, race.md and terminal show."""

    statement: str
    kind: str
    """named, open or none."""
    chosen: str | None
    notes: list[str]
    lines: list[Line]
    spent_h: float
    budget_h: float
    more_h: float | None
    by_error: list[tuple[float, float | None]]
    """(chance of error, hours beyond those spent, None: no number of seeds)."""
    by_within: list[tuple[float, float | None]]
    without_model: list[str]


def told(driver: Driver, out: Sequence[Entrant], metric: str) -> Told:
    """Of a race that ended. out: the techniques that were left out before it began."""
    race, asked = driver.race, driver.asked
    named, alive = race.named, race.alive
    tried = [k for k in alive if race.answers.runs[k]]
    name = None if named is None else race.arms[named].name
    more = 0.0 if named is not None else race.more_hours()
    statement = _named(driver, name, metric) if name is not None else _undecided(driver, tried, more, metric)
    kind = "named" if name is not None else "open" if tried else "none"
    return Told(
        statement, kind, name, _notes(driver, out), _lines(driver, out), driver.journal.spent_s / 3600, asked.budget_s / 3600, more,
        [(error, race.more_hours(error=error)) for error in ERRORS] if len(tried) > 1 else [],
        [(within, race.more_hours(within=within / 100)) for within in WITHINS] if len(tried) > 1 else [],
        without_model(driver, named if named is not None else next(iter(tried), None)),
    )


def _population(driver: Driver) -> str:
    return f"these {driver.asked.rows:,} test rows" if driver.asked.these else f"new rows of the kind of these {driver.asked.rows:,} test rows"


def _named(driver: Driver, name: str, metric: str) -> str:
    asked = driver.asked
    others = len(driver.race.arms) - len(driver.race.refused)
    return (f"`{name}` is within {_points(asked.within)} of the best of {others} techniques ({metric}, expected over seeds, on {_population(driver)}); "
            f"this is wrong with probability at most {asked.error:g}, if seeds spread about as a normal distribution does.")


def _undecided(driver: Driver, tried: Sequence[int], more: float | None, metric: str) -> str:
    race, asked = driver.race, driver.asked
    if not tried:
        return "Undecided: no technique gave a result."
    names = [race.arms[k].name for k in race.alive]
    could = ", ".join(f"`{name}`" for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    told = (f"Undecided: {could} could still be the best of {len(race.arms) - len(race.refused)} techniques ({metric}, on {_population(driver)}); the best "
            f"is among "
            f"them with probability at least {1 - asked.error:g}. {_cheapest(driver, tried)}")
    if more is None:
        return f"{told} No number of seeds up to {asked.looks[-1]} would decide it: {_rows(driver)}"
    return f"{told} About {more:.2g} more hours would be needed."


def _cheapest(driver: Driver, tried: Sequence[int]) -> str:
    """Which of the techniques costs least to train, and to serve where that was measured."""
    race = driver.race
    train = race.arms[min(tried, key=lambda k: (race.arms[k].cost[:1], race.price(k)))].name
    served = {race.arms[k].name: seen for k in tried if (seen := next((e.served_bytes for e in driver.used[race.arms[k].name] if e.served_bytes), None))}
    serve = f", to serve `{min(served, key=lambda name: served[name])}` ({min(served.values()) / 2**30:.2g} GiB)" if served else ""
    most = race.arms[tried[0] if race.favourite is None else race.favourite].name
    return f"Of them the cheapest to train is `{train}`{serve}; most is expected of `{most}`."


def _rows(driver: Driver) -> str:
    race, asked = driver.race, driver.asked
    waiting = [one for one in race.open() if one.needed is None]
    if asked.these or not waiting:
        return f"take a larger within than {_points(asked.within)}."
    most = max(_rows_needed(driver, one) for one in waiting)
    return f"about {most:,} test rows would be needed instead of {asked.rows:,}, or a larger within than {_points(asked.within)}."


def _rows_needed(driver: Driver, one: Open) -> int:
    """Test rows with which the pair would be decided after the most seeds, if the difference stays as it was seen."""
    from pipeline.stats.looking import critical

    race = driver.race
    leader = next(k for k in race.alive if race.answers.runs[k])
    gap = race.answers.gap(leader, [one.arm], one.seeds)
    z = float(critical(race.rules.error * float(race.weights[leader]), np.ones(1), race.rules.looks)[0])
    spare = ((float(gap.point[0]) + race.rules.within) / z) ** 2 - float(gap.by_seed[0]) / race.rules.most
    if float(gap.point[0]) + race.rules.within <= 0 or spare <= 0:  # seen farther behind than within, or seeds alone are too wide: for equals then
        spare = (race.rules.within / z) ** 2
    wanted = float(gap.common[0]) * race.rows / spare
    unit = 10 ** max(0, int(np.log10(wanted)) - 1)
    return int(np.ceil(wanted / unit) * unit)


def _notes(driver: Driver, out: Sequence[Entrant]) -> list[str]:
    race, notes = driver.race, []
    if driver.ended:
        notes.append(f"The race was ended by its budget: {driver.ended}.")
    for arm in sorted(race.refused):
        name = race.arms[arm].name
        last = driver.used[name][-1] if driver.used[name] else None
        notes.append(f"`{name}` gave no usable result ({last.status if last else 'none'}), and no statement covers it.")
    for name, (bad, every) in ((arm.name, driver.collapsed(arm.name)) for arm in race.arms):
        if bad:
            notes.append(f"`{name}`: {bad} of {every} trainings collapsed (validation more than {100 * (driver.asked.collapse or 0):g} points below its "
                         f"screening, or "
                         "not finite) and were begun anew; its figure is that of trainings that did not.")
    if out:
        notes.append("Left out before the race, and covered by no statement: " + "; ".join(f"`{e.name}` {e.reason}" for e in out) + ".")
    unscreened = [one.technique for one in driver.screened.values() if one.validation is None and one.reason != "it trains nothing"]
    if unscreened:
        notes.append(f"Not screened, and run with their own settings: {', '.join(unscreened)}.")
    return notes


def _lines(driver: Driver, out: Sequence[Entrant]) -> list[Line]:
    race = driver.race
    named = race.named
    order = [*race.alive, *sorted(race.left, key=lambda k: -race.answers.level(k)), *sorted(race.refused)]
    lines = []
    for k in order:
        arm, runs = race.arms[k], race.answers.runs[k]
        bad, every = driver.collapsed(arm.name)
        lines.append(Line(arm.name, arm.rank, race.answers.level(k) if runs else None, len(runs), f"{bad} of {every}" if bad else "",
                          sum(race.seconds[k]) / 3600, _state(driver, k, named)))
    return [*lines, *(Line(e.name, 0, None, 0, "", 0.0, f"left out: {e.reason}") for e in out)]


def _state(driver: Driver, arm: int, named: int | None) -> str:
    race = driver.race
    if arm == named:
        return "named"
    if arm in race.refused:
        return "no usable result"
    if arm in race.left:
        one = race.left[arm]
        return (f"left at {one.spent_s / 3600:.2g} h, told apart by {one.seeds} seed{'s' if one.seeds > 1 else ''}: {100 * one.difference:.1f} points below "
                f"{race.arms[one.by].name}")
    if named is not None and (named, arm) in race.cleared:
        return f"not more than {100 * race.rules.within:g} points better than {race.arms[named].name}"
    return "could be the best" if race.answers.runs[arm] else "not run: the budget did not hold it"


def without_model(driver: Driver, arm: int | None) -> list[str]:
    """What the confidence sequence says, which assumes nothing of how seeds spread, on these test rows: the arm against the others of most weight."""
    race = driver.race
    if arm is None:
        return []
    share = race.rules.error * float(race.weights[arm])
    bounds = {}
    for k in range(len(race.arms)):
        if k != arm and k not in race.refused and race.answers.runs[k]:
            bounds[k] = betting.lower(race.answers.by_seed(arm, k), share)
    if not bounds:
        return []
    shown = [k for k, low in bounds.items() if low >= -race.rules.within]
    nearest = max((k for k in bounds if k not in shown), key=race.answers.level, default=None)
    verdict = f"it shows the same of all {len(bounds)} others"
    if nearest is not None:
        differences = race.answers.by_seed(arm, nearest)
        spread = max(0.005, float(differences.std(ddof=1))) if len(differences) > 1 else 0.02
        needed = betting.seeds_for(float(differences.mean()) + race.rules.within, spread, share)
        more = f"about {needed:,} seeds of both would be needed" if needed is not None else "what was seen would not show it with any number of seeds"
        verdict = (f"it shows of {len(shown)} of {len(bounds)} others that they are not more than {_points(race.rules.within)} better; after "
                   f"{len(differences)} seeds `{race.arms[nearest].name}` may still be up to {-100 * bounds[nearest]:.0f} points better, {more}")
    return ["Without any model of how seeds spread (a betting confidence sequence over the seeds' differences, on these test rows alone, with the same error), "
            f"for `{race.arms[arm].name}`: {verdict}."]


def _points(fraction: float) -> str:
    return f"{100 * fraction:g} point{'' if fraction == 0.01 else 's'}"


def markdown(experiment: str, one: Told) -> str:
    lines = [f"# The race of {experiment}", "", f"**{one.statement.replace('`', '')}**", "",
             f"{one.spent_h:.3g} of {one.budget_h:g} hours were spent.", ""]
    lines += [f"- {note.replace('`', '')}" for note in [*one.without_model, *one.notes]]
    lines += ["", "| technique | rank in screening | metric, % | seeds | collapsed | hours | |", "| --- | --: | --: | --: | --: | --: | --- |"]
    for line in one.lines:
        level = "—" if line.level is None else f"{100 * line.level:.1f}"
        lines.append(f"| {line.name} | {line.rank or '—'} | {level} | {line.seeds} | {line.collapsed} | {line.hours:.3g} | {line.state} |")
    for title, rows in (("error at most", [(f"{e:g}", h) for e, h in one.by_error]), ("within, points", [(f"{w:g}", h) for w, h in one.by_within])):
        if rows:
            lines += ["", "What more certainty would cost, hours beyond those spent (as far as what was seen tells; —: no number of seeds would do):", "",
                      f"| {title} | {' | '.join(key for key, _ in rows)} |", "| --- |" + " --: |" * len(rows),
                      f"| hours | {' | '.join('—' if hours is None else f'{hours:.2g}' for _, hours in rows)} |"]
    return "\n".join(lines) + "\n"
