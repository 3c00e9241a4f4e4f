"""The scorer of choices: log-probabilities from forward passes of any causal language model; on a GPU over few static shapes, captured.

Library. `ChoiceScorer` feeds what pipeline/data/choices.py arranges to a model as it stands, to an adapter a row, or to several adapters at once. A batch
of a shape that comes often is padded to that shape and its CUDA graph replayed; all others run as they are. A capture that fails is noted, and
the passes go on without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.core import progress
from pipeline.data.choices import Group, Items, Reads, Row, arrange
from pipeline.data.rows import by_length
from pipeline.engine import answering
from pipeline.engine.graphs import Graphs
from pipeline.engine.layout import GRAIN, choose_widths
from pipeline.engine.reuse import SoftPrompt, prefix_cache
from pipeline.measure import turns
from pipeline.models.base import parameters

MOST_WIDTHS, GRAINS = 8, 16  # shapes to choose, out of so many candidates
CAPTURE = 4  # passes that the host launches in the time of one capture
LAYER_S, HANDWRITTEN_S, RATE = 5e-4, 1.5e-4, 2e14  # to estimate when captures pay: seconds to launch a layer (transformers', hand-written), FLOP/s


def pass_tokens(model: Any, layer_s: float = LAYER_S) -> float:
    """An estimate of the tokens that the device computes while the host launches one pass: with fewer in a batch, the device waits."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    return layers * layer_s * RATE / (2 * parameters(model)[1])


def choose_batches(lengths: Sequence[int], batch_tokens: int, pass_tokens: float, extra: int = 0) -> list[tuple[list[int], int, int]]:
    """(indices, rows, width) by batch: padded to [rows, width] and captured, or run as it is where both are 0.

    The number of shapes is the one with the least work, counting captures and passes in which the device waits.

    Args:
        pass_tokens: of the function of this name; 0: nothing is captured.
        extra: tokens that every row counts in addition to its own.
    """
    best = _eager(lengths, range(len(lengths)), batch_tokens, pass_tokens, extra)
    grain = GRAIN * math.ceil(max(lengths) / (GRAIN * GRAINS))
    needed: dict[int, int] = {}
    for length in lengths:
        width = grain * math.ceil(length / grain)
        needed[width] = needed.get(width, 0) + 1
    for count in range(1, min(MOST_WIDTHS, len(needed)) + 1) if pass_tokens else ():
        widths = choose_widths(needed, count)
        cost = 0.0
        batches: list[tuple[list[int], int, int]] = []
        for low, width in zip([0, *widths], widths, strict=False):
            rows = [i for i, length in enumerate(lengths) if low < length <= width]
            choice = min(_static(rows, width, batch_tokens, pass_tokens, extra), _eager(lengths, rows, batch_tokens, pass_tokens, extra), key=lambda x: x[0])
            cost, batches = cost + choice[0], batches + choice[1]
        best = min(best, (cost, batches), key=lambda x: x[0])
    return best[1]


def _static(rows: list[int], width: int, batch_tokens: int, pass_tokens: float, extra: int) -> tuple[float, list[tuple[list[int], int, int]]]:
    count = max(1, min(batch_tokens // (width + extra), len(rows)))
    batches = [(rows[i : i + count], count, width) for i in range(0, len(rows), count)]
    return CAPTURE * pass_tokens + len(batches) * count * (width + extra), batches


def _eager(lengths: Sequence[int], rows: Sequence[int], batch_tokens: int, pass_tokens: float, extra: int) -> tuple[float, list[tuple[list[int], int, int]]]:
    parts = [[rows[i] for i in part] for part in by_length([lengths[i] + extra for i in rows], batch_tokens)]
    cost = sum(max(len(part) * (max(lengths[i] for i in part) + extra), pass_tokens) for part in parts)
    return cost, [(part, 0, 0) for part in parts]


@dataclass(frozen=True)
class Shape:
    """Of a batch: ids [rows, width], positions whose logits are needed [places], log-probabilities [reads]; masked: with mask and position ids."""

    rows: int
    width: int
    places: int
    reads: int
    masked: bool

    @classmethod
    def of(cls, rows: Sequence[Row], masked: bool, grain: int = 1) -> Shape:
        """The smallest that holds the rows, its width a multiple of `grain`."""
        width = max(len(r.ids) for r in rows)
        return cls(len(rows), width + -width % grain, sum(map(_places, rows)), sum(len(r.reads) for r in rows), masked)


def _places(row: Row) -> int:
    return len({column for column, _, _ in row.reads})


class Inputs:
    """A batch on the device, int64: ids, positions [rows, width]; logits are needed at (rows, cols) [places]; the number in `inverse` [reads] is the place
    of log p of the id in `targets` [reads]. mask [rows, 1, width, width] bool: True where a token attends to another; None: causal."""

    def __init__(self, shape: Shape, device: Any) -> None:
        self.shape = shape
        size = shape.rows * shape.width
        self._whole = torch.zeros(2 * size + 2 * shape.places + 2 * shape.reads, dtype=torch.long, device=device)
        ids, positions, self.rows, self.cols, self.inverse, self.targets = self._whole.split([size] * 2 + [shape.places] * 2 + [shape.reads] * 2)
        self.ids, self.positions = ids.view(shape.rows, shape.width), positions.view(shape.rows, shape.width)
        self.mask = torch.zeros(shape.rows, 1, shape.width, shape.width, dtype=torch.bool, device=device) if shape.masked else None

    def fill(self, rows: Sequence[Row], pad_id: int, offset: int) -> None:
        """Put rows in, at most as many as the shape has; `offset` cached tokens precede them. Returns before the copy has happened."""
        host = torch.zeros(len(self._whole), dtype=torch.long, pin_memory=self._whole.is_cuda)
        sizes = np.cumsum([self.ids.numel(), self.ids.numel(), len(self.rows), len(self.cols), len(self.inverse)])
        ids, positions, *marks = np.split(host.numpy(), sizes)
        ids, positions = ids.reshape(self.ids.shape), positions.reshape(self.ids.shape)
        ids[:] = pad_id
        positions[:] = offset + np.arange(ids.shape[1])
        places: dict[tuple[int, int], int] = {}
        inverse, targets = [], []
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = row.ids
            positions[number, len(row.ids) :] = offset  # of padding: a model with a table of positions may have none so far on
            for column, target, _ in row.reads:
                inverse.append(places.setdefault((number, column), len(places)))
                targets.append(target)
            for column, parent in enumerate(row.parents, row.trunk):
                positions[number, column] = positions[number, parent] + 1
        for mark, values in zip(marks, ([n for n, _ in places], [c for _, c in places], inverse, targets), strict=True):
            mark[: len(values)] = values
        self._whole.copy_(host, non_blocking=True)
        if self.mask is not None:
            self.mask.copy_(_mask(rows, self.mask.shape, self._whole.is_cuda), non_blocking=True)

    def extra_inputs(self, past: Any, offset: int) -> dict[str, Any]:
        """The model's inputs besides ids, rows and cols. past: keys and values of the `offset` cached tokens, or None."""
        if self.mask is None:
            return {}
        mask = torch.nn.functional.pad(self.mask, (offset, 0), value=True)
        return {"attention_mask": mask, "position_ids": self.positions} | ({} if past is None else {"past_key_values": past, "use_cache": True})


def _mask(rows: Sequence[Row], shape: Sequence[int], pinned: bool) -> torch.Tensor:
    """The mask [rows, 1, width, width] on the host: a token attends to its row's trunk, its ancestors and itself."""
    host = torch.ones(shape[-1], shape[-1], dtype=torch.bool).tril().expand(shape).clone()
    mask = host.numpy()[:, 0]
    for number, row in enumerate(rows):
        for column, parent in enumerate(row.parents, row.trunk):
            mask[number, column, row.trunk : column] = mask[number, parent, row.trunk : column] if parent >= row.trunk else False
    return host.pin_memory() if pinned else host


def capture(graphs: Graphs, work: Callable[[], Any], notes: list[str], what: str) -> Callable[[], None] | None:
    """graphs.capture, or None with a note where that fails."""
    try:
        return graphs.capture(work)
    except RuntimeError as error:
        note = f"{what}: eager, because the capture failed ({str(error).splitlines()[0]})"
        notes.extend([note] if note not in notes else [])
        return None


def log_probabilities(forward: Callable[..., torch.Tensor], inputs: Inputs, **extra: Any) -> torch.Tensor:
    """log p of the inputs' targets [1, reads] fp32. forward: (ids [B, T], rows [N], cols [N], extra inputs of the model) -> logits [N, V] fp32."""
    logits = forward(inputs.ids, inputs.rows, inputs.cols, **extra)
    return torch.log_softmax(logits, -1)[inputs.inverse, inputs.targets][None]


def log_probabilities_apiece(forward: Callable[..., torch.Tensor], inputs: Inputs, **extra: Any) -> torch.Tensor:
    """As log_probabilities, with logits made for each read, also where several are of one position: a product over fewer rows may round otherwise, and
    served scores are to stay bit for bit."""
    logits = forward(inputs.ids, inputs.rows[inputs.inverse], inputs.cols[inputs.inverse], **extra)
    return torch.log_softmax(logits, -1).gather(1, inputs.targets[:, None]).t()


class ChoiceScorer:
    """Log-likelihoods of choices, nats: under each of K adapters at once, or under one, which may differ from row to row.

    Args:
        forward: the model, as `log_p` takes it.
        batch_tokens: most tokens of a pass (one row at least).
        log_p: (forward, inputs, extra inputs of the model) -> log p of the inputs' targets by adapter [K, reads].
        model: to estimate where captured passes pay; None: nothing is captured.
        fresh: a context without cached casts of weights, in which a capture runs.
        notes: takes the reason where a capture failed.
        owners: by item, PEFT's name of the adapter that answers it (only without `model`); (): the model as it stands answers all.
        grain: widths are padded to multiples of it.
        soft: the model's soft prompt, which is then fed once, and the pass over the model without it.
    """

    def __init__(self, forward: Any, batch_tokens: int, pad_id: int, device: Any, *, log_p: Callable[..., torch.Tensor] = log_probabilities, model: Any = None,
                 fresh: Callable[[], Any] = nullcontext, notes: list[str] | None = None, owners: Sequence[str] = (), grain: int = 1,
                 soft: tuple[SoftPrompt, Callable[..., torch.Tensor]] | None = None) -> None:
        self.soft = soft
        self.forward, self.log_p, self.fresh, self.batch_tokens, self.pad_id, self.device = forward, log_p, fresh, batch_tokens, pad_id, device
        self.notes, self.owners, self.grain, self.graphs = [] if notes is None else notes, owners, grain, Graphs(device)
        layer_s = HANDWRITTEN_S if isinstance(forward, answering.Forward) else LAYER_S
        self.pass_tokens = pass_tokens(model, layer_s) if model is not None and torch.device(device).type in answering.STATIC else 0.0

    def scores(self, items: Items, refused: Callable[[Sequence[Group]], str | None] | None = None) -> list[list[list[float]]]:
        """By adapter and item: the sum of token log-probabilities of every choice after its prompt, nats.

        Args:
            refused: gives the reason why rows may not share tokens (None: they may), called where sharing would save enough; None: nothing is shared.
        """
        reads = Reads.of(items)
        groups = reads.apart() if refused is None else arrange(reads, items, soft=self.soft is not None)
        if refused is not None and any(group.shares for group in groups) and refused(groups):
            groups = reads.apart()
        return [reads.by_item(sums) for sums in self.sums(groups, len(reads.places))]

    def sums(self, groups: Sequence[Group], places: int) -> list[list[float]]:
        """By adapter and place: the sum of log p that the groups' rows have for it, nats."""
        parts: list[torch.Tensor] = []
        at: list[int] = []
        every, answered = sum(len(group.rows) for group in groups), 0
        for group in groups:
            for rows, values in self._group(group):
                progress.part(answered := answered + len(rows), every)
                turns.point()
                parts.append(values)
                at.extend(place for row in rows for _, _, place in row.reads)
        into, values = torch.tensor(at, dtype=torch.long), torch.cat(parts, 1) if parts else torch.zeros(1, 0)
        return [torch.zeros(places, dtype=torch.float64).index_add_(0, into, one).tolist() for one in values.double().cpu()]

    def close(self) -> None:
        """Give the graphs' memory back."""
        self.graphs.close()

    def _group(self, group: Group) -> Iterator[tuple[list[Row], torch.Tensor]]:
        offset, masked = len(group.prefix), group.shares
        forward, past = self.forward, None
        if group.soft and self.soft:
            soft, forward = self.soft
            offset, past = offset + soft.tokens, prefix_cache(forward, group.prefix, self.device, soft.cache())
        elif group.prefix:
            past = prefix_cache(forward, group.prefix, self.device)
        captured: dict[int, tuple[Inputs, torch.Tensor, Callable[[], None]] | None] = {}
        # a cached token costs its keys and values alone: counted as a quarter
        batches = choose_batches([len(row.ids) for row in group.rows], self.batch_tokens, self.pass_tokens, offset // 4)
        for part, count, width in batches:
            rows = [group.rows[i] for i in part]
            if width and width not in captured:
                every = [group.rows[i] for other, _, w in batches for i in other if w == width]
                shape = Shape(count, width, count * max(map(_places, every)), count * max(len(r.reads) for r in every), masked)
                captured[width] = self._capture(shape, rows, past, offset)
            if not (static := captured.get(width)):
                inputs = Inputs(Shape.of(rows, masked, self.grain), self.device)
                inputs.fill(rows, self.pad_id, offset)
                named = {"adapter_names": [self.owners[row.item] for row in rows]} if self.owners else {}
                yield rows, self.log_p(forward, inputs, **inputs.extra_inputs(past, offset), **named)
                continue
            inputs, out, replay = static
            inputs.fill(rows, self.pad_id, offset)
            replay()
            yield rows, out[:, : sum(len(r.reads) for r in rows)].clone()

    def _capture(self, shape: Shape, rows: list[Row], past: Any, offset: int) -> tuple[Inputs, torch.Tensor, Callable[[], None]] | None:
        inputs, out = Inputs(shape, self.device), torch.zeros(1, shape.reads, device=self.device)
        inputs.fill(rows, self.pad_id, offset)

        def work() -> None:
            with self.fresh():
                out.copy_(self.log_p(self.forward, inputs, **inputs.extra_inputs(past, offset)))

        replay = capture(self.graphs, work, self.notes, "choice scoring")
        return replay and (inputs, out, replay)
