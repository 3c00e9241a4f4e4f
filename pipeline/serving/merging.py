"""What becomes of an adapter when it is folded into weights of fewer bits: `python -m pipeline.evaluate cell=… split=merged`.

Library. The merged weights are rounded to bf16, NF4 and int8, and each model answers the cell's test rows. An adapter's change may be smaller than a
weight's last bit, so that it is rounded away, or the rounding may change more than the adapter did; both are told, from distributions over the answers' tokens.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, write_json
from pipeline.core.settings import Precision
from pipeline.data.rows import by_length, pad
from pipeline.models.base import autocast, load_model, resolve
from pipeline.scoring import answers
from pipeline.scoring.scorer import Scorer, logits_at
from pipeline.serving import export
from pipeline.serving.artefact import Artefact, Base, rows_of

PRECISIONS = ("fp32", "bf16", "nf4", "int8")
READ = 64
"""Test rows whose answers' tokens the distributions are taken at."""
KEPT_LEAST = 0.1
"""Of the adapter's own change of the distributions: below it, it is rounded away."""
NOTHING = 1e-6
"""Nats a token: an adapter that changes less than this has nothing to lose."""


@dataclass(frozen=True)
class Merged:
    """A merged model in one precision.

    drift: nats a token from the adapter beside its base to the merged model (Kullback-Leibler, mean over the answers' tokens of test rows).
    effect: the same from the base to the merged model, both rounded so. change: points of the headline metric against the adapter beside its base.
    verdict: kept; rounded_away (little of the adapter's change is left, or less than all of it and farther from its answers than the base is); too_much (more
    than the adapter's change, and farther from its answers than the base is).
    """

    precision: str
    score: float
    change: float
    drift: float
    effect: float
    verdict: str


@dataclass(frozen=True)
class Truth:
    """attached: headline metric of the adapter beside its base; effect: nats a token from the base to it; merged: one a precision."""

    metric: str
    attached: float
    effect: float
    rows: int
    merged: tuple[Merged, ...]


def truth(artefact: Artefact, rows: Sequence[dict], precisions: Sequence[str] = PRECISIONS) -> Truth:
    """The artefact beside its base, then merged and rounded.

    Raises:
        UserError: what it does cannot be folded into weights.
    """
    if reason := export.refusal(artefact):
        raise UserError(f"{artefact.name} cannot be merged: {reason}")
    metric, base = artefact.settings.task.metric, Base.of(artefact.cfg)
    plain_base = distributions(artefact.scorer(base, base.model, None), rows)
    model, state = artefact.load(base)
    scorer = artefact.scorer(base, model, state)
    beside, attached = distributions(scorer, rows), _score(scorer, rows, metric)
    plain, effect = artefact.method.merged(model) if hasattr(model, "peft_config") else model, divergence(plain_base, beside)
    found = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / artefact.settings.model.name
        export.save(plain, base.tokenizer, folder)
        write_json(folder / "manifest.json", {"name": folder.name})
        del model, plain, scorer
        for name in precisions:
            precision = dataclasses.replace(artefact.settings.precision, name=name)  # type: ignore[arg-type]
            found.append(_merged(artefact, folder, precision, rows, beside, attached, effect, base))
    return Truth(metric, attached, effect, len(rows), tuple(found))


def write(artefact: Artefact, target: Path) -> str:
    """Measure on the cell's test rows, store, and say it in a table."""
    found = truth(artefact, rows_of(artefact.cfg, "test"))
    write_json(target, {"cell": artefact.name, **dataclasses.asdict(found)})
    return f"{table(artefact.name, found)}\n{target}"


def _merged(artefact: Artefact, folder: Path, precision: Precision, rows: Sequence[dict], beside: Any, attached: float, effect: float, base: Base) -> Merged:
    metric, before = artefact.settings.task.metric, Path(artefact.cfg.paths.models) / artefact.cfg.model.name
    answered = []
    for place in (before, folder):
        model = load_model(place, precision, base.device, trust_remote_code=artefact.settings.model.trust_remote_code)
        at = Base(model, base.tokenizer, base.device, resolve(precision, base.device)[1])
        scorer = artefact.scorer(at, model, None)
        answered.append((distributions(scorer, rows), _score(scorer, rows, metric) if place is folder else 0.0))
        del model, at, scorer
    (rounded, _), (after, score) = answered
    drift, own = divergence(beside, after), divergence(rounded, after)
    return Merged(precision.name, score, 100 * (score - attached), drift, own, verdict(effect, own, drift))


def verdict(effect: float, own: float, drift: float) -> str:
    """Of an adapter that changes distributions by `effect`, of whose change `own` is left when both models are rounded, at a distance `drift` from it."""
    if effect < NOTHING:
        return "kept"
    if own < KEPT_LEAST * effect or own < effect < drift:
        return "rounded_away"
    return "too_much" if drift > effect else "kept"


SAID = {"kept": "", "rounded_away": "rounded away", "too_much": "changed by more than the adapter changed the base"}


def table(cell: str, found: Truth) -> str:
    """A line a precision, for people."""
    lines = [f"{cell}: {found.metric} {found.attached:.3f} on {found.rows} rows beside its base, {found.effect:.3g} nats a token from it",
             f"| merged into | {found.metric} | change, points | drift, nats a token | left of the adapter | |", "| --- " * 6 + "|"]
    for one in found.merged:
        left = f"{100 * one.effect / found.effect:.0f}%" if found.effect >= NOTHING else "—"
        lines.append(f"| {one.precision} | {one.score:.3f} | {one.change:+.1f} | {one.drift:.2g} | {left} | {SAID[one.verdict]} |")
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


def divergence(before: Any, after: Any) -> float:
    """Mean Kullback-Leibler divergence, nats a token, of the distributions after from those before [tokens, vocabulary]."""
    return export.divergence(before, after.to(before.device))
