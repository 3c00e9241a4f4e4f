"""A pack's process: it may run out of memory or be refused without an end to who started it.

Library of pipeline/search_trials.py and pipeline/cells_packed.py. The parent never touches the GPU, so it can fork again.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import cell
from pipeline.files import UserError, read_json, write_json
from pipeline.supervise import run_in_child

if TYPE_CHECKING:
    from pipeline.fast.pack import Pack

REFUSED, OUT_OF_MEMORY, INTERRUPTED = 74, 75, 130
"""Exit codes of the child."""


@dataclass(frozen=True)
class Ended:
    """refused: why the runs cannot be packed. out_of_memory: whether memory did not suffice for `slots` at once."""

    slots: int = 1
    refused: str | None = None
    out_of_memory: bool = False

    def fewer(self) -> int | None:
        """How many to try at once now; None: single runs are left."""
        return self.slots // 2 or None


def attempt(work: Callable[[Callable[[int], None]], None], shared: cell.Shared, note: Path, memory_limit_gb: float | None) -> Ended:
    """Run `work(tell)` in a child process; it calls tell(slots) once it knows how many run at once.

    Args:
        note: a file for what the child has to say; gone at return.

    Raises:
        UserError: the child ended with an error (shown above it). KeyboardInterrupt: it was ended by a signal.
    """
    note.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    done = run_in_child(lambda: _child(work, shared, note), int(memory_limit_gb * 2**30) if memory_limit_gb else None)
    said = read_json(note) if note.exists() else {}
    note.unlink(missing_ok=True)
    if done.code == INTERRUPTED:
        raise KeyboardInterrupt
    if done.out_of_memory or done.code == OUT_OF_MEMORY:
        return Ended(said.get("slots", 1), out_of_memory=True)
    if done.code not in (0, REFUSED):
        raise UserError(f"the packed runs ended with code {done.code} (see above); mend the cause and run again")
    return Ended(said.get("slots", 1), said.get("refused"))


def _child(work: Callable[[Callable[[int], None]], None], shared: cell.Shared, note: Path) -> int:
    import torch

    from pipeline.fast.bind import Unsupported

    if shared.threads:
        torch.set_num_threads(shared.threads)
    try:
        work(lambda slots: write_json(note, {"slots": slots}))
    except Unsupported as reason:
        write_json(note, {"refused": str(reason)})
        return REFUSED
    except (MemoryError, RuntimeError) as error:
        if not cell.out_of_memory(error):
            raise
        return OUT_OF_MEMORY
    return 0


@contextlib.contextmanager
def signals(pack: Pack) -> Iterator[None]:
    """SIGTERM and SIGINT end the pack after the step at hand."""

    def stop(*_: Any) -> None:
        pack.stopped = True

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
