"""Shapes of models that many begin with, so that a plan needs no download: what of their config.json decides memory and time.

Library. known/models.json has them by their repository on the hub; variants (Instruct, Base, it) of one size share a shape.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from pipeline.core.files import closest, read_object, write_json
from pipeline.intake.project import ModelChoice

FILE = Path(__file__).parent / "known" / "models.json"
VARIANT = re.compile(r"-(instruct|base|it|pt|chat|hf|v0\.\d|\d{4}|2507|4k)(?=-|$)", re.IGNORECASE)


@functools.cache
def models() -> dict[str, dict[str, Any]]:
    """Repository -> what its config.json says."""
    return read_object(FILE)


def shape_of(repository: str) -> dict[str, Any] | None:
    """The config of a repository or of another variant of its size; None where it is not among them."""
    wanted = VARIANT.sub("", repository.partition("/")[2] or repository).casefold()
    return next((config for name, config in models().items() if VARIANT.sub("", name.partition("/")[2]).casefold() == wanted), None)


def near(repository: str) -> str:
    """The words that name a known repository which is like this one."""
    return closest(repository, models())


def known_config(model: ModelChoice, work: Path = Path(".work")) -> Path | None:
    """A file like the model's config.json, made of its known shape; None where that is not known."""
    word = model.source.get("repository") or {"smollm2_135m": "HuggingFaceTB/SmolLM2-135M", "smollm2_135m_random": "HuggingFaceTB/SmolLM2-135M"}.get(model.name)
    config = shape_of(word) if word else None
    if config is None:
        return None
    path = work / "shapes" / model.name / "config.json"
    write_json(path, config)
    return path
