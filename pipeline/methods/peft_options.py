"""What the options of a PEFT config ask of a model and of its training, where PEFT leaves that to the caller. Library of peft_adapter.py."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

from pipeline.core.files import UserError
from pipeline.models import architecture, kinds

FROM_DATA = ("corda", "eva", "lora_ga")
"""Initialisations of LoRA that read training rows first."""
NEEDS_FLOATS = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga")
"""Initialisations of LoRA that take the base's weights or what goes through them apart; all but eva write the remainder back."""
VARIANTS = ("use_dora", "use_bdlora", "alora_invocation_tokens", "velora_config", "monteclora_config", "kasa_config", "target_parameters")
"""Options of LoRA whose adapters PEFT cannot mix in a batch, or that another step than plain LoRA's serves."""
REPLACES = ("kasa_config", "layer_replication")
"""Options of LoRA that change the base's own weights or layers."""
UNMERGED = ("ADAPTION_PROMPT", "BEFT", "LILY", "POLY", "SHADOW", "XLORA")
"""Adapters that PEFT cannot fold into a base's weights (BEFT: into one without biases)."""
MIXED_BY_BATCH = ("LILY",)
"""Adapters whose router takes the mean over a batch's rows and padding, so that a row's answer depends on the rows beside it."""
UNMERGED_OPTIONS = ("alora_invocation_tokens", "lora_bias", "layer_replication")
"""The same of LoRA's options; a lora_bias has no place in a layer without a bias."""
PENALISED = ("kasa_config", "monteclora_config")
"""Options of LoRA that add terms to the loss."""
ELSEWHERE = {
    "XLORA": "mixes LoRA adapters that are trained already; train them as cells of their own",
}
"""Adapters that do not run here -> why, and what to do."""
MODEL_SIZES = ("token_dim", "num_layers", "num_attention_heads")
"""Of trained prompts, what PEFT reads from the model unless a file of another model names it."""
COUNTS = ("r", "num_virtual_tokens", "init_r", "target_r")
"""Keys of PEFT's configs that count something."""
PATTERNS = ("target_modules", "exclude_modules")
NAMED = (*PATTERNS, "modules_to_save", "feedforward_modules", "target_parameters")
"""Keys that name modules: a regular expression or, of all of them, a list of names."""
RANKED = {"LORA": "r", "ADALORA": "init_r", "LOHA": "r"}
"""Adapters whose weights grow with the rank, however little a layer has; the key of it. VeRA's is of frozen matrices, and LoKr's has an end of its own."""
PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
"""Trained keys and values."""
DECODER_ONLY = {
    "MULTITASK_PROMPT_TUNING": "PEFT feeds its prompt to an encoder-decoder only beside labels",
    "ADAPTION_PROMPT": "it stands in attention of Llama's kind",
    "CPT": "it reads the prompt's tokens in the decoder",
    "SHADOW": "its small decoder stands beside one stack of blocks",
    "CARTRIDGE": "it compresses a text that a decoder has read",
}
"""Adapters that an encoder-decoder cannot have -> why."""
DELORA_SHARE = 15 / math.sqrt(32 * 3072)
"""Of a weight's norm, by which DeLoRA has changed it after its first step, whatever the rate: lambda / sqrt(r * width). As in PEFT's own experiment."""
BASE = "base"
"""In a config's tokenizer_name_or_path: the base model's own."""


def start(config: Any) -> str:
    """LoRA's initialisation, in lower case; empty where it is PEFT's own."""
    value = getattr(config, "init_lora_weights", None)
    return value.lower() if isinstance(value, str) else ""


def has(config: Any, *options: str) -> bool:
    return any(getattr(config, option, None) not in (None, False) for option in options)


def merges(config: Any) -> bool:
    return not config.is_prompt_learning and config.peft_type.value not in UNMERGED and not has(config, *UNMERGED_OPTIONS)


def changes_base(config: Any) -> bool:
    """Whether the adapter, loaded, leaves the base other than it was."""
    return start(config) != "eva" and start(config).startswith(NEEDS_FLOATS) or has(config, *REPLACES) or getattr(config, "bias", "none") != "none"


def decoder_only(config: Any) -> str | None:
    """Why the adapter's base has to be a decoder alone; None: it need not."""
    if has(config, "alora_invocation_tokens"):
        return "its adapter begins at a token of the prompt, which the decoder does not see"
    if start(config) in FROM_DATA:
        return f"init_lora_weights={start(config)} feeds rows to a decoder alone"
    return DECODER_ONLY.get(config.peft_type.value)


def check(config: Any) -> None:
    """Raise UserError for options that do not run here, or that PEFT would pass over."""
    kind = config.peft_type.value
    if kind in ELSEWHERE:
        raise UserError(f"PEFT's {kind} {ELSEWHERE[kind]}")
    if has(config, "arrow_config"):
        raise UserError("method.config.arrow_config routes between LoRA adapters that are trained already; take it out to train one")
    if has(config, "use_qalora"):
        raise UserError("method.config.use_qalora acts on GPTQ's weights alone, which no precision here is; set it to false")
    if has(config, "use_asa") and config.asa_target_subspaces < 2:
        raise UserError("method.config.asa_target_subspaces=1 leaves PEFT's AdaMSS no subspace to train, since it keeps one fewer; set it to 2 or more")
    _check_values(config)


def _check_values(config: Any) -> None:
    """Raise UserError for values of a peft.PeftConfig that train nothing or mean nothing, and that PEFT takes without a word."""
    for key, value in vars(config).items():
        named = f"method.config.{key} is {value!r}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{named}; it takes a finite number")
        by_block = key == "r" and value == 0 and getattr(config, "oft_block_size", 0)
        if key in COUNTS and value is not None and not by_block and (type(value) is not int or value < 1):
            raise UserError(f"{named}; it must be a whole number of at least 1")
        if key.endswith("block_size") and isinstance(value, int) and value < 0:
            raise UserError(f"{named}; it must be at least 0")
        if key.endswith("dropout") and isinstance(value, (int, float)) and not 0 <= value < 1:
            raise UserError(f"{named}; it is a share from 0, below 1")
        if key in ("alpha", "lora_alpha") and isinstance(value, (int, float)) and value <= 0:
            raise UserError(f"{named}, by which the adapter is scaled; it must be above 0")
        if key in PATTERNS and isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise UserError(f"{named}, no regular expression ({error}); fix it, or give a list of names") from error
    if config.inference_mode:
        raise UserError("method.config.inference_mode is True, with which nothing would be trained; leave it out")
    if getattr(config, "prompt_tuning_init", None) == "TEXT" and not (config.prompt_tuning_init_text or "").strip():
        raise UserError("method.config.prompt_tuning_init_text is empty; give words to start from, or set prompt_tuning_init=RANDOM")


def check_start(config: Any, precision: str, quantised: bool) -> None:
    """Raise UserError for an initialisation of LoRA that a base of this precision, or this machine, cannot take."""
    import torch

    name = start(config)
    if quantised and name.startswith(NEEDS_FLOATS):
        fix = "technique=loftq does it beside an nf4 base" if name == "loftq" else "choose precision=auto, fp32 or bf16"
        raise UserError(f"init_lora_weights={name} takes the base's weights apart, and {precision} ones are rounded already; {fix}")
    if name == "loftq" and not torch.cuda.is_available():
        raise UserError("method.config.init_lora_weights=loftq rounds weights on a GPU, and torch finds none; technique=loftq does without")


def fitted(config: Any, model: Any) -> Any:
    """A copy of the config with what it leaves to the model: its tokenizer, its sizes, the layers that the adapter is for.

    Raises:
        UserError: tokens or layers that the model does not have, keys and values that no prefix can be.
    """
    config = copy.deepcopy(config)
    kind, base = config.peft_type.value, architecture.of(model)
    if config.task_type == architecture.ENCODER_DECODER.task != base.task:
        raise UserError(f"method.config.task_type is {config.task_type!r}, and {type(model).__name__} is {base.name}: {base.task}")
    config.task_type = config.task_type and base.task
    if getattr(config, "tokenizer_name_or_path", None) == BASE:
        config.tokenizer_name_or_path = model.config._name_or_path
    if config.is_prompt_learning:
        for key in MODEL_SIZES:
            setattr(config, key, None)
        _fit_prompt(config, model)
    _check_fit(config, model)
    if kind == "DELORA" and not config.delora_lambda:
        config.delora_lambda = DELORA_SHARE * math.sqrt(config.r * model.config.get_text_config().hidden_size)
    if kind == "ADAPTION_PROMPT" and config.adapter_layers is None:
        config.adapter_layers = model.config.get_text_config().num_hidden_layers
    if kind in ("IA3", "LN_TUNING") and config.target_modules is None:
        config.target_modules = kinds.norms(model) if kind == "LN_TUNING" else kinds.keys_and_values(model)
        if kind == "IA3" and config.target_modules:
            config.feedforward_modules = kinds.down_projections(model)
            config.target_modules = [*config.target_modules, *config.feedforward_modules]
        if not config.target_modules:
            what = "norms" if kind == "LN_TUNING" else "layers that make keys and values"
            raise UserError(f"{kind} finds no {what} in {type(model).__name__}; name its modules in method.config.target_modules")
    for key in ("token_indices", "trainable_token_indices"):
        if has(config, key):
            _check_tokens(key, getattr(config, key), model.get_input_embeddings().num_embeddings)
    return config


def _check_fit(config: Any, model: Any) -> None:
    """Raise UserError for names of modules that the model does not have, and for sizes beyond it, before anything is made."""
    names = [name for name, _ in [*model.named_modules(), *model.named_parameters()]]
    for key in NAMED:
        wanted = getattr(config, key, None)
        for word in sorted(wanted) if isinstance(wanted, (list, tuple, set)) else ():
            if not any(name == word or name.endswith(f".{word}") for name in names):
                there = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "in_features")})
                raise UserError(f"this adapter does not fit the model: method.config.{key} names {word}, which it does not have; there are: {', '.join(there)}")
    kind = config.peft_type.value
    if kind in RANKED:
        sizes = [min(m.in_features, m.out_features) for name, m in model.named_modules() if hasattr(m, "in_features") and _is_targeted(config, name)]
        ranks = {RANKED[kind]: getattr(config, RANKED[kind]), **{f"rank_pattern.{k}": v for k, v in (getattr(config, "rank_pattern", None) or {}).items()}}
        for key, rank in ranks.items():
            if type(rank) is not int or rank < 1 or sizes and rank > max(sizes):
                raise UserError(f"method.config.{key} is {rank}; the layers that it names have a rank of at most {max(sizes, default=0)}; lower it")
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    tokens = getattr(config, "num_virtual_tokens", None)
    if tokens and context and tokens >= context:
        raise UserError(f"method.config.num_virtual_tokens is {tokens}, but the model's context is {context} tokens; lower it")


def _is_targeted(config: Any, name: str) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    return config.target_modules in (None, "all-linear") or bool(check_target_module_exists(config, name))


def _check_tokens(key: str, indices: Any, size: int) -> None:
    chosen = [i for each in (indices.values() if isinstance(indices, dict) else [indices]) for i in each]
    beyond = [i for i in chosen if not 0 <= i < size]
    if beyond:
        raise UserError(f"method.config.{key} names the token {beyond[0]}, and the model has {size:,}; name tokens of its own vocabulary")


def _fit_prompt(config: Any, model: Any) -> None:
    """Heads and width of a prefix as the model's cache has them; of other prompts, a number of heads that nothing reads. With an encoder, prompts stand
    before what it reads and a prefix before what its decoder writes, so both are of one part of the model."""
    config.num_transformer_submodules = 1
    if config.peft_type.value not in PREFIXES:
        if architecture.has_encoder(model):
            config.num_layers, config.token_dim, config.num_attention_heads = 1, model.get_input_embeddings().weight.shape[1], 1
        elif not getattr(model.config.get_text_config(), "num_attention_heads", None):
            config.num_attention_heads = 1
        return
    name, tokens = type(model).__name__, config.num_virtual_tokens
    layers = getattr(_cache(model), "layers", ())
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        raise UserError(f"{name} keeps no keys and values of its own that a prefix could be; choose technique=prompt_tuning or an adapter")
    if any(layer.keys.shape != layer.values.shape for layer in layers):
        raise UserError(f"{name} has keys and values of different widths, and PEFT's prefix has one for both; choose technique=prompt_tuning or an adapter")
    windows = [layer.sliding_window for layer in layers if getattr(layer, "sliding_window", None)]
    if windows and min(windows) <= tokens:
        raise UserError(f"{name} sees {min(windows)} tokens back, less than a prefix of {tokens} and a row; lower method.config.num_virtual_tokens")
    shapes = {layer.keys.shape for layer in layers}
    if len(shapes) == 1:
        _, config.num_attention_heads, _, width = shapes.pop()
        config.token_dim = config.num_attention_heads * width
    if architecture.has_encoder(model):
        config.num_layers = len(layers)


def _cache(model: Any) -> Any:
    """What the model keeps of one token for the next ones."""
    import torch

    with torch.no_grad():
        out = model(**architecture.one_token(model), use_cache=True)
    return architecture.self_attention_cache(getattr(out, "past_key_values", None))
