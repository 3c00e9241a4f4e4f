"""Task rows to token batches. Shapes stand in the docstrings: B rows, T tokens, N labelled positions.

Library. Rows come prepared (data/<task>/*.jsonl); an objective turns a row into examples; `encode` makes tokens of
them, `step_batches` puts them into padded batches in an order that is a function of the seed alone.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipeline.core.files import Unsuited, UserError, read_jsonl, read_object
from pipeline.core.settings import Task, Train
from pipeline.data.conversations import NEXT_TURN, USER_TURN, Conversation, Template, turns_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Example:
    """A text to learn from: the loss falls on the answer's tokens alone."""

    prompt: str
    answer: str
    group: str = "label"
    """Losses are averaged over the tokens of a group, then summed over groups by weight."""
    weight: float = 1.0
    ends: bool = False
    """Whether the answer is closed by the end-of-text token (needed where it is generated)."""
    prefill: str = ""
    """The answer's beginning, which is part of the prompt and not learnt."""


class Prefix(list[int]):
    """Tokens that a decoder begins an answer with; source: what an encoder has read before."""

    def __init__(self, ids: Iterable[int], source: Sequence[int]) -> None:
        super().__init__(ids)
        self.source = list(source)

    def __add__(self, more: list[int]) -> Prefix:  # type: ignore[override]
        return Prefix([*self, *more], self.source)


def source_of(prompt: Sequence[int]) -> list[int]:
    """What an encoder reads of a prompt; nothing where a decoder alone has it."""
    return prompt.source if isinstance(prompt, Prefix) else []


@dataclass(frozen=True)
class Encoded:
    """Tokens of an example: ids[start:] are the labels. source: what an encoder reads; ids are then the decoder's, its start token first."""

    ids: tuple[int, ...]
    start: int
    group: str = "label"
    weight: float = 1.0
    source: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """All of them."""
        return len(self.source) + len(self.ids)

    @property
    def weights(self) -> Sequence[float]:
        """By labelled token."""
        return [self.weight] * (len(self.ids) - self.start)


@dataclass(frozen=True)
class Weighted(Encoded):
    """An example whose labelled tokens have weights of their own."""

    each: tuple[float, ...] = ()

    @property
    def weights(self) -> Sequence[float]:
        return self.each


Source = dict[str, Any]
"""An encoder's side of a batch: input_ids, attention_mask [B, S], or what it made of them; a model's forward takes it by these names."""


@dataclass
class Batch:
    """A right-padded micro-batch; a causal model needs no attention mask for it.

    input_ids [B, T]; rows, cols, targets, weights [N]: the token `targets[i]` is predicted at
    (rows[i], cols[i]), and the loss is sum(weights · nll). With an encoder input_ids are the decoder's.
    """

    input_ids: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    tokens: int
    """Real (non-padding) tokens."""
    source: Source | None = field(default=None, kw_only=True)
    """What an encoder reads; None: there is none."""

    def to(self, device: Any) -> Self:
        moved = {k: v.to(device) for k, v in vars(self).items() if k not in ("tokens", "source")}
        return type(self)(**moved, tokens=self.tokens, source=self.source and {k: v.to(device) for k, v in self.source.items()})

    @property
    def padded_tokens(self) -> int:
        return self.input_ids.numel() + (self.source["input_ids"].numel() if self.source else 0)


class Encoder:
    """A tokenizer with a task's format around it.

    Args:
        start: the token with which the decoder of an encoder-decoder begins; prompts are then a Prefix. None: a decoder alone.

    Raises (from the methods):
        UserError: a text is longer than `max_length` and too_long is error, or an answer has no token.
    """

    def __init__(self, tokenizer: Any, task: Task, max_length: int, too_long: str, start: int | None = None) -> None:
        if task.chat and not getattr(tokenizer, "chat_template", None):
            other = "transcript" if task.messages else "plain"
            what = "task.format is chat" if task.format == "chat" else "task.messages goes through a chat template"
            raise UserError(f"{what}, but the model's tokenizer has no chat template; choose task.format={other}, or a model that was tuned to chat")
        self.template = Template(tokenizer) if task.chat else None
        self.tokenizer, self.task, self.max_length, self.too_long, self.start = tokenizer, task, max_length, too_long, start
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._cut: set[tuple[int, ...]] = set()
        self._reported = 0
        self._read: dict[tuple[str, bool], list[int]] = {}

    @property
    def end_id(self) -> Any:
        """The token that closes an answer: the chat template's own, or the end of text."""
        return self.tokenizer.eos_token_id if self.template is None else self.template.end_id

    @property
    def stop(self) -> str | None:
        """Words that end a generated answer; None: there are none, as where the model's template closes it with a token."""
        return None if self.template is not None else self.task.stop or (USER_TURN if self.task.messages is not None else None)

    @contextlib.contextmanager
    def reading(self, prompts: Iterable[str], answers: Iterable[str]) -> Iterator[None]:
        """Inside, these texts are tokens already: a tokenizer in Rust reads many at once in a tenth of the time that they take one after another."""
        if not getattr(self.tokenizer, "is_fast", False):
            yield
            return
        starts = self.template is None
        wanted = {True: {self.asked(p) for p in prompts}, False: {self.glue + a for a in answers}}
        if not starts:
            wanted = {True: set(), False: wanted[True] | wanted[False]}
        for special, texts in wanted.items():
            ids = self.tokenizer(list(texts), add_special_tokens=special)["input_ids"] if texts else []
            self._read |= {(text, special): each for text, each in zip(texts, ids, strict=True)}
        try:
            yield
        finally:
            self._read.clear()

    @property
    def glue(self) -> str:
        """What stands between a prompt and its answer."""
        return self.task.separator if self.template is None and self.start is None else ""

    def asked(self, text: str) -> str:
        """A prompt as the model reads it, in the chat template's words where there is one."""
        return text if self.template is None else self.template.prompt(turns_of(text))

    def _ids(self, text: str, special: bool) -> list[int]:
        known = self._read.get((text, special))
        return list(known) if known is not None else self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def prompt(self, text: str) -> list[int]:
        """text: a conversation keeps its turns."""
        ids = self._ids(self.asked(text), self.template is None)
        if self.start is not None:
            return Prefix([self.start], ids or [self.pad_id])
        return ids if self.template is not None else _open(self.tokenizer, ids) or [self.pad_id]

    def continuation(self, text: str) -> list[int]:
        """A text as it follows a prompt; of a text that a model wrote there may be no token."""
        return self._ids(self.glue + text, False)

    def answer(self, text: str, ends: bool = False) -> list[int]:
        ids = self.continuation(text)
        if not ids:
            raise Unsuited(f"the answer {text!r} encodes to no token of this model's; choose another model, or write the task's answers in its words")
        return ids + [self.end_id] if ends else ids

    def said(self, text: str) -> str:
        """An answer out of generated text: up to task.stop; of a transcript, up to the turn of another that a model without a chat template goes on with."""
        if self.stop:
            text = text.partition(self.stop)[0]
        return NEXT_TURN.split(text)[0] if self.task.messages is not None and self.template is None else text

    def example(self, example: Example) -> Encoded:
        answer = self.answer(example.answer, example.ends)
        prompt = self.prompt(example.prompt)
        if example.prefill:
            prompt = prompt + self.answer(example.prefill)
        prompt = self.fit(prompt, len(answer))
        return Encoded((*prompt, *answer), len(prompt), example.group, example.weight, tuple(source_of(prompt)))

    def fit(self, prompt: list[int], room: int) -> list[int]:
        """The prompt, its start cut if prompt and `room` more tokens exceed max_length (and too_long allows it); an encoder leaves the decoder its room."""
        if isinstance(prompt, Prefix):
            return Prefix(prompt, self.fit(prompt.source, 0))
        excess = len(prompt) + room - self.max_length
        if excess <= 0:
            return prompt
        self._cut.add(tuple(prompt))
        return prompt[excess:] if excess < len(prompt) else prompt[-1:]

    def check(self, what: str) -> str | None:
        """A note on how many texts were cut since the last check, or UserError where that is not allowed."""
        count, self._reported = len(self._cut) - self._reported, len(self._cut)
        if not count:
            return None
        if self.too_long == "error":
            raise Unsuited(
                f"{count} texts of {what} are longer than {self.max_length} tokens (train.max_length, at most the model's context); "
                "raise train.max_length if the context allows it, or set train.too_long=truncate"
            )
        return f"{count} texts of {what} longer than {self.max_length} tokens lost their start"


def beginning(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that is to be continued: without the end-of-text token that some tokenizers add to every text."""
    return _open(tokenizer, tokenizer(text)["input_ids"])


def _open(tokenizer: Any, ids: list[int]) -> list[int]:
    """Tokens without the end of the text."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


@dataclass(frozen=True)
class Rows:
    """The rows of one cell, by split; `labelled` ones (train and validation) are what the technique costs in data."""

    train: list[dict]
    validation: list[dict]
    test: list[dict]
    transfer: dict[str, list[dict]]
    manifest: dict[str, Any]
    rationales: dict[str, dict]
    """By row id; empty without a teacher."""

    @property
    def scored(self) -> dict[str, list[dict]]:
        """The rows that are answered, by the split's name in a result."""
        return {"validation": self.validation, "test": self.test, **{f"transfer/{name}": rows for name, rows in self.transfer.items()}}


def load_rows(folder: Path, task: Task, train_rows: int | None, seed: int, validation_share: float, test_rows: int | None,
              transfer_rows: int | None) -> Rows:
    """Read a prepared task. Smaller train_rows are nested in larger ones of the same seed, whose order is drawn with it (docs/data_dependency.md).

    Validation rows are the first of the split's fixed order, the same for every seed: the share of train_rows rounded down, one at least.

    test_rows 0 does not open the test split.

    Raises:
        UserError: not prepared, or fewer rows than asked for.
    """
    check_prepared(folder, task.name)
    train = read_rows(folder / "train.jsonl")
    wanted = len(train) if train_rows is None else train_rows
    if wanted > len(train):
        raise UserError(f"train_rows={wanted}, but {folder / 'train.jsonl'} has {len(train)} rows; ask for at most that")
    random.Random(seed).shuffle(train)
    validation = read_rows(folder / "validation.jsonl")[: max(1, int(wanted * validation_share + 1e-9))]
    transfer = {}
    for name in task.transfer:
        path = folder / "transfer" / f"{name}.jsonl"
        if not path.exists():
            raise UserError(f"task.transfer names {name!r}, but {path} does not exist; take it out, or run: python -m pipeline.prepare task={task.name}")
        if transfer_rows != 0:
            transfer[name] = read_rows(path)[:transfer_rows]
    return Rows(
        train[:wanted], validation, [] if test_rows == 0 else read_rows(folder / "test.jsonl")[:test_rows], transfer,
        read_object(folder / "manifest.json"), {},
    )


def check_prepared(folder: Path, task: str) -> None:
    """Raise UserError where a task is not prepared."""
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder} is not prepared; run: python -m pipeline.prepare task={task}")


def read_rows(path: Path) -> list[dict]:
    """The rows of a file of a prepared task, the prompt of one with `messages` as a Conversation.

    Raises:
        UserError: there is no such file, or a line is no such row.
    """
    rows = read_jsonl(path, id=str, prompt=str, answer=str)
    if rows and "choices" not in rows[0]:
        choices = _shared_choices(path)
        rows = [{**row, "choices": choices} for row in rows]
    return [{**row, "prompt": Conversation(row["messages"])} if row.get("messages") else row for row in rows]


def _shared_choices(path: Path) -> list[str] | None:
    """The choices that the manifest of a prepared task has for all its rows."""
    manifest = next((folder / "manifest.json" for folder in path.parents[:2] if (folder / "manifest.json").exists()), None)
    return read_object(manifest).get("choices") if manifest else None


def load_rationales(folder: Path) -> dict[str, dict]:
    """A teacher's rows by row id. Raises UserError if there is no teacher or its stage has not run."""
    if folder.name == "none":
        raise UserError("this technique learns from a teacher, but teacher=none; choose teacher=lexicon, stored, local or server")
    path = folder / "rationales.jsonl"
    if not path.exists():
        raise UserError(f"{path} does not exist; run: python -m pipeline.rationales task={folder.parent.name} teacher={folder.name}")
    return {row["id"]: row for row in read_jsonl(path, id=str, rationale=str, correct=bool)}


@functools.lru_cache(maxsize=128)  # a shuffle takes longer than a short step, and every step of an epoch asks
def epoch_order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of the rows in an epoch: a function of seed and epoch alone, so a resumed run knows where it was."""
    order = list(range(rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def steps_in_epoch(rows: int, batch_size: int) -> int:
    return -(-rows // batch_size)


def step_rows(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The rows of optimiser step `step` (from 0); an epoch's last step may be smaller."""
    epoch, index = divmod(step, steps_in_epoch(rows, batch_size))
    return list(epoch_order(rows, seed, epoch)[index * batch_size : (index + 1) * batch_size])


def step_batches(examples: Sequence[Encoded], settings: Train, pad_id: int) -> Iterator[Batch]:
    """The micro-batches of one optimiser step, similar lengths together.

    Token weights are set over the whole step (example weight over the step's labelled tokens of that group), so the
    summed loss does not depend on how the step is split.
    """
    counts = labelled_tokens(examples)
    for part in by_length([e.tokens for e in examples], settings.micro_batch_tokens):
        yield collate([examples[i] for i in part], counts, pad_id)


def labelled_tokens(examples: Iterable[Encoded]) -> dict[str, int]:
    """Labelled tokens by group."""
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.group] = counts.get(example.group, 0) + len(example.ids) - example.start
    return counts


def by_length(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, each of at most `most_tokens` padded tokens (one row at least)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > most_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(sequences: Sequence[Sequence[int]], pad_id: int, left: bool = False) -> torch.Tensor:
    """[B, T] token ids, padded on the right (or left)."""
    import torch

    width = max(map(len, sequences))
    fill = [[pad_id] * (width - len(s)) for s in sequences]
    return torch.tensor([[*f, *s] if left else [*s, *f] for s, f in zip(sequences, fill, strict=True)], dtype=torch.long)


def collate(examples: Sequence[Encoded], counts: dict[str, int], pad_id: int) -> Batch:
    """One padded micro-batch; `counts` are the step's labelled tokens by group."""
    import torch

    # the last token predicts nothing, so it is left out of the input
    ids = pad([e.ids[:-1] for e in examples], pad_id)
    rows, cols, targets, weights = [], [], [], []
    for row, example in enumerate(examples):
        for at, weight in zip(range(example.start, len(example.ids)), example.weights, strict=True):
            rows.append(row)
            cols.append(at - 1)
            targets.append(example.ids[at])
            weights.append(weight / counts[example.group])
    source = sources([e.source for e in examples], pad_id) if examples[0].source else None
    tokens = sum(e.tokens - 1 for e in examples)
    return Batch(ids, torch.tensor(rows), torch.tensor(cols), torch.tensor(targets), torch.tensor(weights), tokens, source=source)


def sources(texts: Sequence[Sequence[int]], pad_id: int) -> Source:
    """What an encoder is given of token ids: padded on the right, with a mask, since it attends to both sides."""
    import torch

    ids = pad(texts, pad_id)
    lengths = torch.tensor([len(text) for text in texts])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
