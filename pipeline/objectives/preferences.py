"""Preferences: the better of two answers is made likelier than the worse, or given a higher reward. conf/objective/dpo.yaml, orpo.yaml, kto.yaml,
reward_model.yaml.

Go with any method that trains. Pairs come from the task (the right answer over wrong choices of its row) or from a file of
{prompt, chosen, rejected}, one JSON object a line (objective.pairs). The reference of DPO and KTO is the model as training starts with it
(for an adapter the base); its log-probabilities of all sequences are computed once before the first step.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import DictConfig

from pipeline.core.files import Unsuited, UserError, read_jsonl
from pipeline.core.settings import AtLeast1, NotNegative, Positive, Task, Train
from pipeline.data.rows import Batch, Encoded, Example, by_length, collate, pad
from pipeline.data.shapes import judged, judged_rows, shape_of
from pipeline.models.base import autocast
from pipeline.objectives.base import Objective, PreparedExamples, TrainingContext
from pipeline.scoring.rewards import rewards_at
from pipeline.scoring.scorer import logits_of

if TYPE_CHECKING:
    import torch

CHOSEN, REJECTED = "chosen", "rejected"


@dataclass(frozen=True)
class WithReference(Encoded):
    """An example with the log-probability that the reference gives its answer, nats; `mismatched`: the sequence of KTO's reference point."""

    reference: float = 0.0
    mismatched: WithReference | None = None


@dataclass(frozen=True)
class Facts:
    """What a loss of preferences reads of sequences, in turn chosen and rejected, besides their log-probabilities. reference [B]: log-probabilities, nats;
    lengths [B]: labelled tokens; weights [B]: of each of them in a cross-entropy; share: one over the step's pairs, [1]."""

    reference: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor
    share: torch.Tensor

    @classmethod
    def of(cls, examples: Sequence[Encoded], tokens: int, pairs: int) -> Facts:
        """tokens: of the chosen answers of the whole step; pairs: how many it has."""
        import torch

        lengths = torch.tensor([len(e.ids) - e.start for e in examples])
        return cls(references(examples), lengths, torch.tensor([e.weight / tokens for e in examples]), torch.tensor([1 / pairs]))

    def to(self, device: Any) -> Facts:
        return Facts(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass
class Pairs(Batch):
    """Sequences in turn chosen and rejected: [B, T], B even."""

    facts: Facts
    point: ReferencePoint


class ReferencePoint:
    """KTO's z0 of a step, computed once from its mismatched sequences."""

    def __init__(self, batches: Sequence[Pairs]) -> None:
        self.batches = batches
        self.value: torch.Tensor | None = None

    def to(self, device: Any) -> ReferencePoint:
        """Itself; its batches move when they are used."""
        return self

    def of(self, model: Any, device: Any) -> torch.Tensor | None:
        """[1], no gradient; None: there are no such sequences."""
        import torch

        if self.value is None and self.batches:
            with torch.no_grad():
                batches = [batch.to(device) for batch in self.batches]
                self.value = drift(torch.cat([log_probabilities(model, b) for b in batches]), torch.cat([b.facts.reference for b in batches]))
        return self.value


def drift(log_p: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """max(0, mean of log π - log π_ref) of sequences [B]. Scalar."""
    return (log_p - reference).mean().clamp(min=0)


def references(examples: Sequence[Encoded]) -> torch.Tensor:
    """[B]: their log-probabilities under the reference, nats; 0 where there is none."""
    import torch

    return torch.tensor([getattr(e, "reference", 0.0) for e in examples])


def log_probabilities(model: Any, batch: Batch) -> torch.Tensor:
    """[B]: log-probability of every sequence's labelled tokens, their sum, nats."""
    import torch
    import torch.nn.functional as F

    nats = -F.cross_entropy(logits_of(model, batch), batch.targets, reduction="none")
    return torch.zeros(len(batch.input_ids), device=nats.device).index_add(0, batch.rows, nats)


@dataclass(frozen=True)
class Preference(Objective):
    """Where pairs come from, and how a step's pairs become batches."""

    own_batches = True
    own_rows = True

    wrong_choices: AtLeast1 | None = 1
    """How many wrong choices of a row are each a pair with the right one, drawn by the row's id; null: all."""
    pairs: str | None = None
    """A JSONL file of {prompt, chosen, rejected}, or of single answers {prompt, completion, label}, to train on in the place of the task's training rows."""
    takes_singles: ClassVar[bool] = False
    """Whether a good and a bad answer need not be of one prompt."""

    def reads(self, cfg: DictConfig) -> list[Path]:
        return [Path(self.pairs)] if self.pairs else []

    def rows(self, rows: list[dict], rationales: dict[str, dict], train_rows: int | None, seed: int) -> list[dict]:
        if self.pairs is None:
            unpaired = next((row["id"] for row in rows if len(set(row["choices"] or ())) < 2), None)
            if unpaired is not None:
                raise UserError(f"row {unpaired!r} has no wrong choice to prefer its answer to; give pairs of your own: objective.pairs=<file.jsonl>")
            return rows
        pairs = _read_pairs(Path(self.pairs), self.takes_singles)
        random.Random(seed).shuffle(pairs)
        if train_rows is not None and train_rows > len(pairs):
            raise UserError(f"train_rows={train_rows}, but {self.pairs} has {len(pairs)} pairs; ask for at most that")
        return pairs[:train_rows]

    def examples(self, row: dict, task: Task, rationale: dict | None) -> list[Example]:
        label, *worse = self.rivals(row, task)
        return [e for other in worse for e in (label, other)]

    def rivals(self, row: dict, task: Task) -> list[Example]:
        """The right answer, then the wrong ones that it is held against."""
        wrong = sorted({c for c in row["choices"] if c != row["answer"]})
        if self.wrong_choices is not None:
            wrong = random.Random(row["id"]).sample(wrong, min(self.wrong_choices, len(wrong)))
        label = dataclasses.replace(self.label_example(row, task), group=CHOSEN)
        asked = self.prompt(row.get("worse_prompt", row["prompt"]))
        return [label, *(dataclasses.replace(label, prompt=asked, answer=answer, group=REJECTED, weight=0.0) for answer in wrong)]

    def batches(self, examples: Sequence[Encoded], settings: Train, pad_id: int) -> Iterator[Batch]:
        pairs, tokens = list(zip(examples[::2], examples[1::2], strict=True)), chosen_tokens(examples)
        beside = self.beside(examples)
        parts = by_length([e.tokens for e in beside], settings.micro_batch_tokens)
        point = ReferencePoint([_batch([beside[i] for i in part], tokens, len(pairs), ReferencePoint([]), pad_id) for part in parts])
        for indices in by_length([2 * max(a.tokens, b.tokens) for a, b in pairs], settings.micro_batch_tokens):
            yield _batch([e for i in indices for e in pairs[i]], tokens, len(pairs), point, pad_id)

    def hyperparameters(self) -> dict[str, Any]:
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v for k, v in shown.items() if v is not None and not (k == "wrong_choices" and self.pairs)}


def chosen_tokens(examples: Sequence[Encoded]) -> int:
    """Labelled tokens of the chosen ones of pairs."""
    return sum(len(e.ids) - e.start for e in examples[::2])


def _batch(examples: Sequence[Encoded], tokens: int, pairs: int, point: ReferencePoint, pad_id: int) -> Pairs:
    return Pairs(**vars(collate(examples, {CHOSEN: tokens, REJECTED: 1}, pad_id)), facts=Facts.of(examples, tokens, pairs), point=point)


def _read_pairs(path: Path, singles: bool) -> list[dict]:
    """Pairs of a file. singles: single answers are paired by their kind alone, the rarer one again and again; else within their prompt."""
    if not path.exists():
        raise UserError(f"objective.pairs={path} does not exist; give a JSONL file of {{prompt, chosen, rejected}}")
    pairs, lines = [], read_jsonl(path)
    if shape_of(lines) == "judged":
        return _of_singles(*judged(lines, str(path)), str(path)) if singles else [
            {"id": f"pair-{number}", "fields": {}, **row} for number, row in enumerate(judged_rows(lines, str(path)), 1)]
    for number, row in enumerate(lines, 1):
        bad = next((k for k in ("prompt", CHOSEN, REJECTED) if not isinstance(row, dict) or not isinstance(row.get(k), str) or not row[k]), None)
        if bad or row[CHOSEN] == row[REJECTED]:
            what = f"has no text {bad!r}" if bad else "prefers a text to itself"
            raise UserError(f"line {number} of {path} {what}; every line is {{prompt, chosen, rejected}} with two different answers")
        pairs.append({"id": f"pair-{number}", "prompt": row["prompt"], "answer": row[CHOSEN], "choices": [row[REJECTED], row[CHOSEN]], "fields": {}})
    if not pairs:
        raise UserError(f"{path} holds no pair; give lines of {{prompt, chosen, rejected}}")
    return pairs


def _of_singles(good: Sequence[tuple[str, str]], bad: Sequence[tuple[str, str]], where: str) -> list[dict]:
    if not good or not bad:
        raise UserError(f"{where} has {'no completion with label true' if not good else 'none with label false'}; KTO learns from both kinds")
    count = max(len(good), len(bad))
    both = zip(itertools.islice(itertools.cycle(good), count), itertools.islice(itertools.cycle(bad), count), strict=True)
    return [{"id": f"single-{n}", "prompt": asked, "answer": better, "worse_prompt": other, "choices": [worse, better], "fields": {}}
            for n, ((asked, better), (other, worse)) in enumerate(both, 1) if better != worse]


def with_reference(examples: Sequence[Sequence[Encoded]], context: TrainingContext) -> list[list[WithReference]]:
    """The examples with their log-probability under the model as training starts with it."""
    import torch

    flat = [e for row in examples for e in row]
    counts, nats = dict.fromkeys((CHOSEN, REJECTED), 1), [0.0] * len(flat)
    context.model.eval()
    with torch.inference_mode(), autocast(context.device, context.dtype):
        for part in by_length([e.tokens for e in flat], context.settings.evaluate.batch_tokens):
            batch = collate([flat[i] for i in part], counts, context.encoder.pad_id).to(context.device)
            for index, value in zip(part, log_probabilities(context.model, batch).tolist(), strict=True):
                nats[index] = value
    flat_with = iter([WithReference(**vars(e), reference=value) for e, value in zip(flat, nats, strict=True)])
    return [[next(flat_with) for _ in row] for row in examples]


@dataclass(frozen=True)
class Likelihoods(Preference):
    """A loss of the log-probabilities of a step's sequences."""

    own_loss = True
    of_sequences = True

    def loss_of(self, log_p: torch.Tensor, facts: Facts, point: torch.Tensor | None) -> torch.Tensor:
        """Of log-probabilities [B], a scalar. point: KTO's z0."""
        raise NotImplementedError

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        assert isinstance(batch, Pairs)
        point = batch.point.of(model, batch.input_ids.device)
        return self.loss_of(log_probabilities(model, batch), batch.facts, point)

    def sequence_loss(self, log_p: torch.Tensor, examples: Sequence[Encoded], beside: torch.Tensor) -> torch.Tensor:
        point = drift(beside, references(self.beside(examples))) if len(beside) else None
        return self.loss_of(log_p, Facts.of(examples, chosen_tokens(examples), len(examples) // 2), point)


@dataclass(frozen=True)
class Dpo(Likelihoods):
    """Direct preference optimisation (Rafailov et al., 2023, equation 7): -log σ(β · (Δ chosen - Δ rejected)), Δ = log π - log π_ref."""

    prepares = True

    beta: Positive = 0.1

    def prepared(self, examples: list[list[Encoded]], context: TrainingContext) -> PreparedExamples:
        return PreparedExamples(with_reference(examples, context))

    def loss_of(self, log_p: torch.Tensor, facts: Facts, point: torch.Tensor | None) -> torch.Tensor:
        import torch.nn.functional as F

        delta = log_p - facts.reference
        return -(F.logsigmoid(self.beta * (delta[::2] - delta[1::2])) * facts.share).sum()


@dataclass(frozen=True)
class Orpo(Likelihoods):
    """Odds-ratio preference optimisation (Hong et al., 2024): cross-entropy of the chosen answer, and
    -weight · log σ(log odds(chosen) - log odds(rejected)), odds of a sequence's mean token probability (geometric). It needs no reference.

    The cross-entropy is the answer's, as in the paper; TRL's trainer includes the prompt's tokens.
    """

    weight: Positive = 0.1

    def loss_of(self, log_p: torch.Tensor, facts: Facts, point: torch.Tensor | None) -> torch.Tensor:
        import torch.nn.functional as F

        mean = log_p / facts.lengths
        odds = mean - log1mexp(mean)
        return -(log_p * facts.weights).sum() - (self.weight * F.logsigmoid(odds[::2] - odds[1::2]) * facts.share).sum()


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0 (Mächler, 2012); a probability that rounds to 1 is taken as 1 - 1e-7."""
    import torch

    x = x.clamp(max=-1e-7)
    near = x > -math.log(2)
    safe = torch.where(near, x, torch.full_like(x, -1.0)), torch.where(near, torch.full_like(x, -1.0), x)  # the unused branch must be finite
    return torch.where(near, torch.log(-torch.expm1(safe[0])), torch.log1p(-torch.exp(safe[1])))


@dataclass(frozen=True)
class Kto(Likelihoods):
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2024): 1 - σ(β · (Δ - z0)) of a desirable answer, 1 - σ(β · (z0 - Δ))
    of an undesirable one, Δ = log π - log π_ref, a mean over both. z0 is the mean Δ, at least 0 and without a gradient, of the step's prompts
    with other rows' answers, paired once before training (TRL pairs them within a batch of its data set).
    """

    prepares = True
    takes_singles = True

    beta: Positive = 0.1
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0

    def prepared(self, examples: list[list[Encoded]], context: TrainingContext) -> PreparedExamples:
        others = [*examples[-1:], *examples[:-1]]
        mismatched = [[_with_answer_of(other[i % len(other)], e) for i, e in enumerate(row)] for row, other in zip(examples, others, strict=True)]
        both = zip(with_reference(examples, context), with_reference(mismatched, context), strict=True)
        return PreparedExamples([[dataclasses.replace(e, mismatched=m) for e, m in zip(*rows, strict=True)] for rows in both])

    def beside(self, examples: Sequence[Encoded]) -> list[Encoded]:
        return [e.mismatched for e in examples if isinstance(e, WithReference) and e.mismatched]

    def loss_of(self, log_p: torch.Tensor, facts: Facts, point: torch.Tensor | None) -> torch.Tensor:
        import torch

        assert point is not None
        delta = log_p - facts.reference
        desirable = self.desirable_weight * (1 - torch.sigmoid(self.beta * (delta[::2] - point)))
        undesirable = self.undesirable_weight * (1 - torch.sigmoid(self.beta * (point - delta[1::2])))
        return ((desirable + undesirable) * facts.share).sum() / 2


def _with_answer_of(other: Encoded, example: Encoded) -> Encoded:
    """The example's prompt with the other's answer."""
    return dataclasses.replace(example, ids=(*example.ids[: example.start], *other.ids[other.start :]))


@dataclass
class Rivals(Batch):
    """The answers of some rows: [B, T], the sequences ending at (rows, cols). places [G, K]: by row its sequences, the right one first; real [G, K]: whether
    there is one; share: one over the step's rows, [1]."""

    places: torch.Tensor
    real: torch.Tensor
    share: torch.Tensor


@dataclass(frozen=True)
class RewardModel(Preference):
    """A reward of every answer, learnt from which of a row's answers is the right one (Ouyang et al., 2022): -log of the chance that it is chosen, each with
    a chance in proportion to exp(reward). With one wrong answer that is Bradley-Terry's -log sigma(r chosen - r rejected), with more Plackett-Luce's.

    The head stands beside the output layer; an answer's reward is read at its last token. `centre` adds centre * (r chosen + r rejected)^2, a mean over the
    row's pairs, which holds rewards near 0 (Eisenstein et al., 2023).
    """

    own_loss = True
    scalar_head = True

    centre: NotNegative = 0.0
    shuffle: bool = False
    """A control: the answer that counts as right is drawn, by the row's id, among those that are compared."""

    @property
    def decoder_only(self) -> str:
        return "the reward is read at the end of a decoder's text"

    def examples(self, row: dict, task: Task, rationale: dict | None) -> list[Example]:
        if task.scoring != "choice":
            raise Unsuited(f"{self.name} ranks the choices of a row, and task.scoring is {task.scoring}; choose a task of choices, or of pairs (docs/data.md)")
        rivals = self.rivals(row, task)
        if self.shuffle:
            chosen = random.Random(f"{row['id']}/shuffled").choice(rivals)
            others = [dataclasses.replace(e, group=REJECTED, weight=0.0) for e in rivals if e is not chosen]
            rivals = [dataclasses.replace(chosen, group=CHOSEN, weight=1.0), *others]
        return rivals

    def batches(self, examples: Sequence[Encoded], settings: Train, pad_id: int) -> Iterator[Batch]:
        every: list[list[Encoded]] = []
        for example in examples:
            every.extend([[]] if example.group == CHOSEN else [])
            every[-1].append(example)
        for part in by_length([len(row) * max(len(e.ids) for e in row) for row in every], settings.micro_batch_tokens):
            yield _rivals([every[i] for i in part], len(every), pad_id)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        assert isinstance(batch, Rivals)
        values = rewards_at(model, batch.input_ids, batch.rows, batch.cols)[batch.places]
        chances = values.masked_fill(~batch.real, -math.inf).log_softmax(1)[:, 0]
        sums = ((values[:, :1] + values[:, 1:]) ** 2).masked_fill(~batch.real[:, 1:], 0.0).sum(1) / batch.real[:, 1:].sum(1)
        return ((self.centre * sums - chances) * batch.share).sum()


def _rivals(rows: Sequence[Sequence[Encoded]], every: int, pad_id: int) -> Rivals:
    import torch

    flat = [e for row in rows for e in row]
    numbers = iter(range(len(flat)))
    places = [[next(numbers) for _ in row] for row in rows]
    most = max(map(len, places))
    return Rivals(
        pad([e.ids for e in flat], pad_id), torch.arange(len(flat)), torch.tensor([len(e.ids) - 1 for e in flat]), torch.zeros(len(flat), dtype=torch.long),
        torch.ones(len(flat)), sum(len(e.ids) for e in flat), places=torch.tensor([row + [0] * (most - len(row)) for row in places]),
        real=torch.tensor([[True] * len(row) + [False] * (most - len(row)) for row in places]), share=torch.tensor([1 / every]),
    )
