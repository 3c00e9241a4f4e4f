"""What decides the outcome of every cell of an experiment: its composed config, and the code of its method and objective.

    python -m pipeline.plan experiments=quick

Writes plans/<experiment>/<cell>.json. In experiments/<name>/dvc.yaml a cell depends on its own plan, so that a changed value
under conf/ (not a comment) or a changed method reruns the cells that are composed of it, and no others.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.cell.grid import compose_cell, grid, grid_overrides
from pipeline.cell.identity import plan
from pipeline.core.commands import entry, task_overrides
from pipeline.core.files import UserError, atomic_folder, write_json
from pipeline.records.finished import name as cell_name
from pipeline.teachers.synthetic import rows as synthetic


def run(cfg: DictConfig) -> int:
    """Plan the cells of the grid."""
    cells = [compose_cell(overrides) for overrides in grid_overrides(task_overrides())]
    check(cfg.experiment, cells)
    folder = Path(cfg.paths.plans) / cfg.experiment
    with atomic_folder(folder, "*.json", "config", "code") as beside:
        for one in cells:
            write_json(beside / f"{cell_name(one)}.json", plan(one))
    print(f"{folder}: {len(cells)} cells")
    return 0


def check(experiment: str, cells: list[DictConfig]) -> None:
    """Raise UserError where params.yaml, from which DVC knows what a cell reads, names another task, model or teacher."""
    known = grid(experiment)
    for key in ("task", "model", "teacher"):
        composed = {c[key].name for c in cells}
        if composed != {known.get(key)}:
            raise UserError(
                f"experiments/{experiment}/params.yaml has {key}: {known.get(key)}, but its cells compose {', '.join(sorted(composed))}; "
                f"make experiments/{experiment}.yaml and params.yaml agree"
            )
    mixed = {c.synthetic.name for c in cells if synthetic.wanted(c)}
    if not mixed <= {known.get("synthetic")}:
        raise UserError(
            f"experiments/{experiment}/params.yaml has synthetic: {known.get('synthetic')}, but its cells train on {', '.join(sorted(mixed))}; "
            "name that set there, one an experiment"
        )


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
