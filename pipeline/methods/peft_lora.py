"""LoRA that needs more than its config: a second learning rate (LoRA+), a start at what quantisation lost (LoftQ), corrected gradients (LoRA-FA,
Riemannian LoRA), several LoRA mixed by task (Poly). conf/method/lora_plus.yaml, loftq.yaml, lora_fa.yaml, lora_riemannian.yaml, poly.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.methods.peft_adapter import PeftAdapter
from pipeline.models.base import load_stored, quantised
from pipeline.models.blocks import matrix


@dataclass(frozen=True)
class LoraPlus(PeftAdapter):
    """LoRA whose B learns faster than its A (Hayou et al., 2024), through PEFT's create_loraplus_optimizer."""

    own_optimizer_groups = True

    lr_ratio: float = 16.0
    """B's learning rate over A's; train.lr is A's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr_ratio >= 1:
            raise UserError(f"method.lr_ratio is {self.lr_ratio}; LoRA+ has it at 1 or above")

    def optimizer_groups(self, model: Any, lr: float) -> list[dict[str, Any]]:
        from peft.optimizers import create_loraplus_optimizer
        from torch.optim import SGD

        # any optimiser class will do: only its groups are used
        optimizer = create_loraplus_optimizer(model, SGD, lr=lr, loraplus_lr_ratio=self.lr_ratio)
        return [{"params": group["params"], "lr": group["lr"]} for group in optimizer.param_groups if group["params"]]

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), "lr_ratio": self.lr_ratio}


@dataclass(frozen=True)
class LoftQ(PeftAdapter):
    """LoRA over an NF4 base, initialised with the best rank-r part of what quantisation lost (Li et al., 2023, one round).

    PEFT's replace_lora_weights_loftq does the same on a GPU only, and ignores alpha / r.
    """

    def check(self, precision: str) -> None:
        super().check(precision)
        if precision != "nf4":
            raise UserError(f"LoftQ starts from what NF4 quantisation lost, but the base is {precision}; choose precision=nf4")

    def wrap(self, model: Any) -> Any:
        import torch
        from peft.tuners.lora import LoraLayer
        from peft.utils.integrations import dequantize_module_weight

        wrapped = super().wrap(model)
        full = load_stored(Path(model.config._name_or_path))
        for name, module in wrapped.get_base_model().named_modules():
            if not isinstance(module, LoraLayer) or not quantised(getattr(module.get_base_layer(), "weight", None)):
                continue  # experts and routers, which keep their own weights
            rank, scale = module.r["default"], module.scaling["default"]
            rounded = dequantize_module_weight(module.base_layer).float()
            left, values, right = torch.linalg.svd(matrix(full.get_submodule(name)).to(rounded.device).float() - rounded, full_matrices=False)
            root = (values[:rank] / scale).sqrt()
            module.lora_A["default"].weight.data = (root[:, None] * right[:rank]).contiguous()
            module.lora_B["default"].weight.data = (left[:, :rank] * root).contiguous()
        return wrapped

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), "init": "loftq"}


def _check_lora(config: Any) -> None:
    """Raise UserError for another adapter, which has no A and B whose gradients could be corrected."""
    if config.peft_type.value != "LORA":
        raise UserError(f"gradients are corrected of LoRA's A and B, and the adapter is {config.peft_type.value}; choose another optimizer_type or method")


def _pairs(model: Any) -> Iterator[tuple[Any, Any, float]]:
    """(A [r, in], B [out, r], alpha / r) of every adapted linear layer."""
    for module in model.modules():
        if "default" in getattr(module, "lora_A", ()):
            yield module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"]


@dataclass(frozen=True)
class LoraFa(PeftAdapter):
    """LoRA whose A stays as it is drawn (LoRA-FA, Zhang et al., 2023): no layer's input is kept for A's gradient.

    B's gradient becomes (r / alpha)² · g (A Aᵀ)⁻¹, with which the change of B·A is nearest to full fine-tuning's, as PEFT's LoraFAOptimizer has it.
    """

    corrects_gradients = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_lora(self.config)

    def wrap(self, model: Any) -> Any:
        wrapped = super().wrap(model)
        for a, b, scale in _pairs(wrapped):
            a.requires_grad_(False)
            b.register_hook(_times_inverse(a, scale))
        return wrapped

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), "trained": "B"}


def _times_inverse(a: Any, scale: float) -> Any:
    """g -> g (A Aᵀ)⁻¹ / scale², for an A that does not change: inverted at the first gradient."""
    import torch

    kept: list[Any] = []

    def correct(gradient: Any) -> Any:
        if not kept:
            kept.append(torch.linalg.pinv(a.detach().float() @ a.detach().float().T) / scale**2)
        return gradient @ kept[0]

    return correct


@dataclass(frozen=True)
class RiemannianLora(PeftAdapter):
    """LoRA whose gradients are rescaled by r × r matrices (Zhang & Pilanci, 2024), as PEFT's create_riemannian_optimizer has it:

    A's becomes (BᵀB + reg · I)⁻¹ g, B's g (A Aᵀ + reg · I)⁻¹.
    """

    corrects_gradients = True

    reg: float = 1e-2
    """Added to the diagonal of what is inverted."""

    @property
    def acts_between_steps(self) -> bool:
        """Its inverses are made anew in every step, which a CUDA graph does not hold."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_lora(self.config)
        if not self.reg > 0:
            raise UserError(f"method.reg is {self.reg}; B begins at 0, so it must be above 0")

    def wrap(self, model: Any) -> Any:
        wrapped = super().wrap(model)
        for a, b, _ in _pairs(wrapped):
            a.register_hook(lambda gradient, b=b: self._inverse(b.detach().T @ b.detach()) @ gradient)
            b.register_hook(lambda gradient, a=a: gradient @ self._inverse(a.detach() @ a.detach().T))
        return wrapped

    def _inverse(self, square: Any) -> Any:
        """(square + reg · I)⁻¹, [r, r]."""
        import torch

        return torch.linalg.inv(square.float() + self.reg * torch.eye(len(square), device=square.device))

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), "reg": self.reg}


@dataclass(frozen=True)
class Poly(PeftAdapter):
    """Several LoRA, mixed by weights that are trained for every task (Poly, Ponti et al., 2022). All rows of a cell are of task 0."""

    own_load = True

    def attached(self, model: Any, config: Any) -> Any:
        return _of_task_0(super().attached(model, config))

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        model, state = super().load(base, folder)
        return _of_task_0(model), state


def _of_task_0(model: Any) -> Any:
    """PEFT wants task_ids in every forward pass; where none are given, all rows are of task 0."""
    import torch
    from peft.tuners.poly import Linear

    def fill(_: Any, args: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if named.get("task_ids") is None:
            named["task_ids"] = torch.zeros(len(args[0]), dtype=torch.long, device=args[0].device)
        return args, named

    for module in model.modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(fill, with_kwargs=True)
    return model
