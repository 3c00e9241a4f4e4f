"""alignscope: compares ways to align a language model with a task. README.md says how to run it."""

import os

__version__ = "0.1.0"

# Threads of torch that wait for each other sleep: where other programs need the cores, one that spins takes the time of the one that it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
