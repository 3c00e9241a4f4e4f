"""Texts drawn after prompts, by captured decoding where the model allows it and each up to where its answer is complete; and what a reward model says of
them.

Library of training/online.py and best_of.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.data.rows import Encoder, pad
from pipeline.models.base import autocast
from pipeline.scoring import rewards
from pipeline.scoring.scorer import Scorer, logits_at

if TYPE_CHECKING:
    import torch

    from pipeline.engine.answering import Forward
    from pipeline.engine.decode import Decoder, Sampler

MOST_WIDTHS = 3
"""Of prompts, each with decoders of its own."""
GRAIN = 16
"""Widths of prompts are multiples of it."""


def room_for(rows: Sequence[dict], encoder: Encoder) -> int:
    """Tokens to draw for an answer: those of the longest choice, or as many as an answer is given at test."""
    if encoder.task.scoring == "generate":
        return encoder.task.max_new_tokens
    return max(len(encoder.answer(c)) for row in rows for c in row["choices"])


class Drawing:
    """Draws texts from a model as it stands at each call.

    Args:
        lengths: of the longest prompt of every call to come. prompts: most of a call.
        longest: most tokens of a text; batch_tokens: most tokens of a pass.
        written: the model's hand-written forward pass; None: its own.
        notes: takes why texts are drawn by the model's own generate, or why a capture failed.
    """

    def __init__(self, model: Any, encoder: Encoder, lengths: Sequence[int], prompts: int, longest: int, temperature: float, batch_tokens: int,
                 device: Any, dtype: Any, written: Forward | None, notes: list[str]) -> None:
        from pipeline.engine.decode import Sampler, unsuited
        from pipeline.engine.layout import choose_widths
        from pipeline.engine.reuse import window_of

        self.model, self.encoder, self.longest, self.temperature = model, encoder, longest, temperature
        self.device, self.dtype, self.written = device, dtype, written
        self.sampler: Sampler | None = None
        needed: dict[int, int] = {}
        for length in lengths:
            width = -(-length // GRAIN) * GRAIN
            needed[width] = needed.get(width, 0) + 1
        reason = unsuited(model) or (window_of(model) and not written and "its attention slides over a window") or None
        if reason or not needed:
            note = f"texts are drawn by the model's own generate: {reason}"
            notes += [note] if reason and note not in notes else []
            return
        widths = choose_widths(needed, MOST_WIDTHS)
        count = min(prompts, max(1, batch_tokens // (max(widths) + longest)))
        self.sampler = Sampler(self._decoder, widths, count, lambda: autocast(device, dtype, cache=False), device, notes)

    def _decoder(self, rows: int, width: int) -> Decoder:
        from pipeline.engine.decode import Cached, Handwritten

        shape = rows, width, self.longest, self.encoder.end_id, self.encoder.pad_id, self.device
        if self.written:
            return Handwritten(self.written, *shape, temperature=self.temperature)
        return Cached(functools.partial(logits_at, self.model), self.model.config, *shape, temperature=self.temperature)

    def draw(self, rows: Sequence[dict], prompts: Sequence[list[int]], seed: int) -> tuple[list[list[int]], list[list[float]]]:
        """(tokens of the text after each prompt, their log p; no log p where generate draws). The draw is a function of weights and seed.

        rows: whose prompts they are: a choice of the row ends a text.
        """
        import torch

        self.model.eval()
        with torch.no_grad(), autocast(self.device, self.dtype):
            drawn, nats = self.sampler.draw(prompts, seed) if self.sampler else (self._generated(prompts, seed), [])
        ends: dict[int, list[list[int]]] = {}
        for row in rows:
            if id(row) not in ends:
                ends[id(row)] = enders(row, self.encoder)
        kept = [until(ids, self.encoder.end_id, ends[id(row)]) for ids, row in zip(drawn, rows, strict=True)]
        return kept, [values[: len(ids)] for values, ids in zip(nats, kept, strict=False)]

    def texts(self, drawn: Sequence[Sequence[int]]) -> list[str]:
        return [self.encoder.said(text) for text in self.encoder.tokenizer.batch_decode(drawn, skip_special_tokens=True)]

    def _generated(self, prompts: Sequence[list[int]], seed: int) -> list[list[int]]:
        """By the model's generate, prompts of one length together: what stands before a padded one may not know of the padding."""
        import torch

        torch.manual_seed(seed)
        found: list[list[int]] = [[] for _ in prompts]
        for length in sorted({len(p) for p in prompts}):
            mine = [i for i, p in enumerate(prompts) if len(p) == length]
            ids = pad([prompts[i] for i in mine], self.encoder.pad_id).to(self.device)
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.longest, do_sample=True, temperature=self.temperature,
                top_k=0, top_p=1.0, pad_token_id=self.encoder.pad_id, eos_token_id=self.encoder.end_id, use_cache=True, remove_invalid_values=True,
            )
            for index, one in zip(mine, out[:, length:].tolist(), strict=True):
                found[index] = one
        return found

    def close(self) -> None:
        """Free what only drawing needs."""
        if self.sampler:
            self.sampler.close()


def enders(row: dict, encoder: Encoder) -> list[list[int]]:
    """Tokens of the choices after which an answer is complete: those that no other choice of the row goes on from."""
    if encoder.task.scoring != "choice":
        return []
    choices = [encoder.answer(choice) for choice in row["choices"]]
    return [ids for ids in choices if not any(other != ids and other[: len(ids)] == ids for other in choices)]


def until(ids: list[int], end: int | None, choices: Sequence[list[int]]) -> list[int]:
    """A drawn text up to where it is complete: a choice, or the token that ends it."""
    for choice in choices:
        if ids[: len(choice)] == choice:
            return choice
    return ids[: ids.index(end) + 1] if end in ids else ids


class RewardReader:
    """Rewards of texts that another model has drawn, by a reward model of the same vocabulary; on a GPU by hand, where its forward pass is known.

    Args:
        scorer: answers as the reward model does; its weights stay as they are from now on.
    """

    def __init__(self, scorer: Scorer) -> None:
        import torch

        from pipeline.engine import answering, bind
        from pipeline.engine.parts import Unsupported

        self.scorer, self.bound = scorer, None
        scorer.model.eval()
        self._prompts: dict[str, list[int]] = {}
        if scorer.device.type in answering.STATIC:
            with torch.no_grad(), contextlib.suppress(Unsupported):
                self.bound = bind.answering(scorer.model, scorer.dtype)

    def __call__(self, rows: Sequence[dict], drawn: Sequence[Sequence[int]]) -> list[float]:
        """Of what was drawn (tokens) after each row's prompt; the token that ends an answer is no part of it."""
        scorer, ends = self.scorer, (self.scorer.encoder.end_id, self.scorer.encoder.tokenizer.eos_token_id)
        texts = [[*self._prompt(row), *(ids[:-1] if ids and ids[-1] in ends else ids)] for row, ids in zip(rows, drawn, strict=True)]
        once = list(dict.fromkeys(map(tuple, texts)))  # the same text is drawn again and again
        where = scorer.encoder.pad_id, scorer.device, scorer.dtype
        values = dict(zip(once, rewards.rewards(scorer.model, once, scorer.batch_tokens, *where, self._by_hand if self.bound else None), strict=True))
        return [values[tuple(ids)] for ids in texts]

    def _prompt(self, row: dict) -> list[int]:
        if row["id"] not in self._prompts:
            self._prompts[row["id"]] = self.scorer.encoder.prompt(self.scorer.prompt(row["prompt"]))
        return self._prompts[row["id"]]

    def _by_hand(self, ids: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
        from pipeline.engine.answering import Forward

        assert self.bound is not None
        return rewards.read(self.scorer.model, Forward(self.bound.llama).states(ids, rows, cols))
