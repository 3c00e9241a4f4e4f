"""Greedy decoding over tensors that stay: every step works on the same ones, so that on a GPU one captured step serves all batches.

Library. A row that has ended goes on with padding; whether all have ended is asked every few steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StaticCache

from pipeline.data import by_length, pad
from pipeline.fast import answering, ops
from pipeline.fast.answering import Forward
from pipeline.fast.attend import Heads, seen
from pipeline.fast.capture import Graphs
from pipeline.fast.forward import capture
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
    """A batch of a fixed shape, and its greedy continuations: what every way to feed a model shares.

    Args:
        rows, width: of the prompts; new: tokens that follow at most.
        end: the token that ends a text, or None.
    """

    def __init__(self, rows: int, width: int, new: int, end: int | None, pad_id: int, device: Any) -> None:
        self.width, self.new, self.pad_id, self.device = width, new, pad_id, device
        whole = {"dtype": torch.long, "device": device}
        self.end, self.padding = torch.tensor(-1 if end is None else end, **whole), torch.tensor(pad_id, **whole)
        self.ids, self.every = torch.zeros(rows, width, **whole), torch.arange(rows, device=device)
        self.at, self.slot = torch.zeros(rows, **whole), torch.zeros(1, **whole)
        self.token, self.done = torch.zeros(rows, 1, **whole), torch.zeros(rows, 1, dtype=torch.bool, device=device)
        self.out = torch.zeros(rows, new, **whole)

    def fill(self, prompts: Sequence[list[int]]) -> None:
        """Put prompts in, at most as many as there are rows; the rest have ended from the start."""
        rows = [*prompts, *([[self.pad_id]] * (len(self.ids) - len(prompts)))]
        self.at.copy_(torch.tensor([len(row) for row in rows]))
        self.place(rows)
        self.slot.zero_()
        self.done.copy_(torch.arange(len(rows))[:, None] >= len(prompts))
        self.out.fill_(self.pad_id)

    def place(self, rows: list[list[int]]) -> None:
        """Put the prompts' ids where `prefill` finds them."""
        raise NotImplementedError

    def prefill(self) -> None:
        """Feed the prompts and choose the first token."""
        raise NotImplementedError

    def step(self) -> None:
        """Feed the last token, at position `at` of its row, and choose the next."""
        raise NotImplementedError

    def choose(self, logits: torch.Tensor) -> None:
        """Take the most likely tokens; logits [R, V]."""
        self.token.copy_(torch.where(self.done, self.padding, logits.argmax(-1, keepdim=True)))
        self.done.logical_or_(self.token == self.end)
        self.out.index_copy_(1, self.slot, self.token)
        self.slot.add_(1)

    def run(self, prefill: Callable[[], None], step: Callable[[], None]) -> torch.Tensor:
        """What follows each row [R, new], padded from where it has ended, by these ways to do the work once `fill` was called."""
        prefill()
        for count in range(1, self.new):
            if count % ASK_EVERY == 0 and bool(self.done.all()):
                break
            step()
        return self.out.clone()


class Cached(Decoder):
    """Over transformers' static cache. Prompts are padded on the left.

    Args:
        forward: (ids [R, T], rows [R], cols [R], further inputs of the model) -> logits [R, V] fp32.
    """

    def __init__(self, forward: Callable[..., torch.Tensor], config: Any, rows: int, width: int, new: int, end: int | None, pad_id: int, device: Any) -> None:
        super().__init__(rows, width, new, end, pad_id, device)
        self.forward, self.cache = forward, StaticCache(config=config, max_cache_len=width + new)
        whole = {"dtype": torch.long, "device": device}
        self.positions = torch.zeros(rows, width, **whole)
        self.mask = torch.zeros(rows, 1, width, width + new, dtype=torch.bool, device=device)
        self.seen = torch.zeros(rows, 1, 1, width + new, dtype=torch.bool, device=device)
        self.last, self.first = torch.full((rows,), width - 1, **whole), torch.zeros(rows, **whole)

    def place(self, rows: list[list[int]]) -> None:
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
        self.cache.reset()

    def prefill(self) -> None:
        self.choose(self.forward(self.ids, self.every, self.last, attention_mask=self.mask, position_ids=self.positions, **self._past))

    def step(self) -> None:
        self.seen.index_fill_(3, self.width - 1 + self.slot, True)
        logits = self.forward(self.token, self.every, self.first, attention_mask=self.seen, position_ids=self.at[:, None], **self._past)
        self.at.add_(1)
        self.choose(logits)

    @property
    def _past(self) -> dict[str, Any]:
        return {"past_key_values": self.cache, "use_cache": True}


class Written(Decoder):
    """Over the hand-written layers and keys and values of its own. Prompts begin at column 0, every row is as long as it is: there is no mask."""

    def __init__(self, forward: Forward, rows: int, width: int, new: int, end: int | None, pad_id: int, device: Any) -> None:
        super().__init__(rows, width, new, end, pad_id, device)
        self.llama = forward.llama
        self.cos, self.sin = forward.table(width + new)
        held = [self.llama.embedding.new_zeros(2, rows, layer.heads.groups, width + new, layer.heads.width) for layer in self.llama.layers]
        self.among, self.after = [Among(one, width) for one in held], [After(one, self.at) for one in held]

    def place(self, rows: list[list[int]]) -> None:
        ids = pad(rows, self.pad_id)
        self.ids.copy_(torch.nn.functional.pad(ids, (0, self.width - ids.shape[1]), value=self.pad_id))

    def prefill(self) -> None:
        hidden = self.llama.answer(self.ids.reshape(-1), self.cos[: self.width], self.sin[: self.width], self.among)
        self.choose(self.llama.logits(hidden.view(*self.ids.shape, -1)[self.every, self.at - 1]))

    def step(self) -> None:
        logits = self.llama.logits(self.llama.answer(self.token[:, 0], self.cos[self.at], self.sin[self.at], self.after))
        self.at.add_(1)
        self.choose(logits)


@dataclass(frozen=True)
class Among:
    """Prompts [R, W] attend among themselves; their keys and values are kept in `held` [2, R, G, L, e]."""

    held: torch.Tensor
    width: int

    def forward(self, heads: Heads, qkv: torch.Tensor, save: bool) -> tuple[torch.Tensor, tuple]:
        q, k, v = heads.parts(qkv, self.width)
        for held, part in zip(self.held, (k, v), strict=True):
            held[:, :, : self.width] = part
        return heads.mixed(seen(q, k, v, None)), ()


@dataclass(frozen=True)
class After:
    """One token a row, at column `at` [R], attends to what is kept before it."""

    held: torch.Tensor
    at: torch.Tensor

    def forward(self, heads: Heads, qkv: torch.Tensor, save: bool) -> tuple[torch.Tensor, tuple]:
        return ops.attend_next_(qkv, self.held[0], self.held[1], self.at, heads.queries), ()


def greedy(make: Callable[[int, int], Decoder], fresh: Callable[[], Any], prompts: Sequence[list[int]], new: int, batch_tokens: int, device: Any,
           notes: list[str]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(indices of prompts, their continuations [rows, new] padded from the end on), batch by batch.

    Args:
        make: (rows, width) -> a decoder of this shape.
        fresh: a context in which no cast of a weight is kept from before: what a capture runs in.
        notes: takes the reason where a capture failed.
    """
    graphs = Graphs(device)
    held: dict[tuple[int, int], tuple[Decoder, Callable[[], None], Callable[[], None]]] = {}
    static = torch.device(device).type in answering.STATIC
    batches = _static([len(p) for p in prompts], new, batch_tokens) if static else _exact([len(p) for p in prompts], new, batch_tokens)
    uses: dict[tuple[int, int], int] = {}
    for _, rows, width in batches:
        uses[rows, width] = uses.get((rows, width), 0) + 1
    try:
        for part, rows, width in batches:
            key, mine = (rows, width), [prompts[i] for i in part]
            if key not in held:
                held.clear()  # batches of a shape come one after another
                decoder = make(rows, width)
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

        return capture(graphs, inside, notes, "generation") or work

    decoder.fill(prompts)
    decoder.prefill()  # the cache's tensors come to be here, outside of any graph's pool
    steps = uses * (decoder.new - 1)
    step = recorded(decoder.step) if decoder.new > 2 and steps >= PREFILLS else decoder.step
    decoder.fill(prompts)
    return (recorded(decoder.prefill) if uses >= PREFILLS else decoder.prefill), step
