"""Log p of texts as they are drawn and as they are trained on, and where the two part first: for tests on a CPU and on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pipeline.engine import bind, invariant, llama, ops
from pipeline.engine.answering import Forward
from pipeline.engine.decode import Handwritten, Sampler

PAD = 0


@dataclasses.dataclass
class Drawer:
    """Draws texts from a bound model by captured decoding (which a CPU calls anew): `new` tokens after each prompt, of which some are kept."""

    bound: bind.Bound
    prompts: Sequence[list[int]]
    new: int

    def __post_init__(self) -> None:
        self.device = self.bound.llama.embedding.device
        longest = max(map(len, self.prompts))
        self.notes: list[str] = []
        self.sampler = Sampler(self.decoder, [8, -(-longest // 16) * 16], -(-len(self.prompts) // 2), contextlib.nullcontext, self.device, self.notes)

    def decoder(self, rows: int, width: int) -> Handwritten:
        return Handwritten(Forward(self.bound.llama), rows, width, self.new, None, PAD, self.device, temperature=1.0)

    def draw(self, seed: int) -> tuple[list[list[int]], list[list[float]]]:
        """(texts: each prompt and what was drawn after it, log p of the latter)."""
        with torch.no_grad():
            tokens, nats = self.sampler.draw(self.prompts, seed)
        kept = [1 + (self.new - 1) * ((r + seed) % 4) // 3 for r in range(len(tokens))]
        return [[*p, *ids[:k]] for p, ids, k in zip(self.prompts, tokens, kept, strict=True)], [n[:k] for n, k in zip(nats, kept, strict=True)]


def padded(texts: Sequence[list[int]], prompts: Sequence[list[int]], device: Any, more: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids [R, T], at, targets) of the drawn tokens, T a multiple of 8 and `more`, as training's batches have them."""
    width = max(map(len, texts)) - 1 + more
    width += -width % 8
    ids = torch.full((len(texts), width), PAD)
    at, targets = [], []
    for r, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        ids[r, : len(text) - 1] = torch.tensor(text[:-1])
        at += range(r * width + len(prompt) - 1, r * width + len(text) - 1)
        targets += text[len(prompt) :]
    return ids.to(device), torch.tensor(at, device=device), torch.tensor(targets, device=device)


def by_text(values: torch.Tensor, like: Sequence[Sequence[float]]) -> list[list[float]]:
    return [part.tolist() for part in values.cpu().split([len(one) for one in like])]


def stepped(bound: bind.Bound, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """log p [M] as the training step's forward pass has it; gradients of its sum are written."""
    return -bound.llama.step(*batch, torch.ones(len(batch[1]), device=batch[0].device))


def learn(bound: bind.Bound, rate: float) -> None:
    """An optimiser step by the gradients as they are."""
    bound.buffer.lr.fill_(rate)
    bound.buffer.update()


Seen = list[tuple[str, torch.Tensor]]


@contextlib.contextmanager
def traced(model: llama.Llama) -> Iterator[Seen]:
    """(part, its output) of everything that a forward pass computes, in order, while the context lasts."""
    names: dict[int, str] = {id(model.norm): "last norm"}
    for number, layer in enumerate(model.layers):
        names |= {id(part): f"layer {number} {name}" for name, part in vars(layer).items() if isinstance(part, llama.Norm | llama.Linears)}
    seen: Seen = []
    with contextlib.ExitStack() as stack:

        def patch(owner: Any, name: str, label: Any, of: Any = lambda args, out: out) -> None:
            inner = getattr(owner, name)

            def outer(*args: Any, **named: Any) -> Any:
                out = inner(*args, **named)
                seen.append((label(args), of(args, out).clone()))
                return out

            setattr(owner, name, outer)
            stack.callback(setattr, owner, name, inner)

        def after(what: str) -> Any:
            return lambda _: " ".join([*seen[-1][0].split()[:2], what])

        patch(llama.Norm, "forward", lambda args: names.get(id(args[0]), "norm"), lambda _, out: out[0])
        patch(llama.Linears, "forward", lambda args: names.get(id(args[0]), "linear"), lambda _, out: out[0])
        patch(llama.Llama, "_vocabulary", lambda _: "logits")
        patch(ops, "swiglu", after("activation"))
        patch(ops, "rotate_", after("rotation"), lambda args, _: args[0])
        patch(ops, "head_norms_", after("norms of heads"), lambda args, _: args[0])
        patch(invariant, "attention", after("attention"), lambda _, out: out[0])
        yield seen


class Told(Handwritten):
    """Takes the tokens of `texts` in turn, as if they were drawn."""

    texts: torch.Tensor

    def choose(self, logits: torch.Tensor) -> None:
        self.token.copy_(self.texts.index_select(1, self.slot))
        self.slot.add_(1)


def explained(drawer: Drawer, texts: Sequence[list[int]]) -> str:
    """Where the numbers of drawing and of training part first, by part of the model in the order in which it is computed."""
    device, rows = drawer.device, len(texts)
    width = -(-max(map(len, drawer.prompts)) // 16) * 16
    decoder = Told(Forward(drawer.bound.llama), rows, width, drawer.new, None, PAD, device, temperature=1.0)
    said = [text[len(p) :] for text, p in zip(texts, drawer.prompts, strict=True)]
    decoder.texts = torch.tensor([[*ids, *[PAD] * (drawer.new - len(ids))] for ids in said], device=device)
    batch = padded(texts, drawer.prompts, device)
    with torch.no_grad():
        decoder.fill(drawer.prompts)
        with traced(drawer.bound.llama) as first:
            decoder.prefill()
        steps = []
        for _ in range(drawer.new - 1):
            with traced(drawer.bound.llama) as seen:
                decoder.step()
            steps.append(seen)
        with traced(drawer.bound.llama) as trained:
            stepped(drawer.bound, batch)
    ends = [sum(map(len, said[:r])) for r in range(rows)]
    lines = []
    for number, (name, values) in enumerate(trained):
        pairs: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        for r, (text, prompt) in enumerate(zip(texts, drawer.prompts, strict=True)):
            start = width - len(prompt)
            if name in ("last norm", "logits"):
                mine, drawn = values[ends[r] : ends[r] + len(said[r])], first[number][1][r : r + 1]
            else:
                mine, drawn = values.reshape(rows, len(values) // rows, -1)[r, len(prompt) - 1 : len(text) - 1], first[number][1].reshape(rows, width, -1)[r]
                pairs.append((f"text {r}, prompt", values.reshape(rows, len(values) // rows, -1)[r, : len(prompt)], drawn[start:]))
                drawn = drawn[-1:]
            later = [seen[number][1].reshape(rows, -1)[r] for seen in steps[: len(said[r]) - 1]]
            pairs.append((f"text {r}, drawn", mine.reshape(len(said[r]), -1), torch.stack([drawn.reshape(-1), *later])))
        apart = [(where, int((one != other).sum()), float((one.float() - other.float()).abs().max())) for where, one, other in pairs]
        bad = [one for one in apart if one[1]]
        if bad:
            most, count = max(bad, key=lambda one: one[2]), sum(count for _, count, _ in bad)
            lines.append(f"{name}: {count} numbers in {len(bad)} of {len(apart)} places, first {bad[0][0]}, at most {most[2]:.3g} ({most[0]})")
    return "\n".join(lines[:20]) or "all parts of the model are equal: what is left is log p of given logits, or the capture"
