"""How the report writes numbers. What was not measured is an em dash, never a zero."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

DASH = "—"
MINUS = "−"


def percent(share: float | None) -> str:
    """A fraction as percent, one decimal, no sign: 86.0."""
    return DASH if share is None else f"{100 * share:.1f}"


def points(difference: float | None) -> str:
    """A difference of fractions in percentage points, signed: +8.0."""
    return DASH if difference is None else signed(100 * difference)


def signed(value: float) -> str:
    """One decimal with its sign; a true minus, and no sign on a rounded zero."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def growth(fraction: float | None) -> str:
    """A change in percent; from ten times as much on how many times as much: +8.0%, −2.1%, ×53, ×4,952."""
    if fraction is None:
        return DASH
    return f"{signed(100 * fraction)}%" if fraction < 9 else f"×{times(1 + fraction)}"


def seconds(value: float | None) -> str:
    """Seconds to two or three digits: < 0.01, 0.42, 4.2, 61, 1,234; a true zero is 0."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    if value < 0.005:
        return "< 0.01"
    return f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def duration(value: float | None) -> str:
    """Seconds in words fit for a sentence: 4.2 s, 61 s, 12 min, 3.4 h."""
    if value is None:
        return DASH
    return f"{seconds(value)} s" if value < 600 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def milliseconds(value: float | None) -> str:
    """Seconds as milliseconds: 4.9, 310."""
    return DASH if value is None else f"{1000 * value:.1f}" if value < 0.01 else f"{1000 * value:,.0f}"


def size(value: float | None) -> str:
    """Bytes to three digits in a binary unit: 876 MiB, 1.21 GiB."""
    if value is None:
        return DASH
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000 or unit == "GiB":
            break
        value /= 1024
    return f"{_three(value)} {unit}" if value else "0"


def count(value: float | None) -> str:
    """A number of things to three digits: 2,048, 2.44 M, 135 M, 1.24 B."""
    if value is None:
        return DASH
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e5)):
        if value >= factor:
            return f"{_three(value / (1e3 if unit == 'k' else factor))} {unit}"
    return f"{value:,.0f}"


def rate(value: float) -> str:
    """A number in a second to three digits or more: 4.21, 61.4, 1,165."""
    return _three(value)


def share(fraction: float | None) -> str:
    """A small part of a whole: 0.0086%, 1.8%, 13%, 100%; empty for none of it."""
    return "" if not fraction else f"{100 * fraction:.0f}%" if fraction >= 0.1 else f"{100 * fraction:.2g}%"


def times(ratio: float) -> str:
    """How many times as much: 1.7, 54, 11,677."""
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:,.0f}"


def p_value(p: float | None) -> str:
    """p = 0.004, p < 0.001; empty if there is none."""
    return "" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def span(low: float | None, high: float | None) -> str:
    """Two fractions as a range in percent, once if they are alike; empty if unknown."""
    if low is None or high is None:
        return ""
    return percent(low) if percent(low) == percent(high) else f"{percent(low)}–{percent(high)}"


def listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def anchor(name: str) -> str:
    """The id of a row's (or of a technique's first) cells on the page."""
    return "cells-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def hyperparameter(value: Any) -> str:
    """A setting's value as one writes it in a config."""
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _three(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 or value == int(value) else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
