"""What pipeline/stats/tiers.py promises, by simulation: how often it separates techniques that are the same, and how often ones that are not.

    python -m benchmarks.tiers benchmarks/results/tiers.json              all settings, about half an hour on one core
    python -m benchmarks.tiers benchmarks/results/tiers.json 100          with 100 experiments a setting instead of 1000
    python -m benchmarks.tiers table benchmarks/results/tiers.json        the tables of docs/statistics.md

An experiment has techniques, seeds and test rows. How hard rows are comes from stored predictions (ROWS); a technique's seed shifts the logit of every
row, so that its accuracy spreads over seeds as the setting says; every run then answers every row at random. Seeds of different techniques are
independent, as if they were disjoint. Every setting draws from a generator of its own, seeded with its place.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core.commands import words_entry
from pipeline.core.files import UserError, read_json, write_json
from pipeline.measure import machine
from pipeline.stats.tiers import FEW, SIGNIFICANT, Technique, correct, pairs_of

ROWS = (499, 254, 154, 127, 152, 156, 228, 430)
"""Test rows of vader_movies_5 that 0, 1, … 7 of seven runs (full and LoRA with three seeds, QLoRA with one; 200 training rows, one NVIDIA H200,
2026-11-23) answered right."""
EXPERIMENTS = 1000
MIXED = "mixed"
"""Spreads of 3 points for the first technique in two, 0.5 for the others."""


@dataclass(frozen=True)
class Setting:
    """techniques, seeds of each, test rows; spread: standard deviation of a technique's accuracy over seeds, points; ahead: points by which the first
    `lead` techniques are better than the others."""

    techniques: int
    seeds: int
    rows: int
    spread: float | str
    ahead: float = 0.0
    lead: int = 1

    def spreads(self) -> list[float]:
        if isinstance(self.spread, str):
            return [3.0 if t < max(1, self.techniques // 2) else 0.5 for t in range(self.techniques)]
        return [self.spread] * self.techniques


def settings() -> list[Setting]:
    """Level (all techniques the same) and power (one ahead by 3 or 5 points)."""
    level = [Setting(t, s, n, spread) for t in (2, 6) for s in (2, 3, 5) for n in (200, 1000, 10_000) for spread in (0.5, 1.0, 2.0, 3.0, MIXED)]
    alone = [Setting(2, 1, n, spread) for n in (200, 1000, 10_000) for spread in (0.5, 1.0, 2.0, 3.0)]
    ahead = [(t, s, n, by) for t in (2, 6) for s in (3, 5) for n in (200, 1000, 10_000) for by in (3.0, 5.0)]
    power = [Setting(t, s, n, spread, by) for t, s, n, by in ahead for spread in (0.5, 1.0, 2.0, 3.0)]
    return [*level, *alone, *power, *many(), Setting(7, 1, 2000, 2.0)]


def many() -> list[Setting]:
    """More techniques than FEW: all the same, or half of them ahead."""
    count = FEW + 2
    sizes = [(s, n) for s in (2, 3) for n in (200, 1000)]
    level = [Setting(count, s, n, spread) for s, n in sizes for spread in (0.5, 1.0, 2.0, 3.0, MIXED)]
    return level + [Setting(count, s, n, spread, by, count // 2) for s, n in sizes for by in (3.0, 5.0) for spread in (0.5, 1.0, 2.0, 3.0)]


def simulate(setting: Setting, experiments: int, seed: int) -> dict[str, Any]:
    """Shares of experiments: `pair`: of pairs separated without a correction; `any`: some pair separated (corrected); `first`: the leading techniques
    separated from the others, mean over these pairs (corrected); `false`: of the pairs separated (corrected), those of equal techniques; `wrong`: some pair
    of equal techniques separated (corrected)."""
    import numpy as np

    rng = np.random.default_rng(seed)
    pairs = any_pair = first = false = wrong = 0.0
    lead, others = setting.lead, setting.techniques - setting.lead
    for ranked in experiments_of(setting, experiments, rng):
        raw = [pair.p for pair in pairs_of(ranked)]
        apart = [p < SIGNIFICANT for p in correct(raw, setting.techniques)]
        across = [told for (a, b), told in zip(itertools.combinations(range(len(ranked)), 2), apart, strict=True) if a < lead <= b]
        pairs += sum(p < SIGNIFICANT for p in raw) / len(raw)
        any_pair += any(apart)
        first += sum(across) / (lead * others)
        mistaken = sum(apart) - (sum(across) if setting.ahead else 0)
        false += mistaken / max(1, sum(apart))
        wrong += mistaken > 0
    shares = {"pair": pairs, "any": any_pair, "first": first, "false": false, "wrong": wrong}
    return {**asdict(setting), "experiments": experiments, **{name: value / experiments for name, value in shares.items()}}


def experiments_of(setting: Setting, count: int, rng: Any) -> Iterator[list[Technique]]:
    """Techniques with their answers."""
    import numpy as np

    runs = len(ROWS) - 1
    share = np.array(ROWS) / sum(ROWS)
    for _ in range(count):
        right = rng.choice(runs + 1, setting.rows, p=share)
        hard = np.clip(rng.beta(right + 0.5, runs - right + 0.5), 1e-4, 1 - 1e-4)
        logit, slope = np.log(hard / (1 - hard)), float((hard * (1 - hard)).mean())  # accuracy moves by slope a unit of the logit
        ranked = []
        for number, spread in enumerate(setting.spreads()):
            moved = rng.normal(0.0, spread / 100 / slope, setting.seeds) + (setting.ahead / 100 / slope if number < setting.lead else 0.0)
            chance = 1 / (1 + np.exp(-(logit + moved[:, None])))
            ranked.append(Technique.of((rng.random(chance.shape) < chance).astype(float)))
        yield ranked


def run(words: Sequence[str]) -> int:
    """Simulate, or print the tables."""
    if words[:1] == ["table"] and len(words) == 2:
        print(tables(read_json(Path(words[1]))))
        return 0
    if not words or len(words) > 2 or not (len(words) == 1 or words[1].isdigit()):
        raise UserError("benchmarks.tiers takes a file to write and a number of experiments, or: table <file>")
    count = int(words[1]) if len(words) == 2 else EXPERIMENTS
    lines = []
    for number, setting in enumerate(settings()):
        lines.append(simulate(setting, count, number))
        print(lines[-1], flush=True)
    about = {"date": datetime.now(UTC).date().isoformat(), "hardware": machine.hardware("cpu")["cpu"], "command": "python -m benchmarks.tiers"}
    write_json(Path(words[0]), {**about, "experiments": count, "settings": lines})
    return 0


def tables(found: dict[str, Any]) -> str:
    """Markdown: the level, one seed alone, the power; and of many techniques the level, false differences and the power."""
    every = [s for s in found["settings"] if s["techniques"] <= FEW]
    crowd = [s for s in found["settings"] if s["techniques"] > FEW]
    level = [s for s in every if not s["ahead"] and s["seeds"] > 1]
    parts = [_table(level, ("techniques", "seeds", "rows"), "spread", "any", "separated, %")]
    parts.append(_table([s for s in every if s["seeds"] == 1], ("techniques", "seeds", "rows"), "spread", "any", "separated, %"))
    parts.append(_table([s for s in every if s["ahead"]], ("techniques", "seeds", "rows", "ahead"), "spread", "first", "told apart, %"))
    keys = ("techniques", "seeds", "rows")
    parts.append(_table([s for s in crowd if not s["ahead"]], keys, "spread", "any", "separated, %"))
    for value, what in (("false", "false among those told apart, %"), ("wrong", "experiments with any false one, %"), ("first", "told apart, %")):
        parts.append(_table([s for s in crowd if s["ahead"]], (*keys, "ahead"), "spread", value, what))
    return "\n\n".join(parts)


def _table(every: list[dict[str, Any]], keys: tuple[str, ...], across: str, value: str, what: str) -> str:
    columns = list(dict.fromkeys(s[across] for s in every))
    lines = [f"| {' | '.join(keys)} | {' | '.join(f'{c} points' if c != MIXED else c for c in columns)} |", "|" + " --: |" * (len(keys) + len(columns))]
    for key, own in itertools.groupby(every, key=lambda s: tuple(s[k] for k in keys)):
        by = {s[across]: s[value] for s in own}
        lines.append(f"| {' | '.join(f'{k:,g}' for k in key)} | {' | '.join(f'{100 * by[c]:.1f}' if c in by else '' for c in columns)} |")
    return f"{what}\n\n" + "\n".join(lines)


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
