"""Accuracy as a local `evaluate` module: the share of predictions equal to the reference (scikit-learn)."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score


class Accuracy(evaluate.Metric):
    """compute(predictions, references: lists of class ids) -> {"accuracy": in [0, 1]}."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions: list, references: list) -> dict:
        return {"accuracy": float(accuracy_score(references, predictions))}
