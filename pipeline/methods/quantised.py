"""Linear layers rounded to 8 or 4 bits after training, through bitsandbytes. conf/method/quantised_int8.yaml, quantised_nf4.yaml.

Of an untouched base, precision=int8 or nf4 says the same (technique=zero_shot_int8, zero_shot_nf4); this method rounds what another cell left
(start=<cell>) and stores it rounded.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.core.settings import Precision, build
from pipeline.methods.base import QUANTISED, Method
from pipeline.models.base import from_quantised, quiet


@dataclass(frozen=True)
class Quantised(Method):
    """The whole model in LLM.int8() (Dettmers et al., 2022) or NF4 (Dettmers et al., 2023); the output layer and embeddings stay as they are.

    Raises:
        UserError: an unknown kind, or weights that are quantised already.
    """

    kind: str
    double_quantisation: bool = True
    """nf4: the block scales in 8 bits too."""

    def __post_init__(self) -> None:
        if self.kind not in QUANTISED:
            raise UserError(f"method.kind is {self.kind!r}; choose int8 or nf4")

    @property
    def name(self) -> str:
        return f"quantised_{self.kind}"

    def check(self, precision: str) -> None:
        if precision in QUANTISED:
            raise UserError(f"{self.name} rounds plain weights, and the base is {precision} already; choose precision=auto, fp32 or bf16")

    def hyperparameters(self) -> dict[str, Any]:
        return {"bits": 8 if self.kind == "int8" else 4}

    def wrap(self, model: Any) -> Any:
        """The rounded model; the plain one's weights are let go."""
        with tempfile.TemporaryDirectory() as folder:
            with quiet():
                model.save_pretrained(folder)
            device, dtype, where = model.device, model.dtype, model.config._name_or_path
            for parameter in model.parameters():
                parameter.data = parameter.data.new_empty(0)
            settings = build(Precision, {"name": self.kind, "double_quantisation": self.double_quantisation}, "precision")
            made = from_quantised(Path(folder), settings, dtype, device)
        made.config._name_or_path = where
        return made

    def save(self, model: Any, state: Any, folder: Path) -> None:
        with quiet():
            model.save_pretrained(folder)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        return from_quantised(folder, None, base.dtype, base.device), None
