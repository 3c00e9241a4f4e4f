"""Trained changes of the output layer for the tokens that answers are made of: a learnt verbaliser.

Library of pipeline/methods/soft_prompts.py and side_network.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.core.files import UserError
from pipeline.data.rows import Example
from pipeline.models.base import load_tokenizer

NAME = "answers"
"""What the rows are called inside the output layer."""
MOST = 256
"""Tokens of a small set of labels."""


class AnswerRows(nn.Module):
    """Changes of the output layer's rows for the tokens `ids` [C], starting at zero: a logit is raised by state · row."""

    ids: torch.Tensor

    def __init__(self, ids: Sequence[int], d: int) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(list(ids), dtype=torch.long))
        self.rows = nn.Parameter(torch.zeros(len(ids), d))

    def forward(self, module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """As a forward hook of the output layer."""
        logits = args[0].to(self.rows.dtype) @ self.rows.T
        return output.index_add(-1, self.ids, logits.to(output.dtype))


def add(model: Any, ids: Sequence[int]) -> AnswerRows:
    """Put AnswerRows at the model's output layer."""
    head = model.get_output_embeddings()
    rows = AnswerRows(ids, head.weight.shape[1]).to(head.weight.device)
    head.add_module(NAME, rows)
    head.register_forward_hook(rows)
    return rows


def of(model: Any) -> AnswerRows:
    return getattr(model.get_output_embeddings(), NAME)


def tokens(examples: Sequence[Example], base: Any, what: str) -> list[int]:
    """The tokens of all answers, with and without a space before them, ascending. Raises UserError where answers are no small set of labels."""
    tokenizer = load_tokenizer(Path(base.config._name_or_path))
    texts = [space + answer for answer in {e.answer for e in examples} for space in ("", " ")]
    ids = sorted({i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]})
    if len(ids) > MOST:
        raise UserError(f"{what} learns a vector for each token of the labels, and the training rows' answers have {len(ids)}; choose a task with few labels")
    return ids
