"""Rules for learning rates, fitted on half of the pairs of model and task of experiments/rates/cells.jsonl and judged on the other half.

Library of `python -m benchmarks.rates fit`. A rule gives a technique's rate for a base; its accuracy is interpolated (linear in the rate's logarithm)
between the grid's rates beside it. Regret: points of accuracy (validation and test rows together) below the best of the seven rates; the best of
seven is high by luck, so that two equally good rates are often a point or two apart: `without_luck` counts against a best that was chosen on one half of
the rows and asked on the other. The pairs are halved like a chessboard, so that every model and every task is in both halves.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.compose import ROOT

MODELS = ("smollm2_135m", "gemma3_270m", "qwen2_0_5b")
TASKS = ("cqa", "trec", "vader_movies_5", "svamp")
RMS = {"smollm2_135m": 0.188, "gemma3_270m": 0.0389, "qwen2_0_5b": 0.0158}
"""pipeline.models.rates.weight_rms of the folders that ../shared/tools/real_models.py makes."""
WIDTH = {"smollm2_135m": 576.0, "gemma3_270m": 640.0, "qwen2_0_5b": 896.0}
KINDS = {
    "weights": ("full", "step_by_step", "top_layers", "head_only"), "low-rank products": ("lora", "qlora", "dora", "step_by_step_lora"),
    "norms": ("ln_tuning",), "biases": ("bitfit_added",), "factors": ("ia3", "vera"), "inserted modules": ("adapter_houlsby",),
    "soft prompts": ("prompt_tuning",), "prefixes": ("prefix_tuning",),
}
"""What is trained; techniques of a kind have one power."""
BEFORE = {
    "full": 5e-5, "top_layers": 3e-4, "head_only": 1e-2, "bitfit_added": 3e-3, "ln_tuning": 3e-3, "lora": 1e-3, "qlora": 1e-3, "dora": 1e-3, "ia3": 1e-2,
    "vera": 3e-2, "adapter_houlsby": 3e-4, "prompt_tuning": 1e-1, "prefix_tuning": 1e-2, "step_by_step": 5e-5, "step_by_step_lora": 5e-4,
}
"""The defaults before 2026-11-29, one rate for every base."""
POWERS = (-0.5, 0.0, 0.5, 1.0)
PRICE = 0.4
"""Points of mean regret that a power has to win for each unit of it: a rate that does not depend on the base is the simpler rule."""
BASES = [float(f"{digit}e{power}") for power in range(-7, 1) for digit in (1, 2, 3, 5)]
MOST = 20.0
"""Points: a pair that is lost beyond it counts no more in the fit."""
FLAT = 0.25
"""Points of mean regret within which rates are equally good; the middle one is taken."""
WITHIN = 2.0
KEPT = ("prompt_tuning", "lora", "qlora", "dora", "step_by_step_lora")
"""Techniques whose default was not replaced by the fit: either half of the pairs gives prompt tuning another power (1 and 0). Those over LoRA have the rates
that were fitted while Gemma's runs stood on wrong gradients (1.5e-3 and 1e-3, power 0.5); the corrected fit (3e-3, power 1) is 0.25 points better in the mean
on the pairs fitted on and 0.1 on the others, but fewer rows than the grid's 640 want lower rates: at 200 rows LoRA had 47.4% of 800 held-back rows with
1e-3 and 44.0% with 2e-3 (benchmarks/results/pilot.jsonl, vader_movies_5, two seeds)."""
RESAMPLES = 400
LEVEL = 0.05
"""Of tests against the untouched base, two-sided."""

Pair = tuple[str, str]
Rule = Callable[[str, str], float]
"""(technique, model) -> learning rate."""


def halves() -> tuple[set[Pair], set[Pair]]:
    """(model, task) to fit on, and held out."""
    pairs = [(m, t, (i + j) % 2) for i, m in enumerate(MODELS) for j, t in enumerate(TASKS)]
    return {(m, t) for m, t, odd in pairs if not odd}, {(m, t) for m, t, odd in pairs if odd}


@dataclass(frozen=True)
class Grids:
    """by[technique][model, task][rate] = (accuracy in %, which rows were right); untrained[model, task] likewise. Complete grids alone."""

    by: dict[str, dict[Pair, dict[float, tuple[float, str]]]]
    untrained: dict[Pair, tuple[float, str]]

    def nearest(self, technique: str, pair: Pair, rate: float) -> tuple[float, str]:
        """What the grid has at the nearest rate."""
        grid = self.by[technique][pair]
        return grid[min(grid, key=lambda known: abs(math.log(known / rate)))]

    def regret(self, technique: str, pair: Pair, rate: float) -> float:
        """Points below the grid's best."""
        grid = sorted((math.log(known), outcome[0]) for known, outcome in self.by[technique][pair].items())
        wanted = min(max(math.log(rate), grid[0][0]), grid[-1][0])
        below, above = max(g for g in grid if g[0] <= wanted), min(g for g in grid if g[0] >= wanted)
        share = (wanted - below[0]) / (above[0] - below[0]) if above != below else 0.0
        return max(a for _, a in grid) - (below[1] + share * (above[1] - below[1]))


def grids(rows: Sequence[dict[str, Any]], rates: int) -> Grids:
    """From the lines of cells.jsonl, of grids with so many rates or more; a run that diverged answers nothing right. Where a grid was run with several seeds,
    an accuracy is their mean at the rates that all of them have, and which rows were right those of all, one seed's after the other's."""
    answers: dict[tuple[str, Pair], dict[int, dict[float, str]]] = {}
    untrained: dict[Pair, str] = {}
    for row in rows:
        if "error" in row:
            continue
        bits, pair = "".join(f"{int(row[split]['bits'], 16):b}"[1:] for split in ("validation", "test") if split in row), (row["model"], row["task"])
        if row["lr"] is None:
            untrained[pair] = bits
        else:
            answers.setdefault((row["technique"], pair), {}).setdefault(row.get("seed", 0), {})[row["lr"]] = bits
    by: dict[str, dict[Pair, dict[float, tuple[float, str]]]] = {technique: {} for technique, _ in answers}
    for (technique, pair), seeds in answers.items():
        whole = [grid for _, grid in sorted(seeds.items()) if len(grid) >= rates]
        count = max((len(bits) for grid in whole for bits in grid.values()), default=0)
        for lr in set.intersection(*map(set, whole)) if whole else ():
            bits = "".join(grid[lr] or (len(whole) > 1) * count * "0" for grid in whole)
            by[technique].setdefault(pair, {})[lr] = (100 * bits.count("1") / len(bits) if bits else 0.0, bits)
    return Grids(by, {pair: (100 * bits.count("1") / len(bits), bits) for pair, bits in untrained.items()})


def regrets(data: Grids, technique: str, power: float, feature: dict[str, float], pairs: set[Pair]) -> dict[float, float]:
    """Mean regret of the rule over these pairs by its rate for SmolLM2-135M, the lowest rate first."""
    reference = feature[MODELS[0]]
    mine = [pair for pair in data.by[technique] if pair in pairs]
    return {base: statistics.mean(min(MOST, data.regret(technique, p, base * (feature[p[0]] / reference) ** power)) for p in mine) for base in BASES}


def fit(data: Grids, technique: str, power: float, feature: dict[str, float], pairs: set[Pair]) -> tuple[float, float]:
    """(mean regret, the rate for SmolLM2-135M) of the best rule rate · (feature / SmolLM2's)^power over these pairs."""
    costs = regrets(data, technique, power, feature, pairs)
    least = min(costs.values())
    good = [base for base, cost in costs.items() if cost <= least + FLAT]
    return least, good[len(good) // 2]


def rules(data: Grids, feature: dict[str, float], powers: Sequence[float], pairs: set[Pair]) -> dict[str, tuple[float, float]]:
    """By technique: (rate for SmolLM2-135M, power)."""
    chosen: dict[str, tuple[float, float]] = {}
    for techniques in KINDS.values():
        known = [t for t in techniques if any(pair in pairs for pair in data.by.get(t, {}))]
        if known:
            power = min(powers, key=lambda p: statistics.mean(fit(data, t, p, feature, pairs)[0] for t in known) + PRICE * abs(p))
            chosen |= {t: (fit(data, t, power, feature, pairs)[1], power) for t in known}
    return chosen


def as_rule(fitted: dict[str, tuple[float, float]], feature: dict[str, float]) -> Rule:
    return lambda technique, model: fitted[technique][0] * (feature[model] / feature[MODELS[0]]) ** fitted[technique][1]


def cookbook(technique: str, model: str) -> float:
    """tinker-cookbook's hyperparam_utils.get_lr as read on 2026-11-29: 5e-5, ten times that for LoRA, times (2000 / width)^0.781 (Llama) or ^0.0775 (Qwen)."""
    return 5e-5 * (10 if "lora" in technique else 1) * (2000 / WIDTH[model]) ** (0.0775 if "qwen" in model else 0.781)


def judge(data: Grids, rule: Rule, pairs: set[Pair], techniques: Sequence[str]) -> dict[str, Any]:
    """How a rule does over these pairs: cases, how many within WITHIN of the best, how many were it not for luck (best_by_luck), mean and worst
    regret, which are told apart below the untouched base each by itself (`worse`), and of these the ones that still are as one of all cases (Holm)."""
    from pipeline.stats.tiers import holm

    regrets, luck, below, chances = [], [], [], []
    for technique in techniques:
        for pair in data.by[technique]:
            if pair in pairs:
                rate = rule(technique, pair[0])
                regrets.append(data.regret(technique, pair, rate))
                luck.append(best_by_luck(data.by[technique][pair]))
                chances.append(chance_below(data.nearest(technique, pair, rate)[1], data.untrained[pair][1]))
                below.append([technique, *pair])
    without = sum(r - high <= WITHIN + 1e-9 for r, high in zip(regrets, luck, strict=True))
    within = sum(r <= WITHIN + 1e-9 for r in regrets)
    return {"cases": len(regrets), "within": within, "without_luck": without, "mean_regret": round(statistics.mean(regrets), 2),
            "worst_regret": round(max(regrets), 1), "below_untrained": [case for case, chance in zip(below, chances, strict=True) if chance < LEVEL],
            "below_of_all": [case for case, chance in zip(below, holm(chances), strict=True) if chance < LEVEL]}


@functools.cache
def _best_by_luck(answers: tuple[str, ...]) -> float:
    import numpy as np

    rows = max(map(len, answers))
    right = np.array([[int(bit) for bit in bits.rjust(rows, "0")] for bits in answers])
    rng, asked = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        half = rng.random(rows) < 0.5
        asked.append(right[right[:, half].mean(1).argmax(), ~half].mean())
    return float(100 * (right.mean(1).max() - np.mean(asked)))


def best_by_luck(grid: dict[float, tuple[float, str]]) -> float:
    """Points by which a grid's best accuracy is too high, because it is the best on the very rows that it was chosen on: above that of the rate that is best
    on a random half of the rows, asked on the other half (mean over RESAMPLES halves). Luck of the one seed stays in."""
    return _best_by_luck(tuple(bits for _, (_, bits) in sorted(grid.items())))


def worse(one: str, other: str) -> bool:
    """Whether the first's right answers are told apart below the second's."""
    return chance_below(one, other) < LEVEL


def chance_below(one: str, other: str) -> float:
    """The chance, if both were alike, of a difference as large as that by which the first's right answers are fewer than the second's; 1 where they are not.
    Each row's difference is as likely to have had the other sign (McNemar's exact test, two-sided). Of several seeds, one's rows after the other's, a row's
    differences are added up: they answer the same rows."""
    import numpy as np

    if not one:
        return 0.0
    rows = len(other)
    more = [sum(map(int, one[row::rows])) - len(one) // rows * int(other[row]) for row in range(rows)]
    chances = np.ones(1)  # of the sum with signs drawn, from the lowest that it may be, in steps of two
    for size in filter(None, map(abs, more)):
        chances = np.convolve(chances, [0.5, *(size - 1) * [0.0], 0.5])
    lowest = sum(map(abs, more))
    return float(2 * chances[: (lowest + sum(more)) // 2 + 1].sum()) if sum(more) < 0 else 1.0


def defaults(technique: str, model: str) -> float:
    """The rate that conf/technique/ gives as it stands."""
    import yaml

    train = yaml.safe_load((ROOT / "conf" / "technique" / f"{technique}.yaml").read_text(encoding="utf-8"))["train"]
    return train.get("lr") or train["reference_lr"] * (RMS[model] / RMS[MODELS[0]]) ** train.get("lr_power", 0.0)


def ceilings(data: Grids) -> dict[str, Any]:
    """How far any rule could get: cases (all grids); `hindsight`, those within WITHIN where each technique and model has the one rate that is within it on
    most tasks, chosen from these very runs; `same_rate`, the share of cases in which the best rate is within WITHIN of the best when its rows are drawn
    again (bootstrap over rows, one draw for all rates of a grid)."""
    import numpy as np

    rng, cases, hindsight, shares = np.random.default_rng(0), 0, 0, []
    for technique, grids_of in data.by.items():
        for model in MODELS:
            mine = {pair: grid for pair, grid in grids_of.items() if pair[0] == model}
            rates = sorted({rate for grid in mine.values() for rate in grid})
            hindsight += max(sum(data.regret(technique, pair, rate) <= WITHIN + 1e-9 for pair in mine) for rate in rates)
            cases += len(mine)
            for grid in mine.values():
                rows = max(len(bits) for _, bits in grid.values())
                right = np.array([[int(bit) for bit in bits.rjust(rows, "0")] for _, bits in grid.values()])
                drawn = 100 * right[:, rng.integers(0, rows, (RESAMPLES, rows))].mean(2)
                shares.append((drawn.max(0) - drawn[right.mean(1).argmax()] <= WITHIN + 1e-9).mean())
    return {"cases": cases, "hindsight": hindsight, "same_rate": round(float(np.mean(shares)), 3)}


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """rules.json: the rules and how each family of rules did. table.md: the same for people."""
    from benchmarks.rates import RATES, lines

    data, (fitted_on, held_out) = grids(rows, RATES), halves()
    ours = rules(data, RMS, POWERS, fitted_on)
    width, constant = rules(data, WIDTH, (-4, -2, -1, 0), fitted_on), rules(data, RMS, (0,), fitted_on)
    absolute = lines(folder / "prefix_absolute.jsonl")
    before = grids([row for row in rows if row["technique"] != "prefix_tuning"] + absolute, RATES)
    four = [t for t in ("full", "lora", "qlora", "dora") if t in ours]
    named: dict[str, tuple[Grids, Rule, Sequence[str]]] = {
        "size of the weights": (data, as_rule(ours, RMS), list(ours)), "defaults as they stand": (data, defaults, list(ours)),
        "width": (data, as_rule(width, WIDTH), list(width)),
        "one rate for all bases": (data, as_rule(constant, RMS), list(constant)),
        "defaults before": (before, lambda t, _: BEFORE[t], [t for t in ours if before.by.get(t)]),
        "tinker-cookbook": (data, cookbook, four), "size of the weights, the same four": (data, as_rule(ours, RMS), four),
        "the prefix with absolute steps, 1e-2": (before, lambda t, _: BEFORE[t], ["prefix_tuning"]),
        "the prefix with relative steps": (data, defaults, ["prefix_tuning"]),
    }
    summary = {name: {"fitted": judge(of, rule, fitted_on, names), "held_out": judge(of, rule, held_out, names)} for name, (of, rule, names) in named.items()
               if any(of.by.get(name) for name in names)}
    each = {t: {"reference_lr": base, "lr_power": power, "fitted": judge(data, named["size of the weights"][1], fitted_on, [t]),
                "held_out": judge(data, named["size of the weights"][1], held_out, [t])} for t, (base, power) in ours.items()}
    top = ceilings(data)
    (folder / "rules.json").write_text(json.dumps({"runs": len(rows), "rules": each, "summary": summary, "ceilings": top}, indent=1) + "\n")
    said = CEILINGS.format(**top, percent=100 * top["same_rate"])
    (folder / "table.md").write_text(f"{table(each, summary)}\n{said}\n\n{grid_table(data, ours)}{prefixes(data, before)}")


CEILINGS = ("What no rule can pass: with one rate for each technique and base, chosen from these very runs, {hindsight} of {cases} cases are within "
            "2 points of the best; where the rate that was best here is asked again on rows drawn anew, it is within 2 points of the best of seven in "
            "{percent:.0f}%.")


def table(each: dict[str, Any], summary: dict[str, Any]) -> str:
    """Two tables: every family of rules over all techniques, and every technique's rule."""
    def cells(judged: dict[str, Any]) -> str:
        within = f"{judged['within']} of {judged['cases']} | {judged['without_luck']}"
        return f"{within} | {judged['mean_regret']} | {judged['worst_regret']} | {len(judged['below_untrained'])}"

    head = "within 2 points | without luck | mean regret | worst | below the untouched base"
    lines = [f"| rule | fitted: {head} | held out: {head} |", "| --- " * 11 + "|"]
    lines += [f"| {name} | {cells(s['fitted'])} | {cells(s['held_out'])} |" for name, s in summary.items()]
    lines += ["", f"| technique | reference_lr | lr_power | {' | '.join(MODELS)} | held out: {head} |", "| --- " * 11 + "|"]
    for technique, rule in each.items():
        rates = " | ".join(f"{rule['reference_lr'] * (RMS[m] / RMS[MODELS[0]]) ** rule['lr_power']:.1e}" for m in MODELS)
        lines.append(f"| {technique} | {rule['reference_lr']:g} | {rule['lr_power']:g} | {rates} | {cells(rule['held_out'])} |")
    return "\n".join(lines) + "\n"


def prefixes(relative: Grids, absolute: Grids) -> str:
    """A row a pair: with either kind of step of prefix tuning the best accuracy in % of seven rates, and that of the one rate that is, or was, its default."""
    head = " | ".join(f"{kind} steps: best of seven | {rate}" for kind, rate in (("absolute", f"{BEFORE['prefix_tuning']:g}"), ("relative", "the default")))
    lines = ["", f"| prefix tuning | model | task | {head} |", "| --- " * 7 + "|"]
    for model, task in sorted(absolute.by.get("prefix_tuning", {}).keys() & relative.by.get("prefix_tuning", {}).keys()):
        cells = []
        for data, rate in ((absolute, BEFORE["prefix_tuning"]), (relative, defaults("prefix_tuning", model))):
            best = max(accuracy for accuracy, _ in data.by["prefix_tuning"][model, task].values())
            cells += [f"{best:.1f}", f"{data.nearest('prefix_tuning', (model, task), rate)[0]:.1f}"]
        lines.append(f"| {'fitted' if (model, task) in halves()[0] else 'held out'} | {model} | {task} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def grid_table(data: Grids, fitted: dict[str, tuple[float, float]]) -> str:
    """A row a grid: accuracies in % by rate, the rule's in bold, with the untouched base and whether the pair was held out."""
    rule, (fitted_on, _) = as_rule(fitted, RMS), halves()
    lines = ["| technique | model | task | half | untouched | accuracy in % at each rate, lowest first (bold: what the rule gives) |", "| --- " * 6 + "|"]
    for technique in fitted:
        for (model, task), grid in sorted(data.by[technique].items()):
            chosen = data.nearest(technique, (model, task), rule(technique, model))
            marks = {rate: "**" if outcome is chosen else "" for rate, outcome in grid.items()}
            cells = ", ".join(f"{rate:.0e}: {marks[rate]}{outcome[0]:.1f}{marks[rate]}" for rate, outcome in sorted(grid.items()))
            half = "fitted" if (model, task) in fitted_on else "held out"
            lines.append(f"| {technique} | {model} | {task} | {half} | {data.untrained[model, task][0]:.1f} | {cells} |")
    return "\n".join(lines) + "\n"
