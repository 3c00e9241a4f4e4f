"""What the seeds of the race's cache say of the techniques: means, spreads, and the differences from LoRA with intervals over seeds.

Library of `python -m benchmarks.race means cells=FILE`, whose tables stand in experiments/race/README.md. A seed draws the training rows, their order and
the initial weights, the same for all techniques, so differences are paired by seed. An interval is Student's over the seeds, on the test rows as they are:
rows beyond them are not in it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.race_cache import World, worlds
from pipeline.core.files import UserError

CONFIDENCE = 0.95


def table(path: Path, model: str, against: str = "") -> str:
    """Markdown of one base: a line a technique, the highest mean over tasks first. Of each task the mean accuracy in % and the standard deviation over seeds;
    with `against` the points above that technique, with the interval. The last column is of the mean over tasks, seed by seed."""
    places = [world for world in worlds(path) if world.model == model]
    names = [name for name in (places[0].names if places else []) if all(name in world.names for world in places)]
    if not names or against and against not in names:
        raise UserError(f"{path} has no runs of {against or 'any technique'} on all tasks with {model}")
    levels = {name: [_levels(world, name) for world in places] for name in names}
    levels = {name: [*some, np.mean(some, axis=0)] for name, some in levels.items()}
    tasks = [world.task for world in places]
    head = [f"technique, {model}", *tasks, f"mean of {len(tasks)}"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --: |" * (len(tasks) + 1)]
    for name in sorted(names, key=lambda name: -levels[name][-1].mean()):
        if name != against:
            cells = [difference(mine, theirs) if against else f"{mine.mean():.1f} ± {mine.std(ddof=1):.1f}"
                     for mine, theirs in zip(levels[name], levels[against or name], strict=True)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _levels(world: World, name: str) -> np.ndarray:
    """[S] the accuracy of each seed, in %."""
    levels: np.ndarray = 100 * world.right[world.names.index(name)].mean(1)
    return levels


def difference(mine: np.ndarray, theirs: np.ndarray) -> str:
    """`+1.2 (0.3 to 2.1)` of [S] and [S], paired."""
    from scipy.stats import t

    apart = mine - theirs
    wide = t.ppf((1 + CONFIDENCE) / 2, len(apart) - 1) * apart.std(ddof=1) / np.sqrt(len(apart))
    return f"{_points(apart.mean())} ({_points(apart.mean() - wide)} to {_points(apart.mean() + wide)})"


def _points(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")
