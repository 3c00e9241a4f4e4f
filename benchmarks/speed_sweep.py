"""The sweep benchmark: K LoRA trials of equal steps, from the start to the best setting. Ours packed, the peer one after another.

Library of `python -m benchmarks.speed`. Both get the same trials from Optuna (a seeded random sampler over rank and learning rate, alpha = 2 r),
each with batches of its own, and score every trial on the same validation batches. Libraries are loaded, and the device started, before
either side's time begins. The peer is Optuna with Trainer and PEFT in one process,
the base kept loaded, an adapter added and removed a trial; and, apart, a process of its own a trial.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import speed_ours, speed_peers, speed_stats
from benchmarks.speed_limits import distance, step_flops
from benchmarks.speed_run import Settings, clear, failure, limited
from benchmarks.speed_targets import SweepRow
from benchmarks.speed_workloads import Workload, adapter_config, base_model
from pipeline.core.compose import ROOT
from pipeline.core.files import UserError
from pipeline.measure.clock import Stopwatch
from pipeline.measure.memory import PeakMemory

if TYPE_CHECKING:
    import torch

RANKS, RATES, VALIDATION_BATCHES, VALIDATION_SEED = (4, 8, 16, 32), (1e-4, 3e-3), 4, 1000


@dataclass(frozen=True)
class Trial:
    """One setting. seed: of its batches and its adapter."""

    number: int
    r: int
    lr: float

    @property
    def alpha(self) -> int:
        return 2 * self.r

    @property
    def seed(self) -> int:
        return self.number + 1

    def workload(self, base: Workload) -> Workload:
        """The sweep's workload at this trial's setting."""
        return dataclasses.replace(base, rank=self.r, alpha=self.alpha, lr=self.lr, seed=self.seed)


@dataclass(frozen=True)
class Found:
    """What a trial gave: the losses of its steps, and its mean validation loss, nats a token."""

    number: int
    losses: list[float]
    validation: float


@dataclass
class Pass:
    """One pass of the peer: what it took to get ready, and every trial."""

    setup_s: float
    trial_s: list[float]
    found: list[Found]
    peak_bytes: int | None = None


def ready(device: Any) -> None:
    """Load what both sides use, or whoever comes first would pay for it."""
    import optuna  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401

    torch.zeros(1, device=device)


def open_study() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(seed=0))


def ask(study: Any) -> tuple[Any, Trial]:
    """(Optuna's trial, the setting)."""
    asked = study.ask()
    return asked, Trial(asked.number, asked.suggest_categorical("r", RANKS), asked.suggest_float("lr", *RATES, log=True))


def trials(count: int) -> list[Trial]:
    """The first `count` settings; they do not depend on the trials' results."""
    study = open_study()
    return [ask(study)[1] for _ in range(count)]


def validation(workload: Workload) -> list[torch.Tensor]:
    """Token ids [B, T] of every validation batch."""
    return dataclasses.replace(workload, seed=VALIDATION_SEED).batches(VALIDATION_BATCHES)


def packed(workload: Workload, count: int, device: Any) -> dict[str, Any]:
    """Our sweep: {wall_s, found, peak_bytes}. The base is built, and the step captured, inside the time."""
    memory = PeakMemory(device)
    memory.start()
    watch = Stopwatch(device)
    study = open_study()
    asked = [ask(study) for _ in range(count)]
    answered = speed_ours.packed_sweep(workload, [trial for _, trial in asked], validation(workload), device)
    for (trial, _), one in zip(asked, answered, strict=True):
        study.tell(trial, one.validation)
    return {"wall_s": watch.lap(), "found": answered, "best": study.best_trial.number, "peak_bytes": memory.stop().peak_bytes}


def one_after_another(workload: Workload, count: int, device: Any) -> Pass:
    """The peer's sweep over the first `count` trials."""
    speed_peers.silence()
    memory = PeakMemory(device)
    memory.start()
    watch = Stopwatch(device)
    study, model, rows = open_study(), base_model(workload, device), validation(workload)
    done = Pass(watch.lap(), [], [])
    for _ in range(count):
        asked, trial = ask(study)
        outcome, model = _trial(workload, trial, model, rows, device)
        study.tell(asked, outcome.validation)
        done.found.append(outcome)
        done.trial_s.append(watch.lap())
    done.peak_bytes = memory.stop().peak_bytes
    return done


def _trial(base: Workload, trial: Trial, model: Any, rows: list[torch.Tensor], device: Any) -> tuple[Found, Any]:
    """(what the trial gave, the bare base again)."""
    import torch
    from peft import get_peft_model

    workload = trial.workload(base)
    torch.manual_seed(workload.seed)
    adapted = get_peft_model(model, adapter_config(workload))
    with tempfile.TemporaryDirectory() as folder:
        trainer = speed_peers.make_trainer(workload, device, adapted, folder, {}, eval_dataset=speed_peers.dataset(rows))
        trainer.train()
        score = trainer.evaluate()["eval_loss"]
    losses = [float(loss) for loss in trainer.kept]
    trainer.accelerator.free_memory()
    bare = adapted.unload()
    if hasattr(bare, "peft_config"):
        del bare.peft_config
    return Found(trial.number, losses, score), bare


@functools.lru_cache(maxsize=4)
def process_s(workload: Workload, device: str) -> float:
    """Seconds of one trial as a process of its own, from its start to its exit. Raises UserError if it fails."""
    watch = Stopwatch()
    words = [sys.executable, "-m", "benchmarks.speed_process", json.dumps(dataclasses.asdict(workload)), device]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"a trial in a process of its own failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
    return watch.lap()


def measure(row: SweepRow, settings: Settings, passes: dict[Workload, Pass]) -> dict[str, Any]:
    """The row's result. `passes`: the peer's passes of this session by workload; one with enough trials is taken again.

    Our sweep runs once before the peer's and `repeats` - 1 times after it.
    """
    ready(settings.device)
    watch, limit = Stopwatch(), settings.limit_s
    record: dict[str, Any] = {"id": row.id, "what": row.what, "required": row.required, "aim": row.aim, "figure": "wall_s"}
    ours: list[dict[str, Any]] = []
    errors: list[str] = []
    peer = passes.get(row.workload)
    again = peer is not None and len(peer.trial_s) >= row.measured

    def attempt(call: Any, name: str) -> Any:
        try:
            with limited(limit - watch.peek()):
                return call()
        except Exception as error:  # the other sides still count
            errors.append(f"{name}: {failure(error)}")
            return None
        finally:
            clear(settings.device)

    for place in range(settings.repeats):
        done = attempt(lambda: packed(row.workload, row.trials, settings.device), "ours")
        ours += [done] if done else []
        if done:
            print(f"  ours, {row.trials} trials: {done['wall_s']:.1f} s, best is trial {done['best']}", flush=True)
        if place == 0 and not again:
            peer = attempt(lambda: one_after_another(row.workload, row.measured, settings.device), "sequential") or peer
            if peer:
                print(f"  one after another, {len(peer.trial_s)} trials measured: {sum(peer.trial_s) + peer.setup_s:.1f} s", flush=True)
                passes[row.workload] = peer
    apart = attempt(lambda: process_s(row.workload, settings.device.type), "process")
    return record | _record(row, settings, ours, peer, apart, again, errors)


def _record(row: SweepRow, settings: Settings, ours: list[dict[str, Any]], peer: Pass | None, apart: float | None, again: bool,
            errors: list[str]) -> dict[str, Any]:
    flops = row.trials * row.workload.total * step_flops(row.workload)
    record: dict[str, Any] = {"workload": dataclasses.asdict(row.workload), "trials": [dataclasses.asdict(t) for t in trials(row.trials)], "notes": []}
    if ours:
        walls = [o["wall_s"] for o in ours]
        record["under"] = {
            "kind": "ours", "wall_s": speed_stats.summary(walls), "walls_s": walls, "best": ours[-1]["best"], "peak_bytes": [o["peak_bytes"] for o in ours],
            "limit": distance(flops, None, speed_stats.summary(walls)["median"], settings.rates[row.workload.dtype]), "found": _plain(ours[-1]["found"]),
        }
    if peer:
        wall = scaled(peer, row.trials)
        record["over"] = {
            "kind": "sequential", "wall_s": speed_stats.summary([wall]), "setup_s": peer.setup_s, "trial_s": peer.trial_s, "peak_bytes": [peer.peak_bytes],
            "limit": distance(flops, None, wall, settings.rates[row.workload.dtype]), "found": _plain(peer.found),
        }
        if len(peer.trial_s) < row.trials:
            record["notes"].append(f"the peer's time: {len(peer.trial_s)} trials measured, scaled to {row.trials}")
        if again:
            record["notes"].append("the peer's trials were measured for another row of this session")
    if ours and peer:
        record |= speed_stats.ratio([scaled(peer, row.trials)] * len(ours), record["under"]["walls_s"])
        record["loss"] = agreement(ours[-1]["found"], peer.found, row.workload.dtype)
    if apart is not None:
        record["processes"] = {"one_s": apart, "wall_s": apart * row.trials, "measured": 1}
        record["notes"].append(f"whole processes: 1 measured, scaled to {row.trials}")
        if ours:
            record["processes"]["ratio"] = apart * row.trials / record["under"]["wall_s"]["median"]
    if errors:
        record["error"] = "; ".join(errors)
    return record


def _plain(found: list[Found]) -> list[dict[str, Any]]:
    return [{"number": f.number, "validation": f.validation, "losses": f.losses[: speed_stats.COMPARED]} for f in found]


def scaled(peer: Pass, count: int) -> float:
    """Seconds of `count` trials: those measured where they are enough, else their mean for each."""
    measured = peer.trial_s[:count]
    return peer.setup_s + sum(measured) / len(measured) * count


def agreement(ours: list[Found], peer: list[Found], dtype: str) -> dict[str, Any]:
    """The loss curves of the trials that both ran, the worst of them; and how far their validation losses are apart."""
    both = [(a, b) for a in ours for b in peer if a.number == b.number]
    pairs = [speed_stats.curves(a.losses, b.losses, dtype) for a, b in both]
    worst = max(pairs, key=lambda p: float("inf") if p["max_relative"] is None else p["max_relative"])
    return {**worst, "trials": len(pairs), "validation_max_relative": max(abs(a.validation - b.validation) / abs(b.validation) for a, b in both)}
