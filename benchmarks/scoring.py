"""What scoring takes against what the plan of `alignscope try` says of it, in seconds of one processor.

    alignscope try banking.csv --plan; python -m pipeline.prepare experiments=banking; python -m pipeline.base_model experiments=banking
    python -m benchmarks.scoring rows=32 banking:zero_shot banking:few_shot maths:zero_shot

Of every experiment:technique the first test rows are answered with one thread by the model as it is before training (an adapter does as much work then
as after it), and the processor's time is held against the forecast for this processor: what other programs do meanwhile moves it little. The constants of
pipeline/forecasting/whole.py come from here. Prints a line each: seconds, forecast, forecast / seconds.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import UserError


def run(words: Sequence[str]) -> int:
    """Measure and print."""
    os.environ["OMP_NUM_THREADS"] = "1"
    asked = {"rows": "32"} | key_values([w for w in words if "=" in w], ("rows",), "benchmarks.scoring")
    for word in words:
        if "=" not in word:
            experiment, _, technique = word.partition(":")
            if not technique:
                raise UserError(f"{word} names no technique; write experiment:technique, as in reviews:lora")
            print(line(experiment, technique, int(asked["rows"])), flush=True)
    return 0


def line(experiment: str, technique: str, count: int) -> str:
    """Of one cell."""
    import torch

    from pipeline.cell.grid import compose_cell
    from pipeline.cell.inputs import Shared, build_parts, load_inputs
    from pipeline.cell.run import wrap
    from pipeline.forecasting.whole import CPU_SHARE, Machine, need, whole
    from pipeline.intake.planning import card_of, work_of
    from pipeline.measure.clock import Meter, cpu_s
    from pipeline.measure.speed import matmul_flops

    torch.set_num_threads(1)
    flops = matmul_flops(cpu_s)
    cfg = compose_cell([f"experiments={experiment}", f"technique={technique}", "seed=0", "device=cpu"])
    folder = Path(cfg.paths.models) / cfg.model.name
    work = dataclasses.replace(work_of(cfg, folder), test_rows=count, validation_rows=0)
    machine = Machine(card_of(None), flops * CPU_SHARE, "")
    forecast = whole(need(cfg, work, folder / "config.json", machine), work, machine).score_s or 0.0
    parts = build_parts(cfg, None)
    inputs = load_inputs(parts, Shared(), Meter(None))
    scorer = wrap(parts, inputs, Meter(None)).scorer
    began = cpu_s()
    scorer.predict(inputs.rows.test[:count])
    took = cpu_s() - began
    return f"{experiment}:{technique} {count} rows: {took:.1f} s, forecast {forecast:.1f} s, ratio {forecast / took:.2f} ({flops / 1e9:.0f} GFLOP/s; {work})"


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
