"""Any adapter that the PEFT library has, from its own config: LoRA, IA3, OFT, prompt tuning, …

conf/method/lora.yaml, prompt_tuning.yaml, …; a new adapter of PEFT needs a YAML and no code. Adapters that need more than their config
are subclasses in peft_lora.py, peft_prompts.py and peft_adalora.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.core.files import UserError
from pipeline.methods.base import QUANTISED, Method
from pipeline.models.reach import adapted_weights

SHOWN = {
    "r": "r", "init_r": "init_r", "target_r": "target_r", "lora_alpha": "alpha", "alpha": "alpha", "lora_dropout": "dropout", "oft_block_size": "block_size",
    "num_virtual_tokens": "virtual_tokens", "init_lora_weights": "init", "prompt_tuning_init": "init", "use_rslora": "use_rslora", "use_dora": "use_dora",
}
"""Keys of PEFT's configs and what the table calls them; a flag that is off, and an initialisation that is the default, are left out."""
NEEDS_FLOATS = ("pissa", "olora", "corda", "eva", "loftq")
"""Initialisations of LoRA that decompose the base's weights and write the remainder back."""
UNMERGED = ("ADAPTION_PROMPT", "BEFT", "LILY", "POLY", "SHADOW", "XLORA")
"""Adapters that PEFT cannot fold into a base's weights (BEFT: into one without biases)."""
BASE = "base"
"""In a config's tokenizer_name_or_path: the base model's own."""


@dataclass(frozen=True)
class PeftAdapter(Method):
    """Trains an adapter over a frozen base. Adapter weights are fp32 in every precision (PEFT's autocast_adapter_dtype).

    Raises:
        UserError: a value PEFT refuses (r = 0, unknown target modules), merge where the adapter cannot be merged, an adapter
            or an initialisation that a quantised base cannot take.
    """

    trains = True
    peft = True
    own_load: ClassVar[bool] = False
    """`load` does more than PEFT's loading, so its artefacts share no batch with others."""

    config: Any
    """A peft.PeftConfig, from the YAML's `type`."""
    merge: bool = False
    """Fold the adapter into the base after training; the artefact is then a whole model."""

    def __post_init__(self) -> None:
        for key in ("r", "num_virtual_tokens", "init_r", "target_r"):
            value = getattr(self.config, key, None)
            by_block = key == "r" and value == 0 and getattr(self.config, "oft_block_size", 0)
            if value is not None and not by_block and (type(value) is not int or value < 1):
                raise UserError(f"method.config.{key} is {value}; it must be a whole number of at least 1")
        if self.merge and not self.merges:
            raise UserError(f"{self.config.peft_type.value} cannot be merged into the base; set method.merge=false")

    @property
    def name(self) -> str:
        return str(self.config.peft_type.value).lower()

    @property
    def changes_when_served(self) -> bool:
        return self.merge

    @property
    def soft_prompt(self) -> bool:
        return bool(self.config.is_prompt_learning)

    @property
    def merges(self) -> bool:
        return not self.soft_prompt and self.config.peft_type.value not in UNMERGED

    @property
    def sharing(self) -> str:
        start = getattr(self.config, "init_lora_weights", True)
        if self.merge or isinstance(start, str) and start.lower().startswith(NEEDS_FLOATS):
            return "no"
        plain = not self.own_load and not getattr(self.config, "use_dora", False)
        return "together" if self.config.peft_type.value == "LORA" and plain else "in_turn"

    def check(self, precision: str) -> None:
        if precision not in QUANTISED:
            return
        start = getattr(self.config, "init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(NEEDS_FLOATS):
            fix = "technique=loftq does it beside an nf4 base" if start == "loftq" else "choose precision=auto, fp32 or bf16"
            raise UserError(f"init_lora_weights={start} takes the base's weights apart, and {precision} ones are rounded already; {fix}")
        if not (self.soft_prompt or self.name == "ln_tuning" or _has_quantised_layers(self.name)):
            kind = self.config.peft_type.value
            raise UserError(f"PEFT's {kind} has no layer for {precision} weights; choose precision=auto, fp32 or bf16, or another adapter")

    def wrap(self, model: Any) -> Any:
        import copy

        from peft import get_peft_model

        config = copy.deepcopy(self.config)
        if getattr(config, "tokenizer_name_or_path", None) == BASE:
            config.tokenizer_name_or_path = model.config._name_or_path
        try:
            return prompts_on_device(get_peft_model(model, config))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"this adapter does not fit the model: {' '.join(str(error).split())}") from error

    def reached_weights(self, model: Any) -> int:
        return 0 if self.soft_prompt else adapted_weights(model)

    def hyperparameters(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, shown in SHOWN.items():
            value = getattr(self.config, key, None)
            value = getattr(value, "value", value)
            if value is not None and type(value) is not bool or value is True and key.startswith("use_"):
                values[shown] = value
        if "init_r" in values or not values.get("r", 1):  # AdaLoRA does not read r, OFT has a block size in its place
            del values["r"]
        return {**values, "merge": True} if self.merge else values

    def served(self, model: Any, dtype: Any) -> Any:
        return self.merged(model) if self.merge else model

    def save(self, model: Any, state: Any, folder: Path) -> None:
        if self.merge:
            model.save_pretrained(folder)
        else:
            for config in model.peft_config.values():
                _sort_sets(config)
            model.save_pretrained(folder, save_embedding_layers=False)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        if self.merge:
            model = type(base).from_pretrained(folder, dtype=base.dtype, local_files_only=True)
            return model.to(base.device).eval(), None
        from peft import PeftModel

        return prompts_on_device(PeftModel.from_pretrained(base, folder)).eval(), None

    def merged(self, model: Any) -> Any:
        """The adapter's plain model. A quantised base is dequantised first, so the sum is not rounded again."""
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        if not getattr(model.get_base_model(), "quantization_method", None):
            return model.merge_and_unload()
        weights, config = get_peft_model_state_dict(model), model.peft_config["default"]
        model.get_base_model().is_loaded_in_8bit = False  # else IA3 refuses, though what it merges with is no longer 8-bit then
        plain = get_peft_model(model.unload().dequantize(), config)
        set_peft_model_state_dict(plain, weights)
        return plain.merge_and_unload()


def _sort_sets(config: Any) -> None:
    """Make sorted lists of the config's sets, which PEFT writes in the order of their hashes: equal runs leave equal bytes."""
    for key, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, key, sorted(value))


def prompts_on_device(model: Any) -> Any:
    """A model of PEFT, with the indices of its soft tokens on its own device: PEFT keeps them on the CPU and copies them in every forward pass,
    which cannot be captured in a CUDA graph."""
    for name, indices in model.prompt_tokens.items() if model.active_peft_config.is_prompt_learning else ():
        model.prompt_tokens[name] = indices.to(model.device)
    return model


def _has_quantised_layers(tuner: str) -> bool:
    """Whether PEFT has layers of this tuner for bitsandbytes' weights: a file of their own, or ones that ask for the backend."""
    import importlib.util

    if importlib.util.find_spec(f"peft.tuners.{tuner}") is None:
        return False
    bnb, layers = (importlib.util.find_spec(f"peft.tuners.{tuner}.{part}") for part in ("bnb", "layer"))
    return bnb is not None or (layers is not None and "quantization_backend" in Path(str(layers.origin)).read_text(encoding="utf-8"))
