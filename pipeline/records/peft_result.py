"""A result in the format of PEFT's method comparison."""

from __future__ import annotations

from typing import Any

from pipeline.core.files import read_json
from pipeline.core.peft_files import DEFAULTS, experiment_name, read_training
from pipeline.records.results import Result

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "nf4": "int4"}


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
            "peft_branch": "main", "train_config": settings, "peft_config": read_json(path), "error_msg": result.error or "",
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
    entries = [{"step": h["step"], "valid accuracy": h["validation_metric"], "train loss": h["loss"], "train samples": h["step"] * batch}
             for h in result.history if "validation_metric" in h]
    if result.test is None or result.work is None:
        return entries
    last = {"step": result.work.steps, "test accuracy": result.test.accuracy, "train loss": result.history[-1]["loss"] if result.history else None,
            "train samples": result.work.steps * batch, "train total tokens": result.work.tokens}
    return [*entries, last]
