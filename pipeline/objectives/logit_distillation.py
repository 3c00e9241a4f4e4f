"""Logit distillation: the student's next-token distributions follow a larger or a fine-tuned model's, on the rows' answers or on texts that the student
draws itself. conf/objective/logit_distillation.yaml, on_policy_distillation.yaml.

Goes with any method that trains. The teacher (objective.teacher) is a finished cell, by folder or by technique, or a base model under models/.

What is stored of the teacher is not the V logits of a labelled token but the d numbers before its output layer, and that layer: the same
logits from V/d times fewer numbers a token (85 times at 135M; the layer is as large as d tokens' logits). They are computed once, in one pass
over the training rows before the first step, and cached by content in .work/teachers/. python -m benchmarks.teaching measures the alternatives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf

from pipeline.core.files import UserError, atomic_path, sha256
from pipeline.core.settings import Positive, Train, Within
from pipeline.data.rows import Batch, Encoded, Example, by_length, collate
from pipeline.measure.clock import Stopwatch
from pipeline.models.base import autocast
from pipeline.objectives.base import Objective, Online, Policy, PreparedExamples, Sample, TrainingContext, drawn_later
from pipeline.records.finished import cell_at, cell_config, finished, needed
from pipeline.records.results import Teacher
from pipeline.records.results import read as read_result
from pipeline.scoring.drawing import room_for
from pipeline.scoring.reading import is_right
from pipeline.scoring.scorer import Scorer, logits_of

if TYPE_CHECKING:
    import torch

UNTOUCHED: dict[Any, Any] = {"start": None, "method": {"type": "untouched"}, "objective": {"type": "labels"}, "precision": {"name": "auto"}}
"""The config of a base model that teaches as it is."""


@dataclass(frozen=True)
class AfterLayer:
    """What a model does with the logits that its output layer gives: times `scale` (Granite, Cohere), then bounded by cap · tanh(x / cap) (Gemma)."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> AfterLayer:
        text = config.get_text_config()
        scale = getattr(text, "logit_scale", 1.0) / getattr(text, "logits_scaling", 1.0)
        return cls(scale, getattr(text, "final_logit_softcapping", None))

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """[..., V], fp32."""
        scaled = logits.float() * self.scale
        return scaled if self.cap is None else self.cap * (scaled / self.cap).tanh()


@dataclass
class Head:
    """A teacher's output layer; words: how many of its logits stand for words (a vocabulary may be padded)."""

    layer: Any
    words: int
    after: AfterLayer = AfterLayer()

    def to(self, device: Any) -> Head:
        self.layer.to(device)
        return self

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, d] -> [N, words], fp32, no gradient."""
        import torch

        with torch.no_grad():
            return self.after(self.layer(hidden)[:, : self.words])


@dataclass(frozen=True)
class TeacherStates:
    """A teacher's hidden states before its output layer, [n, d] for a row of n labelled tokens."""

    head: Head
    hidden: list[torch.Tensor]
    teacher: Teacher


@dataclass(frozen=True)
class WithStates(Encoded):
    """An example with the teacher's hidden states before its output layer at the labelled tokens, [n, d]."""

    hidden: Any = None
    head: Any = None


@dataclass
class StatesBatch(Batch):
    """A micro-batch with the teacher's hidden states before its output layer, [N, d]."""

    hidden: torch.Tensor
    head: Head


@dataclass(frozen=True)
class Taught(Objective):
    """A loss at the labelled tokens between the student's distributions and the teacher's."""

    own_loss = True
    own_batches = True

    teacher: str

    def reads(self, cfg: DictConfig) -> list[Path]:
        return [source(self.teacher, cfg)]

    def batches(self, examples: Sequence[Encoded], settings: Train, pad_id: int) -> Iterator[Batch]:
        import torch

        counts = {"label": sum(len(e.ids) - e.start for e in examples)}
        for part in by_length([e.tokens for e in examples], settings.micro_batch_tokens):
            mine: list[Any] = [examples[i] for i in part]
            yield StatesBatch(**vars(collate(mine, counts, pad_id)), hidden=torch.cat([e.hidden for e in mine]), head=mine[0].head)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        assert isinstance(batch, StatesBatch)
        logits = logits_of(model, batch)
        return (self.by_token(logits, batch.head.logits(batch.hidden), batch.head.words, batch.targets) * batch.weights).sum()

    def by_token(self, logits: torch.Tensor, taught: torch.Tensor, words: int, targets: torch.Tensor) -> torch.Tensor:
        """[N] of the student's logits [N, V], the teacher's [N, words] and the tokens that are there [N]."""
        raise NotImplementedError

    def hyperparameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class LogitDistillation(Taught):
    """L = label_weight · cross-entropy + (1 - label_weight) · T² · KL, both at the labelled tokens, distributions softened by T
    (Hinton et al., 2015, whose T² keeps the gradient's size).

    forward: KL(teacher ‖ student), which covers all that the teacher holds likely. reverse: KL(student ‖ teacher), which keeps to what it holds
    likeliest, as MiniLLM (Gu et al., 2023) argues; theirs is over texts that the student samples, this one token by token over the given ones.
    """

    prepares = True

    label_weight: float
    temperature: Positive
    divergence: Literal["forward", "reverse"] = "forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_weight < 1:
            raise UserError(f"objective.label_weight is {self.label_weight}; from 0 to below 1 (1 would leave the teacher out: objective=labels)")

    def prepared(self, examples: list[list[Encoded]], context: TrainingContext) -> PreparedExamples:
        states = teacher_states(self.teacher, [self.label_example(row, context.settings.task) for row in context.rows], context)
        head = states.head.to(context.device)
        taught = [[WithStates(**vars(e), hidden=h, head=head) for e in row] for row, h in zip(examples, states.hidden, strict=True)]
        note = f"taught by {states.teacher.name}: the teacher's seconds are a pass over the rows and, of a cell, its training"
        return PreparedExamples(taught, [note], states.teacher)

    def by_token(self, logits: torch.Tensor, taught: torch.Tensor, words: int, targets: torch.Tensor) -> torch.Tensor:
        import torch.nn.functional as F

        label = F.cross_entropy(logits, targets, reduction="none")
        distance = divergence(logits[:, :words], taught, self.temperature, self.divergence)
        return self.label_weight * label + (1 - self.label_weight) * self.temperature**2 * distance


@dataclass(frozen=True)
class OnPolicyDistillation(Taught):
    """The generalised Jensen-Shannon divergence of the student's distributions from the teacher's, at the tokens of texts that the student draws in every
    step (GKD, Agarwal et al., 2024, equation 1 with lambda = 1): the student learns what to do where its own texts lead it.

    beta: 0 is KL(teacher || student), 1 is KL(student || teacher), between them beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher +
    (1 - beta) student.
    """

    prepares = True
    trainer = "online"

    beta: Annotated[float, Within(0, 1)] = 0.5
    temperature: Positive = 1.0
    """Of drawing."""

    def prepared(self, examples: list[list[Encoded]], context: TrainingContext) -> PreparedExamples:
        cfg, encoder, task = context.cfg, context.encoder, context.settings.task
        at = source(self.teacher, cfg)
        if at.name == "result.json":
            needed(self.teacher, cfg, "objective.teacher")
        scorer = teaching(self.teacher, _config(at, cfg), at, context)
        head = Head(scorer.model.get_output_embeddings(), len(encoder.tokenizer), AfterLayer.of(scorer.model.config))

        def judge(samples: Sequence[Sample], policy: Policy) -> tuple[list[Encoded], dict[str, float]]:
            asked = [scorer.encoder.prompt(scorer.prompt(s.row["prompt"])) for s in samples]
            drawn = [s.example.ids[s.example.start :] for s in samples]
            hidden, _ = _pass(scorer, [Encoded((*prompt, *ids), len(prompt)) for prompt, ids in zip(asked, drawn, strict=True)])
            right = sum(is_right(s.text, s.row, task) for s in samples) / len(samples)
            return [WithStates(**vars(s.example), hidden=h, head=head) for s, h in zip(samples, hidden, strict=True)], {"gold_reward": right}

        room = room_for(context.rows, encoder)
        online = Online(encoder, context.rows, 1, self.temperature, room, context.settings.evaluate.batch_tokens, judge)
        teacher = Teacher(at.parent.name, len(examples), None, _spent(at) if at.name == "result.json" else None)
        return PreparedExamples(drawn_later(examples, 1, room), teacher=teacher, online=online)

    def by_token(self, logits: torch.Tensor, taught: torch.Tensor, words: int, targets: torch.Tensor) -> torch.Tensor:
        return jensen_shannon(logits[:, :words], taught, self.beta)


def jensen_shannon(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """[N]: the generalised Jensen-Shannon divergence of logits [N, V], nats (Agarwal et al., 2024); at beta 0 and 1 the two Kullback-Leibler ones."""
    import torch

    if beta in (0.0, 1.0):
        return divergence(student, teacher, 1.0, "forward" if beta == 0.0 else "reverse")
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum(-1)


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float, direction: str) -> torch.Tensor:
    """[N]: KL(teacher ‖ student), or KL(student ‖ teacher) if the direction is reverse, of softened logits [N, V], nats."""
    q, p = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    first, second = (p, q) if direction == "forward" else (q, p)
    return (first.exp() * (first - second)).sum(-1)


def source(word: str, cfg: DictConfig) -> Path:
    """The file that stands for a teacher: a finished cell's result.json, or a base model's manifest."""
    cell, model = cell_at(word, cfg) / "result.json", Path(cfg.paths.models) / word / "manifest.json"
    return model if model.exists() and not cell.exists() else cell


def teacher_states(word: str, wanted: Sequence[Example], context: TrainingContext) -> TeacherStates:
    """The states of the teacher `word` (a finished cell, or a base model under models/) on these examples, one a row.

    Raises:
        UserError: no such teacher, one of another vocabulary, one that answers without a model or after reasoning.
    """
    cfg = context.cfg
    at = source(word, cfg)
    if at.name == "result.json":
        needed(word, cfg, "objective.teacher")
    config = _config(at, cfg)
    key: list[Any] = [sha256(at), sha256(Path(cfg.paths.models) / config.model.name / "manifest.json"), str(context.dtype), context.device.type,
             OmegaConf.to_container(config.task, resolve=True), [dataclasses.astuple(e) for e in wanted]]
    path = Path(cfg.paths.work) / "teachers" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.safetensors"
    stored = _stored(path)
    if stored is None:
        _ask(word, config, at, wanted, context, path)
        stored = _stored(path)
    assert stored is not None
    about, head, hidden = stored
    teacher = Teacher(at.parent.name, len(wanted), about["right"], about["seconds"])
    return TeacherStates(Head(head, len(context.encoder.tokenizer), AfterLayer(**about.get("after", {}))), hidden, teacher)


def _stored(path: Path) -> tuple[dict[str, Any], Any, list[torch.Tensor]] | None:
    """(what is known of the states, the output layer, [n, d] a row) of a file that `_ask` wrote; None where there is none, or a damaged one."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            head = _layer(file.get_tensor("weight"), file.get_tensor("bias") if "bias" in file.keys() else None)  # noqa: SIM118 (no dict)
            return about, head, list(file.get_tensor("hidden").split(about["tokens"]))
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        print(f"warning: {path} is damaged ({type(error).__name__}); the teacher is asked again", file=sys.stderr)
        return None


def _config(at: Path, cfg: DictConfig) -> DictConfig:
    """The teacher's config, with this cell's task."""
    if at.name == "result.json":
        config = cell_config(finished(at.parent), cfg)
        config.task = cfg.task
        return config
    return OmegaConf.create({**cfg, **UNTOUCHED, "model": {"name": at.parent.name, "trust_remote_code": cfg.model.trust_remote_code}})


def _ask(word: str, config: DictConfig, at: Path, wanted: Sequence[Example], context: TrainingContext, path: Path) -> None:
    """One pass of the teacher over the examples, written to a file atomically."""
    import torch
    from safetensors.torch import save_file

    watch = Stopwatch(context.device)
    scorer = teaching(word, config, at, context)
    examples = [scorer.encoder.example(dataclasses.replace(e, prompt=scorer.prompt(e.prompt))) for e in wanted]
    scorer.encoder.check("the training rows with the teacher's prompt")
    hidden, right = _pass(scorer, examples)
    layer = scorer.model.get_output_embeddings()
    tensors = {"hidden": torch.cat(hidden), "weight": layer.weight.detach().cpu()} | ({"bias": layer.bias.detach().cpu()} if layer.bias is not None else {})
    seconds = round(watch.lap() + (_spent(at) if at.name == "result.json" else 0.0), 3)
    about = {"tokens": [len(h) for h in hidden], "right": right / len(examples), "seconds": seconds,
             "after": dataclasses.asdict(AfterLayer.of(scorer.model.config))}
    with atomic_path(path) as beside:
        save_file({k: v.contiguous() for k, v in tensors.items()}, beside, {"about": json.dumps(about)})


def teaching(word: str, config: DictConfig, at: Path, context: TrainingContext) -> Scorer:
    """The teacher, loaded as it answers. Raises UserError as teacher_states."""
    import torch

    scorer = context.scorer(word, at.parent / "artefact" if at.name == "result.json" else None, config)
    if scorer.reasoning:
        raise UserError(f"objective.teacher={word} reasons before it answers, and what it says of a bare answer means little; choose another one")
    if scorer.alone:
        raise UserError(f"objective.teacher={word} does not answer by its own distributions; choose another one")
    scorer.batch_tokens = context.settings.evaluate.batch_tokens
    if not isinstance(scorer.model.get_output_embeddings(), torch.nn.Linear):
        raise UserError(f"objective.teacher={word} has no linear output layer; choose another teacher")
    if scorer.encoder.tokenizer.get_vocab() != context.encoder.tokenizer.get_vocab():
        what = f"objective.teacher={word} has another vocabulary than {context.cfg.model.name}, so its distributions are over other tokens"
        raise UserError(f"{what}; choose a teacher of the same tokenizer")
    return scorer


def _pass(scorer: Scorer, examples: Sequence[Encoded]) -> tuple[list[torch.Tensor], int]:
    """([n, d] a row on the CPU, how many rows the teacher's likeliest tokens get right)."""
    import torch

    states: list[Any] = [None] * len(examples)
    right, counts = 0, {"label": 1}
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer, after = scorer.model.eval().get_output_embeddings(), AfterLayer.of(scorer.model.config)
    hook = layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    try:
        with torch.inference_mode(), autocast(scorer.device, scorer.dtype):
            for part in by_length([e.tokens for e in examples], scorer.batch_tokens):
                batch = collate([examples[i] for i in part], counts, scorer.encoder.pad_id).to(scorer.device)
                logits = logits_of(scorer.model, batch)
                hidden, made = seen.pop()
                if logits.shape != made.shape or not torch.allclose(logits, after(made), rtol=1e-3, atol=1e-3):
                    what = f"objective.teacher: {type(scorer.model).__name__} changes its logits after its output layer in a way that is not known here"
                    raise UserError(f"{what}; choose another teacher, or technique=task_distillation")
                lengths = torch.bincount(batch.rows, minlength=len(part)).tolist()
                for index, mine, hit in zip(part, hidden.cpu().split(lengths), (logits.argmax(-1) == batch.targets).split(lengths), strict=True):
                    states[index] = mine.clone()
                    right += bool(hit.all())
    finally:
        hook.remove()
    return states, right


def _spent(at: Path) -> float:
    """Seconds of a cell's warm-up and training."""
    phases = read_result(at).phases
    return phases.warmup_s + phases.train_s if phases else 0.0


def _layer(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    import torch

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer
