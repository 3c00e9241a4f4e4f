"""The checkpoint of a training: one file, or of a sharded one (training/sharded.py) a folder beside where that file would be."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError
from pipeline.measure.memory import out_of_memory


def load_state(path: Path) -> dict[str, Any] | None:
    """What torch.save wrote at `path`; None where nothing is there, or what is there is damaged: that is set aside, with a warning."""
    import torch

    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
        if out_of_memory(error) or isinstance(error, PermissionError):
            raise
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        print(f"warning: {path} is damaged ({type(error).__name__}) and was set aside as {aside.name}; the training begins anew", file=sys.stderr)
        return None
    return state


def shards_of(checkpoint: Path) -> Path:
    """The folder of a checkpoint whose weights lie in parts (train.parallel=fsdp)."""
    return checkpoint.with_suffix(".shards")


def check_kind(checkpoint: Path, sharded: bool) -> None:
    """Raise UserError where the training at hand was begun the other way, in one piece or in parts."""
    other = checkpoint if sharded else shards_of(checkpoint)
    if other.exists():
        way = "train.parallel=none or ddp" if sharded else "train.parallel=fsdp (train.gpus=1 for one GPU)"
        raise UserError(f"{other} is the checkpoint of this cell's training, begun another way; go on with {way}, or delete it to begin anew")
