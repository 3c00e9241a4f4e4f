"""Which learning rate suits which technique, model and task: the grid behind the default rates (experiments/rates/README.md).

    python -m benchmarks.rates run out=experiments/rates/cells.jsonl tasks=cqa,trec techniques=main -- model=smollm2_135m
    (several such processes share the grids of a model between them)
    python -m benchmarks.rates fit                         fits the rules on half of the pairs, judges them on the other half, writes rules.json and table.md

A grid is one technique on one task and model at seven rates, half a decade apart. Its runs begin at the same weights, see the same rows in the
same order and share one capture of the step, so that they differ in the rate alone. A line a run: scores on validation and test rows after the
last step, and which test rows were right, as bits. Lines that stand in the file are not run again.
"""

from __future__ import annotations

import copy
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
    "ia3": 3e-3, "vera": 1e-2, "adapter_houlsby": 3e-4, "prompt_tuning": 3e-2, "prefix_tuning": 3e-3, "step_by_step": 3e-5, "step_by_step_lora": 3e-4,
}
"""The main techniques, and the middle of each one's seven rates."""
UNTRAINED = "zero_shot"
WORDS = ("train_rows=640", "train.epochs=2", "evaluate.forgetting=false", "evaluate.test_rows=400", "evaluate.transfer_rows=0", "tracking=none",
         "train.progress=false", "seed=0")
TEACHERS = {"vader_movies_5": "lexicon", "cqa": "stored", "svamp": "stored", "trec": "none"}
NEEDS_TEACHER = ("step_by_step", "step_by_step_lora")


def rates_of(technique: str) -> list[float]:
    """The seven rates of a technique's grid, lowest first."""
    middle = LADDER.index(MIDDLE[technique])
    return list(LADDER[middle - RATES // 2 : middle + RATES // 2 + 1])


class Grid:
    """One technique on one task and model, at one rate after another.

    Args:
        words: Hydra's, of the cell but for train.lr. shared: base models that were read already; they stay as they are.
    """

    def __init__(self, words: Sequence[str], shared: Any) -> None:
        self.words, self.shared = words, shared
        self.stepping: Any = None

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

        from pipeline.cell.inputs import build_parts, check, encoded, load_inputs
        from pipeline.cell.run import wrap
        from pipeline.core.compose import compose
        from pipeline.measure.clock import Meter
        from pipeline.objectives.base import TrainingContext
        from pipeline.serving.artefact import scorer_of
        from pipeline.training.loop import total_steps
        from pipeline.training.stepping import Run, choose

        self.close()
        cfg = compose([*self.words, *([f"train.lr={lr}"] if lr else [])])
        parts, meter = build_parts(cfg, ("validation", "test")), Meter(None)
        check(parts)
        meter.device = parts.device
        mine = dataclasses.replace(self.shared, stored={folder: copy.deepcopy(model) for folder, model in self.shared.stored.items()})
        with meter.phase("load"):
            self.inputs = load_inputs(parts, mine, meter)
            self.wrapped = wrap(parts, self.inputs, meter)
        if lr is None:
            return
        model, train = self.wrapped.scorer.model, parts.settings.train
        examples = encoded(parts, self.inputs.encoder, self.inputs.rows.train, self.inputs.rows.rationales)
        total = total_steps(train, len(examples))
        parts.method.before_training(model, total)
        context = TrainingContext(cfg, parts.settings, model, self.inputs.encoder, self.inputs.rows.train, parts.device, parts.dtype, scorer_of)
        prepared = parts.objective.prepared(examples, context)
        torch.manual_seed(cfg.seed)
        self.stepping = choose(Run(model, parts.method, parts.objective, prepared.examples, train, cfg.seed, total, parts.device, parts.dtype,
                                   self.inputs.encoder.pad_id))
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
        from pipeline.scoring import answers

        scorer, rows, scored = self.wrapped.scorer, self.inputs.rows, {}
        for split, asked in (("validation", rows.validation), ("test", rows.test)):
            predictions = scorer.predict(asked)
            score = answers.score(predictions, scorer.task)
            right = "".join("1" if p["correct"] else "0" for p in predictions)
            nll = None if score.nll is None else round(score.nll, 4)
            scored[split] = {"rows": len(asked), "right": right.count("1"), "nll": nll, "bits": f"{int('1' + right, 2):x}"}
        return scored

    def close(self) -> None:
        """Free the device's memory."""
        import torch

        if self.stepping is not None:
            self.stepping.close()
        self.stepping = self.first = None
        self.__dict__.pop("wrapped", None), self.__dict__.pop("inputs", None)
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
    from pipeline.cell.inputs import Shared
    from pipeline.core.compose import compose
    from pipeline.core.files import UserError
    from pipeline.measure.clock import Stopwatch
    from pipeline.measure.machine import hardware
    from pipeline.models.base import device_of

    out, whole = Path(options["out"]), Stopwatch()
    techniques = [UNTRAINED, *MIDDLE] if options["techniques"] == "main" else options["techniques"].split(",")
    shared, about = Shared(), None
    for task, technique in grids(options["tasks"].split(","), techniques):
        words = [*WORDS, *overrides, f"task={task}", f"technique={technique}", f"teacher={TEACHERS.get(task, 'none')}"]
        cfg = compose([*words, "train.lr=1.0e-4"])
        model = cfg.model.name
        done = {r["lr"] for r in lines(out) if (r["model"], r["task"], r["technique"]) == (model, task, technique)}
        asked = [lr for lr in ([None] if technique == UNTRAINED else rates_of(technique)) if lr not in done]
        if not asked or not _claimed(out, f"{model}-{task}-{technique}"):
            continue
        if about is None:
            shared.preload(Path(cfg.paths.models) / model, False)
            about = hardware(device_of(cfg.device))
        grid, watch = Grid(words, shared), Stopwatch()
        for lr in asked:
            if whole.peek() > float(options.get("limit_s", "inf")):
                return
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
        grid.close()
        print(f"{whole.peek():.0f} s: {model} {task} {technique}: {len(asked)} runs", flush=True)


def _claimed(out: Path, name: str) -> bool:
    """Whether this process is the first to take a grid; the folder of claims is removed by hand before processes are started again."""
    claim = out.with_suffix(".claims") / name
    claim.parent.mkdir(exist_ok=True)
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


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
    else:
        from benchmarks import rates_fit

        rates_fit.write(FOLDER, lines(FOLDER / "cells.jsonl"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
