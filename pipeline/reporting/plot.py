"""Axes for the report's charts, and labels that keep out of each other's way, which Vega-Lite has not.

Library of `python -m pipeline.report`. Coordinates are pixels of the drawing, y downwards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

DASHES = (None, "7 4", "2 4", "9 3 2 3")
"""Lines of a family share a colour and differ in the dashes."""
LETTER = 6.2  # pixels: a generous mean width of a letter at 11 px, so that labels have room in any system font
BESIDE = 16.0  # pixels: a label farther from its dot is no longer seen to be its own
LINE = 13.0  # pixels: height of a line of text at 11 px


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, linearly or by their logarithm. On a log axis `zero` is the pixel where the value 0 stands."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    zero: float | None = None

    def __call__(self, value: float) -> float:
        if self.log and value <= 0:
            return self.start if self.zero is None else self.zero
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, wanted: int = 4) -> list[float]:
        """Round values inside the axis, about as many as wanted (linear), without the zero of a log axis."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high, wanted)


def scale(values: Sequence[float], start: float, end: float, *, log: bool = False, floor: float | None = None, room: float = 0.06) -> Scale:
    """An axis that holds the values with some room at both ends.

    Args:
        log: wish for a logarithmic axis; granted where the positive values span a factor of 8 or more.
        floor: a linear axis starts here.
    """
    positive = [v for v in values if v > 0]
    if log and positive and max(positive) >= 8 * min(positive):
        zero = start if len(positive) < len(values) else None
        factor = (max(positive) / min(positive)) ** (2 * room)
        return Scale(min(positive) / factor, max(positive) * factor, start + (26 if zero is not None else 0), end, True, zero)
    low, high = min(values), max(values)
    margin = (high - low) * room or abs(high) * room or 1.0
    return Scale(low - margin if floor is None else floor, high + margin, start, end)


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
        if len(ticks) >= 3:
            break
    every = math.ceil(len(ticks) / 6)
    return ticks[::every]


@dataclass(frozen=True)
class Box:
    """A rectangle: left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom


def dashes(families: Sequence[str]) -> list[str | None]:
    """The dashes of each line, given its family."""
    return [DASHES[families[:number].count(family) % len(DASHES)] for number, family in enumerate(families)]


@dataclass(frozen=True)
class Label:
    """A placed label: the middle of its left edge."""

    x: float
    y: float
    width: float


def text_width(text: str) -> float:
    """Estimated pixels of a text at 11 px."""
    return LETTER * len(text)


def place_labels(points: Sequence[tuple[float, float, str]], obstacles: Sequence[Sequence[Box]], frame: Box) -> list[Label | None]:
    """A place for each label near its (x, y, text), inside the frame and clear of obstacles and of each other.

    Args:
        obstacles: from those never to be covered to those that a label may cover if there is no room elsewhere.

    Returns:
        In the order of the points; None for a label that fits nowhere.
    """
    near, far = (9, 14, 20), (28, 38, 50, 64)
    tries = [(rings, count) for count in range(len(obstacles), 0, -1) for rings in (near, far)]
    tries.sort(key=lambda t: (t[1] < len(obstacles) - 1, t[0] is far))
    placed: list[Box] = []
    labels: dict[int, Label | None] = {}
    crowded = sorted(range(len(points)), key=lambda i: -sum(math.dist(points[i][:2], p[:2]) < 60 for p in points))
    for index in crowded:
        x, y, text = points[index]
        places = (_place(x, y, text_width(text), rings, [*placed, *itertools.chain(*obstacles[:count])], frame) for rings, count in tries)
        label = labels[index] = next(filter(None, places), None)
        if label:
            placed.append(_box(label))
    return [labels[i] for i in range(len(points))]


def leader(dot: tuple[float, float], label: Label) -> tuple[float, float] | None:
    """Where a line from a dot to its label ends: the nearest place of the label, or None where the label stands beside the dot."""
    box = _box(label)
    end = (min(max(dot[0], box.left), box.right), min(max(dot[1], box.top), box.bottom))
    return end if math.dist(dot, end) > BESIDE else None


def stacked(levels: Sequence[float], gap: float) -> list[float]:
    """The levels moved as little as it takes for any two to be `gap` apart, in the same order."""
    order = sorted(range(len(levels)), key=lambda i: levels[i])
    moved = list(levels)
    for _ in range(200):
        close = [(a, b) for a, b in itertools.pairwise(order) if moved[b] - moved[a] < gap - 1e-6]
        for a, b in close:
            push = (gap - (moved[b] - moved[a])) / 2
            moved[a], moved[b] = moved[a] - push, moved[b] + push
        if not close:
            break
    return moved


def _place(x: float, y: float, width: float, rings: Sequence[int], obstacles: Sequence[Box], frame: Box) -> Label | None:
    for distance in rings:
        for turn in (0, 8, 1, 15, 7, 9, 4, 12, 2, 14, 6, 10, 3, 13, 5, 11):
            angle = turn * math.pi / 8
            anchor_x, anchor_y = x + distance * math.cos(angle), y - distance * math.sin(angle)
            left = anchor_x - width * (1 - math.cos(angle)) / 2
            label = Label(left, anchor_y, width)
            box = _box(label)
            inside = frame.left <= box.left and box.right <= frame.right and frame.top <= box.top and box.bottom <= frame.bottom
            if inside and not any(box.overlaps(o) for o in obstacles):
                return label
    return None


def _box(label: Label) -> Box:
    return Box(label.x, label.y - LINE / 2, label.x + label.width, label.y + LINE / 2)
