"""What `pipeline.race` promises, and what it saves: races with known truth, and every policy replayed on finished cells (docs/race.md).

    OMP_NUM_THREADS=1 python -m benchmarks.race simulate processes=32       benchmarks/results/race_simulated.json: 1,000 races a setting
    OMP_NUM_THREADS=1 python -m benchmarks.race simulate processes=32 out=FOLDER to=FOLDER/race_simulated.json limit_s=500     until the time is up;
                                                                            started again, what FOLDER lacks
    python -m benchmarks.race fill out=FOLDER gpus=0,1 processes=14 limit_s=520 -- paths.models=…      the cache, on GPUs; started again, what is missing
                                                                            (to=: then a package)
    python -m benchmarks.race package out=FOLDER to=FILE.jsonl.xz   what a folder holds (and a package before it, known=) as one file, and what it lacks
    python -m benchmarks.race synthetic out=work/synthetic.jsonl  a cache that is drawn, not measured
    OMP_NUM_THREADS=1 python -m benchmarks.race replay cells=FILE.jsonl.xz processes=32     benchmarks/results/race_replayed.json: all policies on a cache,
                                                                            2,000 times a task and base; out=, to=, limit_s= as above
    python -m benchmarks.race means cells=FILE.jsonl.xz model=smollm2_135m against=lora     techniques over seeds (against=: means and spreads)
    python -m benchmarks.race table                               the tables of docs/race.md (python -m benchmarks.tables writes them there)

Exit codes: 0 done, 1 fill has left seeds missing, 2 bad input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import race_blocks
from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import UserError, read_json, write_json
from pipeline.measure import machine

FOLDER = Path(__file__).parent / "results"
CELLS = Path(__file__).parent.parent / "experiments/race/cells.jsonl.xz"
SIMULATED, REPLAYED = FOLDER / "race_simulated.json", FOLDER / "race_replayed.json"


def run(words: Sequence[str]) -> int:
    """One of the commands above."""
    split = list(words).index("--") if "--" in words else len(words)
    command, rest = (words[0] if words else ""), list(words[1:split])
    known = {"simulate": simulate, "fill": lambda given: fill(given, list(words[split + 1 :])), "package": package,
             "synthetic": synthetic, "replay": replay, "means": means, "table": tables}
    if command not in known:
        raise UserError(f"benchmarks.race takes one of {', '.join(known)}, not {command!r}")
    return known[command](rest) or 0


def simulate(words: Sequence[str]) -> None:
    from benchmarks import race_simulate

    given = {"races": "1000", "most_arms": "69"} | RUNS | {"to": str(SIMULATED)} | key_values(
        words, ("races", "most_arms", *RUNS), "benchmarks.race simulate")
    path = _blocks(given, "simulated")
    _run(path, race_simulate.wanted(int(given["races"]), int(given["most_arms"])), race_simulate.block, given)
    lines = race_simulate.summary(race_blocks.ends(path))
    write_json(given["to"], _about("simulate") | {"settings": lines})
    print(race_simulate.table(lines))


RUNS = {"out": ".work/race", "processes": "1", "limit_s": "inf", "to": ""}
"""Of simulate and replay: the folder of the blocks that were run processes, seconds after which none is begun, the result file."""


def _blocks(given: dict[str, str], name: str) -> Path:
    return Path(given["out"]) / f"race_{name}.jsonl"


def _run(path: Path, wanted: list[Any], work: Any, given: dict[str, str]) -> None:
    """Run what is missing, and tell how far it is."""
    total, done = len(wanted), 0
    for done, key in enumerate(race_blocks.run(path, wanted, work, int(given["processes"]), float(given["limit_s"])), 1):
        if done % max(1, total // 40) == 0:
            print(f"{done} blocks, the last of {key}", file=sys.stderr, flush=True)


CACHE = {"known": "", "models": "smollm2_135m,qwen2_0_5b", "tasks": "all", "techniques": "all", "seeds": "16", "retry": "false"}
"""Of fill and package: a package whose runs are taken as they are; what is wanted; whether what ended with an error is tried again."""


def fill(words: Sequence[str], overrides: list[str]) -> int:
    from benchmarks import race_fill

    own = {"gpus": "", "processes": "1", "limit_s": "inf", "grace_s": "20", "to": ""}
    given = CACHE | own | key_values(words, ("out", *CACHE, *own), "benchmarks.race fill")
    store, jobs = _asked(given)
    gpus = [gpu for gpu in given["gpus"].split(",") if gpu]
    missing = race_fill.fill(race_fill.Asked(jobs, store, overrides, gpus, int(given["processes"]), float(given["limit_s"]), float(given["grace_s"])))
    if given["to"]:
        race_fill.package(store, Path(given["to"]))
    print(race_fill.lacks(store, jobs))
    print(f"{missing} seeds are missing" if missing else "nothing is missing")
    return 1 if missing else 0


def package(words: Sequence[str]) -> None:
    from benchmarks import race_fill

    given = CACHE | key_values(words, ("out", "to", *CACHE), "benchmarks.race package")
    store, jobs = _asked(given)
    race_fill.package(store, Path(given["to"]))
    print(race_fill.lacks(store, jobs))


def _asked(given: dict[str, str]) -> tuple[Any, Any]:
    """(race_fill.Store, its jobs). Raises UserError without a folder."""
    from benchmarks import race_fill

    if "out" not in given:
        raise UserError("name the folder of finished runs: out=FOLDER")
    tasks = race_fill.TASKS if given["tasks"] == "all" else given["tasks"].split(",")
    techniques = list(race_fill.TECHNIQUES) if given["techniques"] == "all" else given["techniques"].split(",")
    store = race_fill.Store(Path(given["out"]), Path(given["known"]) if given["known"] else None, given["retry"] == "true")
    return store, race_fill.jobs(given["models"].split(","), tasks, techniques, int(given["seeds"]))


def synthetic(words: Sequence[str]) -> None:
    from benchmarks import race_cache

    given = {"seed": "0"} | key_values(words, ("out", "seed"), "benchmarks.race synthetic")
    race_cache.write_synthetic(Path(given["out"]), int(given["seed"]))


def replay(words: Sequence[str]) -> None:
    from benchmarks import race_replay

    given = {"times": "2000", "arms": "20"} | RUNS | {"to": str(REPLAYED)} | key_values(
        words, ("cells", "times", "arms", *RUNS), "benchmarks.race replay")
    if "cells" not in given:
        raise UserError("name the cache of finished runs: cells=FILE")
    path = _blocks(given, "replayed")
    _run(path, race_replay.wanted(Path(given["cells"]), int(given["times"]), int(given["arms"])), race_replay.block, given)
    lines = race_replay.summary(race_blocks.ends(path))
    write_json(given["to"], _about("replay") | {"cells": Path(given["cells"]).name, "lines": lines})
    print(race_replay.table(lines))


def means(words: Sequence[str]) -> None:
    from benchmarks import race_means

    given = {"cells": str(CELLS), "model": "smollm2_135m", "against": ""} | key_values(words, ("cells", "model", "against"), "benchmarks.race means")
    print(race_means.table(Path(given["cells"]), given["model"], given["against"]))


def tables(words: Sequence[str]) -> None:
    from benchmarks import race_replay, race_simulate

    print(race_simulate.table(read_json(SIMULATED)["settings"]))
    if REPLAYED.exists():
        print("\n" + race_replay.table(read_json(REPLAYED)["lines"]))


def _about(command: str) -> dict[str, Any]:
    return {"date": datetime.now(UTC).date().isoformat(), "hardware": machine.hardware("cpu")["cpu"], "command": f"python -m benchmarks.race {command}"}


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
