"""What `python -m pipeline.tune` searches: a technique's declared space, its best value at an edge, and the part that is then added.

Library. conf/search/<name>.yaml is what a technique's YAML chooses; a technique may also write `search:` itself. An entry is
{choices: [...]}, {low: ..., high: ..., log: ..., step: ...}, {factor: 10} (from a tenth to ten times the technique's own value), or
{times: 2, of: <key>} for what follows another one; least and most are bounds that a widened range keeps to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.config import plain
from pipeline.files import UserError
from pipeline.names import class_of
from pipeline.tuned import Edge

OUTER = 0.25
"""A value in the outer quarter of its range, on its own scale, is at the edge if no trial was further out."""
LIMITS = ("least", "most")


@dataclass(frozen=True)
class Space:
    """Ranges and links, as sweep.space and sweep.link have them (pipeline/sweep_space.py), and how far a range may be widened."""

    ranges: dict[str, dict[str, Any]]
    links: dict[str, dict[str, Any]]
    limits: dict[str, dict[str, Any]]


def read(cfg: DictConfig) -> Space:
    """The space of a technique; without ranges where there is nothing to search. A method that trains nothing has no learning rate.

    Raises:
        UserError: an entry of another form, or a factor of what is not a positive number.
    """
    ranges, links, limits = {}, {}, {}
    for key, given in (plain(cfg).get("search") or {}).items():
        where = f"search of {cfg.technique.name}: {key!r}"
        if not isinstance(given, dict) or not given:
            raise UserError(f"{where} is {given!r}; write {{choices: [...]}}, {{low: ..., high: ...}}, {{factor: ...}} or {{times: ..., of: ...}}")
        if key.startswith("train.") and not trains(cfg):
            continue
        if "times" in given:
            links[key] = given
        else:
            limits[key] = {name: given.pop(name) for name in LIMITS if name in given}
            if len(given) > 1:
                given.pop("factor", None)  # of the default that a range of the technique's own stands over
            ranges[key] = _around(where, given["factor"], OmegaConf.select(cfg, key)) if set(given) == {"factor"} else given
    return Space(ranges, links, limits)


def trains(cfg: DictConfig) -> bool:
    """Whether the technique has anything to train, told without importing what it trains with."""
    return bool(class_of(plain(cfg)["method"], "method").trains)


def _around(where: str, factor: Any, value: Any) -> dict[str, Any]:
    numbers = [isinstance(n, int | float) and not isinstance(n, bool) for n in (factor, value)]
    if not all(numbers) or factor <= 1 or value <= 0:
        raise UserError(f"{where} has factor {factor!r} of {value!r}; write a factor above 1 of a number above 0, or low and high")
    return {"low": float(f"{value / factor:.6g}"), "high": float(f"{value * factor:.6g}"), "log": True}


def widened(space: Space, best: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> tuple[Space, list[Edge]]:
    """The space with every range whose best value is at its edge replaced by the part from there on and beyond, and those edges.

    Args:
        best: the best trial's values by key. tried: every trial's.
    """
    sides = {key: edge_of(given, best[key], [t[key] for t in tried]) for key, given in space.ranges.items()}
    edges = [_widen(key, space.ranges[key], best[key], side, space.limits[key]) for key, side in sides.items() if side]
    added = {edge.key: edge.widened for edge in edges if edge.widened}
    return Space({key: added.get(key, given) for key, given in space.ranges.items()}, space.links, space.limits), edges


def edge_of(given: Mapping[str, Any], value: Any, tried: Sequence[Any]) -> str | None:
    """low or high: the first or last of choices, or in the outer quarter of a range with no trial further out. None: inside, or without order."""
    if "choices" in given:
        ordered = sorted(given["choices"]) if _numbers(given["choices"]) else []
        return None if len(ordered) < 2 or value not in (ordered[0], ordered[-1]) else "low" if value == ordered[0] else "high"
    scale = math.log if given.get("log") else float
    low, high = scale(given["low"]), scale(given["high"])
    if low == high:
        return None
    place = (scale(value) - low) / (high - low)
    if place <= OUTER and value <= min(tried):
        return "low"
    return "high" if place >= 1 - OUTER and value >= max(tried) else None


def _numbers(values: Any) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _widen(key: str, given: Mapping[str, Any], value: Any, side: str, limits: Mapping[str, Any]) -> Edge:
    least, most = limits.get("least", -math.inf), limits.get("most", math.inf)
    whole = all(isinstance(v, int) for v in given.get("choices", [given.get("low"), given.get("high")]))
    positive = min(given["choices"]) > 0 if "choices" in given else given["low"] >= 0
    if positive:
        least = max(least, 1 if whole else 0)
    added = _further_choices(given["choices"], side, least, most) if "choices" in given else _further_range(given, value, side, least, most, whole)
    return Edge(key, value, side, added)


def _further_choices(choices: Any, side: str, least: float, most: float) -> dict[str, Any] | None:
    """Half as many choices again, by the same ratio or the same step; None where there is neither, or no room."""
    ordered = sorted(choices, reverse=side == "low")
    pairs = list(itertools.pairwise(ordered))
    ratios = {round(b / a, 9) for a, b in pairs} if 0 not in ordered else set()
    steps = {round(b - a, 9) for a, b in pairs}
    if len(ratios) != 1 and len(steps) != 1:
        return None
    found, last = [], ordered[-1]
    for _ in range(max(1, len(ordered) // 2)):
        last = last * ratios.copy().pop() if len(ratios) == 1 else last + steps.copy().pop()
        whole = all(isinstance(c, int) for c in choices)
        if not least <= last <= most or whole and last != round(last):
            break
        found.append(round(last) if whole else float(f"{last:.6g}"))
    return {"choices": found} if found else None


def _further_range(given: Mapping[str, Any], value: Any, side: str, least: float, most: float, whole: bool) -> dict[str, Any] | None:
    """From the best value to half of the range's width, on its own scale, beyond its end; None where there is no room beyond."""
    low, high, log = given["low"], given["high"], given.get("log", False)
    reach = math.sqrt(high / low) if log else (high - low) / 2
    if side == "high":
        start, end = value, min(most, high * reach if log else high + reach)
    else:
        start, end = max(least, low / reach if log else low - reach), value
    start, end = (math.ceil(start), math.floor(end)) if whole else (float(f"{start:.6g}"), float(f"{end:.6g}"))
    if (end <= high if side == "high" else start >= low) or log and start <= 0:
        return None
    return {**given, "low": start, "high": end}
