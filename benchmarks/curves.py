"""Do the intervals of pipeline/stats/learning_curve.py hold the truth? Simulated experiments with known curves.

    python -m benchmarks.curves benchmarks/results/curves.json [experiments a setting]        all settings; 1,000 each take about 20 minutes on a core
    python -m benchmarks.curves out.json 200 usual "two seeds"                                 some of them

An experiment has four techniques, six sizes, seeds and test rows that all cells share: a slow and a steep power law that cross, a
constant and a twin of the slow one. Every cell's accuracy is off by a seed's error; every test row is right with a chance that depends on
its own difficulty, common to all cells. Writes one object a setting, shares of the experiments: `band` and `band_worst` (the 95% band holds
the true accuracy: over the sizes, and at the worst of them), `beyond` (at twice the largest size), `rows_for` and `crossover` (the interval
holds the true number; one that tells nothing holds it), `told` (of the two pairs' crossovers, told as such), `twins` (anything is told
of equal curves), `misfit` (a curve is said not to fit).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.measure import machine
from pipeline.stats.learning_curve import Crossover, Curve, Measured, RowsFor, crossover, fit

SIZES = (19, 48, 120, 300, 720, 1800)
BETWEEN = (19, 30, 48, 76, 120, 190, 300, 465, 720, 1140, 1800)
SLOW, STEEP = (0.62, 0.75, 0.35), (0.66, 2.2, 0.55)
SHARED = 0.6
"""Share of a row's latent chance of a right answer that all cells have in common."""
TARGET = 0.5
FAILURE = 0.08


@dataclass(frozen=True)
class Setting:
    """How the experiments of one line are drawn."""

    seeds: int = 3
    sd: float = 0.02
    """Standard deviation over seeds at the smallest size."""
    slope: float = 0.2
    """It falls with n^(-slope)."""
    common: float | None = None
    """Share of the seed's variance common to all sizes; None: nested rows, the correlation of two sizes is that of their rows."""
    test_rows: int = 2000
    predictions: bool = True
    failures: float = 0.0
    """Share of runs that end FAILURE lower."""
    logistic: bool = False
    """The truth is no power law but logistic in the logarithm of the rows."""


SETTINGS = {
    "usual": Setting(),
    "quiet": Setting(sd=0.005),
    "loud": Setting(sd=0.05, slope=0.3),
    "seeds common to all sizes": Setting(common=0.7),
    "two seeds": Setting(seeds=2),
    "ten seeds": Setting(seeds=10),
    "500 test rows": Setting(test_rows=500),
    "without predictions": Setting(predictions=False),
    "a tenth of runs fails": Setting(failures=0.1),
    "no power law": Setting(logistic=True),
    "no power law, quiet": Setting(logistic=True, sd=0.005),
}


def truth(name: str, rows: float, setting: Setting) -> float:
    """The accuracy that a technique gives on average with so many rows."""
    import numpy as np

    if name == "constant":
        return 0.45
    if setting.logistic:
        middle, width = (90, 0.5) if name == "steep" else (60, 0.9)
        return float(0.3 + 0.3 / (1 + np.exp(-np.log(rows / middle) / width)))
    a, b, c = STEEP if name == "steep" else SLOW
    return float(a - b * rows**-c - FAILURE * setting.failures)


NAMES = ("slow", "steep", "constant", "twin")
PAIRS = (("steep", "slow"), ("slow", "constant"))


def experiment(setting: Setting, rng: Any) -> list[Measured]:
    """All cells of one simulated experiment."""
    import numpy as np
    from scipy.special import ndtri

    latent = rng.standard_normal(setting.test_rows)
    n = np.array(SIZES, dtype=float)
    alike = np.minimum.outer(n, n) / np.maximum.outer(n, n) if setting.common is None else setting.common + (1 - setting.common) * np.eye(len(n))
    root, curves = np.linalg.cholesky(alike), []
    for name in NAMES:
        for seed in range(setting.seeds):
            errors = setting.sd * (n / n[0]) ** -setting.slope * (root @ rng.standard_normal(len(n)))
            for rows, error in zip(SIZES, errors, strict=True):
                failed = float(rng.random() < setting.failures) - setting.failures  # on average 0: the truth has it already
                p = truth(name, rows, setting) + error - FAILURE * failed * (name != "constant")
                noise = rng.standard_normal(setting.test_rows)
                right = np.sqrt(SHARED) * latent + np.sqrt(1 - SHARED) * noise < ndtri(np.clip(p, 0.01, 0.99))
                answers = dict(enumerate(right.tolist())) if setting.predictions else None
                curves.append(Measured(name, rows, seed, float(right.mean()), setting.test_rows, answers))  # type: ignore[arg-type]
    return curves


def zero(gap: Any) -> float | None:
    """Where a difference, negative before and positive after, crosses 0 within the sizes; None: nowhere."""
    from scipy.optimize import brentq

    return float(brentq(gap, SIZES[0], SIZES[-1])) if gap(SIZES[0]) < 0 < gap(SIZES[-1]) else None


def holds(answer: Crossover | RowsFor, true: float | None) -> bool:
    """Whether an interval holds the true number (None: beyond the largest size)."""
    if isinstance(answer, Crossover) and answer.verdict == "unclear":
        return True
    if true is None:
        return answer.high is None
    low = answer.low if answer.low is not None else float("inf")
    return (low <= true or low == answer.smallest) and (answer.high is None or true <= answer.high)


def judge(curves: dict[str, Curve], setting: Setting) -> dict[str, Any]:
    """What one experiment's intervals held."""
    judged: dict[str, Any] = {}
    inside = [[(e := curves[name].at(n)).low <= truth(name, n, setting) <= e.high for n in BETWEEN] for name in NAMES]
    judged["by_size"] = inside
    judged["beyond"] = [(e := curves[name].at(2 * SIZES[-1])).low <= truth(name, 2 * SIZES[-1], setting) <= e.high for name in NAMES]
    judged["rows_for"] = [holds(curves[name].rows_for(TARGET), zero(lambda n, t=name: truth(t, n, setting) - TARGET)) for name in ("slow", "steep")]
    crossings = [(crossover(curves[a], curves[b]), zero(lambda n, a=a, b=b: truth(a, n, setting) - truth(b, n, setting)), a) for a, b in PAIRS]
    judged["crossover"] = [one.verdict == "unclear" or (one.ahead == a and holds(one, true)) for one, true, a in crossings]
    judged["told"] = [one.verdict == "crosses" for one, _, _ in crossings]
    judged["twins"] = [crossover(curves["slow"], curves["twin"]).verdict != "unclear"]
    judged["misfit"] = [not curves[name].fits for name in ("slow", "steep")]
    return judged


def simulate(name: str, experiments: int) -> dict[str, Any]:
    """Shares over the experiments of a setting, with its numbers."""
    import numpy as np

    setting, rng = SETTINGS[name], np.random.default_rng(7)
    every = defaultdict(list)
    for number in range(experiments):
        for key, value in judge(fit(experiment(setting, rng), constant={"constant"}, draws=1000, seed=number), setting).items():
            every[key].append(value)
    by_size = np.mean(every.pop("by_size"), axis=0)
    shares = {key: round(float(np.mean(values)), 4) for key, values in every.items()}
    bands = {"band": round(float(by_size.mean()), 4), "band_worst": round(float(by_size.min()), 4)}
    return {"setting": name, "experiments": experiments, **dataclasses.asdict(setting), **bands, **shares}


def main(target: Path, experiments: int = 1000, names: tuple[str, ...] = ()) -> None:
    """Simulate the settings and print them as they are done."""
    about = {"date": machine.provenance()["started"][:10], "hardware": machine.hardware("cpu")["cpu"], "sizes": SIZES, "level": 0.95}
    lines = []
    for name in names or SETTINGS:
        lines.append(simulate(name, experiments))
        print(json.dumps(lines[-1]), flush=True)
        target.write_text(json.dumps({**about, "settings": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000, tuple(sys.argv[3:]))
