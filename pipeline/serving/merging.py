"""What becomes of an adapter when it is folded into weights of fewer bits: `python -m pipeline.evaluate cell=… split=merged`.

Library. The merged weights are rounded to bf16, NF4, int8 and GGUF's Q8_0, and each model answers the cell's test rows. An adapter's change may be smaller
than a weight's last bit, so that it is rounded away, or a merge may change more than the adapter and the rounding of any model explain. Both are told,
from distributions over the answers' tokens of four models: the base and the adapter beside it, and the base and the merged model in those bits.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, write_json
from pipeline.data.rows import by_length, pad
from pipeline.models import architecture
from pipeline.models.base import autocast, cast, dequantised, load_model, resolve
from pipeline.records.evaluations import SAID, TITLES, Merged, Truth, run_of
from pipeline.records.results import Result
from pipeline.scoring import answers
from pipeline.scoring.scorer import Scorer, logits_at
from pipeline.serving import export, gguf_rounding
from pipeline.serving.artefact import Artefact, Base, rows_of
from pipeline.serving.distances import NOTHING, divergence, fate

READ = 64
"""Test rows whose answers' tokens the distributions are taken at."""


def truth(artefact: Artefact, rows: Sequence[dict], precisions: Sequence[str] = tuple(TITLES)) -> Truth:
    """The artefact beside its base, then merged and rounded.

    Raises:
        UserError: what it does cannot be folded into weights; an encoder-decoder.
    """
    import torch

    if reason := export.refusal(artefact):
        raise UserError(f"{artefact.name} cannot be merged: {reason}")
    if architecture.of_folder(Path(artefact.cfg.paths.models) / artefact.cfg.model.name) is architecture.ENCODER_DECODER:
        what = f"split=merged compares how a prompt is continued, and the base of {artefact.name} is {architecture.ENCODER_DECODER.name}"
        raise UserError(f"{what}; pipeline.export merges it and says what is left")
    metric, base = artefact.settings.task.metric, Base.of(artefact.cfg)
    quantised = export.quantised(base.model)
    alone = distributions(artefact.scorer(base, base.model, None), rows)
    with tempfile.TemporaryDirectory() as place:
        before, after = (Path(place) / name / artefact.settings.model.name for name in ("base", "merged"))
        _keep(dequantised(base.model) if quantised else base.model, base, before)
        base = Base.of(artefact.cfg) if quantised else base
        model, state = artefact.load(base)
        scorer = artefact.scorer(base, model, state)
        beside, attached = distributions(scorer, rows), _score(scorer, rows, metric)
        if hasattr(model, "peft_config"):
            model = artefact.method.merged(model if quantised else cast(model, torch.float32))  # else merging rounds to the base's own bits already
        _keep(model, base, after)
        names = [name for name in precisions if name != "q8_0" or gguf_rounding.suits(model)]
        del model, scorer
        found = []
        for name in names:
            rounded, _ = _answered(artefact, before, name, rows[:READ], base)
            merged, score = _answered(artefact, after, name, rows, base)
            one = fate(alone, beside, rounded, merged)
            found.append(Merged(name, score, 100 * (score - attached), one.drift, one.base_drift, one.left, one.verdict))
    return Truth(metric, attached, divergence(alone, beside), len(rows), tuple(found))


def write(result: Result, artefact: Artefact, target: Path) -> str:
    """Measure on the test rows (evaluate.test_rows of this command: how many; null: all), store, and say it in a table."""
    found = truth(artefact, rows_of(artefact.cfg, "test"))
    write_json(target, {"cell": artefact.name, "run": run_of(result), **dataclasses.asdict(found)})
    return f"{table(artefact.name, found)}\n{target}"


def _keep(model: Any, base: Base, folder: Path) -> None:
    """A model's folder as `load_model` reads it."""
    export.save(model, base.tokenizer, folder)
    write_json(folder / "manifest.json", {"name": folder.name})


def _answered(artefact: Artefact, folder: Path, name: str, rows: Sequence[dict], base: Base) -> tuple[Any, float]:
    """(distributions, headline metric on the rows) of the folder's model in this precision."""
    of_gguf = name == "q8_0"
    precision = dataclasses.replace(artefact.settings.precision, name="fp32" if of_gguf else name)  # type: ignore[arg-type]
    model = load_model(folder, precision, base.device, trust_remote_code=artefact.settings.model.trust_remote_code)
    model = gguf_rounding.to_q8_0(model) if of_gguf else model
    scorer = artefact.scorer(Base(model, base.tokenizer, base.device, resolve(precision, base.device)[1]), model, None)
    return distributions(scorer, rows), _score(scorer, rows, artefact.settings.task.metric)


def table(cell: str, found: Truth) -> str:
    """A line a precision, for people."""
    lines = [f"{cell}: {found.metric} {found.attached:.3f} on {found.rows} rows beside its base, {found.effect:.3g} nats a token from it",
             f"| merged into | {found.metric} | change, points | drift, nats a token | the base's own | left of the adapter | |", "| --- " * 7 + "|"]
    for one in found.merged:
        left = f"{max(0.0, 100 * one.left):.0f}%" if found.effect >= NOTHING else "—"
        figures = f"{one.score:.3f} | {one.change:+.1f} | {one.drift:.2g} | {one.base_drift:.2g} | {left}"
        lines.append(f"| {TITLES[one.precision]} | {figures} | {SAID[one.verdict]} |")
    return "\n".join(lines)


def _score(scorer: Scorer, rows: Sequence[dict], metric: str) -> float:
    return answers.headline(answers.score(scorer.predict(rows), scorer.task), metric)


def distributions(scorer: Scorer, rows: Sequence[dict]) -> Any:
    """Log-probabilities of every token at the tokens of the right answers of the first READ rows, fp32 [tokens, vocabulary]."""
    import torch

    encoder, parts = scorer.encoder, []
    scorer.model.eval()
    encoded = []
    for row in rows[:READ]:
        said = encoder.answer(row["answer"])
        encoded.append((encoder.fit(encoder.prompt(scorer.prompt(row["prompt"])), len(said)), said))
    with torch.inference_mode(), autocast(scorer.device, scorer.dtype):
        for part in by_length([len(prompt) + len(said) for prompt, said in encoded], scorer.batch_tokens):
            ids = pad([(encoded[i][0] + encoded[i][1])[:-1] for i in part], encoder.pad_id).to(scorer.device)
            at = [(i, row, len(encoded[i][0]) - 1 + k) for row, i in enumerate(part) for k in range(len(encoded[i][1]))]
            _, rows_at, cols = (torch.tensor(each, device=scorer.device) for each in zip(*at, strict=True))
            parts.append(logits_at(scorer.model, ids, rows_at, cols).log_softmax(-1))
    return torch.cat(parts)
