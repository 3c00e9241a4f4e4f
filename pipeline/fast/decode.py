"""Greedy decoding over a static cache: every step works on the same tensors, so that on a GPU one captured step serves all batches.

Library. Prompts are padded on the left; a row that has ended goes on with padding; whether all have ended is asked every few steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StaticCache

from pipeline.data import by_length, pad
from pipeline.fast.capture import Graphs
from pipeline.fast.forward import STATIC, capture
from pipeline.fast.reuse import refusal
from pipeline.fast.shapes import GRAIN, choose_widths

ASK_EVERY = 8  # steps between asking the device whether all rows have ended
MOST_WIDTHS = 4
BATCHES_A_WIDTH = 8
PREFILLS = 6  # batches of a shape for which capturing the pass over the prompts pays
HARMLESS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "max_length", "max_new_tokens", "use_cache", "transformers_version", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "cache_implementation", "disable_compile",
}
"""What may stand in a model's generation config without changing what greedy decoding gives."""


def unsuited(model: Any, longest: int) -> str | None:
    """Why the model's own generate is needed; None: it is not."""
    own = getattr(model, "generation_config", None) or GenerationConfig()
    plain = GenerationConfig().to_dict()
    changed = {key for key, value in own.to_dict().items() if value != plain.get(key) and not key.startswith("_") and value is not None} - HARMLESS
    if changed:
        return f"its generation config sets {', '.join(sorted(changed))}"
    return refusal(model, longest, slides=False)


class Decoder:
    """A batch of a fixed shape, and its greedy continuations.

    Args:
        forward: (ids [R, T], rows [R], cols [R], further inputs of the model) -> logits [R, V] fp32.
        end: the token that ends a text, or None.
    """

    def __init__(self, forward: Callable[..., torch.Tensor], config: Any, rows: int, width: int, new: int, end: int | None, pad_id: int, device: Any) -> None:
        self.forward, self.width, self.new, self.pad_id, self.device = forward, width, new, pad_id, device
        self.cache = StaticCache(config=config, max_cache_len=width + new)
        whole = {"dtype": torch.long, "device": device}
        self.end, self.padding = torch.tensor(-1 if end is None else end, **whole), torch.tensor(pad_id, **whole)
        self.ids, self.positions = torch.zeros(rows, width, **whole), torch.zeros(rows, width, **whole)
        self.mask = torch.zeros(rows, 1, width, width + new, dtype=torch.bool, device=device)
        self.seen = torch.zeros(rows, 1, 1, width + new, dtype=torch.bool, device=device)
        self.every, self.last, self.first = torch.arange(rows, device=device), torch.full((rows,), width - 1, **whole), torch.zeros(rows, **whole)
        self.at, self.slot = torch.zeros(rows, 1, **whole), torch.zeros(1, **whole)
        self.token, self.done = torch.zeros(rows, 1, **whole), torch.zeros(rows, 1, dtype=torch.bool, device=device)
        self.out = torch.zeros(rows, new, **whole)

    def fill(self, prompts: Sequence[list[int]]) -> None:
        """Put prompts in, at most as many as there are rows; the rest have ended from the start."""
        rows = [*prompts, *([[self.pad_id]] * (len(self.ids) - len(prompts)))]
        ids = torch.nn.functional.pad(pad(rows, self.pad_id, left=True), (self.width - max(map(len, rows)), 0), value=self.pad_id)
        starts = torch.tensor([self.width - len(row) for row in rows])[:, None]
        columns = torch.arange(self.width + self.new)
        real = (columns >= starts) & (columns < self.width)
        among = columns[: self.width, None]
        # a padding token sees itself alone, because attention over nothing is not a number
        mask = (real[:, None] & (columns <= among)) | (columns == among)
        self.ids.copy_(ids)
        self.positions.copy_((columns[: self.width] - starts).clamp(min=0))
        self.mask.copy_(mask[:, None])
        self.seen.copy_(real[:, None, None])
        self.at.copy_(self.width - starts)
        self.slot.fill_(self.width)
        self.done.copy_(torch.arange(len(rows))[:, None] >= len(prompts))
        self.out.fill_(self.pad_id)
        self.cache.reset()

    def prefill(self) -> None:
        """Feed the prompts and choose the first token."""
        self._choose(self.forward(self.ids, self.every, self.last, attention_mask=self.mask, position_ids=self.positions, **self._past))

    def step(self) -> None:
        """Feed the last token and choose the next."""
        self.seen.index_fill_(3, self.slot, True)
        logits = self.forward(self.token, self.every, self.first, attention_mask=self.seen, position_ids=self.at, **self._past)
        self.at.add_(1)
        self.slot.add_(1)
        self._choose(logits)

    @property
    def _past(self) -> dict[str, Any]:
        return {"past_key_values": self.cache, "use_cache": True}

    def _choose(self, logits: torch.Tensor) -> None:
        self.token.copy_(torch.where(self.done, self.padding, logits.argmax(-1, keepdim=True)))
        self.done.logical_or_(self.token == self.end)
        self.out.index_copy_(1, self.slot - self.width, self.token)

    def run(self, prefill: Callable[[], None], step: Callable[[], None]) -> torch.Tensor:
        """What follows each row [R, new], padded from where it has ended, by these ways to do the work once `fill` was called."""
        prefill()
        for count in range(1, self.new):
            if count % ASK_EVERY == 0 and bool(self.done.all()):
                break
            step()
        return self.out.clone()


def greedy(model: Any, forward: Callable[..., torch.Tensor], fresh: Callable[[], Any], prompts: Sequence[list[int]], new: int, batch_tokens: int,
           end: int | None, pad_id: int, device: Any, notes: list[str]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(indices of prompts, their continuations [rows, new] padded from the end on), batch by batch.

    Args:
        forward, end: as in Decoder.
        fresh: a context in which no cast of a weight is kept from before: what a capture runs in.
        notes: takes the reason where a capture failed.
    """
    graphs = Graphs(device)
    held: dict[tuple[int, int], tuple[Decoder, Callable[[], None], Callable[[], None]]] = {}
    static = torch.device(device).type in STATIC
    batches = _static([len(p) for p in prompts], new, batch_tokens) if static else _exact([len(p) for p in prompts], new, batch_tokens)
    uses: dict[tuple[int, int], int] = {}
    for _, rows, width in batches:
        uses[rows, width] = uses.get((rows, width), 0) + 1
    try:
        for part, rows, width in batches:
            key, mine = (rows, width), [prompts[i] for i in part]
            if key not in held:
                held.clear()  # batches of a shape come one after another
                decoder = Decoder(forward, model.config, rows, width, new, end, pad_id, device)
                ways = _captured(decoder, mine, graphs, fresh, uses[key], notes) if static else (decoder.prefill, decoder.step)
                held[key] = (decoder, *ways)
            decoder, prefill, step = held[key]
            decoder.fill(mine)
            yield part, decoder.run(prefill, step)[: len(part)]
    finally:
        graphs.close()


def _exact(lengths: list[int], new: int, batch_tokens: int) -> list[tuple[list[int], int, int]]:
    parts = by_length([n + new for n in lengths], batch_tokens)
    return [(part, len(part), max(lengths[i] for i in part)) for part in parts]


def _static(lengths: list[int], new: int, batch_tokens: int) -> list[tuple[list[int], int, int]]:
    """Batches of few shapes: (indices, rows, width of the prompts)."""
    grain = GRAIN * math.ceil(max(lengths) / (GRAIN * 16))
    needed: dict[int, int] = {}
    for length in lengths:
        width = grain * math.ceil(length / grain)
        needed[width] = needed.get(width, 0) + 1
    total = sum((width + new) * count for width, count in needed.items()) / batch_tokens
    widths = choose_widths(needed, max(1, min(MOST_WIDTHS, int(total) // BATCHES_A_WIDTH)))
    batches = []
    for low, width in zip([0, *widths], widths, strict=False):
        own = sorted((i for i, length in enumerate(lengths) if low < length <= width), key=lambda i: -lengths[i])
        rows = max(1, min(batch_tokens // (width + new), len(own)))
        batches += [(own[i : i + rows], rows, width) for i in range(0, len(own), rows)]
    return batches


def _captured(decoder: Decoder, prompts: list[list[int]], graphs: Graphs, fresh: Callable[[], Any], uses: int, notes: list[str]) -> tuple[Any, Any]:
    """(prefill, step) as captured as pays; what this leaves in the decoder, the next `fill` puts right."""

    def recorded(work: Callable[[], None]) -> Callable[[], None]:
        def inside() -> None:
            with fresh():
                work()

        return capture(graphs, inside, decoder.device, notes, "generation") or work

    decoder.fill(prompts)
    decoder.prefill()  # the cache's tensors come to be here, outside of any graph's pool
    steps = uses * (decoder.new - 1)
    step = recorded(decoder.step) if decoder.new > 2 and steps >= PREFILLS else decoder.step
    decoder.fill(prompts)
    return (recorded(decoder.prefill) if uses >= PREFILLS else decoder.prefill), step
