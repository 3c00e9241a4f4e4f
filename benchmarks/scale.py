"""What it costs to hand out cells, and what that makes of 10, 1,000 and 100,000 of them: docs/scale.md.

    python -m benchmarks.scale measure            time each step by itself on this machine -> benchmarks/results/scale.json
    python -m benchmarks.scale check cells=2000   run so many dummy cells on Ray here, beside what the model says -> the same file

A dummy cell is everything but the cell: its config is composed, compared and sent, a worker's host takes its lock, forks, waits `seconds`
and writes a result as a cell's; the command hears of it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from omegaconf import DictConfig


def nothing(cells: list[DictConfig], request: dict[str, Any], kept: Any) -> tuple[int, int]:
    """Work of a worker's: ends with the code that it is asked for, and leaves the id of its process."""
    return request["code"], os.getpid()


def main() -> int:
    return 0


if __name__ == "__main__":
    sys.exit(main())
