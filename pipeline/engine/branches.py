"""Many choices of a row as one tree of tokens, searched from the prompt on: branches that cannot win any more are given up.

Library of scorer.choice_log_likelihoods, on devices whose passes are not captured. A row's prompt is fed once and its keys and values are kept; then the
choice that looks best is followed to its end, and level by level those others whose tokens so far are likelier than all of the best one. A token adds at
most 0 to a choice's log-likelihood, so what is known of it bounds the rest: the answer is the one that feeding every choice gives.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pipeline.data.choices import LEAD, Contest, Items
from pipeline.data.rows import by_length, pad
from pipeline.engine.reuse import prefix_cache

MARGIN = 1e-3
"""Nats by which a choice has to be behind before it is given up: more than rounding."""
ROOT = 0


class Tree:
    """Tokens of a list of choices, each beginning once. Node 0 stands for the prompt.

    paths [C, L]: the nodes of every choice, its last one repeated; tokens, parents [N]; children: by node, the nodes that follow it.
    """

    def __init__(self, choices: Sequence[Sequence[int]]) -> None:
        nodes: dict[tuple[int, ...], int] = {(): ROOT}
        self.parents, self.tokens = [ROOT], [-1]
        for choice in choices:
            for end in range(1, len(choice) + 1):
                head = tuple(choice[:end])
                if head not in nodes:
                    nodes[head] = len(nodes)
                    self.parents.append(nodes[head[:-1]])
                    self.tokens.append(head[-1])
        most = max(map(len, choices))
        ends = [[nodes[tuple(choice[: min(end, len(choice))])] for end in range(most + 1)] for choice in choices]
        self.paths = np.array(ends)
        self.children: list[list[int]] = [[] for _ in nodes]
        for node, parent in enumerate(self.parents[1:], 1):
            self.children[parent].append(node)

    def above(self, node: int) -> list[int]:
        """The node and those that it follows, the prompt left out."""
        line = []
        while node != ROOT:
            line.append(node)
            node = self.parents[node]
        return line


class Search:
    """One row's search. `known` [N]: the log-likelihood of the tokens up to a node, where they have been read."""

    def __init__(self, tree: Tree, lengths: Sequence[int], needed: int | None) -> None:
        self.tree, self.lengths, self.needed = tree, np.asarray(lengths, dtype=float), needed
        self.known = np.full(len(tree.tokens), np.nan)
        self.known[ROOT] = 0.0
        self.columns: dict[int, int] = {}
        """Of every node that was fed: its column among the row's own keys and values."""
        self.failed = False

    def scores(self) -> list[float]:
        """Of every choice; of one that was given up, a bound that it cannot exceed."""
        return [float("nan")] * len(self.tree.paths) if self.failed else self._bounds().tolist()

    def read(self, node: int, log_p: Sequence[float]) -> None:
        """Take the log-probabilities of a node's children, in their order."""
        for child, value in zip(self.tree.children[node], log_p, strict=True):
            self.known[child] = self.known[node] + value
            self.failed = self.failed or not np.isfinite(value)

    def next(self) -> list[int]:
        """Nodes to feed, parents before their children; none where the answer is known."""
        if self.failed:
            return []
        paths, bounds = self.tree.paths, self._bounds()
        complete = ~np.isnan(self.known[paths[:, -1]])
        values = bounds / self.lengths
        followed = [] if self.needed is None or complete[self.needed] else [self.needed]
        if not complete.any():
            followed.append(int(values.argmax()))
        if followed:
            return sorted({node for choice in followed for node in paths[choice] if self._to_feed(node)})
        best = values[complete].max()
        open_ = np.flatnonzero(~complete & (values >= best - MARGIN / self.lengths))
        deepest = (~np.isnan(self.known[paths[open_]])).sum(1) - 1
        return sorted({int(paths[choice, at]) for choice, at in zip(open_, deepest, strict=True)})

    def _bounds(self) -> np.ndarray:
        bounds: np.ndarray = np.nanmin(self.known[self.tree.paths], axis=1)
        return bounds

    def _to_feed(self, node: int) -> bool:
        return node != ROOT and node not in self.columns and bool(self.tree.children[node])


@dataclass
class _Layer:
    """A layer's keys and values that all rows follow [1, heads, P, e], or None."""

    keys: torch.Tensor | None
    values: torch.Tensor | None


class _OwnLayer(DynamicLayer):
    """One layer's keys and values of every row [R, heads, W, e], after those that all rows follow."""

    def __init__(self, shared: _Layer) -> None:
        super().__init__()
        self.shared = shared

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.shared.keys is None or self.shared.values is None:
            return keys, values
        rows = len(keys)
        return torch.cat([self.shared.keys.expand(rows, -1, -1, -1), keys], 2), torch.cat([self.shared.values.expand(rows, -1, -1, -1), values], 2)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        before = 0 if self.shared.keys is None else self.shared.keys.shape[2]
        return before + (super().get_seq_length(*args, **kwargs) if self.is_initialized else 0)

    def keep(self, rows: torch.Tensor) -> None:
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


class BranchScorer:
    """Log-likelihoods of many choices a row, nats, as far as they are needed to know the answer.

    Args:
        forward: (ids [R, T], rows [N], cols [N], extra inputs of the model) -> logits [N, V] fp32.
        batch_tokens: most tokens whose keys and values are kept at once (one row's at least).
        before: makes the cache of what stands before every row, such as a soft prompt; None: nothing does. offset: its tokens.
    """

    def __init__(self, forward: Callable[..., torch.Tensor], layers: int, batch_tokens: int, pad_id: int, device: Any,
                 before: Callable[[], DynamicCache] | None = None, offset: int = 0) -> None:
        self.forward, self.layers, self.batch_tokens, self.pad_id, self.device = forward, layers, batch_tokens, pad_id, device
        self.before, self.offset = before, offset

    def scores(self, items: Items, contest: Contest) -> list[list[float]]:
        """By item, of every choice; of one that was given up a bound, which lies below the best one's score."""
        trees: dict[tuple[tuple[int, ...], ...], Tree] = {}
        searches = []
        for (_, choices), lengths, needed in zip(items, contest.lengths, contest.needed, strict=True):
            key = tuple(map(tuple, choices))
            searches.append(Search(trees.setdefault(key, trees.get(key) or Tree(choices)), lengths, needed))
        count = min(len(os.path.commonprefix([prompt for prompt, _ in items])), min(len(prompt) for prompt, _ in items) - 1)
        count = count if count >= LEAD and len(items) > 1 else 0
        shared, offset = self._shared(items[0][0][:count]), self.offset + count
        widest = max(len(tree.paths[0]) for tree in trees.values())
        lengths = [len(prompt) - count + 2 * widest + offset // 4 for prompt, _ in items]  # as passes.py counts cached tokens
        for part in by_length(lengths, self.batch_tokens):
            self._batch([items[i][0][count:] for i in part], [searches[i] for i in part], shared, offset)
        return [search.scores() for search in searches]

    def _shared(self, prefix: list[int]) -> list[_Layer]:
        if not prefix and self.before is None:
            return [_Layer(None, None)] * self.layers
        cache = prefix_cache(self.forward, prefix, self.device, self.before() if self.before else None)
        layers: list[Any] = cache.layers
        return [_Layer(layer.keys, layer.values) for layer in layers]

    def _batch(self, prompts: list[list[int]], searches: list[Search], shared: list[_Layer], offset: int) -> None:
        cache, layers = DynamicCache(), [_OwnLayer(layer) for layer in shared]
        cache.layers = list(layers)
        ids, lengths = pad(prompts, self.pad_id).to(self.device), np.array([len(prompt) for prompt in prompts])
        width = ids.shape[1]
        mask = torch.ones(width, width, dtype=torch.bool).tril().expand(len(prompts), 1, width, width)
        positions = torch.arange(offset, offset + width, device=self.device).expand(len(prompts), width)
        self._read(ids, mask, positions, cache, offset, searches, [[(int(length) - 1, ROOT)] for length in lengths])
        while True:
            asked = [search.next() for search in searches]
            active = [i for i, nodes in enumerate(asked) if nodes]
            if not active:
                return
            if len(active) < len(searches):
                for layer in layers:
                    layer.keep(torch.tensor(active, device=self.device))
                searches, lengths, asked = [searches[i] for i in active], lengths[active], [asked[i] for i in active]
            width = self._level(searches, asked, lengths, cache, offset, width)

    def _level(self, searches: list[Search], asked: list[list[int]], lengths: np.ndarray, cache: DynamicCache, offset: int, held: int) -> int:
        """Feed these nodes, after `held` own columns of every row. Returns how many there are then."""
        count = max(map(len, asked))
        ids = np.full((len(asked), count), self.pad_id)
        positions = np.full((len(asked), count), offset)
        mask = np.zeros((len(asked), 1, count, held + count), dtype=bool)
        mask[:, 0, range(count), range(held, held + count)] = True
        for row, (search, nodes, length) in enumerate(zip(searches, asked, lengths, strict=True)):
            mask[row, 0, :, :length] = True
            search.columns |= {node: held + at for at, node in enumerate(nodes)}
            for at, node in enumerate(nodes):
                line = search.tree.above(node)
                ids[row, at], positions[row, at] = search.tree.tokens[node], offset + length + len(line) - 1
                mask[row, 0, at, [search.columns[above] for above in line]] = True
        fed, places = torch.tensor(ids, device=self.device), torch.tensor(positions, device=self.device)
        self._read(fed, torch.from_numpy(mask), places, cache, offset, searches, [list(enumerate(nodes)) for nodes in asked])
        return held + count

    def _read(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, offset: int, searches: list[Search],
              at: list[list[tuple[int, int]]]) -> None:
        """One pass, and what it says of the children of the nodes `at` (by row: column, node)."""
        places = [(row, column, node) for row, some in enumerate(at) for column, node in some]
        rows, cols, _ = torch.tensor(places, device=self.device).T
        mask = torch.nn.functional.pad(mask, (offset, 0), value=True).to(self.device)
        logits = self.forward(ids, rows, cols, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        children = [searches[row].tree.children[node] for row, _, node in places]
        reads = [(place, searches[places[place][0]].tree.tokens[child]) for place, some in enumerate(children) for child in some]
        place, target = torch.tensor(reads, device=self.device).T
        log_p = (logits[place, target] - torch.logsumexp(logits, -1)[place]).double().tolist()
        done = 0
        for (row, _, node), some in zip(places, children, strict=True):
            searches[row].read(node, log_p[done : done + len(some)])
            done += len(some)
