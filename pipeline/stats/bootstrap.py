"""What a metric would be on other rows of the same kind: the rows drawn again, many times, with replacement (Efron 1979).

Library of tiers.py and of a score's interval. Every metric is a function of single rows' values, so that two techniques are compared on the same draws.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
AT_ONCE = 250
"""Draws that are held in memory at once."""
Statistic = Callable[[Any, Any], Any]
"""(values [n] of one run, how often each row was drawn [R, n]) -> the metric [R]."""


def mean(values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The metric that is a mean over rows: accuracy, ROUGE-L, token F1."""
    counted: np.ndarray = drawn @ values / drawn.sum(1)
    return counted


def macro_f1(labels: int) -> Statistic:
    """The mean of so many classes' F1; one that is neither an answer nor a prediction counts as 0. Values are those of `class_value`."""
    import numpy as np

    def of(values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        truth, predicted = (part[:, None] == np.arange(labels) for part in np.divmod(values.astype(int), labels + 1))
        either = drawn @ (truth.astype(float) + predicted)
        by_class: np.ndarray = 2 * (drawn @ (truth & predicted).astype(float)) / np.maximum(either, 1e-12)
        return by_class.mean(1)

    return of


def class_value(truth: int, predicted: int | None, labels: int) -> float:
    """A row's value under macro_f1(labels), from the numbers of its classes; None: no answer."""
    return float(truth * (labels + 1) + (labels if predicted is None else predicted))


def resampled(values: np.ndarray, statistic: Statistic) -> np.ndarray:
    """[S, 1 + RESAMPLES]: the metric of every run of values [S, n], on the rows as they are and on every draw, the same draws for all calls."""
    import numpy as np

    drawn = _draws(values.shape[1])
    parts = [np.stack([statistic(run, drawn[at : at + AT_ONCE].astype(float)) for run in values]) for at in range(0, len(drawn), AT_ONCE)]
    return np.concatenate(parts, axis=1)


def interval(values: np.ndarray, statistic: Statistic) -> tuple[float, float]:
    """The 95% percentile interval of one run's metric, from values [n]."""
    import numpy as np

    low, high = np.percentile(resampled(values[None], statistic)[0, 1:], [2.5, 97.5])
    return float(low), float(high)


@functools.lru_cache(maxsize=2)
def _draws(rows: int) -> np.ndarray:
    """[1 + RESAMPLES, n] how often each row was drawn; first, every row once."""
    import numpy as np

    rng = np.random.default_rng(0)
    drawn = rng.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    return np.vstack([np.ones(rows, dtype=int), drawn]).astype(np.uint8 if drawn.max() < 256 else np.int32)
