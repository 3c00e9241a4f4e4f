"""The best of a study as a cell of its own: the only place where a search scores test rows."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from pipeline.cell import child, identity, inputs, locks
from pipeline.cell import grid as cell_grid
from pipeline.cell.launch import INTERRUPTED
from pipeline.measure.clock import now
from pipeline.search.space import at


def sweep_is_shared(cfg: DictConfig) -> bool:
    """Whether other processes may search the same study at the same time, and confirm the same best."""
    return cfg.sweep.get("storage") is not None


def confirm(cfg: DictConfig, best: dict[str, Any], mirror: cell_grid.Mirror) -> int:
    """Run the best setting, or each point of the front, as a cell of the experiment, and mirror it; test rows are scored here only."""
    code, shared = 0, None
    for choice in best["front"] or [best]:
        variant = f"{cfg.variant}-{choice['variant']}" if cfg.variant else choice["variant"]
        chosen = at(cfg, {**choice["settings"], "variant": variant})
        with locks.waited(chosen) if sweep_is_shared(cfg) else locks.alone(chosen):
            if cell_grid.is_done(chosen):
                cell_grid.clear([chosen])
            else:
                shared = shared or inputs.preload([chosen])
                code = max(code, child.run_cell(chosen, shared, now()))
        if code == INTERRUPTED:
            break
        if cell_grid.is_done(chosen):
            print(f"confirmed in {identity.folder_of(chosen)}")
            mirror.put([chosen])
    return code
