"""Which learning rate suits which technique, model and task: the grid behind the default rates (experiments/rates/README.md).

    python -m benchmarks.rates run out=experiments/rates/cells.jsonl tasks=cqa,trec techniques=main -- model=smollm2_135m
    (several such processes share the grids of a model between them, chunk=2: two rates at a time, for grids whose answers are slow)
    python -m benchmarks.rates run out=FILE.jsonl tasks=trec techniques=prefix_tuning middle=3e-3 -- model=smollm2_135m method.relative=false
    (a technique with further settings in a file of its own: a line does not name them; middle: of its rates)
    python -m benchmarks.rates run out=experiments/tuners/rates.jsonl tasks=trec techniques=tuners -- model=smollm2_135m train_rows=320
    python -m benchmarks.rates defaults out=experiments/tuners/rates.jsonl     (PEFT's further tuners: benchmarks/rates_tuners.py)
    python -m benchmarks.rates choice                      which of a grid's rates a search should take (benchmarks/rates_choice.py): choice.md
    python -m benchmarks.rates fit                         fits the rules on half of the pairs, judges them on the other half, writes rules.json and table.md

A grid is one technique on one task and model at seven rates (of a further tuner five), half a decade apart. Its runs begin at the same weights,
see the same rows in the same order and share one capture of the step, so that they differ in the rate alone. A line a run: scores on validation
and test rows after the last step, and which test rows were right, as bits. Lines that stand in the file are not run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path("experiments/rates")
LADDER = tuple(float(f"{digit}e{power}") for power in range(-7, 1) for digit in (1, 3))
"""The rates that a grid is cut from, and that a default is rounded to."""
RATES = 7
MIDDLE = {
    "full": 3e-5, "top_layers": 1e-4, "head_only": 3e-4, "bitfit_added": 1e-3, "ln_tuning": 1e-3, "lora": 3e-4, "qlora": 3e-4, "dora": 3e-4,
    "ia3": 3e-3, "vera": 1e-2, "adapter_houlsby": 3e-4, "prompt_tuning": 3e-2, "prefix_tuning": 3e-2, "step_by_step": 3e-5, "step_by_step_lora": 3e-4,
}
"""The main techniques, and the middle of each one's seven rates."""
UNTRAINED = "zero_shot"
WORDS = ("train_rows=640", "train.epochs=2", "evaluate.forgetting=false", "evaluate.test_rows=400", "evaluate.transfer_rows=0", "tracking=none",
         "train.progress=false", "seed=0")
TEACHERS = {"vader_movies_5": "lexicon", "cqa": "stored", "esnli": "stored", "svamp": "stored", "trec": "none"}
NEEDS_TEACHER = ("step_by_step", "step_by_step_lora")


def rates_of(technique: str, model: Path | None = None, middle: float | None = None) -> list[float]:
    """The rates of a technique's grid, lowest first: seven, the same for every base (around `middle`, if that is given); of a further tuner five, around what
    suits the base in a folder."""
    from benchmarks import rates_tuners
    from pipeline.models.rates import REFERENCE, weight_rms

    if technique in MIDDLE:
        middle, count = middle or MIDDLE[technique], RATES
    else:
        middle, count = rates_tuners.MIDDLE[technique], rates_tuners.RATES
        if model is not None and (power := rates_tuners.power_of(technique)):
            middle *= ((weight_rms(model) or REFERENCE) / REFERENCE) ** power
    nearest = min(range(len(LADDER)), key=lambda i: abs(math.log(LADDER[i] / middle)))
    nearest = min(nearest, len(LADDER) - 1 - count // 2)
    return list(LADDER[nearest - count // 2 : nearest + count // 2 + 1])


class Grid:
    """One technique on one task and model, at one rate after another.

    Args:
        words: Hydra's, of the cell but for train.lr. shared: base models that were read already; they stay as they are.
    """

    def __init__(self, words: Sequence[str], shared: Any) -> None:
        self.words, self.shared = words, shared
        self.stepping: Any = None
        self.made: Any = None

    def run(self, lr: float) -> dict[str, Any]:
        """Train at a rate; the line's scores. Raises UserError where the technique does not go with the model."""
        import torch

        if self.stepping is None or self.stepping.engine == "eager":
            self._build(lr)
        else:
            self._begin_anew(lr)
        from pipeline.training.loop import lr_factor

        run, stepping = self.stepping.run, self.stepping
        torch.manual_seed(run.seed)
        losses = []
        for step in range(run.total):
            losses.append(stepping.step(step, lr_factor(step, run.total, run.settings.schedule, run.settings.warmup_share))[0])
        values = [float(loss) for loss in losses]
        bad = next((number for number, value in enumerate(values, 1) if not math.isfinite(value)), None)
        about = {"steps": run.total, "diverged_at": bad, "last_loss": None if bad else round(sum(values[-5:]) / len(values[-5:]), 4),
                 "engine": stepping.engine}
        return about | ({} if bad else self._scores())

    def untrained(self) -> dict[str, Any]:
        """The scores of the base as it is."""
        self._build(None)
        return self._scores()

    def _build(self, lr: float | None) -> None:
        import torch

        from benchmarks.set_up import set_up
        from pipeline.training.stepping import choose

        self.close()
        self.made = set_up([*self.words, *([f"train.lr={lr}"] if lr else [])], self.shared, trains=lr is not None)
        if lr is None:
            return
        torch.manual_seed(self.made.run.seed)
        self.stepping = choose(self.made.run)
        if self.stepping.engine != "eager":
            self.first = self.stepping.program.buffer.master.clone()

    def _begin_anew(self, lr: float) -> None:
        buffer, run = self.stepping.program.buffer, self.stepping.run
        for tensor in (*buffer.moments, buffer.count, buffer.raw, *([buffer.sum] if buffer.sum is not None else [])):
            tensor.zero_()
        buffer.master.copy_(self.first)
        buffer.sync()
        self.stepping.run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, lr=lr))

    def _scores(self) -> dict[str, Any]:
        from benchmarks.set_up import right_rows

        rows = self.made.inputs.rows
        return {split: right_rows(self.made.scorer, asked) for split, asked in (("validation", rows.validation), ("test", rows.test))}

    def close(self) -> None:
        """Free the device's memory."""
        import torch

        if self.stepping is not None:
            self.stepping.close()
        self.stepping = self.first = None
        self.made = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def grids(tasks: Sequence[str], techniques: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(task, technique) of every grid; step by step only where the task has a teacher that reasons."""
    for task, technique in itertools.product(tasks, techniques):
        if technique not in NEEDS_TEACHER or TEACHERS.get(task, "none") != "none":
            yield task, technique


def measure(options: dict[str, str], overrides: list[str]) -> None:
    """Run the grids that no other process has claimed, until the time is up, and append a line a run."""
    from benchmarks import rates_tuners
    from pipeline.cell.inputs import Shared
    from pipeline.core.compose import compose
    from pipeline.core.files import UserError
    from pipeline.measure.clock import Stopwatch
    from pipeline.measure.machine import hardware
    from pipeline.models.base import device_of

    out, whole = Path(options["out"]), Stopwatch()
    named = {"main": [UNTRAINED, *MIDDLE], "tuners": [UNTRAINED, *rates_tuners.MIDDLE]}
    techniques = named.get(options["techniques"]) or options["techniques"].split(",")
    shared, about = Shared(), None
    for task, technique in grids(options["tasks"].split(","), techniques):
        words = [*WORDS, *overrides, f"task={task}", f"technique={technique}", f"teacher={TEACHERS.get(task, 'none')}"]
        cfg = compose([*words, "train.lr=1.0e-4"])
        model = cfg.model.name
        done = {r["lr"] for r in lines(out) if (r["model"], r["task"], r["technique"], r["seed"]) == (model, task, technique, cfg.seed)}
        middle = float(options["middle"]) if "middle" in options else None
        rates = [None] if technique == UNTRAINED else rates_of(technique, Path(cfg.paths.models) / model, middle)
        asked = [lr for lr in rates if lr not in done]
        if not asked:
            continue
        watch, runs, grid = Stopwatch(), 0, None
        for lr in filter(asked.__contains__, _claimed(out, f"{model}-{task}-{technique}-{cfg.seed}", rates, int(options.get("chunk", RATES)))):
            if whole.peek() > float(options.get("limit_s", "inf")):
                return
            if about is None:
                shared.preload(Path(cfg.paths.models) / model, False)
                about = hardware(device_of(cfg.device))
            grid = grid or Grid(words, shared)
            line = {"model": model, "task": task, "technique": technique, "lr": lr, "seed": cfg.seed, "train_rows": cfg.train_rows}
            try:
                line |= grid.untrained() if lr is None else grid.run(lr)
            except (UserError, RuntimeError, ValueError) as error:
                line["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            with out.open("a") as file:
                file.write(json.dumps(line | {"seconds": round(watch.lap(), 2), "device": about["gpu"] or about["cpu"]}) + "\n")
            if "error" in line:
                print(model, task, technique, line["error"], flush=True)
                break
            runs += 1
        if grid is not None:
            grid.close()
            print(f"{whole.peek():.0f} s: {model} {task} {technique}: {runs} runs", flush=True)


def _claimed(out: Path, name: str, rates: Sequence[float | None], size: int) -> Iterator[float | None]:
    """The rates of a grid that this process is the first to take, `size` of them or fewer at a time, until `rates` is gone through: a claim is a file
    that is there. The folder of claims is removed by hand before processes are started again."""
    folder = out.with_suffix(".claims")
    folder.mkdir(exist_ok=True)
    for first in range(0, len(rates), size):
        with contextlib.suppress(FileExistsError):
            (folder / f"{name}-{rates[first]}").touch(exist_ok=False)
            yield from rates[first : first + size]


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that may be missing; of one that was cut off by a kill, what is whole."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{path}: a damaged line is left out", file=sys.stderr)
    return rows


def main(words: list[str]) -> int:
    split = words.index("--") if "--" in words else len(words)
    command, options = words[0], dict(word.split("=", 1) for word in words[1:split])
    if command == "run":
        measure(options, words[split + 1 :])
    elif command == "defaults":
        from benchmarks import rates_tuners

        out = Path(options["out"])
        for one in rates_tuners.write(out, lines(out)):
            print(f"{one.technique}: {one.rate:.1e}, power {one.power:g}, {one.regret:.1f} points below the best")
    elif command == "choice":
        from benchmarks import rates_choice

        rates_choice.write(FOLDER / "choice.md", lines(FOLDER / "cells.jsonl"))
    else:
        from benchmarks import rates_fit

        rates_fit.write(FOLDER, lines(FOLDER / "cells.jsonl"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
