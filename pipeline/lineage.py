"""Which cell is which, and which other cell one begins at or learns from.

Library. `start=<cell>` and `objective.teacher=<cell>` name a finished cell by its folder (results/quick/full-s0-n160), or by its technique
(full): then it is the cell of the same experiment, seed and train_rows.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from pipeline.files import UserError


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
