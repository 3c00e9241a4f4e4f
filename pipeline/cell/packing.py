"""Cells whose training is packed: which may go together, the child process that trains them at once, and what it leaves for each."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from omegaconf import DictConfig

from pipeline.cell import identity, inputs
from pipeline.cell.child import run_in_child
from pipeline.cell.evaluation import ranked
from pipeline.cell.launch import INTERRUPTED
from pipeline.core import signals
from pipeline.core.compose import build
from pipeline.core.files import UserError, atomic_path
from pipeline.data.rows import Encoded, Encoder, Rows, step_rows
from pipeline.engine import options
from pipeline.measure import memory as measure_memory
from pipeline.measure.clock import Stopwatch
from pipeline.measure.memory import free_bytes
from pipeline.methods.base import Method
from pipeline.objectives.base import Objective
from pipeline.records.finished import name as cell_name
from pipeline.records.results import Work
from pipeline.scoring import answers, scorer
from pipeline.scoring.per_row import measured
from pipeline.teachers.synthetic import rows as synthetic
from pipeline.training.loop import total_steps

if TYPE_CHECKING:
    from pipeline.engine.layout import OpenShapes
    from pipeline.training.pack import Job, Pack, Running, Scored

DIFFER = (
    "seed", "train_rows", "variant", "method.config.r", "method.config.lora_alpha", "method.config.target_modules", "method.config.use_rslora",
    "method.config.lora_dropout",
    "train.lr", "train.weight_decay", "train.max_grad_norm", "train.schedule", "train.warmup_share", "train.epochs", "train.steps", "train.min_steps",
    "train.batch_size", "train.validations",
)
"""Keys in which cells of a pack may differ."""
UNPACKED = {
    "prepares": "prepares something before training", "chooses": "chooses among states", "own_prompt": "has prompts of its own",
    "plans_training": "plans over the steps", "own_optimizer_groups": "has optimizer groups of its own", "acts_between_steps": "acts between steps",
    "corrects_gradients": "corrects its gradients",
    "changes_when_served": "is changed when it is served",
}
"""What a method may declare that a pack has no place for, and how that is said."""
MEMORY_SHARE = 0.8  # of the free memory that a pack may plan to take
MOST_WIDTHS = 3
ONLY = ("validation",)
"""The splits that a pack scores; the others are each cell's own affair."""


@dataclass(frozen=True)
class Member:
    """A cell in a pack. tag: the caller's."""

    cfg: DictConfig
    method: Method
    rows: Rows
    tag: Any = None


class Packing:
    """What the cells of a pack share; the base is loaded by `open`.

    Args:
        covers: configs that between them hold the extremes of what is to come: the highest rank, the largest batch, every set of modules.
        shared: base models and tokenizers that were read already.

    Raises:
        Unsupported: the cells cannot be packed. UserError: bad input.
    """

    def __init__(self, covers: Sequence[DictConfig], shared: inputs.Shared) -> None:
        from pipeline.engine.parts import Unsupported

        self.covers, self.shared = covers, shared
        self.parts = parts = inputs.build_parts(covers[0], ONLY)
        self.methods: list[Method] = [build(c.method, "method") for c in covers]
        mixed = "synthetic rows are mixed in" if any(map(synthetic.wanted, covers)) else None
        reason = mixed or _differ(covers) or _refusal(parts.method, parts.objective, parts.settings.train.checkpointing)
        if reason:
            raise Unsupported(reason)
        parts.method.check(parts.precision)
        self._rows: dict[tuple[int, int | None], Rows] = {}
        self._examples: dict[str, list[Encoded]] = {}
        answers.preload(parts.settings.task)

    @functools.cached_property
    def initializer(self) -> Any:
        from pipeline.training.adapter_init import AdapterInitializer

        return AdapterInitializer(inputs.load_base(self.parts, self.shared))

    @functools.cached_property
    def encoder(self) -> Encoder:
        return inputs.load_encoder(self.parts, self.shared, self.initializer.base)

    @functools.cached_property
    def rationales(self) -> dict[str, dict]:
        return inputs.load_taught(self.parts)

    @functools.cached_property
    def every(self) -> list[list[Encoded]]:
        """The examples of every row that a cell to come may draw."""
        seeds, counts = {c.seed for c in self.covers}, {c.train_rows for c in self.covers}
        wanted = None if len(seeds) > 1 or None in counts else max(counts)
        return self._encoded(self._load(self.covers[0].seed, wanted))

    def job(self, cfg: DictConfig, tag: Any = None) -> Job:
        """A cell as a run of the pack. Raises UserError for a bad setting of it."""
        from pipeline.training.pack import Job

        parts = inputs.build_parts(cfg, ONLY)
        rows, _, _ = inputs.training_rows(parts, self._load(cfg.seed, cfg.train_rows))
        train = parts.settings.train
        examples, total = self._encoded(rows), total_steps(train, len(rows.train))
        if not total:
            raise UserError("there is nothing to train; raise train.epochs or train.steps")

        def step(number: int) -> list[Encoded]:
            return [e for r in step_rows(len(examples), train.batch_size, cfg.seed, number) for e in examples[r]]

        return Job(Member(cfg, parts.method, rows, tag), step, lambda: self.initializer.make(parts.method, cfg.seed), total, train)

    def slots(self, left: int) -> int:
        """How many runs at once, of `left`: what the free memory holds, and no more than as many rounds need."""
        from pipeline.training.pack import slot_bytes

        if left == 1:
            return 1
        with self._template() as template:
            need = slot_bytes(template, self._rank(), self.shapes(2, 1), self.encoder.pad_id, self.parts.device, self.parts.dtype)
        most = max(1, min(left, int(free_bytes(self.parts.device) * MEMORY_SHARE) // max(1, need)))
        return -(-left // -(-left // most))

    def shapes(self, slots: int, widths: int) -> OpenShapes:
        from pipeline.engine.layout import OpenShapes

        rows = max(c.train.batch_size for c in self.covers)
        return OpenShapes(self.every, slots, rows, self.parts.settings.train.micro_batch_tokens * slots, widths)

    def open(self, slots: int, left: int, prune: Callable[[Running], bool] = lambda _: False, keep: bool = False) -> Pack:
        """The pack, warmed up; `left`: runs that it will see. Raises Unsupported; RuntimeError if it runs out of memory."""
        from pipeline.engine.layout import STEPS_A_WIDTH
        from pipeline.engine.parts import Unsupported
        from pipeline.training.pack import Pack

        steps = total_steps(self.parts.settings.train, len(self.every)) * -(-left // slots)
        shapes = self.shapes(slots, max(1, min(MOST_WIDTHS, steps // STEPS_A_WIDTH)))
        with self._template() as template:
            pack = Pack(template, slots, self._rank(), shapes, self.encoder.pad_id, self.parts.device, self.parts.dtype, self.score, prune, keep)
        try:
            pack.warm()
        except RuntimeError as error:
            pack.close()
            if measure_memory.out_of_memory(error):
                raise
            raise Unsupported(f"the capture failed ({str(error).splitlines()[0]})") from error
        return pack

    def score(self, pack: Pack, running: list[Running]) -> list[Scored]:
        """Validate runs: choices under all adapters in one pass, generated answers one adapter after another. Keeps (Score, predictions)."""
        from pipeline.training.pack import Scored

        task, scores = self.parts.settings.task, []
        for run, predicted in zip(running, self._predict(pack, running), strict=True):
            predictions = measured(predicted, run.job.name.rows.validation, task)
            scored = answers.score(predictions, task)
            scores.append(Scored(*ranked(scored, task.metric_name), (scored, predictions)))
            run.notes += [n for n in [self.encoder.check("the validation rows")] if n]
        return scores

    def _predict(self, pack: Pack, running: list[Running]) -> list[list[dict]]:
        task, rows = self.parts.settings.task, max((r.job.name.rows.validation for r in running), key=len)
        limit = max(self.parts.settings.evaluate.batch_tokens, self.parts.settings.train.micro_batch_tokens * pack.slots)
        if task.scoring == "choice":
            items = self._scorer(None).items(rows)
            values = pack.choice_log_likelihoods(running, items, limit)
            counts = [len(r.job.name.rows.validation) for r in running]
            return [answers.chosen(rows[:count], mine[:count], task) for count, mine in zip(counts, values, strict=True)]
        predictions = []
        for run in running:
            with self.initializer.wrapped(run.job.name.method, pack.adapters.take(run.slot, run.init.weights)) as model:
                predictions.append(self._scorer(model).predict(run.job.name.rows.validation))
        return predictions

    def _scorer(self, model: Any) -> scorer.Scorer:
        parts, settings = self.parts, self.parts.settings
        return scorer.Scorer(model, self.encoder, settings.task, parts.objective.prompt, settings.evaluate.batch_tokens, parts.device, parts.dtype)

    def _load(self, seed: int, count: int | None) -> Rows:
        if (seed, count) not in self._rows:
            self._rows[seed, count] = inputs.load_task(self.parts, seed, count)
        return self._rows[seed, count]

    def _encoded(self, rows: Rows) -> list[list[Encoded]]:
        new = [row for row in rows.train if row["id"] not in self._examples]
        self._examples.update(zip([row["id"] for row in new], inputs.encoded(self.parts, self.encoder, new, self.rationales), strict=True))
        self.encoder.check("the training rows")
        return [self._examples[row["id"]] for row in rows.train]

    def _rank(self) -> int:
        return max(getattr(m.config, "r", None) or 1 for m in self.methods)  # type: ignore[attr-defined]

    def _template(self) -> Any:
        kinds = {str(getattr(m.config, "target_modules", None)): m for m in self.methods}  # type: ignore[attr-defined]
        names = set().union(*(self.initializer.names(m) for m in kinds.values()))
        dropout = max(getattr(m.config, "lora_dropout", 0.0) for m in self.methods)  # type: ignore[attr-defined]
        return self.initializer.template(self.methods[0], names, self._rank(), dropout)


def _differ(covers: Sequence[DictConfig]) -> str | None:
    """Why these configs cannot share a pack: a key in which they differ."""
    if covers[0].start:
        return "it begins at another cell"
    first = dict(identity.flat(identity.decides(covers[0])))
    for other in covers[1:]:
        values = dict(identity.flat(identity.decides(other)))
        for key in sorted(first.keys() | values.keys()):
            if first.get(key) != values.get(key) and not any(key == d or key.startswith(f"{d}.") for d in DIFFER):
                return f"the runs differ in {key}"
    return None


def _refusal(method: Method, objective: Objective, checkpointing: bool = False) -> str | None:
    """Why a technique cannot be packed, as far as its method and objective say."""
    if not method.trains:
        return "it trains nothing"
    if checkpointing:
        return "activations are checkpointed"
    if not method.peft:
        return "it trains the base itself or modules that PEFT does not make, of which nothing could be shared"
    reason = next((what for declared, what in UNPACKED.items() if getattr(method, declared)), None)
    if reason:
        return f"{type(method).__name__} {reason}"
    adapter = method.config  # type: ignore[attr-defined]
    if reason := options.refused(adapter.peft_type.value, options.changed(adapter), shared=True):
        return reason
    part = objective.own_part or ("reasoning" if objective.reasoning else None)
    return f"{type(objective).__name__} has {part} of its own" if part else None


def packs(cfg: DictConfig) -> bool:
    """Whether seeds of such a cell can train at once, as far as its method and objective say."""
    return _refusal(build(cfg.method, "method"), build(cfg.objective, "objective"), cfg.train.checkpointing) is None


SHARED_ENERGY = "energy was not measured: it was trained at once with others, whose energy is one figure"


def groups(missing: Sequence[DictConfig], across: Sequence[str] = ("seed",)) -> list[list[DictConfig]]:
    """The cells with pack=true that may train at once: those that differ in these keys alone."""
    by_config: dict[str, list[DictConfig]] = {}
    for cfg in missing:
        if cfg.pack:
            same = {k: v for k, v in identity.decides(cfg).items() if k not in across}
            by_config.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(cfg)
    return [group for group in by_config.values() if len(group) > 1]


def train(group: Sequence[DictConfig], shared: inputs.Shared) -> None:
    """Train a group at once if it can be packed; otherwise they are left to train by themselves, and the reason is said.

    Raises:
        UserError: the packed runs ended with an error. KeyboardInterrupt: ended by a signal.
    """
    slots: int | None = len(group)
    while slots and slots > 1 and len(left := [c for c in group if not identity.packed_of(c).exists() and not identity.checkpoint_of(c).exists()]) > 1:
        names = ", ".join(cell_name(c) for c in left)
        ended = attempt(lambda tell: _train(left, shared, slots, tell), shared, left[0].memory_limit_gb)  # noqa: B023
        if ended.refused:
            print(f"one after another, because {ended.refused}: {names}", flush=True)
            break
        if not ended.out_of_memory:
            break
        slots = ended.fewer()
        print(f"{ended.slots} at once ran out of memory: {names}", flush=True)


def _train(group: Sequence[DictConfig], shared: inputs.Shared, most: int | None, tell: Callable[[int], None]) -> None:
    watch = Stopwatch()
    packing = Packing(group, shared)
    slots = min(most or 1, packing.slots(len(group)))
    tell(slots)
    pack = packing.open(slots, len(group), keep=True)
    warmup_s = watch.lap() / len(group)
    jobs = [packing.job(cfg) for cfg in group]

    def take(free: int) -> list[Job]:
        taken, jobs[:] = jobs[:free], jobs[free:]
        return taken

    def done(run: Running) -> None:
        _keep(run, slots, warmup_s)
        print(f"{cell_name(run.job.name.cfg)}: trained with {slots} at once, {run.step} steps", flush=True)

    try:
        with signals.handled(pack.stop):
            pack.run(take, done)
    finally:
        pack.close()


def _keep(run: Running, slots: int, warmup_s: float) -> None:
    import torch

    seen = run.tokens + run.padding
    work = Work(steps=run.step, tokens=run.tokens, padding_share=run.padding / seen if seen else None, energy_note=SHARED_ENERGY,
                engine="handwritten", diverged_at=run.diverged_at)
    training = {"weights": run.weights, "history": run.history, "notes": run.notes, "work": dataclasses.asdict(work), "slots": slots,
            "train_s": run.seconds, "warmup_s": warmup_s}
    with atomic_path(identity.packed_of(run.job.name.cfg)) as beside:
        torch.save(training, beside)


REFUSED, OUT_OF_MEMORY = 74, 75
"""Exit codes of the child, beside a cell's."""


@dataclass(frozen=True)
class Ended:
    """refused: why the runs cannot be packed. out_of_memory: whether memory did not suffice for `slots` at once."""

    slots: int = 1
    refused: str | None = None
    out_of_memory: bool = False

    def fewer(self) -> int | None:
        """How many to try at once now; None: single runs are left."""
        return self.slots // 2 or None


def attempt(work: Callable[[Callable[[int], None]], None], shared: inputs.Shared, memory_limit_gb: float | None) -> Ended:
    """Run `work(tell)` in a child process; it calls tell(slots) once it knows how many run at once.

    Raises:
        UserError: the child ended with an error (shown above it). KeyboardInterrupt: it was ended by a signal.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as note:  # has no name, so that no kill leaves it behind
        done = run_in_child(lambda: _child(work, shared, note), int(memory_limit_gb * 2**30) if memory_limit_gb else None)
        note.seek(0)
        said = {key: value for line in note for key, value in json.loads(line).items()}
    if done.code == INTERRUPTED:
        raise KeyboardInterrupt
    if done.out_of_memory or done.code == OUT_OF_MEMORY:
        return Ended(said.get("slots", 1), out_of_memory=True)
    if done.code not in (0, REFUSED):
        raise UserError(f"the packed runs ended with code {done.code} (see above); fix the cause and run again")
    return Ended(said.get("slots", 1), said.get("refused"))


def _child(work: Callable[[Callable[[int], None]], None], shared: inputs.Shared, note: IO[str]) -> int:
    import torch

    from pipeline.engine.parts import Unsupported

    if shared.threads:
        torch.set_num_threads(shared.threads)
    try:
        work(lambda slots: print(json.dumps({"slots": slots}), file=note, flush=True))
    except Unsupported as reason:
        print(json.dumps({"refused": str(reason)}), file=note, flush=True)
        return REFUSED
    except (MemoryError, RuntimeError) as error:
        if not measure_memory.out_of_memory(error):
            raise
        return OUT_OF_MEMORY
    return 0
