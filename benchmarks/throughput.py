"""How many cells an hour one GPU gets through, and for how much of that time it computes.

    python -m benchmarks.throughput ours set=eleven                            this checkout, pipeline.cells' default: timed work has the device alone
    python -m benchmarks.throughput ours set=data_size cells=12 -- share=true  12 of the 108 cells, cells that share the device; words after -- are Hydra's
    python -m benchmarks.throughput before set=eleven code=<commit or folder>  the same cells by an older checkout
    python -m benchmarks.throughput plain set=data_size cells=12               transformers' Trainer with PEFT, a process a cell, one after another
    python -m benchmarks.throughput start                                      a second process of pipeline.train: seconds until it trains, the median
                                                                               of repeats=3
    python -m benchmarks.throughput table                                      what was measured, as a table

    further words: out=<JSON lines> limit_s=600 work=.work/throughput data=data models=models
    rationales=rationales lambada=<file> name=<of this measurement> repeats=3 (of start)

Sets: eleven (techniques x seed 0 of experiments/qwen2_0_5b) and data_size (108 cells). A measurement that was cut off by limit_s goes on where it ended
when the same command is given again: its cells stand under work/<name>/. Seconds hold everything from the command's start, imports included. The
plain stack trains the same rows for as many steps, answers validation and test rows and times 16 requests; it probes and measures nothing else. The
device's share is NVML's: of each sample's period, the part in which a kernel ran.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.rates import lines
from pipeline.core.commands import words_entry
from pipeline.core.compose import ROOT
from pipeline.core.files import UserError
from pipeline.measure import machine
from pipeline.measure.clock import Stopwatch, now

OUT = Path("benchmarks/results/throughput.jsonl")
STACKS = ("ours", "before", "plain")
OPTIONS = {"set": "eleven", "cells": "", "code": "", "out": str(OUT), "limit_s": "600", "work": ".work/throughput", "data": "data", "models": "models",
           "rationales": "rationales", "lambada": "../shared/data/probes/lambada.jsonl", "name": "", "repeats": "3"}
SAMPLE_S = 0.2
LONGEST_NAME = 120
RUNNER = """
import json, sys
from pipeline.cell import grid
cells = grid.compose_cells(json.loads(sys.argv[1]))
try:
    from pipeline.forecasting.sharing import limit
except ImportError:
    from pipeline.forecasting.text import warn
    sys.exit(grid.run_cells(cells, warn))
sys.exit(grid.run_cells(cells, limit=limit))
"""
"""What `pipeline.cells` does, for cells that are no whole grid; runs in this checkout and in older ones."""
TIMELINE = """
import contextlib, json, os, sys, time
from pipeline.measure import clock, turns
out = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def told(name, begun, ended):
    os.write(out, (json.dumps([os.getpid(), name, round(begun, 3), round(ended, 3)]) + chr(10)).encode())
def caller():
    frame = sys._getframe(2)
    while frame and frame.f_code.co_filename.endswith(("turns.py", "contextlib.py")):
        frame = frame.f_back
    return frame.f_code.co_name if frame else "none"
def take(self, work=turns.Turns._take):
    at = time.time()
    work(self)
    self.begun = (caller(), time.time())
    told("waits " + self.begun[0], at, self.begun[1])
def give(self, work=turns.Turns._give):
    work(self)
    told("alone " + self.begun[0], self.begun[1], time.time())
def phase(self, name, work=clock.Meter.phase):
    at = time.time()
    with work(self, name) as inside:
        yield inside
    told("phase " + name, at, time.time())
turns.Turns._take, turns.Turns._give, clock.Meter.phase = take, give, contextlib.contextmanager(phase)
"""
"""Before RUNNER, in this checkout: argv[2] gets a line for each phase of a cell, each time that it has the device alone, and each wait for that
(process, what, begin and end in seconds since 1970)."""
PARTS = {
    "pipeline.cell.run": ("run", "import_peft", "build_parts", "set_up", "load_inputs", "wrap", "encoded", "import_scoring"),
    "pipeline.cell.inputs": ("load_task", "load_stored", "load_model", "_load_tokenizer"),
    "pipeline.training.stepping": ("Fast", "_fast"),
}
"""What `start` times of a cell before it trains, by module."""
WATCHED = """
import functools, importlib, json, runpy, sys
from pathlib import Path
from pipeline.core import progress
from pipeline.measure.clock import now, process_start
began, begin, path, parts, times = process_start(), progress.stage, Path(sys.argv.pop(1)), json.loads(sys.argv.pop(1)), {}
def timed(work, name):
    @functools.wraps(work)
    def call(*args, **more):
        times[name] = [now() - began, None]
        try:
            return work(*args, **more)
        finally:
            times[name][1] = now() - began
    return call
for module, names in parts.items():
    for name in names:
        setattr(importlib.import_module(module), name, timed(getattr(importlib.import_module(module), name), name))
def stage(name):
    if name == "train":
        path.write_text(json.dumps({**times, "train": [now() - began, None]}))
    begin(name)
progress.stage = stage
runpy.run_module("pipeline.train", run_name="__main__", alter_sys=True)
"""
"""`pipeline.train`, which writes down when, in seconds after its start, the training loop and each of these parts of a cell begin and end."""


def cells_of(name: str, count: int | None) -> list[dict[str, Any]]:
    """The set's cells in the order of pipeline.cells, or `count` of them, spread over techniques, sizes and seeds alike. Raises UserError."""
    from pipeline.cell.grid import grid

    if name not in ("eleven", "data_size"):
        raise UserError(f"set={name} is none; choose eleven or data_size")
    experiment = "qwen2_0_5b" if name == "eleven" else name
    axes = grid(experiment)["grid"]
    techniques, sizes, seeds = axes["techniques"], axes["train_rows"], axes["seeds"][:1] if name == "eleven" else axes["seeds"]
    every = [(t, n, s) for n, t, s in itertools.product(sizes, techniques, seeds)]
    if count is not None and count < len(every):
        chosen = {_spread(i, techniques, sizes, seeds) for i in range(count)}
        every = [cell for cell in every if cell in chosen]
    return [{"experiments": experiment, "technique": t, "train_rows": n, "seed": s} for t, n, s in every]


def _spread(i: int, techniques: Sequence[str], sizes: Sequence[int], seeds: Sequence[int]) -> tuple[str, int, int]:
    """The i-th of cells of which every run of as many as there are techniques has each once, at sizes half of the ladder away from those before."""
    lap = i // len(techniques)
    return techniques[i % len(techniques)], sizes[(i + lap * (len(sizes) // 2) + lap // 2) % len(sizes)], seeds[lap % len(seeds)]


def measure(stack: str, options: dict[str, str], more: Sequence[str]) -> dict[str, Any]:
    """Run a stack over the set's cells, those that it has not done yet, and write a line."""
    count, limit_s = int(options["cells"]) if options["cells"] else None, float(options["limit_s"])
    cells, every = cells_of(options["set"], count), len(cells_of(options["set"], None))
    name = options["name"] or re.sub(r"[^\w.-]+", "_", "-".join(filter(None, [stack, options["set"], options["cells"], *more])))[:LONGEST_NAME]
    folder = (Path(options["work"]) / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    code = _checkout(options["code"], folder.parent) if stack == "before" else ROOT
    words = [*_places(options), f"paths.results={folder}/results", f"paths.work={folder}/work", "tracking=none", "train.progress=false", *more]
    before, began = _finished(folder), now()
    watch, samples = Stopwatch(), []
    there = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "triton"), "PYTHONPATH": there}
    ended = "done"
    with open(folder / "log.txt", "ab") as log:
        for command in _commands(stack, cells, words, folder):
            process = subprocess.Popen(command, cwd=code, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            while process.poll() is None and watch.peek() < limit_s:
                busy = machine.busy_share()
                samples += [busy] if busy is not None else []
                _wait(process)
            if process.poll() is None:
                ended = "limit"
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)
                process.kill()
                break
            if process.returncode:
                ended = f"exit code {process.returncode}, see {folder.name}/log.txt"
                break
    done = _finished(folder) - before
    seconds = watch.lap()
    return {
        "stack": stack, "name": name, "set": options["set"], "cells": len(done), "asked": len(cells), "of": every, "wall_s": round(seconds, 2),
        "start_s": _start_s(done, began), "busy_share": round(sum(samples) / len(samples), 4) if samples else None,
        "ended": ended, "resumed": bool(before), "commit": _commit(code), "options": list(more),
        **_machine(), "phases_s": _phases(folder, done),
    }


def start(options: dict[str, str], more: Sequence[str]) -> dict[str, Any]:
    """Run one LoRA cell of the set's experiment by `pipeline.train` once, so that caches are warm, and `repeats` times more: seconds until training begins,
    those of the median run.

    every_s: of each run. parts_s: of the median's seconds `begins` (imports of the command, its config, checks), `torch` (its import), `import_peft` (with
    transformers), `gpu` (waiting for it once all is imported), and what other functions of a cell took: load_stored, load_model (its move to the device) and
    _load_tokenizer, which overlaps it, are within load_inputs; `Fast` (the engine's own imports and buffers) and the captures make up _fast.
    """
    folder = (Path(options["work"]) / "start").resolve()
    cell = next(c for c in cells_of(options["set"], None) if c["technique"] == "lora")
    words = [*(f"{key}={value}" for key, value in cell.items()), *_places(options), f"paths.work={folder}/work", "tracking=none", "train.progress=false",
             "train.steps=4", "train.validations=0", "evaluate.test_rows=8", "evaluate.forgetting=false", "evaluate.latency_rows=0", *more]
    folder.mkdir(parents=True, exist_ok=True)
    _started(folder, words)
    runs = sorted((_started(folder, words) for _ in range(int(options["repeats"]))), key=lambda run: float(run["trains_after_s"]))
    return {"stack": "start", "set": options["set"], **runs[(len(runs) - 1) // 2], "every_s": [run["trains_after_s"] for run in runs],
            "commit": _commit(ROOT), **_machine()}


def _started(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Seconds of one run that `start` makes, in all and by part."""
    trains, results = folder / "trains.json", folder / f"run-{now()}"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [sys.executable, "-c", WATCHED, str(trains), json.dumps(PARTS), *words, f"paths.results={results}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    phases = json.loads(next(results.glob("*/*/result.json")).read_text())["phases"]
    times = json.loads(trains.read_text())  # the start-up of phases also holds what is imported after training
    return {"trains_after_s": round(times["train"][0], 2), **{key: phases[key] for key in ("startup_s", "load_s", "warmup_s")}, "parts_s": _parts_s(times)}


def _parts_s(times: dict[str, list[float]]) -> dict[str, float]:
    """Seconds of each part, of what WATCHED wrote: (begin, end) by name, in the order of their beginnings; a part that has not ended has none of its own."""
    names = list(times)
    gaps = {"begins": times["run"][0], "torch": times[names[1]][0] - times["run"][0], "gpu": times["load_inputs"][0] - times["set_up"][1]}
    return {name: round(seconds, 3) for name, seconds in {**gaps, **{n: end - at for n, (at, end) in times.items() if end is not None}}.items()}


def _places(options: dict[str, str]) -> list[str]:
    return [f"paths.{key}={Path(options[key]).resolve()}" for key in ("data", "models", "rationales", "lambada")]


def _machine() -> dict[str, Any]:
    card = machine.card()
    return {"device": card[0] if card else machine.cpu_name(), "cpus": machine.cpu_count(), "date": datetime.now(UTC).date().isoformat()}


def _wait(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SAMPLE_S)


def _commands(stack: str, cells: Sequence[dict[str, Any]], words: Sequence[str], folder: Path) -> list[list[str]]:
    every = [[*(f"{key}={value}" for key, value in cell.items()), *words] for cell in cells]
    if stack != "plain":
        before = TIMELINE if stack == "ours" else ""
        return [[sys.executable, "-c", before + RUNNER, json.dumps(every), str(folder / "timeline.jsonl")]]
    missing = [(cell, words) for cell, words in zip(cells, every, strict=True) if not (folder / "plain" / _file(cell)).exists()]
    return [[sys.executable, "-m", "benchmarks.throughput_plain", str(folder / "plain" / _file(cell)), *words] for cell, words in missing]


def _file(cell: dict[str, Any]) -> str:
    return f"{cell['technique']}-s{cell['seed']}-n{cell['train_rows']}.json"


def _finished(folder: Path) -> set[Path]:
    return {*folder.glob("results/*/*/result.json"), *folder.glob("plain/*.json")}


def _start_s(done: set[Path], began: float) -> float:
    """Seconds until the first cell began, which a larger set has once, too; none of the plain stack, whose cells are processes of their own."""
    starts = [json.loads(path.read_text()).get("provenance", {}).get("started") for path in done]
    return round(min((datetime.fromisoformat(start).timestamp() - began for start in starts if start), default=0.0), 2)


def _phases(folder: Path, done: set[Path]) -> dict[str, float]:
    """Seconds by phase, all cells together: where the time went."""
    sums: dict[str, float] = {}
    for path in done:
        result = json.loads(path.read_text())
        beside = {key: (result.get("neighbours") or {}).get(key) for key in ("waited_s", "alone_s")}
        for key, value in {**(result.get("phases") or {}), **beside}.items():
            sums[key] = round(sums.get(key, 0.0) + (value or 0.0), 2)
    return sums


def _checkout(code: str, work: Path) -> Path:
    """The folder of an older version: as given, or a worktree of that commit. Raises UserError."""
    if not code:
        raise UserError("before needs code=<commit, or a folder that holds an older checkout>")
    if Path(code, "pipeline").is_dir():
        return Path(code).resolve()
    folder = work / f"code-{code}"
    if not folder.exists():
        done = subprocess.run(["git", "worktree", "add", "--detach", str(folder), code], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"code={code} is neither a folder with pipeline/ nor a commit of this repository ({done.stderr.strip()}); fix it")
    return folder


def _commit(code: Path) -> str | None:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=code, capture_output=True, text=True)
    return done.stdout.strip() or None


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: measurements of one name together, and how many times the plain stack's and the older checkout's cells an hour they are.

    Of some of a set's cells, cells an hour are those of the whole set, all cells taking what these took and the start once.
    """
    whole: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (r for r in rows if r["stack"] in STACKS):
        one = whole.setdefault((row["set"], row["name"]), {**row, "cells": 0, "wall_s": 0.0, "busy": 0.0, "work_s": 0.0})
        one["cells"] += row["cells"]
        one["wall_s"] += row["wall_s"]
        one["work_s"] += row["wall_s"] - row["start_s"]
        one["busy"] += (row["busy_share"] or 0.0) * row["wall_s"]
    rates = {key: 3600 * one["of"] / (one["start_s"] + one["work_s"] * one["of"] / one["cells"]) for key, one in whole.items() if one["cells"]}
    best = {(one["set"], one["stack"]): rates[key] for key, one in whole.items() if key in rates and one["stack"] != "ours"}
    made = ["| set | stack | cells | seconds | cells an hour | device computes | against the version before | against the plain stack |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for key, one in whole.items():
        rate = rates.get(key)
        times = [f"{rate / best[one['set'], other]:.1f}x" if rate and one["stack"] == "ours" and (one["set"], other) in best else ""
                 for other in ("before", "plain")]
        busy = f"{one['busy'] / one['wall_s']:.0%}" if one["busy_share"] is not None else ""
        some = f"{one['cells']} of {one['of']}, extrapolated" if one["cells"] < one["of"] else str(one["cells"])
        columns = [one["set"], " ".join([one["stack"], *one["options"]]), some, f"{one['wall_s']:.0f}", f"{rate or 0:.0f}", busy, *times]
        made.append(f"| {' | '.join(columns)} |")
    return made


def run(words: list[str]) -> int:
    """Measure, or print the table of what was measured."""
    split = words.index("--") if "--" in words else len(words)
    command, pairs = (words[0] if words else ""), dict(word.partition("=")[::2] for word in words[1:split])
    if command not in (*STACKS, "start", "table") or pairs.keys() - OPTIONS.keys():
        raise UserError(f"choose one of {', '.join((*STACKS, 'start', 'table'))} with {', '.join(f'{key}=' for key in OPTIONS)}")
    options = OPTIONS | pairs
    if not options["repeats"].isdecimal() or not int(options["repeats"]):
        raise UserError(f"repeats={options['repeats']} is no number of runs; write 1 or more")
    if command == "table":
        print("\n".join(table(lines(Path(options["out"])))))
        return 0
    more = words[split + 1 :]
    line = start(options, more) if command == "start" else measure(command, options, more)
    out = Path(options["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    return 0


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
