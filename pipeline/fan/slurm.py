"""An experiment's missing cells as an array of Slurm's jobs, through submitit, the only file that imports it. Jobs see this folder.

A job runs a set of cells one after another as `pipeline.cells` would, under the same locks: a command that is killed and started again waits for the
cells that jobs of before still compute. A job that Slurm preempts or ends for time goes back into the queue, where its cell resumes from its checkpoint.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell import grid, identity, launch, packing, preflight
from pipeline.cell.child import run_in_child
from pipeline.cell.inputs import preload
from pipeline.cell.launch import BAD_INPUT
from pipeline.core.files import UserError
from pipeline.fan.host import config, sent
from pipeline.fan.jobs import Slurm, needs, read_slurm
from pipeline.measure.machine import cpu_count
from pipeline.records.finished import name as cell_name

POLL_S = {"slurm": 10.0, "local": 0.2}
LEFT_MISSING = 1


def submit(missing: Sequence[DictConfig], mirror: grid.Mirror) -> int:
    """Submit the cells, wait for them, and submit again what jobs left missing. Returns 0 if all have a result."""
    settings, launcher = read_slurm(missing[0]), missing[0].launcher
    code = 0
    for attempt in range(settings.retries + 1):
        codes = _wait(_submitted(missing, settings, launcher), missing, mirror, POLL_S[launcher])
        missing = [cfg for cfg in missing if not grid.is_done(cfg)]
        code = max([LEFT_MISSING, *codes]) if missing else 0
        if not missing or BAD_INPUT in codes:
            break
        again = f"; try {attempt + 2} of {settings.retries + 1}" if attempt < settings.retries else ""
        print(f"{len(missing)} cells were left missing ({identity.few([cell_name(cfg) for cfg in missing])}){again}", file=sys.stderr, flush=True)
    return code


def sets(missing: Sequence[DictConfig], count: int) -> list[list[DictConfig]]:
    """The cells dealt out to at most `count` jobs, as evenly as it goes; those that read others, or train at once, stay together and in order."""
    root = {cell_name(cfg): cell_name(cfg) for cfg in missing}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    for name, others in needs(missing).items():
        for other in others:
            root[find(name)] = find(other)
    for group in packing.groups(missing):
        for cfg in group[1:]:
            root[find(cell_name(cfg))] = find(cell_name(group[0]))
    together: dict[str, list[DictConfig]] = {}
    for cfg in missing:
        together.setdefault(find(cell_name(cfg)), []).append(cfg)
    dealt: list[list[DictConfig]] = [[] for _ in range(min(count, len(together)))]
    for group in sorted(together.values(), key=len, reverse=True):
        min(dealt, key=len).extend(group)
    return dealt


class Cells:
    """What a job runs. submitit calls `checkpoint` when Slurm is about to end it, and queues what that returns."""

    def __call__(self, cells: list[dict[str, Any]], folder: str) -> int:
        os.chdir(folder)
        missing = [cfg for cfg in map(config, cells) if not grid.is_done(cfg)]
        if not missing:
            return 0
        shared = preload(missing)
        try:
            if missing[0].preflight and (code := run_in_child(lambda: preflight.ahead(missing, shared)).code):
                return code
            return grid.run_here(missing, shared, grid.Mirror.silent())
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args, **kwargs)


def _submitted(missing: Sequence[DictConfig], settings: Slurm, launcher: str) -> list[Any]:
    try:
        import submitit
    except ImportError as error:
        raise UserError("submitit is not installed; pip install 'alignscope[slurm]', or choose launcher=ray") from error
    logs = Path(missing[0].paths.work) / "fanout" / launcher
    executor = submitit.AutoExecutor(logs, cluster=launcher)
    gpu = missing[0].device != "cpu" and settings.gpus > 0
    gpus = max(settings.gpus, *(launch.declared(cfg) for cfg in missing))
    at_once = settings.jobs if launcher == "slurm" else 1 if gpu else min(settings.jobs, cpu_count() or 1)  # on a GPU of this machine one after another
    dealt = sets(missing, at_once)
    optional = {"mem_gb": settings.memory_gb, "slurm_partition": settings.partition, **(settings.options or {})}
    try:
        executor.update_parameters(name=f"alignscope-{missing[0].experiment}", timeout_min=settings.timeout_min, cpus_per_task=settings.cpus,
                                   gpus_per_node=gpus if gpu else 0, **{key: value for key, value in optional.items() if value is not None})
        jobs = executor.map_array(Cells(), [[sent(cfg) for cfg in one] for one in dealt], [str(Path.cwd())] * len(dealt))
    except (NameError, ValueError, AssertionError, RuntimeError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"{launcher} took no jobs ({str(error).splitlines()[0][:200]}); fix the keys of slurm.*, or choose launcher=ray") from error
    print(f"{len(jobs)} jobs for {len(missing)} cells, their output in {logs}", flush=True)
    return list(jobs)


def _wait(jobs: list[Any], missing: Sequence[DictConfig], mirror: grid.Mirror, poll_s: float) -> list[int]:
    """The exit codes of the jobs, once all have ended; cells are mirrored as they come."""
    unseen = {identity.folder_of(cfg): cfg for cfg in missing}
    total = len(unseen)
    while True:
        ended = all(job.done() for job in jobs)
        came = [folder for folder, cfg in unseen.items() if (folder / "result.json").exists() and grid.is_done(cfg)]
        for folder in came:
            print(f"[{total - len(unseen) + 1}/{total}] {cell_name(unseen[folder])}", flush=True)
            mirror.put([unseen.pop(folder)])
        if ended:
            return [_code(job) for job in jobs]
        threading.Event().wait(poll_s)


def _code(job: Any) -> int:
    """What a job returned; LEFT_MISSING of one that left nothing: ended from outside, or with an error, which its output shows."""
    import submitit

    try:
        return int(job.result())
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
        print(f"job {job.job_id} failed ({str(error).splitlines()[0][:200]}); its output is {job.paths.stderr}", file=sys.stderr, flush=True)
        return LEFT_MISSING
