"""The distance to the limit: floating-point operations and bytes that a step needs, and the device's measured rates.

Library of `python -m benchmarks.speed`. Counts are what the mathematics needs, whatever an implementation does: a multiply and an add are
two operations; forward 2 N a token, gradient of the inputs 2 N, gradient of the weights 2 N for trained ones (N: linear weights).
"""

from __future__ import annotations

from typing import Any

from benchmarks.speed_workloads import SHAPES, VIRTUAL, Workload
from pipeline.forecasting.shape import shape_of

MATMUL, COPY_BYTES = {"cuda": 8192, "cpu": 1024}, {"cuda": 1 << 32, "cpu": 1 << 27}
"""Side of the square matrices, and bytes of the buffer that is copied."""
BITS = {"bf16": 16, "fp32": 32, "nf4": 4.127}
"""Of a stored weight (NF4 with double quantisation: Dettmers et al., 2023, section 3)."""


def linears(shape: str) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's linear maps."""
    known = shape_of({"model_type": "llama", **SHAPES[shape]})
    return [known.linear(name) for name in known.linears]


def attended(shape: str, length: int) -> float:
    """Pairs of tokens of which one attends to the other, in all layers, of a row of `length` tokens."""
    s = SHAPES[shape]
    slides = s.get("layer_types") or [""] * s["num_hidden_layers"]
    windows = [min(length, s["sliding_window"]) if kind == "sliding_attention" else length for kind in slides]
    return sum(window * length - window**2 / 2 for window in windows)


def weights(shape: str) -> int:
    """Linear weights of all layers, embeddings and output layer left out."""
    return SHAPES[shape]["num_hidden_layers"] * sum(a * b for a, b in linears(shape))


def adapter_weights(workload: Workload) -> int:
    """A and B of every linear map; 0 without LoRA."""
    if workload.technique not in ("lora", "qlora"):
        return 0
    return SHAPES[workload.shape]["num_hidden_layers"] * sum(workload.rank * (a + b) for a, b in linears(workload.shape))


def head_weights(shape: str) -> int:
    return SHAPES[shape]["vocab_size"] * SHAPES[shape]["hidden_size"]


def step_flops(workload: Workload) -> int:
    """Operations of one training step.

    Causal attention: two products over half of the T x T square forward (4 · T²/2 · H·e a layer and row; less within a window), four backward.
    The output layer: at the labelled positions, T - 1 a row; its gradients likewise. LoRA's products are counted, the
    lookup of embeddings, norms, dequantisation and the optimiser are not.
    """
    length = workload.length + (VIRTUAL if workload.technique == "prompt_tuning" else 0)
    per_weight = 6 if workload.trains_base else 4
    linear = workload.batch * length * (per_weight * weights(workload.shape) + 6 * adapter_weights(workload))
    head = workload.batch * (workload.length - 1) * per_weight * head_weights(workload.shape)
    known = shape_of({"model_type": "llama", **SHAPES[workload.shape]})
    return linear + head + round(3 * 4 * workload.batch * attended(workload.shape, length) * known.heads * known.head)


def step_bytes(workload: Workload) -> int:
    """Bytes that one training step must move if activations stayed on the chip.

    All weights are read forward and backward as they are stored; of trained ones the gradient (in the arithmetic's dtype) is written
    and read, master and two moments in fp32 are read and written, the arithmetic's copy is written.
    """
    base, head, size = weights(workload.shape), head_weights(workload.shape), BITS[workload.dtype] / 8
    stored = BITS["nf4"] / 8 if workload.technique == "qlora" else size
    adapters = adapter_weights(workload)
    trained = base + head if workload.trains_base else adapters
    if workload.technique == "prompt_tuning":
        trained = VIRTUAL * SHAPES[workload.shape]["hidden_size"]
    return round(2 * (base * stored + (head + adapters) * size) + trained * (2 * size + 24 + size))


def answer_flops(shape: str, tokens: int, reads: int) -> int:
    """Forward operations over `tokens` positions, the output layer at `reads` of them; attention left out (short rows)."""
    return 2 * (tokens * weights(shape) + reads * head_weights(shape))


def rates(device: Any, dtype: Any) -> dict[str, float]:
    """Measured on the device: matmul_flops_per_s of a square product in `dtype`, copy_bytes_per_s (bytes read and written)."""
    import torch

    n, size = MATMUL[device.type], COPY_BYTES[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = _best(lambda: torch.mm(a, b), device)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source), device)
    return {"matmul_flops_per_s": 2 * n**3 / product, "copy_bytes_per_s": 2 * size / copied}


def _best(call: Any, device: Any, inner: int = 10, outer: int = 3) -> float:
    """Seconds of a call: the best of `outer` means over `inner`."""
    from pipeline.measure.clock import Stopwatch

    call()
    times = []
    for _ in range(outer):
        watch = Stopwatch(device)
        watch.lap()
        for _ in range(inner):
            call()
        times.append(watch.lap() / inner)
    return min(times)


def distance(flops: int, moved: int | None, seconds: float, rate: dict[str, float]) -> dict[str, float | None]:
    """Achieved operations and bytes a second, and their share of the measured rates."""
    return {
        "flops": flops, "flops_per_s": flops / seconds, "matmul_share": flops / seconds / rate["matmul_flops_per_s"],
        "bytes": moved, "copy_share": None if moved is None else moved / seconds / rate["copy_bytes_per_s"],
    }
