"""PEFT's own adapter files (adapter_config.json, training_params.json) as values of a config: the resolver `peft_file`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, closest, read_object
from pipeline.core.imports import import_peft

ADAPTER = "adapter_config.json"
TRAINING = "training_params.json"
DEFAULTS: dict[str, Any] = {
    "model_id": "", "dtype": "bfloat16", "max_seq_length": 768, "batch_size": 4, "batch_size_eval": 50, "max_steps": 5000, "eval_steps": 250,
    "compile": False, "use_gc": False, "query_template": "{query}", "seed": 0, "grad_norm_clip": 1.0, "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}, "lr_scheduler": "cosine", "use_amp": False, "autocast_adapter_dtype": True,
    "generation_kwargs": {}, "attn_implementation": None, "init_kv_cache_prefix": None,
}
"""The keys of training_params.json and, where they say how an adapter learns, the comparison's own defaults."""
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16", "int8": "int8", "int4": "nf4"}

OPTIMIZERS = {"AdamW": {"lr", "weight_decay"}, "lora+": {"lr", "weight_decay", "loraplus_weight_decay", "loraplus_lr_ratio"},
              "lora-fa": {"lr", "weight_decay", "r", "lora_alpha"}, "riemannian": {"lr", "weight_decay", "reg"}}
SCHEDULES = {"cosine": "cosine", None: "constant"}


def read_adapter(path: str) -> Any:
    """The peft.PeftConfig of an adapter_config.json.

    Raises:
        UserError: no such file, not JSON, an unknown peft_type, or values that PEFT refuses.
    """
    import_peft()
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if Path(path).name != ADAPTER:
        raise UserError(f"technique.path={path} is not named {ADAPTER}; PEFT reads files of that name, one a folder")
    kind = _json(Path(path), "technique.path").get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = sorted(str(getattr(k, "value", k)) for k in PEFT_TYPE_TO_CONFIG_MAPPING)
        raise UserError(f"{path} has peft_type {kind!r}, which this version of PEFT does not know; it knows {', '.join(known)}")
    try:
        config = PeftConfig.from_pretrained(str(Path(path).parent))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path} is refused by PEFT: {' '.join(str(error).split())}") from error
    config.task_type = config.task_type or "CAUSAL_LM"  # as the comparison's own runner, which loads causal models alone
    config.inference_mode = False
    return config


def read_training(path: str) -> dict[str, Any]:
    """What training_params.json beside an adapter_config.json says; empty where there is none.

    Raises:
        UserError: an unknown key, or an optimiser, schedule or initialisation that our loop does not have.
    """
    file = Path(path).parent / TRAINING
    if not file.exists():
        return {}
    training = _json(file, "technique.path")
    for key in training:
        if key not in DEFAULTS:
            raise UserError(f"{file} has an unknown key {key!r}{closest(key, DEFAULTS)}; it takes {', '.join(DEFAULTS)}")
    kind, options = training.get("optimizer_type", "AdamW"), training.get("optimizer_kwargs", {})
    for key, value, known in (("optimizer_type", kind, OPTIMIZERS), ("dtype", training.get("dtype", "bfloat16"), PRECISIONS),
                              ("lr_scheduler", training.get("lr_scheduler", "cosine"), SCHEDULES)):
        if value not in known:
            raise UserError(f"{file} has {key} {value!r}; this loop has {', '.join('null' if k is None else str(k) for k in known)}")
    foreign = sorted(set(options) - OPTIMIZERS[kind])
    if foreign:
        raise UserError(f"{file} has optimizer_kwargs.{foreign[0]}; with {kind} this loop takes {', '.join(sorted(OPTIMIZERS[kind]))}")
    if training.get("init_kv_cache_prefix") and (kind := read_adapter(path).peft_type.value) not in ("PREFIX_TUNING", "CARTRIDGE"):
        raise UserError(f"{file} has init_kv_cache_prefix, at whose text a prefix begins, and the adapter is {kind}; take the key out")
    return training


def value(path: str, key: str, default: Any = None) -> Any:
    """One value for a cell's config, for the resolver: what the files say, else `default`.

    The budget (steps, batch_size, max_length) is the files' where they name it and the experiment's otherwise; how the
    adapter learns (lr, weight_decay, schedule, max_grad_norm) falls back on PEFT's defaults.
    """
    if key == "name":
        return experiment_name(path).replace("/", "--")
    if key == "sha256":
        if not Path(path).is_file():
            raise UserError(f"technique.path={path} is not a file; name an {ADAPTER}")
        files = [Path(path), Path(path).parent / TRAINING]
        return hashlib.sha256(b"\0".join(f.read_bytes() for f in files if f.exists())).hexdigest()
    training = read_training(path)
    options = {**DEFAULTS["optimizer_kwargs"], **training.get("optimizer_kwargs", {})}
    read = {
        "lr": float(options["lr"]), "weight_decay": float(options.get("weight_decay", 0.0)), "schedule": SCHEDULES[training.get("lr_scheduler", "cosine")],
        "max_grad_norm": float(training.get("grad_norm_clip", 1.0)) or 1e9, "steps": training.get("max_steps"), "batch_size": training.get("batch_size"),
        "max_length": training.get("max_seq_length"), "precision": PRECISIONS[training["dtype"]] if "dtype" in training else None,
    }[key]
    return default if read is None else read


def experiment_name(path: str) -> str:
    """<method>/<experiment> of …/<method>/<experiment>/adapter_config.json."""
    return "/".join(Path(path).absolute().parts[-3:-1])


def find(path: str) -> list[Path]:
    """The adapter_config.json files at or below a path. Raises UserError where there is none."""
    there = Path(path)
    files = [there] if there.is_file() else sorted(there.rglob(ADAPTER))
    if not files:
        raise UserError(f"technique.path={path} holds no adapter_config.json; name one, or a folder of <method>/<experiment>/adapter_config.json")
    return files


def _json(file: Path, key: str) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{key}={file} is not a file; name an {ADAPTER}")
    return read_object(file)
