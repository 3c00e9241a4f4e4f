"""A cell as its training begins, and which rows it answers right: what the benchmarks that train without writing a cell stand on (rates, engine_parity).

Library.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class SetUp:
    """run: the training.stepping.Run, None where nothing is to be trained; scorer: of the wrapped model; inputs: rows and encoder."""

    run: Any
    scorer: Any
    inputs: Any


def set_up(words: Sequence[str], shared: Any = None, trains: bool = True) -> SetUp:
    """The cell that Hydra's words compose, its base read and its method in place.

    Args:
        shared: cell.inputs.Shared, base models that were read already; they stay as they are.
    """
    from pipeline.cell.inputs import Shared, build_parts, check, encoded, load_inputs
    from pipeline.cell.run import wrap
    from pipeline.core.compose import compose
    from pipeline.measure.clock import Meter
    from pipeline.objectives.base import TrainingContext
    from pipeline.serving.artefact import scorer_of
    from pipeline.training.loop import total_steps
    from pipeline.training.stepping import Run

    cfg = compose(words)
    parts, meter = build_parts(cfg, ("validation", "test")), Meter(None)
    check(parts)
    meter.device = parts.device
    mine = dataclasses.replace(shared, stored={folder: copy.deepcopy(model) for folder, model in shared.stored.items()}) if shared else Shared()
    with meter.phase("load"):
        inputs = load_inputs(parts, mine, meter)
        wrapped = wrap(parts, inputs, meter)
    if not trains:
        return SetUp(None, wrapped.scorer, inputs)
    model, train = wrapped.scorer.model, parts.settings.train
    examples = encoded(parts, inputs.encoder, inputs.rows.train, inputs.rows.rationales)
    total = total_steps(train, len(examples))
    parts.method.before_training(model, total)
    context = TrainingContext(cfg, parts.settings, model, inputs.encoder, inputs.rows.train, parts.device, parts.dtype, scorer_of)
    prepared = parts.objective.prepared(examples, context)
    run = Run(model, parts.method, parts.objective, prepared.examples, train, cfg.seed, total, parts.device, parts.dtype, inputs.encoder.pad_id)
    return SetUp(run, wrapped.scorer, inputs)


def right_rows(scorer: Any, rows: Sequence[Any]) -> dict[str, Any]:
    """rows, right, nll (nats or None), and `bits`: hexadecimal, a leading 1 and then a bit a row, 1 where it was answered right."""
    from pipeline.scoring import answers

    predictions = scorer.predict(rows)
    score = answers.score(predictions, scorer.task)
    right = "".join("1" if p["correct"] else "0" for p in predictions)
    nll = None if score.nll is None else round(score.nll, 4)
    return {"rows": len(rows), "right": right.count("1"), "nll": nll, "bits": f"{int('1' + right, 2):x}"}
