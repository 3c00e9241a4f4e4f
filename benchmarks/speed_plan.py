"""What a run of the speed benchmarks would do, and about how long it would take. Nothing is measured.

Library of `python -m benchmarks.speed plan=true`. The estimates rest on the rates below, read off runs of the plain stack on one H100
(the larger of launch time and arithmetic); they are for planning device time and go into no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.speed_limits import step_flops
from benchmarks.speed_peers import COMPILED
from benchmarks.speed_targets import OURS, AnyRow, EvalRow, Row, Side, SweepRow
from benchmarks.speed_workloads import OTHERS, SHAPES, Workload

PEER_FLOPS_PER_S = {"cuda": 3e14, "cpu": 1e11}
LAUNCH_S = {"cuda": {"full": 0.004, "lora": 0.0075, "qlora": 0.0085, "prompt_tuning": 0.003, "step_by_step": 0.0065}, "cpu": dict.fromkeys(
    ("full", "lora", "qlora", "prompt_tuning", "step_by_step"), 0.001)}
"""Of one decoder layer's step."""
SETUP_S = {"135m": 2.5, "1b": 5.0, "8b": 15.0, "8b-half": 8.0, "tiny": 1.0, **dict.fromkeys(OTHERS, 8.0)}
SPEEDUP, CAPTURE_S, PROCESS_S = {"cuda": 4.0, "cpu": 1.0}, 5.0, 25.0
COMPILE_S = 150.0


def step_s(workload: Workload, device: str) -> float:
    """A peer's step."""
    return max(step_flops(workload) / PEER_FLOPS_PER_S[device], SHAPES[workload.shape]["num_hidden_layers"] * LAUNCH_S[device][workload.technique])


def side_s(side: Side, device: str) -> float:
    """One run of a side."""
    workload, faster = side.workload, SPEEDUP[device] if side.kind == OURS else 1.0
    extra = {OURS: CAPTURE_S if device == "cuda" else 0.0, **dict.fromkeys(COMPILED, COMPILE_S)}.get(side.kind, 0.0)
    return SETUP_S[workload.shape] + extra + workload.total * step_s(workload, device) / faster


def estimate(group: Sequence[AnyRow], repeats: int, device: str, measured: bool = False) -> float:
    """Seconds of rows that are measured together. measured: the sweep's peer has run for another row."""
    first = group[0]
    if isinstance(first, Row):
        return repeats * sum(side_s(side, device) for side in {s for row in group if isinstance(row, Row) for s in (row.over, row.under)})
    if isinstance(first, SweepRow):
        trial = 1.0 + first.workload.total * step_s(first.workload, device)
        packed = SETUP_S[first.workload.shape] + CAPTURE_S + trial * first.trials / SPEEDUP[device] / (4 if device == "cuda" else 1)
        return repeats * packed + (0 if measured else first.measured * trial + trial + PROCESS_S)
    return repeats * 2 * (6.0 if device == "cuda" else 300.0)


def lines(groups: Sequence[Sequence[AnyRow]], repeats: int, device: str) -> list[str]:
    """The plan as text, a line a row, with the estimates in seconds and their sum."""
    plan_lines, total, swept = [], 0.0, set()
    for group in groups:
        first = group[0]
        measured = isinstance(first, SweepRow) and first.workload in swept
        seconds = estimate(group, repeats, device, measured)
        total += seconds
        if isinstance(first, SweepRow):
            swept.add(first.workload)
        plan_lines += [f"{row.id}: {row.what} [{work(row)}]" for row in group]
        plan_lines.append(f"  about {seconds:.0f} s")
    return [*plan_lines, f"about {total:.0f} s in all on {'a GPU' if device == 'cuda' else 'the CPU'}, imports left out"]


def work(row: AnyRow) -> str:
    """The row's exact workload in short."""
    if isinstance(row, EvalRow):
        return f"{row.rows} rows, {row.batch_tokens} tokens a batch, {row.dtype}"
    workloads: list[Any] = list(dict.fromkeys([row.over.workload, row.under.workload])) if isinstance(row, Row) else [row.workload]
    parts = [f"{w.name}: {w.warmup} + {w.steps} steps, {w.dtype}, lr {w.lr:g}" for w in workloads]
    return "; ".join(parts) + (f"; {row.trials} trials, {row.measured} of the peer's measured" if isinstance(row, SweepRow) else "")
