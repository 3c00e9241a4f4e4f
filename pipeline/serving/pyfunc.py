"""A finished cell as a model of MLflow's pyfunc flavour, which records/mlflow.py logs: loaded by name, without MLflow's help.

    mlflow.pyfunc.load_model("models:/<id>").predict([{"prompt": "Review: a fine film\\nSentiment:"}])

in the project's folder, where the base model is under models/. A row is a prompt as the cell's task has it, or `messages`; `choices` where every row brings
its own. Answers come in the rows' order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.compose import compose
from pipeline.records.finished import cell_config, finished
from pipeline.serving.artefact import Artefact, Base, spoken, with_choices


class Served:
    """Answers with an artefact on its base, loaded once."""

    def __init__(self, folder: Path) -> None:
        result = finished(folder)
        self.artefact = Artefact.at(result.cell, folder / "artefact", cell_config(result, compose()))
        base = Base.of(self.artefact.cfg)
        self.scorer = self.artefact.scorer(base, *self.artefact.load(base))

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> list[str | None]:
        """The answers. data: a data frame, or a list of rows or of texts. Raises UserError for a row that cannot be answered."""
        rows = data.to_dict("records") if hasattr(data, "to_dict") else [{"prompt": row} if isinstance(row, str) else row for row in data]
        asked = [with_choices(n, spoken(n, {**row, "adapter": self.artefact.name}), self.artefact) for n, row in enumerate(rows, 1)]
        return [one["prediction"] for one in self.scorer.predict([{"choices": None, **row, "id": n, "answer": ""} for n, row in enumerate(asked)])]


def _load_pyfunc(path: str) -> Served:
    """What MLflow calls with the folder of the model's data: result.json and artefact/ of the cell."""
    return Served(Path(path))
