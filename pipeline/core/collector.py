"""Python's collector of cycles, kept from what imports make.

Library. torch, transformers and PEFT make two million objects that stay. Looking through them again and again took a fifth of the time of their
imports, half of a tokenizer's and nine tenths of a data set's afterwards; of a tokenizer's then still a quarter.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Within, nothing is collected; afterwards what is there by then is left out of collections. For imports: a cycle that is let go is never freed.

    Not around a fork: the child would go on without collections.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


@contextlib.contextmanager
def collected_once() -> Iterator[None]:
    """Within, nothing is collected; at the end cycles that were let go are freed, in one pass. For work that makes many objects which stay and few others.

    Nothing is left out of later collections: a model that is let go in this process is still freed.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
            gc.collect()
