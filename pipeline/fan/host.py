"""A process that keeps base models and runs what it is asked to in forked children: one for each of a worker's places, beside Ray's own process.

Ray's workers have threads and must not fork; their memory and start-up would be part of a cell's figures. A host has neither: a cell in it is what a
cell of `pipeline.cells` is. It ends with the worker that started it, its children with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.cell import grid, identity, inputs, locks, preflight
from pipeline.cell.child import Ended, run_cell, run_in_child
from pipeline.cell.inputs import Shared
from pipeline.cell.launch import BAD_INPUT, INTERRUPTED, dies_with
from pipeline.cell.pool import take_back
from pipeline.core.compose import ROOT, literal
from pipeline.core.files import UserError
from pipeline.fan.jobs import BUSY, CROWDED, LOST
from pipeline.measure.clock import now

SAID = 2000
"""Characters of a job's output that go back."""


@dataclass(frozen=True)
class Reply:
    """code: 0, or what the job ended with. said: the end of what it printed. value: what `work` left for the asker, as JSON."""

    code: int
    said: str = ""
    value: Any = None


# The side of the worker


class Host:
    """A host process, started with the first question."""

    def __init__(self, cpus: float) -> None:
        reads, writes = os.pipe()
        code = f"from pipeline.fan.host import serve; serve({writes}, {os.getpid()})"
        threads = str(max(1, int(cpus)))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True, env=environment, pass_fds=[writes],
                                        start_new_session=True)
        os.close(writes)
        self.answers = os.fdopen(reads, encoding="utf-8")

    def ask(self, request: dict[str, Any]) -> Reply:
        """Have a request done; LOST where the process died of it."""
        assert self.process.stdin is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = self.answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.close()
            return Reply(LOST, f"its process ended with code {self.process.returncode}")
        return Reply(**json.loads(answer))

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.answers.close()


# The side of the host


def serve(answers: int, parent: int) -> None:
    """Answer requests, a line of JSON each, on the descriptor `answers` until standard input ends."""
    dies_with(parent)
    kept = Kept()
    with os.fdopen(answers, "w", encoding="utf-8") as out:
        os.set_inheritable(answers, False)
        requests = os.fdopen(os.dup(0), encoding="utf-8")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for line in requests:
            print(json.dumps(_answer(json.loads(line), kept)), file=out, flush=True)


class Kept:
    """Base models and tokenizers that the host has read, those of one model at a time."""

    def __init__(self) -> None:
        self.key: Any = None
        self.loaded: Shared | None = None

    def of(self, cells: list[DictConfig], request: dict[str, Any]) -> Shared:
        """What these cells share, read by the first that asks, with the place that the request gives them: `threads`, and `at_once` on a GPU."""
        key = sorted({(cfg.paths.models, cfg.model.name, cfg.model.get("trust_remote_code")) for cfg in cells}, key=str)
        if self.loaded is None or self.key != key:
            self.key, self.loaded = key, inputs.preload(cells)
        at_once = request.get("at_once", 1)
        turns = turns_here() if at_once > 1 and not cells[0].share else None
        return dataclasses.replace(self.loaded, threads=request.get("threads", self.loaded.threads), at_once=at_once, turns=turns)


def turns_here() -> Path:
    """The folder by which processes of this user take turns on the GPU that this one sees."""
    gpu = re.sub(r"\W", "_", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    folder = Path(tempfile.gettempdir()) / f"alignscope-turns-{os.getuid()}" / gpu
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _answer(request: dict[str, Any], kept: Kept) -> dict[str, Any]:
    log = Path(request["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(request.get("environment", {}))
    value = None
    with open(log, "w", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        try:
            os.chdir(request["folder"])
            module, _, function = request["work"].partition(":")
            done = getattr(importlib.import_module(module), function)([config(c) for c in request["cells"]], request, kept)
            code, value = done if isinstance(done, tuple) else (done, None)
        except FileNotFoundError as error:
            if error.filename != request["folder"]:
                raise
            print(f"error: this worker does not see {error.filename}; add ray.store=objects, or share the folder", file=sys.stderr)
            code = BAD_INPUT
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = LOST if isinstance(error, Ended) else BAD_INPUT
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception:  # noqa: BLE001 (the job's own, whose trace is in its log; the host goes on)
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    return {"code": code, "said": log.read_text(encoding="utf-8", errors="replace")[-SAID:], "value": value}


def sent(cfg: DictConfig) -> dict[str, Any]:
    """A composed config as plain data."""
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key != "hydra"}


def config(values: dict[str, Any]) -> DictConfig:
    made: DictConfig = OmegaConf.create(literal(values))
    return made


# What a host is asked


def run_one(cells: list[DictConfig], request: dict[str, Any], kept: Kept) -> int:
    """Run a cell as `pipeline.cells` does; BUSY where another process computes it."""
    [cfg] = cells
    check_same(cfg, request)
    with locks.free([cfg]) as members:
        if not members:
            return BUSY
        if grid.is_done(cfg):
            return 0
        shared = kept.of(cells, request)
        code = run_cell(cfg, shared, now())
        return CROWDED if code == 0 and shared.turns and take_back(cfg) else code


def run_several(cells: list[DictConfig], request: dict[str, Any], kept: Kept) -> int:
    """Run cells one after another, or those of a pack at once."""
    missing = [cfg for cfg in cells if not grid.is_done(cfg)]
    return grid.run_here(missing, kept.of(missing, request), grid.Mirror.silent()) if missing else 0


def check_ahead(cells: list[DictConfig], request: dict[str, Any], kept: Kept) -> int:
    """The checks before a technique's first cell."""
    shared = kept.of(cells, request)
    return run_in_child(lambda: preflight.ahead(cells, shared)).code


def check_same(cfg: DictConfig, request: dict[str, Any]) -> None:
    """Raise UserError where this worker would compute another cell than was sent: by other data, another model, or other code."""
    for what, here in (("data or model", identity.fingerprint(cfg)), ("code", code_of(cfg))):
        if request.get(what, here) != here:
            raise UserError(f"the {what} that this worker has is not the sender's; update its folder, or add ray.store=objects")


def code_of(cfg: DictConfig) -> str:
    """Hash of the code that a cell runs."""
    return hashlib.sha256(json.dumps(identity.code(cfg), sort_keys=True).encode()).hexdigest()[:16]
