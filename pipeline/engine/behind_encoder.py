"""Answers of a model whose prompt an encoder reads: log-likelihoods of choices, and generation, by the model's own forward pass.

Library of pipeline/scoring/scorer.py. A row's prompt goes through the encoder once, whatever choices it has; where an adapter acts on the encoder's input
row by row (a soft prompt, one adapter a row) it goes through once for every sequence that the decoder is fed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from pipeline.core import progress
from pipeline.data.choices import Items, Reads, Row
from pipeline.data.rows import Source, by_length, source_of, sources
from pipeline.engine.passes import Inputs, Shape, log_probabilities
from pipeline.measure import turns


def choice_log_likelihoods(logits: Callable[..., torch.Tensor], model: Any, items: Items, batch_tokens: int, pad_id: int, device: Any,
                           owners: Sequence[str]) -> list[list[float]]:
    """As scorer.choice_log_likelihoods, every score exact; the items' prompts are of rows.Prefix.

    Args:
        logits: scorer.logits_at of the model.
        owners: by item, PEFT's name of the adapter that answers it; (): the model as it stands answers all.
    """
    reads = Reads.of(items)
    rows: dict[int, list[Row]] = {}
    for row in reads.rows():
        rows.setdefault(row.item, []).append(row)
    asked, sums, answered = list(rows), torch.zeros(len(reads.places), dtype=torch.float64), 0
    for part in by_length([len(source_of(items[i][0])) + sum(len(row.ids) for row in rows[i]) for i in asked], batch_tokens):
        mine = [asked[k] for k in part]
        fed = [row for i in mine for row in rows[i]]
        inputs = Inputs(Shape.of(fed, False), device)
        inputs.fill(fed, pad_id, 0)
        texts = sources([source_of(items[i][0]) for i in mine], pad_id)
        at = torch.tensor([number for number, i in enumerate(mine) for _ in rows[i]])
        named = {"adapter_names": [owners[row.item] for row in fed]} if owners else {}
        values = log_probabilities(logits, inputs, source=_read(model, texts, at, device, bool(owners)), **named)[0]
        sums.index_add_(0, torch.tensor([place for row in fed for _, _, place in row.reads]), values.double().cpu())
        progress.part(answered := answered + len(mine), len(asked))
        turns.point()
    return reads.by_item(sums.tolist())


def _read(model: Any, texts: Source, at: torch.Tensor, device: Any, apiece: bool) -> Source:
    """What the decoder's sequences are fed of texts [B, S], text at[i] to the i-th: what the encoder made of them, or, `apiece`, the texts themselves."""
    soft = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    texts, at = {name: tensor.to(device) for name, tensor in texts.items()}, at.to(device)
    if apiece or soft:
        return {name: tensor[at] for name, tensor in texts.items()}
    states = model.get_encoder()(**texts).last_hidden_state
    return {"encoder_outputs": BaseModelOutput(states[at]), "attention_mask": texts["attention_mask"][at]}


def continuations(model: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_tokens: int, end: int | None, pad_id: int, device: Any,
                  owners: Sequence[str]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """As scorer.continuations, by the model's generate; prompts are of rows.Prefix. Those of one batch begin with as many decoder tokens."""
    for part in by_length([len(source_of(p)) + len(p) + max_new_tokens for p in prompts], batch_tokens):
        for count, same in itertools.groupby(sorted(part, key=lambda i: len(prompts[i])), key=lambda i: len(prompts[i])):
            mine = list(same)
            named = {"adapter_names": [owners[i] for i in mine]} if owners else {}
            texts = {name: tensor.to(device) for name, tensor in sources([source_of(prompts[i]) for i in mine], pad_id).items()}
            out = model.generate(
                **texts, decoder_input_ids=torch.tensor([list(prompts[i]) for i in mine], device=device), max_new_tokens=max_new_tokens, do_sample=False,
                num_beams=1, pad_token_id=pad_id, eos_token_id=end, use_cache=True, **named,
            )
            yield mine, out[:, count:]
            turns.point()
