"""PEFT's own files: adapter_config.json, training_params.json beside it, and the result files of its method comparison.

Library. The layout is that of method_comparison/MetaMathQA in the PEFT repository: <method>/<experiment>/adapter_config.json
with an optional training_params.json. conf/technique/peft_config.yaml reads values of both through the resolver `peft_file`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.files import UserError, closest, read_json
from pipeline.results import Result

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
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "nf4": "int4"}
OPTIMIZERS = {"AdamW": {"lr", "weight_decay"}, "lora+": {"lr", "weight_decay", "loraplus_weight_decay", "loraplus_lr_ratio"}}
SCHEDULES = {"cosine": "cosine", None: "constant"}


def read_adapter(path: str) -> Any:
    """The peft.PeftConfig of an adapter_config.json.

    Raises:
        UserError: no such file, not JSON, an unknown peft_type, or values that PEFT refuses.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if Path(path).name != ADAPTER:
        raise UserError(f"technique.path={path} is not named {ADAPTER}; PEFT reads files of that name, one a folder")
    kind = _json(Path(path), "technique.path").get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
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
    held = _json(file, "technique.path")
    for key in held:
        if key not in DEFAULTS:
            raise UserError(f"{file} has an unknown key {key!r}{closest(key, DEFAULTS)}; it takes {', '.join(DEFAULTS)}")
    kind, options = held.get("optimizer_type", "AdamW"), held.get("optimizer_kwargs", {})
    for key, value, known in (("optimizer_type", kind, OPTIMIZERS), ("dtype", held.get("dtype", "bfloat16"), PRECISIONS),
                              ("lr_scheduler", held.get("lr_scheduler", "cosine"), SCHEDULES)):
        if value not in known:
            raise UserError(f"{file} has {key} {value!r}; this loop has {', '.join('null' if k is None else str(k) for k in known)}")
    foreign = sorted(set(options) - OPTIMIZERS[kind])
    if foreign:
        raise UserError(f"{file} has optimizer_kwargs.{foreign[0]}; with {kind} this loop takes {', '.join(sorted(OPTIMIZERS[kind]))}")
    if held.get("init_kv_cache_prefix"):
        raise UserError(f"{file} begins a prefix at the text of init_kv_cache_prefix, which is not built; take the key out to begin at random")
    return held


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
    held = read_training(path)
    options = {**DEFAULTS["optimizer_kwargs"], **held.get("optimizer_kwargs", {})}
    found = {
        "lr": float(options["lr"]), "weight_decay": float(options.get("weight_decay", 0.0)), "schedule": SCHEDULES[held.get("lr_scheduler", "cosine")],
        "max_grad_norm": float(held.get("grad_norm_clip", 1.0)) or 1e9, "steps": held.get("max_steps"), "batch_size": held.get("batch_size"),
        "max_length": held.get("max_seq_length"), "precision": PRECISIONS[held["dtype"]] if "dtype" in held else None,
    }[key]
    return default if found is None else found


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


def as_peft_result(result: Result) -> dict[str, Any]:
    """A result in the format of the comparison's results/<method>--<experiment>.json; what it measures and we do not is null.

    accelerator_memory_max is the peak of our training memory (Memory.kind says which counter) without the baseline.
    """
    path, train = result.config["technique"]["path"], result.config["train"]
    work, size, memory, phases = result.work, result.size, result.memory, result.phases
    settings = {
        **DEFAULTS, **read_training(path), "model_id": result.model, "seed": result.seed, "dtype": DTYPES.get(result.precision),
        "batch_size": train["batch_size"], "max_steps": work.steps if work else 0, "max_seq_length": train["max_length"],
    }
    settings["optimizer_kwargs"] = {**settings["optimizer_kwargs"], "lr": train["lr"], "weight_decay": train["weight_decay"]}
    peak = memory.peak_bytes - (memory.baseline_bytes or 0) if memory and memory.peak_bytes is not None else None
    versions = result.provenance.get("packages", {})
    return {
        "run_info": {
            "created_at": result.provenance.get("started"), "total_time": phases.wall_s if phases else None, "experiment_name": experiment_name(path),
            "peft_branch": "main", "train_config": settings, "peft_config": json.loads(Path(path).read_text(encoding="utf-8")),
            "error_msg": result.error or "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None, "accelerator_memory_max": peak, "accelerator_memory_reserved_99th": None,
            "train_time": phases.train_s if phases else None, "file_size": size.artefact_bytes if size else None,
            "num_trainable_params": size.trainable if size else None, "num_total_params": size.total if size else None,
            "status": "success" if result.status == "ok" else "canceled", "metrics": _metrics(result),
        },
        "meta_info": {
            "model_info": {"sha": result.provenance.get("model_sha256"), "created_at": None},
            "dataset_info": {result.task: {"sha": result.provenance.get("data_sha256"), "created_at": None}},
            "package_info": {f"{name}-version": versions.get(name) for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch")},
            "system_info": {"system": result.hardware.get("platform"), "processor": result.hardware.get("cpu"),
                            "accelerator": result.hardware.get("gpu") or result.hardware.get("device")},
            "pytorch_info": f"torch {versions.get('torch')}",
        },
    }


def _metrics(result: Result) -> list[dict[str, Any]]:
    """One entry a validation and a last one for the test split, under the comparison's keys."""
    batch = result.config["train"]["batch_size"]
    found = [{"step": h["step"], "valid accuracy": h["validation_metric"], "train loss": h["loss"], "train samples": h["step"] * batch}
             for h in result.history if "validation_metric" in h]
    if result.test is None or result.work is None:
        return found
    last = {"step": result.work.steps, "test accuracy": result.test.accuracy, "train loss": result.history[-1]["loss"] if result.history else None,
            "train samples": result.work.steps * batch, "train total tokens": result.work.tokens}
    return [*found, last]


def _json(file: Path, key: str) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{key}={file} is not a file; name an {ADAPTER}")
    held = read_json(file)
    if not isinstance(held, dict):
        raise UserError(f"{file} is not a JSON object; write the keys of PEFT's own config there")
    return held
