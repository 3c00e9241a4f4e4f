"""PEFT wraps a model, and imports bitsandbytes (core/imports.py says why not) only where it may need it.

Library.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pipeline.core.imports import absent
from pipeline.models.base import quantised


@contextlib.contextmanager
def spared(model: Any, config: Any) -> Iterator[None]:
    """Within, PEFT wraps the model with this config, and imports bitsandbytes only where it may need it: for rounded weights, or to round some (LoftQ)."""
    rounds = getattr(config, "init_lora_weights", None) == "loftq" or any(map(quantised, model.parameters()))
    with contextlib.nullcontext() if rounds else absent("bitsandbytes"):
        yield
