"""What a composed cell will take before it starts: memory, whether it fits, the largest batch that does, and time.

Library: `forecast(cfg)` for `python -m pipeline.forecast`, the warning of `train`, the report and `advise`. Nothing heavy is imported.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.core import settings
from pipeline.core.compose import ROOT, build, compose, literal, plain
from pipeline.core.files import UserError, read_json
from pipeline.core.settings import Settings, read
from pipeline.data.rows import steps_in_epoch
from pipeline.forecasting import memory, speed
from pipeline.forecasting.memory import Memory
from pipeline.forecasting.plan import Constants, Plan, equal_rows, training_plan
from pipeline.forecasting.rows import TrainingRows, training_rows
from pipeline.forecasting.shape import NoForecast, read_shape
from pipeline.forecasting.trained import trained
from pipeline.measure import machine
from pipeline.records.results import Result
from pipeline.training.loop import total_steps

FITTED = ROOT / "experiments" / "forecast" / "constants.json"
MOST_BATCH = 16384
READ = (*settings.DECIDING, "paths", "memory_limit_gb")
"""Keys of a result's config that a forecast of it takes over."""


@dataclass(frozen=True)
class Card:
    """Where the cell would run. memory_bytes: all of it, a GPU's or the machine's."""

    gpu: bool
    name: str
    memory_bytes: int
    at_hand: bool = True
    cpu: str | None = None
    """The processor's model; None: this machine's."""

    @property
    def device(self) -> str:
        """What computes, by its name."""
        return self.name if self.gpu else self.cpu or machine.cpu_name()


@dataclass(frozen=True)
class Forecast:
    """memory is None where `reason` says why there is no forecast."""

    technique: str
    card: Card
    memory: Memory | None = None
    fits: bool | None = None
    largest_batch: int | None = None
    """Rows as long as the longest that fit into one forward and backward pass; None: not asked for."""
    longest: int = 0
    """Fed tokens of the longest row."""
    engine: str = ""
    gpus: int = 1
    """That train together; memory, largest_batch and card are of each."""
    precision: str = ""
    trainable: int = 0
    parameters: int = 0
    steps: int = 0
    step_tokens: float = 0.0
    """Fed tokens of a step (padding not counted), on average."""
    rows_from: str = ""
    reason: str | None = None
    train_s: tuple[float, float, float] | None = None
    """Seconds of training: low, expected, high; None: this machine's throughput is not known."""
    time_from: str = ""
    notes: list[str] = field(default_factory=list)


def card_at_hand(cfg: DictConfig) -> Card:
    """The card that forecast.gpu_memory_gb describes, or this machine's, or the machine itself where there is none."""
    wanted = cfg.forecast.gpu_memory_gb
    if wanted is not None:
        return Card(True, f"a card of {wanted:g} GiB", int(wanted * 2**30), at_hand=False)
    gpu = machine.card() if cfg.device != "cpu" else None
    if gpu is not None:
        return Card(True, *gpu)
    limit = cfg.memory_limit_gb
    return Card(False, "this machine" if limit is None else "memory_limit_gb", machine.machine_bytes() if limit is None else int(limit * 2**30))


@functools.cache
def constants() -> Constants:
    if not FITTED.exists():
        return Constants()
    known = {f.name for f in dataclasses.fields(Constants)}
    return Constants(**{k: v for k, v in read_json(FITTED).items() if k in known})


@dataclass(frozen=True)
class Prepared:
    """All that a forecast rests on."""

    plan: Plan
    rows: TrainingRows
    steps: int
    settings: Settings


def prepare(cfg: DictConfig, gpu: bool) -> Prepared:
    """The plan of a cell's training.

    Raises:
        NoForecast: method, objective or architecture without one. UserError: bad input, no model to read the shape of.
    """
    settings, path = read(cfg), cfg.forecast.model_config
    shape = read_shape(Path(path) if path else Path(cfg.paths.models) / cfg.model.name / "config.json")
    what = trained(plain(cfg)["method"], shape)
    if what.kind == "none":
        raise NoForecast(f"{cfg.technique.name} trains nothing")
    if what.kind == "other":
        raise NoForecast(f"no forecast of memory for method {what.name}")
    if what.count == 0:
        raise NoForecast(f"{what.name} finds nothing to train in this model")
    rows = training_rows(cfg, settings)
    steps = total_steps(settings.train, rows.count)
    plan = training_plan(shape, what, settings.train, settings.precision, rows.examples, cfg.seed, steps, gpu, ranks(settings, gpu))
    memory.check(plan)
    return Prepared(plan, rows, steps, settings)


def ranks(settings: Settings, gpu: bool) -> int:
    """GPUs (on a CPU: processes) that train together: train.gpus, or all that are visible."""
    train = settings.train
    return 1 if train.parallel == "none" else train.gpus or (machine.visible_gpus() if gpu else 0) or 1


def forecast(cfg: DictConfig, card: Card | None = None, batches: bool = True, time: bool = True) -> Forecast:
    """What a composed cell will take.

    Args:
        card: where it would run; None: as forecast.gpu_memory_gb says, or the machine at hand.
        batches: search the largest batch (half a second for a large model).
        time: forecast the time too, from the cached calibration if there is one (it is never made here).

    Raises:
        UserError: bad input, or a model whose config.json is not there.
    """
    card = card or card_at_hand(cfg)
    try:
        prepared = prepare(cfg, card.gpu)
        peak = memory.forecast(prepared.plan, constants())
    except NoForecast as error:
        return Forecast(cfg.technique.name, card, reason=str(error))
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
        build(cfg.method, "method")  # names the setting where that was it; a forecast that goes well needs no PEFT
        raise
    plan = prepared.plan
    longest = max(len(e.ids) - 1 for row in prepared.rows.examples for e in row)
    fields: dict[str, Any] = {
        "memory": peak, "fits": memory.fits(plan, constants(), card.memory_bytes, peak), "longest": longest, "engine": plan.engine,
        "precision": plan.precision, "trainable": plan.trained.count, "parameters": plan.shape.parameters, "steps": prepared.steps,
        "step_tokens": step_tokens(prepared), "rows_from": prepared.rows.source, "gpus": plan.ranks,
    }
    if batches:
        fields["largest_batch"] = largest_batch(prepared, card)
    if time:
        fields |= _time(cfg, prepared, card)
    notes = ["the paged optimiser's state can move to the machine's memory; it is not counted"] if plan.paged else []
    if not FITTED.exists():
        notes.append("the constants have not been fitted to measurements: run python -m benchmarks.forecast on a GPU")
    return Forecast(cfg.technique.name, card, notes=notes, **fields)


def forecast_of(result: Result) -> Forecast | None:
    """What would have been forecast of a finished cell on its own hardware; None where model or data are not here any more."""
    cfg, hardware = copy.deepcopy(_defaults()), result.hardware
    OmegaConf.set_struct(cfg, False)
    for key in READ:  # keys that came since have their defaults
        if key in result.config:
            cfg[key] = literal(result.config[key])
    gpu, work = hardware.get("gpu"), result.work
    if gpu and work and work.engine == "eager" and not work.engine_reason:  # asked for, or run before there was a fast engine
        cfg.train.engine = "eager"
    card = Card(bool(gpu), gpu or "the machine", hardware.get("gpu_memory_bytes") or hardware.get("memory_bytes") or 0, cpu=hardware.get("cpu"))
    try:
        return forecast(cfg, card, batches=False)
    except (UserError, KeyError):  # no model, no data, or a config of an older schema
        return None


_defaults = functools.cache(compose)


def step_tokens(prepared: Prepared) -> float:
    """Fed tokens of an optimiser step, on average (an epoch's last step may be smaller)."""
    tokens = [sum(len(e.ids) - 1 for e in row) for row in prepared.rows.examples]
    return prepared.rows.count * sum(tokens) / len(tokens) / steps_in_epoch(prepared.rows.count, prepared.settings.train.batch_size)


def largest_batch(prepared: Prepared, card: Card) -> int:
    """Rows as long as the longest that fit into one forward and backward pass; 0: not one does."""
    plan = prepared.plan
    ends = [(len(e.ids) - 1, len(e.ids) - e.start) for row in prepared.rows.examples for e in row]
    fed, labels = max(ends)

    @functools.cache
    def peak(rows: int) -> tuple[Plan, Memory]:
        every = rows * plan.ranks
        settings = dataclasses.replace(prepared.settings.train, batch_size=every, micro_batch_tokens=(fed + 8) * rows, padding_free="never")
        trial = training_plan(plan.shape, plan.trained, settings, prepared.settings.precision, equal_rows(every, fed, labels), 0, 2, plan.gpu, plan.ranks)
        trial = dataclasses.replace(trial, steps=trial.steps[:1], warm=True)
        return trial, memory.forecast(trial, constants())

    def fits(rows: int) -> bool:
        trial, needed = peak(rows)
        return memory.fits(trial, constants(), card.memory_bytes, needed)

    some = 32
    each = max(1.0, (peak(some)[1].total - peak(1)[1].total) / (some - 1))
    guess = int((card.memory_bytes - constants().outside(plan) - peak(1)[1].total) / each) + 1
    return _largest(fits, min(max(1, guess), MOST_BATCH))


def _largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number of rows that fits, to a sixteenth, by a search that begins at a guess; 0: not even 1 does."""
    low, high = (guess, guess * 17 // 16 + 1) if fits(guess) else (guess * 15 // 16, guess)
    while high <= MOST_BATCH and low == guess and fits(high):
        low = guess = high
        high = guess * 5 // 4 + 1
    while low and high == guess and not fits(low):
        high = guess = low
        low = guess * 3 // 4
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _time(cfg: DictConfig, prepared: Prepared, card: Card) -> dict[str, Any]:
    """The fields of a Forecast on time."""
    if prepared.plan.ranks > 1 or prepared.plan.engine == "sharded":
        return {"time_from": "time: not forecast for several GPUs"}
    if not card.at_hand:
        return {"time_from": "time: only the machine at hand can be timed; leave forecast.gpu_memory_gb out"}
    path = speed.file_of(cfg.paths.work)
    points = speed.known(path, card.device, prepared.plan)
    if not points:
        return {"time_from": "time: not timed on this machine yet; add forecast.calibrate=true (about half a minute, once)"}
    when = f"steps of a few layers timed on this machine ({path})"
    return {"train_s": speed.train_seconds(prepared.plan, prepared.steps, points), "time_from": when}


def calibrate(cfg: DictConfig, card: Card | None = None) -> None:
    """Time the cell's technique on this machine, once; does nothing where that is known already or there is no forecast.

    Raises:
        UserError: the technique cannot be set up on random weights.
    """
    card = card or card_at_hand(cfg)
    try:
        prepared = prepare(cfg, card.gpu)
    except NoForecast:
        return
    path = speed.file_of(cfg.paths.work)
    if card.at_hand and prepared.plan.ranks == 1 and prepared.plan.engine != "sharded" and not speed.known(path, card.device, prepared.plan):
        speed.keep(path, card.device, prepared.plan, speed.calibrate(cfg, prepared.plan), machine.provenance()["started"][:10])
