"""Networks beside a frozen base, which read its states layer by layer and change its last ones: nothing goes back through the base.

conf/method/ladder.yaml, attention_fusion.yaml. Written here because PEFT has neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, read_json, write_json
from pipeline.data.rows import Example
from pipeline.methods.base import Method
from pipeline.models.blocks import blocks

WEIGHTS, TOKENS = "side_network.safetensors", "tokens.json"


@dataclass(frozen=True)
class SideNetwork(Method):
    """What both have in common. Nothing merges: the base has no place for what stands beside it."""

    trains = True

    def wrap(self, model: Any) -> Any:
        from pipeline.methods.modules import beside

        beside.attach(model, self._reader(model))
        for parameter in _added(model).values():
            parameter.requires_grad_(True)
        return model

    def save(self, model: Any, state: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({name: p.detach().contiguous() for name, p in _added(model).items()}, folder / WEIGHTS)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        from safetensors.torch import load_file

        model = self.wrap(base)
        held = load_file(folder / WEIGHTS, device=str(base.device))
        for name, parameter in _added(model).items():
            parameter.data = held[name]
        return model.requires_grad_(False).eval(), None

    def _reader(self, model: Any) -> Any:
        raise NotImplementedError


def _added(model: Any) -> dict[str, Any]:
    """The parameters that are not the base's own."""
    from pipeline.methods.modules import answers, beside

    return {name: p for name, p in model.named_parameters() if {beside.NAME, answers.NAME} & set(name.split("."))}


@dataclass(frozen=True)
class Ladder(SideNetwork):
    """Ladder side-tuning (Sung et al., 2022): a decoder of the base's own architecture, `reduction` times narrower, reads every block of the base.

    The paper's gates; not its start at pruned weights of the base (the side network begins at random), nor its dropped layers. As in quantised
    side tuning (Zhang et al., 2024) the base's own last states stay in the sum, so the first answers are the base's.

    Raises:
        UserError: a width that `reduction` does not divide into heads.
    """

    reduction: int

    def __post_init__(self) -> None:
        if type(self.reduction) is not int or self.reduction < 2:
            raise UserError(f"method.reduction is {self.reduction}; it must be a whole number of at least 2")

    def hyperparameters(self) -> dict[str, Any]:
        return {"reduction": self.reduction}

    def _reader(self, model: Any) -> Any:
        from pipeline.methods.modules.beside import Ladder as Network

        return Network(model.config, self.reduction)


@dataclass(frozen=True)
class AttentionFusion(SideNetwork):
    """A trained query attends over the layers' states of every token (Cao et al., 2022), each as the output layer would read it.

    The paper's layer of classes becomes a trained change of the output layer's rows for the answers' tokens.

    Raises:
        UserError: answers that are no small set of labels.
    """

    prepares = True

    begin: float
    """How far the last layer's score lies above the others' at the start, where the answers are nearly the base's."""

    def hyperparameters(self) -> dict[str, Any]:
        return {"begin": self.begin}

    def prepare(self, examples: Sequence[Example], seed: int, base: Any) -> None:
        from pipeline.methods.modules import answers

        answers.add(base, answers.tokens(examples, base, "attention fusion"))

    def save(self, model: Any, state: Any, folder: Path) -> None:
        from pipeline.methods.modules import answers

        super().save(model, state, folder)
        write_json(folder / TOKENS, answers.of(model).ids.tolist())

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        from pipeline.methods.modules import answers

        answers.add(base, read_json(folder / TOKENS))
        return super().load(base, folder)

    def _reader(self, model: Any) -> Any:
        from pipeline.methods.modules.beside import Fusion

        return Fusion(_last_norm(model), model.config.hidden_size, len(blocks(model)), self.begin)


def _last_norm(model: Any) -> Any:
    """The norm between the last block and the output layer. Raises UserError where there is none."""
    inside = {id(m) for block in blocks(model) for m in block.modules()}
    found = [m for m in model.base_model.modules() if "norm" in type(m).__name__.lower() and id(m) not in inside]
    if not found:
        kind = type(model).__name__
        raise UserError(f"{kind} has no norm behind its last block, through which attention fusion reads the other layers; use technique=ladder")
    return found[-1]
