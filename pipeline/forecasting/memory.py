"""Peak memory of a training run: the load, what the engine holds, and its steps, on a simulated allocator."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.forecasting.allocator import Allocator, Heap, OutOfMemory, Tensor
from pipeline.forecasting.eager import Eager
from pipeline.forecasting.fast import ByHand
from pipeline.forecasting.plan import Constants, Plan
from pipeline.forecasting.shape import LLAMAS, NoForecast, tensors
from pipeline.forecasting.sharded import Sharded
from pipeline.forecasting.trained import parameter_sizes

KINDS = ("weights", "adapter", "gradients", "optimiser", "activations", "logits", "workspace", "inputs")


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak."""

    parts: dict[str, int]
    """By what holds them: KINDS, allocator (reserved and not in use: segments' rounding, holes) and fixed (of the process)."""
    total: int
    """What a result has as memory.peak_bytes: reserved by PyTorch on a GPU, resident on a CPU."""
    loaded: int
    """The same counter after loading, before training."""


def walk(plan: Plan, constants: Constants, capacity: int | None = None) -> tuple[Allocator, int]:
    """(the allocator after loading and training, what was reserved after loading). Raises OutOfMemory: the capacity does not suffice."""
    memory = Allocator(capacity) if plan.gpu else Heap()
    parameters = load(plan, memory)
    memory.empty_cache()
    memory.reset_peak()
    loaded = memory.reserved if plan.gpu else memory.allocated
    if plan.engine == "hand":
        hand = ByHand(plan, memory, constants)
        hand.bind(parameters)
        hand.run()
    elif plan.engine == "captured":
        _captured(plan, memory, constants, parameters)
    elif plan.engine == "sharded":
        parted = Sharded(plan, memory, constants)
        parted.shard(parameters)
        parted.run()
    else:
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
    for name in list(parameters):
        of_layers = "." in name and "layers" in plan.trained.parts and int(name.partition(".")[0]) >= plan.trained.first
        if name.startswith("adapter") or name in plan.trained.parts or of_layers:
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
    memory, loaded = walk(plan, constants)
    live = {name: memory.peak.live.get(name, 0) for name in KINDS}
    reserved = memory.peak.reserved
    scale, fixed = constants.of(plan)
    extra = round((scale - 1.0) * (reserved - loaded)) if plan.gpu else 0
    parts = {**live, "allocator": reserved - sum(live.values()) + extra, "fixed": fixed}
    return Memory(parts, reserved + extra + fixed, loaded + (fixed if not plan.gpu else 0))


def check(plan: Plan) -> None:
    """Raise NoForecast where the walk does not know the step."""
    if plan.engine == "hand":
        return
    if plan.shape.family not in LLAMAS:
        raise NoForecast(f"no forecast for {plan.shape.family} but of the hand-written step, which would not run")
    if 0 < plan.shape.window < max(micro.longest or micro.width for step in plan.steps for micro in step):
        raise NoForecast("no forecast for sliding-window attention but of the hand-written step, which would not run")


def fits(plan: Plan, constants: Constants, capacity: int, peak: Memory | None = None) -> bool:
    """Whether the run goes through on a card with so many bytes, unused segments released as PyTorch does.

    capacity: of the whole card. peak: the run's forecast, if it is known.
    """
    if plan.engine == "sharded" and Sharded(plan, Heap(), constants).answering + constants.outside(plan) > capacity:
        return False
    if peak is not None and peak.total + constants.outside(plan) <= capacity:
        return True
    if not plan.gpu:
        return (peak or forecast(plan, constants)).total <= capacity
    scale, fixed = constants.of(plan)
    try:
        walk(plan, constants, int((capacity - constants.outside(plan) - fixed) / scale))
    except OutOfMemory:
        return False
    return True
