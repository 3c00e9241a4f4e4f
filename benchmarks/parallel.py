"""One training over several GPUs (train.parallel) against one GPU: tokens a second, memory beside its forecast, losses. docs/scale.md shows the table.

    python -m benchmarks.parallel out=benchmarks/results/parallel.jsonl limit_s=300     one GPU, then all visible ones (gpus=2: two)
    python -m benchmarks.parallel only=lora-8b,full-8b                                  these alone; again=true: those that failed, too
    python -m benchmarks.parallel gpus=2 device=cpu shape=tiny length=32                the same code on the CPU

Each GPU has BATCH rows of `length` tokens a step, every token labelled (weak scaling). Weights are random, drawn on the GPU. Ranks are started once for
one GPU and once for all; a line a case is appended when it is done, and lines that stand in the file are not run again. A case begins only where the
time that is left is more than its estimate. The curve-* cases are the step of all GPUs on one of them, for its losses.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed_files import FOLDER, origin
from benchmarks.speed_workloads import Workload, model_config
from pipeline.cell.launch import run_ranks
from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import UserError
from pipeline.core.settings import Precision, Train
from pipeline.measure import machine
from pipeline.measure.clock import Stopwatch
from pipeline.training.ranks import ALONE, Place, Ranks

BATCH, LENGTH, WARM, TIMED = 2, 2048, 3, 8
OPTIONS = {"out": str(FOLDER / "parallel.jsonl"), "limit_s": "600", "gpus": "", "only": "", "again": "false", "device": "", "shape": "", "length": str(LENGTH)}


@dataclass(frozen=True)
class Case:
    """What is measured. gpus: all, both or curve (one GPU takes the rows of all, a GPU's at a time); estimate_s: of loading, warming up and stepping."""

    technique: str
    shape: str
    way: str
    """ddp (on one GPU: the fast engine) or fsdp."""
    gpus: str = "both"
    estimate_s: float = 20

    @property
    def name(self) -> str:
        engine = self.technique == "full" and self.way == "ddp"
        return "-".join([*(["curve"] if self.gpus == "curve" else []), self.technique, self.shape, *(["engine"] if engine else [])])

    def runs_on(self, one: bool) -> bool:
        return self.gpus == "both" or (self.gpus == "curve") == one


CASES = (
    Case("lora", "1b", "ddp", estimate_s=15), Case("full", "1b", "fsdp", estimate_s=12), Case("lora", "8b", "ddp", estimate_s=20),
    Case("full", "8b-half", "fsdp", estimate_s=20), Case("full", "8b", "fsdp", "all", 30), Case("lora", "1b", "ddp", "curve", 12),
    Case("full", "1b", "fsdp", "curve", 12), Case("full", "1b", "ddp", estimate_s=12), Case("full", "8b-half", "ddp", estimate_s=20),
    Case("qlora", "8b", "ddp", estimate_s=25),
)
"""In the order of their worth, should time be short."""


@dataclass(frozen=True)
class Setting:
    """Of a whole call. gpus: all of them; length: tokens that a row feeds."""

    out: Path
    gpus: int
    device: str
    length: int

    def done(self, again: bool) -> set[tuple[str, int]]:
        """(case, ranks) that stand in the file."""
        lines = [json.loads(line) for line in self.out.read_text().splitlines()] if self.out.exists() else []
        return {(line["case"], line["gpus"]) for line in lines if not (again and line.get("error"))}

    def add(self, line: dict[str, Any]) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with open(self.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run(words: Sequence[str]) -> int:
    """Measure what is missing, one GPU's cases and all GPUs' in turn by worth."""
    options = OPTIONS | key_values(words, tuple(OPTIONS), "benchmarks.parallel")
    device = options["device"] or ("cuda" if machine.visible_gpus() else "cpu")
    gpus = int(options["gpus"] or (machine.visible_gpus() if device == "cuda" else 2))
    setting = Setting(Path(options["out"]), gpus, device, int(options["length"]))
    wanted = [c for c in CASES if not options["only"] or c.name in options["only"].split(",")]
    if not wanted:
        raise UserError(f"only={options['only']} names no case; there are {', '.join(c.name for c in CASES)}")
    if options["shape"]:
        wanted = [dataclasses.replace(c, shape=options["shape"], estimate_s=1) for c in wanted]
    limit, watch = float(options["limit_s"]), Stopwatch()
    _import_once()
    done = setting.done(options["again"] == "true")
    for count in dict.fromkeys((1, gpus)):
        end = limit / 2 if count < gpus else limit  # what one GPU does must not leave the others without time
        while cases := [c for c in dict.fromkeys(wanted) if (c.runs_on(count == 1) or gpus == 1) and (c.name, count) not in done]:
            if watch.peek() + cases[0].estimate_s > end:
                break
            done |= _some(setting, cases, count, end - watch.peek())
    print(table(setting.out))
    return 0


def _import_once() -> None:
    """What ranks would otherwise each import. Nothing that starts CUDA, which a process that forks must not."""
    import torch  # noqa: F401
    import transformers  # noqa: F401


def _some(setting: Setting, cases: Sequence[Case], count: int, left_s: float) -> set[tuple[str, int]]:
    """Measure cases with so many ranks until one fails or the time is over. Returns those that are settled."""
    watch = Stopwatch()
    with tempfile.NamedTemporaryFile("w+") as begun:

        def work(place: Place) -> int:
            ranks = Ranks.join(place, setting.device)
            for case in cases:
                if not ranks.from_first(watch.peek() + case.estimate_s < left_s):
                    print(f"{case.name} on {count}: no time left", flush=True)
                    break
                if ranks.leads:
                    Path(begun.name).write_text(case.name)
                line = measure(case, setting, ranks)
                if ranks.leads:
                    setting.add(line)
                    print(f"{case.name} on {count}: {line['tokens_per_s']:,.0f} tokens/s, {watch.peek():.0f} s so far", flush=True)
            ranks.leave()
            return 0

        code = run_ranks(work, count)
        at = Path(begun.name).read_text()
    if not code:
        return {(case.name, count) for case in cases}
    if not at:
        raise UserError(f"{count} ranks did not come together (code {code}); what they said is above")
    setting.add({"case": at, "gpus": count, "error": f"its ranks ended with code {code} (72: out of memory)"})
    return {(case.name, count) for case in cases[: [case.name for case in cases].index(at) + 1]}


def measure(case: Case, setting: Setting, ranks: Ranks) -> dict[str, Any]:
    """A case's line, from every rank."""
    import gc

    import torch

    from benchmarks.speed_ours import our_model
    from pipeline.measure.memory import PeakMemory
    from pipeline.methods.base import Method
    from pipeline.methods.full import Full
    from pipeline.objectives.labels import Labels
    from pipeline.training.sharded import Sharded
    from pipeline.training.stepping import Run, choose

    whole, lap = Stopwatch(), Stopwatch()
    device, total = torch.device(setting.device), WARM + TIMED
    batch = BATCH * (setting.gpus if case.gpus == "curve" else ranks.count)
    workload = Workload(case.technique, case.shape, batch, setting.length + 1, "bf16" if setting.device == "cuda" else "fp32", WARM, TIMED)
    model = our_model(workload, device)
    settings = train_settings(workload, case, setting)
    examples = rows(workload)
    method = Full() if workload.trains_base else Method()  # the model has its adapter already
    within = ranks if ranks.count > 1 or case.way == "fsdp" else ALONE
    step_run = Run(model, method, Labels(), examples, settings, 0, total, device, workload.torch_dtype(), 0, within)
    loaded_s = lap.lap()
    memory = PeakMemory(device)
    memory.start()
    stepping: Any = Sharded(step_run) if case.way == "fsdp" else choose(step_run)
    warm_s = lap.lap()
    losses = [_step(stepping, step, within) for step in range(WARM)]
    timer = Stopwatch(device)
    timer.lap()
    losses += [_step(stepping, step, within) for step in range(WARM, total)]
    step_s = timer.lap() / TIMED
    losses = [float(loss) for loss in losses]
    peaks = ranks.gathered(memory.stop().peak_bytes)
    engine, reason = stepping.engine, stepping.reason
    if case.way != "fsdp":  # which would gather the whole model
        stepping.close()
    del stepping, step_run, model, settings
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "case": case.name, "technique": case.technique, "shape": case.shape, "way": case.way, "gpus": ranks.count, "batch": batch, "length": setting.length,
        "engine": engine, "engine_reason": reason, "step_s": step_s, "tokens_per_s": batch * setting.length / step_s,
        "losses": losses, "peak_bytes": peaks, "forecast_bytes": forecast(case, setting, batch, ranks.count), "load_s": loaded_s, "warm_s": warm_s,
        "whole_s": whole.peek(), **origin(device),
    }


def _step(stepping: Any, step: int, ranks: Ranks) -> Any:
    """A step as the loop makes it, which agrees on whether to stop and reads no loss before it has to."""
    loss, tokens, padding = stepping.step(step, 1.0)
    ranks.totals([0, 0, tokens, padding])
    return loss


def train_settings(workload: Workload, case: Case, setting: Setting) -> Train:
    """A GPU's rows in one micro-batch; a constant rate."""
    return Train(workload.lr, 1, workload.batch, BATCH * (setting.length + 8), steps=workload.total, schedule="constant", warmup_share=0.0,
                 padding_free="never", engine="fast" if case.way != "fsdp" else "eager", parallel=case.way)  # type: ignore[arg-type]


def rows(workload: Workload) -> list[list[Any]]:
    """Of all steps, one example each, every token but the first labelled."""
    from pipeline.data.rows import Encoded

    return [[Encoded(tuple(row), 1)] for ids in workload.batches(workload.total) for row in ids.tolist()]


def forecast(case: Case, setting: Setting, batch: int, count: int) -> int | None:
    """The forecast of a GPU's peak; None where there is none."""
    from pipeline.forecasting import memory
    from pipeline.forecasting.cell import constants
    from pipeline.forecasting.plan import equal_rows, training_plan
    from pipeline.forecasting.shape import NoForecast, read_shape
    from pipeline.forecasting.trained import trained

    if setting.device != "cuda":
        return None
    workload = Workload(case.technique, case.shape, batch, setting.length + 1)
    lora = {"type": "peft_adapter", "config": {"type": "LoraConfig", "task_type": "CAUSAL_LM", "r": workload.rank, "target_modules": "all-linear"}}
    method = {"type": "full"} if workload.trains_base else lora
    with tempfile.TemporaryDirectory() as folder:
        model_config(case.shape).save_pretrained(folder)
        shape = read_shape(Path(folder) / "config.json")
    try:
        made = training_plan(shape, trained(method, shape), train_settings(workload, case, setting), Precision("nf4" if case.technique == "qlora" else "bf16"),
                             equal_rows(batch, setting.length, setting.length), 0, 2, gpu=True, ranks=count)
        return memory.forecast(made, constants()).total
    except NoForecast:
        return None


# What is told of it

COLUMNS = ("case", "GPUs", "way", "tokens a second", "of one GPU's, a GPU", "step", "peak a GPU (forecast)", "losses apart", "device, date")


def table(path: Path) -> str:
    """Markdown, a line a case and number of GPUs. `losses apart`: from one GPU's over the same rows, the largest share of a step."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    held = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    latest = {(line["case"], line["gpus"]): line for line in held}
    lines += [f"| {' | '.join(_cells(line, latest))} |" for line in latest.values()]
    return "\n".join(lines if latest else [*lines, f"| not measured yet {'| ' * len(COLUMNS)}|"])


def _cells(line: dict[str, Any], every: dict[tuple[str, int], dict[str, Any]]) -> Iterator[str]:
    yield f"`{line['case']}`"
    yield str(line["gpus"])
    if line.get("error"):
        yield line["error"]
        yield from [""] * (len(COLUMNS) - 3)
        return
    one = every.get((line["case"], 1), {})
    yield ("FSDP2" if line["way"] == "fsdp" else "DDP" if line["gpus"] > 1 else "alone") + f", {line['engine']}"
    yield f"{line['tokens_per_s']:,.0f}"
    share = line["tokens_per_s"] / line["gpus"] / one["tokens_per_s"] if one.get("tokens_per_s") and line["gpus"] > 1 else None
    yield "" if share is None else f"{share:.1%}"
    yield f"{line['step_s'] * 1e3:.1f} ms"
    peaks = [p for p in line["peak_bytes"] if p is not None]
    expected = f" ({line['forecast_bytes'] / 2**30:.1f})" if line["forecast_bytes"] else ""
    yield f"{max(peaks) / 2**30:.1f}{expected} GiB" if peaks else ""
    curve = every.get((f"curve-{line['case']}", 1), {})
    same = curve.get("losses") if curve.get("batch") == line["batch"] and line["gpus"] > 1 else None
    yield "" if not same else f"{max(abs(a - b) / b for a, b in zip(line['losses'], same, strict=True)):.2%}"
    yield f"{line['hardware'].get('gpu') or line['hardware'].get('cpu')}, {line['date']}"


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
