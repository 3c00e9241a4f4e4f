"""Speed and memory of this project against its peers, side by side in one process.

    python -m benchmarks.speed                                        all headline rows (on a CPU: the rows of ids=cpu)
    python -m benchmarks.speed ids=lora-135m-step,full-135m-step repeats=3 steps=20
    python -m benchmarks.speed ids=wide plan=true                     what would run, and about how long; nothing does
    python -m benchmarks.speed ids=families                           LoRA at shapes of other families than Llama's
    python -m benchmarks.speed table                                  the headline table (python -m benchmarks.tables writes it into the docs)
    python -m benchmarks.speed table wide                             every workload against both peers, from speed-wide.json

Keys: ids (sets all, step, sweep, eval, wide, families, cpu, or ids), repeats (3), steps and warmup of a step row (by shape), sweep_steps (100 a trial),
peer_b (liger; or compile, liger+compile: rows of their own), limit_s (seconds an id may take, 300; its time for sweeps is doubled), device (auto),
out (benchmarks/results), model and task (folders for the evaluation rows; random weights and tokens where they are missing), plan.
Every id is written as soon as it is measured: all of it to speed-<set>.json, a headline row to targets.json; other ids' rows stay.
Exit codes: 0 done, 1 an id gave no ratio (the others are written), 2 bad input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import speed_files, speed_peers, speed_plan, speed_stats, speed_targets
from benchmarks.speed_targets import AnyRow, EvalRow, Row, SweepRow
from pipeline.core.commands import words_entry
from pipeline.core.files import UserError, check_writable


@dataclass(frozen=True)
class Options:
    """The command's words."""

    ids: str | None = None
    repeats: int = 3
    steps: int | None = None
    warmup: int | None = None
    sweep_steps: int | None = None
    seed: int | None = None
    peer_b: str = "liger"
    limit_s: int = 300
    device: str = "auto"
    out: Path = speed_files.FOLDER
    model: Path | None = None
    task: Path | None = None
    plan: bool = False


def parse(words: Sequence[str]) -> Options:
    """key=value words. Raises UserError for an unknown key or a value that is not of its kind."""
    known = Options.__dataclass_fields__
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key == "--dry":
            key, equals, value = "plan", "=", "true"
        if key not in known or not equals:
            raise UserError(f"benchmarks.speed does not take {word!r}; write key=value with one of {', '.join(known)}, or the word table, or table wide, alone")
        kind = str(known[key].type)
        if kind.startswith("int"):
            if not value.isdecimal() or (int(value) < 1 and key != "seed"):
                raise UserError(f"benchmarks.speed takes a whole number of at least 1 for {key}, not {value!r}")
            values[key] = int(value)
        elif kind == "bool":
            if value not in ("true", "false"):
                raise UserError(f"benchmarks.speed takes true or false for {key}, not {value!r}")
            values[key] = value == "true"
        else:
            values[key] = Path(value) if kind.startswith("Path") else value
    if values.get("peer_b", "liger") not in speed_peers.PEERS_B:
        raise UserError(f"benchmarks.speed takes {', '.join(speed_peers.PEERS_B)} for peer_b, not {values['peer_b']!r}")
    return Options(**values)


def rows(options: Options, device: str) -> list[AnyRow]:
    """The chosen rows at the wanted sizes."""
    chosen = speed_targets.chosen(options.ids or ("all" if device == "cuda" else "cpu"))
    chosen = [_sized(row, options) for row in chosen]
    if (kind := speed_peers.PEERS_B[options.peer_b]) != "tuned":
        chosen = [speed_targets.compiled(row, kind) if isinstance(row, Row) and row.over.kind == "tuned" else row for row in chosen]
    return chosen


def _sized(row: AnyRow, options: Options) -> AnyRow:
    if isinstance(row, Row):
        return speed_targets.resized(row, options.steps, options.warmup, options.seed)
    if isinstance(row, SweepRow) and options.sweep_steps:
        if options.sweep_steps < 2:
            raise UserError("benchmarks.speed takes at least 2 for sweep_steps")
        return replace(row, workload=replace(row.workload, warmup=1, steps=options.sweep_steps - 1))
    return row


def measure(options: Options) -> int:
    """Measure the chosen rows. Returns the exit code."""
    from benchmarks.speed_run import Settings
    from pipeline.models.base import device_of

    check_writable(options.out / "targets.json")
    device = device_of(options.device)
    chosen = rows(options, device.type)
    groups = speed_targets.groups(chosen)
    if options.plan:
        print("\n".join(speed_plan.lines(groups, options.repeats, "cpu" if all(row.set == "cpu" for row in chosen) else "cuda")))
        return 0
    settings = Settings(device, options.repeats, float(options.limit_s))
    about, passes, lost = speed_files.origin(device), {}, []  # type: ignore[var-annotated]
    for group in groups:
        print(", ".join(row.id for row in group), flush=True)
        for row, found in _measure(group, settings, options, passes):
            speed_files.keep(options.out, row, {**found, "rates": settings.rates}, about)
            print(f"{row.id}: {_told(found)}", flush=True)
            if found.get("ratio") is None:
                lost.append(row.id)
    if lost:
        print(f"no ratio for {', '.join(lost)}", file=sys.stderr)
    return 1 if lost else 0


def _measure(group: list[AnyRow], settings: Any, options: Options, passes: dict) -> list[tuple[AnyRow, dict[str, Any]]]:
    from benchmarks import speed_eval, speed_run, speed_sweep

    first = group[0]
    _rates(group, settings)
    if isinstance(first, SweepRow):
        return [(first, speed_sweep.measure(first, replace(settings, limit_s=2 * settings.limit_s), passes))]
    if isinstance(first, EvalRow):
        names = {key: value for key in ("model", "task") if (value := getattr(options, key))}
        return [(first, speed_eval.measure(first, settings, speed_eval.Source(**names)))]
    steps = [row for row in group if isinstance(row, Row)]
    sides = speed_run.measure(steps, settings)
    return [(row, speed_run.record(row, sides, settings)) for row in steps]


def _rates(group: list[AnyRow], settings: Any) -> None:
    """Measure the device's rates once for every dtype that the rows compute in."""
    import torch

    from benchmarks.speed_limits import rates
    from benchmarks.speed_run import clear

    for row in group:
        dtype = row.dtype if isinstance(row, EvalRow) else (row.under.workload if isinstance(row, Row) else row.workload).dtype
        if dtype not in settings.rates:
            settings.rates[dtype] = rates(settings.device, torch.bfloat16 if dtype == "bf16" else torch.float32)
            clear(settings.device)
            shown = settings.rates[dtype]
            print(f"{dtype}: {shown['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s, copy {shown['copy_bytes_per_s'] / 1e12:.3f} TB/s", flush=True)


def _told(found: dict[str, Any]) -> str:
    if found.get("ratio") is None:
        return f"no ratio ({found.get('error', 'not measured')})"
    text = f"{speed_files.number(found['ratio'])}x ({' to '.join(map(speed_files.number, found['spread']))})"
    text += f", required {found['required']:g}x: {speed_stats.verdict(found, found['required'])}" if found["required"] is not None else ""
    text += f", fastest steps {found['best_ratio']:.2f}x" if "best_ratio" in found else ""
    if loss := found.get("loss"):
        apart = "not finite" if loss["max_relative"] is None else f"{loss['max_relative']:.2g} apart"
        text += f", losses {'match' if loss['matched'] else 'DIFFER'} ({apart})"
    if same := found.get("answers"):
        text += f", identical {same['identical']:.2%}"
        text += f" (the peer to itself in smaller batches {same['peer_rebatched']:.2%})" if "peer_rebatched" in same else ""
    return text + (f"; {found['error']}" if found.get("error") else "")


def run(words: Sequence[str]) -> int:
    """Measure, or print a table of what was measured."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would spread over several
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if words[:1] != ["table"]:
        return measure(parse(words))
    wide = words[1:2] == ["wide"]
    print((speed_files.grid if wide else speed_files.table)(parse(words[1 + wide :]).out))
    return 0


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
