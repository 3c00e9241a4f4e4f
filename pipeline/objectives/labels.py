"""Standard fine-tuning on the labels. conf/objective/labels.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.objectives.base import Objective


@dataclass(frozen=True)
class Labels(Objective):
    """Cross-entropy of the answer given the prompt; no rationale is used."""
