"""Check that a model, a task and a technique go together before time is spent on them.

    python -m pipeline.check model=qwen2_0_5b task=cqa technique=lora      one technique
    python -m pipeline.check experiments=quick                             every technique of the experiment's grid

A few rows go through the model: is every trained parameter reached, does a row's loss depend on its neighbours, is the text that is trained on the
one that is scored, do labels sit on answers alone, is the tokenizer the model's, does merging keep the answers, which engine will run, are texts
too long. docs/models.md says more. Exit code 2 where a check fails. `pipeline.cells` asks the same before its first cell, once for a technique.
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from pipeline.cell import preflight
from pipeline.cell.grid import compose_cell, grid_overrides
from pipeline.core.commands import entry
from pipeline.core.compose import by_key


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Print what every check finds."""
    cells = [compose_cell(o) for o in grid_overrides(overrides)] if "experiments" in by_key(overrides) else [cfg]
    failed = 0
    for line, ok in preflight.report(cells):
        print(line, flush=True)
        failed += not ok
    return 2 if failed else 0


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
