"""Decoding over static tensors, greedy or by drawing: every step works on the same ones, so that on a GPU one captured step is replayed for all steps of
a batch.

Library. A row that has ended gets padding; whether all have ended is asked every few steps. Where no step is captured, rows that have ended are taken
out of the batch, and what all prompts begin with is fed once.
"""

from __future__ import annotations

import math
import os.path
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from pipeline.data.choices import LEAD
from pipeline.data.rows import pad
from pipeline.engine import answering, invariant, ops
from pipeline.engine.answering import Forward
from pipeline.engine.attention import AttentionForward, masked_attention, single_query_attention, windowed
from pipeline.engine.families import Heads
from pipeline.engine.graphs import Graphs
from pipeline.engine.llama import rows_of
from pipeline.engine.passes import capture
from pipeline.engine.reuse import refusal

ASK_EVERY = 8  # steps between asking the device whether all rows have ended
PAYS = 6  # times that work is done from which capturing it pays
WORTH = 0.75  # of a batch's rows, as many as go on at most for the others to be taken out
Ended = Callable[[torch.Tensor], torch.Tensor]
"""Of tokens [R, n], which rows [R] have ended in words."""
ALIGNED = 8  # 16-bit numbers in 16 bytes: attention's kernels take a bias whose rows begin at multiples of that
HARMLESS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "max_length", "max_new_tokens", "use_cache", "transformers_version", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "cache_implementation", "disable_compile",
}
"""Keys of a model's generation config that do not change what greedy decoding gives."""


def unsuited(model: Any) -> str | None:
    """Why the model's own generate is needed; None: it is not."""
    config = getattr(model, "generation_config", None) or GenerationConfig()
    plain = GenerationConfig().to_dict()
    changed = {key for key, value in config.to_dict().items() if value != plain.get(key) and not key.startswith("_") and value is not None} - HARMLESS
    if changed:
        return f"its generation config sets {', '.join(sorted(changed))}"
    return refusal(model)


class Decoder:
    """A batch of a fixed shape and its continuations, for any way to run the model. Prompts are padded on the left, as generate pads them.

    Args:
        rows, width: of the prompts; new: most tokens of a continuation.
        end: the token that ends a text, or None.
        lead: tokens that stand before all prompts and are no part of them, their keys and values known.
        temperature: of drawing; None: the likeliest token is taken.
    """

    def __init__(self, rows: int, width: int, new: int, end: int | None, pad_id: int, device: Any, lead: int = 0,
                 temperature: float | None = None) -> None:
        self.temperature, self.nats = temperature, torch.zeros(rows, new, device=device)
        """log p of the drawn tokens at the temperature [R, new]."""
        self.width, self.new, self.pad_id, self.device, self.lead = width, new, pad_id, device, lead
        whole: dict[str, Any] = {"dtype": torch.long, "device": device}
        self.end, self.padding = torch.tensor(-1 if end is None else end, **whole), torch.tensor(pad_id, **whole)
        self.ids, self.positions = torch.zeros(rows, width, **whole), torch.zeros(rows, width, **whole)
        self.mask = torch.ones(rows, 1, width, lead + width + new, dtype=torch.bool, device=device)
        self.visible = torch.ones(rows, 1, 1, lead + width + new, dtype=torch.bool, device=device)
        self.at, self.slot = torch.zeros(rows, **whole), torch.zeros(1, **whole)
        self.token, self.done = torch.zeros(rows, 1, **whole), torch.zeros(rows, 1, dtype=torch.bool, device=device)
        self.out = torch.zeros(rows, new, **whole)

    def fill(self, prompts: Sequence[list[int]]) -> None:
        """Put prompts in, one a row."""
        ids = pad(prompts, self.pad_id, left=True)
        self.ids.copy_(torch.nn.functional.pad(ids, (self.width - ids.shape[1], 0), value=self.pad_id))
        self.at.copy_(torch.tensor([len(prompt) for prompt in prompts]))
        lead = self.lead
        starts, columns = self.width - self.at[:, None], torch.arange(self.width + self.new, device=self.device)
        real, among = (columns >= starts) & (columns < self.width), columns[: self.width, None]
        # a padding token attends to itself alone, because attention over nothing is not a number
        self.mask[..., lead:].copy_(((real[:, None] & (columns <= among)) | (columns == among))[:, None])
        self.visible[..., lead:].copy_(real[:, None, None])
        self.positions.copy_((columns[: self.width] - starts).clamp(min=0) + lead)
        self.at.add_(lead)
        self.slot.zero_()
        self.done.fill_(False)
        self.out.fill_(self.pad_id)

    def prefill(self) -> None:
        """Feed the prompts and choose the first token."""
        self.choose(self.first())

    def step(self) -> None:
        """Feed the last token, at position `at` of its row, and choose the next."""
        self.visible.index_fill_(3, self.column, True)
        logits = self.next()
        self.at.add_(1)
        self.choose(logits)

    @property
    def column(self) -> torch.Tensor:
        """Where the last token stands in all rows [1]."""
        return self.lead + self.width - 1 + self.slot

    def first(self) -> torch.Tensor:
        """Logits [R, V] after the prompts."""
        raise NotImplementedError

    def next(self) -> torch.Tensor:
        """Logits [R, V] after the last token."""
        raise NotImplementedError

    def choose(self, logits: torch.Tensor) -> None:
        """Take the most likely tokens by logits [R, V], or draw them."""
        self.token.copy_(torch.where(self.done, self.padding, logits.argmax(-1, keepdim=True) if self.temperature is None else
                                     self._drawn(logits / self.temperature)))
        self.done.logical_or_(self.token == self.end)
        self.out.index_copy_(1, self.slot, self.token)
        self.slot.add_(1)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows [K] alone."""
        for name in ("visible", "at", "token", "done", "out"):
            setattr(self, name, getattr(self, name)[rows])

    def _drawn(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [R, 1] drawn from softmax(logits), by the largest of log p + Gumbel noise (Maddison et al., 2014)."""
        log_p = torch.log_softmax(logits, -1)
        drawn = (log_p - torch.empty_like(log_p).exponential_().log()).argmax(-1, keepdim=True)
        self.nats.index_copy_(1, self.slot, log_p.gather(1, drawn))
        return drawn

    def run(self, prefill: Callable[[], None], step: Callable[[], None], ended: Ended | None = None, shrinks: bool = False) -> torch.Tensor:
        """Continuations [R, new] of the prompts that `fill` put in, padded from where they ended.

        Args:
            prefill, step: this decoder's, or their replays.
            ended: asked every few steps besides the end token; a row that has ended in words keeps those that came with them.
            shrinks: rows that have ended are taken out, after which the decoder is of no more use; only of greedy decoding.
        """
        prefill()
        whole, among = self.out, torch.arange(len(self.out), device=self.device)
        for count in range(1, self.new):
            if count % ASK_EVERY == 0:
                if ended is not None:
                    self.done.logical_or_(ended(self.out[:, :count])[:, None])
                going = (~self.done[:, 0]).nonzero()[:, 0]
                if not len(going):
                    break
                if shrinks and len(going) <= WORTH * len(self.done):
                    if self.out is not whole:
                        whole[among] = self.out
                    self.keep(going)
                    among = among[going]
            step()
        if self.out is whole:
            return whole.clone()
        whole[among] = self.out
        return whole


class Cached(Decoder):
    """Over transformers' static cache.

    Args:
        forward: (ids [R, T], rows [R], cols [R], extra inputs of the model) -> logits [R, V] fp32.
        before: keys and values [1, heads, P, e] by layer of P tokens that stand before all prompts.
    """

    def __init__(self, forward: Callable[..., torch.Tensor], config: Any, rows: int, width: int, new: int, end: int | None, pad_id: int, device: Any,
                 before: Sequence[tuple[torch.Tensor, torch.Tensor]] = (), temperature: float | None = None) -> None:
        super().__init__(rows, width, new, end, pad_id, device, before[0][0].shape[2] if before else 0, temperature)
        self.forward, self.cache, self.before = forward, StaticCache(config=config, max_cache_len=self.lead + width + new), before
        self.every, self.last = torch.arange(rows, device=device), torch.full((rows,), width - 1, device=device)
        self.only = torch.zeros_like(self.last)

    def fill(self, prompts: Sequence[list[int]]) -> None:
        super().fill(prompts)
        self.cache.reset()
        layers: list[Any] = self.cache.layers
        for index, (keys, values) in enumerate(self.before):
            layers[index].update(keys.expand(len(prompts), -1, -1, -1), values.expand(len(prompts), -1, -1, -1))

    def keep(self, rows: torch.Tensor) -> None:
        super().keep(rows)
        self.every, self.only = self.every[: len(rows)], self.only[: len(rows)]
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def first(self) -> torch.Tensor:
        return self.forward(self.ids, self.every, self.last, attention_mask=self.mask, position_ids=self.positions, **self._past)

    def next(self) -> torch.Tensor:
        return self.forward(self.token, self.every, self.only, attention_mask=self.visible, position_ids=self.at[:, None], **self._past)

    @property
    def _past(self) -> dict[str, Any]:
        return {"past_key_values": self.cache, "use_cache": True}


class Handwritten(Decoder):
    """Over the hand-written layers; keys and values [R, 2G, L, e] by layer, L = width + new."""

    def __init__(self, forward: Forward, rows: int, width: int, new: int, end: int | None, pad_id: int, device: Any,
                 temperature: float | None = None) -> None:
        super().__init__(rows, width, new, end, pad_id, device, temperature=temperature)
        self.llama = forward.llama
        self.tables, self.starts = forward.tables(width + new), torch.zeros_like(self.at)
        self.caches = [self.llama.embedding.new_zeros(rows, 2 * one.heads.groups, width + new, one.heads.width) for one in self.llama.layers]

    def fill(self, prompts: Sequence[list[int]]) -> None:
        super().fill(prompts)
        self.starts.copy_(self.width - self.at)

    def first(self) -> torch.Tensor:
        if self.llama.invariant:
            return self._logits(self.ids, self.positions.view(-1), self._in_order(torch.arange(self.width, device=self.device)))
        biases = self._biases(lambda window: windowed(self.mask[..., : self.width], window))
        return self._logits(self.ids, self.positions.view(-1), [PromptAttention(*one) for one in zip(self.caches, biases, strict=True)])

    def next(self) -> torch.Tensor:
        if self.llama.invariant:
            return self._logits(self.token, self.at, self._in_order(self.column))
        column, columns = self.column, torch.arange(self.visible.shape[-1], device=self.device)
        biases = self._biases(lambda window: self.visible & (columns > column - window) if window else self.visible)
        return self._logits(self.token, self.at, [NextTokenAttention(*one, column) for one in zip(self.caches, biases, strict=True)])

    def _in_order(self, columns: torch.Tensor) -> list[AttentionForward]:
        return [invariant.CachedRows(cache, self.starts, columns) for cache in self.caches]

    def _drawn(self, logits: torch.Tensor) -> torch.Tensor:
        """As Decoder's, with log p by the operations of a training step where these give a token the same bits in any company."""
        if not self.llama.invariant or self.temperature != 1.0:
            return super()._drawn(logits)
        drawn = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1, keepdim=True)
        ones = torch.ones(len(drawn), device=self.device)
        self.nats.index_copy_(1, self.slot, -ops.cross_entropy_(logits.to(self.llama.head.dtype), drawn[:, 0], ones)[:, None])
        return drawn

    def _biases(self, mask: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
        """By layer: `mask` of its window as a bias; layers of one window have one tensor."""
        windows = [layer.heads.window for layer in self.llama.layers]
        made = {window: additive(mask(window), self.llama.embedding.dtype) for window in dict.fromkeys(windows)}
        return [made[window] for window in windows]

    def _logits(self, ids: torch.Tensor, positions: torch.Tensor, attends: Sequence[AttentionForward]) -> torch.Tensor:
        hidden = self.llama.answer(ids.view(-1), rows_of(self.tables, positions), attends)
        return self.llama.logits(hidden.view(*ids.shape, -1)[:, -1])


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where the mask [R, 1, T, S] is True, else -inf: a bias for attention's kernels, with rows that begin at multiples of 16 bytes."""
    columns = mask.shape[-1]
    bias = torch.full((*mask.shape[:-1], columns + -columns % ALIGNED), -math.inf, dtype=dtype, device=mask.device)
    return bias[..., :columns].masked_fill_(mask, 0.0)


@dataclass(frozen=True)
class PromptAttention:
    """Of prompts [R, W] among themselves, by the bias [R, 1, W, W]; their keys and values go into `cache` [R, 2G, L, e]."""

    cache: torch.Tensor
    bias: torch.Tensor

    def forward(self, heads: Heads, qkv: torch.Tensor, save: bool) -> tuple[torch.Tensor, tuple]:
        width = self.bias.shape[-1]
        q, k, v = heads.split(qkv, width)
        self.cache[:, :, :width] = torch.cat((k, v), 1)
        return heads.merge(masked_attention(q, k, v, self.bias, heads.scale)), ()


@dataclass(frozen=True)
class NextTokenAttention:
    """Of one token a row, at `column` [1], to the cached tokens up to it, by the bias [R, 1, 1, L]; its key and value go into `cache` [R, 2G, L, e]."""

    cache: torch.Tensor
    bias: torch.Tensor
    column: torch.Tensor

    def forward(self, heads: Heads, qkv: torch.Tensor, save: bool) -> tuple[torch.Tensor, tuple]:
        groups = heads.groups
        q, kv = qkv.view(len(qkv), -1, heads.width).split((heads.queries, 2 * groups), 1)
        self.cache.index_copy_(2, self.column, kv[:, :, None])
        k, v = self.cache.split(groups, 1)
        return single_query_attention(q, k, v, self.bias, heads.scale).reshape(len(q), -1), ()


class NotCaptured(Exception):
    """Work could not be captured; the decoder's tensors are undefined."""


@dataclass
class Replayed:
    """Work over static tensors that is captured at its first call, and then replayed.

    Args:
        fresh: a context without cached casts of weights, in which a capture runs.
    """

    work: Callable[[], None]
    graphs: Graphs
    fresh: Callable[[], Any]
    notes: list[str]
    replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.replay is None:
            self.replay = capture(self.graphs, self._inside, self.notes, "generation")
            if self.replay is None:
                raise NotCaptured
            if self.graphs.captures:
                return  # the warm-up before the capture did the work of this call
        self.replay()

    def _inside(self) -> None:
        with self.fresh():
            self.work()


def lead_of(prompts: Sequence[list[int]], device: Any) -> list[int]:
    """The tokens that all prompts begin with, where they are worth feeding once: demonstrations, a system turn. None on a device whose steps are captured."""
    if torch.device(device).type in answering.STATIC or len(prompts) < 2:
        return []
    count = min(len(os.path.commonprefix(list(prompts))), min(map(len, prompts)) - 1)
    return prompts[0][:count] if count >= LEAD else []


def fed_once(forward: Callable[..., Any], lead: list[int], device: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [1, heads, P, e] by layer of a lead of P tokens; none of an empty one. forward: as Cached has it."""
    if not lead:
        return []
    cache, zero = DynamicCache(), torch.zeros(1, dtype=torch.long, device=device)
    forward(torch.tensor([lead], device=device), zero, zero + len(lead) - 1, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def greedy(make: Callable[[int, int], Decoder], fresh: Callable[[], Any], prompts: Sequence[list[int]], parts: Sequence[list[int]], new: int, device: Any,
           notes: list[str], ended: Ended | None = None) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(indices of prompts, their continuations [rows, new] padded from the end on), batch by batch.

    Args:
        make: (rows, width) -> a decoder of this shape.
        fresh: as in Replayed.
        parts: indices of prompts by batch: the batches in which generate would be called, because in 16 bits a text may depend on its batch, on the
            padding and on how many rows are multiplied at once.
        notes: takes the reason where a capture failed.
        ended: as Decoder.run has it.
    """
    batches = [(part, (len(part), max(len(prompts[i]) for i in part))) for part in parts]
    uses = Counter(shape for _, shape in batches)
    static, graphs = torch.device(device).type in answering.STATIC, Graphs(device)

    def work_of(decoder: Decoder, times: int) -> tuple[Callable[[], None], Callable[[], None]]:
        work = ((decoder.prefill, times), (decoder.step, times * (new - 1)))
        prefill, step = (Replayed(part, graphs, fresh, notes) if static and count >= PAYS else part for part, count in work)
        return prefill, step

    current: dict[tuple[int, int], tuple[Decoder, Callable[[], None], Callable[[], None]]] = {}

    def texts(mine: Sequence[list[int]], shape: tuple[int, int]) -> torch.Tensor:
        if shape not in current or not static:  # batches of a shape come one after another; one that shrinks is used once
            current.clear()
            graphs.close()
            made = make(*shape)
            current[shape] = (made, *work_of(made, uses[shape]))
        decoder, prefill, step = current[shape]
        decoder.fill(mine)
        try:
            return decoder.run(prefill, step, ended, shrinks=not static)
        except NotCaptured:
            current[shape] = (decoder, decoder.prefill, decoder.step)
            decoder.fill(mine)
            return decoder.run(decoder.prefill, decoder.step, ended)

    try:
        for part, shape in batches:
            yield part, texts([prompts[i] for i in part], shape)
    finally:
        graphs.close()


class Sampler:
    """Draws continuations of a model whose weights change between calls, over decoders that stay: on a GPU a call replays what the first one captured.

    Args:
        make: (rows, width) -> a decoder of this shape that draws.
        widths: of prompts, the longest one among them; rows: of a decoder.
        fresh, notes: as in `greedy`.
    """

    def __init__(self, make: Callable[[int, int], Decoder], widths: Sequence[int], rows: int, fresh: Callable[[], Any], device: Any, notes: list[str]) -> None:
        self.make, self.widths, self.rows, self.fresh, self.notes = make, sorted(widths), rows, fresh, notes
        self.captures, self.graphs = torch.device(device).type in answering.STATIC, Graphs(device)
        self._ready: dict[int, tuple[Decoder, Callable[[], None], Callable[[], None]]] = {}

    def draw(self, prompts: Sequence[list[int]], seed: int) -> tuple[list[list[int]], list[list[float]]]:
        """(tokens of each continuation up to and with its end, their log p). The draw is a function of the weights and the seed."""
        torch.manual_seed(seed)
        tokens: list[list[int]] = []
        nats: list[list[float]] = []
        for start in range(0, len(prompts), self.rows):
            part = list(prompts[start : start + self.rows])
            out, log_p = self._batch([*part, *([part[0]] * (self.rows - len(part)))])
            for ids, values in zip(out[: len(part)].tolist(), log_p[: len(part)].tolist(), strict=True):
                tokens.append(ids)
                nats.append(values)
        return tokens, nats

    def _batch(self, prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, prompts))
        width = next(w for w in self.widths if w >= longest)
        if width not in self._ready:
            made = self.make(self.rows, width)
            works = [Replayed(work, self.graphs, self.fresh, self.notes) if self.captures else work for work in (made.prefill, made.step)]
            self._ready[width] = (made, works[0], works[1])
        decoder, prefill, step = self._ready[width]
        decoder.fill(prompts)
        try:
            return decoder.run(prefill, step), decoder.nats
        except NotCaptured:
            self._ready[width] = (decoder, decoder.prefill, decoder.step)
            decoder.fill(prompts)
            return decoder.run(decoder.prefill, decoder.step), decoder.nats

    def close(self) -> None:
        """Give the graphs' memory back."""
        self._ready.clear()
        self.graphs.close()
