"""ShadowPEFT: a small decoder beside the base. conf/method/shadow.yaml."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pipeline.methods.peft_adapter import PeftAdapter

UPDATE = re.compile(r"\.(\d+)\.shadow_update")
"""In the name of a parameter by which a block's states change the shadow's."""


@dataclass(frozen=True)
class Shadow(PeftAdapter):
    """A small decoder beside the base, whose state is put into every block and changed by it (ShadowPEFT, arXiv 2604.19254, 2026).

    The last block's change of that state is read by nothing, so it is not trained. The paper's second loss, of the small decoder by itself, is left out.
    """

    def attached(self, model: Any, config: Any) -> Any:
        wrapped = super().attached(model, config)
        updates = [(int(found[1]), p) for name, p in wrapped.named_parameters() if (found := UPDATE.search(name))]
        for block, parameter in updates:
            parameter.requires_grad_(block < max(number for number, _ in updates))
        return wrapped
