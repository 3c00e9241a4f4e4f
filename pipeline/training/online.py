"""Training on texts that the model draws itself, step by step: reinforcement learning, and distillation on the student's own texts.

Library. The loop, the way to step, phases, checkpoints and validation are those of every other training; a step's examples are drawn when it comes.
Texts are drawn by captured decoding over the very weights that are trained (engine/decode.py), and a step's draw is a function of weights, seed and
step: a run that was killed resumes with the draws that it would have made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.data.rows import Encoded, by_length, collate, pad, step_rows
from pipeline.models.base import autocast
from pipeline.objectives.base import Online, Sample
from pipeline.scoring.scorer import logits_at
from pipeline.training.loop import Loop, Trained
from pipeline.training.stepping import Run

if TYPE_CHECKING:
    import torch

    from pipeline.engine.decode import Decoder, Sampler

WATCHED = 32
"""Steps, evenly spread, at which what costs a pass is looked at."""
MOST_WIDTHS = 3
"""Of prompts, each with decoders of its own."""
GRAIN = 16
"""Widths of prompts are multiples of it."""
SEEN = {"reward": "no sampled answer earned anything, so nothing was learnt; begin at a fine-tuned cell: start=<cell>"}
"""A figure of the curve -> what it means if it is never above 0."""


@dataclass(frozen=True)
class OnlineRun(Run):
    """A run whose steps are drawn; before `rollouts` is ready its examples are as long as they can become."""

    rollouts: Any = None

    def step_examples(self, step: int) -> list[Encoded]:
        return self.rollouts.examples(step) if self.rollouts.ready else super().step_examples(step)


class OnlineLoop(Loop):
    """The loop over drawn texts."""

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
        self.sampler: Sampler | None = None
        self._at, self._examples = -1, list[Encoded]()
        self.watched = {run.total * i // WATCHED for i in range(WATCHED)} | {run.total - 1}
        self.policy: DrawingPolicy

    def begin(self, notes: list[str]) -> None:
        """Be ready to draw from the model as its steps leave it."""
        from pipeline.engine.decode import Sampler, unsuited
        from pipeline.engine.layout import choose_widths
        from pipeline.engine.reuse import window_of

        run, online = self.run, self.online
        self.policy = DrawingPolicy(run, online)
        needed: dict[int, int] = {}
        for step in range(run.total):
            width = -(-max(e.start for e in run.step_examples(step)) // GRAIN) * GRAIN
            needed[width] = needed.get(width, 0) + 1
        self.ready = True
        reason = unsuited(run.model) or (window_of(run.model) and not self.policy.written and "its attention slides over a window") or None
        if reason or not needed:
            notes += [f"texts are drawn by the model's own generate: {reason}"] if reason else []
            return
        widths = choose_widths(needed, MOST_WIDTHS)
        count = min(run.settings.batch_size * online.samples, max(1, online.batch_tokens // (max(widths) + online.longest)))
        self.sampler = Sampler(self._decoder, widths, count, lambda: autocast(run.device, run.dtype, cache=False), run.device, notes)

    def _decoder(self, rows: int, width: int) -> Decoder:
        from pipeline.engine.decode import Cached, Handwritten

        online, shape = self.online, (rows, width, self.online.longest, self.online.encoder.end_id, self.run.pad_id, self.run.device)
        if self.policy.written:
            return Handwritten(self.policy.written, *shape, temperature=online.temperature)
        return Cached(functools.partial(logits_at, self.run.model), self.run.model.config, *shape, temperature=online.temperature)

    def examples(self, step: int) -> list[Encoded]:
        """What optimiser step `step` (from 0) trains on, drawn when it is first asked for."""
        if step != self._at:
            import torch

            self.run.model.eval()
            with torch.no_grad():
                samples = self._samples(step)
                self.policy.look(step in self.watched, self._nats)
                self._examples, seen = self.online.judge(samples, self.policy)
            self.seen[step + 1] = seen | self.policy.seen
            self._at = step
        return self._examples

    def _samples(self, step: int) -> list[Sample]:
        run, online = self.run, self.online
        rows = step_rows(len(run.examples), run.settings.batch_size, run.seed, step)
        asked = [(online.rows[r], run.examples[r][0]) for r in rows for _ in range(online.samples)]
        prompts = [list(e.ids[: e.start]) for _, e in asked]
        drawn, nats = self._draw(prompts, run.seed * 1_000_003 + step)
        ends = [_enders(row, online) for row, _ in asked]
        kept = [_until(ids, online.encoder.end_id, choices) for ids, choices in zip(drawn, ends, strict=True)]
        self._nats = [values[: len(ids)] for values, ids in zip(nats, kept, strict=True)] if nats else []
        texts = online.encoder.tokenizer.batch_decode(kept, skip_special_tokens=True)
        return [Sample(row, Encoded((*prompt, *ids), len(prompt)), online.encoder.said(text))
                for (row, _), prompt, ids, text in zip(asked, prompts, kept, texts, strict=True)]

    def _draw(self, prompts: list[list[int]], seed: int) -> tuple[list[list[int]], list[list[float]]]:
        with autocast(self.run.device, self.run.dtype):
            return self.sampler.draw(prompts, seed) if self.sampler else (self._generated(prompts, seed), [])

    def _generated(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        """By the model's generate, prompts of one length together: what stands before a padded one may not know of the padding."""
        import torch

        torch.manual_seed(seed)
        online, found = self.online, [list[int]() for _ in prompts]
        for length in sorted({len(p) for p in prompts}):
            mine = [i for i, p in enumerate(prompts) if len(p) == length]
            ids = pad([prompts[i] for i in mine], self.run.pad_id).to(self.run.device)
            out = self.run.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=online.longest, do_sample=True, temperature=online.temperature,
                top_k=0, top_p=1.0, pad_token_id=self.run.pad_id, eos_token_id=online.encoder.end_id, use_cache=True, remove_invalid_values=True,
            )
            for index, one in zip(mine, out[:, length:].tolist(), strict=True):
                found[index] = one
        return found

    def close(self) -> None:
        """Free what only drawing needs."""
        if self.sampler:
            self.sampler.close()
        self.sampler, self.ready = None, False


def _enders(row: dict, online: Online) -> list[list[int]]:
    """Tokens of the choices after which an answer is complete: those that no other choice of the row goes on from."""
    if online.encoder.task.scoring != "choice":
        return []
    choices = [online.encoder.answer(choice) for choice in row["choices"]]
    return [ids for ids in choices if not any(other != ids and other[: len(ids)] == ids for other in choices)]


def _until(ids: list[int], end: int | None, choices: Sequence[list[int]]) -> list[int]:
    """A drawn text up to where it is complete: a choice, or the token that ends it."""
    for choice in choices:
        if ids[: len(choice)] == choice:
            return choice
    return ids[: ids.index(end) + 1] if end in ids else ids


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
        values = self._values(samples, self.written or functools.partial(logits_at, self.run.model))
        if self._nats:
            self.seen["sampling_gap"] = max(abs(a - b) for one, drawn in zip(values, self._nats, strict=True) for a, b in zip(one.tolist(), drawn, strict=True))
        return values

    def reference(self, samples: Sequence[Sample]) -> list[torch.Tensor] | None:
        if not self.adapted:
            return None
        if self._before:
            return self._values(samples, self._before)
        with self.run.model.disable_adapter():
            return self._values(samples, functools.partial(logits_at, self.run.model))

    def _values(self, samples: Sequence[Sample], forward: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        import torch
        import torch.nn.functional as F

        values: dict[Encoded, torch.Tensor] = {}
        run, counts, once = self.run, {"label": 1}, list(dict.fromkeys(s.example for s in samples))
        with torch.no_grad(), autocast(run.device, run.dtype):
            for part in by_length([len(e.ids) for e in once], self.online.batch_tokens):
                mine = [once[i] for i in part]
                batch = collate(mine, counts, run.pad_id).to(run.device)
                logits = forward(batch.input_ids, batch.rows, batch.cols) / self.online.temperature
                nats = -F.cross_entropy(logits, batch.targets, reduction="none")
                values |= zip(mine, nats.cpu().split([len(e.ids) - e.start for e in mine]), strict=True)
        return [values[s.example] for s in samples]
