"""The captured-autograd engine held against the eager loop, step by step, on a GPU: the same run twice from the same weights.

    python -m benchmarks.engine_parity out=FILE.jsonl techniques=ia3,dora,full rows=4000,1000,400 -- task=cqa model=local model.source.path=… model.name=…

For each technique and number of rows (which decides how many widths the run has): STEPS optimiser steps by train.engine=eager and by
train.engine=fast; a line a pair with the engine, its reason, the widths, and the largest relative difference of a step's loss. Lines that
stand in the file are not run again. docs/fast.md shows the table (`python -m benchmarks.engine_parity table=FILE.jsonl`).
"""

from __future__ import annotations

import gc
import json
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


def trained(overrides: list[str], engine: str) -> dict[str, Any]:
    """Train STEPS steps: engine, reason, widths, losses (nats), seconds a step (median)."""
    import torch

    from pipeline.measure.clock import Stopwatch
    from pipeline.training.loop import lr_factor
    from pipeline.training.stepping import choose

    run = set_up([*overrides, f"train.engine={engine}"])
    torch.manual_seed(run.seed)
    stepping = choose(run)
    losses, seconds, lap = [], [], Stopwatch(run.device)
    for step in range(min(STEPS, run.total)):
        losses.append(float(stepping.step(step, lr_factor(step, run.total, run.settings.schedule, run.settings.warmup_share))[0]))
        seconds.append(lap.lap())
    of = {"engine": stepping.engine, "reason": stepping.reason, "widths": stepping.widths, "losses": losses, "step_s": statistics.median(seconds)}
    stepping.close()
    del run, stepping
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return of


def apart(one: list[float], other: list[float]) -> float | None:
    """The largest |a - b| / |b| of a step; None where a loss is not finite."""
    pairs = list(zip(one, other, strict=True))
    return max(abs(a - b) / abs(b) for a, b in pairs) if all(a - a == 0 == b - b for a, b in pairs) else None


def compare(model: str, technique: str, rows: int, overrides: list[str]) -> dict[str, Any]:
    """The line of one pair; error: the sentence of a pair that could not be run."""
    from pipeline.core.files import UserError

    words = [*overrides, f"technique={technique}", "seed=0", f"train_rows={rows}", "train.epochs=1", "evaluate.forgetting=false", "tracking=none"]
    line: dict[str, Any] = {"model": model, "technique": technique, "rows": rows}
    try:
        eager, fast = trained(words, "eager"), trained(words, "fast")
    except (UserError, RuntimeError, ValueError) as error:
        return line | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return line | {"apart": apart(fast["losses"], eager["losses"]), "steps": len(eager["losses"]), "eager": eager, "fast": fast}


def table(path: Path) -> str:
    """Markdown: a row a model, technique and number of widths."""
    lines = ["| model | technique | widths | engine | largest difference of a step's loss | last loss, fast / eager |", "| --- | --- | --- | --- | --- | --- |"]
    for row in sorted(map(json.loads, path.read_text().splitlines()), key=lambda r: (r["model"], r["technique"], -r["rows"])):
        if "error" in row:
            lines.append(f"| {row['model']} | {row['technique']} | | | {row['error']} | |")
            continue
        fast, eager = row["fast"], row["eager"]
        difference = "not finite" if row["apart"] is None else f"{100 * row['apart']:.2f}%"
        engine = fast["engine"] if fast["engine"] != "eager" else f"eager: {fast['reason']}"
        widths = len(fast["widths"]) if fast["widths"] else "any"
        lines.append(f"| {row['model']} | {row['technique']} | {widths} | {engine} | {difference} | {fast['losses'][-1]:.3f} / {eager['losses'][-1]:.3f} |")
    return "\n".join(lines)


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
                print(technique, rows, line.get("error") or (line["apart"], line["fast"]["engine"], line["fast"]["reason"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
