"""Any adapter that the PEFT library has, from its own config: LoRA and its kin, prompt tuning, prefix tuning, …

conf/method/lora.yaml, prompt_tuning.yaml; a new adapter of PEFT needs a YAML and no code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import UserError
from pipeline.methods.base import Method

SHOWN = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "num_virtual_tokens": "virtual_tokens"}


@dataclass(frozen=True)
class PeftAdapter(Method):
    """Trains an adapter over a frozen base. Adapter weights are fp32 in every precision (PEFT's autocast_adapter_dtype).

    Raises:
        UserError: a value PEFT refuses (r = 0, unknown target modules), or merge where the adapter cannot be merged.
    """

    config: Any
    """A peft.PeftConfig, or a partial one from the YAML's `_target_`."""
    merge: bool = False
    """Fold the adapter into the base after training; the artefact is then a whole model."""

    def __post_init__(self) -> None:
        for key in ("r", "num_virtual_tokens"):
            value = getattr(self.config, key, None)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"method.config.{key} is {value}; it must be a whole number of at least 1")
        if self.merge and not self.merges:
            raise UserError(f"{self.config.peft_type.value} cannot be merged into the base; set method.merge=false")

    @property
    def name(self) -> str:
        return str(self.config.peft_type.value).lower()

    @property
    def trains(self) -> bool:
        return True

    @property
    def merges(self) -> bool:
        return not self.config.is_prompt_learning

    def wrap(self, model: Any) -> Any:
        import copy

        from peft import get_peft_model

        try:
            return get_peft_model(model, copy.deepcopy(self.config))
        except (ValueError, TypeError) as error:
            raise UserError(f"this adapter does not fit the model: {' '.join(str(error).split())}") from error

    def hyperparameters(self) -> dict[str, Any]:
        found = {shown: getattr(self.config, key) for key, shown in SHOWN.items() if getattr(self.config, key, None) is not None}
        for flag in ("use_rslora", "use_dora"):
            if getattr(self.config, flag, False):
                found[flag] = True
        return {**found, "merge": True} if self.merge else found

    def served(self, model: Any, dtype: Any) -> Any:
        return self.merged(model) if self.merge else model

    def save(self, model: Any, state: Any, folder: Path) -> None:
        if self.merge:
            model.save_pretrained(folder)
        else:
            model.save_pretrained(folder, save_embedding_layers=False)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        if self.merge:
            model = type(base).from_pretrained(folder, dtype=base.dtype, local_files_only=True)
            return model.to(base.device).eval(), None
        from peft import PeftModel

        return PeftModel.from_pretrained(base, folder).eval(), None

    def merged(self, model: Any) -> Any:
        """Attached adapter -> plain model. A quantised base is dequantised first, so the product is not rounded again."""
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        if not getattr(model.get_base_model(), "quantization_method", None):
            return model.merge_and_unload()
        weights, config = get_peft_model_state_dict(model), model.peft_config["default"]
        plain = get_peft_model(model.unload().dequantize(), config)
        set_peft_model_state_dict(plain, weights)
        return plain.merge_and_unload()
