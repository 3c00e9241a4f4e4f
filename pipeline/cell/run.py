"""One cell: a technique is trained and evaluated in this process, and its result, predictions and artefact written.

Library; the entries are `python -m pipeline.train` (one cell) and `python -m pipeline.cells` (an experiment's).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from pipeline.cell import identity
from pipeline.cell.identity import checkpoint_of, folder_of, packed_of
from pipeline.cell.inputs import Shared
from pipeline.core.compose import build, plain
from pipeline.core.files import UserError, atomic_folder, folder_bytes, read_json, sha256, write_json, write_jsonl, write_text
from pipeline.core.settings import Settings, read
from pipeline.data.rows import Encoded, Encoder, Rows, load_rationales, load_rows
from pipeline.measure import clock, machine
from pipeline.measure.clock import Meter
from pipeline.measure.memory import Memory, PeakMemory, out_of_memory
from pipeline.methods.base import Method
from pipeline.models.base import device_of, load_model, load_tokenizer, manifest, memory_bytes, most_tokens, parameters, resolve
from pipeline.objectives.base import Objective, TrainingContext
from pipeline.records import tuned
from pipeline.records.finished import name
from pipeline.records.results import Inference, Result, Score, Size, Synthetic, Teacher, Work, history_csv, price, write
from pipeline.scoring import answers, scorer
from pipeline.scoring.probes import Probing
from pipeline.scoring.sharing import shared_latency
from pipeline.teachers.synthetic import rows as synthetic

if TYPE_CHECKING:
    from pipeline.training.loop import Trained

QUANTISED = ("nf4", "int8")


def run(cfg: DictConfig, *, shared: Shared | None = None, splits: tuple[str, ...] | None = None, folder: Path | None = None,
        started: float | None = None) -> Result:
    """Train and evaluate one cell.

    Args:
        splits: the splits to score; None: validation, test and what the evaluate settings ask for.
        folder: where result.json, predictions.jsonl, history.csv and artefact/ go; None: nothing is kept.
        started: Unix time from which start-up is counted (the process's start).

    Returns:
        The result; out of memory is one, with status oom.

    Raises:
        UserError: bad input. KeyboardInterrupt: ended by a signal, a checkpoint was written.
    """
    cell = Cell(cfg, Meter(started), shared or Shared(), splits, folder)
    try:
        result = cell.run()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        result = oom_result(cfg, str(error).splitlines()[0], machine.hardware(cell.device))
        cell.predictions, cell.artefact = [], None
    if folder is not None:
        cell.write(result)
        if cell.discard_checkpoint:
            cell.discard_checkpoint()
    return result


def oom_result(cfg: DictConfig, error: str, hardware: dict[str, Any]) -> Result:
    """The row of a cell that ran out of memory."""
    return bare_result(cfg, status="oom", error=error, hardware=hardware, precision=cfg.precision.name,
                       provenance={**machine.provenance(), **identity.provenance(cfg)})


def bare_result(cfg: DictConfig, **measured: Any) -> Result:
    """A result with what names the cell, and these fields."""
    return Result(**_identity(cfg, read(cfg), build(cfg.method, "method"), build(cfg.objective, "objective")) | measured)


def write_oom(cfg: DictConfig, error: str) -> Result:
    """Write the files of a cell whose process was ended for lack of memory."""
    cell = Cell(cfg, Meter(clock.now()), Shared(), None, folder_of(cfg))
    result = oom_result(cfg, error, machine.hardware("cpu"))
    cell.write(result)
    return result


def _identity(cfg: DictConfig, settings: Settings, method: Method, objective: Objective) -> dict[str, Any]:
    """What names the cell in its result."""
    shown = {**method.hyperparameters(), **objective.hyperparameters(), **({"start": cfg.start} if cfg.start else {})}
    if method.trains:
        train = settings.train
        shown |= {"lr": train.lr, "epochs": train.epochs, "batch_size": train.batch_size, "optimizer": train.optimizer, "schedule": train.schedule}
        shown |= {key: steps for key, steps in (("steps", train.steps), ("min_steps", train.min_steps)) if steps is not None}
    return {
        "experiment": cfg.experiment, "cell": name(cfg), "technique": cfg.technique.name, "family": settings.technique.family,
        "kind": _kind(method), "start": cfg.start, "takes_rows": method.takes_rows or bool(cfg.start),
        "method": method.name, "objective": objective.name if method.trains else "none", "task": cfg.task.name, "model": cfg.model.name,
        "seed": cfg.seed, "train_rows": cfg.train_rows or 0, "hyperparameters": shown, "metric": settings.task.metric, "config": plain(cfg),
    }


def _kind(method: Method) -> str:
    """One of results.KINDS."""
    if method.answers_without_model:
        return "teacher"
    return "trained" if method.trains else "base" if method.name == "none" else "untrained"


def labelled_rows(method: Method, objective: Objective, train: int, validation: int, seen: bool) -> int:
    """Of so many training and validation rows, how many labels a cell uses. seen: all were read before it, by a search or the cell it begins at."""
    if seen or (method.trains and objective.reads_labels):
        return train + validation
    return validation if method.trains else method.labelled_rows(train, validation)


class Cell:
    """The work of `run`, step by step; each step is booked to its phase."""

    def __init__(self, cfg: DictConfig, meter: Meter, shared: Shared, splits: tuple[str, ...] | None, folder: Path | None) -> None:
        self.cfg, self.meter, self.shared, self.splits, self.folder = cfg, meter, shared, splits, folder
        self.device: Any = "cpu"
        self.notes: list[str] = []
        self.predictions: list[dict] = []
        self.scores: dict[str, Score] = {}
        self.artefact: Callable[[Path], None] | None = None
        self.artefact_bytes = 0
        self.discard_checkpoint: Callable[[], None] | None = None
        self.slots: int | None = None
        self.probing: Probing | None = None
        self.taught: Teacher | None = None
        self.synthetic: Synthetic | None = None

    def run(self) -> Result:
        history: list[dict[str, float]]
        with self.meter.phase("startup"):
            self._setup()
        with self.meter.phase("load"):
            self._load()
        if self.method.answers_without_model:
            self._score_answers()
            work, memory, history, size = Work(), Memory(kind="none", peak_bytes=None), [], Size(0, 0, 0)
            inference = forgetting = None
        else:
            work, training, history = self._train()
            size = self._save()
            inference, evaluation = self._evaluate()
            memory = training or evaluation
            with self.meter.phase("evaluate"):
                forgetting = self.probing.forgetting(self.model) if self.probing else None
            inference = self._merged(self._many_adapters(inference))
        phases, tuning = self.meter.phases(), tuned.effort(self.cfg)
        return Result(
            **{**_identity(self.cfg, self.settings, self.method, self.objective), "train_rows": self.labelled},
            precision=self.precision, status="ok", validation_rows=len(self.rows.validation), scores=self.scores, memory=memory, work=work,
            size=size, inference=inference, forgetting=forgetting, teacher=self._teacher(), synthetic=self.synthetic, history=history, notes=self.notes,
            hardware=machine.hardware(self.device), provenance=self._provenance(), phases=phases, packed=self.slots is not None, slots=self.slots,
            tuning=tuning, cost=price(self.cfg, phases.wall_s), shared_process=bool(self.shared.threads), labelled_rows=self._labelled_rows(bool(tuning)),
        )

    def _labelled_rows(self, tuned: bool) -> int:
        """With a taxonomy's examples that synthetic rows were written from."""
        beside = self.synthetic.examples if self.synthetic else 0
        return beside + labelled_rows(self.method, self.objective, self.labelled, len(self.rows.validation), tuned or bool(self.cfg.start))

    def _wants(self, split: str) -> bool:
        return self.splits is None or split in self.splits

    def _setup(self) -> None:
        self.settings = read(self.cfg)
        self.method: Method = build(self.cfg.method, "method")
        self.objective: Objective = build(self.cfg.objective, "objective")
        self.device = device_of(self.cfg.device)
        self.precision, self.dtype = resolve(self.settings.precision, self.device)
        self.method.check(self.precision)
        if self.cfg.start and self.precision in QUANTISED:
            where = f"start={self.cfg.start} begins at that cell's plain weights"
            raise UserError(f"{where}, and {self.precision} ones are rounded; choose precision=auto, fp32 or bf16")
        rows = self.cfg.train_rows
        if self.method.trains and rows is not None and self.settings.train.batch_size > rows:
            raise UserError(f"train.batch_size={self.settings.train.batch_size} is larger than train_rows={rows}; lower it or raise train_rows")
        self.provenance = machine.provenance()
        import transformers  # noqa: F401

        answers.preload(self.settings.task)
        if self.shared.threads:
            import torch

            torch.set_num_threads(self.shared.threads)
        self.meter.device = self.device

    def _load(self) -> None:
        cfg, evaluate = self.cfg, self.settings.evaluate
        test_rows = evaluate.test_rows if self._wants("test") else 0
        transfer_rows = evaluate.transfer_rows if self._wants("transfer") else 0
        data = Path(cfg.paths.data) / cfg.task.name
        self.rows: Rows = load_rows(data, self.settings.task, cfg.train_rows, cfg.seed, evaluate.validation_share, test_rows, transfer_rows)
        self.rationales_folder = Path(cfg.paths.rationales) / cfg.task.name / cfg.teacher.name
        if self.method.answers_without_model or self.objective.needs_rationales:
            self.rows.rationales.update(load_rationales(self.rationales_folder))
            if not self.rows.rationales:
                raise UserError(f"{cfg.technique.name} learns from a teacher, but {self.rationales_folder} is empty; choose another teacher")
        self.labelled = len(self.rows.train)
        if self.method.answers_without_model:
            return
        if self.method.trains:
            extra, self.synthetic = synthetic.extra(cfg, self.rows.train)
            self.rows.train[:] = self.objective.rows(self.rows.train, self.rows.rationales, cfg.train_rows, cfg.seed)
            self.labelled = len(self.rows.train)
            self.rows.train.extend(extra)
            if self.settings.train.batch_size > len(self.rows.train):
                raise UserError(f"train.batch_size={self.settings.train.batch_size} is larger than the {len(self.rows.train)} training rows; lower it")
        folder = Path(cfg.paths.models) / cfg.model.name
        self.tokenizer = self.shared.tokenizers.get(folder) or load_tokenizer(folder)
        self.base = load_model(folder, self.settings.precision, self.device, self.shared.stored.get(folder), self.settings.model.trust_remote_code)
        if cfg.model.get("note"):
            self.notes.append(cfg.model.note)
        self.encoder = Encoder(self.tokenizer, self.settings.task, most_tokens(self.base, self.settings.train.max_length), self.settings.train.too_long)

    def _note(self, note: str | None) -> None:
        if note:
            self.notes.append(note)

    def _train(self) -> tuple[Work, Memory | None, list[dict[str, float]]]:
        """Wrap the base, train what there is to train, and leave `self.model` as it will be served."""
        import torch

        from pipeline.training.loop import total_steps

        with self.meter.phase("load"):
            torch.manual_seed(self.cfg.seed)
            rows, rationales = self.rows.train, self.rows.rationales
            labels = [self.objective.label_example(row, self.settings.task) for row in rows]
            if self._wants("forgetting") and self.settings.evaluate.forgetting:
                with self.meter.phase("evaluate"):
                    self.probing = Probing(self.cfg, self.settings, self.tokenizer, self.base)
                self._note(self.probing.note)
            if self.cfg.start:
                self._start()
            self.model_bytes = memory_bytes(self.base)
            self.state = self.method.prepare(labels, self.cfg.seed, self.base)
            dtype = self.base.dtype
            self.model = self.method.wrap(self.base)
            self.counts = parameters(self.model)
            self.scorer = scorer.Scorer(self.model, self.encoder, self.settings.task, self._prompt, self.settings.evaluate.batch_tokens,
                                         self.device, self.dtype, self.notes, self.objective.reasoning)
            with self.meter.phase("validate"):
                self.state = self.method.choose(self.state, self._validate_state)
            self.notes += self.scorer.check({split: found for split, found in self.rows.scored.items() if self._wants(split.partition("/")[0])})
            if self.method.trains:
                examples = [[self.encoder.example(e) for e in self.objective.examples(row, self.settings.task, rationales.get(row["id"]))] for row in rows]
                self._note(self.encoder.check("the training rows"))
                self.method.before_training(self.model, total_steps(self.settings.train, len(examples)))
                prepared = self._prepared(examples)
        if not self.method.trains:
            return Work(), None, []
        trained = self._packed() or self._loop(prepared)
        self.notes += trained.notes
        with self.meter.phase("save"):
            self.model = self.method.served(self.model, dtype)
            self.scorer.model = self.model
        return trained.work, trained.memory, trained.history

    def _prepared(self, examples: list[list[Encoded]]) -> Sequence[Sequence[Encoded]]:
        """The examples with what the objective computes once; booked as warm-up."""
        with self.meter.phase("warmup"):
            context = TrainingContext(self.cfg, self.settings, self.model, self.encoder, self.rows.train, self.device, self.dtype)
            found = self.objective.prepared(examples, context)
        self.notes += found.notes
        self.taught = found.teacher
        return found.examples

    def _start(self) -> None:
        """From here on, the base is what another cell left."""
        from pipeline.serving.artefact import started

        dtype, self.base = self.base.dtype, None
        self.base, result = started(self.cfg, dtype)
        spent = f"{result.phases.train_s:.3g} s of training" if result.phases else "training"
        self.notes.append(f"begins at {result.experiment}/{result.cell}, whose {spent} on {result.train_rows} rows is not counted here")

    def _loop(self, examples: Sequence[Sequence[Encoded]]) -> Trained:
        from pipeline.training.loop import Loop

        with self.meter.phase("load"):
            checkpoint = checkpoint_of(self.cfg) if self.folder is not None else None
            kind = self.objective.loop() or Loop
            loop = kind(self.model, self.method, self.objective, examples, self.settings.train, self.cfg.seed, self._validate, checkpoint,
                        self.meter, self.device, self.dtype, self.encoder.pad_id)
        if checkpoint:  # not a method of the loop: that would keep the optimiser's state in memory while the cell is evaluated
            self.discard_checkpoint = functools.partial(checkpoint.unlink, missing_ok=True)
        return loop.run()

    def _packed(self) -> Trained | None:
        """Take up a training that was packed with others, if one waits."""
        path = packed_of(self.cfg)
        if self.folder is None or not self.cfg.pack or not path.exists():
            return None
        import torch

        from pipeline.training.loop import Trained

        with self.meter.phase("load"), torch.no_grad():
            held = torch.load(path, map_location="cpu", weights_only=True)
            for name, parameter in self.model.named_parameters():
                if name in held["weights"]:
                    parameter.copy_(held["weights"][name])
        for phase in ("warmup", "train"):
            self.meter.add(phase, held[f"{phase}_s"])
        self.slots = held["slots"]
        self.discard_checkpoint = lambda: path.unlink(missing_ok=True)
        notes = [*held["notes"], f"trained packed, {self.slots} cells at once: training time is a share of theirs, memory was not measured"]
        kind = "gpu_reserved" if self.device.type == "cuda" else "cpu_rss"
        return Trained(Work(**held["work"]), Memory(kind, None), held["history"], notes)

    def _prompt(self, prompt: str) -> str:
        return self.method.prompt(self.objective.prompt(prompt), self.state)

    def _validate_state(self, state: Any) -> tuple[float, float]:
        self.state = state
        return self._validate()

    def _validate(self) -> tuple[float, float]:
        found = answers.score(self.scorer.predict(self.rows.validation), self.settings.task)
        return answers.headline(found, self.settings.task.metric), found.nll if found.nll is not None else 0.0

    def _save(self) -> Size:
        model, state = self.model, self.state
        self.notes += self.method.notes(model)
        self.artefact = lambda folder: self.method.save(model, state, folder)
        with self.meter.phase("save"):
            if self.folder is not None:
                self._write_artefact(self.folder / "artefact")
        trainable, total = self.counts if self.method.trains else (0, self.counts[1])
        return Size(trainable, total, self.artefact_bytes, self.model_bytes, memory_bytes(model))

    def _write_artefact(self, target: Path) -> None:
        """The artefact and artefact.json, which says what it belongs to; its bytes are counted without that file."""
        with atomic_folder(target, "artefact.json", "cell") as beside:
            beside.mkdir()
            if self.artefact:
                self.artefact(beside)
            self.artefact_bytes = folder_bytes(beside)
            about = {"technique": self.cfg.technique.name, "model": self.cfg.model.name, "task": self.cfg.task.name, "cell": name(self.cfg)}
            write_json(beside / "artefact.json", about)

    def _predict(self, split: str, rows: list[dict]) -> None:
        found = self.scorer.predict(rows)
        self.predictions += [{"split": split, **p} for p in found]
        self.scores[split] = answers.score(found, self.settings.task)

    def _evaluate(self) -> tuple[Inference | None, Memory]:
        """Score the splits; time one-row requests and full batches over the test rows."""
        memory = PeakMemory(self.device)
        memory.start()
        with self.meter.phase("validate"):
            if self._wants("validation"):
                self._predict("validation", self.rows.validation)
        watch, peak = clock.Stopwatch(self.device), memory.stop()
        if self._wants("test"):
            with self.meter.phase("evaluate"):
                watch.lap()
                memory.start()
                self._predict("test", self.rows.test)
                seconds, peak = watch.lap(), memory.stop()
                latency, request_bytes = self._requests()
                for split, rows in self.rows.transfer.items():
                    self._predict(f"transfer/{split}", rows)
            return Inference(latency, len(self.rows.test) / seconds, peak.peak_bytes, request_peak_bytes=request_bytes), peak
        return None, peak

    def _requests(self) -> tuple[float | None, int | None]:
        """Median seconds of a one-row request to the model as it stands, and the peak memory of answering some."""
        memory = PeakMemory(self.device)
        memory.start()
        rows = self.rows.test[: self.settings.evaluate.latency_rows]
        latency = clock.latency_s(lambda row: self.scorer.predict([row]), rows, self.device)
        return latency, memory.stop().peak_bytes if rows else None

    def _many_adapters(self, inference: Inference | None) -> Inference | None:
        """How long requests take that each have an adapter of their own over one base, where adapters can share one."""
        rows = self.rows.test[: self.settings.evaluate.latency_rows]
        if inference is None or not self.settings.evaluate.adapters:
            return inference
        with self.meter.phase("evaluate"):
            found = shared_latency(self.scorer, self.method, rows, self.settings.evaluate.adapters)
        return dataclasses.replace(inference, adapters=found.own, one_adapter=found.same, adapters_mixed=found.mixed) if found else inference

    def _merged(self, inference: Inference | None) -> Inference | None:
        """Latency and memory once more with the adapter folded in, where that is possible; the last thing done to the model."""
        if inference is None or inference.latency_s is None or not self.method.merges:
            return inference
        with self.meter.phase("evaluate"):
            if not hasattr(self.model, "peft_config"):
                return dataclasses.replace(inference, merged_latency_s=inference.latency_s, merged_request_peak_bytes=inference.request_peak_bytes)
            self.scorer.model = self.model = self.method.merged(self.model)
            latency, request_bytes = self._requests()
        return dataclasses.replace(inference, merged_latency_s=latency, merged_request_peak_bytes=request_bytes)

    def _score_answers(self) -> None:
        """Score answers that come without a model (the teacher's)."""
        with self.meter.phase("evaluate"):
            for split, rows in (("validation", self.rows.validation), ("test", self.rows.test)):
                if not self._wants(split):
                    continue
                given = self.method.answers(rows, self.rows.rationales) or []
                found = [{"id": r["id"], "answer": r["answer"], "prediction": g, "correct": answers.canonical(g) == answers.canonical(r["answer"])}
                         for r, g in zip(rows, given, strict=True)]
                self.predictions += [{"split": split, **p} for p in found]
                self.scores[split] = answers.score(found, self.settings.task)

    def _teacher(self) -> Teacher | None:
        if not self.rows.rationales:
            return self.taught
        about = read_json(self.rationales_folder / "manifest.json")
        used = [r for r in self.rows.train if r["id"] in self.rows.rationales]
        right = sum(bool(self.rows.rationales[r["id"]]["correct"]) for r in used)
        return Teacher(self.cfg.teacher.name, len(used), right / len(used) if used else None, about.get("seconds"))

    def _provenance(self) -> dict[str, Any]:
        model = Path(self.cfg.paths.models) / self.cfg.model.name
        data = Path(self.cfg.paths.data) / self.cfg.task.name
        return {
            **self.provenance, **identity.provenance(self.cfg), "data_sha256": sha256(data / "manifest.json"),
            "model_sha256": None if self.method.answers_without_model else manifest(model)["sha256"],
        }

    def write(self, result: Result) -> None:
        """All files of the cell; result.json comes last, so that it stands for a whole cell."""
        assert self.folder is not None
        (self.folder / "result.json").unlink(missing_ok=True)
        if not (self.folder / "artefact").exists() or self.artefact is None:
            self._write_artefact(self.folder / "artefact")
        write_jsonl(self.folder / "predictions.jsonl", self.predictions)
        write_text(self.folder / "history.csv", history_csv(result.history))
        write(self.folder, result)
