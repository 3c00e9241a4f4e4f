"""The rows of the speed benchmarks: what is compared with what, and what must be reached. The issue's table as data.

Library of `python -m benchmarks.speed`. Three kinds: a step (two sides' times or memories), a sweep, an evaluation.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.speed_workloads import OTHERS, RATES, Workload
from pipeline.core.files import UserError, closest

OURS = "ours"
STABLE = {"phi3-mini": 1e-4}
"""Learning rates where the default is no training: at 1e-3 phi3-mini's loss jumps from 10.7 to 13.9 in the third step, so that the last bits of two engines are
points of loss ten steps later, and comparing their curves tells nothing."""


@dataclass(frozen=True)
class Side:
    """Who trains what. kind: ours, or a peer: plain, tuned, compile, liger-compile."""

    kind: str
    workload: Workload

    @property
    def name(self) -> str:
        return f"{self.kind} {self.workload.name}"


@dataclass(frozen=True)
class Row:
    """One id. The ratio says how many times `over` costs what `under` does."""

    id: str
    what: str
    over: Side
    under: Side
    figure: str = "step_s"
    """step_s, or peak_bytes."""
    required: float | None = None
    aim: float | None = None
    set: str = "step"
    """The file it is kept in: speed-<set>.json."""


@dataclass(frozen=True)
class SweepRow:
    """`trials` LoRA trials of equal steps: packed against one after another with the model kept loaded. steps: of a trial."""

    id: str
    what: str
    workload: Workload
    trials: int
    measured: int
    """Trials that the peer runs; its time for the others is scaled."""
    required: float | None = None
    aim: float | None = None
    set: str = "sweep"


@dataclass(frozen=True)
class EvalRow:
    """Answering rows with a base model. scoring: choice or generate."""

    id: str
    what: str
    scoring: str
    shape: str = "135m"
    rows: int = 2000
    batch_tokens: int = 16384
    new_tokens: int = 32
    dtype: str = "bf16"
    required: float | None = None
    aim: float | None = None
    set: str = "eval"


AnyRow = Row | SweepRow | EvalRow


def _against(id: str, what: str, kind: str, workload: Workload, required: float | None = None, aim: float | None = None, figure: str = "step_s",
             set: str = "step") -> Row:
    return Row(id, what, Side(kind, workload), Side(OURS, workload), figure, required, aim, set)


def _targets() -> list[AnyRow]:
    small = {t: Workload(t, "135m", 16, 64) for t in ("lora", "full")}
    big = {t: Workload(t, "1b", 8, 1024) for t in ("lora", "full", "qlora")}
    sweep = {shape: Workload("lora", shape, batch, length, warmup=1, steps=99) for shape, batch, length in (("135m", 16, 64), ("1b", 4, 256))}
    return [
        _against("lora-135m-step", "LoRA r16, 135M, 16 x 64: step time against (a)", "plain", small["lora"], 8, 15),
        _against("full-135m-step", "full, 135M, 16 x 64: step time against (a)", "plain", small["full"], 6, 10),
        _against("lora-1b-plain", "LoRA r16, 1B, 8 x 1024: tokens/s against (a)", "plain", big["lora"], 2.05, 2.6),
        _against("lora-1b-tuned", "LoRA r16, 1B, 8 x 1024: tokens/s against (b)", "tuned", big["lora"], 1.6, 2.1),
        _against("qlora-1b-plain", "QLoRA r16, 1B, 8 x 1024: tokens/s against (a)", "plain", big["qlora"], 2.0, 2.5),
        Row("lora-over-full", "LoRA's tokens/s over full fine-tuning's, 1B, 8 x 1024, both ours", Side(OURS, big["full"]), Side(OURS, big["lora"]),
            required=1.2, aim=1.35),
        SweepRow("sweep8-135m", "sweep of 8 trials, 135M, 16 x 64 a trial, against sequential PEFT", sweep["135m"], 8, 8, 15, 30),
        SweepRow("sweep32-135m", "sweep of 32 trials, 135M, 16 x 64 a trial, against sequential PEFT", sweep["135m"], 32, 4, 30, 60),
        SweepRow("sweep8-1b", "sweep of 8 trials, 1B, 4 x 256 a trial, against sequential PEFT", sweep["1b"], 8, 8, 4, 8),
        _against("lora-1b-memory", "LoRA r16, 1B, 8 x 1024: peak reserved memory of (a) over ours", "plain", big["lora"], 3.0, 3.5, "peak_bytes"),
        _against("lora-1b-small", "LoRA r16, 1B, 4 x 256: tokens/s against (a)", "plain", Workload("lora", "1b", 4, 256), 2.5, 4),
        EvalRow("eval-choice", "choice scoring, 135M, 2,000 rows, against the plain loop", "choice", required=5, aim=10),
        EvalRow("eval-generate", "greedy generation, 135M, 2,000 rows, against the plain loop", "generate", required=5, aim=10),
        EvalRow("eval-choice-fp32", "choice scoring, 135M, 2,000 rows, fp32, against the plain loop", "choice", dtype="fp32", required=5, aim=10),
        EvalRow("eval-generate-fp32", "greedy generation, 135M, 2,000 rows, fp32, against the plain loop", "generate", dtype="fp32", required=5, aim=10),
    ]


def _extra() -> list[AnyRow]:
    """Ratios that the issue asks for beside its table, and all workloads against both peers."""
    big = {t: Side(OURS, Workload(t, "1b", 8, 1024)) for t in ("lora", "qlora")}
    rows: list[AnyRow] = [
        Row("qlora-over-lora", "QLoRA's tokens/s over LoRA's, 1B, 8 x 1024, both ours", big["lora"], big["qlora"], required=0.6, set="wide"),
        Row("qlora-lora-memory", "LoRA's peak reserved memory over QLoRA's, 1B, 8 x 1024, both ours", big["lora"], big["qlora"], "peak_bytes", 1.0, set="wide"),
    ]
    grid = [(t, shape, b, n) for t, (shape, b, n) in itertools.product(
        RATES, (("135m", 16, 64), ("135m", 32, 128), ("135m", 128, 64), ("1b", 4, 256), ("1b", 8, 1024)))]
    grid += [(t, "8b", 2, 1024) for t in ("lora", "qlora")]
    for technique, shape, batch, length in grid:
        workload = Workload(technique, shape, batch, length)
        for kind, letter in (("plain", "a"), ("tuned", "b")):
            what = f"{technique}, {shape.upper()}, {batch} x {length}: tokens/s against ({letter})"
            rows.append(_against(f"{workload.name}-{kind}", what, kind, workload, set="wide"))
    for shape, (batch, length, required) in itertools.product(OTHERS, ((8, 1024, 2), (4, 256, 5))):
        workload = Workload("lora", shape, batch, length, lr=STABLE.get(shape, 0.0))
        what = f"LoRA r16, {shape}, {batch} x {length}: tokens/s against (a)"
        rows.append(_against(f"{workload.name}-plain", what, "plain", workload, required, set="wide"))
    return rows + [compiled(row, "compile") for row in TARGETS if isinstance(row, Row) and row.id == "lora-1b-tuned"]


def compiled(row: Row, kind: str) -> Row:
    """The same with a peer (b) of this kind, under torch.compile, as a row of its own."""
    how = {"compile": "that has torch_compile in place of Liger", "liger-compile": "with torch_compile"}[kind]
    return replace(row, id=f"{row.id}-{kind}", what=f"{row.what} {how}", over=replace(row.over, kind=kind), set="wide")


def _cpu() -> list[AnyRow]:
    rows: list[AnyRow] = []
    for technique in RATES:
        workload = Workload(technique, "135m", 4, 64, dtype="fp32", warmup=1, steps=4)
        rows.append(_against(f"cpu-{technique}", f"{technique}, 135M, 4 x 64, fp32 on the CPU: step time against (a)", "plain", workload, 1.0, set="cpu"))
    return rows


TARGETS = _targets()
FURTHER, CPU = _extra(), _cpu()
SETS = {"all": [r.id for r in TARGETS], "wide": [r.id for r in FURTHER], "cpu": [r.id for r in CPU],
        "families": [r.id for r in FURTHER if isinstance(r, Row) and r.under.workload.shape in OTHERS],
        **{kind: [r.id for r in TARGETS if r.set == kind] for kind in ("step", "sweep", "eval")}}
KNOWN: dict[str, AnyRow] = {row.id: row for row in [*TARGETS, *FURTHER, *CPU]}
HEADLINE = [*SETS["all"], *SETS["cpu"]]
"""The ids that targets.json holds, in the table's order. (b) with torch_compile stands beside (b): it compiles for a minute, so that it is run when asked."""
HEADLINE.insert(HEADLINE.index("lora-1b-tuned") + 1, "lora-1b-tuned-compile")


def chosen(words: str) -> list[AnyRow]:
    """Rows of a comma-separated list of ids and sets, each once. Raises UserError for an unknown one."""
    ids: dict[str, None] = {}
    for word in filter(None, words.split(",")):
        if word not in SETS and word not in KNOWN:
            meant = closest(word, [*SETS, *KNOWN])
            raise UserError(f"there is no benchmark {word!r}{meant}; sets are {', '.join(SETS)}, and with plan=true each tells its ids")
        ids |= dict.fromkeys(SETS.get(word, [word]))
    if not ids:
        raise UserError("ids names no benchmark; leave it out for the default, or name a set or an id")
    return [KNOWN[i] for i in ids]


def resized(row: AnyRow, steps: int | None, warmup: int | None, seed: int | None) -> AnyRow:
    """The row with other numbers of steps, its ids and shapes as they are."""
    change: dict[str, Any] = {k: v for k, v in (("steps", steps), ("warmup", warmup), ("seed", seed)) if v is not None}
    if not isinstance(row, Row):
        return row
    over, under = (replace(side, workload=replace(side.workload, **change)) for side in (row.over, row.under))
    return replace(row, over=over, under=under)


def groups(rows: list[AnyRow]) -> list[list[AnyRow]]:
    """Step rows that share a side together, so that it is measured once; everything else alone. In the given order."""
    joined_groups: list[tuple[set[Side], list[AnyRow]]] = []
    for row in rows:
        if not isinstance(row, Row):
            joined_groups.append((set(), [row]))
            continue
        sides: set[Side] = {row.over, row.under}
        joined = [g for g in joined_groups if g[0] & sides]
        members: list[AnyRow] = [r for g in joined for r in g[1]]
        merged = (sides.union(*(g[0] for g in joined)), [*members, row])
        at = joined_groups.index(joined[0]) if joined else len(joined_groups)
        joined_groups = [g for g in joined_groups if not any(g is j for j in joined)]
        joined_groups.insert(at, merged)
    return [g[1] for g in joined_groups]
