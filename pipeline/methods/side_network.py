"""Networks beside a frozen base, which read its hidden states layer by layer and change the last ones: no gradient goes through the base.

conf/method/ladder.yaml, attention_fusion.yaml. Written here because PEFT has neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, read_json, write_json
from pipeline.data.rows import Example
from pipeline.methods.base import Method, check_counts, load_weights, save_weights
from pipeline.models.blocks import blocks

WEIGHTS, TOKENS = "side_network.safetensors", "tokens.json"


@dataclass(frozen=True)
class SideNetwork(Method):
    """What both have in common. Nothing merges: the network is no part of the base's architecture."""

    trains = True

    @property
    def decoder_only(self) -> str:
        return "its network reads one stack of blocks"

    def wrap(self, model: Any) -> Any:
        from pipeline.methods.modules import side_networks

        side_networks.attach(model, self._network(model))
        for _, parameter in _added(model):
            parameter.requires_grad_(True)
        return model

    def save(self, model: Any, state: Any, folder: Path) -> None:
        save_weights(_added(model), folder / WEIGHTS)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        model = self.wrap(base)
        load_weights(_added(model), folder / WEIGHTS, base.device)
        return model.requires_grad_(False).eval(), None

    def _network(self, model: Any) -> Any:
        raise NotImplementedError


def _added(model: Any) -> list[tuple[str, Any]]:
    """Name and value of the parameters that the method added to the base."""
    from pipeline.methods.modules import answers, side_networks

    return [(name, p) for name, p in model.named_parameters() if {side_networks.NAME, answers.NAME} & set(name.split("."))]


@dataclass(frozen=True)
class Ladder(SideNetwork):
    """Ladder side-tuning (Sung et al., 2022): a decoder of the base's own architecture, `reduction` times narrower, reads every block of the base.

    The paper's gates; not its initialisation from pruned weights of the base (the side network's is random), nor its dropped layers. As in quantised
    side tuning (Zhang et al., 2024) the base's last states stay in the sum, so the first answers are the base's.

    Raises:
        UserError: a width that `reduction` does not divide into heads.
    """

    reduction: int

    def __post_init__(self) -> None:
        check_counts(self, "reduction", least=2)

    def hyperparameters(self) -> dict[str, Any]:
        return {"reduction": self.reduction}

    def _network(self, model: Any) -> Any:
        from pipeline.methods.modules.side_networks import LadderNetwork

        return LadderNetwork(model.config, model.get_output_embeddings().weight.shape[1], self.reduction)


@dataclass(frozen=True)
class AttentionFusion(SideNetwork):
    """A trained query attends over the layers' states of every token (Cao et al., 2022), each as the output layer would read it.

    The paper's layer of classes becomes a trained change of the output layer's rows for the answers' tokens.

    Raises:
        UserError: answers that are no small set of labels.
    """

    prepares = True

    begin: float
    """How far the last layer's score lies above the others' at the first step, where the answers are nearly the base's."""

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

    def _network(self, model: Any) -> Any:
        from pipeline.methods.modules.side_networks import FusionNetwork

        return FusionNetwork(_last_norm(model), model.config.hidden_size, len(blocks(model)), self.begin)


def _last_norm(model: Any) -> Any:
    """The norm between the last block and the output layer. Raises UserError where there is none."""
    inside = {id(m) for block in blocks(model) for m in block.modules()}
    norms = [m for m in model.base_model.modules() if "norm" in type(m).__name__.lower() and id(m) not in inside]
    if not norms:
        kind = type(model).__name__
        raise UserError(f"{kind} has no norm behind its last block, through which attention fusion reads the other layers; use technique=ladder")
    return norms[-1]
