"""LoRA with a second learning rate (LoRA+), and LoRA that starts from what quantisation lost (LoftQ). conf/method/lora_plus.yaml, loftq.yaml."""

from __future__ import annotations

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
