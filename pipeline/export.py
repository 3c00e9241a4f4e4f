"""Write a finished cell's model as one folder that plain transformers loads: weights merged, tokenizer beside them.

    python -m pipeline.export cell=results/quick/lora-s0-n160 to=exported/lora

    AutoModelForCausalLM.from_pretrained("exported/lora")        that is all; neither PEFT nor this project is needed (AutoModelForSeq2SeqLM for a T5)

An adapter is folded into its base (a quantised base is dequantised first), a fine-tuned model is written as it is. The folder is loaded
back, and its weights and answers are compared with the cell's before it is kept; an adapter that the merge rounded away is told in a warning.
Techniques that no weights can hold are refused by name: soft prompts, prompts with demonstrations, adapters with modules of their own.
export.json says how the model wants to be prompted, and what the merge left of the adapter.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.core.commands import entry
from pipeline.core.files import UserError, atomic_folder, folder_bytes, write_json
from pipeline.models import architecture
from pipeline.records.finished import cell_config, finished
from pipeline.serving.artefact import Artefact, Base
from pipeline.serving.distances import divergence, fate
from pipeline.serving.export import about, dequantised_base, differences, in_words, likelihoods, load, quantised, refusal, save, tolerance


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Load the artefact, merge it, write it, and look whether it comes back."""
    if not cfg.cell or not cfg.to:
        raise UserError("pipeline.export needs a finished cell and a folder to write; add cell=results/<experiment>/<cell> to=<folder>")
    result, target = finished(cfg.cell), Path(cfg.to)
    config = cell_config(result, cfg)
    artefact = Artefact.at(result.cell, Path(cfg.cell) / "artefact", config)
    if reason := refusal(artefact):
        raise UserError(f"{result.technique} cannot be exported: {reason}")
    base = Base.of(config)
    before, rounded = likelihoods(base.model, base), quantised(base.model)
    model = artefact.load(base)[0]
    answers, merges = likelihoods(model, base), hasattr(model, "peft_config")
    plain = artefact.method.merged(model) if merges else model
    with atomic_folder(target, "export.json", "cell") as beside:
        save(plain, base.tokenizer, beside)
        loaded = load(beside)
        if lost := differences(plain, loaded):
            raise UserError(f"{result.technique} cannot be exported: a plain {type(plain).__name__} has no place for {lost}")
        after = likelihoods(loaded, base)
        if not (far := divergence(answers, after)) <= tolerance(base, result.precision):
            raise UserError(f"{result.technique} cannot be exported: merged, its answers lie {far:.2g} nats a token from the cell's")
        merged = fate(before, answers, dequantised_base(config) if rounded else before, after) if merges else None
        write_json(beside / "export.json", {**about(result, artefact), "merged": merged and dataclasses.asdict(merged)})
    if merged and merged.verdict != "kept":
        print(f"warning: merged, {in_words(merged)}; python -m pipeline.evaluate cell={cfg.cell} split=merged measures it on the test rows", file=sys.stderr)
    print(f"{result.cell} -> {target}: {folder_bytes(target) / 2**20:,.0f} MiB, loads with {architecture.of(plain).auto}.from_pretrained({str(target)!r})")
    return 0


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
