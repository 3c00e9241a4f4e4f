"""What the linear layers of a model are fed, block by block, while the blocks are being changed: the calibration of compression.

Library of pipeline/methods/pruning.py and low_rank.py. A block is measured on what the changed blocks below it give, as Wanda and SparseGPT do.
Rows go through one by one, so there is no padding to leave out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.blocks import blocks, linears
from pipeline.data import Example
from pipeline.files import UserError
from pipeline.model import load_tokenizer

if TYPE_CHECKING:
    import torch

MOST_TOKENS = 2048


def rows(examples: Sequence[Example], count: int, base: Any) -> list[list[int]]:
    """Token ids of the first `count` training rows, prompt and answer. Raises UserError where there are none."""
    if not examples:
        raise UserError("calibration needs training rows; raise train_rows")
    tokenizer = load_tokenizer(Path(base.config._name_or_path))
    most = min(MOST_TOKENS, getattr(base.config, "max_position_embeddings", None) or MOST_TOKENS)
    return [tokenizer(f"{e.prompt} {e.answer}")["input_ids"][-most:] for e in examples[:count]]


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
            run = functools.partial(_states, block, [given[number] for _, given in fed], hidden)
            change(block, _measured(block, run, measure))
            hidden = run()


def _through(model: Any, row: Sequence[int]) -> tuple[Any, list[tuple[tuple, dict]]]:
    """(the first block's input, what every block is given besides it) of one row."""
    import torch

    given: list[tuple[tuple, dict]] = []
    first: list[Any] = []

    def note(_: Any, args: tuple, kwargs: dict) -> None:
        further = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        first.append(args[0] if args else kwargs["hidden_states"])
        given.append((args[1:], further))

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks(model)]
    try:
        model.base_model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return first[0], given


def _states(block: Any, given: Sequence[tuple[tuple, dict]], hidden: Sequence[Any]) -> list[Any]:
    """What the block gives for every row."""
    outputs = [block(states, *args, **kwargs) for states, (args, kwargs) in zip(hidden, given, strict=True)]
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


def _measured(block: Any, run: Callable[[], Any], measure: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    sums: dict[str, Any] = {}

    def add(_: Any, args: tuple, name: str) -> None:
        found = measure(args[0].reshape(-1, args[0].shape[-1]).float())
        sums[name] = sums[name] + found if name in sums else found

    hooks = [module.register_forward_pre_hook(functools.partial(add, name=name)) for name, module in linears(block)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return sums
