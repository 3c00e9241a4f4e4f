"""Fine-tuning of a part of the base: its top layers, its head, its biases, everything but the embeddings.

conf/method/top_layers.yaml, frozen_embeddings.yaml, head_only.yaml, bitfit.yaml, bitfit_added.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.methods.base import QUANTISED, Method, check_counts, load_weights, save_weights
from pipeline.models.base import untie
from pipeline.models.blocks import blocks

PARTS = ("layers", "final_norm", "biases", "head", "embeddings")
WEIGHTS = "trained.safetensors"


@dataclass(frozen=True)
class Selective(Method):
    """Trains the named parts of the base and stores them alone.

    Trained weights are fp32 while training. Matrices are served in the base's dtype as a fully fine-tuned model's are;
    vectors (biases, norms) stay fp32, because a small change of a value near 1 is lost in bf16.

    Raises:
        UserError: an unknown part, a part that the model lacks, or matrices of a quantised base.
    """

    trains = True
    changes_when_served = True

    parts: list[str]
    """Of layers (the blocks whole), final_norm, biases (of the blocks), head (the output layer), embeddings."""
    top_layers: int | None = None
    """How many of the last blocks count; null: all."""
    add_biases: bool = False
    """Give every linear layer of the blocks that has no bias one of zeros first; needs biases among the parts."""
    label: str = "selective"
    """The method's name in the table."""

    def __post_init__(self) -> None:
        unknown = [p for p in self.parts if p not in PARTS]
        if unknown or not self.parts:
            raise UserError(f"method.parts is {list(self.parts)}; name one or more of {', '.join(PARTS)}")
        if self.top_layers is not None:
            check_counts(self, "top_layers")
        if self.add_biases and "biases" not in self.parts:
            raise UserError("method.add_biases=true adds biases that nothing would train; put biases into method.parts")

    @property
    def name(self) -> str:
        return self.label

    def check(self, precision: str) -> None:
        if precision in QUANTISED and "layers" in self.parts:
            raise UserError(f"{self.label} cannot train {precision} weights; choose precision=auto, fp32 or bf16, or an adapter such as technique=qlora")

    def hyperparameters(self) -> dict[str, Any]:
        shown = {"parts": ", ".join(self.parts)} | ({"top_layers": self.top_layers} if self.top_layers else {})
        return shown | ({"add_biases": True} if self.add_biases else {})

    def wrap(self, model: Any) -> Any:
        self._reshape(model)
        for _, parameter in list(self._parameters(model)):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return model

    def served(self, model: Any, dtype: Any) -> Any:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.data = parameter.data.to(dtype)
        return model

    def save(self, model: Any, state: Any, folder: Path) -> None:
        save_weights(self._parameters(model), folder / WEIGHTS)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        self._reshape(base)
        load_weights(self._parameters(base), folder / WEIGHTS, base.device)
        return base.eval(), None

    def _reshape(self, model: Any) -> None:
        """Add what the parts need besides the base's own weights: an untied output layer, biases."""
        import torch

        if "head" in self.parts and "embeddings" not in self.parts:
            untie(model)
        if not self.add_biases:
            return
        for layer in self._layers(model):
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear) and module.bias is None:
                    module.bias = torch.nn.Parameter(torch.zeros(module.out_features, device=module.weight.device), requires_grad=False)

    def _layers(self, model: Any) -> list[Any]:
        layers = list(blocks(model))
        if self.top_layers is not None and self.top_layers > len(layers):
            raise UserError(f"method.top_layers={self.top_layers}, but the model has {len(layers)} layers; lower it")
        return layers[-self.top_layers :] if self.top_layers else layers

    def _parameters(self, model: Any) -> Iterator[tuple[str, Any]]:
        """(name, parameter) of the chosen parts, each once."""
        chosen: set[int] = set()
        for part in self.parts:
            parameters = {id(p) for p in self._of_part(model, part)}
            if not parameters:
                raise UserError(_missing(part, type(model).__name__))
            chosen |= parameters
        for name, parameter in model.named_parameters():
            if id(parameter) in chosen:
                yield name, parameter

    def _of_part(self, model: Any, part: str) -> Iterator[Any]:
        if part == "embeddings":
            yield from model.get_input_embeddings().parameters()
        elif part == "head":
            yield from model.get_output_embeddings().parameters()
        elif part == "final_norm":
            inside = {id(p) for module in (*blocks(model), model.get_input_embeddings()) for p in module.parameters()}
            yield from (p for p in model.base_model.parameters() if id(p) not in inside and p.ndim == 1)
        else:
            for layer in self._layers(model):
                yield from (p for name, p in layer.named_parameters() if part == "layers" or name.endswith("bias"))


def _missing(part: str, model: str) -> str:
    if part == "biases":
        return f"{model} has no bias parameters, so BitFit has nothing to train; set method.add_biases=true (technique=bitfit_added) to add zero ones"
    return f"{model} has no parameters that are its {part}; take {part} out of method.parts"
