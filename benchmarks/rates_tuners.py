"""Default rates of PEFT's further tuners, from small grids: five rates each on one task (experiments/tuners/README.md).

Library of `python -m benchmarks.rates run … techniques=tuners` and `python -m benchmarks.rates defaults out=…`. How a rate depends on the base is not
fitted here, which two bases cannot tell: a technique keeps the lr_power that conf/technique/ gives it, by what it trains (experiments/rates). Its rate is
the lowest whose mean regret over the pairs of model and task that were run (benchmarks/rates_fit.py) is the least, but for noise.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.rates_fit import RMS, Grids, grids, regrets
from pipeline.core.files import write_text

RATES = 5
NOISE = 1.0
"""Points of mean regret, less than one seed can tell, within which the lowest rate is taken: the base forgets less by it. The rates of least regret cost up to
20,000 times the base's perplexity on other text (experiments/tuners, 2026-12-01)."""
MIDDLE = {
    "adamss": 1e-2, "adaption_prompt": 1e-2, "alora": 1e-3, "bdlora": 1e-3, "beft": 3e-2, "c3a": 3e-1, "cartridge": 1e-2, "corda": 3e-4, "cpt": 1e-2,
    "deft": 1e-3, "delora": 1e-3, "eva": 1e-3, "fourierft": 3e-2, "frod": 3e-3, "glora": 1e-3, "gralora": 3e-3, "hira": 1e-2, "hra": 3e-3, "kasa": 1e-3,
    "lily": 3e-3, "lora_fa": 1e-3, "lora_ga": 3e-4, "lora_riemannian": 1e-3, "mica": 1e-3, "miss": 3e-4, "monteclora": 1e-3, "osf": 1e-4, "peanut": 1e-3,
    "poly": 1e-2, "psoft": 1e-3, "pvera": 3e-2, "randlora": 1e-3, "road": 1e-2, "shadow": 1e-3, "shira": 1e-3, "supertuning": 3e-3, "tinylora": 1e-2,
    "trainable_tokens": 1e-2, "unilora": 3e-2, "vblora": 3e-3, "velora": 1e-3, "waveft": 1e-3,
}
"""The middle of each one's five rates on SmolLM2-135M; on another base it moves with the size of the weights by the technique's lr_power."""
TECHNIQUES = Path("conf/technique")
COMMENT = "# Fitted on {runs} runs of {models} on {tasks} ({device}, experiments/tuners/README.md): one of five rates or more, half a decade apart, one seed."
TRAIN = re.compile(r"\n(#[^\n]*\n)+train: \{(lr: [^,}]+|reference_lr: [^,}]+, lr_power: [^,}]+)")


@dataclass(frozen=True)
class Choice:
    """Of a technique: the rate for SmolLM2-135M, the power of the base's size, the mean regret in points of accuracy, and the runs it rests on."""

    technique: str
    rate: float
    power: float
    regret: float
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    runs: int


def power_of(technique: str) -> float:
    """Of the base's size, as conf/technique/ has it."""
    return float(yaml.safe_load((TECHNIQUES / f"{technique}.yaml").read_text())["train"].get("lr_power", 0.0))


def chosen(rows: Sequence[dict[str, Any]]) -> list[Choice]:
    """A choice for every technique with a complete grid, by name."""
    data = grids(rows, RATES)
    return [_choice(data, technique) for technique in sorted(data.by) if technique in MIDDLE and data.by[technique]]


def _choice(data: Grids, technique: str) -> Choice:
    pairs, power = {*data.by[technique]}, power_of(technique)
    costs = regrets(data, technique, power, RMS, pairs)
    rate, regret = next((rate, cost) for rate, cost in costs.items() if cost <= min(costs.values()) + NOISE)
    tried = [lr / (RMS[model] / RMS["smollm2_135m"]) ** power for model, task in pairs for lr in data.by[technique][model, task]]
    rate = min(max(rate, min(tried)), max(tried))  # where all rates are equally good, one that was run
    runs = sum(len(grid) for grid in data.by[technique].values())
    return Choice(technique, rate, power, regret, tuple(sorted({m for m, _ in pairs})), tuple(sorted({t for _, t in pairs})), runs)


def write(out: Path, rows: Sequence[dict[str, Any]], techniques: Path = TECHNIQUES) -> list[Choice]:
    """Put the choices into conf/technique/, in the place of rates that were not tuned, and a table of them beside `out`."""
    device = ", ".join(sorted({row["device"] for row in rows}))
    data, choices = grids(rows, RATES), chosen(rows)
    for one in choices:
        path = techniques / f"{one.technique}.yaml"
        value = f"reference_lr: {one.rate:.1e}, lr_power: {one.power:g}" if one.power else f"lr: {one.rate:.1e}"
        comment = COMMENT.format(runs=one.runs, models=" and ".join(one.models), tasks=" and ".join(one.tasks), device=device)
        write_text(path, TRAIN.sub(lambda _, value=value, comment=comment: f"\n{comment}\ntrain: {{{value}", path.read_text()))  # type: ignore[misc]
    write_text(out.with_suffix(".md"), table(data, choices))
    return choices


def table(data: Grids, choices: Sequence[Choice]) -> str:
    """A row a grid: accuracy in % by rate, the chosen one's nearest in bold, beside the untouched base."""
    lines = ["| technique | rate for SmolLM2-135M | power | model | task | untouched | accuracy in % at each rate |", "| --- " * 7 + "|"]
    for one in choices:
        for (model, task), grid in sorted(data.by[one.technique].items()):
            nearest = data.nearest(one.technique, (model, task), one.rate * (RMS[model] / RMS["smollm2_135m"]) ** one.power)
            marks = {rate: "**" if outcome is nearest else "" for rate, outcome in grid.items()}
            cells = ", ".join(f"{rate:.0e}: {marks[rate]}{outcome[0]:.1f}{marks[rate]}" for rate, outcome in sorted(grid.items()))
            untouched = data.untrained.get((model, task))
            lines.append(f"| {one.technique} | {one.rate:.1e} | {one.power:g} | {model} | {task} | {f'{untouched[0]:.1f}' if untouched else '—'} | {cells} |")
    mean = f"{statistics.mean(one.regret for one in choices):.1f}" if choices else "—"
    return "\n".join([*lines, "", f"Mean regret of the chosen rates: {mean} points below the best of five or more, which is high by luck.", ""])
