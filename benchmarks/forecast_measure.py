"""Measuring what trainings take: each configuration goes through the loop that a cell's training goes through.

Library of `python -m benchmarks.forecast`. A child process measures one configuration after another, each on an emptied allocator,
and appends a line for it; where a child dies, the parent writes that down and starts another. Weights are random, tokens are drawn.
"""

from __future__ import annotations

import gc
import json
import random
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.forecast_configs import SHAPES, Config
from pipeline.cell.child import run_in_child
from pipeline.core.files import read_jsonl

LEFT_BYTES = 64 * 2**20
"""What may still be reserved before a configuration begins; above it a fresh process takes over."""
RESTART = 77


def measure_all(configs: Sequence[Config], out: Path, seconds: float, device: str) -> int:
    """Measure what `out` has no line of, within the time. Returns how many are missing then."""
    from pipeline.measure.clock import Stopwatch

    clock = Stopwatch()
    out.parent.mkdir(parents=True, exist_ok=True)
    marker = out.with_suffix(".now")
    while (left := missing(configs, out)) and clock.peek() < seconds:
        marker.unlink(missing_ok=True)
        code = run_in_child(lambda: _measure(left, out, marker, seconds - clock.peek(), device)).code  # noqa: B023
        if code in (130, 128 + signal.SIGTERM):
            raise KeyboardInterrupt
        if code not in (0, RESTART):
            name = marker.read_text() if marker.exists() else None
            if name is None:
                print(f"the measuring process ended with {code} before it began", file=sys.stderr)
                return len(left)
            _append(out, {"name": name, "status": "died", "error": f"the process ended with {code}"})
    marker.unlink(missing_ok=True)
    return len(missing(configs, out))


def missing(configs: Sequence[Config], out: Path) -> list[Config]:
    """Those without a line."""
    done = {row["name"] for row in read_jsonl(out)} if out.exists() else set()
    return [c for c in configs if c.name not in done]


def _append(out: Path, row: dict[str, Any]) -> None:
    with open(out, "a", encoding="utf-8") as file:  # a line at a time: what was measured stays, whatever happens next
        file.write(json.dumps(row) + "\n")


def _measure(configs: Sequence[Config], out: Path, marker: Path, seconds: float, device_name: str) -> int:
    import torch

    from pipeline.measure.clock import Stopwatch
    from pipeline.measure.machine import hardware, provenance
    from pipeline.models.base import device_of

    clock, device = Stopwatch(), device_of(device_name)
    torch.set_num_threads(min(8, torch.get_num_threads()))
    about = {"hardware": hardware(device), "versions": provenance()["packages"], "date": provenance()["started"][:10], "machine": machine(device)}
    longest = 0.0
    for config in configs:
        if clock.peek() + longest > seconds:
            return 0
        left = clean(device)
        if left > LEFT_BYTES:
            return RESTART
        lap = Stopwatch(device)
        marker.write_text(config.name)
        row = {"name": config.name, **one(config, device), "left_bytes": left, **about}
        row["took_s"] = round(lap.lap(), 2)
        longest = max(longest, row["took_s"])
        _append(out, row)
        shown = f"{row['peak_bytes'] / 2**20:,.0f} MiB" if row.get("peak_bytes") else row.get("error", "")
        print(f"{config.name}: {row['status']} {shown} ({row['took_s']} s)", flush=True)
    return 0


def clean(device: Any) -> int:
    """Give everything back; bytes that are reserved all the same."""
    import torch

    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear:
        clear()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()


def machine(device: Any) -> dict[str, Any]:
    """What a first product takes as its workspace, and what the device holds beside the allocator's."""
    import torch

    if device.type != "cuda":
        return {}
    a = torch.ones(256, 256, device=device, dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    b = a @ a
    taken = torch.cuda.memory_allocated() - before - b.numel() * b.element_size()
    return {"product_workspace": taken, "capability": list(torch.cuda.get_device_capability())}


def one(config: Config, device: Any) -> dict[str, Any]:
    """A configuration's figures; running out of memory is one, another error is written down and shown."""
    try:
        return train(config, device)
    except (RuntimeError, MemoryError) as error:
        from pipeline.measure.memory import out_of_memory

        if out_of_memory(error):
            return {"status": "oom", "error": str(error).splitlines()[0]}
        traceback.print_exc()
        return {"status": "error", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
    except Exception as error:  # one lost configuration must not lose the others
        traceback.print_exc()
        return {"status": "error", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}


def train(config: Config, device: Any) -> dict[str, Any]:
    """Load, wrap and train as a cell does; its memory and times."""
    import torch

    from pipeline.core.compose import build, compose
    from pipeline.core.settings import read
    from pipeline.forecasting.speed import random_base
    from pipeline.measure.clock import Meter, now
    from pipeline.models.base import memory_bytes, parameters, resolve
    from pipeline.training.loop import Loop, total_steps
    from pipeline.training.stepping import Run

    cfg = compose(config.overrides)
    settings = read(cfg)
    precision, dtype = resolve(settings.precision, device)
    torch.manual_seed(0)
    base = random_base(SHAPES[config.shape], precision, dtype, device)
    model_bytes = memory_bytes(base)
    method, objective = build(cfg.method, "method"), build(cfg.objective, "objective")
    model = method.wrap(base)
    del base
    rows = examples(config)
    steps = total_steps(settings.train, len(rows))
    method.before_training(model, config.steps)
    seen: dict[str, Any] = {}

    def look() -> tuple[float, float]:  # training's last step is done, its memory still stands
        seen.update(segments(device))
        return 0.0, 0.0

    meter = Meter(now())
    meter.device = device
    live = _live(device, model)
    with live or _nothing():
        trained = Loop(Run(model, method, objective, rows, settings.train, 0, steps, device, dtype, 0), look, None, meter).train()
    memory, phases, (count, total) = trained.memory, meter.phases(), parameters(model)
    assert memory is not None
    return {
        "status": "ok", "kind": "live_bytes" if live else memory.kind, "peak_bytes": live.peak if live else memory.peak_bytes,
        "baseline_bytes": live.base if live else memory.baseline_bytes, "peak_allocated_bytes": memory.peak_allocated_bytes,
        "device_used_bytes": memory.device_used_bytes, "model_bytes": model_bytes, "trainable": count, "parameters": total, "precision": precision,
        "engine": trained.work.engine, "notes": trained.notes, "train_s": phases.train_s, "warmup_s": phases.warmup_s, "steps": trained.work.steps,
        "tokens": trained.work.tokens, "padding_share": trained.work.padding_share, "loss": trained.history[-1]["loss"] if trained.history else None, **seen,
    }


def examples(config: Config) -> list[list[Any]]:
    """The rows as the loop takes them; tokens are drawn."""
    from pipeline.data.rows import Encoded

    draw, vocabulary = random.Random(0), SHAPES[config.shape]["vocab_size"]
    return [[Encoded(tuple(draw.choices(range(vocabulary), k=fed + 1)), fed + 1 - labels)] for fed, labels in config.lengths()]


def segments(device: Any) -> dict[str, Any]:
    """What the allocator holds, by pool and stream: [pool, stream, small or large, segments, bytes, bytes in use]."""
    import torch

    if device.type != "cuda":
        return {}
    by_place: dict[tuple, list[int]] = {}
    for s in torch.cuda.memory_snapshot():
        entry = by_place.setdefault((str(s.get("segment_pool_id")), s["stream"] % 10**6, s["segment_type"]), [0, 0, 0])
        for place, value in enumerate((1, s["total_size"], s["allocated_size"])):
            entry[place] += value
    return {"segments": [[*key, *value] for key, value in sorted(by_place.items())], "reserved_end": torch.cuda.memory_reserved(),
            "retries": torch.cuda.memory_stats().get("num_alloc_retries", 0)}


def _live(device: Any, model: Any) -> Any:
    """Where there is no allocator to ask, torch's own live bytes."""
    if device.type == "cuda":
        return None
    from benchmarks.forecast_live import Live

    return Live(model)


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()
