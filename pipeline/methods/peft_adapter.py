"""Any adapter that the PEFT library has, from its own config: LoRA, IA3, OFT, prompt tuning, …

conf/method/lora.yaml, prompt_tuning.yaml, …; a new adapter of PEFT needs a YAML and no code. Adapters that need more than their config
are subclasses in peft_lora.py, peft_prompts.py, peft_tokens.py, peft_shadow.py and peft_adalora.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.core.files import UserError
from pipeline.data.rows import Example
from pipeline.measure.memory import out_of_memory
from pipeline.methods import peft_options, peft_start
from pipeline.methods.base import QUANTISED, Method
from pipeline.models import architecture
from pipeline.models.base import autocast, dequantised, untie
from pipeline.models.imports import spared
from pipeline.models.reach import adapted_weights

SHOWN = {
    "r": "r", "init_r": "init_r", "target_r": "target_r", "lora_alpha": "alpha", "alpha": "alpha", "lora_dropout": "dropout", "oft_block_size": "block_size",
    "num_virtual_tokens": "virtual_tokens", "block_size": "block_size", "n_frequency": "coefficients", "sparsity": "sparsity", "adapter_len": "virtual_tokens",
    "num_vectors": "vectors", "init_lora_weights": "init", "prompt_tuning_init": "init", "use_rslora": "use_rslora", "use_dora": "use_dora",
}
"""Keys of PEFT's configs and what the table calls them; a flag that is off, and an initialisation that is the default, are left out."""


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
        peft_options.check(self.config)
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
        return peft_options.merges(self.config)

    @property
    def sharing(self) -> str:
        if self.merge or peft_options.changes_base(self.config):
            return "no"
        plain = not self.own_load and not peft_options.has(self.config, *peft_options.VARIANTS)
        return "together" if self.config.peft_type.value == "LORA" and plain else "in_turn"

    @property
    def mixes_rows(self) -> bool:
        return self.config.peft_type.value in peft_options.MIXED_BY_BATCH

    @property
    def prepares(self) -> bool:
        return peft_options.start(self.config) in peft_options.FROM_DATA

    @property
    def _penalised(self) -> bool:
        return peft_options.has(self.config, *peft_options.PENALISED)

    @property
    def plans_training(self) -> bool:
        return self._penalised

    @property
    def acts_between_steps(self) -> bool:
        """AdaMSS moves its subspaces; terms of the loss are added in the model's forward, which is a step that is not captured."""
        return self._penalised or getattr(self.config, "use_asa", False)

    @property
    def decoder_only(self) -> str | None:
        return peft_options.decoder_only(self.config)

    def check(self, precision: str) -> None:
        if self.config.task_type not in architecture.TASKS:
            raise UserError(f"method.config.task_type is {self.config.task_type!r}; a base here is {' or '.join(architecture.TASKS.values())}: "
                            f"{' or '.join(architecture.TASKS)}")
        peft_options.check_start(self.config, precision, precision in QUANTISED)
        if precision not in QUANTISED:
            return
        if not (self.soft_prompt or self.name == "ln_tuning" or _has_quantised_layers(self.name)):
            kind = self.config.peft_type.value
            raise UserError(f"PEFT's {kind} has no layer for {precision} weights; choose precision=auto, fp32 or bf16, or another adapter")

    def prepare(self, examples: Sequence[Example], seed: int, base: Any) -> None:
        if self.prepares:
            peft_start.keep(base, examples)

    def attached(self, model: Any, config: Any) -> Any:
        """The base in PEFT's adapter of this config, as it is before its first step."""
        from peft import get_peft_model

        attach = peft_start.attached if hasattr(model, peft_start.EXAMPLES) else get_peft_model
        with spared(model, config):
            return prompts_on_device(attach(model, config))

    def wrap(self, model: Any) -> Any:
        name, config = type(model).__name__, peft_options.fitted(self.config, model)
        try:
            wrapped = self.attached(model, config)
            for parameter in wrapped.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.data = parameter.data.float()  # copies of a bf16 base's own, such as LN tuning's norms, too
            _begin_magnitudes(wrapped)
            if not _plain_lora(wrapped):
                _answer_once(wrapped)
        except UserError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            fix = "; name other modules in method.config.target_modules" if hasattr(config, "target_modules") else "; choose another technique"
            raise UserError(f"this adapter does not fit the model: {self.config.peft_type.value} on {name}: {reason.rstrip('.')}{fix}") from error
        return wrapped

    def before_training(self, model: Any, steps: int) -> None:
        if not self._penalised:
            return
        import torch

        first = next(p for p in model.parameters() if p.requires_grad)

        def penalise(module: Any, *_: Any) -> None:
            if module.training and torch.is_grad_enabled() and first.grad is None:  # once a step, however many micro-batches it has
                self.penalty(model).backward(retain_graph=True)  # the forward pass that it is a part of has a backward pass of its own to come

        model.register_forward_hook(penalise)

    def penalty(self, model: Any) -> Any:
        """What the adapter adds to the loss, which PEFT leaves to the loop: KaSA's and MonteCLoRA's terms. Scalar, fp32."""
        lora = model.base_model
        return lora._get_kasa_loss() if peft_options.has(self.config, "kasa_config") else lora._get_monteclora_loss()

    def after_step(self, model: Any, step: int) -> None:
        if getattr(self.config, "use_asa", False):
            model.base_model.update_and_allocate(step)

    def reached_weights(self, model: Any) -> int:
        return 0 if self.soft_prompt else adapted_weights(model)

    def notes(self, model: Any) -> list[str]:
        return [f"PEFT's {self.config.peft_type.value} mixes by the mean over a batch: a row's answer depends on the rows beside it"] if self.mixes_rows else []

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
        elif not peft_start.save(model, folder):
            for config in model.peft_config.values():
                _sort_sets(config)
            model.save_pretrained(folder, save_embedding_layers=False)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        if self.merge:
            model = type(base).from_pretrained(folder, dtype=base.dtype, local_files_only=True)
            return model.to(base.device).eval(), None
        from peft import PeftModel

        with spared(base, self.config):
            return prompts_on_device(PeftModel.from_pretrained(base, folder)).eval(), None

    def merged(self, model: Any) -> Any:
        """The adapter's plain model. A quantised base is dequantised first, so the sum is not rounded again; a tied output layer that has an adapter,
        or whose embeddings have one, is untied."""
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer

        if getattr(model.get_base_model(), "quantization_method", None):
            weights, config = get_peft_model_state_dict(model), model.peft_config["default"]
            model.get_base_model().is_loaded_in_8bit = False  # else IA3 refuses, though what it merges with is no longer 8-bit then
            model = get_peft_model(dequantised(model.unload()), config)
            set_peft_model_state_dict(model, weights)
        base = model.get_base_model()
        if any(isinstance(module, BaseTunerLayer) for module in (base.get_output_embeddings(), base.get_input_embeddings())):
            untie(base)
        return model.merge_and_unload()


def _sort_sets(config: Any) -> None:
    """Make sorted lists of the config's sets, which PEFT writes in the order of their hashes: equal runs leave equal bytes."""
    for key, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, key, sorted(value))


def prompts_on_device(model: Any) -> Any:
    """A model of PEFT, with the indices of its soft tokens on its own device: PEFT keeps them on the CPU and copies them in every forward pass,
    which cannot be captured in a CUDA graph. A prefix comes as a cache that the model takes."""
    for name, indices in model.prompt_tokens.items() if model.active_peft_config.is_prompt_learning else ():
        model.prompt_tokens[name] = indices.to(model.device)
    if model.active_peft_config.peft_type.value in peft_options.PREFIXES and architecture.has_encoder(model):
        model.get_prompt = functools.partial(_prefix_of_decoder, model.get_prompt)
    return model


def _prefix_of_decoder(prompt: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """A prefix as the decoder's own keys and values, with room for those of what its encoder read."""
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(prompt(*args, **more), DynamicCache())


def _begin_magnitudes(model: Any) -> None:
    """DoRA's magnitudes of the fp32 adapter: PEFT rounds them to a bf16 base's dtype, so that every row would begin up to 0.3% longer or shorter than it is."""
    for module in model.modules():
        for name, variant in getattr(module, "lora_variant", {}).items():
            if "Dora" in type(variant).__name__:
                variant.init(module, name)


def _plain_lora(model: Any) -> bool:
    """Whether all that was added is LoRA's two matrices beside linear layers, which run wherever the base does."""
    from peft.tuners.lora import Linear, LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    added = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    return type(model.base_model) is LoraModel and all(type(module) is Linear and not module.lora_variant for module in added)


def _answer_once(model: Any) -> None:
    """One token through a wrapped model, so that what cannot run is known before it trains. Modes and random numbers stay as they were."""
    import torch

    modes = {module: module.training for module in model.modules()}
    more = architecture.one_token(model)
    more |= {"task_ids": torch.zeros(1, dtype=torch.long, device=model.device)} if model.active_peft_config.peft_type.value == "MULTITASK_PROMPT_TUNING" else {}
    generators = torch.random.fork_rng([model.device] if model.device.type == "cuda" else [])
    with torch.no_grad(), generators, autocast(model.device, model.get_base_model().dtype):
        model.eval()(**more)
    for module, mode in modes.items():
        module.training = mode


def _has_quantised_layers(tuner: str) -> bool:
    """Whether PEFT has layers of this tuner for bitsandbytes' weights: a file of their own, or ones that ask for the backend."""
    import importlib.util

    if importlib.util.find_spec(f"peft.tuners.{tuner}") is None:
        return False
    bnb, layers = (importlib.util.find_spec(f"peft.tuners.{tuner}.{part}") for part in ("bnb", "layer"))
    return bnb is not None or (layers is not None and "quantization_backend" in Path(str(layers.origin)).read_text(encoding="utf-8"))
