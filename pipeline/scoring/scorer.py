"""Answering rows with a model: log-likelihoods of choices, or generated text."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.core import progress
from pipeline.core.settings import Task
from pipeline.data.choices import MANY, Contest, Items, Reads, arrange
from pipeline.data.rows import Batch, Encoder, Source, by_length, pad
from pipeline.measure import turns
from pipeline.models import architecture
from pipeline.models.base import autocast
from pipeline.scoring import rewards
from pipeline.scoring.answers import chosen
from pipeline.scoring.reading import Reasoning, agrees, extract

if TYPE_CHECKING:
    import torch

    from pipeline.engine.decode import Ended

WHOLE: Sequence[str] = ()
"""As owners: the model as it stands answers all rows, fed as those of several adapters are, so that what the two take compares."""


def logits_at(model: Any, input_ids: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, source: Source | None = None, **extra: Any) -> torch.Tensor:
    """Logits at chosen positions alone, fp32 [N, V]; the [B, T, V] ones are never made.

    The output layer is given the selected hidden states only. Virtual tokens that an adapter puts before the input
    shift the columns. input_ids [B, T] right-padded; rows, cols [N]; extra: the model's other inputs (a mask, a cache).

    source: what an encoder reads, or has read; input_ids are then the decoder's.
    """
    width = input_ids.shape[1]

    def select(_: Any, args: tuple) -> tuple:
        hidden = args[0]
        return (hidden[rows, cols + hidden.shape[1] - width],)

    fed = {"input_ids": input_ids} if source is None else {"decoder_input_ids": input_ids, **source}
    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        return model(**fed | {"use_cache": False} | extra).logits.float()
    finally:
        hook.remove()


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """Those at a batch's labelled positions, fp32 [N, V]."""
    return logits_at(model, batch.input_ids, batch.rows, batch.cols, batch.source)


def choice_log_likelihoods(model: Any, items: Items, batch_tokens: int, pad_id: int, device: Any, dtype: Any,
                           notes: list[str] | None = None, owners: Sequence[str] | None = None, contest: Contest | None = None) -> list[list[float]]:
    """Sum of token log-probabilities of every choice after its prompt, nats.

    What a row's choices, or all rows, have in common is fed once where that saves enough and the model allows it.

    Args:
        contest: that the best of many choices is wanted, and one more score; any other one may then be a bound that lies below the best one's
            (engine/branches.py). None: every score is exact.
        notes: takes the reason where a pass could not be captured.
        owners: by row, PEFT's name of the adapter that answers it (or WHOLE): rows share nothing then, and go through the model's own forward pass.
            None: the model as it stands answers all.
    """
    import torch

    from pipeline.engine import behind_encoder
    from pipeline.engine.answering import by_hand
    from pipeline.engine.branches import BranchScorer
    from pipeline.engine.passes import ChoiceScorer, log_probabilities_apiece
    from pipeline.engine.reuse import sharing_refused, soft_prompt

    logits = functools.partial(logits_at, model)
    with torch.inference_mode(), autocast(device, dtype):
        if architecture.has_encoder(model):
            return behind_encoder.choice_log_likelihoods(logits, model, items, batch_tokens, pad_id, device, owners or ())
        if owners is not None:
            return ChoiceScorer(logits, batch_tokens, pad_id, device, log_p=log_probabilities_apiece, owners=owners).scores(items)[0]
        soft = soft_prompt(model, device)
        bare = functools.partial(logits_at, soft.inner) if soft else logits
        with by_hand(model, dtype, device, len(items)) as written, contextlib.closing(ChoiceScorer(
            written or logits, batch_tokens, pad_id, device, model=model, fresh=lambda: autocast(device, dtype, cache=False), notes=notes,
            soft=(soft, bare) if soft else None,
        )) as reader:
            refused = functools.partial(sharing_refused, model, dtype, items, sums=reader.sums, soft=soft)
            groups = arrange(Reads.of(items), items, 0, soft is not None) if contest is not None and _many(items, device) else []
            if contest is None or not any(group.shares for group in groups) or refused(groups):
                return reader.scores(items, refused)[0]
            layers = model.config.get_text_config().num_hidden_layers
            before = (soft.cache, soft.tokens) if soft else (None, 0)
            return BranchScorer(bare, layers, batch_tokens, pad_id, device, *before).scores(items, contest)


def _many(items: Items, device: Any) -> bool:
    """Whether the rows have so many choices that they are searched as a tree, where passes are not captured."""
    import torch

    from pipeline.engine.answering import STATIC

    return torch.device(device).type not in STATIC and bool(items) and min(len(choices) for _, choices in items) >= MANY


def generate(model: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_tokens: int, tokenizer: Any, pad_id: int,
             device: Any, dtype: Any, notes: list[str] | None = None, owners: Sequence[str] | None = None, end: int | None = None,
             stop: str | None = None) -> list[str]:
    """Greedy continuations as text, prompts of similar length together. notes, owners: as `continuations` has them.

    Args:
        end: the token that closes an answer besides the tokenizer's end of text.
        stop: words after which nothing more need be written; what stands before them is the same either way.
    """
    texts, eos, answered = [""] * len(prompts), tokenizer.eos_token_id, 0
    end = eos if end is None else end
    ended = functools.partial(_says, tokenizer, stop) if stop else None
    for part, tokens in continuations(model, prompts, max_new_tokens, batch_tokens, end, pad_id, device, dtype, notes, owners, ended):
        said = tokens if end == eos else [list(itertools.takewhile(lambda i: i not in (end, eos), row)) for row in tokens.tolist()]
        for index, text in zip(part, tokenizer.batch_decode(said, skip_special_tokens=True), strict=True):
            texts[index] = text
        progress.part(answered := answered + len(part), len(prompts))
    return texts


def _says(tokenizer: Any, stop: str, tokens: torch.Tensor) -> torch.Tensor:
    """Which rows [R] of tokens [R, n] hold these words, which may have been complete for as many tokens as lie between two questions."""
    import torch

    from pipeline.engine.decode import ASK_EVERY

    recent = tokens[:, -ASK_EVERY - len(stop) :].tolist()
    return torch.tensor([stop in text for text in tokenizer.batch_decode(recent, skip_special_tokens=True)], device=tokens.device)


def continuations(model: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_tokens: int, end: int | None, pad_id: int,
                  device: Any, dtype: Any, notes: list[str] | None = None, owners: Sequence[str] | None = None,
                  ended: Ended | None = None) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Greedy continuations batch by batch as they come: (indices of prompts, what follows them [rows, new], padded from the end token on).

    What runs between two of them runs in inference mode.

    Args:
        notes: takes the reason where a pass could not be captured.
        owners: by prompt, PEFT's name of the adapter that answers it (or WHOLE): by the model's own generate then.
            None: the model as it stands answers all.
        ended: as decode.Decoder.run has it; the model's own generate does not ask.
    """
    import torch

    from pipeline.engine import behind_encoder
    from pipeline.engine.answering import by_hand
    from pipeline.engine.decode import Cached, Decoder, Handwritten, fed_once, greedy, lead_of, unsuited
    from pipeline.engine.reuse import window_of

    if architecture.has_encoder(model):
        with torch.inference_mode(), autocast(device, dtype):
            yield from behind_encoder.continuations(model, prompts, max_new_tokens, batch_tokens, end, pad_id, device, owners or ())
        return
    refused = owners is not None or unsuited(model) is not None
    with torch.inference_mode(), autocast(device, dtype), by_hand(model, dtype, device, 0 if refused else len(prompts)) as written:
        refused = refused or bool(window_of(model)) and not written  # transformers' static cache has no place for a window
        lead = [] if refused else lead_of(prompts, device)
        rest = [prompt[len(lead) :] for prompt in prompts]
        parts = list(_generation_batches(model, [len(p) + len(lead) // 4 for p in rest], max_new_tokens, batch_tokens))  # as passes.py counts cached tokens
        if refused:
            yield from _generate(model, prompts, parts, max_new_tokens, end, pad_id, device, owners or ())
            return
        forward = functools.partial(logits_at, model)
        before = fed_once(forward, lead, device)

        def make(rows: int, width: int) -> Decoder:
            shape = (rows, width, max_new_tokens, end, pad_id, device)
            return Handwritten(written, *shape) if written else Cached(forward, model.config, *shape, before)

        yield from greedy(make, lambda: autocast(device, dtype, cache=False), rest, parts, max_new_tokens, device, [] if notes is None else notes, ended)


def _generate(model: Any, prompts: Sequence[list[int]], parts: Sequence[list[int]], max_new_tokens: int, end: int | None, pad_id: int, device: Any,
              owners: Sequence[str] = ()) -> Iterator[tuple[list[int], torch.Tensor]]:
    """By the model's generate, part by part: (indices of prompts, what follows them [rows, new])."""
    import torch

    for part in parts:
        ids = pad([prompts[i] for i in part], pad_id, left=True).to(device)
        lengths = torch.tensor([len(prompts[i]) for i in part], device=device)
        mask = (torch.arange(ids.shape[1], device=device) >= ids.shape[1] - lengths[:, None]).long()
        named = {"adapter_names": [owners[i] for i in part]} if owners else {}
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id, eos_token_id=end, use_cache=True, **named,
        )
        yield part, out[:, ids.shape[1] :]


def _generation_batches(model: Any, lengths: list[int], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    virtual = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    for part in by_length([n + max_new_tokens for n in lengths], batch_tokens):
        if virtual:  # PEFT puts virtual tokens before the padding and drops the position ids that would account for it
            yield from (list(same) for _, same in itertools.groupby(part, key=lengths.__getitem__))
        else:
            yield part


class Scorer:
    """Answers rows with a model and scores them.

    Args:
        prompt: what the technique makes of a row's prompt (demonstrations, a predict prefix).
        notes: takes what a reader of the result should know of how the answers came about.
        reasoning: how the model reasons before it answers; None: it answers at once.
    """

    def __init__(self, model: Any, encoder: Encoder, task: Task, prompt: Callable[[str], str], batch_tokens: int, device: Any, dtype: Any,
                 notes: list[str] | None = None, reasoning: Reasoning | None = None) -> None:
        self.model, self.encoder, self.task, self.prompt, self.reasoning = model, encoder, task, prompt, reasoning
        self.batch_tokens, self.device, self.dtype = batch_tokens, device, dtype
        self.notes = [] if notes is None else notes

    @property
    def alone(self) -> bool:
        """Whether its answers take more than one pass over a model that others could share."""
        return bool(self.reasoning) or self.rewards

    @property
    def rewards(self) -> bool:
        """Whether choices are compared by their rewards."""
        return rewards.has_head(self.model)

    def items(self, rows: Sequence[dict]) -> list[tuple[list[int], list[list[int]]]]:
        """(prompt ids, [choice ids, …]) a row, the prompt cut so that its answer, and reasoning still to come, fit; no choices where it is generated."""
        with turns.away():
            return self._items(rows)

    def _items(self, rows: Sequence[dict]) -> list[tuple[list[int], list[list[int]]]]:
        items = []
        choices_of = [row["choices"] if self.task.scoring == "choice" else [] for row in rows]
        prompts = [self.prompt(row["prompt"]) for row in rows]
        later = self.reasoning.max_new_tokens + len(self.encoder.answer(self.reasoning.cue)) if self.reasoning else 0
        with self.encoder.reading(prompts, itertools.chain.from_iterable(choices_of)):
            for row, prompt, said in zip(rows, prompts, choices_of, strict=True):
                choices = [self.encoder.answer(c) for c in said]
                room = max(map(len, choices)) if choices else self.task.max_new_tokens
                reasoned = self.encoder.continuation(row["reasoned"]) if self.reasoning and "reasoned" in row else []
                items.append((self.encoder.fit(self.encoder.prompt(prompt) + reasoned, room + (0 if reasoned else later)), choices))
        return items

    def check(self, splits: dict[str, list[dict]]) -> list[str]:
        """Notes on texts that will be cut. Raises UserError where that is not allowed, before any work is done."""
        notes = []
        for split, rows in splits.items():
            self.items(rows)
            notes.append(self.encoder.check(f"the {split} rows"))
        return [note for note in notes if note]

    def predict(self, rows: Sequence[dict]) -> list[dict]:
        """One prediction a row: {id, answer, prediction, correct, scores | output}, and its reasoning if it reasons."""
        if not rows:
            return []
        self.model.eval()
        if self.reasoning:
            thought = [{**row, "reasoned": text} for row, text in zip(rows, self._reason(rows), strict=True)]
            predictions = self._choose(thought) if self.task.scoring == "choice" else self._generate(thought)
            return [{**one, "reasoning": row["reasoned"]} for one, row in zip(predictions, thought, strict=True)]
        return self._choose(rows) if self.task.scoring == "choice" else self._generate(rows)

    def _reason(self, rows: Sequence[dict]) -> list[str]:
        assert self.reasoning
        texts = self.texts(self.items(rows), room=self.reasoning.max_new_tokens)
        return [self.reasoning.prefill(text) for text in texts]

    def log_likelihoods(self, items: Items, owners: Sequence[str] | None = None, contest: Contest | None = None) -> list[list[float]]:
        """Of every choice of the items, nats; of a model with a head for rewards, those of its row's choices by their rewards.

        owners, contest: as choice_log_likelihoods has them."""
        if self.rewards:
            return rewards.relative(self.model, items, self.batch_tokens, self.encoder.pad_id, self.device, self.dtype)
        return choice_log_likelihoods(self.model, items, self.batch_tokens, self.encoder.pad_id, self.device, self.dtype, self.notes, owners, contest)

    def texts(self, items: Items, owners: Sequence[str] | None = None, room: int | None = None) -> list[str]:
        """What follows the items' prompts. owners: as `generate` has them; room: most new tokens (None: an answer's)."""
        new, encoder = self.task.max_new_tokens if room is None else room, self.encoder
        prompts = [prompt for prompt, _ in items]
        asked = self.model, prompts, new, self.batch_tokens, encoder.tokenizer, encoder.pad_id
        return [encoder.said(text) for text in generate(*asked, self.device, self.dtype, self.notes, owners, encoder.end_id, encoder.stop)]

    def _choose(self, rows: Sequence[dict]) -> list[dict]:
        task = dataclasses.replace(self.task, length_normalised=self.task.length_normalised and not self.rewards)
        lengths = [[len(c) if task.length_normalised else 1 for c in row["choices"]] for row in rows]
        needed = [row["choices"].index(row["answer"]) if row.get("answer") in row["choices"] else None for row in rows]
        return chosen(rows, self.log_likelihoods(self.items(rows), contest=Contest(lengths, needed)), task)

    def _generate(self, rows: Sequence[dict]) -> list[dict]:
        predictions = []
        for row, output in zip(rows, self.texts(self.items(rows)), strict=True):
            prediction = extract(output, self.task.answer_pattern)
            correct = agrees(prediction, row["answer"], self.task.answer_pattern)
            predictions.append({"id": row["id"], "answer": row["answer"], "prediction": prediction, "correct": correct, "output": output})
        return predictions
