"""Finished cells: their names, where they lie, and those of an experiment selected."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.core.compose import GROUPS, MAPPINGS, MARK, SUFFIX, literal
from pipeline.core.files import Damaged, UserError, read_jsonl
from pipeline.core.settings import CUSTOM
from pipeline.records.results import ENGINES, Result
from pipeline.records.results import read as read_result

FROM_FILES = "peft_config"  # python -m pipeline.peft_configs adds such cells to any experiment
COMPARABLE = ("task", "model", "metric")
"""What cells that are ranked together have in common."""
SEEDLESS = ("base", "teacher")
"""Kinds of technique whose answers no seed changes."""
NAME = re.compile(r"(?P<technique>[^+]+?)(\+(?P<variant>.+))?-s(?P<seed>\d+)-n(?P<rows>\d+|all)")


@dataclass(frozen=True)
class Cell:
    """A result, its folder, and the row it belongs to."""

    result: Result
    folder: Path
    label: str
    """Technique, with its variant: lora+best."""
    rows: str
    """The grid's number of training rows: "200" or "all"."""

    @property
    def untrained(self) -> bool:
        return self.result.kind != "trained"

    @property
    def timing(self) -> str:
        """Why its training times are not those of a run by itself; empty if they are."""
        if self.result.packed:
            return "packed"
        declared = (self.result.config.get("ray") or {}).get("gpus")
        part = self.result.hardware.get("device") == "cuda" and declared is not None and declared < 1
        if not self.result.neighbours.turns if self.result.neighbours else part:
            return "shared"
        if self.result.work and self.result.work.parallel:
            return "parallel"
        return "resumed" if self.result.work and self.result.work.resumed else ""

    @property
    def engine(self) -> str:
        """What did the training steps, in words; empty where the eager engine did as it was asked to."""
        work = self.result.work
        if work is None or work.engine is None or (work.engine not in ("captured", "handwritten") and not work.engine_reason):
            return ""
        reason = f", because {work.engine_reason}" if work.engine_reason else ""
        graphs = ", captured in CUDA graphs" if work.engine != "eager" and self.result.hardware.get("device") == "cuda" else ""
        return f"{ENGINES[work.engine]}{reason}{graphs}"

    def predictions(self) -> list[dict[str, Any]]:
        """Those of the test split; empty where they are not kept."""
        path = self.folder / "predictions.jsonl"
        return [r for r in read_jsonl(path) if r["split"] == "test"] if path.exists() else []

    def right(self) -> dict[str, bool]:
        """{row id: answered right} of the test split; empty without predictions."""
        return {r["id"]: bool(r["correct"]) for r in self.predictions()}


def names(grid: dict[str, Any]) -> list[str]:
    """Those of a grid's cells, in the order in which they run."""
    labels = [*grid["techniques"], *(variant_label(one["technique"], one["variant"]) for one in grid.get("variants") or [])]
    axes = itertools.product(grid["train_rows"], labels, grid["seeds"])
    return [f"{label}-s{seed}-n{'all' if rows is None else rows}" for rows, label, seed in axes]


def select(root: Path, grid: dict[str, Any]) -> tuple[list[Cell], list[str]]:
    """The cells below results/<experiment>/ that the grid holds, and the names of those that have no result; of a technique that no seed changes, one is all.

    Cells that were taken out of the grid stay on disk unread. A variant (a sweep's confirm cell) comes with its technique.

    Raises:
        UserError: a result of the grid is broken or of another schema; none is there.
    """
    wanted = names(grid)
    techniques = (*grid["techniques"], *(one["technique"].removesuffix(SUFFIX) for one in grid.get("variants") or []), FROM_FILES)
    cells = cells_below(root, lambda parts: parts[0] in wanted or (parts["variant"] and parts["technique"] in techniques))
    by_name = {cell.folder.name: cell for cell in cells}
    if not by_name:
        raise UserError(f"{root} holds none of the grid's {len(wanted)} cells; run: python -m pipeline.cells experiments={root.name}")
    seedless = {(cell.label, cell.rows) for cell in cells if cell.result.kind in SEEDLESS}
    return list(by_name.values()), [name for name in wanted if name not in by_name and _place(name) not in seedless]


def _place(name: str) -> tuple[str, str]:
    """A cell's label and number of rows, by its name."""
    label, _, rest = name.rpartition("-s")
    return label, rest.partition("-n")[2]


def variant_label(technique: str, variant: str) -> str:
    """A variant of a technique (lora, or lora+tuned) as its cells are named: lora+r8, lora+r8-tuned."""
    plain = technique.removesuffix(SUFFIX)
    return f"{plain}+{variant}" + (f"-{MARK}" if plain != technique else "")


def cells_below(root: Path, wanted: Callable[[re.Match[str]], object] = bool) -> list[Cell]:
    """Finished cells below a folder, in path order; a damaged result is named and left out.

    Args:
        wanted: by a name's parts (technique, variant, seed, rows), whether to read the cell at all.
    """
    cells = []
    for path in sorted(root.rglob("result.json")):
        parts = NAME.fullmatch(path.parent.name)
        if parts and wanted(parts) and (result := read_or_name(path)):
            label = parts["technique"] + (f"+{parts['variant']}" if parts["variant"] else "")
            cells.append(Cell(result, path.parent, label, parts["rows"]))
    return cells


def read_all(root: str | Path) -> list[Result]:
    """Every result below a folder, in path order; a damaged one is named and left out."""
    return [result for p in sorted(Path(root).rglob("result.json")) if (result := read_or_name(p))]


_named: set[Path] = set()


def read_or_name(path: Path) -> Result | None:
    """As results.read, but None where there is no such file, or one that is empty or no JSON, which is named, once, in a warning."""
    if not path.exists():
        return None
    try:
        return read_result(path)
    except Damaged as error:
        if path not in _named:
            _named.add(path)
            print(f"warning: {error}", file=sys.stderr)
        return None


def check_comparable(cells: Iterable[Cell], fix: str) -> None:
    """Raise UserError where cells that are to be ranked together are of several tasks, models or metrics. fix: what to do about it."""
    first: dict[str, Cell] = {}
    for cell in cells:
        for key in COMPARABLE if cell.result.status == "ok" else COMPARABLE[:2]:  # what has no score has no metric either
            one = first.setdefault(key, cell)
            here, there = getattr(one.result, key), getattr(cell.result, key)
            if here != there:
                raise UserError(f"{one.folder} has {key}={here} and {cell.folder} has {key}={there}, which no ranking may mix; {fix}")


def name(cfg: DictConfig, technique: str | None = None) -> str:
    """The cell's name under results/<experiment>/. technique: another one's cell of the same seed and train_rows."""
    variant = f"+{cfg.variant}" if cfg.variant and technique is None else ""
    rows = "all" if cfg.train_rows is None else cfg.train_rows
    return f"{technique or cfg.technique.name}{variant}-s{cfg.seed}-n{rows}"


def cell_at(word: str, cfg: DictConfig) -> Path:
    """The folder of the cell that `word` means for this one; it need not be there."""
    sibling = Path(cfg.paths.results) / cfg.experiment / name(cfg, word)
    return sibling if "/" not in word and not (Path(word) / "result.json").exists() else Path(word)


def needed(word: str, cfg: DictConfig, key: str) -> Path:
    """The same folder, which is there. key: the config's, for the message. Raises UserError where it is not, or is this very cell."""
    folder = cell_at(word, cfg)
    if folder.resolve() == (Path(cfg.paths.results) / cfg.experiment / name(cfg)).resolve():
        raise UserError(f"{key}={word} is this very cell; name another one")
    if not (folder / "result.json").exists():
        command = f"experiments={cfg.experiment} technique={word} seed={cfg.seed} train_rows={'null' if cfg.train_rows is None else cfg.train_rows}"
        first = "run that cell first, or name another one" if "/" in word else f"run it first: python -m pipeline.train {command}"
        raise UserError(f"{key}={word}, but {folder} holds no finished cell; {first}")
    return folder


def finished(folder: str | Path) -> Result:
    """The result of a cell that has an artefact. Raises UserError where it has none."""
    result = read_result(folder)
    if result.status != "ok":
        raise UserError(f"{folder} has status {result.status} and no artefact; choose a cell that finished")
    return result


def cell_config(result: Result, cfg: DictConfig) -> DictConfig:
    """A finished cell's config with this command's paths, device and evaluate settings, and keys that are newer than the cell."""
    newer = {str(key): value for key, value in cfg.items()}
    settings = literal(result.config)
    settings["model"] = {**settings["model"], "trust_remote_code": cfg.model.trust_remote_code}  # who wrote the result does not decide that
    if ":" in str(settings["task"].get("metric")) and settings["task"]["metric"] != cfg.task.get("metric"):  # nor names code that this run imports
        settings["task"] = {**settings["task"], "metric": CUSTOM}
    commands = {key: cfg[key] for key in MAPPINGS - GROUPS if key in newer}  # what no cell has a part in: paths, tune, forecast, …
    return OmegaConf.create({**newer, **settings, **commands, "device": cfg.device, "evaluate": cfg.evaluate})
