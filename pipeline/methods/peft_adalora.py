"""AdaLoRA: LoRA whose ranks move between layers while it trains. conf/method/adalora.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.methods.peft_adapter import PeftAdapter


@dataclass(frozen=True)
class AdaLora(PeftAdapter):
    """AdaLoRA (Zhang et al., 2023): training takes ranks away from the layers that need them least.

    The plan over the steps and the orthogonality penalty are here, because PEFT adds the latter only where labels go
    into the model's forward. A resumed run measures the importance of ranks anew.
    """

    plans_training = True
    acts_between_steps = True
    _penalised = True
    changes_when_served = True
    own_load = True

    start_share: float | None = None
    """Share of the steps before ranks are taken; null: the config's tinit, tfinal and total_step."""
    end_share: float | None = None
    """Share of the steps after ranks are fixed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.target_r >= self.config.init_r:
            what = f"AdaLoRA brings ranks down to it from init_r={self.config.init_r}, so it is less"
            raise UserError(f"method.config.target_r is {self.config.target_r}; {what}")
        if (self.start_share or 0) + (self.end_share or 0) >= 1:
            raise UserError("method.start_share and method.end_share leave no steps to take ranks in; together they are below 1")

    def wrap(self, model: Any) -> Any:
        wrapped = super().wrap(model)
        for name, parameter in wrapped.named_parameters():
            if "ranknum" in name:  # PEFT makes it trainable when it casts the adapter to fp32, and does not save it
                parameter.requires_grad_(False)
        return wrapped

    def before_training(self, model: Any, steps: int) -> None:
        if self.start_share is not None and self.end_share is not None:
            config = model.peft_config["default"]
            config.tinit, config.tfinal, config.total_step = int(steps * self.start_share), int(steps * self.end_share), max(1, steps)
        super().before_training(model, steps)

    def penalty(self, model: Any) -> Any:
        """orth_reg_weight · mean over A and B of ‖A·Aᵀ − I‖ and ‖Bᵀ·B − I‖ (Frobenius), as AdaLoraModel.forward has it. Scalar, fp32."""
        import torch

        norms = []
        with torch.autocast(model.device.type, enabled=False):
            for name, p in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    square = p @ p.T if "lora_A" in name else p.T @ p
                    norms.append(torch.linalg.matrix_norm(square - torch.eye(len(square), device=p.device)))
            return self.config.orth_reg_weight * torch.stack(norms).mean()

    def after_step(self, model: Any, step: int) -> None:
        config = model.peft_config["default"]
        done = step + 1
        if done > config.total_step:
            return
        fixed = config.total_step - config.tfinal
        if done > fixed and config.rank_pattern is None:  # resumed after the ranks were fixed
            config.rank_pattern = _ranks(model)
        if done == fixed and not model.base_model.rankallocator.ipt:  # resumed just here, or a run of one step
            model.base_model.rankallocator.update_ipt(model.base_model.model)
        model.base_model.update_and_allocate(done)

    def served(self, model: Any, dtype: Any) -> Any:
        """The adapter cut down to the ranks of the selected weights, which may be those of an earlier step than the last."""
        from peft import get_peft_model_state_dict

        config = model.peft_config["default"]
        if config.rank_pattern is not None:
            ranks = config.rank_pattern = _ranks(model)
            weights = get_peft_model_state_dict(model)
            model.base_model.resize_modules_by_rank_pattern(ranks, "default")
            _put_fp32(model, weights)
        return super().served(model, dtype)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        from safetensors.torch import load_file

        model, state = super().load(base, folder)
        if not self.merge:
            _put_fp32(model, load_file(folder / "adapter_model.safetensors"))
        return model, state


def _put_fp32(model: Any, weights: dict[str, Any]) -> None:
    """Set AdaLoRA's weights again in fp32: PEFT rounds them to the base's dtype when it cuts ranks."""
    for name, parameter in model.named_parameters():
        if name.removesuffix(".default") in weights:
            parameter.data = weights[name.removesuffix(".default")].to(parameter.device).float()
        elif "ranknum" in name:
            parameter.data = parameter.data.float()


def _ranks(model: Any) -> dict[str, list[bool]]:
    """By singular-value parameter of AdaLoRA's: which of its ranks are in use (a rank that was taken has value 0)."""
    prefix = "base_model.model."
    return {n.removeprefix(prefix): (p.detach() != 0).view(-1).tolist() for n, p in model.named_parameters() if "lora_E" in n}
