"""How well one set of rows was answered, as a result keeps it. Library of results.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """How well one set of rows was answered. Fractions in [0, 1]; accuracy's interval is Wilson's at 95%."""

    rows: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    macro_f1: float | None = None
    rouge_l: float | None = None
    exact_match: float | None = None
    numeric: float | None = None
    token_f1: float | None = None
    custom: float | None = None
    """Of the user's own function (task.metric=module:function)."""
    nll: float | None = None
    """Mean negative log-likelihood of the right answer, nats per row (choice scoring only)."""
    unanswered: int = 0
    """Rows from whose output no answer could be extracted (generate scoring only)."""
    metric_low: float | None = None
    """Of a headline metric other than accuracy, the 95% interval over the rows (bootstrap); null: accuracy, or written before it was measured."""
    metric_high: float | None = None

    def interval(self, metric: str) -> tuple[float, float] | None:
        """The 95% interval of the headline metric; None where it was not measured. A metric that these rows cannot have is read as accuracy."""
        if metric in ("accuracy", "exact_match", "numeric") or getattr(self, metric) is None:  # shares of the rows that are right
            return self.accuracy_low, self.accuracy_high
        return None if self.metric_low is None or self.metric_high is None else (self.metric_low, self.metric_high)


NOT_METRICS = ("rows", "accuracy_low", "accuracy_high", "nll", "unanswered", "metric_low", "metric_high")
"""Fields of Score that are no headline metric."""
