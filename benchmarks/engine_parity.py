"""The captured-autograd engine held against the eager loop, step by step, on a GPU: the same run twice from the same weights.

    python -m benchmarks.engine_parity out=FILE.jsonl techniques=ia3,dora,full rows=4000,1000,400 -- task=cqa model=local model.source.path=… model.name=…

For each technique and number of rows (which decides how many widths the run has): STEPS optimiser steps by train.engine=eager, by
train.engine=fast, and eagerly once more with torch's plain attention, which says how far rounding alone takes two runs apart. A line a
technique and number of rows: engine, reason, widths, losses. padding_free=always puts a step's rows one after another. With
answers=SEEDS (4 say) the runs go to their end and answer the test rows, by both engines from each of the seeds 0 to SEEDS - 1: which
rows were right, as bits. Lines that stand in the file are not run again. docs/fast.md shows the tables
(`python -m benchmarks.engine_parity table=FILE.jsonl`).
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

STEPS = 50


def trained(overrides: list[str], engine: str, plain_attention: bool = False, steps: int | None = STEPS) -> dict[str, Any]:
    """Train `steps` steps (None: all): engine, reason, widths, losses (nats), seconds a step (median); after all steps `test`, as right_rows has it."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from benchmarks.set_up import right_rows, set_up
    from pipeline.measure.clock import Stopwatch
    from pipeline.training.loop import lr_factor
    from pipeline.training.stepping import choose

    made = set_up([*overrides, f"train.engine={engine}"])
    run = made.run
    torch.manual_seed(run.seed)
    stepping = choose(run)
    losses, seconds, lap = [], [], Stopwatch(run.device)
    with sdpa_kernel([SDPBackend.MATH]) if plain_attention else contextlib.nullcontext():
        for step in range(min(steps or run.total, run.total)):
            losses.append(round(float(stepping.step(step, lr_factor(step, run.total, run.settings.schedule, run.settings.warmup_share))[0]), 4))
            seconds.append(lap.lap())
    of: dict[str, Any] = {"engine": stepping.engine, "reason": stepping.reason, "widths": stepping.widths, "streams": stepping.streams, "losses": losses,
          "step_s": round(statistics.median(seconds), 4)}
    if steps is None:
        of |= {"test": right_rows(made.scorer, made.inputs.rows.test)}
    stepping.close()
    del run, stepping, made
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return of


def apart(one: list[float], other: list[float]) -> tuple[float, float] | None:
    """|a - b| / |b| of a step's loss: the largest of the first ten steps, and the mean of all; None where a loss is not finite."""
    if not all(map(math.isfinite, (*one, *other))):
        return None
    shares = [abs(a - b) / abs(b) for a, b in zip(one, other, strict=True)]
    return max(shares[:10]), statistics.mean(shares)


WORDS = ("train.epochs=1", "evaluate.forgetting=false", "tracking=none")
DECIDE = ("model", "technique", "rows", "padding_free", "seed", "ended")
"""What tells one line from another."""


def measure(key: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The line of one run by both engines; error: the sentence of one that could not be run."""
    from pipeline.core.files import UserError

    words = [*overrides, *WORDS, f"technique={key['technique']}", f"seed={key['seed']}", f"train_rows={key['rows']}",
             f"train.padding_free={key['padding_free']}"]
    steps = None if key["ended"] else STEPS
    try:
        line: dict[str, Any] = {"eager": trained(words, "eager", steps=steps), "fast": trained(words, "fast", steps=steps)}
        if not key["ended"]:
            line["again"] = trained(words, "eager", plain_attention=True)
    except (UserError, RuntimeError, ValueError) as error:
        line = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return key | line


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; those of before had no other packing and no answers."""
    if not path.exists():
        return []
    return [{"padding_free": "auto", "seed": 0, "ended": False} | json.loads(line) for line in path.read_text().splitlines()]


def table(path: Path) -> str:
    """Markdown: a row a model, technique and number of widths."""
    rows = read(path)
    lines = ["| model | technique | widths | engine | first ten steps | all | two eager runs: first ten | all | mean loss, fast / eager |", "| --- " * 9 + "|"]
    for row in sorted((r for r in rows if not r["ended"]), key=lambda r: (r["model"], r["technique"], -r["rows"], r["padding_free"])):
        head = f"| {row['model']} | {row['technique']} |"
        if "error" in row:
            lines.append(f"{head} | {row['error']} | | | | | |")
            continue
        fast, eager = row["fast"], row["eager"]
        engine = fast["engine"] if fast["engine"] != "eager" else f"eager: {fast['reason']}"
        apart_again = _shown(row["again"]["losses"], eager["losses"]) if "again" in row else "| "
        means = " / ".join(f"{statistics.mean(side['losses']):.3f}" for side in (fast, eager))
        streams = " of streams" if fast.get("streams") else ""
        lines.append(f"{head} {len(fast['widths'] or []) or 'any'}{streams} | {engine} | {_shown(fast['losses'], eager['losses'])} | {apart_again} | {means} |")
    ended = [r for r in rows if r["ended"] and "error" not in r and r["fast"]["engine"] != "eager"]
    return "\n".join(lines) + (f"\n\n{answers_table(ended)}" if ended else "")


def answers_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: of each model and technique that the fast engine takes the accuracy after the last step by both engines in the mean of seeds,
    their difference, and how far two seeds of one engine lie apart (root mean square of both engines' differences). The last row: those alone whose step is
    captured through autograd."""
    lines = ["| model | technique | seeds | eager, % | fast, % | fast - eager, points | one seed against another, points |", "| --- " * 7 + "|"]
    differences, squares = [], []
    for (model, technique), runs in itertools.groupby(sorted(rows, key=lambda r: (r["model"], r["technique"])), lambda r: (r["model"], r["technique"])):
        mine = list(runs)
        tests = [(r["eager"]["test"], r["fast"]["test"]) for r in mine]
        eager, fast = ([100 * t["right"] / t["rows"] for t in side] for side in zip(*tests, strict=True))
        pairs = [(a - b) ** 2 for side in (eager, fast) for a, b in itertools.combinations(side, 2)]
        seeds = f"{math.sqrt(statistics.mean(pairs)):.1f}" if pairs else "—"
        means = statistics.mean(eager), statistics.mean(fast)
        lines.append(f"| {model} | {technique} | {len(tests)} | {means[0]:.1f} | {means[1]:.1f} | {means[1] - means[0]:+.1f} | {seeds} |")
        if mine[0]["fast"]["engine"] == "captured":
            differences.append(means[1] - means[0])
            squares += pairs
    spread = f"{math.sqrt(statistics.mean(squares)):.1f}" if squares else "—"
    apart_rms = math.sqrt(statistics.mean(d * d for d in differences))
    lines.append(f"| {len(differences)} captured | mean, and root mean square | | | | {statistics.mean(differences):+.1f}, {apart_rms:.1f} | {spread} |")
    return "\n".join(lines)


def _shown(one: list[float], other: list[float]) -> str:
    """Both shares as two cells."""
    shares = apart(one, other)
    return " | ".join(f"{100 * share:.2f}%" for share in shares) if shares else "not finite | "


def main(words: list[str]) -> int:
    split = words.index("--") if "--" in words else len(words)
    options, overrides = dict(word.split("=", 1) for word in words[:split]), words[split + 1 :]
    if "table" in options:
        print(table(Path(options["table"])))
        return 0
    model = next(word.split("=", 1)[1] for word in overrides if word.startswith(("model.name=", "model=")) and word != "model=local")
    out = Path(options["out"])
    done = {tuple(r[name] for name in DECIDE) for r in read(out)}
    seeds = int(options.get("answers", 0))
    padding_free = next((word.split("=", 1)[1] for word in overrides if word.startswith("train.padding_free=")), "auto")
    for technique, rows, seed in itertools.product(options["techniques"].split(","), map(int, options["rows"].split(",")), range(seeds or 1)):
        key = {"model": model, "technique": technique, "rows": rows, "padding_free": padding_free, "seed": seed, "ended": bool(seeds)}
        if tuple(key.values()) not in done:
            line = measure(key, overrides)
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(technique, rows, seed, line.get("error") or (line["fast"]["engine"], line["fast"]["reason"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
