"""Rows of one batch answered by different adapters over one base, and what that costs.

Library; pipeline/serving.py answers requests with it, a cell measures with it how long 1, 8 and 64 adapters take. PEFT's mixed-batch
inference gives every row the adapter that `adapter_names` names for it; it has that for LoRA.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import measure, scoring
from pipeline.choices import Items, Reads
from pipeline.data import by_length, pad
from pipeline.methods.base import Method

NO_ADAPTER = "__base__"  # PEFT's name for a row that the base answers by itself
REPEATS = 3


def choice_log_likelihoods(model: Any, items: Items, owners: Sequence[str] | None, scorer: scoring.Scorer) -> list[list[float]]:
    """As scoring's, every row by its own adapter. owners: PEFT's name of each row's adapter; None: the model as it stands answers all."""
    import torch

    reads = Reads.of(items)
    sums = torch.zeros(len(reads.places), dtype=torch.float64)
    with torch.inference_mode(), scoring.autocast(scorer.device, scorer.dtype):
        for part in by_length([len(s) for s in reads.sequences], scorer.batch_tokens):
            at = torch.tensor([(row, *read) for row, index in enumerate(part) for read in reads.at[index]]).T.to(scorer.device)
            ids = pad([reads.sequences[i] for i in part], scorer.encoder.pad_id).to(scorer.device)
            further = {} if owners is None else {"adapter_names": [owners[reads.places[reads.at[i][0][2]][0]] for i in part]}
            logits = scoring.logits_at(model, ids, at[0], at[1], **further)
            nats = torch.log_softmax(logits, -1).gather(1, at[2][:, None])[:, 0]
            sums.index_add_(0, at[3].cpu(), nats.double().cpu())
    return reads.by_item(sums.tolist())


def generate(model: Any, prompts: Sequence[list[int]], owners: Sequence[str] | None, scorer: scoring.Scorer) -> list[str]:
    """Greedy continuations as text, every prompt by its own adapter."""
    import torch

    texts, room = [""] * len(prompts), scorer.task.max_new_tokens
    tokenizer, end = scorer.encoder.tokenizer, scorer.encoder.tokenizer.eos_token_id
    with torch.inference_mode(), scoring.autocast(scorer.device, scorer.dtype):
        for part in by_length([len(p) + room for p in prompts], scorer.batch_tokens):
            ids = pad([prompts[i] for i in part], scorer.encoder.pad_id, left=True).to(scorer.device)
            lengths = torch.tensor([len(prompts[i]) for i in part], device=scorer.device)
            mask = (torch.arange(ids.shape[1], device=scorer.device) >= ids.shape[1] - lengths[:, None]).long()
            further = {} if owners is None else {"adapter_names": [owners[i] for i in part]}
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=room, do_sample=False, pad_token_id=scorer.encoder.pad_id,
                                 eos_token_id=end, **further)
            for index, text in zip(part, tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True), strict=True):
                texts[index] = text
    return texts


@dataclass(frozen=True)
class Shared:
    """What one base costs that many adapters share: seconds by number of requests ("1", "8", "64").

    own: every request by an adapter of its own. same: all by one adapter. mixed: whether `own` is one batch; else one request after another.
    """

    own: dict[str, float]
    same: dict[str, float]
    mixed: bool


def shared_latency(scorer: scoring.Scorer, method: Method, rows: Sequence[dict], counts: Sequence[int]) -> Shared | None:
    """Measure it on a cell's model with copies of its adapter, which are removed again; None where the method cannot share a base, or reasons first."""
    if method.sharing == "no" or scorer.reasoning or not counts or not rows:
        return None
    model, adapters, together = scorer.model, hasattr(scorer.model, "peft_config"), method.sharing == "together"
    many = {n: [dict(rows[i % len(rows)]) for i in range(n)] for n in counts}
    copies = _copies(model, max(counts)) if adapters and together else []
    own: dict[str, float] = {}
    same: dict[str, float] = {}
    try:
        for count, batch in many.items():
            same[str(count)] = _seconds(functools.partial(_answer, scorer, batch, None), scorer.device)
            if adapters and not together:
                own[str(count)] = _one_by_one(scorer, batch)
            elif adapters:
                own[str(count)] = _seconds(functools.partial(_answer, scorer, batch, copies[: len(batch)]), scorer.device)
            else:
                own[str(count)] = same[str(count)]
    finally:
        for name in copies[1:]:
            model.delete_adapter(name)
    return Shared(own, same, together)


def _answer(scorer: scoring.Scorer, rows: Sequence[dict], owners: Sequence[str] | None) -> None:
    items = scorer.items(rows)
    if scorer.task.scoring == "choice":
        choice_log_likelihoods(scorer.model, items, owners, scorer)
    else:
        generate(scorer.model, [prompt for prompt, _ in items], owners, scorer)


def _seconds(call: Callable[[], None], device: Any) -> float:
    found = measure.latency_s(lambda _: call(), [None] * REPEATS, device)
    assert found is not None
    return found


def _one_by_one(scorer: scoring.Scorer, rows: Sequence[dict]) -> float:
    """Requests one after another, the adapter chosen anew before each."""
    watch = measure.Stopwatch(scorer.device)
    for row in rows:
        scorer.model.set_adapter(scorer.model.active_adapter)
        _answer(scorer, [row], None)
    return watch.lap()


def _copies(model: Any, count: int) -> list[str]:
    """Names of the model's adapter and of copies of it, `count` in all."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    name = model.active_adapter
    weights = get_peft_model_state_dict(model, adapter_name=name)
    found = [name]
    for number in range(1, count):
        config = copy.deepcopy(model.peft_config[name])
        config.init_lora_weights, config.inference_mode = False, True
        model.add_adapter(f"copy{number}", config)
        set_peft_model_state_dict(model, weights, adapter_name=f"copy{number}")
        found.append(f"copy{number}")
    model.set_adapter(name)
    return found
