"""Peak memory of a training run: the load, what the engine holds, and its steps, on a simulated allocator.

Library of cell.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pipeline.forecasting.allocator import Allocator, Heap, OutOfMemory, Tensor
from pipeline.forecasting.eager import Eager
from pipeline.forecasting.fast import ByHand
from pipeline.forecasting.plan import Constants, Plan
from pipeline.forecasting.shape import LLAMAS, NoForecast, tensors
from pipeline.forecasting.trained import parameter_sizes

KINDS = ("weights", "adapter", "gradients", "optimiser", "activations", "logits", "workspace", "inputs")


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by what holds them. allocator: reserved and not in use (segments' rounding, holes); fixed: of the process."""

    weights: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    workspace: int
    inputs: int
    allocator: int
    fixed: int
    total: int
    """What a result has as memory.peak_bytes: reserved by PyTorch on a GPU, resident on a CPU."""
    loaded: int
    """The same counter after loading, before training."""

    @property
    def parts(self) -> dict[str, int]:
        sizes = dataclasses.asdict(self)
        return {name: sizes[name] for name in (*KINDS, "allocator", "fixed")}


def walk(plan: Plan, constants: Constants, capacity: int | None = None) -> tuple[Allocator, int]:
    """(the allocator after loading and training, what was reserved after loading).

    Raises:
        OutOfMemory: the capacity does not suffice.
    """
    memory = Allocator(capacity) if plan.gpu else Heap()
    parameters = load(plan, memory)
    memory.empty_cache()
    memory.reset_peak()
    loaded = memory.reserved if plan.gpu else memory.allocated
    if plan.engine == "hand":
        hand = ByHand(plan, memory, constants)
        hand.bind(parameters)
        hand.run()
        return memory, loaded
    if plan.engine == "captured":
        _captured(plan, memory, constants, parameters)
        return memory, loaded
    Eager(plan, memory, constants).run()
    return memory, loaded


def load(plan: Plan, memory: Allocator) -> dict[str, Tensor]:
    """The base and the adapter as they stand before the first step, by name."""
    parameters: dict[str, Tensor] = {}
    trained = plan.trained
    mapped = not plan.gpu and plan.shape.stored == plan.base  # the embedding is a part of the file's mapping, which keeps all of it resident
    for number, (name, numbers, size) in enumerate(tensors(plan.shape, plan.precision, plan.double_quantisation, plan.base)):
        whole = memory.new(numbers * plan.base, "weights") if size < numbers * plan.base else None  # before it is quantised
        parameters[name or f"constant {number}"] = memory.new(size, "weights", numbers)
        if mapped and whole is not None:
            parameters[f"file {number}"] = whole
        del whole
    if plan.trained.kind == "full":
        _widen(plan, memory, parameters)
    elif trained.kind != "none":
        for index, numbers in enumerate(parameter_sizes(trained, plan.shape)):
            parameters[f"adapter {index}"] = memory.new(numbers * 4, "adapter")
    return parameters


def _widen(plan: Plan, memory: Allocator, parameters: dict[str, Tensor]) -> None:
    """Trained weights of the base are cast to fp32, one after another."""
    trained = plan.trained
    for name in list(parameters):
        layer, _, what = name.partition(".")
        inside = what and int(layer) >= trained.first
        chosen = bool(inside and ("layers" in trained.parts or ("biases" in trained.parts and what.endswith("bias")))) or name in trained.parts
        if chosen and plan.base != 4:
            parameters[name] = memory.new(parameters[name].numbers * 4, "weights", parameters[name].numbers)
    if trained.added_biases:
        for number in range(trained.first, plan.shape.layers):
            for name in (n for n in plan.shape.linears if n not in plan.shape.biases):
                parameters[f"{number}.{name}.bias"] = memory.new(plan.shape.linear(name)[1] * 4, "weights")
    if trained.own_head:
        parameters["own head"] = memory.new(plan.shape.vocabulary * plan.shape.width * 4, "weights")


def _captured(plan: Plan, memory: Allocator, constants: Constants, parameters: dict[str, Tensor]) -> None:
    """programs.ByAutograd in CUDA graphs: masters, moments and gradients in one buffer each, autograd's tensors in the graphs' pool."""
    size = plan.trained.count
    flat = [memory.new(size * 4, kind) for kind in ("weights" if plan.trained.kind == "full" else "adapter", "optimiser", "optimiser", "gradients")]
    trained = {name for name in parameters if name.startswith("adapter")}
    if plan.trained.kind == "full":
        whole = dict(parameters)
        trained = {name for name in whole if name in plan.trained.parts or ("." in name and "layers" in plan.trained.parts
                                                                            and int(name.partition(".")[0]) >= plan.trained.first)}
        del whole
    for name in trained:
        del parameters[name]
    pool = memory.new_pool()
    micros = sorted({micro for step in plan.steps for micro in step}, key=lambda m: -m.rows * m.width)
    workspaces: list[Tensor] = []
    for micro in micros:
        for captured in (False, True):
            with memory.capture(pool) if captured else memory.side_stream():
                step = Eager(plan, memory, constants, keep_casts=False, own_gradients=False)
                step.workspaces = {"forward": workspaces[-1], "backward": workspaces[-1]} if captured and len(workspaces) > 2 else {}
                step.micro_batch(micro)
                workspaces += step.workspaces.values()
            memory.empty_cache()
    del flat


def forecast(plan: Plan, constants: Constants) -> Memory:
    """The peak of a run.

    Raises:
        NoForecast: what the technique trains has counts alone.
    """
    check(plan)
    memory, loaded = walk(plan, constants)
    live = {name: memory.peak.live.get(name, 0) for name in KINDS}
    reserved = memory.peak.reserved
    scale, fixed = constants.scale.get(plan.engine, 1.0), constants.fixed.get(plan.engine, 0)
    if not plan.gpu:
        fixed = constants.cpu_process
    extra = round((scale - 1.0) * (reserved - loaded)) if plan.gpu else 0
    allocator = reserved - sum(live.values()) + extra
    return Memory(**live, allocator=allocator, fixed=fixed, total=reserved + extra + fixed, loaded=loaded + (fixed if not plan.gpu else 0))


def check(plan: Plan) -> None:
    """Raise NoForecast where the walk does not know what is trained."""
    if plan.trained.kind == "other":
        raise NoForecast(f"no forecast of memory for method {plan.trained.name}")
    if plan.trained.kind == "none":
        raise NoForecast(f"{plan.trained.name} trains nothing")
    if plan.engine != "hand" and plan.shape.family not in LLAMAS:
        raise NoForecast(f"no forecast for {plan.shape.family} but of the hand-written step, which would not run")
    if plan.engine != "hand" and 0 < plan.shape.window < max(micro.longest or micro.width for step in plan.steps for micro in step):
        raise NoForecast("no forecast for sliding-window attention but of the hand-written step, which would not run")


def fits(plan: Plan, constants: Constants, capacity: int, peak: Memory | None = None) -> bool:
    """Whether the run goes through on a card with so many bytes, unused segments given up as PyTorch does.

    capacity: of the whole card. peak: the run's forecast, if it is known.
    """
    if peak is not None and peak.total + (constants.context if plan.gpu else 0) <= capacity:
        return True
    if not plan.gpu:
        return (peak or forecast(plan, constants)).total <= capacity
    scale, fixed = constants.scale.get(plan.engine, 1.0), constants.fixed.get(plan.engine, 0)
    try:
        walk(plan, constants, int((capacity - constants.context - fixed) / scale))
    except OutOfMemory:
        return False
    return True
