"""Macro-F1 as a local `evaluate` module: the mean over classes of each class's F1 (scikit-learn)."""

import datasets
import evaluate
from sklearn.metrics import f1_score


class MacroF1(evaluate.Metric):
    """compute(predictions, references: lists of class ids, labels: number of classes) -> {"macro_f1": in [0, 1]}.

    A class that is neither in the references nor predicted counts as 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions: list, references: list, labels: int) -> dict:
        return {"macro_f1": float(f1_score(references, predictions, labels=list(range(labels)), average="macro", zero_division=0))}
