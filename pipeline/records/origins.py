"""What a cell is made of besides its rows: other cells, a teacher, synthetic rows, a search; and what a reward model is worth. Library of results.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Before:
    """A finished cell that this one begins at or is rewarded by. What it cost is no part of this cell's own times."""

    part: str
    """What it is here, or to the one of them that it belongs to: start, reward."""
    seconds: float | None
    """Of its warm-up and training; null: not known."""
    other_rows: int = 0
    """Labelled rows that it used and this cell does not have itself; a pair of a file is one."""


@dataclass(frozen=True)
class PairScore:
    """How a reward model ranks held-out pairs: the right answer of a row and a wrong one."""

    pairs: int
    rows: int
    accuracy: float
    """Mean over rows of the share of wrong answers that get less than the right one; an equal reward is half. Chance is 0.5."""
    p_value: float
    """Chance of at least that accuracy from rewards that know nothing: the right answer's rank is then uniform (normal approximation over the rows)."""
    calibration_error: float
    """Expected calibration error: how far sigma(difference of rewards), the claimed chance that the higher one is right, is from the share that is."""


@dataclass(frozen=True)
class Teacher:
    """Where the rationales came from: seconds count as complexity, rows as data."""

    name: str
    rows: int
    accuracy: float | None
    seconds: float | None


@dataclass(frozen=True)
class Synthetic:
    """Rows that a teacher wrote (pipeline.synthesize), trained on beside the labelled ones; `train_rows` does not count them."""

    name: str
    """conf/synthetic/<name>.yaml."""
    rows: int
    share: float
    """Of the training rows, as asked for."""
    teacher: str
    """Who wrote them."""
    seconds: float | None
    """That writing, and judging, the whole set took; it may hold more rows than were trained on."""
    examples: int = 0
    """Labelled examples that it was written from and that are no training rows: a taxonomy's. They count as labelled rows."""


@dataclass(frozen=True)
class Tuning:
    """The search (pipeline.tune) that a tuned cell's settings come from."""

    file: str
    """Where it stands: tuning/<experiment>/<technique>-n<train_rows>.yaml."""
    searched: int
    """Hyperparameters that were searched."""
    trials: int
    device_s: float
    """Wall clock of the trials."""
    validation: float
    """The taken trial's metric on the validation rows."""
    seed: int
    """Whose training rows the trials saw."""
