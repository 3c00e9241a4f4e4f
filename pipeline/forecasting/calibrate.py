"""One short run that measures this machine's throughput for a cell's technique and shape: `python -m pipeline.forecast forecast.calibrate=true`.

Library. Steps are those of a training (pipeline/training/stepping.py), on random weights with few layers; speed.py makes a time of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import DictConfig

from pipeline.core.compose import build
from pipeline.core.files import UserError
from pipeline.core.settings import Train, read
from pipeline.data.rows import Encoded
from pipeline.forecasting.plan import MicroBatch, Plan
from pipeline.forecasting.random_model import config_of, random_base
from pipeline.forecasting.speed import Point
from pipeline.measure.clock import Stopwatch

WARM, TIMED, MOST_S = 2, 8, 20.0
"""Steps before and while timing, and seconds after which a size has been timed enough."""


def calibrate(cfg: DictConfig, plan: Plan) -> list[Point]:
    """Time steps of the plan's technique with few layers at the plan's largest micro-batch and a quarter of its rows.

    Raises:
        UserError: the technique cannot be set up on random weights.
    """
    from pipeline.models.base import device_of, resolve

    settings, device = read(cfg), device_of("cuda" if plan.gpu else "cpu")
    _, dtype = resolve(settings.precision, device)
    least = max(1, plan.shape.layers - plan.trained.first if plan.trained.first else 1)
    largest = max((m for step in plan.steps for m in step), key=lambda m: m.rows * m.width)
    sizes = _sizes(largest)
    found = []
    for layers in (least, least + 2):
        shape = dataclasses.replace(plan.shape, layers=layers)
        for rows in sizes:
            base = random_base(config_of(shape), plan.precision, dtype, device)
            times = _time(cfg, base, rows, settings.train, device, dtype)
            found.append(Point(layers, sum(len(e.ids) - 1 for e in rows), tuple(times)))
            del base
    return found


def _sizes(micro: MicroBatch) -> list[list[Encoded]]:
    """Rows of the micro-batch's own size, and fewer of them."""
    width = min(micro.width, micro.longest or micro.width)
    rows = max(1, micro.rows * micro.width // width)
    labels = min(width, max(1, micro.labels // rows))
    small = max(1, rows // 4)
    narrow = width if small < rows else max(2, width // 4)
    return [[Encoded(tuple(range(3, w + 4)), w + 1 - min(labels, w)) for _ in range(n)] for n, w in ((small, narrow), (rows, width))]


def _time(cfg: DictConfig, base: Any, rows: list[Encoded], train: Train, device: Any, dtype: Any) -> list[float]:
    import torch

    from pipeline.training.stepping import Run, choose

    method, objective = build(cfg.method, "method"), build(cfg.objective, "objective")
    tokens = sum(len(e.ids) + 8 for e in rows)
    settings = dataclasses.replace(train, batch_size=len(rows), micro_batch_tokens=tokens, padding_free="never")
    torch.manual_seed(0)
    try:
        model = method.wrap(base)
        method.before_training(model, WARM + TIMED)
    except (UserError, OSError, ValueError) as error:
        raise UserError(f"{cfg.technique.name} cannot be timed on random weights ({' '.join(str(error).split())}); set forecast.calibrate=false") from error
    stepping = choose(Run(model, method, objective, [[e] for e in rows], settings, 0, WARM + TIMED, device, dtype, 0))
    for step in range(WARM):
        stepping.step(step, 1.0)
    whole, lap, found = Stopwatch(device), Stopwatch(device), []
    for step in range(TIMED):
        stepping.step(step, 1.0)
        found.append(lap.lap())
        if whole.peek() > MOST_S / 4:
            break
    stepping.close()
    return found
