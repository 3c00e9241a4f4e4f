"""The best of n drawn answers by a reward model, without training. conf/objective/best_of_n.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.core.settings import AtLeast1, Positive
from pipeline.objectives.base import Objective
from pipeline.scoring.best_of import Selection


@dataclass(frozen=True)
class BestOfN(Objective):
    """Best of n (Stiennon et al., 2020); with a method that trains, of what that learns from the labels."""

    reward: str
    """A finished reward model: a technique of the same experiment, seed and rows, or results/<experiment>/<cell>."""
    n: AtLeast1
    temperature: Positive = 1.0
    unproven: Literal["refuse", "use"] = "refuse"
    """What to do with a reward model that is not above chance on held-out pairs."""

    @property
    def made_of(self) -> dict[str, str]:
        return {"reward": self.reward}

    @property
    def decoder_only(self) -> str:
        return "texts are drawn from a decoder alone"

    @property
    def selection(self) -> Selection:
        return Selection(self.n, self.temperature, self.reward, self.unproven == "use")

    def hyperparameters(self) -> dict[str, Any]:
        return {"n": self.n, "temperature": self.temperature, "reward": self.reward}
