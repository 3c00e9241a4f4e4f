"""Writing an artefact as a plain model, and checking that its weights load as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.models import architecture
from pipeline.models.base import autocast, dequantised, quiet
from pipeline.records.results import Result
from pipeline.serving.artefact import Artefact, Base
from pipeline.serving.distances import Fate

ROWS, TOKENS = 8, 24
"""Of drawn tokens that a model answers before and after."""
ROUNDED = 2e-2
"""Nats a token by which merging may change what is computed in 16 or 8 bits; where those choose between experts it is 4e-3 at two layers, else 4e-4."""
EXACT = 1e-4
"""The same for fp32."""


def refusal(artefact: Artefact) -> str | None:
    """Why the artefact cannot be written as plain weights; None if it might be."""
    method = artefact.method
    if artefact.objective.selection:
        return "its answers are chosen among drawn ones by another model, which no weights can do"
    if artefact.objective.scalar_head:
        return "it answers by the rewards of a head, which no language model has a place for"
    if method.own_prompt:
        return "what it does is in the request, before every prompt, and not in weights"
    if method.soft_prompt:
        return "its soft prompt comes before every request's tokens, which no weight of the base can do"
    if method.peft and not method.merges:
        return f"PEFT cannot fold {method.name} into the base's weights"
    if not method.trains and not any(p.name != "artefact.json" for p in artefact.folder.iterdir()):
        return f"it is the untouched base, which is in {Path(artefact.cfg.paths.models) / artefact.cfg.model.name} already"
    return None


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights as safetensors, the config and the tokenizer."""
    if model.config.tie_word_embeddings and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False  # a head that was trained by itself
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> Any:
    """The folder's model, as plain transformers loads it."""
    import transformers

    with quiet():
        return getattr(transformers, architecture.of_folder(folder).auto).from_pretrained(folder, local_files_only=True)


def likelihoods(model: Any, base: Base) -> Any:
    """Log-probabilities of every next token after some drawn ones, fp32 [rows, tokens, vocabulary]: what an export has to keep of a cell's model. An encoder
    reads them, too."""
    import torch

    size = model.config.get_text_config().vocab_size
    ids = torch.randint(size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).to(base.device)
    with torch.no_grad(), autocast(base.device, base.dtype):
        return model.to(base.device).eval()(**architecture.inputs(model, ids)).logits.float().log_softmax(-1)


def quantised(model: Any) -> bool:
    """Whether its linear layers are rounded to 8 or 4 bits."""
    return bool(getattr(model, "quantization_method", None))


def dequantised_base(cfg: Any) -> Any:
    """Likelihoods of a rounded base as a merge begins at it: dequantised, without an adapter."""
    base = Base.of(cfg)
    return likelihoods(dequantised(base.model), base)


def in_words(fate: Fate) -> str:
    """What became of an adapter, as the end of a sentence."""
    left = f"{max(0.0, fate.left):.0%} of the adapter's change is left"
    what = {"rounded_away": f"it is rounded away ({left})", "base_changed": f"{left}, but the precision changes the base by more than the adapter did",
            "too_much": "the model changed by more than the adapter and the rounding of the base explain"}
    return f"{what.get(fate.verdict, left)}: {fate.drift:.2g} nats a token from the adapter, which changes {fate.effect:.2g}"


def tolerance(base: Base, precision: str) -> float:
    """How far an exported model may lie from its cell, in `divergence`; int8 rounds activations too."""
    import torch

    return EXACT if base.dtype == torch.float32 and precision != "int8" else ROUNDED


def differences(model: Any, plain: Any) -> str:
    """Names of weights that a plain load of the exported model lacks, or gives another value; empty if there are none."""
    import torch

    loaded, saved = plain.state_dict(), model.state_dict()
    lost = [n for n in dict.fromkeys([*saved, *loaded]) if n not in loaded or n not in saved or not torch.equal(saved[n].cpu(), loaded[n])]
    return ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")


def about(result: Result, artefact: Artefact) -> dict[str, Any]:
    """Where the model comes from and how it was prompted when it was measured."""
    task = result.config["task"]
    return {
        "cell": f"{result.experiment}/{result.cell}", "technique": result.technique, "base": result.model, "precision": result.precision,
        "task": result.task, "metric": result.metric, "test": getattr(result.test, result.metric) if result.test else None,
        "prompt": artefact.objective.prompt(task["prompt"]) if task.get("prompt") else None, "messages": task.get("messages"),
        "format": "chat" if artefact.settings.task.chat else task.get("format", "plain"),
        "separator": task.get("separator", " "), "choices": task.get("choices"),
        "base_sha256": result.provenance.get("model_sha256"),
    }
