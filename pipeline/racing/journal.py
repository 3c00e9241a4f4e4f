"""What a race has paid and seen, in races/<experiment>/journal.json, written atomically after every step: a race that was killed goes on from it.

Library of `python -m pipeline.race`. Answers stay in the cells' own folders; the journal says which cells were run for the race, what became of them and
what they took. A race started again makes its decisions anew from these entries, which are the same, and runs what has none.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, read_object, write_json
from pipeline.measure.clock import Stopwatch

BEAT_S = 2.0
"""Between notes of how long what runs has run: what a kill can hide of the hours spent, at most."""


@dataclass
class Entry:
    """A seed of a technique that was run for the race. status: ok, collapsed, diverged, oom or failed."""

    technique: str
    unit: int
    again: int
    """How often this seed was begun anew before, because it collapsed."""
    status: str
    seconds: float
    cell: str
    """Its folder."""
    validation: float | None = None
    kind: str = "trained"
    """As results.Result has it."""
    served_bytes: int | None = None
    """Of the model as it is served."""

    @property
    def key(self) -> tuple[str, int, int]:
        return self.technique, self.unit, self.again


@dataclass
class Screened:
    """What screening found for a technique. settings: config key -> value; validation: of the best setting, None where nothing was screened."""

    technique: str
    settings: dict[str, Any]
    validation: float | None
    nll: float | None
    seconds: float
    trials: list[dict[str, Any]] = field(default_factory=list)
    """Settings tried, with validation."""
    reason: str = ""
    """Why nothing was screened."""


class Journal:
    """See above. Raises UserError where the file holds a race with other settings."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.entries: dict[tuple[str, int, int], Entry] = {}
        self.screened: dict[str, Screened] = {}
        self.order: list[str] = []
        """The techniques as screening ranked them, once it has."""
        self.lost: list[dict[str, Any]] = []
        """What was paid and gave nothing: {what, seconds}."""
        self.running: dict[str, Any] | None = None
        self._watch, self._beat = Stopwatch(), Stopwatch()
        if path.exists():
            self._read()

    def _read(self) -> None:
        held = read_object(self.path)
        before = held.get("settings", {})
        for key in dict.fromkeys([*before, *self.settings]):
            if before.get(key) != self.settings.get(key):
                raise UserError(f"{self.path} is of a race with {key}={before.get(key)}, not {self.settings.get(key)}; give the settings that it was begun "
                                f"with, "
                                f"or delete {self.path.parent} to begin another (a race may be given more budget_hours, nothing else)")
        try:
            self.entries = {entry.key: entry for entry in (Entry(**raw) for raw in held["entries"])}
            self.screened = {raw["technique"]: Screened(**raw) for raw in held["screened"]}
            self.order = list(held["order"])
            self.lost, self.running = list(held["lost"]), held["running"]
        except (TypeError, KeyError) as error:
            raise UserError(f"{self.path} is no journal of a race ({error}); delete {self.path.parent} to begin anew") from error
        if self.running is not None:  # killed: what ran has been paid for
            self.lost.append(self.running)
            self.running = None
            self.write()

    def write(self) -> None:
        write_json(self.path, {"settings": self.settings, "order": self.order, "screened": [asdict(one) for one in self.screened.values()],
                               "entries": [asdict(entry) for entry in self.entries.values()], "lost": self.lost, "running": self.running})

    @property
    def spent_s(self) -> float:
        """Device seconds that were paid, whatever they gave."""
        paid = [*(e.seconds for e in self.entries.values()), *(s.seconds for s in self.screened.values()), *(one["seconds"] for one in self.lost)]
        return sum(paid) + (self.running["seconds"] if self.running else 0.0)

    def begin(self, what: str) -> None:
        """Something starts that costs time."""
        self.running = {"what": what, "seconds": 0.0}
        self._watch.lap()
        self._beat.lap()
        self.write()

    def beat(self) -> None:
        """Note how long it has run, every few seconds."""
        if self.running is not None and self._beat.peek() >= BEAT_S:
            self._beat.lap()
            self.running["seconds"] = round(self._watch.peek(), 3)
            self.write()

    def ended(self) -> float:
        """It ended: its seconds, which whoever asked enters."""
        self.running = None
        return round(self._watch.peek(), 3)

    def lose(self, what: str, seconds: float) -> None:
        """Seconds that gave nothing."""
        self.lost.append({"what": what, "seconds": round(seconds, 3)})
        self.write()
