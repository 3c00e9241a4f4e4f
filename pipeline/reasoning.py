"""Answers after the model's own reasoning: what is asked for first, and what the answer then follows.

Library. The reasoning is generated until the model ends it (or the room is used up), a cue is put after it, and the answer is chosen or
generated as without it, so the time that reasoning takes is part of every latency.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.files import UserError


@dataclass(frozen=True)
class Reasoning:
    """max_new_tokens: the longest reasoning; cue: the words between it and the answer."""

    max_new_tokens: int
    cue: str

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"objective.max_new_tokens is {self.max_new_tokens}; the reasoning needs at least 1 token")

    def prefill(self, text: str) -> str:
        """What stands between prompt and answer once the reasoning is known."""
        return f"{text.strip()}{self.cue}".strip()
