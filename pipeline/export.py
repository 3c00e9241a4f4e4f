"""Write a finished cell's model as one folder that plain transformers loads: weights merged, tokenizer beside them.

    python -m pipeline.export cell=results/quick/lora-s0-n160 to=exported/lora

    AutoModelForCausalLM.from_pretrained("exported/lora")        that is all; neither PEFT nor this project is needed

An adapter is folded into its base (a quantised base is dequantised first), a fine-tuned model is written as it is. The folder is loaded
back and compared with the model in memory before it is kept. Techniques that no weights can hold are refused by name: soft prompts,
prompts with demonstrations, adapters with modules of their own. export.json says how the model wants to be prompted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.config import entry
from pipeline.files import UserError, atomic_folder, folder_bytes, write_json
from pipeline.results import Result
from pipeline.serving import Artefact, Base, finished, held


def run(cfg: DictConfig) -> int:
    """Load the artefact, merge it, write it, and look whether it comes back."""
    if not cfg.cell or not cfg.to:
        raise UserError("pipeline.export needs a finished cell and a folder to write; add cell=results/<experiment>/<cell> to=<folder>")
    result, target = finished(cfg.cell), Path(cfg.to)
    config = held(result, cfg)
    artefact = Artefact.at(result.cell, Path(cfg.cell) / "artefact", config)
    if reason := refusal(artefact):
        raise UserError(f"{result.technique} cannot be exported: {reason}")
    base = Base.of(config)
    model = artefact.load(base)[0]
    plain = artefact.method.merged(model) if hasattr(model, "peft_config") else model
    with atomic_folder(target, "export.json", "cell") as beside:
        save(plain, base.tokenizer, beside)
        if lost := differences(plain, beside):
            raise UserError(f"{result.technique} cannot be exported: a plain {type(plain).__name__} has no place for {lost}")
        write_json(beside / "export.json", about(result, artefact))
    print(f"{result.cell} -> {target}: {folder_bytes(target) / 2**20:,.0f} MiB, loads with AutoModelForCausalLM.from_pretrained({str(target)!r})")
    return 0


def refusal(artefact: Artefact) -> str | None:
    """Why no weights can hold what the artefact does; None if they might."""
    method = artefact.method
    if method.own_prompt:
        return "what it does stands in the request, before every prompt, and not in weights"
    if method.soft_prompt:
        return "its soft prompt stands before every request's own tokens, which no weight of the base can hold"
    if method.peft and not method.merges:
        return f"PEFT cannot fold {method.name} into the base's weights"
    if not method.trains and not any(p.name != "artefact.json" for p in artefact.folder.iterdir()):
        return f"it is the untouched base, which lies in {Path(artefact.cfg.paths.models) / artefact.cfg.model.name} already"
    return None


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights as safetensors, the config and the tokenizer."""
    if model.config.tie_word_embeddings and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False  # a head that was trained by itself
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def differences(model: Any, folder: Path) -> str:
    """Names of weights that a plain load of the folder lacks, or gives another value; empty if there are none."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.model import quiet

    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    there, here = plain.state_dict(), model.state_dict()
    lost = [n for n in dict.fromkeys([*here, *there]) if n not in there or n not in here or not torch.equal(here[n].cpu(), there[n])]
    return ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")


def about(result: Result, artefact: Artefact) -> dict[str, Any]:
    """Where the model comes from and how it was prompted when it was measured."""
    task = result.config["task"]
    return {
        "cell": f"{result.experiment}/{result.cell}", "technique": result.technique, "base": result.model, "precision": result.precision,
        "task": result.task, "metric": result.metric, "test": getattr(result.test, result.metric) if result.test else None,
        "prompt": artefact.objective.prompt(task["prompt"]), "format": task.get("format", "plain"),
        "separator": task.get("separator", " "), "choices": task.get("choices"),
        "base_sha256": result.provenance.get("model_sha256"),
    }


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
