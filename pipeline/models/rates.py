"""The learning rate that suits a base: a technique's rate for the reference base, carried over to another by the size of its weights.

Library. An optimiser step of Adam moves every trained number by about the learning rate, whatever the size of the numbers; so the weights
of a base that are ten times smaller are moved ten times as far, relatively. The rule is lr = reference_lr · (rms / REFERENCE)^lr_power, where
rms is the median over the matrices of the blocks of their root mean square. The power depends on what is trained: 1 for the weights themselves,
0.5 for products of two matrices beside them (LoRA), 0 for factors and modules of their own. experiments/rates/README.md has the grid that the
rates and powers were fitted on, and how they did on pairs of task and model that were held out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import statistics
from pathlib import Path

from omegaconf import DictConfig

from pipeline.core import settings
from pipeline.core.files import UserError

REFERENCE = 0.188
"""weight_rms of SmolLM2-135M-Instruct as conf/model/smollm2_135m.yaml has it, for which reference_lr is the rate."""
DIGITS = 2
MATRICES, NUMBERS = 100, 2**16
"""How many matrices are looked at, about, and how many numbers of each: the first rows."""
FLOATING = ("F16", "BF16", "F32", "F64")
BLOCK = re.compile(r"\.\d+\.")
"""In the name of a tensor that a block of the model has."""


def read(cfg: DictConfig) -> settings.Settings:
    """The checked settings of a composed config, with the learning rate as a number.

    Raises:
        UserError: a bad key; or the rate depends on the model, which is not prepared.
    """
    made = settings.read(cfg)
    return dataclasses.replace(made, train=dataclasses.replace(made.train, lr=learning_rate(made.train, folder_of(cfg))))


def read_if_there(cfg: DictConfig) -> settings.Settings:
    """As `read`, but where the model is not there a rate that depends on it stays null."""
    return read(cfg) if (folder_of(cfg) / "config.json").exists() else settings.read(cfg)


def folder_of(cfg: DictConfig) -> Path:
    """The base model's folder."""
    return Path(cfg.paths.models) / cfg.model.name


def learning_rate(train: settings.Train, folder: Path) -> float:
    """train.lr, or where it is null the rate that reference_lr and lr_power give for the base model in a folder, to two digits.

    Raises:
        UserError: no model there, or none whose weights have a size (all are rounded to integers).
    """
    if train.lr is not None:
        return train.lr
    assert train.reference_lr is not None
    if not train.lr_power:
        return train.reference_lr
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not there, on whose weights the learning rate depends; run: python -m pipeline.base_model model={folder.name}, or set train.lr")
    rms = weight_rms(folder)
    if not rms:
        raise UserError(f"{folder} has no matrix of numbers in its blocks, on which the learning rate depends; set train.lr")
    return float(f"{train.reference_lr * (rms / REFERENCE) ** train.lr_power:.{DIGITS - 1}e}")


def weight_rms(folder: Path) -> float | None:
    """The median over the blocks' matrices of the root mean square of their numbers; None where there is no such matrix."""
    files = sorted(folder.glob("*.safetensors"))
    return _weight_rms(tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files))


@functools.cache
def _weight_rms(files: tuple[tuple[str, int, int], ...]) -> float | None:
    from safetensors import safe_open

    sizes = []
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path, _, _ in files]
        names = sorted((name, file) for file, tensors in enumerate(opened) for name in tensors.keys() if BLOCK.search(name))  # noqa: SIM118 (it is no dict)
        parts = [(opened[file].get_slice(name)) for name, file in names]
        matrices = [part for part in parts if len(part.get_shape()) >= 2 and part.get_dtype() in FLOATING]
        for part in matrices[:: max(1, len(matrices) // MATRICES)]:
            shape = part.get_shape()
            rows = max(1, NUMBERS // math.prod(shape[1:]))
            sizes.append(float(part[:rows].double().square().mean().sqrt()))
    return statistics.median(sizes) if sizes else None
