"""Which of a search's trials is taken: the highest is high by luck, so the nearest to the technique's own settings of those within a standard error of it.

Library of pipeline/search/tuning.py and pipeline/racing/screen.py. Of several trials that are equally good the highest is the luckiest, and settings that
are taken for it are worse on other rows and other seeds than the technique's own (experiments/rates/choice.md). The one-standard-error rule (Breiman et
al. 1984, Classification and Regression Trees, section 3.4.3) takes the simplest model within a standard error of the best; here the simplest is what needs
no search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.records.results import rank_key
from pipeline.search.space import Space


def highest(trials: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The trial with the highest validation metric (ties: the lower loss of the right answers, then the earlier); None where none has one."""
    valued = [t for t in trials if t["validation"] is not None]
    return max(valued, key=lambda t: rank_key(t["validation"], t["nll"])) if valued else None


def standard_error(share: float, rows: int | None) -> float:
    """Of a mean over `rows` rows whose values lie between 0 and 1: √(share (1 − share) / rows), which is the binomial's, and the most that it can be of values
    between (Bhatia and Davis 2000). 0 where the rows are not known or the metric is no such mean."""
    return math.sqrt(share * (1 - share) / rows) if rows and 0 <= share <= 1 else 0.0


def taken(trials: Sequence[dict[str, Any]], space: Space, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of the trials within a standard error of the highest, the one whose `params` are nearest to the technique's own (ties: the higher); None where none has a
    validation metric.

    Args:
        trials: with validation, nll, validation_rows (may be missing) and params. own: the technique's own value of every key that is searched.
    """
    best = highest(trials)
    if best is None:
        return None
    least = best["validation"] - standard_error(best["validation"], best.get("validation_rows"))
    good = [t for t in trials if t["validation"] is not None and t["validation"] >= least - 1e-12]
    ranked = sorted(good, key=lambda t: rank_key(t["validation"], t["nll"]), reverse=True)
    return min(ranked, key=lambda t: round(space.distance(t["params"], own), 9))
