"""Run the missing cells of an experiment, one after another; needs neither DVC nor MLflow.

    python -m pipeline.cells experiments=quick                 all missing cells of experiments/quick/params.yaml's grid
    python -m pipeline.cells experiments=quick technique=lora  only those of one technique
    python -m pipeline.cells experiments=quick tuned=true      with the settings that pipeline.tune found, beside the untuned ones
    python -m pipeline.cells experiments=quick pack=true       seeds of an adapter trained at once (pipeline/cells_packed.py)

Imports, base model and tokenizer are read once; every cell then goes on in a forked child, so its memory is its own and
one that runs out of it does not stop the others. A finished cell is passed over (unless its config, data or model
changed, or it ran out of memory on other hardware), a killed one goes on from its checkpoint. `dvc commit` adopts the
result files.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from pipeline import cell, cells_packed, search_space, tracking, tuned
from pipeline.config import ROOT, compose, compose_cell, entry, task_overrides
from pipeline.files import UserError
from pipeline.measure import hardware, now
from pipeline.results import read as read_result
from pipeline.settings import read as read_settings
from pipeline.train import run_cell, warned


def run(cfg: DictConfig) -> int:
    """Run what is missing, in the grid's order."""
    return run_missing(task_overrides())


def run_missing(overrides: Sequence[str]) -> int:
    """Compose every cell of the grid and run the missing ones. Returns 0 if all have a result."""
    return run_cells([compose_cell(o) for o in grid_overrides(overrides)])


def run_cells(cells: Sequence[DictConfig]) -> int:
    """Run those of the cells that have no result. Returns 0 if all have one then."""
    missing = [c for c in cells if not is_done(c)]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells are done")
    if not missing:
        return 0
    warned(*missing)
    shared = preload(missing)
    code = 0
    try:
        cells_packed.train([c for c in missing if c.pack], shared)
        for number, cfg in enumerate(missing, 1):
            print(f"[{number}/{len(missing)}] {cell.name(cfg)}", flush=True)
            code = max(code, run_cell(cfg, shared, now()))
            if code == 130:
                break
    finally:
        for cfg in missing:
            if is_done(cfg):
                tracking.log_cell(cell.folder_of(cfg), cfg)
    return code


def grid(experiment: str) -> dict[str, Any]:
    """experiments/<name>/params.yaml, with `synthetic` and `after` at the end of grid.techniques. Raises UserError where it is missing or lacks a key."""
    path = ROOT / "experiments" / experiment / "params.yaml"
    if not path.exists():
        raise UserError(f"{path.relative_to(ROOT)} does not exist; choose experiments=<name> of a folder under experiments/")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in ("techniques", "seeds", "train_rows"):
        if not (found.get("grid") or {}).get(key):
            raise UserError(f"{path.relative_to(ROOT)} has no grid.{key}; list at least one")
    found["grid"]["techniques"] = [*found["grid"]["techniques"], *(found["grid"].get("synthetic") or []), *(found["grid"].get("after") or [])]
    return found


def grid_overrides(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every cell; technique, seed and train_rows given by hand narrow the grid."""
    given = dict(o.split("=", 1) for o in overrides if "=" in o)
    if "experiments" not in given:
        raise UserError("pipeline.cells needs an experiment; add experiments=<name>, for example experiments=quick")
    axes = grid(given["experiments"])["grid"]
    rest = [o for o in overrides if o.partition("=")[0] not in ("technique", "seed", "train_rows")]
    values = [[given[key]] if key in given else axes[plural] for key, plural in (("technique", "techniques"), ("seed", "seeds"), ("train_rows", "train_rows"))]
    if given.get("tuned", "").lower() == "true":
        values[0] = _searched(dict.fromkeys(t.removesuffix(tuned.SUFFIX) for t in values[0]), rest)
    return [[*rest, f"technique={t}", f"seed={s}", f"train_rows={n}"] for n, t, s in itertools.product(values[2], values[0], values[1])]


def _searched(techniques: Iterable[str], rest: Sequence[str]) -> list[str]:
    """The techniques that have something to search; the others have no tuned cell."""
    found = {t: bool(search_space.declared(compose([*rest, f"technique={t}"])).searched) for t in techniques}
    if without := [t for t, searched in found.items() if not searched]:
        print(f"nothing is searched for {', '.join(without)}: the untuned cell stands")
    return [t for t, searched in found.items() if searched]


def is_done(cfg: DictConfig) -> bool:
    """Whether the cell has a result of this config, data and model (and, if it ran out of memory, of this hardware and limit)."""
    path = cell.folder_of(cfg) / "result.json"
    if not path.exists():
        return False
    result = read_result(path)
    if result.provenance.get("fingerprint") != cell.fingerprint(cfg):
        return False
    if result.status == "ok":
        return True
    return result.config.get("memory_limit_gb") == cfg.memory_limit_gb and result.hardware == hardware_here(result.hardware.get("device", "cpu"))


def hardware_here(device: str) -> dict[str, Any]:
    """measure.hardware, asked in a child where it is a GPU's: a process that has used one cannot fork cells that use it."""
    if device == "cpu":
        return hardware(device)
    from multiprocessing import get_context

    fork = get_context("fork")
    theirs, ours = fork.Pipe()
    child = fork.Process(target=_tell_hardware, args=(ours, device))
    child.start()
    ours.close()
    try:
        return theirs.recv()
    except EOFError:
        return {}
    finally:
        child.join()


def _tell_hardware(to: Any, device: str) -> None:
    with contextlib.suppress(Exception):  # no such device here
        to.send(hardware(device))


def preload(missing: Sequence[DictConfig]) -> cell.Shared:
    """Import and read what the cells share, on one thread and without touching a GPU: forked children start clean."""
    import torch

    shared = cell.Shared(threads=torch.get_num_threads())
    torch.set_num_threads(1)
    for folder, trusted in {Path(c.paths.models) / c.model.name: read_settings(c).model.trust_remote_code for c in missing}.items():
        shared.preload(folder, trusted)
    if torch.version.cuda is None:
        import peft  # noqa: F401  (with a GPU build this would start CUDA, which no child could then use)
    return shared


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
