"""One LoRA trial of the sweep benchmark as a process of its own: imports, base, adapter, training, validation.

    python -m benchmarks.speed_process '<workload as JSON>' <cpu or cuda>
"""

from __future__ import annotations

import json
import sys


def main(words: list[str]) -> None:
    """Run the first trial and print its validation loss."""
    import torch

    from benchmarks.speed_sweep import one_after_another
    from benchmarks.speed_workloads import Workload

    print(one_after_another(Workload(**json.loads(words[0])), 1, torch.device(words[1])).found[0].validation)


if __name__ == "__main__":
    main(sys.argv[1:])
