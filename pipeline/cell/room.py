"""How many processes may work at once on one machine, and what its device holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.measure import machine


@dataclass(frozen=True)
class AtOnce:
    """How many cells may be under way at once."""

    cells: int = 1
    needs: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the device that a cell will take, by its name, as the forecast says; a cell that is not there has the device alone."""
    room: int | None = None
    """Bytes that they may take together; None: as many cells as `cells` says."""

    @property
    def places(self) -> int:
        """How many processes may work at once, checks among them: three for four CPUs of the machine, where it is known what the device holds."""
        return self.cells if self.room is None else max(self.cells, (machine.cpu_count() or 1) * 3 // 4)

    def holds(self, needs: Sequence[int | None]) -> bool:
        """Whether the device has room for processes that need so many bytes; None: as much as there is."""
        return self.room is None or sum(need if need is not None else self.room for need in needs) <= self.room
