"""An experiment's missing cells run by many workers: what they are sent, what becomes of it, and who is told."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.cell import identity, launch, packing, preflight, record
from pipeline.cell.child import run_in_child
from pipeline.cell.grid import Limit, Mirror, asked, begin, clear, is_done
from pipeline.cell.room import AtOnce
from pipeline.core.files import UserError
from pipeline.fan import jobs as fan_jobs
from pipeline.fan.jobs import LOST, Job, Queue
from pipeline.records.finished import name as cell_name

HOST = "pipeline.fan.host"


def run(cells: Sequence[DictConfig], limit: Limit) -> int:
    """Run those of the cells that have no result on the workers that `launcher` names. Returns 0 if all have one then.

    Args:
        limit: says how many cells one GPU holds, and what each needs.
    """
    settings = fan_jobs.read_ray(cells[0])
    missing, mirror = begin(cells)
    if not missing:
        return 0
    for cfg in missing:
        launch.declared(cfg)
    with asked(limit, missing) as answer:
        at_once = answer()
    if cells[0].launcher != "ray":
        from pipeline.fan.slurm import submit

        return submit(missing, mirror)
    code = on_ray(missing, mirror, settings, at_once)
    mirror.put([cfg for cfg in missing if is_done(cfg)])
    return code


def on_ray(missing: Sequence[DictConfig], mirror: Mirror, settings: fan_jobs.Ray, at_once: AtOnce) -> int:
    """Run the cells on Ray, whose part of this is a process of its own: if the cluster is lost, what is missing then is tried with another."""
    for attempt in range(settings.retries + 1):
        news = News(missing, mirror)
        done = run_in_child(lambda: _dispatch(missing, settings, at_once, news), polled=news.read)  # noqa: B023
        news.read()
        if news.ended or done.code == launch.INTERRUPTED:
            return done.code
        if done.code in (launch.INTERRUPTED, 128 + 2, 128 + 15):
            raise KeyboardInterrupt
        missing = [cfg for cfg in missing if not is_done(cfg)]
        if not missing:
            return 0
        action = "starting again" if attempt < settings.retries else "run the same command again"
        print(f"the Ray cluster was lost with {len(missing)} cells to do; {action}", file=sys.stderr, flush=True)
    return LOST


def _dispatch(missing: Sequence[DictConfig], settings: fan_jobs.Ray, at_once: AtOnce, news: News) -> int:
    from pipeline.fan.cluster import ClusterLost, dispatch

    unchecked = preflight.unchecked(missing) if missing[0].preflight else []

    def checks(cpus: float, gpus: float) -> Queue:
        return Queue([_job(f"preflight-{i}-{g[0].technique.name}", "check_ahead", g, settings, cpus, gpus, at_once) for i, g in enumerate(unchecked)], 0)

    def cells(cpus: float, gpus: float) -> Queue:
        return Queue(cell_jobs(missing, settings, cpus, gpus, at_once), settings.retries)

    try:
        code = dispatch([*([checks] if unchecked else []), cells], settings, Path(missing[0].paths.work), news.tell)
    except ClusterLost:
        return LOST
    except UserError:
        news.tell(None, launch.BAD_INPUT, None)
        raise
    news.tell(None, code, None)
    return code


def cell_jobs(missing: Sequence[DictConfig], settings: fan_jobs.Ray, cpus: float, gpus: float, at_once: AtOnce) -> list[Job]:
    """A job for every cell; with pack=true and a shared folder one for those that train at once."""
    needs, made = fan_jobs.needs(missing), []
    packed = {cell_name(cfg): group for group in packing.groups(missing) for cfg in group} if settings.store == "shared" else {}
    for cfg in missing:
        group = packed.get(cell_name(cfg))
        if group is None:
            job = _job(cell_name(cfg), "run_one", [cfg], settings, cpus, gpus, at_once)
            job.brings = identity.folder_of(cfg)
        elif group[0] is cfg:
            job = _job(f"{cell_name(cfg)}-and-{len(group) - 1}-more", "run_several", group, settings, cpus, gpus, at_once if cfg.share else AtOnce())
        else:
            continue
        job.needs = frozenset().union(*(needs[cell_name(c)] for c in job.cells))
        made.append(job)
    where = {cell_name(c): job.name for job in made for c in job.cells}
    for job in made:
        job.needs = frozenset(where[n] for n in job.needs) - {job.name}
    return made


def _job(name: str, work: str, cells: Sequence[DictConfig], settings: fan_jobs.Ray, cpus: float, gpus: float,
         at_once: AtOnce) -> Job:
    cfg = cells[0]
    gpu = gpu_share(cfg, settings, gpus, at_once)
    cpu = cpu_share(settings, cpus, gpus, gpu) if gpu else settings.cpus or max(1.0, launch.declared(cfg))
    sent = [OmegaConf.merge(c, {"ray": {"gpus": gpu, "cpus": cpu}}) for c in cells]
    return Job(name, f"{HOST}:{work}", sent, gpus=gpu, cpus=cpu,  # type: ignore[arg-type]
               extra={"at_once": max(1, int(1 / gpu))} if 0 < gpu < 1 else {})


def gpu_share(cfg: DictConfig, settings: fan_jobs.Ray, gpus: float, at_once: AtOnce) -> float:
    """GPUs that a cell declares, in a cluster with so many: those that train it together (train.gpus), or the share of one that its memory asks for, so
    that no more cells are on it than may be at once. One whose need nobody knows has a whole one."""
    several = launch.declared(cfg)
    if cfg.device == "cpu" or (cfg.device == "auto" and not gpus):
        return 0.0
    if several:
        return float(several)
    if settings.gpus is not None:
        return settings.gpus
    need = at_once.needs.get(cell_name(cfg))
    if at_once.cells == 1 or need is None or not at_once.room:
        return 1.0
    return min(1.0, math.ceil(1e4 * max(1 / at_once.cells, need / at_once.room)) / 1e4)


def cpu_share(settings: fan_jobs.Ray, cpus: float, gpus: float, gpu: float) -> float:
    """CPUs that a cell declares beside its share of a GPU: as many as there are for that, and one without a GPU."""
    return settings.cpus or (max(1.0, cpus // gpus * gpu) if gpu else 1.0)


class News:
    """What the process that talks to Ray tells this one, a line of JSON each: this one has no threads, and may fork to mirror.

    ended: whether that process came to its end by itself, whatever its code.
    """

    def __init__(self, cells: Iterable[DictConfig], mirror: Mirror) -> None:
        self.cells = {cell_name(cfg): cfg for cfg in cells}
        self.mirror, self.ended, self.text = mirror, False, ""
        self.reads, self.writes = os.pipe()
        os.set_blocking(self.reads, False)

    def tell(self, job: Job | None, code: int, value: Any) -> None:
        """Of the process that talks to Ray: a job is through; None: all is."""
        line = {"cells": [cell_name(cfg) for cfg in job.cells] if job else None, "code": code, "value": value}
        os.write(self.writes, (json.dumps(line) + "\n").encode())

    def read(self) -> None:
        """Of this process: mirror what is finished, and write the row of what ran out of memory."""
        lines = self._lines()
        self.ended = self.ended or any(line["cells"] is None for line in lines)
        named = [(name, line["code"]) for line in lines for name in line["cells"] or () if name in self.cells]
        for name, code in named:
            if code == launch.OUT_OF_MEMORY:
                run_in_child(lambda: _write_oom(self.cells[name]))  # noqa: B023
        finished = [self.cells[name] for name, code in named if code in (0, launch.OUT_OF_MEMORY)]
        if finished:
            clear(finished)
            self.mirror.put([cfg for cfg in finished if (identity.folder_of(cfg) / "result.json").exists()])

    def _lines(self) -> list[dict[str, Any]]:
        while True:
            try:
                part = os.read(self.reads, 1 << 16)
            except BlockingIOError:
                break
            if not part:
                break
            self.text += part.decode()
        *whole, self.text = self.text.split("\n")
        return [json.loads(line) for line in whole]


def _write_oom(cfg: DictConfig) -> int:
    print(f"{record.write_oom(cfg, 'Ray ended its worker, since the machine was out of memory').cell}: oom", flush=True)
    return 0


