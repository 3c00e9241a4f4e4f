"""Which learning rate suits which rank of LoRA: the table of experiments/rank/README.md, of the tuned files in its archive.

    python -m benchmarks.tables          writes it there

Library of benchmarks/tables.py. A tuned file lists every trial, so that the whole grid of ranks and rates is there, on validation rows, one seed.
"""

from __future__ import annotations

import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FILE = re.compile(r"tuning/(rank_\w+)/lora\+r(\d+)-n(\d+)\.yaml")


def table(archive: Path) -> str:
    """Markdown: a line an experiment and rank, accuracies in % by rate, the highest in bold."""
    found: dict[str, dict[int, dict[float, float | None]]] = defaultdict(dict)
    rows: dict[str, tuple[int, int]] = {}
    for experiment, rank, train_rows, tuned in _tuned(archive):
        found[experiment][rank] = {t["settings"]["train.lr"]: t["validation"] for t in tuned["trials"]}
        rows[experiment] = train_rows, max(t["validation_rows"] or 0 for t in tuned["trials"])
    rates = sorted({rate for ranks in found.values() for grid in ranks.values() for rate in grid})
    lines = [f"| experiment (training, validation rows) | r | {' | '.join(f'{rate:.0e}' for rate in rates)} |", "| --- | --: |" + " --: |" * len(rates)]
    for experiment, ranks in sorted(found.items()):
        for rank, grid in sorted(ranks.items()):
            best = max((value for value in grid.values() if value is not None), default=None)
            cells = ["" if (value := grid.get(rate)) is None else f"{'**' * (value == best)}{100 * value:.1f}{'**' * (value == best)}" for rate in rates]
            lines.append(f"| {experiment} ({rows[experiment][0]:,}, {rows[experiment][1]:,}) | {rank} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _tuned(archive: Path) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """(experiment, rank, training rows, tuned file) of each in the archive."""
    with tarfile.open(archive) as held:
        for member in held:
            if (match := FILE.fullmatch(member.name)) and (file := held.extractfile(member)):
                yield match[1], int(match[2]), int(match[3]), yaml.safe_load(file)
