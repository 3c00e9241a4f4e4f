"""What a cell is made of and what it reads before it trains; a pack and the cells of one experiment read the same, once for several."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell import identity
from pipeline.core.collector import collected_once, uncollected
from pipeline.core.compose import build, plain
from pipeline.core.files import Unsuited, UserError, read_object
from pipeline.core.imports import import_peft, import_transformers
from pipeline.core.names import class_of
from pipeline.core.settings import Settings, Task
from pipeline.core.settings import read as read_settings
from pipeline.data.rows import Encoded, Encoder, Rows, check_prepared, load_rationales, load_rows
from pipeline.data.splits import named as labels_in_words
from pipeline.measure import turns
from pipeline.measure.clock import Meter
from pipeline.methods.base import QUANTISED, Method
from pipeline.models import architecture, rates
from pipeline.models.base import device_of, load_model, load_stored, load_tokenizer, manifest, most_tokens, quiet, resolve
from pipeline.objectives.base import Objective
from pipeline.records.results import Synthetic
from pipeline.scoring import answers, per_row
from pipeline.scoring.probes import Probing
from pipeline.serving.artefact import started
from pipeline.teachers.synthetic import rows as synthetic


@dataclass
class Shared:
    """What the cells of one experiment read once, before each runs in a child process of its own."""

    stored: dict[Path, Any] = field(default_factory=dict)
    tokenizers: dict[Path, Any] = field(default_factory=dict)
    threads: int | None = None
    """Threads for the cell to compute with, where the process before the fork used one."""
    at_once: int = 1
    """How many cells may be under way on the device, this one among them."""
    turns: Path | None = None
    """The folder by which they take turns (measure/turns.py); None: they do not."""
    gate: Path | None = None
    """The gate (measure/turns.py) that a cell which has loaded waits at, before it is asked or trained; None: there is none."""

    def preload(self, folder: Path, trust_remote_code: bool) -> None:
        """Read a base model and its tokenizer on the CPU, and import what every cell imports."""
        self.tokenizers[folder] = load_tokenizer(folder, trust_remote_code)
        self.stored[folder] = load_stored(folder, trust_remote_code)


def preload(missing: Sequence[DictConfig], read: Callable[[Shared], object] = lambda _: None) -> Shared:
    """Import and read what the cells share, on one thread and without touching a GPU: forked children start clean.

    Args:
        read: is called once base and tokenizer are there, for work in other processes that needs no more; the rest is imported meanwhile.
    """
    import torch

    shared = Shared(threads=torch.get_num_threads())
    torch.set_num_threads(1)
    task = read_settings(missing[0]).task
    trial = _tried(task) if torch.version.cuda else None
    with uncollected():
        import_transformers()
        for folder, trusted in {Path(c.paths.models) / c.model.name: read_settings(c).model.trust_remote_code for c in missing}.items():
            shared.preload(folder, trusted)
    read(shared)
    with uncollected():
        if trial is None:
            import peft  # noqa: F401
            import sklearn.metrics  # noqa: F401
        elif _passed(trial):
            _import_all(task)
    return shared


def _import_all(task: Task) -> None:
    import_peft()
    answers.preload(task)


def _tried(task: Task) -> BaseProcess:
    """A process that imports what cells import and then has a process of its own ask for the GPU: whether this one may do the same."""
    process = get_context("fork").Process(target=_try, args=(task,))
    process.start()
    return process


def _try(task: Task) -> None:
    _import_all(task)
    child = get_context("fork").Process(target=_start_gpu)
    child.start()
    child.join()
    os._exit(child.exitcode or 0)


def _start_gpu() -> None:
    import torch

    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (what fails here is no news)
    torch.cuda.init()


def _passed(trial: BaseProcess) -> bool:
    trial.join()
    return trial.exitcode == 0


def rounds_nothing(cfg: DictConfig) -> bool:
    """Whether no model that the cell may load is rounded, its start and teachers among them, and a method of PEFT's is trained."""
    rounded = cfg.precision.name in QUANTISED or cfg.train.optimizer != "adamw"
    return "config" in cfg.method and not rounded and not cfg.start and not identity.reads(cfg)


@dataclass(frozen=True)
class Parts:
    """A cell's config as objects. splits: those to score (None: all that the settings ask for); precision: its name, resolved; dtype: of the arithmetic."""

    cfg: DictConfig
    splits: tuple[str, ...] | None
    settings: Settings
    method: Method
    objective: Objective
    device: Any
    precision: str
    dtype: Any

    def wants(self, split: str) -> bool:
        return self.splits is None or split in self.splits

    @property
    def data(self) -> Path:
        """The prepared task's folder."""
        return Path(self.cfg.paths.data) / self.cfg.task.name

    @property
    def model(self) -> Path:
        """The base model's folder."""
        return Path(self.cfg.paths.models) / self.cfg.model.name

    @property
    def rationales(self) -> Path:
        """The folder of what the teacher wrote."""
        return Path(self.cfg.paths.rationales) / self.cfg.task.name / self.cfg.teacher.name


def build_parts(cfg: DictConfig, splits: tuple[str, ...] | None = None) -> Parts:
    """Raises UserError naming a bad key, or a device that is not there."""
    settings, device = rates.read(cfg), device_of(cfg.device)
    precision, dtype = resolve(settings.precision, device)
    return Parts(cfg, splits, settings, build(cfg.method, "method"), build(cfg.objective, "objective"), device, precision, dtype)


def check_ahead(cfg: DictConfig) -> None:
    """Raise UserError for what a cell lacks, or what does not go together, as far as that can be told without torch, in a blink."""
    settings, method = read_settings(cfg), class_of(plain(cfg)["method"], "method")
    check_prepared(Path(cfg.paths.data) / cfg.task.name, cfg.task.name)
    per_row.of(settings.task)
    if not method.answers_without_model:
        manifest(Path(cfg.paths.models) / cfg.model.name)
    _check_batch(cfg, settings, method)
    check_parallel(cfg, settings, method, class_of(plain(cfg)["objective"], "objective"))


def check_parallel(cfg: DictConfig, settings: Settings, method: Any, objective: Any) -> None:
    """Raise UserError for what several GPUs cannot train together, naming it. method, objective: their classes."""
    train, name = settings.train, cfg.technique.name
    if train.parallel == "none" or not method.trains:
        return
    asked = f"train.parallel={train.parallel}"
    if train.parallel == "fsdp" and not method.shards:
        raise UserError(f"{asked} shards full fine-tuning, and {name} trains less than all weights; choose train.parallel=ddp")
    if objective.own_batches or objective.trainer != "loop":
        raise UserError(f"{asked} deals out the rows of a step, and the objective of {name} makes batches of its own; choose train.parallel=none")
    if method.plans_training is True:
        raise UserError(f"{asked} sums the ranks' losses, and {name} adds a penalty to each; choose train.parallel=none")
    if cfg.pack:
        raise UserError(f"{asked} gives one training several GPUs, pack=true one GPU several trainings; choose one of them")
    if cfg.memory_limit_gb is not None:
        raise UserError(f"memory_limit_gb watches one process, and {asked} has several; leave it out")
    if train.gpus is not None and train.gpus > train.batch_size:
        raise UserError(f"train.gpus={train.gpus} is more than train.batch_size={train.batch_size}, the rows of a step; lower it or raise the batch")


def _check_batch(cfg: DictConfig, settings: Settings, method: Any) -> None:
    rows = cfg.train_rows
    if method.trains and rows is not None and settings.train.batch_size > rows:
        raise UserError(f"train.batch_size={settings.train.batch_size} is larger than train_rows={rows}; lower it or raise train_rows")


def check(parts: Parts) -> None:
    """Raise UserError for parts that do not go together, before anything is loaded."""
    parts.method.check(parts.precision)
    _check_architecture(parts)
    start = parts.cfg.start
    if start and parts.precision in QUANTISED:
        raise UserError(f"start={start} begins at that cell's plain weights, and {parts.precision} ones are rounded; choose precision=auto, fp32 or bf16")
    _check_batch(parts.cfg, parts.settings, parts.method)
    check_parallel(parts.cfg, parts.settings, parts.method, parts.objective)


def _check_architecture(parts: Parts) -> None:
    """Raise UserError where the base is an encoder-decoder, and the technique is for a decoder alone."""
    reason = parts.method.decoder_only or parts.objective.decoder_only
    if reason and architecture.of_folder(parts.model) is architecture.ENCODER_DECODER:
        with named(parts):
            raise UserError(f"{reason}, and the base is {architecture.ENCODER_DECODER.name}; choose another technique=<name>, "
                            f"or {architecture.DECODER.name} with model=<name>")


@contextlib.contextmanager
def named(parts: Parts) -> Iterator[None]:
    """A refusal from inside says which technique and architecture it is about; one of settings that the rows do not suit is about neither."""
    try:
        yield
    except Unsuited:
        raise
    except UserError as error:
        if not (parts.model / "manifest.json").exists():
            raise
        kind = read_object(parts.model / "config.json").get("model_type", "a model without model_type")
        raise UserError(f"technique={parts.cfg.technique.name} on {kind}: {error}") from error


@dataclass(frozen=True)
class Inputs:
    """What a cell has read. Without a model to ask, rows alone.

    rows: those to train on are as the objective wants them, labelled ones first; labelled: how many these are. base: the untouched model, or what
    `start` names, frozen; encoder: its tokenizer with the task's format; probing: what the untouched base knows, where forgetting is measured.
    """

    rows: Rows
    labelled: int
    synthetic: Synthetic | None = None
    base: Any = None
    encoder: Any = None
    probing: Probing | None = None
    notes: tuple[str, ...] = ()


def load_inputs(parts: Parts, shared: Shared, meter: Meter) -> Inputs:
    """Read all of it, and seed torch's generator before anything is drawn. Raises UserError: not prepared, or fewer rows than asked for."""
    cfg = parts.cfg
    rows = dataclasses.replace(load_task(parts, cfg.seed, cfg.train_rows), rationales=load_taught(parts))
    if parts.method.answers_without_model:
        return Inputs(rows, len(rows.train))
    import torch

    rows, labelled, mixed = training_rows(parts, rows)
    turns.beside()
    meter.device = parts.device  # which a meter waits for, and so starts
    base, encoder = load_pair(parts, shared)
    notes, probing = [cfg.model.get("note"), *draw_notes(rows, parts.method.takes_rows)], None
    torch.manual_seed(cfg.seed)
    if parts.wants("forgetting") and parts.settings.evaluate.forgetting and not parts.objective.scalar_head:
        with meter.phase("evaluate"):
            probing = Probing(cfg, parts.settings, encoder.tokenizer, base)
        notes.append(probing.note)
    if cfg.start:
        dtype, base = base.dtype, None  # two models at once would be twice the memory
        base, before = started(cfg, dtype)
        spent = f"{before.phases.train_s:.3g} s of training" if before.phases else "training"
        notes.append(f"begins at {before.experiment}/{before.cell}, whose {spent} on {before.train_rows} rows is not counted here")
    return Inputs(rows, labelled, mixed, base, encoder, probing, tuple(filter(None, notes)))


def load_task(parts: Parts, seed: int, train_rows: int | None) -> Rows:
    """The task's rows of the splits that are wanted. Raises UserError as load_rows."""
    evaluate = parts.settings.evaluate
    test_rows = evaluate.test_rows if parts.wants("test") else 0
    transfer_rows = evaluate.transfer_rows if parts.wants("transfer") else 0
    return load_rows(parts.data, parts.settings.task, train_rows, seed, evaluate.validation_share, test_rows, transfer_rows)


def draw_notes(rows: Rows, takes_rows: bool) -> list[str]:
    """What the draw of rows lacks: labels that no training row has, validation rows."""
    choices = (rows.train or rows.test or [{"choices": None}])[0]["choices"] or []
    fixed = all(row["choices"] == choices for row in (*rows.train, *rows.test))
    missing = [choice for choice in choices if choice not in {row["answer"] for row in rows.train}] if fixed and takes_rows else []
    said = [f"no training row has {labels_in_words(missing)}: draw more rows (train_rows)"] if missing and len(missing) < len(choices) else []
    return said + (["validated on 1 row, which tells nothing: choose more training rows"] if len(rows.validation) == 1 and takes_rows else [])


def load_taught(parts: Parts) -> dict[str, dict]:
    """What the teacher wrote, by row id; nothing where the technique needs none. Raises UserError where it is missing."""
    if not (parts.method.answers_without_model or parts.objective.needs_rationales):
        return {}
    rationales = load_rationales(parts.rationales)
    if not rationales:
        raise UserError(f"{parts.cfg.technique.name} learns from a teacher, but {parts.rationales} is empty; choose another teacher")
    return rationales


def training_rows(parts: Parts, rows: Rows) -> tuple[Rows, int, Synthetic | None]:
    """(the rows with those to train on, how many of them are labelled, what the others are). Raises UserError where a batch has more than there are."""
    if not parts.method.trains:
        return rows, len(rows.train), None
    cfg, batch_size = parts.cfg, parts.settings.train.batch_size
    written, mixed = synthetic.extra(cfg, rows.train)
    labelled = parts.objective.rows(rows.train, rows.rationales, cfg.train_rows, cfg.seed)
    train = [*labelled, *written]
    if batch_size > len(train):
        raise UserError(f"train.batch_size={batch_size} is larger than the {len(train)} training rows; lower it")
    return dataclasses.replace(rows, train=train), len(labelled), mixed


def load_pair(parts: Parts, shared: Shared) -> tuple[Any, Encoder]:
    """The base and its encoder: the tokenizer is read while the weights move to their device."""
    with quiet(), ThreadPoolExecutor(1) as reader:
        tokenizer: list[Future[Any]] = []
        base = load_base(parts, shared, lambda: tokenizer.append(reader.submit(_load_tokenizer, parts, shared)))
        return base, _encoder(parts, tokenizer[0].result(), base)


def load_base(parts: Parts, shared: Shared, meanwhile: Callable[[], object] = lambda: None) -> Any:
    """The untouched base model on its device, frozen. meanwhile: is called before the weights move, or are rounded, which leaves Python to others."""
    trusted, stored = parts.settings.model.trust_remote_code, shared.stored.get(parts.model)
    with named(parts):
        if stored is None and parts.precision not in QUANTISED:
            stored = load_stored(parts.model, trusted)
        meanwhile()
        return load_model(parts.model, parts.settings.precision, parts.device, stored, trusted)


def load_encoder(parts: Parts, shared: Shared, base: Any) -> Encoder:
    return _encoder(parts, _load_tokenizer(parts, shared), base)


def _load_tokenizer(parts: Parts, shared: Shared) -> Any:
    if parts.model in shared.tokenizers:
        return shared.tokenizers[parts.model]
    with collected_once():
        return load_tokenizer(parts.model, parts.settings.model.trust_remote_code)


def _encoder(parts: Parts, tokenizer: Any, base: Any) -> Encoder:
    train = parts.settings.train
    return Encoder(tokenizer, parts.settings.task, most_tokens(base, train.max_length), train.too_long, architecture.start_id(base))


def encoded(parts: Parts, encoder: Encoder, rows: Sequence[dict], rationales: dict[str, dict]) -> list[list[Encoded]]:
    """The training examples of every row. `encoder.check` then reports texts that were too long."""
    every = [parts.objective.examples(row, parts.settings.task, rationales.get(row["id"])) for row in rows]
    flat = [e for examples in every for e in examples]
    with encoder.reading([e.prompt for e in flat], [text for e in flat for text in (e.answer, *([e.prefill] if e.prefill else []))]):
        return [[encoder.example(e) for e in examples] for examples in every]
