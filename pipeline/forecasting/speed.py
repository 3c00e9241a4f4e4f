"""How long a training takes, from this machine's measured throughput.

Library of cell.py. `python -m pipeline.forecast forecast.calibrate=true` times real steps of the cell's own technique on random weights of
the model's shape with two numbers of layers and two sizes of micro-batch; a step is taken to be linear in both. The times are stored in
<paths.work>/throughput.json under the hardware and the versions of what computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core.compose import build
from pipeline.core.files import UserError, read_json, write_json
from pipeline.core.settings import Precision, Train, read
from pipeline.core.settings import build as build_settings
from pipeline.data.rows import Encoded
from pipeline.forecasting.plan import MicroBatch, Plan
from pipeline.forecasting.shape import Shape
from pipeline.measure.clock import Stopwatch
from pipeline.measure.machine import cpu_count, versions

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
MODEL_ERROR = 0.15
"""Relative error granted to the linear model beside the spread of the measured steps (docs/forecast.md has what it was on finished cells)."""


@dataclass(frozen=True)
class Point:
    """Seconds of optimiser steps (one micro-batch each) of a model with so many layers at so many cells (tokens, padding counted)."""

    layers: int
    cells: int
    seconds: tuple[float, ...]


def file_of(work: str | Path) -> Path:
    return Path(work) / "throughput.json"


def machine(hardware: str) -> str:
    """What a calibration holds for: the device, its threads, and versions."""
    threads = os.environ.get("OMP_NUM_THREADS") or cpu_count()
    return "; ".join([hardware, f"{threads} threads", *(f"{name} {version}" for name, version in versions(PACKAGES).items())])


def work(plan: Plan) -> str:
    """What of a plan decides a step's time, besides layers and cells."""
    shape, trained = plan.shape, plan.trained
    sizes = f"d{shape.width} h{shape.heads}/{shape.groups}x{shape.head} f{shape.inner} v{shape.vocabulary}{'' if shape.tied else ' untied'}"
    sizes = sizes if shape.family == "llama" else f"{shape.family} {sizes}"
    what = [trained.name, f"top {shape.layers - trained.first}" if trained.first else "", " ".join(f"{k}:{r}" for k, r in trained.ranks.items()),
            f"p{trained.dropout}" if trained.dropout else "", f"soft {trained.virtual}" if trained.virtual else ""]
    how = [plan.engine, plan.precision, f"{8 * plan.compute} bits", "checkpointing" if plan.checkpointing else ""]
    return "; ".join(w for w in [sizes, *what, *how] if w)


def known(path: Path, hardware: str, plan: Plan) -> list[Point]:
    """The points measured of this work on this machine; none if there are none."""
    if not path.exists():
        return []
    with contextlib.suppress(UserError, KeyError, TypeError):  # what cannot be read is measured again
        stored = read_json(path)[machine(hardware)][work(plan)]["points"]
        return [Point(p["layers"], p["cells"], tuple(p["seconds"])) for p in stored]
    return []


def keep(path: Path, hardware: str, plan: Plan, points: Sequence[Point], date: str) -> None:
    """Add a calibration to the file; one of the same work is replaced."""
    stored: dict[str, Any] = {}
    if path.exists():
        with contextlib.suppress(UserError):
            stored = read_json(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored.setdefault(machine(hardware), {})[work(plan)] = {"date": date, "points": [dataclasses.asdict(p) for p in points]}
    write_json(path, stored)


def train_seconds(plan: Plan, steps: int, points: Sequence[Point]) -> tuple[float, float, float]:
    """(low, expected, high) seconds of `steps` steps.

    A micro-batch of n cells through L layers takes a + b L + c n + d L n seconds; the four come from the four points.
    """
    whole = sum(seconds(points, plan.shape.layers, cells) * count for cells, count in plan.fed)
    expected = steps * whole / max(1, plan.looked)
    wide = (MODEL_ERROR**2 + max(spread(p.seconds) for p in points) ** 2) ** 0.5
    return expected / (1 + wide), expected, expected * (1 + wide)


def seconds(points: Sequence[Point], layers: int, cells: int) -> float:
    """Of a micro-batch; never less than the fastest that was measured at as many layers or fewer."""
    small, large = sorted({p.cells for p in points})
    low, high = sorted({p.layers for p in points})
    middle = {(p.layers, p.cells): statistics.median(p.seconds) for p in points}

    def at(n: int) -> float:
        each = max(0.0, (middle[high, n] - middle[low, n]) / (high - low))
        return middle[low, n] + each * (layers - low)

    slope = max(0.0, (at(large) - at(small)) / (large - small))
    return max(at(small) + slope * (cells - small), middle[low, small] * min(1.0, cells / small))


def spread(values: Sequence[float]) -> float:
    """Half the range of the middle 80%, over the median."""
    ordered = sorted(values)
    cut = len(ordered) // 10
    inner = ordered[cut : len(ordered) - cut]
    return (inner[-1] - inner[0]) / 2 / statistics.median(ordered)


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
    points = []
    for layers in (least, least + 2):
        shape = dataclasses.replace(plan.shape, layers=layers)
        for rows in sizes:
            base = random_base(config_of(shape), plan.precision, dtype, device)
            times = _timed(cfg, base, rows, settings.train, device, dtype)
            points.append(Point(layers, sum(len(e.ids) - 1 for e in rows), tuple(times)))
            del base
    return points


def _sizes(micro: MicroBatch) -> list[list[Encoded]]:
    """Rows of the micro-batch's own size, and fewer of them."""
    width = min(micro.width, micro.longest or micro.width)
    rows = max(1, micro.rows * micro.width // width)
    labels = min(width, max(1, micro.labels // rows))
    small = max(1, rows // 4)
    narrow = width if small < rows else max(2, width // 4)
    return [[Encoded(tuple(range(3, w + 4)), w + 1 - min(labels, w)) for _ in range(n)] for n, w in ((small, narrow), (rows, width))]


def _timed(cfg: DictConfig, base: Any, rows: list[Encoded], train: Train, device: Any, dtype: Any) -> list[float]:
    import torch

    from pipeline.training.stepping import Run, choose

    method, objective = build(cfg.method, "method"), build(cfg.objective, "objective")
    tokens = sum(len(e.ids) + 8 for e in rows)
    rate = train.lr or train.reference_lr  # a step takes as long at any
    settings = dataclasses.replace(train, lr=rate, batch_size=len(rows), micro_batch_tokens=tokens, padding_free="never")
    torch.manual_seed(0)
    try:
        model = method.wrap(base)
        method.before_training(model, WARM + TIMED)
    except (UserError, OSError, ValueError) as error:
        raise UserError(f"{cfg.technique.name} cannot be timed on random weights ({' '.join(str(error).split())}); set forecast.calibrate=false") from error
    stepping = choose(Run(model, method, objective, [[e] for e in rows], settings, 0, WARM + TIMED, device, dtype, 0))
    for step in range(WARM):
        stepping.step(step, 1.0)
    whole, lap, times = Stopwatch(device), Stopwatch(device), []
    for step in range(TIMED):
        stepping.step(step, 1.0)
        times.append(lap.lap())
        if whole.peek() > MOST_S / 4:
            break
    stepping.close()
    return times


def config_of(shape: Shape) -> dict[str, Any]:
    """The keys of a config.json that make this shape."""
    slides = {"sliding_window": shape.window, "use_sliding_window": True} if shape.window else {"sliding_window": None}
    return {
        "model_type": shape.family, **({} if shape.family == "llama" else slides),
        "hidden_size": shape.width, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.groups,
        "head_dim": shape.head, "intermediate_size": shape.inner, "vocab_size": shape.vocabulary, "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.context or 8192, "attention_bias": bool(shape.biases),
    }


def random_base(config: dict[str, Any], precision: str, dtype: Any, device: Any) -> Any:
    """A frozen model in eval mode.

    Args:
        config: as in a config.json; without a model_type, a Llama's.
        precision: fp32, bf16, int8 or nf4. dtype: of the arithmetic.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**{"model_type": "llama", **config, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, dtype=stored, attn_implementation="sdpa")
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=made)  # its buffers are computed, not loaded
    output = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is torch.nn.Linear and module is not output and precision in ("nf4", "int8"):
                setattr(parent, name, _quantised(module, precision, dtype, device))
            else:
                _draw(module, device)
    model.tie_weights()
    if precision in ("nf4", "int8"):
        _mark(model, precision, dtype)
    return model.requires_grad_(False).eval()


def _draw(module: Any, device: Any) -> None:
    """Give a module's own parameters memory and values: small random ones, ones for norms; and what Gemma multiplies embeddings by."""
    import torch

    if hasattr(module, "scalar_embed_scale"):
        module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)

    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, torch.nn.Parameter(values.normal_(0.0, 0.02) if values.ndim > 1 else values.fill_(1.0)))


def _quantised(module: Any, precision: str, dtype: Any, device: Any) -> Any:
    import bitsandbytes as bnb
    import torch

    weight = torch.empty(module.weight.shape, dtype=module.weight.dtype, device=device).normal_(0.0, 0.02)
    sizes = (module.in_features, module.out_features)
    made: Any
    if precision == "nf4":
        made = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made)
    else:
        made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
        made.weight = bnb.nn.Int8Params(weight.to("cpu"), requires_grad=False, has_fp16_weights=False)
    made = made.to(device)  # quantises
    if hasattr(made, "support_avx512bf16_for_cpu"):
        made.support_avx512bf16_for_cpu = False  # see pipeline/models/base.py
    return made


def _mark(model: Any, precision: str, dtype: Any) -> None:
    """What transformers leaves on a quantised model, and PEFT asks for."""
    from transformers.utils.quantization_config import QuantizationMethod

    from pipeline.models.base import quantisation

    setattr(model, "is_loaded_in_4bit" if precision == "nf4" else "is_loaded_in_8bit", True)
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    model.config.quantization_config = quantisation(precision, build_settings(Precision, {"name": precision}, "precision"), dtype)
