"""The cache of finished runs that policies are replayed on: technique x seed on a task and a base, with validation curve, the test rows that were right,
seconds.

Library of `python -m benchmarks.race fill | package | synthetic | replay` (benchmarks/race_fill.py makes it). JSON lines, one a run:

    model, task, technique, seed, lr, train_rows, steps, slots (runs at once), source (measured or drawn), fixed (true: every seed answers the same)
    seconds: of the run, of several at once its share, while other processes used the device; setup_s: before the first step of the runs that shared it
    diverged_at: the step at which the loss was not finite, else null      curve: [[share of training, validation metric, nll], ...], the last after the end
    test: rows, right, nll, bits (hexadecimal, a leading 1 and then a bit a row, 1 where it was answered right)
    error: in the place of all that, why a technique does not go with the base
"""

from __future__ import annotations

import json
import lzma
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rates import FOLDER as RATES
from benchmarks.rates import lines
from pipeline.core.files import UserError, atomic_path, write_text

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
    for line in read(path):
        if "error" not in line and line.get("diverged_at") is None:
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


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a cache, compressed where its name ends in .xz; a line that was cut off is left out."""
    if path.suffix != ".xz":
        return lines(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; make it with python -m benchmarks.race package")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, made: Sequence[dict[str, Any]]) -> None:
    """Write a cache atomically, compressed where its name ends in .xz."""
    text = "".join(json.dumps(line) + "\n" for line in made)
    with atomic_path(path) as beside:
        beside.write_bytes(lzma.compress(text.encode(), preset=9) if path.suffix == ".xz" else text.encode())


def unpacked(bits: str) -> np.ndarray:
    """[n] of 0 and 1 from the hexadecimal form."""
    return np.array([int(bit) for bit in f"{int(bits, 16):b}"[1:]], dtype=np.uint8)


def packed(right: np.ndarray) -> str:
    """The hexadecimal form of [n]."""
    return f"{int('1' + ''.join(map(str, right.astype(int))), 2):x}"


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
