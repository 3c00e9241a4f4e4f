"""Write down which cell is which, for DVC: what decides every cell's outcome, and digests of the code that runs.

    python -m pipeline.plan experiments=quick               plans/quick/<cell>.json, a cell each, and plans/quick/code.json
    python -m pipeline.plan                                 plans/code/<command>.json, for the stages that experiments share
    python -m pipeline.plan experiments=quick adopt=true    refuses results that are not of today's config, data, model and code

A cell depends on its own plan and on code.json (pipeline/cell/identity.py says what stands in them): a changed value under conf/ or a changed
method reruns the cells that are made of it, a changed operation in what all cells run reruns all of them, and a comment reruns nothing.
`git diff --no-index` of two code.json names the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from omegaconf import DictConfig

from pipeline.cell import identity
from pipeline.cell.grid import check_params, compose_cells, grid_overrides
from pipeline.core import names
from pipeline.core.commands import entry
from pipeline.core.compose import CONF, ROOT, by_key
from pipeline.core.files import atomic_folder, write_json
from pipeline.records.finished import name as cell_name

STAGES = {"prepare": ("task.source",), "base_model": ("model.source",), "synthesize": ("writer",), "report": ()}
"""Commands of shared stages -> the kinds of classes that they make."""


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Plan the cells of the grid, or the commands that experiments share."""
    if "experiments" not in by_key(overrides):
        return plan_commands(Path(cfg.paths.plans) / "code")
    cells = compose_cells(grid_overrides(overrides))
    check_params(cfg.experiment, cells)
    if cfg.adopt:
        identity.check_adoptable(cells)
    folder = Path(cfg.paths.plans) / cfg.experiment
    with atomic_folder(folder, "*.json", "config", "code") as beside:
        for one in cells:
            write_json(beside / f"{cell_name(one)}.json", identity.plan(one))
        write_json(beside / "code.json", identity.common_code())
    print(f"{folder}: {len(cells)} cells")
    return 0


def plan_commands(folder: Path) -> int:
    """Write what each command's code is; of rationales one a teacher of conf/teacher/."""
    wanted = {stage: [(kind, name) for kind in kinds for name in names.TABLE[kind]] for stage, kinds in STAGES.items()}
    for path in sorted(CONF.glob("teacher/*.yaml")):
        teacher = yaml.safe_load(path.read_text(encoding="utf-8"))
        writers = [("writer", name) for name in names.TABLE["writer"]] if teacher["type"] == "prompted" else []
        wanted[f"rationales-{path.stem}"] = [("teacher", teacher["type"]), *writers]
    with atomic_folder(folder, "prepare.json") as beside:
        for name, classes in wanted.items():
            modules = [f"pipeline.{name.partition('-')[0]}", *(names.TABLE[kind][one].rpartition(".")[0] for kind, one in classes)]
            templates = (ROOT / "pipeline/reporting/templates").iterdir() if name == "report" else ()
            write_json(beside / f"{name}.json", identity.digests([*(p for module in modules for p in identity.closure(module)), *templates]))
    print(f"{folder}: {len(wanted)} commands")
    return 0


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
