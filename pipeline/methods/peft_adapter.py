"""Any adapter that the PEFT library has, from its own config: LoRA and its kin, prompt tuning, prefix tuning, …

conf/method/lora.yaml, prompt_tuning.yaml, …; a new adapter of PEFT needs a YAML and no code. The classes below the first
are for adapters that need more than their config: a plan over the steps, a second learning rate, the base's full weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.core.files import UserError
from pipeline.core.peft_files import read_adapter, read_training
from pipeline.methods.base import Method, prompts_on_device
from pipeline.models.base import load_stored, load_tokenizer

SHOWN = {
    "r": "r", "init_r": "init_r", "target_r": "target_r", "lora_alpha": "alpha", "alpha": "alpha", "lora_dropout": "dropout", "oft_block_size": "block_size",
    "num_virtual_tokens": "virtual_tokens", "init_lora_weights": "init", "prompt_tuning_init": "init", "use_rslora": "use_rslora", "use_dora": "use_dora",
}
"""Keys of PEFT's configs and what the table calls them; a flag that is off, and an initialisation that is the default, are left out."""
QUANTISED = ("nf4", "int8")
NEEDS_FLOATS = ("pissa", "olora", "corda", "eva", "loftq")
"""Initialisations of LoRA that take the base's weights apart, and write the rest back."""
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
    """`load` does more than PEFT's own loading, so its artefacts share no batch with others."""

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
            mend = "technique=loftq does it beside an nf4 base" if start == "loftq" else "choose precision=auto, fp32 or bf16"
            raise UserError(f"init_lora_weights={start} takes the base's weights apart, and {precision} ones are rounded already; {mend}")
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

    def hyperparameters(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, shown in SHOWN.items():
            value = getattr(self.config, key, None)
            value = getattr(value, "value", value)
            if value is not None and type(value) is not bool or value is True and key.startswith("use_"):
                found[shown] = value
        if "init_r" in found or not found.get("r", 1):  # AdaLoRA does not read r, OFT has a block size in its place
            del found["r"]
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

        return prompts_on_device(PeftModel.from_pretrained(base, folder)).eval(), None

    def merged(self, model: Any) -> Any:
        """Attached adapter -> plain model. A quantised base is dequantised first, so the product is not rounded again."""
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        if not getattr(model.get_base_model(), "quantization_method", None):
            return model.merge_and_unload()
        weights, config = get_peft_model_state_dict(model), model.peft_config["default"]
        model.get_base_model().is_loaded_in_8bit = False  # else IA3 refuses, though what it merges with is no longer 8-bit then
        plain = get_peft_model(model.unload().dequantize(), config)
        set_peft_model_state_dict(plain, weights)
        return plain.merge_and_unload()


def _has_quantised_layers(tuner: str) -> bool:
    """Whether PEFT has layers of this tuner for bitsandbytes' weights: a file of their own, or ones that ask for the backend."""
    import importlib.util

    if importlib.util.find_spec(f"peft.tuners.{tuner}") is None:
        return False
    own, layers = (importlib.util.find_spec(f"peft.tuners.{tuner}.{part}") for part in ("bnb", "layer"))
    return own is not None or (layers is not None and "quantization_backend" in Path(str(layers.origin)).read_text(encoding="utf-8"))


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

        # any optimiser class will do: its groups are what is wanted
        made = create_loraplus_optimizer(model, SGD, lr=lr, loraplus_lr_ratio=self.lr_ratio)
        return [{"params": group["params"], "lr": group["lr"]} for group in made.param_groups if group["params"]]

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), "lr_ratio": self.lr_ratio}


@dataclass(frozen=True)
class LoftQ(PeftAdapter):
    """LoRA over an NF4 base, begun at the best rank-r part of what quantisation lost (Li et al., 2023, one round).

    PEFT's replace_lora_weights_loftq does the same on a GPU alone, and leaves alpha / r out of account.
    """

    def check(self, precision: str) -> None:
        if precision != "nf4":
            raise UserError(f"LoftQ begins at what NF4 quantisation lost, but the base is {precision}; choose precision=nf4")

    def wrap(self, model: Any) -> Any:
        import torch
        from peft.tuners.lora import LoraLayer
        from peft.utils.integrations import dequantize_module_weight

        wrapped = super().wrap(model)
        full = load_stored(Path(model.config._name_or_path))
        for name, module in wrapped.get_base_model().named_modules():
            if not isinstance(module, LoraLayer):
                continue
            rank, scale = module.r["default"], module.scaling["default"]
            held = dequantize_module_weight(module.base_layer).float()
            left, values, right = torch.linalg.svd(full.get_submodule(name).weight.to(held.device).float() - held, full_matrices=False)
            root = (values[:rank] / scale).sqrt()
            module.lora_A["default"].weight.data = (root[:, None] * right[:rank]).contiguous()
            module.lora_B["default"].weight.data = (left[:, :rank] * root).contiguous()
        return wrapped

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), "init": "loftq"}


@dataclass(frozen=True)
class PrefixTuning(PeftAdapter):
    """Trained keys and values before every layer's own (Li & Liang, 2021), begun at those that the base computes for a text.

    PEFT draws them from a normal distribution of deviation 1, which is far from what a layer makes: the base's answers are lost, and a few hundred
    rows do not bring them back. The paper begins at words' activations where rows are few (its section on initialisation).
    """

    text: str | None = None
    """The base first answers as if this text, repeated and cut to num_virtual_tokens tokens, stood before every prompt. null: PEFT's random beginning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is not None and not self.text.strip():
            raise UserError("method.text is empty; give words to begin at, or null for a random beginning")
        if self.text is not None and self.config.prefix_projection:
            raise UserError("method.text cannot be met through a projection; set method.config.prefix_projection=false, or method.text=null")

    def wrap(self, model: Any) -> Any:
        wrapped = super().wrap(model)
        if self.text is not None:
            from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

            ids = beginning(self.text, load_tokenizer(Path(model.config._name_or_path)), self.config.num_virtual_tokens)
            past = _keys_and_values(model, ids)
            initialize_kv_prefix_from_past_key_values(wrapped, past_key_values=past)
        return wrapped

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), "init": "random" if self.text is None else "text"}


def beginning(text: str, tokenizer: Any, tokens: int) -> list[int]:
    """`tokens` token ids: the text's, again and again until there are enough. Raises UserError where the tokenizer finds none in it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("method.text has no tokens; give other words")
    return (ids * -(-tokens // len(ids)))[:tokens]


def _keys_and_values(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([ids], device=model.device), use_cache=True).past_key_values


@dataclass(frozen=True)
class MultitaskPrompt(PeftAdapter):
    """Multitask prompt tuning (Wang et al., 2023): a shared prompt times a task's rank-r factor. A cell has one task, number 0."""

    own_load = True

    def wrap(self, model: Any) -> Any:
        return _of_task_0(super().wrap(model))

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        model, state = super().load(base, folder)
        return _of_task_0(model), state


def _of_task_0(model: Any) -> Any:
    """PEFT wants task_ids in every forward; where none are given, all rows are of task 0."""
    import torch

    def fill(_: Any, args: tuple) -> tuple:
        indices, task_ids = args
        return indices, task_ids if task_ids is not None else torch.zeros(len(indices), dtype=torch.long, device=indices.device)

    for encoder in model.prompt_encoder.values():
        encoder.register_forward_pre_hook(fill)
    return model


@dataclass(frozen=True)
class PTuning(PeftAdapter):
    """P-tuning (Liu et al., 2021): a small network makes the soft prompt; what it made last is served and stored."""

    changes_when_served = True

    def served(self, model: Any, dtype: Any) -> Any:
        encoder = model.prompt_encoder["default"]
        made = model.get_prompt_embedding_to_save("default").float()
        encoder.embedding.weight.data = made.to(encoder.embedding.weight.device)
        encoder.forward = encoder.embedding.forward
        return model


@dataclass(frozen=True)
class AdaLora(PeftAdapter):
    """AdaLoRA (Zhang et al., 2023): ranks are taken from the layers that need them least while training goes on.

    The plan over the steps and the orthogonality penalty are here, because PEFT adds the latter only where labels go
    into the model's forward. A run that resumes measures the importance of ranks anew.
    """

    plans_training = True
    acts_between_steps = True
    changes_when_served = True
    own_load = True

    start_share: float | None = None
    """Share of the steps before ranks are taken; null: the config's own tinit, tfinal and total_step stand."""
    end_share: float | None = None
    """Share of the steps after ranks are fixed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.target_r >= self.config.init_r:
            begins = self.config.init_r
            raise UserError(f"method.config.target_r is {self.config.target_r}; AdaLoRA brings ranks down to it from init_r={begins}, so it is less")
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
        first = next(p for n, p in model.named_parameters() if "lora_A" in n)

        def penalise(module: Any, _: Any) -> None:
            if module.training and first.grad is None:  # once a step, however many micro-batches it has
                self.penalty(model).backward()

        model.register_forward_pre_hook(penalise)

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
            kept = get_peft_model_state_dict(model)
            model.base_model.resize_modules_by_rank_pattern(ranks, "default")
            _put_fp32(model, kept)
        return super().served(model, dtype)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        from safetensors.torch import load_file

        model, state = super().load(base, folder)
        if not self.merge:
            _put_fp32(model, load_file(folder / "adapter_model.safetensors"))
        return model, state


def _put_fp32(model: Any, weights: dict[str, Any]) -> None:
    """Put AdaLoRA's weights in place once more: cutting ranks, in PEFT, rounds them to the base's dtype."""
    for name, parameter in model.named_parameters():
        if name.removesuffix(".default") in weights:
            parameter.data = weights[name.removesuffix(".default")].to(parameter.device).float()
        elif "ranknum" in name:
            parameter.data = parameter.data.float()


def _ranks(model: Any) -> dict[str, list[bool]]:
    """By singular-value parameter of AdaLoRA's: which of its ranks are in use (a rank that was taken has value 0)."""
    prefix = "base_model.model."
    return {n.removeprefix(prefix): (p.detach() != 0).view(-1).tolist() for n, p in model.named_parameters() if "lora_E" in n}


KINDS: dict[str, type[PeftAdapter]] = {"ADALORA": AdaLora, "MULTITASK_PROMPT_TUNING": MultitaskPrompt, "P_TUNING": PTuning}


def from_file(path: str, sha256: str | None = None) -> PeftAdapter:
    """The method of an adapter_config.json, unmodified; training_params.json beside it may ask for LoRA+.

    Args:
        sha256: of both files; not read here, so that a change of them changes the cell's config.
    """
    config, training = read_adapter(path), read_training(path)
    kind = KINDS.get(config.peft_type.value, PeftAdapter)
    if training.get("optimizer_type") == "lora+":
        return LoraPlus(config, lr_ratio=training["optimizer_kwargs"].get("loraplus_lr_ratio", 16.0))
    return kind(config)
