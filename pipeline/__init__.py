"""alignscope: compares ways to align a language model with a task. README.md says how to run it."""

import os

__version__ = "0.1.0"

# Threads of torch that wait for each other soon sleep: where other programs need the cores, one that spins (GNU's OpenMP: 300,000 turns) takes the time of
# the one that it waits for. One that sleeps at once makes a step on two quiet cores a sixth slower; this many turns do not.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
