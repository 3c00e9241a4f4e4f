"""Fill the time that a GPU machine is lent for: a plan's commands, in slots that a kill between two of them does not hurt.

    python -m benchmarks.lease run plan=benchmarks/plans/published.yaml limit_s=560 out=$OUT -- paths.data=/tmp/data …      again in every slot
    python -m benchmarks.lease show plan=benchmarks/plans/published.yaml        what of it is done
    python -m benchmarks.lease carry plan=benchmarks/plans/published.yaml to=carried shared=../shared       what must travel there (benchmarks/lease_carry.py)

    further words: root=/tmp (the folder for everything there), state=ROOT/lease, gpus=0,1 (those that there are), forget=NAME,…, all=true

A plan is YAML: `commands`, the most valuable first, and `keep`, patterns of files to bring back. {root} stands for the root in both.

    name: tuners
    run: python -m pipeline.cells experiments=tuners share=true {words}
    gpus: 1                   GPUs that it has to itself, or all; CUDA_VISIBLE_DEVICES for it, and {gpus} in `run`. Without: none
    limit_s: 300, least_s: 60 what it may take in all; a slot with less time left does not begin it
    mps: true                 its processes share the GPU through NVIDIA's MPS, where the machine has it; never where anything is timed
    after: [rates], needs: [ray]      what must be over before, whatever became of it; what must have gone well

    {words}: what stands after -- here. {left}: whole seconds until the slot or its own limit ends, less 25.

A command begins when GPUs enough are free; until then none that comes later takes one, so a plan for two GPUs also runs on one. What wants more than there are
and what needs one that failed or was passed over is passed over, with a sentence. A command that the slot's end interrupts (SIGINT; after 8 s SIGKILL to its
whole group) is begun again in the next slot, so it must resume by itself; so is one that was told {left} and ends with 1 (something is missing) in the last
minute. Another one that fails is done, too: forget=NAME begins it anew. Output goes to STATE/NAME.log, what became of a command to STATE/NAME.json.
A command with mps has a daemon of its own (STATE/NAME.mps), begun before it and ended after it, however it ends; none that lacks the word is ever its client.
Every 90 s and at the end the logs and of what `keep` matches that which is new since the slot began (all=true: all of it, where an archive did not arrive) are
put into out/all.tar.xz; above 15 MiB into all.tar.xz.0, .1, … of at most so much. Unpack either by: cat all.tar.xz* | tar xJ -C FOLDER (results come before
predictions, so that the first parts alone are of use). Exit codes: 0 all commands are done, 1 some are missing or failed, 2 bad input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import UserError, write_json
from pipeline.measure.clock import Stopwatch
from pipeline.measure.machine import visible_gpus

OWN = {"plan": "", "limit_s": "inf", "out": "", "state": "", "forget": "", "all": "false", "root": "/tmp", "gpus": ""}
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
LAST_WORDS_S, GRACE_S, PACK_S, MARGIN_S, LEFT_S, ENDS_S = 12.0, 8.0, 90.0, 15.0, 25.0, 60.0
"""Before the slot's end commands are interrupted; after that they are killed; between packings; the least that one is begun for; what {left} leaves; before the
end one that heeds {left} may say that something is missing."""
POLL_S = 0.2
PART_BYTES = 15 * 2**20
CLOCK_S = 0.05
"""How much earlier than it is the time may be that a file system gives a file."""
MPS, MPS_S = "nvidia-cuda-mps-control", 5.0
"""NVIDIA's daemon that lets several processes' kernels run at once on a GPU; the longest that its start and its end are waited for."""


@dataclass(frozen=True)
class Command:
    """One command of a plan, as the module says. gpus: how many; None: all there are."""

    name: str
    run: str
    gpus: int | None = 0
    limit_s: float = math.inf
    least_s: float = 0.0
    after: Sequence[str] = ()
    needs: Sequence[str] = ()
    mps: bool = False


@dataclass(frozen=True)
class Plan:
    """commands: the most valuable first. keep: patterns of files to bring back, ** for any folders. carry: as benchmarks/lease_carry.py says."""

    commands: Sequence[Command]
    keep: Sequence[str]
    carry: Mapping[str, Any]


def read(path: Path, root: str = "/tmp") -> Plan:
    """Raises UserError: a plan that is not there or not one."""
    try:
        document = yaml.safe_load(path.read_text().replace("{root}", root))
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a plan ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(document, dict) or not isinstance(document.get("commands"), list):
        raise UserError(f"{path}: a plan has `commands`, a list; benchmarks/lease.py says how one looks")
    plan = Plan([_command(path, entry) for entry in document["commands"]], document.get("keep", []), document.get("carry", {}))
    names = [command.name for command in plan.commands]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two commands are named {name}; a name is its log's and its state's")
    for command in plan.commands:
        if unknown := [name for name in (*command.after, *command.needs) if name not in names]:
            raise UserError(f"{path}: {command.name} comes after {', '.join(unknown)}, which the plan has not")
    return plan


def _command(path: Path, entry: Any) -> Command:
    known = {field.name for field in dataclasses.fields(Command)}
    if not isinstance(entry, dict) or not {"name", "run"} <= entry.keys() <= known:
        raise UserError(f"{path}: {entry!r} must have name and run, and of {', '.join(sorted(known - {'name', 'run'}))} what it needs")
    if not NAME.fullmatch(str(entry["name"])):
        raise UserError(f"{path}: {entry['name']!r} names a file; write letters, digits, _, - and . alone")
    gpus = entry.get("gpus", 0)
    if gpus != "all" and not (isinstance(gpus, int) and gpus >= 0):
        raise UserError(f"{path}: {entry['name']}: gpus is {gpus!r}; write how many, or all")
    if not isinstance(entry.get("mps", False), bool):
        raise UserError(f"{path}: {entry['name']}: mps is {entry['mps']!r}; write true or false")
    seconds = {key: _seconds(entry[key], f"{path}: {entry['name']}: {key}") for key in ("limit_s", "least_s") if key in entry}
    return Command(**entry | seconds | {"gpus": None if gpus == "all" else gpus})


def _seconds(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} is {value!r}; write seconds") from error


def outcome_of(state: Path, name: str) -> dict[str, Any] | None:
    """What became of a command that is done: code (None: it was cut), seconds."""
    path = state / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


class Slot:
    """A plan's commands for as long as the machine is lent. gpus: the machine's. whole: whether what was made before comes back, too."""

    def __init__(self, plan: Plan, state: Path, limit_s: float, words: Sequence[str] = (), out: Path | None = None, gpus: Sequence[str] = ("0",),
                 whole: bool = True) -> None:
        self.plan, self.state, self.limit_s, self.words, self.out, self.gpus, self.watch = plan, state, limit_s, words, out, gpus, Stopwatch()
        state.mkdir(parents=True, exist_ok=True)
        self.since = 0.0 if whole else time.time() - CLOCK_S
        self.passed: set[str] = set()

    @property
    def left(self) -> float:
        return self.limit_s - self.watch.peek()

    def outcome(self, name: str) -> dict[str, Any] | None:
        return outcome_of(self.state, name)

    def work(self) -> None:
        """Run until everything is done or the time is up."""
        waiting = [command for command in self.plan.commands if not self.outcome(command.name)]
        running: dict[threading.Thread, Sequence[str]] = {}
        packed = 0.0
        try:
            while self._begin(waiting, running) or running:
                time.sleep(POLL_S)
                for thread in [one for one in running if not one.is_alive()]:
                    del running[thread]
                if self.watch.peek() - packed > PACK_S:
                    packed = self.watch.peek()
                    self.pack()
        finally:  # an interrupt is the slot's end
            self.limit_s = min(self.limit_s, self.watch.peek())
            for thread in running:
                thread.join()
            self.pack()

    def _begin(self, waiting: list[Command], running: dict[threading.Thread, Sequence[str]]) -> bool:
        """Begin what may begin, in the plan's order, and pass over what never will. Returns whether there was any."""
        free = [gpu for gpu in self.gpus if not any(gpu in taken for taken in running.values())]
        before = len(waiting)
        for command in list(waiting):
            wanted = len(self.gpus) if command.gpus is None else command.gpus
            if reason := self._hindered(command, wanted):
                print(f"{command.name}: not begun, because {reason}", flush=True)
                waiting.remove(command)
                self.passed.add(command.name)
            elif not all(self.outcome(name) or name in self.passed for name in (*command.after, *command.needs)) or self.left < max(command.least_s, MARGIN_S):
                continue
            elif wanted > len(free):
                free = []
            else:
                gpus, free = free[:wanted], free[wanted:]
                thread = threading.Thread(target=self._run, args=(command, gpus), daemon=True)
                running[thread] = gpus
                waiting.remove(command)
                thread.start()
        return len(waiting) < before

    def _hindered(self, command: Command, wanted: int) -> str:
        """Why a command will not run in this slot; empty: it may."""
        if failed := [name for name in command.needs if (self.outcome(name) or {"code": 0})["code"]]:
            return f"{', '.join(failed)} failed"
        if missing := [name for name in command.needs if name in self.passed]:
            return f"{', '.join(missing)} was not"
        if wanted > len(self.gpus):
            return f"it needs {wanted} GPUs and there {'is' if len(self.gpus) == 1 else 'are'} {len(self.gpus)}"
        return ""

    def _run(self, command: Command, gpus: Sequence[str]) -> None:
        watch, before = Stopwatch(), self._spent(command)
        environment = _without_mps() | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
        line = command.run.replace("{words}", shlex.join(self.words)).replace("{gpus}", ",".join(gpus))
        with (self.state / f"{command.name}.log").open("ab") as log, _mps(self.state / f"{command.name}.mps", log, command.mps) as client:
            left = min(self.left, command.limit_s - before)
            line = line.replace("{left}", str(max(0, int(left - LEFT_S)) if left < 1e9 else 10**6))
            process = subprocess.Popen(["bash", "-c", line], stdout=log, stderr=log, env=environment | client, start_new_session=True)
            while process.poll() is None and self.left > LAST_WORDS_S and before + watch.peek() < command.limit_s:
                time.sleep(0.1)
            cut = process.poll() is None
            _end(process)
        seconds = before + watch.peek()
        own = command.limit_s - seconds
        late = not cut and process.returncode == 1 and "{left}" in command.run and min(self.left, own) < ENDS_S
        whole = own < ENDS_S if late else own <= 0 if cut else True
        if whole:
            write_json(self.state / f"{command.name}.json", {"code": None if cut or late else process.returncode, "seconds": round(seconds, 1)})
        else:
            (self.state / f"{command.name}.spent").write_text(str(seconds))
        told = _told(self.outcome(command.name)) if whole else f"interrupted, {seconds:.0f} s"
        print(f"after {self.watch.peek():.0f} s: {command.name}: {told}", flush=True)

    def _spent(self, command: Command) -> float:
        """Seconds of earlier slots."""
        path = self.state / f"{command.name}.spent"
        return float(path.read_text()) if path.exists() else 0.0

    def pack(self) -> None:
        """The logs and what is to be kept as one file, or as parts of one."""
        if self.out is None:
            return
        kept = {path for pattern in self.plan.keep for path in glob.glob(pattern, recursive=True) if _changed(path) >= self.since}
        kept |= {str(path) for path in self.state.iterdir() if path.is_file()}
        paths = sorted(kept, key=lambda path: (path.endswith("predictions.jsonl"), path))
        part = self.out / "part.tar.xz"
        try:
            with tarfile.open(part, "w:xz", preset=1) as archive:
                for path in paths:
                    with contextlib.suppress(FileNotFoundError):  # an unfinished file of a command that is running
                        archive.add(path)
            _split(part, self.out / "all.tar.xz")
        except OSError as error:  # the commands go on, and the archive of before stands
            part.unlink(missing_ok=True)
            print(f"{part}: not packed ({error.strerror}); make room there", file=sys.stderr, flush=True)


def _changed(path: str) -> float:
    """When a file was written last; of what is none, or is one no more (a running command's unfinished one), minus infinity."""
    try:
        return os.path.getmtime(path) if os.path.isfile(path) else -math.inf
    except FileNotFoundError:
        return -math.inf


def _split(whole: Path, to: Path) -> None:
    """Put a file where it belongs, in parts where it is large; those of before go."""
    names = [to] if (size := whole.stat().st_size) <= PART_BYTES else [to.with_name(f"{to.name}.{at}") for at in range(-(-size // PART_BYTES))]
    parts = [whole] if len(names) == 1 else [name.with_name(f"part.{name.name}") for name in names]
    if len(names) > 1:
        with whole.open("rb") as source:
            for part in parts:
                part.write_bytes(source.read(PART_BYTES))
        whole.unlink()
    for part, name in zip(parts, names, strict=True):  # at once, since parts of two archives are none
        part.replace(name)
    for stale in {to, *to.parent.glob(f"{to.name}.*")} - set(names):
        stale.unlink(missing_ok=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a command if it still runs, and kill what is left of its group: what bash began in the background ignores an interrupt."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _without_mps() -> dict[str, str]:
    """This process's environment, without what would make it a client of somebody's daemon."""
    return {key: value for key, value in os.environ.items() if not key.startswith("CUDA_MPS_")}


@contextlib.contextmanager
def _mps(folder: Path, log: IO[bytes], wanted: bool) -> Iterator[dict[str, str]]:
    """A daemon in this folder for as long as the context lasts: what makes a process its client, for its environment. Nothing where it is not wanted; nor,
    with a line in the log, where there is none or it does not start."""
    if not wanted:
        yield {}
        return
    client = {"CUDA_MPS_PIPE_DIRECTORY": str(folder.resolve()), "CUDA_MPS_LOG_DIRECTORY": str(folder.resolve())}
    if folder.exists():  # of a slot that was killed
        _end_mps(client, log)
    folder.mkdir(parents=True, exist_ok=True)
    reason = _control([MPS, "-d"], b"", client, log)
    try:
        if reason:
            log.write(f"without MPS: {reason}\n".encode())
            log.flush()
            _kill(client)
        yield {} if reason else client
    finally:
        if not reason:
            _end_mps(client, log)
        shutil.rmtree(folder, ignore_errors=True)


def _end_mps(client: Mapping[str, str], log: IO[bytes]) -> None:
    """End the daemon of these clients, if there is one: it is told to; where it waits or cannot be told, it is killed with its servers."""
    if _control([MPS], b"quit\n", client, log):
        _kill(client)


def _kill(client: Mapping[str, str]) -> None:
    """Kill every process with this folder in its environment: a daemon, its servers, clients."""
    own = f"CUDA_MPS_PIPE_DIRECTORY={client['CUDA_MPS_PIPE_DIRECTORY']}\0".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if own in environment.read_bytes():
                os.kill(int(environment.parent.name), signal.SIGKILL)


def _control(words: Sequence[str], said: bytes, client: Mapping[str, str], log: IO[bytes]) -> str:
    """Start the daemon, or tell it something. Returns why that failed; empty: it did not. No pipe is read, since the daemon would keep it open."""
    try:
        done = subprocess.run(words, input=said, stdout=log, stderr=log, env={**_without_mps(), **client}, timeout=MPS_S)
    except OSError as error:
        return f"{MPS} cannot be run ({error.strerror})"
    except subprocess.TimeoutExpired:
        return f"{MPS} took longer than {MPS_S:.0f} s"
    return f"{MPS} ended with {done.returncode}" if done.returncode else ""


def run(words: Sequence[str]) -> int:
    """One of the commands above."""
    split = list(words).index("--") if "--" in words else len(words)
    command, more = (words[0] if words else ""), list(words[split + 1 :])
    if command == "carry":
        from benchmarks import lease_carry

        return lease_carry.run(words[1:])
    given = OWN | key_values(list(words[1:split]), tuple(OWN), "benchmarks.lease")
    if command not in ("run", "show"):
        raise UserError(f"benchmarks.lease takes run, show or carry, not {command!r}")
    for key in ("plan", *(["out"] if command == "run" else [])):
        if not given[key]:
            raise UserError(f"benchmarks.lease {command} needs {key}=…")
    plan, state = read(Path(given["plan"]), given["root"]), Path(given["state"] or f"{given['root']}/lease")
    if command == "run":
        out, limit_s = Path(given["out"]), _seconds(given["limit_s"], "limit_s")
        out.mkdir(parents=True, exist_ok=True)
        forgotten = [name for name in given["forget"].split(",") if name]
        if unknown := set(forgotten) - {one.name for one in plan.commands}:
            raise UserError(f"forget={','.join(sorted(unknown))} is no command of {given['plan']}")
        for name in forgotten:
            for suffix in ("json", "spent"):
                (state / f"{name}.{suffix}").unlink(missing_ok=True)
        Slot(plan, state, limit_s, more, out, _gpus(given["gpus"]), given["all"] == "true").work()
    outcomes = {one.name: outcome_of(state, one.name) for one in plan.commands}
    for name, outcome in outcomes.items():
        print(f"{name}: {_told(outcome)}")
    return 0 if all(outcome and not outcome["code"] for outcome in outcomes.values()) else 1


def _gpus(word: str) -> list[str]:
    """The GPUs of a slot; a machine without any has one in name, so that a plan can be tried there."""
    listed = word or os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [one for one in listed.split(",") if one] or [str(at) for at in range(max(1, visible_gpus()))]


def _told(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return "to do"
    code, seconds = outcome["code"], outcome["seconds"]
    return f"{'cut' if code is None else 'done' if code == 0 else f'failed ({code})'}, {seconds:.0f} s"


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
