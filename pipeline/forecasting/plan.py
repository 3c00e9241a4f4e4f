"""A training as a forecast sees it: shape, technique, precision, engine, micro-batches, and the constants that were fitted.

Library. The micro-batches come from the functions that make them in a training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.core.settings import Precision, Train
from pipeline.data.rows import Encoded, by_length, step_rows
from pipeline.engine import families
from pipeline.engine.layout import SUMMED_FP32
from pipeline.forecasting.shape import NoForecast, Shape
from pipeline.forecasting.trained import Trained
from pipeline.training.ranks import Ranks


@dataclass(frozen=True)
class MicroBatch:
    """rows x width tokens (padding counted, soft ones not) with so many labelled ones."""

    rows: int
    width: int
    labels: int
    longest: int = 0
    """Tokens of the longest row where rows stand one after another in `width` tokens (then rows is 1)."""
    dense: bool = False
    """Every position carries a label, in order."""


@dataclass(frozen=True)
class Plan:
    shape: Shape
    trained: Trained
    precision: str
    """The base's precision: fp32, bf16, int8 or nf4."""
    compute: int
    """Bytes of a number of the arithmetic: 2 (bf16) or 4."""
    steps: Sequence[Sequence[MicroBatch]]
    """Of one optimiser step or more, in turn."""
    engine: str
    """eager, hand (the fast engine's hand-written step), captured (the fast engine with autograd) or sharded (FSDP2)."""
    gpu: bool = True
    double_quantisation: bool = True
    checkpointing: bool = False
    paged: bool = False
    """bitsandbytes' paged optimiser, whose state is not the allocator's."""
    accumulates: bool = False
    """Whether a step has several micro-batches."""
    warm: bool = False
    """Whether the eager optimiser's states are there from the start (a step like all but the first)."""
    fed: Sequence[tuple[int, int]] = ()
    """(cells of a micro-batch: tokens, padding counted; how many such there are) in the steps that were looked at."""
    looked: int = 0
    """How many steps those were."""
    ranks: int = 1
    """GPUs that share every step (train.parallel); the plan is that of the one with the longest rows."""

    @property
    def base(self) -> int:
        """Bytes of a number of the base where it is not quantised."""
        return {"fp32": 4, "bf16": 2}.get(self.precision, self.compute)


@dataclass(frozen=True)
class Constants:
    """What the arithmetic does not give. `python -m benchmarks.forecast fit` sets them (experiments/forecast/)."""

    product_workspace: int = 32 * 2**20
    """Bytes that cuBLAS takes once for every thread and stream that multiplies (32 MiB on Hopper, torch's default)."""
    scale: Mapping[str, float] = field(default_factory=dict)
    """By engine: reserved over simulated bytes beyond the loaded model (kernels' own workspaces, another order of frees); 1 if not there."""
    fixed: Mapping[str, int] = field(default_factory=dict)
    """By engine: bytes beside what is simulated."""
    context: int = 600 * 2**20
    """Bytes of a card that CUDA, its libraries and kernels take outside the allocator."""
    communication: int = 2**30
    """The same of NCCL, where several train together; a guess until it is measured."""
    cpu_process: int = 582 * 10**6
    """Resident bytes of a process beside its tensors: 525 MiB before the first step and 30 of libraries and small objects that steps touch."""

    def outside(self, plan: Plan) -> int:
        """Bytes of a card that are not the allocator's."""
        return self.context + (self.communication if plan.ranks > 1 else 0) if plan.gpu else 0

    def of(self, plan: Plan) -> tuple[float, int]:
        """(scale, fixed) of the plan's engine; on a CPU, fixed is the process."""
        return self.scale.get(plan.engine, 1.0), self.fixed.get(plan.engine, 0) if plan.gpu else self.cpu_process


MOST_STEPS = 200
"""Steps whose rows are looked at."""
WALKED, MOST_PARTS = 5, 3
"""Steps that an eager run is walked through, and micro-batches of each (the longest rows come first)."""


def precision_of(precision: Precision, gpu: bool) -> tuple[str, int]:
    """(the base's precision, bytes of a number of the arithmetic), as pipeline.models.base.resolve has it on a GPU with bf16 or on a CPU."""
    name = precision.name if precision.name != "auto" else ("bf16" if gpu else "fp32")
    compute = precision.compute if precision.compute != "auto" else ("bf16" if gpu else "fp32")
    return name, 2 if (name if name in ("fp32", "bf16") else compute) == "bf16" else 4


def engine_of(train: Train, trained: Trained, model: Shape, precision: str, gpu: bool) -> str:
    """eager, hand, captured or sharded: which way pipeline.training takes."""
    if train.parallel == "fsdp":
        return "sharded"
    if train.engine == "eager" or not gpu or train.checkpointing or precision == "int8":  # 8-bit products wait for the device: no capture
        return "eager"
    whole = trained.parts == {"embedding", "layers", "norm", "head"} and trained.first == 0 and not trained.own_head
    by_hand = {"lora": trained.by_hand and len(set(trained.ranks.values())) == 1, "soft": trained.by_hand, "full": whole}
    biased = any(name not in ("q_proj", "k_proj", "v_proj") for name in model.biases)
    rounded = trained.kind != "lora" and families.FAMILIES[model.family].large and precision != "fp32"
    return "hand" if by_hand.get(trained.kind, False) and model.by_hand and not biased and not rounded else "captured"


def training_plan(model: Shape, trained: Trained, train: Train, precision: Precision, examples: Sequence[Sequence[Encoded]], seed: int, total: int,
                  gpu: bool, ranks: int = 1) -> Plan:
    """The plan of a run of `total` steps over these rows, of the first of so many ranks. Raises NoForecast: no rows."""
    if not examples or not total:
        raise NoForecast("there is nothing to train on")
    base, compute = precision_of(precision, gpu)
    engine = engine_of(train, trained, model, base, gpu)
    orders = [step_rows(len(examples), train.batch_size, seed, step) for step in range(min(total, MOST_STEPS))]
    if ranks > 1:
        examples = [Ranks(0, ranks).share([e for r in rows for e in examples[r]]) for rows in orders]
        orders = [[step] for step in range(len(orders))]
    if engine in ("eager", "sharded"):
        steps, fed = _eager_steps(examples, orders, train.micro_batch_tokens)
        accumulates = False
    else:
        from pipeline.engine.streams import shapes_of_run

        streamable = engine == "hand" and trained.kind != "soft" and compute == 2
        buckets, streams = shapes_of_run(examples, train, orders, total, streamable, model.layers, model.parameters)
        chosen = streams or buckets
        parts = [MicroBatch(1 if s.longest else s.rows, s.width, s.labels, s.longest, s.dense) for s in chosen.all()]
        steps, accumulates = [parts], chosen.accumulates or (ranks > 1 and trained.count <= SUMMED_FP32)
        fed = [(chosen.shape(width).tokens, count) for width, count in chosen.fed.items()]
    paged = train.optimizer == "paged_adamw" and gpu and engine == "eager"
    return Plan(model, trained, base, compute, steps, engine, gpu, precision.double_quantisation, train.checkpointing, paged, accumulates,
                fed=fed, looked=len(orders), ranks=ranks)


def _eager_steps(examples: Sequence[Sequence[Encoded]], orders: Sequence[Sequence[int]], most_tokens: int
                 ) -> tuple[list[list[MicroBatch]], list[tuple[int, int]]]:
    """(the heaviest step and the first ones, as far as they need be walked through; cells of every micro-batch)."""
    steps = []
    for rows in orders:
        step = [e for r in rows for e in examples[r]]
        lengths = [len(e.ids) for e in step]
        steps.append([MicroBatch(len(part), lengths[part[0]] - 1, sum(lengths[i] - step[i].start for i in part))
                      for part in by_length(lengths, most_tokens)])
    heaviest = max(steps, key=lambda parts: max(m.rows * m.width for m in parts))
    walked = [parts[:MOST_PARTS] for parts in [*steps[: WALKED - 2], heaviest, *steps[WALKED - 2 : WALKED - 1]]]
    return walked, [(m.rows * m.width, 1) for parts in steps for m in parts]


def equal_rows(rows: int, fed: int, labels: int) -> list[list[Encoded]]:
    """`rows` rows of `fed` tokens of which the last `labels` predict a labelled one."""
    return [[Encoded(range(fed + 1), fed + 1 - labels)]] * rows  # type: ignore[arg-type]
