"""The configurations that the memory forecast is fitted and judged on: techniques x shapes x batch x length x checkpointing x precision.

Library of `python -m benchmarks.forecast`. The order is a seeded shuffle, so that any first part of it is spread over all axes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.speed_workloads import LLAMA3_ROPE
from benchmarks.speed_workloads import SHAPES as SPEED_SHAPES

SHAPES: dict[str, dict[str, Any]] = {
    **SPEED_SHAPES,
    "360m": {  # SmolLM2-360M
        "hidden_size": 960, "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5, "intermediate_size": 2560, "vocab_size": 49152,
        "tie_word_embeddings": True, "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "3b": {  # Llama-3.2-3B
        "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256,
        "tie_word_embeddings": True, "max_position_embeddings": 131072, "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0},
    },
}
SIZES = {
    "135m": [(16, 64), (32, 256), (8, 1024)], "360m": [(16, 128), (8, 512)], "1b": [(4, 256), (8, 1024)], "3b": [(4, 256), (8, 512)],
    "8b": [(2, 256), (4, 1024)],
}
"""(rows a step, tokens a row) by shape."""
LARGEST_FULL = ("135m", "360m", "1b", "3b")
"""Whose 16 bytes a parameter leave room on the card."""


@dataclass(frozen=True)
class Config:
    """One training to measure. more: extra overrides of the cell's config."""

    technique: str
    shape: str
    batch: int
    length: int
    """Tokens of the longest row; of every row unless ragged."""
    engine: str = "auto"
    labels: int = 8
    """Labelled tokens a row; 0: every token but the first."""
    ragged: bool = False
    """Rows from a quarter of the length up to it."""
    parts: int = 1
    """Micro-batches a step."""
    steps: int = 3
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is called in the files."""
        words = [self.technique, self.shape, f"{self.batch}x{self.length}", self.engine, f"y{self.labels or 'all'}"]
        words += ["ragged"] if self.ragged else []
        words += [f"{self.parts}parts"] if self.parts > 1 else []
        return "-".join(words + [m.rpartition(".")[2] for m in self.more])

    @property
    def overrides(self) -> list[str]:
        """Of the composed cell's config."""
        tokens = -(-self.batch // self.parts) * (self.length + 8)
        return [
            f"technique={self.technique}", f"train.batch_size={self.batch}", f"train.micro_batch_tokens={tokens}", f"train.engine={self.engine}",
            f"train.steps={self.steps}", "train.validations=1", "train.progress=false", f"train.max_length={max(self.length + 1, 512)}",
            "train.checkpoint_every_s=1e9", "tracking=none", "train.lr=1e-4", *self.more,  # a rate by the base's weights would need a base on disk
        ]

    def lengths(self) -> list[tuple[int, int]]:
        """(fed tokens, labelled ones) of every row of the training data."""
        count = self.batch * (4 if self.ragged else 1)
        draw = random.Random(self.name)
        lengths = [draw.randint(max(8, self.length // 4), self.length - 1) if self.ragged else self.length - 1 for _ in range(count)]
        return [(fed, min(fed, self.labels or fed)) for fed in lengths]


def everything() -> list[Config]:
    """All configurations, the first ones first to be measured."""
    configs = [*_main(), *_few()]
    assert len({c.name for c in configs}) == len(configs)
    random.Random(0).shuffle(configs)
    return configs


def _main() -> Iterator[Config]:
    """Every shape and size under the techniques that are used most, by both engines."""
    checkpointed = "train.checkpointing=true"
    for shape, sizes in SIZES.items():
        for number, (batch, length) in enumerate(sizes):
            every = 0 if number % 2 else 8
            at = (shape, batch, length)
            yield Config("lora", *at, labels=every)
            yield Config("lora", *at, labels=8 - every, more=("method.config.r=64",))
            yield Config("qlora", *at, labels=every)
            yield Config("prompt_tuning_random", *at)
            yield Config("ln_tuning", *at)
            yield Config("lora", *at, "eager", every)
            yield Config("qlora", *at, "eager", 8 - every)
            yield Config("lora", *at, "eager", every, more=(checkpointed,))
            if shape in LARGEST_FULL:
                yield Config("full", *at, labels=every)
                yield Config("full", *at, "eager", every)
                yield Config("full", *at, "eager", 8 - every, more=(checkpointed,))


def _few() -> Iterator[Config]:
    """What is rarer: other techniques, fp32, int8, rows of different lengths, several micro-batches a step."""
    for shape, batch, length in (("135m", 16, 128), ("1b", 4, 512)):
        for technique in ("ia3", "bitfit_added", "top_layers", "p_tuning", "lora_int8"):
            yield Config(technique, shape, batch, length)
        yield Config("qlora", shape, batch, length, "eager", more=("train.checkpointing=true",))
        yield Config("prompt_tuning_random", shape, batch, length, "eager")
        yield Config("lora", shape, batch, length, "eager", more=("method.config.lora_dropout=0.1",))
        yield Config("lora", shape, batch, length, more=("method.config.target_modules=[q_proj,v_proj]",))
    yield Config("lora_int8", "3b", 2, 256)
    for technique, shape in (("lora", "135m"), ("full", "135m"), ("lora", "360m"), ("full", "360m")):
        for engine in ("auto", "eager"):
            yield Config(technique, shape, 8, 256, engine, more=("precision=fp32",))
    for shape, batch, length, steps in (("135m", 16, 256, 60), ("360m", 16, 256, 60), ("1b", 8, 512, 8)):
        for technique, engine in (("lora", "auto"), ("lora", "eager"), ("full", "auto"), ("full", "eager"), ("qlora", "auto")):
            yield Config(technique, shape, batch, length, engine, ragged=True, steps=steps if engine == "auto" else 8)
    for technique, engine in (("lora", "auto"), ("lora", "eager"), ("full", "auto"), ("full", "eager")):
        yield Config(technique, "1b", 16, 256, engine, 8, parts=4)


def scale() -> list[Config]:
    """How time and memory grow with the model: every shape, two sizes of a step, four techniques, what will not fit among them (experiments/scale)."""
    return [Config(technique, shape, batch, length, labels=0, steps=10) for shape in SIZES for batch, length in ((4, 256), (8, 1024))
            for technique in ("full", "lora", "qlora", "prompt_tuning_random")]


def tiny() -> list[Config]:
    """A few of everything at a size that a CPU has done in seconds: the harness's own test."""
    at = ("tiny", 4, 32)
    return [
        Config("lora", *at, "eager"), Config("lora", *at, "eager", 0, ragged=True), Config("qlora", *at, "eager"), Config("full", *at, "eager", 0),
        Config("prompt_tuning_random", *at, "eager"), Config("lora", *at, "eager", parts=2), Config("ln_tuning", *at, "eager"),
        Config("lora", *at, "eager", more=("train.checkpointing=true",)), Config("lora_int8", *at, "eager"), Config("lora", *at, "fast"),
        Config("full", *at, "fast"), Config("ia3", *at, "fast"), Config("top_layers", *at, "eager", more=("method.top_layers=1",)),
    ]
