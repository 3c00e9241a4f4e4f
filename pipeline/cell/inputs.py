"""What cells read before they train, once for several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core.settings import read as read_settings
from pipeline.models.base import load_stored, load_tokenizer


@dataclass
class Shared:
    """What the cells of one experiment read once, before each goes on in a child process of its own."""

    stored: dict[Path, Any] = field(default_factory=dict)
    tokenizers: dict[Path, Any] = field(default_factory=dict)
    threads: int | None = None
    """Threads for the cell to compute with, where the process before the fork kept to one."""

    def preload(self, folder: Path, trust_remote_code: bool) -> None:
        """Read a base model and its tokenizer on the CPU, and import what every cell imports."""
        self.tokenizers[folder] = load_tokenizer(folder)
        self.stored[folder] = load_stored(folder, trust_remote_code)


def preload(missing: Sequence[DictConfig]) -> Shared:
    """Import and read what the cells share, on one thread and without touching a GPU: forked children start clean."""
    import torch

    shared = Shared(threads=torch.get_num_threads())
    torch.set_num_threads(1)
    for folder, trusted in {Path(c.paths.models) / c.model.name: read_settings(c).model.trust_remote_code for c in missing}.items():
        shared.preload(folder, trusted)
    if torch.version.cuda is None:
        import peft  # noqa: F401  (with a GPU build this would start CUDA, which no child could then use)
    return shared
