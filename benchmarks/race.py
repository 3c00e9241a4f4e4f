"""What `pipeline.race` promises, and what it saves: races with known truth, and every policy replayed on finished cells (docs/race.md).

    python -m benchmarks.race simulate                            benchmarks/results/race_simulated.json: 1,000 races a setting
    python -m benchmarks.race simulate races=100 processes=16     fewer, on more processes; settings that the file has with as many are not run again
    python -m benchmarks.race fill out=work/cells.jsonl tasks=trec,cqa seeds=16 limit_s=1500 -- model=smollm2_135m      the cache, on a GPU
    (benchmarks/race_cache.py) python -m benchmarks.race synthetic out=work/synthetic.jsonl  a cache that is drawn, not measured
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
    known = {"simulate": simulate, "fill": lambda given: fill(given, list(words[split + 1 :])), "synthetic": synthetic, "replay": replay, "table": tables}
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


def fill(words: Sequence[str], overrides: list[str]) -> None:
    from benchmarks import race_cache

    keys = ("out", "tasks", "techniques", "seeds", "limit_s")
    race_cache.fill({"techniques": "all", "seeds": "16"} | key_values(words, keys, "benchmarks.race fill"), overrides)


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
