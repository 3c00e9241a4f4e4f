"""Training on texts that the model draws itself, step by step: reinforcement learning, and distillation on the student's own texts.

Library. The loop, the way to step, phases, checkpoints and validation are those of every other training; a step's examples are drawn when it comes.
Texts are drawn by captured decoding over the very weights that are trained (engine/decode.py), and a step's draw is a function of weights, seed and
step: a run that was killed resumes with the draws that it would have made.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.data.rows import Encoded, by_length, collate, step_rows
from pipeline.models.base import autocast
from pipeline.objectives.base import Online, Sample
from pipeline.scoring.drawing import Drawing
from pipeline.scoring.scorer import logits_at
from pipeline.training.loop import Loop, Trained
from pipeline.training.stepping import Run

if TYPE_CHECKING:
    import torch

    from pipeline.engine.answering import Forward

WATCHED = 32
"""Steps, evenly spread, at which what costs a pass is looked at."""
APART = 1e-3
"""Nats between a drawn token's log p and the one that training has, from which a note says so."""
SEEN = {"reward": "no sampled answer earned anything, so nothing was learnt; begin at a fine-tuned cell: start=<cell>"}
"""A figure of the curve -> what it means if it is never above 0."""


@dataclass(frozen=True)
class OnlineRun(Run):
    """A run whose steps are drawn; before `rollouts` is ready its examples are as long as they can become."""

    rollouts: Any = None

    def step_examples(self, step: int) -> list[Encoded]:
        return self.rollouts.examples(step) if self.rollouts.ready else super().step_examples(step)


class OnlineLoop(Loop):
    def __init__(self, run: Run, *args: Any) -> None:
        assert run.online is not None
        self.rollouts = Rollouts(run, run.online)
        super().__init__(OnlineRun(**vars(run), rollouts=self.rollouts), *args)

    def train(self) -> Trained:
        try:
            trained = super().train()
        finally:
            self.rollouts.close()
        for key, note in SEEN.items():
            known = [point[key] for point in trained.history if point.get(key) is not None]
            trained.notes.extend([note] if known and max(known) <= 0 else [])
        gap = max((point["sampling_gap"] for point in trained.history if point.get("sampling_gap") is not None), default=0.0)
        if gap > APART:
            trained.notes.append(f"a drawn token's log p was up to {gap:.2g} nats from the one that training has: by other kernels (docs/techniques.md)")
        return trained

    def _ready(self) -> None:
        with self.meter.phase("warmup"):
            self.rollouts.begin(self.notes)

    def _read_losses(self, bar: Any) -> None:
        before = len(self.state.history)
        super()._read_losses(bar)
        for point in self.state.history[before:]:
            point.update(self.rollouts.seen.pop(point["step"], {}))


class Rollouts:
    """Draws a step's texts and has them judged.

    seen: what was seen of a step (from 1), until the loop takes it.
    """

    def __init__(self, run: Run, online: Online) -> None:
        self.run, self.online = run, online
        self.ready = False
        self.seen: dict[int, dict[str, float]] = {}
        self._nats: list[list[float]] = []
        self._at, self._examples = -1, list[Encoded]()
        self.watched = {run.total * i // WATCHED for i in range(WATCHED)} | {run.total - 1}
        self.policy: DrawingPolicy
        self.drawing: Drawing

    def begin(self, notes: list[str]) -> None:
        """Be ready to draw from the model as its steps leave it."""
        run, online = self.run, self.online
        self.policy = DrawingPolicy(run, online)
        lengths = [max(e.start for e in run.step_examples(step)) for step in range(run.total)]
        self.drawing = Drawing(run.model, online.encoder, lengths, run.settings.batch_size * online.samples, online.longest, online.temperature,
                               online.batch_tokens, run.device, run.dtype, self.policy.written, notes)
        self.ready = True

    def examples(self, step: int) -> list[Encoded]:
        """What optimiser step `step` (from 0) trains on, drawn when it is first asked for."""
        if step != self._at:
            samples = self._samples(step)
            self.policy.look(step in self.watched, self._nats)
            self._examples, seen = self.online.judge(samples, self.policy)
            self.seen[step + 1] = seen | self.policy.seen
            self._at = step
        return self._examples

    def _samples(self, step: int) -> list[Sample]:
        run, online = self.run, self.online
        chosen = step_rows(len(run.examples), run.settings.batch_size, run.seed, step)
        rows = [online.rows[r] for r in chosen for _ in range(online.samples)]
        prompts = [list(e.ids[: e.start]) for e in (run.examples[r][0] for r in chosen) for _ in range(online.samples)]
        drawn, self._nats = self.drawing.draw(rows, prompts, run.seed * 1_000_003 + step)
        return [Sample(row, Encoded((*prompt, *ids), len(prompt)), text)
                for row, prompt, ids, text in zip(rows, prompts, drawn, self.drawing.texts(drawn), strict=True)]

    def close(self) -> None:
        """Free what only drawing needs."""
        if self.ready:
            self.drawing.close()
        self.ready = False


class DrawingPolicy:
    """objectives.base.Policy over a run's model.

    written: its hand-written forward pass over the weights in training; None: it has none.
    """

    def __init__(self, run: Run, online: Online) -> None:
        from pipeline.engine.answering import Forward, without_adapters
        from pipeline.engine.bind import bound_to

        self.run, self.online, self.watched = run, online, False
        self.seen: dict[str, float] = {}
        llama = bound_to(run.model, run.dtype)
        self.adapted = hasattr(run.model, "peft_config")
        self.written = Forward(llama) if llama is not None else None
        self._before = Forward(without_adapters(llama)) if llama is not None and self.adapted else None
        self._nats: Sequence[Sequence[float]] = []

    def look(self, watched: bool, nats: Sequence[Sequence[float]]) -> None:
        """Begin a step. nats: log p of its tokens as the decoder drew them."""
        self.watched, self.seen, self._nats = watched, {}, nats

    def log_p(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        values = self._values(samples, self.written)
        if self._nats:
            self.seen["sampling_gap"] = max(abs(a - b) for one, drawn in zip(values, self._nats, strict=True) for a, b in zip(one.tolist(), drawn, strict=True))
        return values

    def reference(self, samples: Sequence[Sample]) -> list[torch.Tensor] | None:
        if not self.adapted:
            return None
        with nullcontext() if self._before else self.run.model.disable_adapter():
            return self._values(samples, self._before)

    def _values(self, samples: Sequence[Sample], written: Forward | None) -> list[torch.Tensor]:
        import torch

        log_p = written.log_p if written and self.online.temperature == 1.0 else functools.partial(self._log_p, written)
        values: dict[Encoded, torch.Tensor] = {}
        run, counts, once = self.run, {"label": 1}, list(dict.fromkeys(s.example for s in samples))
        with torch.no_grad(), autocast(run.device, run.dtype):
            for part in by_length([len(e.ids) for e in once], self.online.batch_tokens):
                mine = [once[i] for i in part]
                batch = collate(mine, counts, run.pad_id).to(run.device)
                nats = log_p(batch.input_ids, batch.rows, batch.cols, batch.targets)
                values |= zip(mine, nats.cpu().split([len(e.ids) - e.start for e in mine]), strict=True)
        return [values[s.example] for s in samples]

    def _log_p(self, written: Forward | None, ids: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """As Forward's, at the temperature of drawing; without a hand-written forward pass by the model's own."""
        import torch.nn.functional as F

        logits = written(ids, rows, cols) if written else logits_at(self.run.model, ids, rows, cols)
        return -F.cross_entropy(logits / self.online.temperature, targets, reduction="none")
