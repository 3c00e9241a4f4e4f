"""Full fine-tuning: every parameter of the base is trained. conf/method/full.yaml, from_scratch.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.methods.base import QUANTISED, Method
from pipeline.models.base import cast


@dataclass(frozen=True)
class Full(Method):
    """All weights, in fp32 while training; the arithmetic runs in the cell's compute dtype (autocast).

    What is saved and evaluated has the base's dtype again.
    """

    trains = True
    changes_when_served = True
    shards = True

    from_scratch: bool = False
    """Start from fresh weights, drawn with the cell's seed as the architecture draws them: what the pretraining is worth."""

    @property
    def name(self) -> str:
        return "from_scratch" if self.from_scratch else "full"

    def check(self, precision: str) -> None:
        if precision in QUANTISED:
            raise UserError(f"full fine-tuning cannot train {precision} weights; choose precision=auto, fp32 or bf16, or technique=qlora")

    def wrap(self, model: Any) -> Any:
        model = type(model)(model.config).to(model.device) if self.from_scratch else model
        return model.float().requires_grad_(True)

    def served(self, model: Any, dtype: Any) -> Any:
        return cast(model, dtype)

    def save(self, model: Any, state: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        model = type(base).from_pretrained(folder, dtype=base.dtype, local_files_only=True)
        return model.to(base.device).eval(), None
