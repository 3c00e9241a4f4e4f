"""Shapes of models that many begin with, so that a plan needs no download: what of their config.json decides memory and time.

Library. known/models.json has them by their repository on the hub, with the public file that confirms each and the keys that it does not confirm;
variants (Instruct, Base, it) of one size share a shape.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import closest, read_object, write_json
from pipeline.intake.project import ModelChoice

FILE = Path(__file__).parent / "known" / "models.json"
VARIANT = re.compile(r"-(instruct|base|it|pt|chat|hf|v0\.\d|\d{4}|2507|4k)(?=-|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Known:
    """config: what of a config.json decides memory and time. source: where that stands in public. unconfirmed: keys of it that do not stand there."""

    config: dict[str, Any]
    source: str
    unconfirmed: tuple[str, ...]

    @property
    def words(self) -> str:
        """Of where the shape is from, for people."""
        doubt = f"; not confirmed: {', '.join(self.unconfirmed)}" if self.unconfirmed else ""
        return f"the shape that ships with alignscope ({self.source}{doubt})"


@functools.cache
def models() -> dict[str, Known]:
    """Repository -> its shape."""
    return {name: Known(one["config"], one["source"], tuple(one["unconfirmed"])) for name, one in read_object(FILE).items()}


def shape_of(repository: str) -> Known | None:
    """The shape of a repository or of another variant of its size; None where it is not among them."""
    wanted = VARIANT.sub("", repository.partition("/")[2] or repository).casefold()
    return next((known for name, known in models().items() if VARIANT.sub("", name.partition("/")[2]).casefold() == wanted), None)


def near(repository: str) -> str:
    """The words that name a known repository which is like this one."""
    return closest(repository, models())


def known_model(model: ModelChoice) -> Known | None:
    word = model.source.get("repository") or {"smollm2_135m": "HuggingFaceTB/SmolLM2-135M", "smollm2_135m_random": "HuggingFaceTB/SmolLM2-135M"}.get(model.name)
    return shape_of(word) if word else None


def known_config(model: ModelChoice, work: Path = Path(".work")) -> Path | None:
    """A file like the model's config.json, made of its known shape; None where that is not known."""
    known = known_model(model)
    if known is None:
        return None
    path = work / "shapes" / model.name / "config.json"
    write_json(path, known.config)
    return path
