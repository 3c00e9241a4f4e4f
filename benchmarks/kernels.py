"""Where a captured step's time goes, kernel by kernel: what a profile says of our side of a speed workload. Needs a CUDA device.

    python -m benchmarks.kernels technique=lora shape=1b batch=8 length=1024 top=40

Prints milliseconds a step, peak memory, the kernels' summed time and the longest of them. Profiling slows the step itself: the first figure is without it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.speed_ours import Ours
from benchmarks.speed_workloads import Workload
from pipeline.core.commands import key_values, words_entry
from pipeline.measure.clock import Stopwatch
from pipeline.measure.memory import PeakMemory
from pipeline.models.base import device_of

DEFAULTS = {"technique": "lora", "shape": "1b", "batch": "8", "length": "1024", "top": "40"}


def run(words: Sequence[str]) -> int:
    """Measure, profile, print."""
    from torch.profiler import ProfilerActivity, profile

    chosen = DEFAULTS | key_values(words, DEFAULTS, "benchmarks.kernels")
    workload = Workload(chosen["technique"], chosen["shape"], int(chosen["batch"]), int(chosen["length"]))
    device = device_of("cuda")
    ours, memory = Ours(workload, device), PeakMemory(device)
    memory.start()
    ours.warm()
    ours.steps(workload.warmup)
    watch = Stopwatch(device)
    ours.steps(workload.steps - 1)
    step_s = watch.lap() / (workload.steps - 1)
    print(f"{workload.name}: {step_s * 1e3:.2f} ms a step, peak {(memory.stop().peak_bytes or 0) / 2**30:.2f} GiB")
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        ours.steps(1)
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    print(f"{sum(row.self_device_time_total for row in rows) / 1e3:.2f} ms in {sum(row.count for row in rows)} kernels")
    for row in rows[: int(chosen["top"])]:
        print(f"{row.self_device_time_total / 1e3:8.3f} ms {row.count:5d}  {row.key[:100]}")
    return 0


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
