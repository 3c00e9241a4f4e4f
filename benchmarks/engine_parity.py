"""The captured-autograd engine held against the eager loop, step by step, on a GPU: the same run twice from the same weights.

    python -m benchmarks.engine_parity out=FILE.jsonl techniques=ia3,dora,full rows=4000,1000,400 -- task=cqa model=local model.source.path=… model.name=…

For each technique and number of rows (which decides how many widths the run has): STEPS optimiser steps by train.engine=eager, by
train.engine=fast, and eagerly once more with torch's plain attention, which says how far rounding alone takes two runs apart. A line a
technique and number of rows: engine, reason, widths, losses. Lines that stand in the file are not run again. docs/fast.md shows the
table (`python -m benchmarks.engine_parity table=FILE.jsonl`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

STEPS = 50


def set_up(overrides: list[str]) -> Any:
    """The training.stepping.Run of the cell that these overrides compose, as training begins."""
    from pipeline.cell.inputs import Shared, build_parts, check, encoded, load_inputs
    from pipeline.cell.run import wrap
    from pipeline.core.compose import compose
    from pipeline.measure.clock import Meter
    from pipeline.objectives.base import TrainingContext
    from pipeline.serving.artefact import scorer_of
    from pipeline.training.loop import total_steps
    from pipeline.training.stepping import Run

    cfg = compose(overrides)
    parts, meter = build_parts(cfg), Meter(None)
    check(parts)
    meter.device = parts.device
    with meter.phase("load"):
        inputs = load_inputs(parts, Shared(), meter)
        wrapped = wrap(parts, inputs, meter)
    model, train = wrapped.scorer.model, parts.settings.train
    examples = encoded(parts, inputs.encoder, inputs.rows.train, inputs.rows.rationales)
    total = total_steps(train, len(examples))
    parts.method.before_training(model, total)
    context = TrainingContext(cfg, parts.settings, model, inputs.encoder, inputs.rows.train, parts.device, parts.dtype, scorer_of)
    prepared = parts.objective.prepared(examples, context)
    return Run(model, parts.method, parts.objective, prepared.examples, train, cfg.seed, total, parts.device, parts.dtype, inputs.encoder.pad_id)


def trained(overrides: list[str], engine: str, plain_attention: bool = False) -> dict[str, Any]:
    """Train STEPS steps: engine, reason, widths, losses (nats), seconds a step (median)."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from pipeline.measure.clock import Stopwatch
    from pipeline.training.loop import lr_factor
    from pipeline.training.stepping import choose

    run = set_up([*overrides, f"train.engine={engine}"])
    torch.manual_seed(run.seed)
    stepping = choose(run)
    losses, seconds, lap = [], [], Stopwatch(run.device)
    with sdpa_kernel([SDPBackend.MATH]) if plain_attention else contextlib.nullcontext():
        for step in range(min(STEPS, run.total)):
            losses.append(round(float(stepping.step(step, lr_factor(step, run.total, run.settings.schedule, run.settings.warmup_share))[0]), 4))
            seconds.append(lap.lap())
    of = {"engine": stepping.engine, "reason": stepping.reason, "widths": stepping.widths, "losses": losses, "step_s": round(statistics.median(seconds), 4)}
    stepping.close()
    del run, stepping
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


def compare(model: str, technique: str, rows: int, overrides: list[str]) -> dict[str, Any]:
    """The line of one pair; error: the sentence of a pair that could not be run."""
    from pipeline.core.files import UserError

    words = [*overrides, f"technique={technique}", "seed=0", f"train_rows={rows}", "train.epochs=1", "evaluate.forgetting=false", "tracking=none"]
    line: dict[str, Any] = {"model": model, "technique": technique, "rows": rows}
    try:
        eager, fast, again = trained(words, "eager"), trained(words, "fast"), trained(words, "eager", plain_attention=True)
    except (UserError, RuntimeError, ValueError) as error:
        return line | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return line | {"eager": eager, "fast": fast, "again": again}


def table(path: Path) -> str:
    """Markdown: a row a model, technique and number of widths."""
    lines = ["| model | technique | widths | engine | first ten steps | all | two eager runs: first ten | all | mean loss, fast / eager |", "| --- " * 9 + "|"]
    for row in sorted(map(json.loads, path.read_text().splitlines()), key=lambda r: (r["model"], r["technique"], -r["rows"])):
        head = f"| {row['model']} | {row['technique']} |"
        if "error" in row:
            lines.append(f"{head} | {row['error']} | | | | | |")
            continue
        fast, eager = row["fast"], row["eager"]
        engine = fast["engine"] if fast["engine"] != "eager" else f"eager: {fast['reason']}"
        apart_again = _shown(row["again"]["losses"], eager["losses"]) if "again" in row else "| "
        means = " / ".join(f"{statistics.mean(side['losses']):.3f}" for side in (fast, eager))
        lines.append(f"{head} {len(fast['widths'] or []) or 'any'} | {engine} | {_shown(fast['losses'], eager['losses'])} | {apart_again} | {means} |")
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
    done = {(r["model"], r["technique"], r["rows"]) for r in map(json.loads, out.read_text().splitlines())} if out.exists() else set()
    for technique in options["techniques"].split(","):
        for rows in map(int, options["rows"].split(",")):
            if (model, technique, rows) not in done:
                line = compare(model, technique, rows, overrides)
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(technique, rows, line.get("error") or (line["fast"]["engine"], line["fast"]["reason"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
