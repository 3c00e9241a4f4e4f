"""Jobs on Ray: this machine's GPUs or a running cluster. The only file that imports ray; it runs in a process of its own, whose end the caller survives.

A job is one Ray task with the CPUs and the share of a GPU that it declares, named after its cell on Ray's pages. The task hands it to its worker's host
process (pipeline/fan/host.py), and streams back where it began, how it ended and, with ray.store=objects, what it wrote.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.cell import identity
from pipeline.cell.launch import INTERRUPTED, OUT_OF_MEMORY
from pipeline.core import locks
from pipeline.core.compose import ROOT
from pipeline.core.files import UserError
from pipeline.fan import parcels
from pipeline.fan.host import Host, Reply, code_of, sent
from pipeline.fan.jobs import BUSY, LOST, Job, Queue, Ray
from pipeline.measure.clock import Stopwatch

AT_ONCE = 512
"""Tasks that Ray is given at once, at most: its waiting and this loop's stay quick, and a cluster that grows sees enough of them."""
LOOK_S = 2.0
"""How long to wait for news before looking again for what another process computed."""
TELL_S = 30.0
"""Seconds between lines on how far it is."""
CODE = ("pipeline", "conf", "experiments", "tuning")
"""The folders of this one that a worker needs."""
LARGEST_FILE = 2**20
"""Bytes of a file beside them (a metric of one's own, say) that is sent too."""


def left_out(root: Path) -> list[str]:
    """Of the working folder, what is not sent to workers as code: everything but CODE and small files, whatever else a user keeps there."""
    return sorted(f"/{path.name}" for path in root.iterdir() if path.name not in CODE and (path.is_dir() or path.stat().st_size > LARGEST_FILE))


class ClusterLost(Exception):
    """The cluster, or this machine's place in it, is gone: what runs and waits is not to blame."""


Tell = Callable[[Job, int, Any], None]
"""Called with every job that is through, its code and the value that it left."""
Phase = Callable[[float, float], Queue]
"""(CPUs, GPUs of the cluster) -> what is to be done then."""


def dispatch(phases: Sequence[Phase], settings: Ray, work: Path, tell: Tell) -> int:
    """Run one queue after the other on Ray, as long as all of the one before ended with 0. Returns the highest code of the last.

    Raises:
        UserError: Ray is not installed, no cluster answers, or no node can ever run a job. KeyboardInterrupt: ended by a signal.
    """
    code = 0
    with connected(settings) as ray:
        have = ray.cluster_resources()
        for phase in phases:
            code = code or _Dispatcher(ray, phase(have.get("CPU", 1), have.get("GPU", 0)), settings, work, tell).run()
    return code


@contextlib.contextmanager
def connected(settings: Ray) -> Iterator[Any]:
    """Ray, connected to the cluster at its address or to one that is started here."""
    if (settings.address or "").startswith("ray://"):
        raise UserError(f"ray.address={settings.address} is Ray's client, which streams nothing; run the command on a machine of the cluster, "
                        "with ray.address=auto")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_agent_register_timeout_ms", "300000")  # a busy machine takes its time
    os.environ.setdefault("RAY_health_check_failure_threshold", "20")
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15: timed cells are no background work
    os.environ.setdefault("RAY_memory_usage_threshold", "0.98")  # a cell's own limit and the kernel come first
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        import ray
    except ImportError as error:
        raise UserError("Ray is not installed; pip install 'alignscope[ray]', or choose launcher=slurm or launcher=local") from error
    environment: dict[str, Any] = {"env_vars": {"PYTHONPATH": str(ROOT)}} if settings.address else {}
    if settings.store == "objects":
        environment = {"working_dir": str(ROOT), "excludes": left_out(ROOT)}
    try:
        context = ray.init(address=settings.address, include_dashboard=None if settings.dashboard or settings.address else False, log_to_driver=False,
                           logging_level=logging.ERROR, runtime_env=environment or None)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster answers at ray.address={settings.address} ({str(error).splitlines()[0][:200]}); start one with `ray start --head`, "
                        "or leave ray.address out to use this machine") from error
    except Exception as error:
        if type(error) is not Exception:  # Ray's for processes of its own that did not come up in time
            raise
        print(f"Ray did not start: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        raise ClusterLost from error
    try:
        if context.dashboard_url:
            print(f"Ray's pages: http://{context.dashboard_url}", flush=True)
        yield ray
    finally:
        ray.shutdown()


class _Dispatcher:
    """The loop: hands out tasks as places are free, takes in what they stream."""

    def __init__(self, ray: Any, queue: Queue, settings: Ray, work: Path, tell: Tell) -> None:
        self.ray, self.queue, self.settings, self.work, self.tell = ray, queue, settings, work, tell
        self.flying: dict[Any, Job] = {}
        self.nodes: dict[str, str] = {}
        """By a running job's name the node that it runs on."""
        self.running: dict[str, str] = {}
        self.parcels: dict[str, parcels.Parcel] = {}
        self.task = ray.remote(num_returns="streaming", max_retries=0, max_calls=0, scheduling_strategy="SPREAD")(_task)

    def run(self) -> int:
        since, told = Stopwatch(), Stopwatch()
        while True:
            while len(self.flying) < AT_ONCE and (job := self.queue.take()):
                self._start(job)
            if not self.queue.left and not self.flying:
                break
            if self.flying:
                ready, _ = self.ray.wait(list(self.flying), num_returns=1, timeout=LOOK_S)
                more = self.ray.wait(list(self.flying), num_returns=len(self.flying), timeout=0)[0] if ready else []
                for stream in more or ready:
                    self._hear(stream)
            else:
                threading.Event().wait(LOOK_S)
            if self.queue.busy and (not self.flying or since.peek() > LOOK_S):
                since.lap()
                self.queue.look_again()
            if told.peek() > TELL_S:
                told.lap()
                print(self.state(), flush=True)
        print(self.state(), flush=True)
        return max(self.queue.failed.values(), default=0)

    def state(self) -> str:
        """How far it is, in one line."""
        waiting = self.queue.left + len(self.flying) - len(self.running)
        return f"{len(self.queue.done)} of {self.queue.total} done, {len(self.running)} running, {waiting} waiting, {len(self.queue.failed)} failed"

    def _start(self, job: Job) -> None:
        self._check_possible(job)
        if self.settings.store == "objects" and job.brings is not None:
            try:
                job.held = job.held or _hold(job, self.work)
            except locks.Busy:
                self.queue.ended(job, BUSY)
                return
        request = {"work": job.work, "folder": str(Path.cwd()), "log": str((self.work / "fanout" / f"{job.name}.log").absolute()),
                   "cells": [sent(cfg) for cfg in job.cells], **job.extra}
        if job.brings is not None:
            [cfg] = job.cells
            request |= {"data or model": identity.fingerprint(cfg), "code": code_of(cfg)}
        carried = self._carried(job) if self.settings.store == "objects" else None
        options: dict[str, Any] = {"name": job.name, "num_cpus": job.cpus, "num_gpus": job.gpus}
        if others := self._elsewhere(job):
            options["label_selector"] = {"ray.io/node-id": f"in({','.join(others)})"}
            options["scheduling_strategy"] = "DEFAULT"
        stream = self.task.options(**options).remote(request, carried, self.settings.cache, job.brings and str(job.brings))
        self.flying[stream] = job

    def _check_possible(self, job: Job) -> None:
        """Raise UserError for a job that this cluster would never run, as it is now."""
        have = self.ray.cluster_resources() if not self.flying else None
        if have is not None and not have.get("CPU"):
            raise ClusterLost
        if have is not None and (job.gpus > have.get("GPU", 0) or job.cpus > have.get("CPU", 0)):
            raise UserError(f"{job.name} wants {job.cpus:g} CPUs and {job.gpus:g} GPUs, and the cluster has {have.get('CPU', 0):g} and "
                            f"{have.get('GPU', 0):g}; lower ray.cpus or ray.gpus, choose device=cpu, or connect more machines")

    def _elsewhere(self, job: Job) -> list[str]:
        """The nodes that a job may be tried on after it failed on others; none where there is no choice."""
        if not job.avoid:
            return []
        able = [n["NodeID"] for n in self.ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= job.cpus and n["Resources"].get("GPU", 0) >= job.gpus]
        return [node for node in able if node not in job.avoid]

    def _carried(self, job: Job) -> list[dict[str, parcels.Parcel]]:
        return [{place: self._parcel(source) for place, source in parcels.reads(cfg).items()} for cfg in job.cells]

    def _parcel(self, source: Path) -> parcels.Parcel:
        sha = parcels.digest(source)
        if sha not in self.parcels:
            self.parcels[sha] = parcels.packed(source, self.ray.put)
        return self.parcels[sha]

    def _hear(self, stream: Any) -> None:
        """Take the next part of what a task streams: where it began, or how it ended and the files after that."""
        job = self.flying[stream]
        try:
            news = self.ray.get(next(stream))
        except StopIteration:
            self._end(stream, Reply(LOST, "it ended without an answer"))
        except self.ray.exceptions.LocalRayletDiedError as error:
            raise ClusterLost from error
        except self.ray.exceptions.OutOfMemoryError:
            self._end(stream, Reply(OUT_OF_MEMORY, "Ray ended its worker: the machine was out of memory"))
        except self.ray.exceptions.RayTaskError as error:
            self._end(stream, Reply(1, str(error.cause or error)[-500:]))
        except self.ray.exceptions.RayError as error:
            self._end(stream, Reply(LOST, f"its worker died ({type(error).__name__})"))
        else:
            if "node" in news:
                self.nodes[job.name], self.running[job.name] = news["node"], news["host"]
            else:
                self._finish(stream, job, news)

    def _finish(self, stream: Any, job: Job, news: dict[str, Any]) -> None:
        reply = Reply(**news["reply"])
        if news["sha256"] and job.brings is not None:
            try:
                parcels.take_in((self.ray.get(part) for part in stream), job.brings, news["sha256"])
            except self.ray.exceptions.RayError as error:
                reply = Reply(LOST, f"its worker died while it sent the result ({type(error).__name__})")
            except UserError as error:
                reply = Reply(1, str(error))
        self._end(stream, reply)

    def _end(self, stream: Any, reply: Reply) -> None:
        job = self.flying.pop(stream)
        node, host = self.nodes.pop(job.name, None), self.running.pop(job.name, None)
        outcome = self.queue.ended(job, reply.code, node)
        if outcome in ("done", "failed"):
            self.queue.through(job, reply.code, reply.value)
            self.tell(job, reply.code, reply.value)
        if job.held is not None and outcome != "again":
            job.held.close()
            job.held = None
        where = f" on {host}" if host and host != socket.gethostname() else ""
        said = reply.said.strip().splitlines()
        if outcome == "done":
            print(f"[{len(self.queue.done)}/{self.queue.total}]{where} {said[-1] if said else job.name}", flush=True)
        elif outcome == "again":
            print(f"{job.name}{where}: {_why(reply)}; try {job.tries + 1} of {self.queue.retries + 1}", file=sys.stderr, flush=True)
        elif outcome == "failed":
            print(f"{job.name}{where} failed: {_why(reply)}", *said[-8:], sep="\n  ", file=sys.stderr, flush=True)
        if reply.code == INTERRUPTED:
            raise KeyboardInterrupt


def _why(reply: Reply) -> str:
    return reply.said.strip().splitlines()[-1] if reply.code in (LOST, OUT_OF_MEMORY) and reply.said.strip() else f"ended with code {reply.code}"


def _hold(job: Job, work: Path) -> contextlib.ExitStack:
    from pipeline.cell.locks import path_of

    stack = contextlib.ExitStack()
    for cfg in job.cells:
        stack.enter_context(locks.held(path_of(cfg)))
    return stack


# On the worker

_host: Host | None = None


def _task(request: dict[str, Any], carried: list[dict[str, parcels.Parcel]] | None, cache: str | None, brings: str | None) -> Iterator[Any]:
    """One job: yields where it runs, then how it ended, then the files that it brings back."""
    import ray

    context = ray.get_runtime_context()
    yield {"node": context.get_node_id(), "host": socket.gethostname()}
    gpus = context.get_accelerator_ids().get("GPU", [])
    request["environment"] = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    cpus = context.get_assigned_resources().get("CPU", 1)
    if carried is None:
        yield {"reply": vars(_ask(request, cpus)), "sha256": None}
        return
    yield from _apart(request, carried, parcels.cache_folder(cache), brings, cpus, ray.get)


def _ask(request: dict[str, Any], cpus: float) -> Reply:
    global _host
    if _host is None or not _host.alive:
        if _host is not None:
            _host.close()
        _host = Host(cpus)
    return _host.ask({**request, "threads": max(1, int(cpus))})


def _apart(request: dict[str, Any], carried: list[dict[str, parcels.Parcel]], cache: Path, brings: str | None, cpus: float,
           get: Callable[[Any], bytes]) -> Iterator[Any]:
    """A job whose folders are sent: run in a folder of its own."""
    views = [parcels.view(cache, sent_parcels, get) for sent_parcels in carried]
    run = parcels.run_folder(cache, views[0])
    try:
        paths = request["cells"][0]["paths"]
        cells = [parcels.at_worker(config, cache, view) for config, view in zip(request["cells"], views, strict=True)]
        reply = _ask({**request, "cells": cells, "folder": str(run), "log": str(run / "output.log")}, cpus)
        made = run / "results" / Path(brings).parent.name / Path(brings).name if brings else None
        if made is None or reply.code:
            yield {"reply": vars(reply), "sha256": None}
            return
        parcels.own_paths(made, paths)
        yield {"reply": vars(reply), "sha256": parcels.sha256(made)}
        yield from parcels.pieces(made)
    finally:
        shutil.rmtree(run, ignore_errors=True)
