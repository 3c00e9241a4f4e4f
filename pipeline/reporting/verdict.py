"""The words of the verdict (pipeline/stats/verdict.py): the same sentences in the terminal, the report, advise, sweep and tune.

Library. A technique's name stands in backticks; the HTML page sets it in bold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.reporting import words as f
from pipeline.reporting.figures import Row, metric_name
from pipeline.stats import tiers
from pipeline.stats.verdict import WORTH, Option, Verdict, decide

MANY = 5
"""Names that are all said; of more, the first three."""
ONE_SEED = "One seed: this compares these weights, not the techniques; with another seed they may come in another order."


@dataclass(frozen=True)
class Saying:
    """What the words depend on besides the verdict."""

    metric: str = "accuracy"
    """In words."""
    rows: str = "test rows"
    """What it was compared on."""
    experiment: str = ""
    """Names the commands that come next; empty: they are not said."""


def saying_of(rows: Sequence[Row]) -> Saying:
    """The words' surroundings for rows of one experiment."""
    return Saying(metric_name(rows), experiment=rows[0].results[0].experiment)


def sentences(verdict: Verdict, saying: Saying = Saying()) -> list[str]:  # noqa: B008  (frozen)
    """The verdict: what lies below the untouched base first, then what to do, what it rests on and what would decide what is open."""
    if verdict.name is None or verdict.evidence is None:
        return ["Undecided: no two techniques have answers to the same rows, so nothing can be compared."]
    said = [below(verdict, saying), _lead(verdict, saying), *alike(verdict), further(verdict, saying)]
    said += [ONE_SEED] if not verdict.evidence.covers_seeds and len(verdict.options) > 1 and saying.rows == "test rows" else []
    return [text for text in said if text]


def alike(verdict: Verdict) -> list[str]:
    """Who is higher than the one that is taken, and who is not told apart from it."""
    return [text for text in (_higher(verdict), _tied(verdict)) if text]


def below(verdict: Verdict, saying: Saying) -> str:
    """Trained techniques below the untouched base, and what to do; empty where there is none."""
    base = verdict.base
    if not verdict.below_base or base is None:
        return ""
    some = [verdict.option(name) for name in verdict.below_base]
    shown = f.listed([f"`{one.name}` ({f.percent(one.value)}%)" for one in some[:MANY]] + ([f"{len(some) - MANY} more"] if len(some) > MANY else []))
    each = [f"python -m pipeline.tune experiments={saying.experiment} technique={one.name.split(' ')[0].partition('+')[0]}" for one in some[:1]]
    tune = f": {each[0]}" if saying.experiment else ", with pipeline.tune"
    return (f"{shown} {'lies' if len(some) == 1 else 'lie'} below the untouched base `{base.name}` ({f.percent(base.value)}%): with these settings training "
            f"did harm, which is no verdict on the technique. Tune {'it' if len(some) == 1 else 'them'} first{tune}.")


def _lead(verdict: Verdict, saying: Saying) -> str:
    assert verdict.name and verdict.evidence
    chosen, evidence = verdict.option(verdict.name), verdict.evidence
    level = f"{f.percent(chosen.value)}% {saying.metric}" + (f" on {evidence.rows:,} {saying.rows}" if evidence.rows else "")
    costs = [f"{f.duration(chosen.seconds)} of training"] if chosen.seconds else []
    costs += [f"{f.size(chosen.memory)} of memory"] if chosen.memory and chosen.trained else []
    cost = f" for {' and '.join(costs)}" if costs else ""
    if verdict.kind == "take":
        return f"Take `{chosen.name}`: {level}{cost}{_against(verdict)}."
    if verdict.kind == "undecided":
        return (f"Undecided: `{chosen.name}` leads ({level}{cost}){_against(verdict)}, which these data do not tell apart. "
                f"Until then keep the untouched base.")
    what = "the untouched base" if chosen.base else "which trains nothing"
    if not any(one.trained for one in verdict.options):
        base = ", the untouched base," if chosen.base else ""
        return f"Nothing was trained: `{chosen.name}`{base} reaches {level}{_against(verdict)}. Whether training is worth it, this does not say."
    higher = evidence.against is not None and verdict.option(evidence.against).trained
    return f"Do not train{'' if verdict.decided else ' yet'}: `{chosen.name}`, {what}, reaches {level}{_against(verdict) if higher else ''}."


def _against(verdict: Verdict) -> str:
    """, 12.0 points above `zero_shot` (95% interval 3.1 to 20.9, p = 0.004): the difference that the verdict rests on."""
    evidence = verdict.evidence
    if evidence is None or evidence.against is None or evidence.difference is None:
        return ""
    one = evidence.difference
    way = "above" if one.difference >= 0 else "below"
    if not evidence.rows:
        return f", {f.percent(abs(one.difference))} points {way} `{evidence.against}`{', told apart from it' * one.significant}"
    other = "the untouched base " if verdict.option(evidence.against).base else ""
    gap = f.percent(abs(one.difference))
    far = f"{gap} points {way}" if gap != "0.0" else "as high as"
    how = f"95% interval {f.points(one.low)} to {f.points(one.high)}, {f.p_value(one.corrected)}"
    return f", {far} {other}`{evidence.against}` ({how})"


def _higher(verdict: Verdict) -> str:
    """Where the cheapest of a tie is taken: who is higher, not confirmed."""
    evidence, chosen = verdict.evidence, verdict.option(str(verdict.name))
    top = next(one for one in verdict.options if one.name in (*verdict.tied, chosen.name))
    if not verdict.lowest or evidence is None or top.name in (chosen.name, evidence.against):
        return ""
    gap = f.percent(top.value - chosen.value)
    return f"It costs least of those that are as good: `{top.name}` is {gap} points higher, which these data do not tell apart."


def _tied(verdict: Verdict) -> str:
    names = [f"`{name}`" for name in verdict.tied if verdict.evidence and name != verdict.evidence.against]
    if not names:
        return ""
    who = f.listed(names) if len(names) <= MANY else f"{', '.join(names[:3])} and {len(names) - 3} others"
    return f"Not told apart from it: {who}."


def further(verdict: Verdict, saying: Saying = Saying()) -> str:  # noqa: B008
    """How many more rows or seeds would decide; empty where nothing is open."""
    evidence = verdict.evidence
    if evidence is None or evidence.open is None or evidence.gap is None:
        return ""
    rows = f"about {verdict.more_rows:,} more {saying.rows}" if verdict.more_rows else ""
    seeds = f"{verdict.more_seeds} more seed{'s' * (verdict.more_seeds > 1)}" if verdict.more_seeds and saying.rows == "test rows" else ""
    gap = f"a difference of {100 * evidence.gap:.3g} points between `{verdict.name}` and `{evidence.open}`"
    if not rows and not seeds:
        enough = verdict.enough and verdict.kind != "undecided" and abs(evidence.gap - WORTH) < 1e-9
        return f"These data would have shown {gap} in most cases." if enough else f"No reasonable number of rows or seeds would confirm {gap}."
    if not evidence.covers_seeds:
        also = f"{', and' if rows else ';'} {seeds} would tell whether it is the techniques' or the seed's" if seeds else ""
        return f"To confirm {gap}, {rows or f'{evidence.rows:,} {saying.rows} are enough'}{' would be needed' if rows else ''}{also}."
    return f"To confirm {gap}, {(' and ' if verdict.both else ' or ').join(filter(None, (rows, seeds)))} would be needed."


def of_search(trials: Sequence[tuple[str, float, float | None]], rows: int | None, metric: str, taken: str | None = None) -> str:
    """The verdict on the settings of a search, in sentences.

    Args:
        trials: (settings, validation metric, bytes at the peak where that is an objective) of those with a value; of equals the first is taken.
        rows: validation rows; None: not known, and nothing is tested.
        taken: the settings that were taken (pipeline/search/choice.py); None: the highest.
    """
    first: dict[str, Option] = {}
    for name, value, memory in trials:
        first.setdefault(name, Option(name, value, memory=memory))
    if not first or not rows:
        return ""
    verdict = decide(list(first.values()), tiers.by_shares({name: one.value for name, one in first.items()}, rows), slack=0.0)
    chosen, others = verdict.option(str(verdict.name)), len(first) - 1
    said = f"`{chosen.name}` is taken: {f.percent(chosen.value)}% {metric} on {rows:,} validation rows"
    more = further(verdict, Saying(metric, "validation rows"))
    if taken in first and taken != chosen.name:
        share, high = (f.percent(first[name].value) for name in (str(taken), chosen.name))
        return (f"`{taken}` is taken: {share}% {metric} on {rows:,} validation rows, of those within a standard error of the highest "
                f"(`{chosen.name}`, {high}%) the nearest to the technique's own settings. {more}").strip()
    if not others:
        return f"{said}, the only setting with a value."
    if not verdict.tied:
        return f"{said}, told apart from the other {others}."
    equal = any(one.value == chosen.value for one in first.values() if one is not chosen)
    why = "the first of the highest" if equal else "the highest"
    some = "none of the others is" if len(verdict.tied) == others else f"{len(verdict.tied)} of {others} others are not"
    return f"{said}, {why}, but {some} told apart from it. {more}".strip()
