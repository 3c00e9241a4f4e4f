"""Commands on a machine that is lent for some minutes at a time: queues of them, in slots that each go on where the one before ended.

    python -m benchmarks.lease run plan=benchmarks/plans/tuners.yaml limit_s=560 out=FOLDER state=/tmp/lease -- paths.models=/tmp/models tracking=none
    python -m benchmarks.lease show plan=benchmarks/plans/tuners.yaml state=/tmp/lease       what there is to do, and what is done

A plan is YAML: `queues`, each a list of commands that run one after another, queues beside each other, and `keep`, the files to bring back:

    keep: ["/tmp/results/**/result.json"]
    queues:
      gpu0:
        - {name: cells, run: "python -m pipeline.cells experiments=quick {words}", gpus: "0", limit_s: 300, least_s: 40, after: [rates]}

    gpus: CUDA_VISIBLE_DEVICES; without it the machine's. limit_s: of the command, in all slots: after it the command counts as done, "cut".
    least_s: a slot with less time left does not begin it. after: names, in any queue, that must be done. If one of those failed, it is not begun.
    {words}: what stands after -- here. {left}: whole seconds until the slot ends, less 25.

A command that the slot's end interrupts (SIGINT; after 8 s SIGKILL to its whole group) is begun again in the next slot, so it must resume by itself. One that
fails is done, too: forget=NAME,… begins it anew. Output goes to STATE/NAME.log, what became of a command to STATE/NAME.json. Every 90 s and at the end the logs
and what `keep` matches are put into out/all.tar.xz, atomically. Exit codes: 0 all commands are done, 1 some are missing or failed, 2 bad input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import UserError, write_json
from pipeline.measure.clock import Stopwatch

OWN = {"plan": "", "limit_s": "inf", "out": "", "state": "", "forget": ""}
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
LAST_WORDS_S, GRACE_S, PACK_S, MARGIN_S, LEFT_S = 12.0, 8.0, 90.0, 15.0, 25.0
"""Before the slot's end commands are interrupted; after that they are killed; between packings; the least that one is begun for; what {left} leaves."""


@dataclass(frozen=True)
class Command:
    """One command of a plan, as the module says."""

    name: str
    run: str
    gpus: str | None = None
    limit_s: float = float("inf")
    least_s: float = 0.0
    after: Sequence[str] = ()


@dataclass(frozen=True)
class Plan:
    """queues: by name, commands in their order. keep: patterns of files to bring back, ** for any folders."""

    queues: Mapping[str, Sequence[Command]]
    keep: Sequence[str]

    @property
    def commands(self) -> list[Command]:
        return [command for queue in self.queues.values() for command in queue]


def read(path: Path) -> Plan:
    """Raises UserError: a plan that is not there or not one."""
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a plan ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(document, dict) or not isinstance(document.get("queues"), dict):
        raise UserError(f"{path}: a plan has `queues`, a list of commands each; benchmarks/lease.py says how one looks")
    plan = Plan({queue: [_command(path, queue, entry) for entry in entries or []] for queue, entries in document["queues"].items()}, document.get("keep", []))
    names = [command.name for command in plan.commands]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two commands are named {name}; a name is its log's and its state's")
    for command in plan.commands:
        if unknown := [name for name in command.after if name not in names]:
            raise UserError(f"{path}: {command.name} comes after {', '.join(unknown)}, which the plan has not")
    return plan


def _command(path: Path, queue: str, entry: Any) -> Command:
    known = {field.name for field in dataclasses.fields(Command)}
    if not isinstance(entry, dict) or not {"name", "run"} <= entry.keys() <= known:
        raise UserError(f"{path}: queue {queue}: {entry!r} must have name and run, and of {', '.join(sorted(known - {'name', 'run'}))} what it needs")
    if not NAME.fullmatch(str(entry["name"])):
        raise UserError(f"{path}: queue {queue}: {entry['name']!r} names a file; write letters, digits, _, - and . alone")
    return Command(**entry | {key: _seconds(entry[key], f"{path}: {entry['name']}: {key}") for key in ("limit_s", "least_s") if key in entry})


def _seconds(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} is {value!r}; write seconds") from error


class Slot:
    """A plan's commands for as long as the machine is lent."""

    def __init__(self, plan: Plan, state: Path, limit_s: float, words: Sequence[str] = (), out: Path | None = None) -> None:
        self.plan, self.state, self.limit_s, self.words, self.out, self.watch = plan, state, limit_s, words, out, Stopwatch()
        state.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.limit_s - self.watch.peek()

    def outcome(self, name: str) -> dict[str, Any] | None:
        """What became of a command that is done: code (None: it was cut), seconds."""
        path = self.state / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def work(self) -> None:
        """Run until everything is done or the time is up."""
        threads = [threading.Thread(target=self._queue, args=(queue,), daemon=True) for queue in self.plan.queues.values()]
        for thread in threads:
            thread.start()
        packed = 0.0
        try:
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.2)
                if self.watch.peek() - packed > PACK_S:
                    packed = self.watch.peek()
                    self.pack()
        finally:  # an interrupt is the slot's end
            self.limit_s = min(self.limit_s, self.watch.peek())
            for thread in threads:
                thread.join()
            self.pack()

    def _queue(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if self.outcome(command.name):
                continue
            while not all(self.outcome(name) for name in command.after):
                if self.left < max(command.least_s, MARGIN_S):
                    return
                time.sleep(0.2)
            if bad := [name for name in command.after if (self.outcome(name) or {})["code"]]:
                print(f"{command.name}: not begun, because {', '.join(bad)} failed", flush=True)
                continue
            if self.left < max(command.least_s, MARGIN_S):
                return
            self._run(command)

    def _run(self, command: Command) -> None:
        watch, before = Stopwatch(), self._spent(command)
        environment = dict(os.environ) | ({} if command.gpus is None else {"CUDA_VISIBLE_DEVICES": str(command.gpus)})
        line = command.run.replace("{words}", shlex.join(self.words)).replace("{left}", str(max(0, int(self.left - LEFT_S)) if self.left < 1e9 else 10**6))
        with (self.state / f"{command.name}.log").open("ab") as log:
            process = subprocess.Popen(["bash", "-c", line], stdout=log, stderr=log, env=environment, start_new_session=True)
            while process.poll() is None and self.left > LAST_WORDS_S and before + watch.peek() < command.limit_s:
                time.sleep(0.1)
            cut = process.poll() is None
            _end(process)
        seconds = before + watch.peek()
        whole = not cut or seconds >= command.limit_s
        if whole:
            write_json(self.state / f"{command.name}.json", {"code": None if cut else process.returncode, "seconds": round(seconds, 1)})
        else:
            (self.state / f"{command.name}.spent").write_text(str(seconds))
        told = _told(self.outcome(command.name)) if whole else f"interrupted, {seconds:.0f} s"
        print(f"after {self.watch.peek():.0f} s: {command.name}: {told}", flush=True)

    def _spent(self, command: Command) -> float:
        """Seconds of earlier slots."""
        path = self.state / f"{command.name}.spent"
        return float(path.read_text()) if path.exists() else 0.0

    def pack(self) -> None:
        """The logs and what is to be kept as one file."""
        if self.out is None:
            return
        patterns = [str(self.state / "*"), *self.plan.keep]
        paths = sorted({path for pattern in patterns for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)})
        part = self.out / "part.tar.xz"
        try:
            with tarfile.open(part, "w:xz", preset=1) as archive:
                for path in paths:
                    with contextlib.suppress(FileNotFoundError):  # an unfinished file of a command that is running
                        archive.add(path)
            part.replace(self.out / "all.tar.xz")
        except OSError as error:  # the commands go on, and the archive of before stands
            part.unlink(missing_ok=True)
            print(f"{part}: not packed ({error.strerror}); make room there", file=sys.stderr, flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a command if it still runs, and kill what is left of its group: what bash began in the background ignores an interrupt."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(words: Sequence[str]) -> int:
    """One of the commands above."""
    split = list(words).index("--") if "--" in words else len(words)
    command, given = (words[0] if words else ""), OWN | key_values(list(words[1:split]), tuple(OWN), "benchmarks.lease")
    if command not in ("run", "show"):
        raise UserError(f"benchmarks.lease takes run or show, not {command!r}")
    for key in ("plan", "state", *(["out"] if command == "run" else [])):
        if not given[key]:
            raise UserError(f"benchmarks.lease {command} needs {key}=…")
    plan, state = read(Path(given["plan"])), Path(given["state"])
    out = Path(given["out"]) if command == "run" else None
    slot = Slot(plan, state, _seconds(given["limit_s"], "limit_s"), list(words[split + 1 :]), out)
    if command == "run":
        assert out is not None
        out.mkdir(parents=True, exist_ok=True)
        for name in filter(None, given["forget"].split(",")):
            for suffix in ("json", "spent"):
                (state / f"{name}.{suffix}").unlink(missing_ok=True)
        slot.work()
    outcomes = {one.name: slot.outcome(one.name) for one in plan.commands}
    for name, outcome in outcomes.items():
        print(f"{name}: {_told(outcome)}")
    return 0 if all(outcome and not outcome["code"] for outcome in outcomes.values()) else 1


def _told(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return "to do"
    code, seconds = outcome["code"], outcome["seconds"]
    return f"{'cut' if code is None else 'done' if code == 0 else f'failed ({code})'}, {seconds:.0f} s"


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
