"""A sweep's trials packed over one base in one process (sweep.executor=packed, or auto on a GPU).

Library of `python -m pipeline.sweep`. The pack lives in a child process, which asks Optuna for as many trials as it has slots and tells
each as it ends; the parent starts a smaller pack if memory ran out, and puts back what was being tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from pipeline import cell
from pipeline.files import UserError
from pipeline.measure import Stopwatch, hardware, provenance
from pipeline.pack_process import attempt, signals
from pipeline.results import Phases, Result, Work
from pipeline.sweep_space import Point, Sweep, at
from pipeline.sweep_study import answered, fail, open_study, revive, short, tell, tell_pruned, write_trials

if TYPE_CHECKING:
    import optuna

    from pipeline.fast.pack import Job, Running

NO_GPU = "there is no GPU here, where packing would pay"
TPE_AT_ONCE = 10
"""Of a search that learns, no more than this: TPE draws its first ten at random anyway, and the others should know of some answers."""


def refusal(sweep: Sweep, cfg: DictConfig) -> str | None:
    """Why the sweep is not packed, as far as that can be told without a GPU being touched."""
    import torch

    if sweep.executor == "sequential":
        return "sweep.executor asks for it"
    if "peak_memory" in sweep.objectives:
        return "the memory of a packed trial is not a single run's"
    if sweep.executor == "auto" and (cfg.device == "cpu" or torch.version.cuda is None):
        return NO_GPU
    return None


def search(study: optuna.Study, sweep: Sweep, cfg: DictConfig, folder: Path, shared: cell.Shared) -> str | None:
    """Run packed trials until `sweep.target` have an answer or the time is up. Returns why trials are left for single runs, if they are.

    Raises:
        UserError: a trial ended with an error; or sweep.executor=packed, but the technique cannot be packed.
    """
    watch, slots = Stopwatch(), sweep.slots
    while answered(study) < sweep.target and (sweep.timeout_s is None or watch.peek() < sweep.timeout_s):
        revive(study, sweep)
        left_s = None if sweep.timeout_s is None else sweep.timeout_s - watch.peek()

        def work(tell: Callable[[int], None], slots: int | None = slots, left_s: float | None = left_s) -> None:
            Trials(open_study(folder, cfg, sweep), sweep, cfg, folder, left_s).run(shared, slots, tell)

        ended = attempt(work, shared, folder / ".pack.json", cfg.memory_limit_gb)
        if ended.refused and sweep.executor == "packed":
            raise UserError(f"sweep.executor=packed, but {ended.refused}; choose auto or sequential")
        if ended.refused:
            return ended.refused
        if ended.out_of_memory:
            slots = ended.fewer()
            if slots is None:
                return "not even one trial fits beside what a pack needs"
            print(f"{ended.slots} trials at once ran out of memory; going on with {slots}", flush=True)
    return None


@dataclass
class Trials:
    """Asks for trials and tells what became of them."""

    study: optuna.Study
    sweep: Sweep
    cfg: DictConfig
    folder: Path
    left_s: float | None
    watch: Stopwatch = field(default_factory=Stopwatch)
    lap: Stopwatch = field(default_factory=Stopwatch)
    """Since a trial ended last."""
    running: dict[int, Any] = field(default_factory=dict)
    """Trials that are being tried, by number."""
    slots: int = 1

    def run(self, shared: cell.Shared, slots: int | None, tell: Callable[[int], None]) -> None:
        from pipeline.fast.bind import Unsupported
        from pipeline.packing import Packing

        packing = Packing([at(self.cfg, point) for point in covers(self.cfg, self.sweep)], shared)
        if self.sweep.executor == "auto" and packing.device.type != "cuda":
            raise Unsupported(NO_GPU)
        left = self.sweep.target - answered(self.study)
        at_once = min(left, TPE_AT_ONCE) if self.sweep.sampler == "tpe" else left
        self.packing, self.about = packing, provenance()
        self.slots = min(slots, left) if slots else packing.slots(at_once)
        tell(self.slots)
        pack = packing.open(self.slots, left, self._prune)
        print(f"{self.slots} trials at once", flush=True)
        try:
            with signals(pack):
                pack.run(self._take, self._done)
        finally:
            for number in self.running:
                fail(self.study, number)
            write_trials(self.folder, self.study, self.sweep)
            pack.close()

    def _take(self, free: int) -> list[Job]:
        jobs: list[Job] = []
        while len(jobs) < free and answered(self.study) + len(self.running) < self.sweep.target and (self.left_s is None or self.watch.peek() < self.left_s):
            trial = self.study.ask()
            self.running[trial.number] = trial
            chosen = self.sweep.complete({key: dimension.suggest(trial, key) for key, dimension in self.sweep.dimensions.items()})
            jobs.append(self.packing.job(at(self.cfg, chosen), (trial, chosen)))
        return jobs

    def _prune(self, run: Running) -> bool:
        if self.sweep.pruner is None:
            return False
        trial = run.job.name.tag[0]
        trial.report(run.history[-1]["validation_metric"], run.step)
        return bool(trial.should_prune())

    def _done(self, run: Running) -> None:
        trial, chosen = run.job.name.tag
        result = self._result(run)
        if run.pruned:
            tell_pruned(self.study, trial, result, self.lap.lap())
        else:
            tell(self.study, trial, self.sweep, result, self.lap.lap())
        del self.running[trial.number]
        write_trials(self.folder, self.study, self.sweep)
        how = f"pruned at step {run.step}" if run.pruned else f"of {run.seconds:.1f} s of the pack's steps"
        value = getattr(result.scores["validation"], result.metric)
        print(f"trial {answered(self.study)} of {self.sweep.target}: {short(chosen)}: validation {result.metric} {value:.3f}, {how}", flush=True)

    def _result(self, run: Running) -> Result:
        member = run.job.name
        seen = run.tokens + run.padding
        work = Work(steps=run.step, tokens=run.tokens, padding_share=run.padding / seen if seen else None, engine="handwritten",
                    diverged_at=run.diverged_at)
        phases = Phases(run.seconds, 0, 0, 0, run.seconds, 0, 0, 0, 0)
        return cell.bare_result(
            member.cfg, status="ok", precision=self.packing.precision, scores={"validation": run.found[0]}, phases=phases, work=work, history=run.history,
            notes=run.notes, packed=True, slots=self.slots, hardware=hardware(self.packing.device), provenance=self.about,
        )


def covers(cfg: DictConfig, sweep: Sweep) -> list[Point]:
    """Settings that between them take every extreme of the space: the config's own with one dimension changed at a time."""
    found: list[Point] = []
    for key, dimension in sweep.dimensions.items():
        for value in dimension.choices if dimension.choices is not None else (dimension.low, dimension.high):
            linked = {other: rule["times"] * value for other, rule in sweep.link.items() if rule["of"] == key}
            found.append({key: value, **linked})
    return found
