"""A teacher's distributions at the labelled tokens: asked at every step, kept as logits, or kept as what its output layer is given.

    python -m benchmarks.teaching [rows] [batch rows] [task] [key=value …]

Needs the task (vader_movies_5) prepared and the default model, which teaches itself here. Prints, for each way: seconds before training, bytes kept,
and seconds a step spends on the teacher (the student's own step is not in it). Three epochs over the rows; medians of the steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.compose import compose
from pipeline.core.files import read_jsonl
from pipeline.core.settings import read
from pipeline.data.rows import Batch, Encoder, Example, collate, epoch_order
from pipeline.measure.clock import Stopwatch
from pipeline.measure.machine import hardware
from pipeline.models.base import autocast, device_of, load_model, load_tokenizer, resolve
from pipeline.scoring.scorer import logits_at

EPOCHS = 3


def batches(examples: Sequence[Any], size: int, pad_id: int, device: Any) -> list[tuple[list[int], Batch]]:
    """The steps of all epochs: (rows, their batch)."""
    encoded = []
    for epoch in range(EPOCHS):
        order = list(epoch_order(len(examples), 0, epoch))
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        encoded += [(part, collate([examples[i] for i in part], {"label": 1}, pad_id).to(device)) for part in parts]
    return encoded


def timed(steps: Sequence[tuple[list[int], Batch]], ask: Callable[[list[int], Batch], Any], device: Any) -> float:
    """Median seconds of asking for a step's distributions."""
    ask(*steps[0])
    watch, seconds = Stopwatch(device), []
    for step in steps:
        watch.lap()
        ask(*step)
        seconds.append(watch.lap())
    return sorted(seconds)[len(seconds) // 2]


def main(rows: int = 64, size: int = 16, task: str = "vader_movies_5", paths: Sequence[str] = ()) -> None:
    """Print a line a way."""
    import torch

    cfg = compose([f"task={task}", *paths])
    settings, device = read(cfg), device_of("auto")
    dtype, folder = resolve(settings.precision, device)[1], Path(cfg.paths.models) / cfg.model.name
    model, encoder = load_model(folder, settings.precision, device), Encoder(load_tokenizer(folder), settings.task, 512, "truncate")
    read_rows = read_jsonl(Path(cfg.paths.data) / task / "train.jsonl")[:rows]
    examples = [encoder.example(Example(r["prompt"], r["answer"], ends=settings.task.scoring == "generate")) for r in read_rows]
    steps = batches(examples, size, encoder.pad_id, device)
    inputs: list[torch.Tensor] = []
    layer = model.get_output_embeddings()
    layer.register_forward_hook(lambda _, args, out: inputs.append(args[0].detach()))

    def fresh(_: list[int], batch: Batch) -> Any:
        inputs.clear()
        with torch.inference_mode(), autocast(device, dtype):
            return logits_at(model, batch.input_ids, batch.rows, batch.cols)

    logits: dict[int, Any] = {}
    hidden: dict[int, Any] = {}
    watch = Stopwatch(device)
    for part, batch in steps[: len(steps) // EPOCHS]:
        made, lengths = fresh(part, batch), torch.bincount(batch.rows).tolist()
        logits |= dict(zip(part, made.to(dtype).cpu().split(lengths), strict=True))
        hidden |= dict(zip(part, inputs[-1].cpu().split(lengths), strict=True))
    once = watch.lap()

    def of_logits(part: list[int], _: Batch) -> Any:
        return torch.cat([logits[i] for i in part]).to(device).float()

    def of_hidden(part: list[int], _: Batch) -> Any:
        with torch.inference_mode():
            return layer(torch.cat([hidden[i] for i in part]).to(device)).float()

    size_of: Callable[[dict[int, Any]], int] = lambda kept: sum(t.numel() * t.element_size() for t in kept.values())  # noqa: E731
    head = layer.weight.numel() * layer.weight.element_size()
    ways = (("asked at every step", 0.0, 0, fresh), ("logits kept", once, size_of(logits), of_logits), ("states kept", once, size_of(hidden) + head, of_hidden))
    print(f"{rows} rows of {task}, {sum(len(e.ids) - e.start for e in examples)} labelled tokens, {size} rows a step; {hardware(device.type)['gpu'] or 'CPU'}")
    for name, before, stored_bytes, ask in ways:
        print(f"{name:22}before {before:7.2f} s   kept {stored_bytes / 2**20:8.1f} MiB   a step {1000 * timed(steps, ask, device):8.2f} ms")


if __name__ == "__main__":
    words = [a for a in sys.argv[1:] if "=" not in a]
    task = words[2] if len(words) > 2 else "vader_movies_5"
    main(int(words[0]) if words else 64, int(words[1]) if len(words) > 1 else 16, task, [a for a in sys.argv[1:] if "=" in a])
