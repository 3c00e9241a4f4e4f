"""What `pipeline.race` promises, and what it saves: races with known truth, and every policy replayed on finished cells (docs/race.md).

    python -m benchmarks.race simulate                            benchmarks/results/race_simulated.json: 1,000 races a setting
    python -m benchmarks.race simulate races=100 processes=16     fewer, on more processes; settings that the file has with as many are not run again
    python -m benchmarks.race fill out=FOLDER gpus=0,1 processes=14 limit_s=520 -- paths.models=…      the cache, on GPUs; started again, what is missing
    python -m benchmarks.race package out=FOLDER to=FILE.jsonl.xz   what a folder holds (and a package before it, known=) as one file, and what it lacks
    python -m benchmarks.race synthetic out=work/synthetic.jsonl  a cache that is drawn, not measured
    python -m benchmarks.race replay cells=work/cells.jsonl       benchmarks/results/race_replayed.json: all policies on a cache, 2,000 times a task and base
    python -m benchmarks.race table                               the tables of docs/race.md
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import UserError, read_json, write_json
from pipeline.measure import machine

FOLDER = Path(__file__).parent / "results"
SIMULATED, REPLAYED = FOLDER / "race_simulated.json", FOLDER / "race_replayed.json"


def run(words: Sequence[str]) -> int:
    """One of the commands above."""
    split = list(words).index("--") if "--" in words else len(words)
    command, rest = (words[0] if words else ""), list(words[1:split])
    known = {"simulate": simulate, "fill": lambda given: fill(given, list(words[split + 1 :])), "package": package,
             "synthetic": synthetic, "replay": replay, "table": tables}
    if command not in known:
        raise UserError(f"benchmarks.race takes one of {', '.join(known)}, not {command!r}")
    known[command](rest)
    return 0


def simulate(words: Sequence[str]) -> None:
    from benchmarks import race_simulate

    given = {"races": "1000", "processes": "1", "most_arms": "69", "to": str(SIMULATED)} | key_values(
        words, ("races", "processes", "most_arms", "to"), "benchmarks.race simulate")
    path = Path(given["to"])
    before = read_json(path)["settings"] if path.exists() else []
    lines: list[dict[str, Any]] = []
    for line in race_simulate.run(int(given["races"]), int(given["processes"]), before, int(given["most_arms"])):
        lines.append(line)
        print(line["arms"], line["rows"], line["truth"], line["effect"], f"wrong {line['wrong']:.3f}", f"undecided {line['undecided']:.2f}", flush=True)
        kept = [old for old in before if race_simulate._key(old) not in map(race_simulate._key, lines)]
        write_json(path, _about("simulate") | {"settings": [*lines, *kept]})


CACHE = {"known": "", "models": "smollm2_135m,qwen2_0_5b", "tasks": "all", "techniques": "all", "seeds": "16", "retry": "false"}
"""Of fill and package: a package whose runs are taken as they are; what is wanted; whether what ended with an error is tried again."""


def fill(words: Sequence[str], overrides: list[str]) -> None:
    from benchmarks import race_fill

    own = {"gpus": "", "processes": "1", "limit_s": "inf", "grace_s": "20"}
    given = CACHE | own | key_values(words, ("out", *CACHE, *own), "benchmarks.race fill")
    store, jobs = _asked(given)
    gpus = [gpu for gpu in given["gpus"].split(",") if gpu]
    missing = race_fill.fill(race_fill.Asked(jobs, store, overrides, gpus, int(given["processes"]), float(given["limit_s"]), float(given["grace_s"])))
    print(race_fill.lacks(store, jobs))
    print(f"{missing} seeds are missing" if missing else "nothing is missing")


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

    given = {"times": "2000", "to": str(REPLAYED), "arms": "20", "processes": "1"} | key_values(
        words, ("cells", "times", "to", "arms", "processes"), "benchmarks.race replay")
    lines = race_replay.run(Path(given["cells"]), int(given["times"]), int(given["arms"]), int(given["processes"]))
    write_json(Path(given["to"]), _about("replay") | lines)


def tables(words: Sequence[str]) -> None:
    from benchmarks import race_replay, race_simulate

    print(race_simulate.table(read_json(SIMULATED)["settings"]))
    if REPLAYED.exists():
        print("\n" + race_replay.table(read_json(REPLAYED)))


def _about(command: str) -> dict[str, Any]:
    return {"date": datetime.now(UTC).date().isoformat(), "hardware": machine.hardware("cpu")["cpu"], "command": f"python -m benchmarks.race {command}"}


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
