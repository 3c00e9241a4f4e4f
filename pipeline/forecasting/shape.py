"""A model's shape, from its config.json alone: widths, parameters, and the tensors that a precision holds them in.

Library. The architectures of the hand-written step; another one has no forecast, and says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, read_object
from pipeline.engine import families

LLAMAS = ("llama", "mistral", "qwen2")
"""Architectures of Llama's modules, whose steps under autograd are known, too."""
HEAD = {"qwen3": 128, "gemma3_text": 256}
"""Width of a head where a config does not say, and it is not its share of the model's."""
BLOCK, OUTER_BLOCK = 64, 256
"""bitsandbytes: 4-bit values to a scale, and scales to a scale of theirs."""


class NoForecast(Exception):
    """Why nothing can be said, one clause; a guess would be worse."""


@dataclass(frozen=True)
class Shape:
    """d width, L layers, H query heads and G key-value heads of `head` numbers, f inner width, V vocabulary."""

    width: int
    layers: int
    heads: int
    groups: int
    head: int
    inner: int
    vocabulary: int
    tied: bool = True
    biases: tuple[str, ...] = ()
    """Linear maps of a layer that have one."""
    context: int | None = None
    stored: int = 4
    """Bytes of a number in the model's file."""
    family: str = "llama"
    """transformers' model_type."""
    window: int = 0
    """Tokens that a token attends to in layers with a sliding window; 0: there are none."""
    by_hand: bool = True
    """Whether the hand-written step has what the config asks for."""

    @property
    def linears(self) -> tuple[str, ...]:
        """A layer's linear maps."""
        return tuple(name for _, names in families.FAMILIES[self.family].groups for name in names)

    @property
    def norms(self) -> dict[str, int]:
        """A layer's norms and their numbers."""
        family = families.FAMILIES[self.family]
        every = ["norm1", "norm2", *(["after1", "after2"] if family.after else [])]
        return dict.fromkeys(every, self.width) | (dict.fromkeys(["q_norm", "k_norm"], self.head) if family.head_norms else {})

    def linear(self, name: str) -> tuple[int, int]:
        """(in, out) of one of a layer's linear maps."""
        d, q, k = self.width, self.heads * self.head, self.groups * self.head
        return {"q_proj": (d, q), "k_proj": (d, k), "v_proj": (d, k), "o_proj": (q, d),
                "gate_proj": (d, self.inner), "up_proj": (d, self.inner), "down_proj": (self.inner, d),
                "qkv_proj": (d, q + 2 * k), "gate_up_proj": (d, 2 * self.inner)}[name]

    @property
    def layer_matrices(self) -> int:
        return sum(i * o for i, o in map(self.linear, self.linears))

    @property
    def layer_biases(self) -> int:
        return sum(self.linear(name)[1] for name in self.biases)

    @property
    def parameters(self) -> int:
        """Of the model; tied weights count once."""
        layer = self.layer_matrices + self.layer_biases + sum(self.norms.values())
        return self.layers * layer + self.width + self.vocabulary * self.width * (1 if self.tied else 2)


def read_shape(path: Path) -> Shape:
    """The shape that a config.json describes.

    Raises:
        UserError: no such file, or no model's. NoForecast: another architecture.
    """
    if not path.exists():
        raise UserError(f"{path} is not there; run python -m pipeline.base_model for it, or set forecast.model_config to a model's config.json")
    try:
        shape = shape_of(read_object(path))
        counts = {f.name: getattr(shape, f.name) for f in dataclasses.fields(shape) if f.type == "int"}
        wrong = next((name for name, value in counts.items() if type(value) is not int or value < (name != "window")), None)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no config.json of a model ({type(error).__name__}: {error}); run python -m pipeline.base_model for it") from error
    if wrong:
        raise UserError(f"{path} is no config.json of a model (its {wrong} is {getattr(shape, wrong)!r}); run python -m pipeline.base_model for it")
    return shape


def shape_of(config: dict[str, Any]) -> Shape:
    """As read_shape, from the file's content."""
    kind = str(config.get("model_type"))
    if kind not in families.FAMILIES:
        raise NoForecast(f"no forecast for the architecture {kind}; there is one for {', '.join(families.FAMILIES)}")
    heads = config["num_attention_heads"]
    qkv = ("q_proj", "k_proj", "v_proj")
    biases: tuple[str, ...] = qkv if kind == "qwen2" else (*qkv, "o_proj") if config.get("attention_bias") else ()
    biases += ("gate_proj", "up_proj", "down_proj") if config.get("mlp_bias") else ()
    slides = config.get("use_sliding_window", kind not in ("qwen2", "qwen3"))
    return Shape(
        config["hidden_size"], config["num_hidden_layers"], heads, config.get("num_key_value_heads") or heads,
        config.get("head_dim") or HEAD.get(kind) or config["hidden_size"] // heads, config["intermediate_size"], config["vocab_size"],
        bool(config.get("tie_word_embeddings", kind == "gemma3_text")), biases, config.get("max_position_embeddings"),
        2 if str(config.get("dtype") or config.get("torch_dtype")).endswith("float16") else 4,
        kind, (config.get("sliding_window") or 0) if slides else 0, _by_hand(config),
    )


def _by_hand(config: dict[str, Any]) -> bool:
    """As families.refused, as far as a config's file says without transformers."""
    options = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parts = [part for part in (options, *options.values()) if isinstance(part, dict)]
    rotations = {str(part.get("rope_type", part.get("type", "default"))) for part in parts}
    odd = ("attention_dropout", "resid_pdrop", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
    return rotations <= set(families.ROTATIONS) and not any(config.get(key) for key in odd)


def nf4_parts(values: int, double: bool = True) -> list[int]:
    """Bytes of each tensor that bitsandbytes keeps of a 4-bit matrix of so many values.

    Packed values, scales (fp32 a block of 64; doubly quantised: 8 bits each, an fp32 for 256 of them and an offset; Dettmers et al.,
    2023, section 3), and the code books of 16 and 256 fp32 numbers, a fixed cost of every matrix.
    """
    blocks = -(-values // BLOCK)
    if not double:
        return [-(-values // 2), 4 * blocks, 4 * 16]
    return [-(-values // 2), blocks, 4 * 16, 4 * -(-blocks // OUTER_BLOCK), 4 * 256, 4]


def matrix_parts(shape: Shape, name: str, precision: str, double: bool = True) -> list[int]:
    """Bytes of each tensor of one of a layer's matrices, in a precision: fp32, bf16, int8 or nf4."""
    i, o = shape.linear(name)
    if precision == "nf4":
        return nf4_parts(i * o, double)
    if precision == "int8":
        return [i * o, 4 * o]  # LLM.int8(): a scale a row
    return [i * o * (4 if precision == "fp32" else 2)]


def tensors(shape: Shape, precision: str, double: bool = True, compute: int = 2) -> Iterator[tuple[str, int, int]]:
    """(name, numbers, bytes) of every tensor of a loaded base, in its order; name is a parameter's, or empty for constants of the one before.

    compute: bytes of what a quantised base does not quantise (embeddings, norms, output layer).
    """
    z = {"fp32": 4, "bf16": 2}.get(precision, compute)
    whole = shape.vocabulary * shape.width
    yield "embedding", whole, whole * z
    for layer in range(shape.layers):
        for name in shape.linears:
            i, o = shape.linear(name)
            first, *constants = matrix_parts(shape, name, precision, double)
            yield f"{layer}.{name}", i * o, first
            yield from (("", 0, size) for size in constants)
            if name in shape.biases:
                yield f"{layer}.{name}.bias", o, o * z
        for norm, size in shape.norms.items():
            yield f"{layer}.{norm}", size, size * z
    yield "norm", shape.width, shape.width * z
    if not shape.tied:
        yield "head", whole, whole * z
