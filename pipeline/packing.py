"""Cells of one experiment as runs of a pack: what they share, what each is, and how many fit (pipeline/fast/pack.py trains them).

Library of `python -m pipeline.sweep` and `python -m pipeline.cells`. Cells can be packed if they differ in the keys of `DIFFER` alone and
their adapter has a hand-written step; otherwise fast.bind.Unsupported says why not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from pipeline import cell, scoring, synthetic
from pipeline.config import build, plain
from pipeline.data import Encoded, Encoder, Rows, load_rationales, load_rows, step_rows
from pipeline.files import UserError
from pipeline.loop import total_steps
from pipeline.measure import free_bytes
from pipeline.methods.base import Method
from pipeline.model import device_of, load_model, load_tokenizer, most_tokens, resolve
from pipeline.objectives.base import Objective
from pipeline.results import Score
from pipeline.settings import Settings, read

if TYPE_CHECKING:
    from pipeline.fast.pack import Job, Pack, Running, Scored
    from pipeline.fast.shapes import OpenShapes

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
    "changes_when_served": "is changed when it is served",
}
"""What a method may declare that a pack has no place for, and how that is said."""
MEMORY_SHARE = 0.8  # of the free memory that a pack may plan to take
MOST_WIDTHS = 3


@dataclass(frozen=True)
class Member:
    """A cell in a pack. tag: the caller's."""

    cfg: DictConfig
    settings: Settings
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

    def __init__(self, covers: Sequence[DictConfig], shared: cell.Shared) -> None:
        from pipeline.fast.bind import Unsupported

        self.cfg, self.covers, self.shared = covers[0], covers, shared
        self.settings = read(self.cfg)
        self.methods: list[Method] = [build(c.method, "method") for c in covers]
        self.objective: Objective = build(self.cfg.objective, "objective")
        mixed = "synthetic rows are mixed in" if any(map(synthetic.wanted, covers)) else None
        reason = mixed or _differ(covers) or _refusal(self.methods[0], self.objective, self.settings.train.checkpointing)
        if reason:
            raise Unsupported(reason)
        self.device = device_of(self.cfg.device)
        self.precision, self.dtype = resolve(self.settings.precision, self.device)
        self.methods[0].check(self.precision)
        self._rows: dict[tuple[int, int | None], Rows] = {}
        self._examples: dict[str, list[Encoded]] = {}
        scoring.preload(self.settings.task)

    @functools.cached_property
    def starts(self) -> Any:
        from pipeline.fast.starts import Starts

        folder = Path(self.cfg.paths.models) / self.cfg.model.name
        return Starts(load_model(folder, self.settings.precision, self.device, self.shared.stored.get(folder), self.settings.model.trust_remote_code))

    @functools.cached_property
    def encoder(self) -> Encoder:
        train, folder = self.settings.train, Path(self.cfg.paths.models) / self.cfg.model.name
        tokenizer = self.shared.tokenizers.get(folder) or load_tokenizer(folder)
        return Encoder(tokenizer, self.settings.task, most_tokens(self.starts.base, train.max_length), train.too_long)

    @functools.cached_property
    def rationales(self) -> dict[str, dict]:
        return load_rationales(Path(self.cfg.paths.rationales) / self.cfg.task.name / self.cfg.teacher.name) if self.objective.needs_rationales else {}

    @functools.cached_property
    def every(self) -> list[list[Encoded]]:
        """The examples of every row that a cell to come may draw."""
        seeds, counts = {c.seed for c in self.covers}, {c.train_rows for c in self.covers}
        wanted = None if len(seeds) > 1 or None in counts else max(counts)
        return self._encoded(self._load(self.cfg.seed, wanted))

    def job(self, cfg: DictConfig, tag: Any = None) -> Job:
        """A cell as a run of the pack. Raises UserError for a bad setting of it."""
        from pipeline.fast.pack import Job

        settings, method, rows = read(cfg), build(cfg.method, "method"), self._load(cfg.seed, cfg.train_rows)
        train = settings.train
        if train.batch_size > len(rows.train):
            raise UserError(f"train.batch_size={train.batch_size} is larger than the {len(rows.train)} training rows; lower it")
        examples, total = self._encoded(rows), total_steps(train, len(rows.train))
        if not total:
            raise UserError("there is nothing to train; raise train.epochs or train.steps")

        def step(number: int) -> list[Encoded]:
            return [e for r in step_rows(len(examples), train.batch_size, cfg.seed, number) for e in examples[r]]

        return Job(Member(cfg, settings, method, rows, tag), step, lambda: self.starts.make(method, cfg.seed), total, train)

    def slots(self, left: int) -> int:
        """How many runs at once, of `left`: what the free memory holds, and no more than as many rounds need."""
        from pipeline.fast.pack import slot_bytes

        if left == 1:
            return 1
        with self._template() as template:
            need = slot_bytes(template, self._rank(), self.shapes(2, 1), self.encoder.pad_id, self.device, self.dtype)
        most = max(1, min(left, int(free_bytes(self.device) * MEMORY_SHARE) // max(1, need)))
        return -(-left // -(-left // most))

    def shapes(self, slots: int, widths: int) -> OpenShapes:
        from pipeline.fast.shapes import OpenShapes

        rows = max(c.train.batch_size for c in self.covers)
        return OpenShapes(self.every, slots, rows, self.settings.train.micro_batch_tokens * slots, widths)

    def open(self, slots: int, left: int, prune: Callable[[Running], bool] = lambda _: False, keep: bool = False) -> Pack:
        """The pack, warmed up; `left`: runs that it will see. Raises Unsupported; RuntimeError if it runs out of memory."""
        from pipeline.fast.bind import Unsupported
        from pipeline.fast.pack import Pack
        from pipeline.fast.shapes import STEPS_A_WIDTH

        steps = total_steps(self.settings.train, len(self.every)) * -(-left // slots)
        shapes = self.shapes(slots, max(1, min(MOST_WIDTHS, steps // STEPS_A_WIDTH)))
        with self._template() as template:
            pack = Pack(template, slots, self._rank(), shapes, self.encoder.pad_id, self.device, self.dtype, self.score, prune, keep)
        try:
            pack.warm()
        except RuntimeError as error:
            pack.close()
            if cell.out_of_memory(error):
                raise
            raise Unsupported(f"the capture failed ({str(error).splitlines()[0]})") from error
        return pack

    def score(self, pack: Pack, running: list[Running]) -> list[Scored]:
        """Validate runs: choices under all adapters in one pass, generated answers one adapter after another. Keeps (Score, predictions)."""
        from pipeline.fast.pack import Scored

        task, found = self.settings.task, []
        for run, predictions in zip(running, self._predict(pack, running), strict=True):
            scored: Score = scoring.score(predictions, task)
            found.append(Scored(scoring.headline(scored, task.metric), scored.nll if scored.nll is not None else 0.0, (scored, predictions)))
            run.notes += [n for n in [self.encoder.check("the validation rows")] if n]
        return found

    def _predict(self, pack: Pack, running: list[Running]) -> list[list[dict]]:
        task, rows = self.settings.task, max((r.job.name.rows.validation for r in running), key=len)
        limit = max(self.settings.evaluate.batch_tokens, self.settings.train.micro_batch_tokens * pack.slots)
        if task.scoring == "choice":
            items = self._scorer(None).items(rows)
            values = pack.choice_log_likelihoods(running, items, limit)
            counts = [len(r.job.name.rows.validation) for r in running]
            return [scoring.chosen(rows[:count], mine[:count], task) for count, mine in zip(counts, values, strict=True)]
        found = []
        for run in running:
            with self.starts.wrapped(run.job.name.method, pack.adapters.take(run.slot, run.start.weights)) as model:
                found.append(self._scorer(model).predict(run.job.name.rows.validation))
        return found

    def _scorer(self, model: Any) -> scoring.Scorer:
        return scoring.Scorer(model, self.encoder, self.settings.task, self.objective.prompt, self.settings.evaluate.batch_tokens, self.device, self.dtype)

    def _load(self, seed: int, count: int | None) -> Rows:
        if (seed, count) not in self._rows:
            data = Path(self.cfg.paths.data) / self.cfg.task.name
            self._rows[seed, count] = load_rows(data, self.settings.task, count, seed, self.settings.evaluate.validation_share, 0, 0)
        return self._rows[seed, count]

    def _encoded(self, rows: Rows) -> list[list[Encoded]]:
        task, rationales = self.settings.task, self.rationales
        for row in rows.train:
            if row["id"] not in self._examples:
                self._examples[row["id"]] = [self.encoder.example(e) for e in self.objective.examples(row, task, rationales.get(row["id"]))]
        self.encoder.check("the training rows")
        return [self._examples[row["id"]] for row in rows.train]

    def _rank(self) -> int:
        return max(getattr(m.config, "r", None) or 1 for m in self.methods)  # type: ignore[attr-defined]

    def _template(self) -> Any:
        kinds = {str(getattr(m.config, "target_modules", None)): m for m in self.methods}  # type: ignore[attr-defined]
        names = set().union(*(self.starts.names(m) for m in kinds.values()))
        dropout = max(getattr(m.config, "lora_dropout", 0.0) for m in self.methods)  # type: ignore[attr-defined]
        return self.starts.template(self.methods[0], names, self._rank(), dropout)


def _differ(covers: Sequence[DictConfig]) -> str | None:
    """Why these configs cannot share a pack: a key in which they differ."""
    if covers[0].start:
        return "it begins at another cell"
    first = _flat(plain(covers[0]))
    for other in covers[1:]:
        values = _flat(plain(other))
        for key in sorted(first.keys() | values.keys()):
            if first.get(key) != values.get(key) and not any(key == d or key.startswith(f"{d}.") for d in (*DIFFER, "sweep", "tracking")):
                return f"the runs differ in {key}"
    return None


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {key: value for name, part in values.items() for key, value in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()}


def _refusal(method: Method, objective: Objective, checkpointing: bool = False) -> str | None:
    """Why a technique cannot be packed, as far as its method and objective say."""
    if not method.trains:
        return "it trains nothing"
    if checkpointing:
        return "activations are checkpointed"
    if not method.peft:
        return "it trains the base itself or modules that PEFT does not make, of which nothing could be shared"
    own = next((what for declared, what in UNPACKED.items() if getattr(method, declared)), None)
    if own:
        return f"{type(method).__name__} {own}"
    part = objective.own_part or ("reasoning" if objective.reasoning else None)
    return f"{type(objective).__name__} has {part} of its own" if part else None

