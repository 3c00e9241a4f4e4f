"""What other tasks tell of one that nothing was measured on.

Library of advice.py.

A task is one draw among tasks. Of k tasks with a technique's expected accuracies x, a new task's lies in mean(x) ± t(k-1) · sqrt(s² (1 + 1/k) + r²) in
95 of 100 cases: the textbook prediction interval for a new observation from a normal sample (s the standard deviation of x, so the spread between tasks),
with the spread r of a run over seeds added. It supposes that the task asked for is drawn as those measured were. One task has no interval: nothing is
known of how tasks differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pipeline.advice_evidence import Expected, Spread, bounded


def other_task(told: Mapping[str, float], spread: Spread) -> Expected:
    """A new task's accuracy from those expected on others; without an interval from one alone."""
    count, mean = len(told), math.fsum(told.values()) / len(told)
    if count == 1:
        return Expected(mean, None, None, f"that of {next(iter(told))}; one task does not tell how far another lies from it")
    half = _t(count - 1) * math.sqrt(_variance(list(told.values())) * (1 + 1 / count) + spread.sd**2)
    return Expected(mean, *bounded(mean, half), f"from {count} other tasks, with the spread between tasks")


def paired_apart(best: Mapping[str, float], one: Mapping[str, float]) -> bool:
    """Whether the tasks that both were measured on tell them apart: a paired t test at 5%. One task tells nothing."""
    gaps = [best[task] - one[task] for task in best if task in one]
    return len(gaps) > 1 and abs(math.fsum(gaps) / len(gaps)) > _t(len(gaps) - 1) * math.sqrt(_variance(gaps) / len(gaps))


def _variance(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)


def _t(df: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, df))
