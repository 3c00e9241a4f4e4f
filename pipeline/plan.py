"""What decides the outcome of every cell of an experiment: its composed config, and the code of its method and objective.

    python -m pipeline.plan experiments=quick

Writes plans/<experiment>/<cell>.json. In experiments/<name>/dvc.yaml a cell depends on its own plan, so that a changed value
under conf/ (not a comment) or a changed method reruns the cells that are composed of it, and no others.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline import cell, names, synthetic
from pipeline.cells import grid, grid_overrides
from pipeline.config import ROOT, compose_cell, entry, task_overrides
from pipeline.files import UserError, atomic_folder, sha256, write_json

PARTS = ("pipeline.blocks", "pipeline.calibration", "pipeline.layers")
"""What methods are made of, and no cell imports by itself."""


def run(cfg: DictConfig) -> int:
    """Plan the cells of the grid."""
    cells = [compose_cell(overrides) for overrides in grid_overrides(task_overrides())]
    check(cfg.experiment, cells)
    folder = Path(cfg.paths.plans) / cfg.experiment
    with atomic_folder(folder, "*.json", "config", "code") as beside:
        for one in cells:
            write_json(beside / f"{cell.name(one)}.json", plan(one))
    print(f"{folder}: {len(cells)} cells")
    return 0


def plan(cfg: DictConfig) -> dict[str, Any]:
    """config: what decides the cell's outcome, resolved; code: sha256 of the files that define its method and objective."""
    config = cell.decides(cfg) | {"memory_limit_gb": cfg.memory_limit_gb}
    modules = {names.TABLE[group][config[group]["type"]].rpartition(".")[0] for group in ("method", "objective")}
    files = sorted(set().union(*(sources(module) for module in modules)))
    return {"config": config, "code": {p.relative_to(ROOT).as_posix(): sha256(p) for p in files}}


def sources(module: str) -> set[Path]:
    """The module's file, and the files of PARTS that it imports, directly or through one of them."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.exists():
        return set()
    found = {path}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                found |= sources(name) if name.startswith(PARTS) else set()
    return found


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
