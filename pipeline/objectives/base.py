"""What an objective is: the examples that a row gives, and the loss of a batch of them.

Library. What an objective overrides it declares as a class attribute; engine, packing and forecast read the declarations alone
(tests/test_contracts.py compares the two). `type` in conf/objective/<name>.yaml names the class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from omegaconf import DictConfig

from pipeline.core.files import UserError
from pipeline.core.settings import Settings, Task, Train, check_fields
from pipeline.data.conversations import answered
from pipeline.data.rows import Batch, Encoded, Encoder, Example, step_batches
from pipeline.records.finished import cell_at
from pipeline.records.results import Teacher
from pipeline.scoring.best_of import Selection
from pipeline.scoring.drawing import RewardReader
from pipeline.scoring.reading import Reasoning, canonical
from pipeline.scoring.scorer import Scorer, logits_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainingContext:
    """What an objective may look at before the first step.

    model: as training starts with it, wrapped by its method (with an adapter it answers as the base does). rows: those to train on.
    scorer(name, artefact, cfg): what answers as another cell does (artefact: its folder), or as a config's base does by itself (None).
    rewards(word, cfg, unproven, tokenizer): what gives rewards as a finished reward model does (serving.artefact.reward_reader).
    """

    cfg: DictConfig
    settings: Settings
    model: Any
    encoder: Encoder
    rows: Sequence[dict]
    device: Any
    dtype: Any
    scorer: Callable[[str, Path | None, DictConfig], Scorer]
    rewards: Callable[[str, DictConfig, bool, Any], RewardReader] | None = None


@dataclass(frozen=True)
class Sample:
    """A text that the model in training has drawn after a row's prompt. example: its tokens, ids[start:] are the drawn ones."""

    row: dict
    example: Encoded
    text: str


class Policy(Protocol):
    """The model in training, asked about texts that it has drawn. Values are of every drawn token, nats, at the temperature of drawing."""

    watched: bool
    """Whether this step is one of those that are looked at, so that what costs a pass may be asked."""

    def log_p(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """As it stands [n], by sample."""

    def reference(self, samples: Sequence[Sample]) -> list[torch.Tensor] | None:
        """As training started with it; None: that model is no longer there."""


Judge = Callable[[Sequence[Sample], Policy], tuple[list[Encoded], dict[str, float]]]
"""What to learn of a step's samples, and what was seen of them, for the training curve."""


@dataclass(frozen=True)
class Online:
    """How texts are drawn for an objective that learns from them (`trainer` is online).

    rows: those to train on; samples: of a row in a step; longest: most tokens of one; batch_tokens: most tokens of a pass without gradients.
    exact: draw and train by one order of sums, where the step is by hand, so that log p as drawn is log p as trained, bit for bit.
    """

    encoder: Encoder
    rows: Sequence[dict]
    samples: int
    temperature: float
    longest: int
    batch_tokens: int
    judge: Judge
    exact: bool = False


@dataclass(frozen=True)
class PreparedExamples:
    """The examples of every row, with what the objective adds to them; teacher: the model that teaches, if one does.

    online: of an objective that learns from drawn texts; the examples are then as long as those can become.
    """

    examples: Sequence[Sequence[Encoded]]
    notes: list[str] = field(default_factory=list)
    teacher: Teacher | None = None
    online: Online | None = None


def drawn_later(examples: Sequence[Sequence[Encoded]], samples: int, room: int) -> list[list[Encoded]]:
    """Examples as long as a row's drawn texts can become: its prompt and `room` tokens, one for each sample."""
    firsts = [row[0] for row in examples]
    return [[Encoded((*e.ids[: e.start], *[0] * room), e.start)] * samples for e in firsts]


def rationale_text(rationale: dict | None, wrong_rationales: str) -> str:
    """The text to learn of a row's rationale; empty where there is none, or where it led to a wrong answer and those are to `drop`."""
    return rationale["rationale"] if rationale and (wrong_rationales == "keep" or rationale["correct"]) else ""


def teacher_labelled(rows: Sequence[dict], rationales: Mapping[str, dict]) -> list[dict]:
    """The rows with the teacher's answers in the place of people's, as the row's choices spell them; those without a usable one are left out.

    Raises:
        UserError: the teacher has none at all.
    """
    answers = [(row, _taught_answer(row, rationales.get(row["id"]))) for row in rows]
    labelled = [{**row, "answer": answer} for row, answer in answers if answer is not None]
    if not labelled:
        raise UserError("the teacher has no usable answer to any training row; run python -m pipeline.rationales, or choose another teacher")
    return labelled


def _taught_answer(row: dict, rationale: dict | None) -> str | None:
    answer = rationale["answer"] if rationale else None
    if not answer or not row["choices"]:
        return answer or None
    return next((choice for choice in row["choices"] if canonical(choice) == canonical(answer)), None)


def left_out(examples: Sequence[Any], context: TrainingContext) -> list[str]:
    """A note on the rows that `teacher_labelled` left out, if it left out any."""
    wanted = context.cfg.train_rows or len(examples)
    note = f"{wanted - len(examples)} of {wanted} training rows are left out: the teacher has no usable answer to them"
    return [note] if wanted > len(examples) else []


@dataclass(frozen=True)
class Objective:
    """Standard fine-tuning: cross-entropy of the answer given the prompt."""

    own_loss: ClassVar[bool] = False
    """`loss` is not the weighted cross-entropy."""
    own_batches: ClassVar[bool] = False
    """`batches` does not make batches of single rows."""
    of_sequences: ClassVar[bool] = False
    """`loss` is a function of the log-probabilities of a step's examples alone (`sequence_loss`), so that its gradient is that of a weighted cross-entropy."""
    own_rows: ClassVar[bool] = False
    """`rows` gives other rows than the task's, or fewer."""
    prepares: ClassVar[bool] = False
    """`prepared` looks at the model or the rows before the first step."""
    trainer: ClassVar[Literal["loop", "online"]] = "loop"
    """What it trains on: examples that are there before the first step (training/loop.py), or texts that the model draws in each (training/online.py)."""

    scalar_head: ClassVar[bool] = False
    """Whether the model gets a head (scoring/rewards.py) whose rewards are what it answers by; it then leaves no language model to begin at."""
    reads_labels: ClassVar[bool] = True
    """Whether it reads the training rows' labels."""

    def __post_init__(self) -> None:
        check_fields(self, "objective")

    @property
    def name(self) -> str:
        """As in conf/objective/, MLflow and the table."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def needs_rationales(self) -> bool:
        """Whether rows must come with a teacher's text."""
        return False

    def prompt(self, prompt: str) -> str:
        """The prompt under which the model is to answer."""
        return prompt

    @property
    def plain(self) -> bool:
        """Whether it is only a weighted cross-entropy of its examples' tokens, which the hand-written step and packs compute."""
        return not self.own_loss and not self.own_batches

    @property
    def stepped(self) -> Objective:
        """The objective that an engine's step is made for: a cross-entropy, where it has this one's gradient."""
        return Objective() if self.of_sequences else self

    @property
    def own_part(self) -> str | None:
        """The first part of training that it overrides, in a word; None: it trains on the task's rows by a weighted cross-entropy."""
        parts = {"loss": self.own_loss, "batches": self.own_batches, "loop": self.trainer != "loop", "rows": self.own_rows, "preparation": self.prepares}
        return next((part for part, overridden in parts.items() if overridden), None)

    @property
    def decoder_only(self) -> str | None:
        """Why the base has to be a decoder alone, a clause; None: it may be an encoder with its decoder, too."""
        return "texts are drawn from a decoder alone" if self.trainer == "online" else None

    @property
    def reasoning(self) -> Reasoning | None:
        """How the model reasons before it answers; None: it answers at once."""
        return None

    @property
    def selection(self) -> Selection | None:
        """How an answer is chosen among drawn ones; None: the model's own is given."""
        return None

    @property
    def made_of(self) -> dict[str, str]:
        """Other cells that this one is made of besides its start, by their part in it; their cost and rows are told beside its own."""
        return {}

    def reads(self, cfg: DictConfig) -> list[Path]:
        """Files besides data, rationales and base model that the training depends on; of another cell its result.json."""
        return [cell_at(word, cfg) / "result.json" for word in self.made_of.values()]

    def rows(self, rows: list[dict], rationales: dict[str, dict], train_rows: int | None, seed: int) -> list[dict]:
        """The rows to train on, given the task's. train_rows: how many are asked for; None: all."""
        return rows

    def label_example(self, row: dict, task: Task) -> Example:
        """The example of a row that carries its label; a generated answer must end, a scored choice need not."""
        return Example(self.prompt(row["prompt"]), row["answer"], ends=task.scoring == "generate")

    def examples(self, row: dict, task: Task, rationale: dict | None) -> list[Example]:
        """The training examples of a row. `rationale` is the teacher's row, if there is one."""
        return [self.label_example(row, task)] if self.own_part else self.label_examples(row, task)

    def label_examples(self, row: dict, task: Task) -> list[Example]:
        """The example of the row's answer, then, of a conversation, one of every earlier assistant turn that is to be learnt: each is trained on after
        the very prompt under which a template asks for it."""
        return [self.label_example(row, task), *(Example(self.prompt(before), words, ends=True) for before, words in answered(row["prompt"]))]

    def prepared(self, examples: list[list[Encoded]], context: TrainingContext) -> PreparedExamples:
        """What is computed once, before the first step: a reference's log-probabilities, a teacher's hidden states."""
        return PreparedExamples(examples)

    def batches(self, examples: Sequence[Encoded], settings: Train, pad_id: int) -> Iterator[Batch]:
        """The micro-batches of one optimiser step; their losses are summed."""
        return step_batches(examples, settings, pad_id)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Scalar: sum over labelled positions of weight · cross-entropy, in fp32."""
        from pipeline.engine.ops import WeightedNll

        if batch.input_ids.device.type == "cpu":  # fewer passes over the logits
            return WeightedNll.apply(logits_of(model, batch), batch.targets, batch.weights)
        return (self.nll(model, batch) * batch.weights).sum()

    def nll(self, model: Any, batch: Batch) -> torch.Tensor:
        """[N]: -log p of a batch's targets, fp32."""
        import torch.nn.functional as F

        return F.cross_entropy(logits_of(model, batch), batch.targets, reduction="none")

    def sequence_loss(self, log_p: torch.Tensor, examples: Sequence[Encoded], beside: torch.Tensor) -> torch.Tensor:
        """The loss of a whole step, scalar, where it is `of_sequences`.

        log_p [B]: log-probability of every example's labelled tokens, their sum, nats; beside: the same of `beside`'s, without a gradient.
        """
        raise NotImplementedError(f"{self.name} is no function of log-probabilities")

    def beside(self, examples: Sequence[Encoded]) -> list[Encoded]:
        """Sequences that the loss of a step's examples looks at besides them."""
        return []

    def hyperparameters(self) -> dict[str, Any]:
        """What to show in the table and in MLflow."""
        return {}
