"""From a cell's settings and rows to the plan of its steps: which engine, which micro-batches.

Library of cell.py and benchmarks/forecast.py. The micro-batches come from the functions that make them in a training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.core.settings import Precision, Train
from pipeline.data.rows import Encoded, by_length, step_rows
from pipeline.forecasting.plan import MicroBatch, Plan
from pipeline.forecasting.shape import NoForecast
from pipeline.forecasting.shape import Shape as Model
from pipeline.forecasting.trained import Trained

if TYPE_CHECKING:
    from pipeline.engine.layout import Shape

MOST_STEPS = 200
"""Steps whose rows are looked at."""
WALKED, MOST_PARTS = 5, 3
"""Steps that an eager run is walked through, and micro-batches of each (the longest rows come first)."""


def precision_of(precision: Precision, gpu: bool) -> tuple[str, int]:
    """(how the base is held, bytes of a number of the arithmetic), as pipeline.models.base.resolve has it on a GPU with bf16 or on a CPU."""
    name = precision.name if precision.name != "auto" else ("bf16" if gpu else "fp32")
    compute = precision.compute if precision.compute != "auto" else ("bf16" if gpu else "fp32")
    return name, 2 if (name if name in ("fp32", "bf16") else compute) == "bf16" else 4


def engine_of(train: Train, trained: Trained, model: Model, precision: str, gpu: bool) -> str:
    """eager, hand or captured: which way pipeline.training.stepping takes."""
    if train.engine == "eager" or not gpu or train.checkpointing or precision == "int8":  # 8-bit products wait for the device: no capture
        return "eager"
    whole = trained.parts == {"embedding", "layers", "norm", "head"} and trained.first == 0 and not trained.own_head
    by_hand = {"lora": trained.by_hand and len(set(trained.ranks.values())) == 1, "soft": trained.by_hand, "full": whole and not model.biases}
    biased = any(name not in ("q_proj", "k_proj", "v_proj") for name in model.biases)
    return "hand" if by_hand.get(trained.kind, False) and not biased else "captured"


def plan(model: Model, trained: Trained, train: Train, precision: Precision, examples: Sequence[Sequence[Encoded]], seed: int, total: int, gpu: bool) -> Plan:
    """The plan of a run of `total` steps over these rows.

    Raises:
        NoForecast: no rows.
    """
    if not examples or not total:
        raise NoForecast("there is nothing to train on")
    held, compute = precision_of(precision, gpu)
    engine = engine_of(train, trained, model, held, gpu)
    orders = [step_rows(len(examples), train.batch_size, seed, step) for step in range(min(total, MOST_STEPS))]
    if engine == "eager":
        steps, fed = _eager_steps(examples, orders, train.micro_batch_tokens)
        accumulates = False
    else:
        from pipeline.engine.streams import shapes_of_run

        streamable = engine == "hand" and trained.kind != "soft" and compute == 2
        buckets, streams = shapes_of_run(examples, train, orders, total, streamable, model.layers, model.parameters)
        chosen = streams or buckets
        steps, accumulates = [[_micro(shape) for shape in chosen.all()]], chosen.accumulates
        fed = [(chosen.shape(width).tokens, count) for width, count in chosen.fed.items()]
    paged = train.optimizer == "paged_adamw" and gpu and engine == "eager"
    return Plan(model, trained, held, compute, steps, engine, gpu, precision.double_quantisation, train.checkpointing, paged, accumulates,
                fed=fed, looked=len(orders))


def _micro(shape: Shape) -> MicroBatch:
    return MicroBatch(1 if shape.longest else shape.rows, shape.width, shape.labels, shape.longest, shape.dense)


def _eager_steps(examples: Sequence[Sequence[Encoded]], orders: Sequence[Sequence[int]], most_tokens: int
                 ) -> tuple[list[list[MicroBatch]], list[tuple[int, int]]]:
    """(the heaviest step and the first ones, as far as they need be walked through; cells of every micro-batch)."""
    found = []
    for rows in orders:
        step = [e for r in rows for e in examples[r]]
        lengths = [len(e.ids) for e in step]
        found.append([MicroBatch(len(part), lengths[part[0]] - 1, sum(lengths[i] - step[i].start for i in part))
                      for part in by_length(lengths, most_tokens)])
    heaviest = max(found, key=lambda parts: max(m.rows * m.width for m in parts))
    walked = [parts[:MOST_PARTS] for parts in [*found[: WALKED - 2], heaviest, *found[WALKED - 2 : WALKED - 1]]]
    return walked, [(m.rows * m.width, 1) for parts in found for m in parts]


def equal_rows(rows: int, fed: int, labels: int) -> list[list[Encoded]]:
    """`rows` rows of `fed` tokens of which the last `labels` predict a labelled one."""
    return [[Encoded(range(fed + 1), fed + 1 - labels)]] * rows  # type: ignore[arg-type]
