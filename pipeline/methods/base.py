"""What a method is: a frozen dataclass whose hooks say what is trained and what is left to serve.

Library. A hook has a default; a method overrides what it needs and declares it as a class attribute. Engine, packing, forecast, tuning, serving and
export read the declarations alone, never which hooks are overridden (tests/test_contracts.py compares the two).
`type` in conf/method/<name>.yaml names the class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.core.files import UserError
from pipeline.data.rows import Example

QUANTISED = ("nf4", "int8")
"""Precisions whose base weights are rounded."""


@dataclass(frozen=True)
class Method:
    """Trains nothing; the untouched base answers."""

    trains: ClassVar[bool] = False
    """Whether there is anything for the training loop to do."""
    peft: ClassVar[bool] = False
    """Whether its artefact is an adapter as PEFT makes, saves and loads it from the field `config`."""
    answers_without_model: ClassVar[bool] = False
    """`answers` is asked in the model's place."""
    chooses: ClassVar[bool] = False
    """`choose` picks among states."""
    shards: ClassVar[bool] = False
    """Whether it trains all weights of a plain model, which may then lie in parts on several GPUs (train.parallel=fsdp)."""
    own_prompt: ClassVar[bool] = False
    """`prompt` changes what the model sees."""
    own_optimizer_groups: ClassVar[bool] = False
    """`optimizer_groups` gives others than all trained parameters at one learning rate."""
    corrects_gradients: ClassVar[bool] = False
    """Hooks of its own change gradients before the optimiser has them, so that it is trained by autograd, one run at a time."""

    @property
    def name(self) -> str:
        """As in conf/method/, MLflow and the table."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def prepares(self) -> bool:
        """Whether `prepare` keeps something of the training examples, or changes the base."""
        return False

    @property
    def plans_training(self) -> bool:
        """Whether `before_training` needs the number of steps, or adds to the loss."""
        return False

    @property
    def acts_between_steps(self) -> bool:
        """Whether `after_step` does something, so that it is stepped eagerly."""
        return False

    @property
    def mixes_rows(self) -> bool:
        """Whether a row's answer depends on the rows beside it, which a note says."""
        return False

    @property
    def changes_when_served(self) -> bool:
        """Whether `served` gives another model than the trained one."""
        return False

    @property
    def soft_prompt(self) -> bool:
        """Whether trained vectors stand before every request's own tokens."""
        return False

    @property
    def decoder_only(self) -> str | None:
        """Why the base has to be a decoder alone, a clause; None: it may be an encoder with its decoder, too."""
        return None

    def check(self, precision: str) -> None:
        """Raise UserError where the method makes no sense in this precision; runs before any model is loaded."""

    def answers(self, rows: Sequence[dict], rationales: dict[str, dict]) -> list[str] | None:
        """Answers that come without a model, one a row; None: the model is asked. Declared by answers_without_model."""
        return None

    def prepare(self, examples: Sequence[Example], seed: int, base: Any) -> Any:
        """What the method keeps of the training examples besides weights (few-shot: its demonstrations); `base` may embed them, or be changed by them."""
        return None

    def choose(self, state: Any, validate: Callable[[Any], tuple[float, float | None]]) -> Any:
        """The state to keep; `validate(state)` gives (metric, nll; None: not measured) on validation rows, which a choice among states may use."""
        return state

    def prompt(self, prompt: str, state: Any) -> str:
        """The prompt as the model sees it when it is scored."""
        return prompt

    def wrap(self, model: Any) -> Any:
        """Add what is to be trained and set requires_grad. Returns the model to train.

        Raises:
            UserError: the method does not apply to this model.
        """
        return model

    def before_training(self, model: Any, steps: int) -> None:
        """Called once, with the number of optimiser steps to come (AdaLoRA plans its ranks over them)."""

    def optimizer_groups(self, model: Any, lr: float) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser; each may carry its own lr."""
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]

    def after_step(self, model: Any, step: int) -> None:
        """Called after optimiser step `step` (from 0), its gradients still there. Declared by acts_between_steps."""

    def served(self, model: Any, dtype: Any) -> Any:
        """The trained model as it will be served (`dtype`: of the base's weights); it is what is evaluated and saved."""
        return model

    def reached_weights(self, model: Any) -> int:
        """How many weights of the blocks' matrices the method prunes, takes apart or stands beside, in a wrapped model; 0: it has to do with none alone."""
        return 0

    def notes(self, model: Any) -> list[str]:
        """What a reader of the result should know of the model as it is served."""
        return []

    def hyperparameters(self) -> dict[str, Any]:
        """What to show in the table and in MLflow (r, alpha, …)."""
        return {}

    def labelled_rows(self, train: int, validation: int) -> int:
        """Of so many training and validation rows, how many labels a method that trains nothing reads."""
        return 0

    @property
    def takes_rows(self) -> bool:
        """Whether more training rows make it another model."""
        return self.trains

    def save(self, model: Any, state: Any, folder: Path) -> None:
        """Write the artefact: all that serving needs besides the base. The folder exists."""

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        """(model, state) from an artefact and the untouched base."""
        return base, None

    @property
    def merges(self) -> bool:
        """Whether `merged` is possible."""
        return False

    def merged(self, model: Any) -> Any:
        """A plain model of the base's architecture with the artefact folded in; consumes `model`."""
        raise UserError(f"{type(self).__name__} leaves nothing that could be merged; set method.merge=false")

    @property
    def sharing(self) -> str:
        """How its artefacts are served over one base: together (rows of one batch by different artefacts), in_turn (one after another),
        or no (they change the base's own weights)."""
        return "no"


def check_counts(method: Method, *fields: str, least: int = 1) -> None:
    """Raise UserError where one of these fields of a method is no whole number of at least `least`."""
    for field in fields:
        if type(value := getattr(method, field)) is not int or value < least:
            raise UserError(f"method.{field} is {value}; it must be a whole number of at least {least}")


def save_weights(parameters: Iterable[tuple[str, Any]], path: Path) -> None:
    """Write named parameters as safetensors."""
    from safetensors.torch import save_file

    save_file({name: p.detach().contiguous() for name, p in parameters}, path)


def load_weights(parameters: Iterable[tuple[str, Any]], path: Path, device: Any) -> None:
    """Give named parameters the values and dtypes that `save_weights` wrote."""
    from safetensors.torch import load_file

    weights = load_file(path, device=str(device))
    for name, parameter in parameters:
        parameter.data = weights[name]
