"""Taking a model apart: its blocks, their linear layers, and what goes through those on calibration rows."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.files import UserError
from pipeline.data.rows import Example
from pipeline.models import architecture
from pipeline.models.base import load_tokenizer, most_tokens

if TYPE_CHECKING:
    import torch

PLACES = {"attention": re.compile(r"attn|attention"), "feed_forward": re.compile(r"mlp|ffn|feed_?forward|\bff\b|moe|^dense_?relu")}
"""What a block's children are called in the architectures of transformers."""
CROSS = re.compile(r"cross|enc_?dec|encoder")
"""What children are called that attend to what an encoder made."""
BLOCK = "block"


def blocks(model: Any) -> Any:
    """The model's blocks, an encoder's before its decoder's. Raises UserError where there is no such list."""
    if architecture.has_encoder(model):
        return [block for stack in (model.get_encoder(), model.get_decoder()) for block in _first_list(stack)]
    return _decoder_and_blocks(model)[1]


def decoder(model: Any) -> Any:
    """The module that runs the blocks and gives last_hidden_state; OPT calls it past model.base_model. Raises UserError as `blocks`."""
    return _decoder_and_blocks(model)[0]


def _decoder_and_blocks(model: Any) -> tuple[Any, Any]:
    import torch

    wanted = getattr(model.config, "num_hidden_layers", None)
    for module in model.base_model.modules():
        for child in module.children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == wanted:
                return module, child
    raise UserError(f"{type(model).__name__} has no list of {wanted} layers to choose from; use technique=full or an adapter")


def _first_list(stack: Any) -> Any:
    import torch

    for child in stack.children():
        if isinstance(child, torch.nn.ModuleList):
            return child
    raise UserError(f"{type(stack).__name__} has no list of layers to choose from; use technique=full or an adapter")


def width(model: Any, block: Any) -> int:
    """Numbers of a hidden state of the block; an encoder's may be another than its decoder's."""
    size = getattr(model.config, "hidden_size", None)
    return size if size is not None else next(p.numel() for p in block.parameters() if p.ndim == 1)


def linears(block: Any) -> Iterator[tuple[str, Any]]:
    """(name, module) of a block's linear layers: torch's, and GPT-2's Conv1D, whose weight is transposed."""
    import torch
    from transformers.pytorch_utils import Conv1D

    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            yield name, module


def matrix(module: Any) -> Any:
    """A linear layer's weight as a view [d_out, d_in]."""
    import torch

    return module.weight.data if isinstance(module, torch.nn.Linear) else module.weight.data.T


def sublayer(block: Any, place: str) -> Any:
    """A block's attention (to its own tokens) or feed_forward module, or the block. Raises UserError where the block has no one module for it."""
    if place == BLOCK:
        return block
    children = list(_children(block))
    modules = [module for name, module in children if PLACES[place].search(name.lower()) and any(p.ndim > 1 for p in module.parameters())
               and not CROSS.search(name.lower())]
    if len(modules) == 1:
        return modules[0]
    there = ", ".join(name for name, _ in children)
    what = f"{type(block).__name__} has {'no' if not modules else 'more than one'} module that is its {place} (it has {there})"
    raise UserError(f"{what}; choose other method.places, or an adapter of single layers such as technique=lora")


def _children(block: Any) -> Iterator[tuple[str, Any]]:
    """A block's children by name; of T5's, which are in a list and have a norm and a residual sum of their own, the children of those."""
    import torch

    for name, child in block.named_children():
        if isinstance(child, torch.nn.ModuleList):
            yield from (inner for part in child for inner in part.named_children())
        else:
            yield name, child


MOST_TOKENS = 2048


def rows(examples: Sequence[Example], count: int, base: Any) -> list[list[int]]:
    """Token ids of the first `count` training rows, prompt and answer. Raises UserError where there are none."""
    if not examples:
        raise UserError("calibration needs training rows; raise train_rows")
    tokenizer = load_tokenizer(Path(base.config._name_or_path))
    return [tokenizer(f"{e.prompt} {e.answer}")["input_ids"][-most_tokens(base, MOST_TOKENS):] for e in examples[:count]]


def calibrate(model: Any, ids: Sequence[Sequence[int]], measure: Callable[[torch.Tensor], torch.Tensor], change: Callable[[Any, dict[str, Any]], None]) -> None:
    """Change every block by what its linear layers are fed.

    Args:
        measure: the inputs of one layer on one row, fp32 [T, d_in] -> what is summed over the rows.
        change: (block, sums by the layer's name in it); a layer that no row came to has none.
    """
    import torch

    with torch.no_grad():
        fed = [_through(model, row) for row in ids]
        hidden = [states for states, _ in fed]
        for number, block in enumerate(blocks(model)):
            run = functools.partial(_states, block, [inputs[number] for _, inputs in fed], hidden)
            change(block, _measured(block, run, measure))
            hidden = run()


def _through(model: Any, row: Sequence[int]) -> tuple[Any, list[tuple[tuple, dict]]]:
    """(the first block's input, every block's other arguments) of one row."""
    import torch

    inputs: list[tuple[tuple, dict]] = []
    first: list[Any] = []

    def note(_: Any, args: tuple, kwargs: dict) -> None:
        extra = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        first.append(args[0] if args else kwargs["hidden_states"])
        inputs.append((args[1:], extra))

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks(model)]
    try:
        model.base_model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return first[0], inputs


def _states(block: Any, inputs: Sequence[tuple[tuple, dict]], hidden: Sequence[Any]) -> list[Any]:
    """The block's output for every row."""
    outputs = [block(states, *args, **kwargs) for states, (args, kwargs) in zip(hidden, inputs, strict=True)]
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


def _measured(block: Any, run: Callable[[], Any], measure: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    sums: dict[str, Any] = {}

    def add(_: Any, args: tuple, name: str) -> None:
        measured = measure(args[0].reshape(-1, args[0].shape[-1]).float())
        sums[name] = sums[name] + measured if name in sums else measured

    hooks = [module.register_forward_pre_hook(functools.partial(add, name=name)) for name, module in linears(block)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return sums
