"""Cells that differ only in their seed, trained at once over one base (pack=true); each is evaluated as a cell of its own afterwards.

Library of `python -m pipeline.cells`. What a cell's training leaves (weights, history, its share of the time) waits in paths.work, where
the cell finds it instead of training; a killed run goes on with what is there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline import cell
from pipeline.files import atomic_path
from pipeline.measure import Stopwatch
from pipeline.pack_process import attempt, signals
from pipeline.results import Work

if TYPE_CHECKING:
    from pipeline.fast.pack import Job, Running


SHARED_ENERGY = "energy was not measured: it was trained at once with others, whose energy is one figure"


def train(missing: Sequence[DictConfig], shared: cell.Shared) -> None:
    """Train what can be packed; the others are left to train by themselves, and the reason is said.

    Raises:
        UserError: the packed runs ended with an error. KeyboardInterrupt: ended by a signal.
    """
    groups: dict[str, list[DictConfig]] = {}
    for cfg in missing:
        same = {k: v for k, v in cell.decides(cfg).items() if k != "seed"}
        groups.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(cfg)
    for group in groups.values():
        slots: int | None = len(group)
        while slots and slots > 1 and len(left := [c for c in group if not cell.packed_of(c).exists() and not cell.checkpoint_of(c).exists()]) > 1:
            names = ", ".join(cell.name(c) for c in left)
            ended = attempt(lambda tell: _train(left, shared, slots, tell), shared, Path(left[0].paths.work) / "pack.json", left[0].memory_limit_gb)  # noqa: B023
            if ended.refused:
                print(f"one after another, because {ended.refused}: {names}", flush=True)
                break
            if not ended.out_of_memory:
                break
            slots = ended.fewer()
            print(f"{ended.slots} at once ran out of memory: {names}", flush=True)


def _train(group: Sequence[DictConfig], shared: cell.Shared, most: int | None, tell: Callable[[int], None]) -> None:
    from pipeline.packing import Packing

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
        print(f"{cell.name(run.job.name.cfg)}: trained with {slots} at once, {run.step} steps", flush=True)

    try:
        with signals(pack):
            pack.run(take, done)
    finally:
        pack.close()


def _keep(run: Running, slots: int, warmup_s: float) -> None:
    import torch

    seen = run.tokens + run.padding
    work = Work(steps=run.step, tokens=run.tokens, padding_share=run.padding / seen if seen else None, energy_note=SHARED_ENERGY,
                engine="handwritten", diverged_at=run.diverged_at)
    held = {"weights": run.weights, "history": run.history, "notes": run.notes, "work": dataclasses.asdict(work), "slots": slots,
            "train_s": run.seconds, "warmup_s": warmup_s}
    with atomic_path(cell.packed_of(run.job.name.cfg)) as beside:
        torch.save(held, beside)
