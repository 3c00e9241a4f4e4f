"""The cache of finished runs that policies are replayed on: technique x seed on a task and a base, with validation curve, the test rows that were right,
seconds.

Library of `python -m benchmarks.race fill | synthetic | replay`. A file of JSON lines, one a run:

    model, task, technique, seed, lr, train_rows, steps, seconds, slots (runs at once: seconds are a share of theirs), source (measured or drawn)
    curve: [[share of training, validation metric, nll], ...], the last after the last step      validation: rows, right, nll
    test: rows, right, nll, bits (hexadecimal, a leading 1 and then a bit a row, 1 where it was answered right)

`fill` makes it on a GPU: seeds of an adapter train at once (pipeline/cell/packing.py), those of other techniques one after another. Lines that stand in the
file are not run again; several processes share the work through a folder of claims beside it (removed by hand before they are started again).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.rates import FOLDER as RATES
from benchmarks.rates import NEEDS_TEACHER, TEACHERS, lines
from benchmarks.set_up import right_rows, set_up
from pipeline.core.files import UserError, write_text

EPOCHS, CHECKS = 2, 4
WORDS = ("train_rows=640", f"train.epochs={EPOCHS}", f"train.validations={CHECKS}", "evaluate.forgetting=false", "evaluate.test_rows=2000",
         "evaluate.transfer_rows=0", "tracking=none", "train.progress=false")
TECHNIQUES = (
    "zero_shot", "few_shot", "full", "top_layers", "head_only", "frozen_embeddings", "bitfit", "bitfit_added", "ln_tuning", "lora", "rslora", "lora_plus",
    "pissa", "olora", "dora", "loha", "lokr", "vera", "oft", "boft", "ia3", "adapter_houlsby", "adapter_pfeiffer", "adapter_parallel", "compacter", "qlora",
    "lora_int8", "qdora", "loftq", "prompt_tuning", "prompt_tuning_text", "prefix_tuning", "p_tuning", "ladder", "step_by_step", "step_by_step_lora", "adalora",
)
"""What `techniques=all` means."""
FIRST_SEED = 1


# the file


@dataclass(frozen=True)
class World:
    """One task on one base: [T, S] where seeds run alike for all techniques; right [T, S, n]; curve [T, S, C] of the validation metric; seconds [T, S]."""

    model: str
    task: str
    names: list[str]
    right: np.ndarray
    curve: np.ndarray
    shares: tuple[float, ...]
    seconds: np.ndarray
    source: str

    @property
    def means(self) -> np.ndarray:
        """[T] what the techniques' accuracy is over all seeds and rows of the cache: the truth of a replay, which draws from these."""
        mean: np.ndarray = self.right.mean((1, 2))
        return mean


def worlds(path: Path) -> list[World]:
    """The tasks and bases of a cache, techniques with fewer seeds than others left out. Raises UserError where there is none."""
    by_place: dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines(path):
        if "error" not in line:
            by_place[line["model"], line["task"]][line["technique"]][line["seed"]] = line
    made = [_world(*place, runs) for place, runs in sorted(by_place.items())]
    if not made:
        raise UserError(f"{path} holds no finished run; fill it with python -m benchmarks.race fill")
    return made


def _world(model: str, task: str, runs: dict[str, dict[int, dict[str, Any]]]) -> World:
    most = max(map(len, runs.values()))
    names = sorted(name for name, seeds in runs.items() if len(seeds) == most)
    table = [[runs[name][seed] for seed in sorted(runs[name])] for name in names]
    right = np.array([[unpacked(run["test"]["bits"]) for run in seeds] for seeds in table])
    curve = np.array([[[point[1] for point in run["curve"]] for run in seeds] for seeds in table])
    first = table[0][0]
    seconds = np.array([[run["seconds"] for run in seeds] for seeds in table])
    return World(model, task, names, right, curve, tuple(point[0] for point in first["curve"]), seconds, first.get("source", "measured"))


def unpacked(bits: str) -> np.ndarray:
    """[n] of 0 and 1 from the hexadecimal form."""
    return np.array([int(bit) for bit in f"{int(bits, 16):b}"[1:]], dtype=np.uint8)


def packed(right: np.ndarray) -> str:
    """The hexadecimal form of [n]."""
    return f"{int('1' + ''.join(map(str, right.astype(int))), 2):x}"


# filling it


def fill(options: dict[str, str], overrides: list[str]) -> None:
    """Run what no other process has claimed, until the time is up, and append a line a run."""
    from pipeline.cell.inputs import Shared
    from pipeline.core.compose import compose
    from pipeline.measure.clock import Stopwatch

    out, watch, shared = Path(options["out"]), Stopwatch(), Shared()
    techniques = TECHNIQUES if options["techniques"] == "all" else options["techniques"].split(",")
    seeds, limit = range(FIRST_SEED, FIRST_SEED + int(options["seeds"])), float(options.get("limit_s", "inf"))
    for task, technique in itertools.product(options["tasks"].split(","), techniques):
        teacher = TEACHERS.get(task, "none")
        if technique in NEEDS_TEACHER and teacher == "none":
            continue
        words = [*WORDS, *overrides, f"task={task}", f"technique={technique}", f"teacher={teacher}"]
        cfg = compose([*words, "seed=0"])
        done = {line["seed"] for line in lines(out) if (line["model"], line["task"], line["technique"]) == (cfg.model.name, task, technique)}
        missing = [seed for seed in seeds if seed not in done]
        if watch.peek() > limit:
            return
        if not missing or not _claimed(out, f"{cfg.model.name}-{task}-{technique}"):
            continue
        if not shared.stored:
            shared.preload(Path(cfg.paths.models) / cfg.model.name, False)
        about = {"model": cfg.model.name, "task": task, "technique": technique, "train_rows": cfg.train_rows, "source": "measured"}
        for line in _runs(words, missing, shared, limit - watch.peek()):
            with out.open("a") as file:
                file.write(json.dumps(about | line) + "\n")
        print(f"{watch.peek():.0f} s: {cfg.model.name} {task} {technique}", flush=True)


def _claimed(out: Path, name: str) -> bool:
    folder = out.with_suffix(".claims")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / name).touch(exist_ok=False)
        return True
    return False


def _runs(words: Sequence[str], seeds: Sequence[int], shared: Any, left_s: float) -> Iterator[dict[str, Any]]:
    """The lines of a technique's seeds: packed where the technique allows it."""
    from pipeline.core.compose import compose
    from pipeline.engine.parts import Unsupported
    from pipeline.measure.clock import Stopwatch

    try:
        yield from _at_once([compose([*words, f"seed={seed}"]) for seed in seeds], shared)
        return
    except Unsupported as reason:
        print(f"one after another, because {reason}", flush=True)
    watch = Stopwatch()
    for seed in seeds:
        if watch.peek() > left_s:
            return
        try:
            yield {"seed": seed} | _alone([*words, f"seed={seed}"], shared)
        except (UserError, RuntimeError, ValueError) as error:
            yield {"seed": seed, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            return


def _at_once(cells: Sequence[Any], shared: Any) -> list[dict[str, Any]]:
    """Seeds of an adapter, trained at once; each is scored on the test rows after its last step. Raises Unsupported."""
    from pipeline.cell.packing import Packing
    from pipeline.measure.clock import Stopwatch

    packing = Packing(cells, shared)
    packing.parts = dataclasses.replace(packing.parts, splits=("validation", "test"))
    tests: dict[int, dict[str, Any]] = {}
    own = packing.score

    def score(pack: Any, running: list[Any]) -> list[Any]:
        ending = [run for run in running if run.step >= run.job.total]
        asked = [_asks_test(run) for run in ending]
        for run, predictions in zip(ending, packing._predict(pack, asked) if asked else [], strict=True):
            tests[run.job.name.cfg.seed] = _counted(predictions, packing.parts.settings.task)
        return own(pack, running)

    packing.score = score  # type: ignore[method-assign]
    made: list[Any] = []
    watch = Stopwatch(packing.parts.device)
    slots = packing.slots(len(cells))
    pack = packing.open(slots, len(cells))
    jobs = [packing.job(cfg) for cfg in cells]

    def take(free: int) -> list[Any]:
        taken, jobs[:] = jobs[:free], jobs[free:]
        return taken

    try:
        pack.run(take, made.append)
    finally:
        pack.close()
    each = watch.lap() / len(cells)
    return [_line(run.job.name.cfg, run.history, run.job.total, run.diverged_at, tests.get(run.job.name.cfg.seed), each, slots) for run in made]


def _asks_test(run: Any) -> Any:
    """The run with test rows in the place of the validation rows, for `Packing._predict`."""
    member = run.job.name
    rows = dataclasses.replace(member.rows, validation=member.rows.test)
    return SimpleNamespace(slot=run.slot, init=run.init, job=SimpleNamespace(name=dataclasses.replace(member, rows=rows)))


def _counted(predictions: Sequence[dict], task: Any) -> dict[str, Any]:
    from pipeline.scoring import answers

    score, right = answers.score(predictions, task), np.array([bool(p["correct"]) for p in predictions])
    return {"rows": len(right), "right": int(right.sum()), "nll": None if score.nll is None else round(score.nll, 4), "bits": packed(right)}


def _line(cfg: Any, history: Sequence[dict[str, Any]], steps: int, diverged_at: int | None, test: dict[str, Any] | None, seconds: float,
          slots: int) -> dict[str, Any]:
    """A run that diverged answers nothing right."""
    from pipeline.models import rates

    checked = [point for point in history if point.get("validation_metric") is not None]
    curve = [[round(point["step"] / steps, 4), point["validation_metric"], point["validation_nll"]] for point in checked]
    line = {"seed": cfg.seed, "lr": rates.read(cfg).train.learning_rate, "steps": steps, "diverged_at": diverged_at, "seconds": round(seconds, 3),
            "slots": slots, "curve": curve}
    if test is None or len(curve) < CHECKS:
        return line | {"error": f"diverged at step {diverged_at}"}
    return line | {"test": test, "validation": {"right": curve[-1][1], "nll": curve[-1][2]}}


def _alone(words: Sequence[str], shared: Any) -> dict[str, Any]:
    """One seed by itself; what trains nothing has a flat curve."""
    import torch

    from pipeline.core.compose import compose
    from pipeline.measure.clock import Stopwatch
    from pipeline.training.loop import lr_factor, validation_steps
    from pipeline.training.stepping import choose

    watch, cfg = Stopwatch(), compose(words)
    trains = cfg.method.type not in ("untouched", "few_shot")
    made = set_up(words, shared, trains)
    history: list[dict[str, Any]] = []
    run, total = made.run, 0
    if run is not None:
        torch.manual_seed(run.seed)
        stepping, total = choose(run), run.total
        marks = validation_steps(total, CHECKS)
        for step in range(total):
            loss = float(stepping.step(step, lr_factor(step, total, run.settings.schedule, run.settings.warmup_share))[0])
            if not math.isfinite(loss):
                return _line(cfg, history, total, step + 1, None, watch.lap(), 1)
            if step + 1 in marks:
                seen = right_rows(made.scorer, made.inputs.rows.validation)
                history.append({"step": step + 1, "validation_metric": seen["right"] / seen["rows"], "validation_nll": seen["nll"]})
        stepping.close()
    else:
        seen, total = right_rows(made.scorer, made.inputs.rows.validation), CHECKS
        history = [{"step": i + 1, "validation_metric": seen["right"] / seen["rows"], "validation_nll": seen["nll"]} for i in range(CHECKS)]
    return _line(cfg, history, total, None, right_rows(made.scorer, made.inputs.rows.test), watch.lap(), 1)


# one that is drawn


SPREAD, HETEROGENEITY, MOST_ARMS, SEEDS, FLIP = 0.012, 0.5, 36, 16, 0.25
"""Of drawn seeds: the shared spread of a technique's accuracy (1.2 points), the spread of its logarithm between techniques, techniques of a place, seeds,
and the part of an answer's variable that is new with every seed."""


def write_synthetic(path: Path, seed: int) -> None:
    """A cache whose rows and levels are those of experiments/rates/cells.jsonl (a technique at a rate is an arm; one
    real seed each) and whose seeds are drawn."""
    rng = np.random.default_rng(seed)
    places: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in lines(RATES / "cells.jsonl"):
        if "test" in line:
            places[line["model"], line["task"]].append(line)
    made = []
    for (model, task), runs in sorted(places.items()):
        runs = sorted(runs, key=lambda r: -r["validation"]["right"])[:MOST_ARMS]
        right = np.array([unpacked(run["test"]["bits"]) for run in runs]).astype(float)
        made += [json.dumps({"model": model, "task": task, **line}) for line in _drawn(runs, right, rng)]
    write_text(path, "\n".join(made) + "\n")


def _drawn(runs: Sequence[dict[str, Any]], right: np.ndarray, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Seeds of every arm around what its one real seed answered: a latent variable a row whose sign was seen, shifted so that the level is the seed's."""
    from scipy.special import ndtri

    n = right.shape[1]
    common = ndtri(np.clip(right.mean(0), 0.02, 0.98))
    together = 0.008 * rng.standard_normal(SEEDS)
    for run, seen in zip(runs, right, strict=True):
        part = 0.8 * common + np.where(seen == 1, 1.0, -1.0) * np.abs(rng.standard_normal(n)) * 0.8
        spread = SPREAD * float(np.exp(HETEROGENEITY * rng.standard_normal()))
        for number in range(SEEDS):
            level = float(np.clip(seen.mean() + together[number] + spread * rng.standard_normal(), 0.01, 0.99))
            latent = part + np.sqrt(FLIP) * rng.standard_normal(n)
            answers = latent > np.quantile(latent, 1 - level)
            rows = run["validation"]["rows"]
            end = float(rng.binomial(rows, np.clip(run["validation"]["right"] / rows + level - seen.mean(), 0.01, 0.99)) / rows)
            before = [[share, max(0.0, end - 0.1 * (1 - share) ** 1.5 + 0.01 * float(rng.standard_normal())), None] for share in (0.25, 0.5, 0.75)]
            test = {"rows": n, "right": int(answers.sum()), "nll": None, "bits": packed(answers)}
            yield {"technique": f"{run['technique']}@{run['lr']}", "seed": number, "lr": run["lr"], "train_rows": run["train_rows"],
                   "steps": run.get("steps", 0), "seconds": run["seconds"], "slots": 1, "source": "drawn", "curve": [*before, [1.0, end, None]], "test": test}
