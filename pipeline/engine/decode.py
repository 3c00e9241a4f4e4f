"""Greedy decoding over tensors that stay: every step works on the same ones, so that on a GPU one captured step serves all steps of a batch.

Library. A row that has ended goes on with padding; whether all have ended is asked every few steps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StaticCache

from pipeline.data.rows import pad
from pipeline.engine import answering
from pipeline.engine.answering import Forward
from pipeline.engine.attention import Attends, Heads, after, seen
from pipeline.engine.graphs import Graphs
from pipeline.engine.passes import capture
from pipeline.engine.reuse import refusal

ASK_EVERY = 8  # steps between asking the device whether all rows have ended
PAYS = 6  # times that work is done for which recording it pays
ALIGNED = 8  # numbers of at least 16 bits in the 16 bytes that attention's kernels want a bias's rows to begin at
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
    """A batch of a fixed shape, and its greedy continuations: what every way to feed a model shares. Prompts are padded on the left, as generate has them.

    Args:
        rows, width: of the prompts; new: tokens that follow at most.
        end: the token that ends a text, or None.
    """

    def __init__(self, rows: int, width: int, new: int, end: int | None, pad_id: int, device: Any) -> None:
        self.width, self.new, self.pad_id, self.device = width, new, pad_id, device
        whole: dict[str, Any] = {"dtype": torch.long, "device": device}
        self.end, self.padding = torch.tensor(-1 if end is None else end, **whole), torch.tensor(pad_id, **whole)
        self.ids, self.positions = torch.zeros(rows, width, **whole), torch.zeros(rows, width, **whole)
        self.mask = torch.zeros(rows, 1, width, width + new, dtype=torch.bool, device=device)
        self.seen = torch.zeros(rows, 1, 1, width + new, dtype=torch.bool, device=device)
        self.at, self.slot = torch.zeros(rows, **whole), torch.zeros(1, **whole)
        self.token, self.done = torch.zeros(rows, 1, **whole), torch.zeros(rows, 1, dtype=torch.bool, device=device)
        self.out = torch.zeros(rows, new, **whole)

    def fill(self, prompts: Sequence[list[int]]) -> None:
        """Put prompts in, one a row."""
        ids = pad(prompts, self.pad_id, left=True)
        self.ids.copy_(torch.nn.functional.pad(ids, (self.width - ids.shape[1], 0), value=self.pad_id))
        self.at.copy_(torch.tensor([len(prompt) for prompt in prompts]))
        starts, columns = self.width - self.at[:, None], torch.arange(self.width + self.new, device=self.device)
        real, among = (columns >= starts) & (columns < self.width), columns[: self.width, None]
        # a padding token sees itself alone, because attention over nothing is not a number
        self.mask.copy_(((real[:, None] & (columns <= among)) | (columns == among))[:, None])
        self.seen.copy_(real[:, None, None])
        self.positions.copy_((columns[: self.width] - starts).clamp(min=0))
        self.slot.zero_()
        self.done.fill_(False)
        self.out.fill_(self.pad_id)

    def prefill(self) -> None:
        """Feed the prompts and choose the first token."""
        self.choose(self.first())

    def step(self) -> None:
        """Feed the last token, at position `at` of its row, and choose the next."""
        self.seen.index_fill_(3, self.column, True)
        logits = self.next()
        self.at.add_(1)
        self.choose(logits)

    @property
    def column(self) -> torch.Tensor:
        """Where the last token stands in all rows [1]."""
        return self.width - 1 + self.slot

    def first(self) -> torch.Tensor:
        """Logits [R, V] after the prompts."""
        raise NotImplementedError

    def next(self) -> torch.Tensor:
        """Logits [R, V] after the last token."""
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
    """Over transformers' static cache.

    Args:
        forward: (ids [R, T], rows [R], cols [R], further inputs of the model) -> logits [R, V] fp32.
    """

    def __init__(self, forward: Callable[..., torch.Tensor], config: Any, rows: int, width: int, new: int, end: int | None, pad_id: int, device: Any) -> None:
        super().__init__(rows, width, new, end, pad_id, device)
        self.forward, self.cache = forward, StaticCache(config=config, max_cache_len=width + new)
        self.every, self.last = torch.arange(rows, device=device), torch.full((rows,), width - 1, device=device)
        self.only = torch.zeros_like(self.last)

    def fill(self, prompts: Sequence[list[int]]) -> None:
        super().fill(prompts)
        self.cache.reset()

    def first(self) -> torch.Tensor:
        return self.forward(self.ids, self.every, self.last, attention_mask=self.mask, position_ids=self.positions, **self._past)

    def next(self) -> torch.Tensor:
        return self.forward(self.token, self.every, self.only, attention_mask=self.seen, position_ids=self.at[:, None], **self._past)

    @property
    def _past(self) -> dict[str, Any]:
        return {"past_key_values": self.cache, "use_cache": True}


class Written(Decoder):
    """Over the hand-written layers, and keys and values [R, 2G, L, e] of its own."""

    def __init__(self, forward: Forward, rows: int, width: int, new: int, end: int | None, pad_id: int, device: Any) -> None:
        super().__init__(rows, width, new, end, pad_id, device)
        self.llama = forward.llama
        self.cos, self.sin = forward.table(width + new)
        self.held = [self.llama.embedding.new_zeros(rows, 2 * one.heads.groups, width + new, one.heads.width) for one in self.llama.layers]

    def first(self) -> torch.Tensor:
        bias = additive(self.mask[..., : self.width], self.llama.embedding.dtype)
        return self._logits(self.ids, self.positions.view(-1), [Among(held, bias) for held in self.held])

    def next(self) -> torch.Tensor:
        bias, column = additive(self.seen, self.llama.embedding.dtype), self.column
        return self._logits(self.token, self.at, [After(held, bias, column) for held in self.held])

    def _logits(self, ids: torch.Tensor, positions: torch.Tensor, attends: Sequence[Attends]) -> torch.Tensor:
        hidden = self.llama.answer(ids.view(-1), self.cos[positions], self.sin[positions], attends)
        return self.llama.logits(hidden.view(*ids.shape, -1)[:, -1])


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where the mask [R, 1, T, S] is True, else -inf; as attention's kernels add it, with rows that begin at multiples of 16 bytes."""
    columns = mask.shape[-1]
    held = torch.full((*mask.shape[:-1], columns + -columns % ALIGNED), -math.inf, dtype=dtype, device=mask.device)
    return held[..., :columns].masked_fill_(mask, 0.0)


@dataclass(frozen=True)
class Among:
    """Prompts [R, W] attend among themselves, by the bias [R, 1, W, W]; their keys and values are kept in `held` [R, 2G, L, e]."""

    held: torch.Tensor
    bias: torch.Tensor

    def forward(self, heads: Heads, qkv: torch.Tensor, save: bool) -> tuple[torch.Tensor, tuple]:
        width = self.bias.shape[-1]
        q, k, v = heads.parts(qkv, width)
        self.held[:, :, :width] = torch.cat((k, v), 1)
        return heads.mixed(seen(q, k, v, self.bias)), ()


@dataclass(frozen=True)
class After:
    """One token a row, at `column` [1], attends to what is kept up to there, by the bias [R, 1, 1, L]."""

    held: torch.Tensor
    bias: torch.Tensor
    column: torch.Tensor

    def forward(self, heads: Heads, qkv: torch.Tensor, save: bool) -> tuple[torch.Tensor, tuple]:
        groups = heads.groups
        q, kv = qkv.view(len(qkv), -1, heads.width).split((heads.queries, 2 * groups), 1)
        self.held.index_copy_(2, self.column, kv[:, :, None])
        k, v = self.held.split(groups, 1)
        return after(q, k, v, self.bias).reshape(len(q), -1), ()


class NotCaptured(Exception):
    """Work that was to be recorded could not be; what it has done to the decoder is not known."""


@dataclass
class Replayed:
    """Work over static tensors that is recorded when it is done for the first time, and then replayed.

    Args:
        fresh: a context in which no cast of a weight is kept from before: what a capture runs in.
    """

    work: Callable[[], None]
    graphs: Graphs
    fresh: Callable[[], Any]
    notes: list[str]
    again: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.again is None:
            self.again = capture(self.graphs, self._inside, self.notes, "generation")
            if self.again is None:
                raise NotCaptured
            if self.graphs.captures:
                return  # the run that warms up before a recording was the first
        self.again()

    def _inside(self) -> None:
        with self.fresh():
            self.work()


def greedy(make: Callable[[int, int], Decoder], fresh: Callable[[], Any], prompts: Sequence[list[int]], parts: Sequence[list[int]], new: int, device: Any,
           notes: list[str]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(indices of prompts, their continuations [rows, new] padded from the end on), batch by batch.

    Args:
        make: (rows, width) -> a decoder of this shape.
        fresh: as Replayed has it.
        parts: indices of prompts by batch: the batches in which generate would be called, because in 16 bits a text may depend on its batch, on the
            padding and on how many rows are multiplied at once.
        notes: takes the reason where a capture failed.
    """
    batches = [(part, (len(part), max(len(prompts[i]) for i in part))) for part in parts]
    uses = Counter(shape for _, shape in batches)
    static, graphs = torch.device(device).type in answering.STATIC, Graphs(device)

    def ways(decoder: Decoder, times: int) -> tuple[Callable[[], None], Callable[[], None]]:
        work = ((decoder.prefill, times), (decoder.step, times * (new - 1)))
        prefill, step = (Replayed(part, graphs, fresh, notes) if static and count >= PAYS else part for part, count in work)
        return prefill, step

    held: dict[tuple[int, int], tuple[Decoder, Callable[[], None], Callable[[], None]]] = {}

    def texts(mine: Sequence[list[int]], shape: tuple[int, int]) -> torch.Tensor:
        if shape not in held:  # batches of a shape come one after another
            held.clear()
            graphs.close()
            made = make(*shape)
            held[shape] = (made, *ways(made, uses[shape]))
        decoder, prefill, step = held[shape]
        decoder.fill(mine)
        try:
            return decoder.run(prefill, step)
        except NotCaptured:
            held[shape] = (decoder, decoder.prefill, decoder.step)
            decoder.fill(mine)
            return decoder.run(decoder.prefill, decoder.step)

    try:
        for part, shape in batches:
            yield part, texts([prompts[i] for i in part], shape)
    finally:
        graphs.close()
