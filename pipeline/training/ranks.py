"""The processes of one training over several GPUs (`train.parallel`): who has which rows of a step, and what is summed over all of them.

Library. A rank is a process with one GPU (on the CPU: a process). NCCL sums what lies on GPUs, gloo what lies on the CPU; what the ranks agree on (whether
to stop, what validation said) goes through gloo, which waits as long as it takes: whoever started the ranks sees one die and ends them (cell/launch.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pipeline.core.settings import Train
from pipeline.data.rows import Batch, Encoded, by_length, collate, labelled_tokens

COLLECTIVE_S = 900
"""Seconds after which a sum over GPUs that one of them does not take part in is an error."""
AGREEMENT_S = 7 * 24 * 3600
"""The same of an agreement: the others wait for the first one's validation."""
BUCKET = 2**26
"""Numbers that are summed in one call, at most: what a copy of the gradients takes."""


@dataclass(frozen=True)
class Place:
    """Which of how many ranks a process is. local: its GPU on this machine; meeting: where the ranks find each other, as torch.distributed's init_method."""

    rank: int
    count: int
    local: int
    meeting: str = "env://"


def of_torchrun() -> Place | None:
    """The place that torchrun gave this process; None: it did not start it."""
    try:
        rank, count, local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return Place(rank, count, local)
    except (KeyError, ValueError):
        return None


class Ranks:
    """One of `count` ranks, as training sees it; by itself (ALONE) it is the only one, and nothing is sent."""

    def __init__(self, rank: int = 0, count: int = 1, control: Any = None) -> None:
        self.rank, self.count, self._control = rank, count, control

    @classmethod
    def join(cls, place: Place, device: str) -> Ranks:
        """Meet the others. device: cpu or cuda, whose GPU becomes the process's current one."""
        import torch
        import torch.distributed as dist

        if device == "cuda":
            torch.cuda.set_device(place.local)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=place.meeting, rank=place.rank, world_size=place.count,
                                timeout=timedelta(seconds=COLLECTIVE_S))
        return cls(place.rank, place.count, dist.new_group(backend="gloo", timeout=timedelta(seconds=AGREEMENT_S)))

    @property
    def leads(self) -> bool:
        """Whether it is the one that validates, evaluates and writes."""
        return self.rank == 0

    @property
    def joined(self) -> bool:
        """Whether there is a process group, if only of one."""
        return self._control is not None

    @property
    def control(self) -> Any:
        """The process group of agreements (gloo)."""
        return self._control

    def seed(self, seed: int, step: int = 0) -> int:
        """For this rank's noise (dropout), from optimiser step `step` on; the first one's is the run's own."""
        return seed if self.leads and not step else (seed + self.rank * 0x9E3779B97F4A7C15 + step * 0xC2B2AE3D27D4EB4F) % 2**63

    # -- a step's rows

    def share(self, examples: Sequence[Encoded], rank: int | None = None) -> list[Encoded]:
        """This rank's part of a step's examples: dealt out longest first, back and forth, so that all have about as many tokens. rank: another's."""
        if self.count == 1:
            return list(examples)
        mine = self.rank if rank is None else rank
        order = sorted(range(len(examples)), key=lambda i: -examples[i].tokens)
        dealt = (order[lo : lo + self.count][:: -1 if lo // self.count % 2 else 1] for lo in range(0, len(order), self.count))
        whole = [part + [-1] * (self.count - len(part)) if lo % 2 == 0 else [-1] * (self.count - len(part)) + part for lo, part in enumerate(dealt)]
        return [examples[part[mine]] for part in whole if part[mine] >= 0]

    def batches(self, examples: Sequence[Encoded], settings: Train, pad_id: int) -> Iterator[Batch]:
        """The micro-batches of this rank's part of a step, weighted over the whole step; every rank has as many, the last of some with weights of 0."""
        counts = labelled_tokens(examples)
        cut = [[[share[i] for i in part] for part in by_length([e.tokens for e in share], settings.micro_batch_tokens)]
               for share in (self.share(examples, rank) for rank in range(self.count))]
        for part in cut[self.rank]:
            yield collate(part, counts, pad_id)
        for _ in range(max(map(len, cut)) - len(cut[self.rank])):
            idle = collate([min(examples, key=lambda e: e.tokens)], counts, pad_id)
            idle.weights.zero_()
            idle.tokens = 0
            yield idle

    # -- sums on the device

    def sum_(self, tensors: Iterable[Any]) -> None:
        """Replace tensors, of the same shapes on every rank, by their sums over the ranks."""
        if self.count == 1:
            return
        import torch
        import torch.distributed as dist

        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0])
                continue
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _part(self, flat: Any) -> Any:
        """This rank's part of a flat tensor of `count` equal ones."""
        size = flat.numel() // self.count
        return flat[self.rank * size : (self.rank + 1) * size]

    def sum_part_(self, flat: Any) -> None:
        """Replace this rank's part of a flat tensor by its sum over the ranks; the other parts are lost."""
        import torch
        import torch.distributed as dist

        mine = self._part(flat)
        to = mine if flat.is_cuda else torch.empty_like(mine)  # NCCL sums in place
        dist.reduce_scatter_tensor(to, flat)
        if to is not mine:
            mine.copy_(to)

    def gather_(self, flat: Any) -> None:
        """Replace every part of a flat tensor by that of the rank whose it is."""
        import torch.distributed as dist

        mine = self._part(flat)
        dist.all_gather_into_tensor(flat, mine if flat.is_cuda else mine.clone())

    def from_first_(self, tensors: Iterable[Any]) -> None:
        """Give tensors the first rank's values."""
        if self.count == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor, 0)

    # -- agreements

    def totals(self, values: Sequence[float]) -> list[float]:
        if self.count == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self._control)
        return sums.tolist()

    def from_first(self, value: Any) -> Any:
        """The first rank's value (plain data)."""
        return self.gathered(value)[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value (plain data), in order."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.count
        dist.all_gather_object(values, value, group=self._control)
        return values

    def leave(self) -> None:
        """Part, once all are here."""
        if self._control is None:
            return
        import torch.distributed as dist

        dist.barrier(group=self._control)
        dist.destroy_process_group()
        self._control = None


def _buckets(tensors: Iterable[Any]) -> Iterator[list[Any]]:
    """Neighbours of one dtype together, at most BUCKET numbers (one tensor at least)."""
    bucket: list[Any] = []
    for tensor in tensors:
        if bucket and (bucket[0].dtype != tensor.dtype or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


ALONE = Ranks()
