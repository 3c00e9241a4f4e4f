"""How an optimiser step is done: eagerly, micro-batch by micro-batch, or over static shapes and CUDA graphs (pipeline/engine).

Library. `choose` takes the fast way where `train.engine` and the device allow it and says why where it does not.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.core.files import UserError
from pipeline.core.settings import Train
from pipeline.data.rows import Batch, Encoded, step_rows
from pipeline.methods.base import Method
from pipeline.models import architecture
from pipeline.models.base import autocast, parameters
from pipeline.objectives.base import Objective, Online
from pipeline.training.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from pipeline.engine.layout import Micro, Shapes
    from pipeline.engine.streams import Streams


@dataclass(frozen=True)
class Run:
    """What is trained, on what, and how.

    examples: one list of encoded examples a row; total: optimiser steps; dtype: of the arithmetic; pad_id: the token that fills rows up.
    ranks: the processes that train together, each a part of every step. online: how texts are drawn, where a step is not known before it comes.
    """

    model: Any
    method: Method
    objective: Objective
    examples: Sequence[Sequence[Encoded]]
    settings: Train
    seed: int
    total: int
    device: Any
    dtype: Any
    pad_id: int
    ranks: Ranks = ALONE
    online: Online | None = None

    def step_examples(self, step: int) -> list[Encoded]:
        """The examples of optimiser step `step` (from 0)."""
        return [e for r in step_rows(len(self.examples), self.settings.batch_size, self.seed, step) for e in self.examples[r]]

    def share(self, step: int) -> list[Encoded]:
        """This rank's part of them."""
        return self.ranks.share(self.step_examples(step))

    def passed(self, step: int) -> list[list[Encoded]]:
        """What goes through the model in a step: this rank's part, and what the loss looks at besides, if it does."""
        share = self.share(step)
        beside = self.objective.beside(share)
        return [share, beside] if beside else [share]

    def batches(self, step: int) -> Iterator[Batch]:
        """The micro-batches of its part; the losses of all ranks' sum to the step's loss."""
        examples = self.step_examples(step)
        if self.ranks.count > 1:
            return self.ranks.batches(examples, self.settings, self.pad_id)
        return self.objective.batches(examples, self.settings, self.pad_id)


class Stepping(Protocol):
    """What the loop asks for."""

    engine: str
    """One of results.ENGINES."""
    reason: str | None
    """Why no faster one, where one was asked for."""
    widths: list[int] | None
    """Tokens of a row, or of a stream of rows, that steps were made for; None: of any."""
    streams: bool
    notes: list[str]
    shards: dict[str, Any] | None
    """This rank's parts of the trained weights, by name, where no rank has the whole ones (training/sharded.py)."""

    def warm(self) -> None:
        """What is done once before the first step (capture). Raises RuntimeError where it cannot be done."""

    def step(self, step: int, factor: float) -> tuple[Any, int, int]:
        """(loss on the device, real tokens, padding) of optimiser step `step` at `factor` times the learning rate."""

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Within it the first rank's run.model answers with the weights as they are; for all ranks to enter."""

    def gather(self) -> None:
        """Bring here what other ranks hold of the weights and the optimiser's state, where `shards` is None; for all ranks to call."""

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take an optimiser's state; the parameters have been loaded already."""

    def close(self) -> None:
        """Free what only steps need."""


class Eager:
    """Forward, loss and backward over the step's micro-batches, then clipping and torch's (or bitsandbytes' paged) AdamW."""

    engine = "eager"
    widths: list[int] | None = None
    streams = False
    shards: dict[str, Any] | None = None

    def __init__(self, run: Run) -> None:
        self.run = run
        self.reason: str | None = None
        self.notes: list[str] = []
        self.model = self._model()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self._optimizer(run.method.optimizer_groups(self.model, run.settings.learning_rate))

    def _model(self) -> Any:
        """The model that steps go through."""
        if self.run.settings.checkpointing:
            checkpoint_activations(self.run.model)
        return self.run.model

    def _optimizer(self, groups: list[dict[str, Any]]) -> Any:
        if self.run.settings.optimizer == "paged_adamw":
            if self.run.device.type == "cuda":
                from bitsandbytes.optim import PagedAdamW32bit

                return self._adamw(groups, PagedAdamW32bit)
            self.notes.append("paged_adamw needs a GPU; plain AdamW ran on the CPU")
        return self._adamw(groups)

    def _adamw(self, groups: list[dict[str, Any]], made: Any = None) -> Any:
        """torch's fused AdamW, or another class's, over these groups."""
        import torch

        for group in groups:
            group["base_lr"] = group["lr"]
        make = made or functools.partial(torch.optim.AdamW, fused=True)
        return make(groups, weight_decay=self.run.settings.weight_decay, lr=self.run.settings.learning_rate)

    def warm(self) -> None:
        """Nothing to prepare."""

    def step(self, step: int, factor: float) -> tuple[Any, int, int]:
        import torch

        run = self.run
        self.model.train()
        losses, tokens, padding = [], 0, 0
        for batch in run.batches(step):
            tokens, padding = tokens + batch.tokens, padding + batch.padded_tokens - batch.tokens
            loss = self._loss(batch.to(run.device))
            loss.backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        self._sum_gradients()
        run.ranks.sum_([loss])
        torch.nn.utils.clip_grad_norm_(self.trained, run.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.step()
        run.method.after_step(self.model, step)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, tokens, padding

    def _loss(self, batch: Batch) -> Any:
        with autocast(self.run.device, self.run.dtype):
            return self.run.objective.loss(self.model, batch)

    def _sum_gradients(self) -> None:
        """Over the ranks; where a parameter has none on one of them (an expert that no token went to), it counts as 0."""
        import torch

        if self.run.ranks.count == 1:
            return
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.run.ranks.sum_([p.grad for p in self.trained])

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """It is whole."""
        return contextlib.nullcontext()

    def gather(self) -> None:
        """All of it is here, or lies in parts for good."""

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def close(self) -> None:
        """The optimiser's state goes with this object."""
        if self.run.settings.checkpointing:
            self.run.model.gradient_checkpointing_disable()


class Fast:
    """One run through pipeline/engine. Raises engine.parts.Unsupported where neither program takes the model."""

    shards: dict[str, Any] | None = None

    def __init__(self, run: Run) -> None:
        from pipeline.engine.bind import bind
        from pipeline.engine.layout import SUMMED_FP32
        from pipeline.engine.parts import Unsupported
        from pipeline.engine.steps import ByAutograd, ByHand, Stepper

        settings, stepped = run.settings, run.objective.stepped
        if not run.total:
            raise Unsupported("there is nothing to train")
        if run.method.acts_between_steps:
            raise Unsupported("the method acts between steps")
        if settings.checkpointing:
            raise Unsupported("activations are checkpointed")
        if stepped.own_batches:
            raise Unsupported("the objective makes batches of its own")
        if architecture.has_encoder(run.model):
            raise Unsupported("an encoder reads the prompt")
        if run.objective.of_sequences and architecture.has_dropout(run.model):
            raise Unsupported("dropout draws anew in each of the two passes that a step of this objective takes")
        self.run = run
        self.notes: list[str] = []
        self.engine = "handwritten"
        self.reason: str | None = None
        buckets, streams = _shapes(run)
        groups = run.method.optimizer_groups(run.model, settings.learning_rate)
        try:
            if not stepped.plain or len(groups) != 1 or set(groups[0]) - {"params", "lr"} or groups[0]["lr"] != settings.learning_rate:
                raise Unsupported("its loss or optimiser is its own")
            if run.method.corrects_gradients:
                raise Unsupported("the method corrects its gradients")
            shapes = streams or buckets
            wide = run.ranks.count > 1 and parameters(run.model)[0] <= SUMMED_FP32
            bound = bind(run.model, run.dtype, accumulate=shapes.accumulates or wide, seed=run.ranks.seed(run.seed))
            if run.online is not None and run.online.exact:
                bound.llama.keep_order()
            bound.serve(run.model)
            program: Any = ByHand(bound)
        except Unsupported as reason:
            program, shapes = ByAutograd(run.model, stepped, groups, settings.learning_rate, run.device, run.dtype), buckets
            self.engine, self.reason = "captured", str(reason)
        program.buffer.weight_decay.fill_(settings.weight_decay)
        program.buffer.max_norm.fill_(settings.max_grad_norm)
        self.stepper = Stepper(program, shapes, run.pad_id, run.device, run.ranks if run.ranks.count > 1 else None, run.objective.of_sequences)
        self.program = program
        self.widths: list[int] | None = sorted(self.stepper.inputs)
        self.streams = shapes is streams
        if settings.optimizer == "paged_adamw":
            self.notes.append("paged_adamw cannot be captured: the fast engine's AdamW ran, its state not paged")

    def warm(self) -> None:
        if self.run.online is not None:
            self.stepper.warm()
            return
        firsts: dict[int, Micro] = {}
        for step in range(self.run.total):
            for micro in self._micro_batches(step):
                firsts.setdefault(micro.shape.width, micro)
            if len(firsts) == len(self.stepper.inputs):
                break
        self.stepper.warm(firsts)

    def _micro_batches(self, step: int) -> Iterator[Micro]:
        """Those of a step whose weights, if they are not known before it, are alike."""
        run, shapes = self.run, self.stepper.shapes
        if not run.objective.of_sequences:
            yield from shapes.micro_batches([run.share(step)], [run.step_examples(step)])
            return
        for part in run.passed(step):
            yield from shapes.micro_batches([[Encoded(e.ids, e.start) for e in part]])

    def step(self, step: int, factor: float) -> tuple[Any, int, int]:
        examples, rate = self.run.step_examples(step), self.run.settings.learning_rate * factor
        own = None
        if self.run.objective.of_sequences:
            own, examples = self._by_cross_entropy(examples)
        loss, tokens, padding = self.stepper.step([self.run.ranks.share(examples)], [rate], [examples])
        return loss[0] if own is None else own, tokens, padding

    def _by_cross_entropy(self, examples: Sequence[Encoded]) -> tuple[Any, list[Encoded]]:
        """(the objective's loss of a step, its examples so weighted that their cross-entropy has the gradient of that loss): dL/dθ is the sum over
        sequences of dL/d log p · d log p/dθ, and the first factor is a number."""
        import torch

        objective = self.run.objective
        beside = objective.beside(examples)
        log_p, looked_at = (torch.tensor(self.stepper.log_p(part), dtype=torch.float64) for part in (examples, beside))
        loss = objective.sequence_loss(log_p.requires_grad_(), examples, looked_at)
        (slopes,) = torch.autograd.grad(loss, log_p)
        tokens = sum(len(e.ids) - e.start for e in examples)
        return loss.detach(), [Encoded(e.ids, e.start, weight=-slope * tokens) for e, slope in zip(examples, slopes.tolist(), strict=True)]

    def gather(self) -> None:
        self.stepper.gather()

    def whole(self) -> contextlib.AbstractContextManager[None]:
        self.gather()
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return self.stepper.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stepper.buffer.load_state_dict(state)

    def close(self) -> None:
        self.stepper.close()
        self.program.release()


def _shapes(run: Run) -> tuple[Shapes, Streams | None]:
    """Rows of equal width, and streams where they are wanted."""
    import torch

    from pipeline.engine.layout import MOST_WIDTHS, STEPS_A_WIDTH, OpenShapes
    from pipeline.engine.streams import shapes_of_run

    settings, model = run.settings, run.model
    if run.online is not None:
        most = max(1, min(MOST_WIDTHS, run.total // STEPS_A_WIDTH))
        return OpenShapes(run.examples, 1, settings.batch_size, settings.micro_batch_tokens, most, run.online.longest), None
    soft = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    has_kernel = run.device.type == "cuda" and run.dtype == torch.bfloat16
    streamable = not soft and (has_kernel or (settings.padding_free == "always" and run.device.type != "cuda"))
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    parts = [part for step in range(run.total) for part in run.passed(step)]
    return shapes_of_run(parts, settings, [[number] for number in range(len(parts))], run.total, streamable, layers, parameters(model)[1])


def checkpoint_activations(model: Any) -> None:
    """Keep each layer's input alone. Raises UserError where the model's layers cannot be gone through again."""
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"train.checkpointing=true does not go with this model ({' '.join(str(error).split())}); set it to false") from error


def choose(run: Run) -> Stepping:
    """The way to step, ready for the first step, the same on every rank; its `reason` says why it is not the fast one where that was wanted.

    train.engine: auto (fast on CUDA), fast or eager.
    """
    engine = run.settings.engine
    run.ranks.from_first_(p.data for p in run.model.parameters() if p.requires_grad)
    if engine == "eager" or (engine == "auto" and run.device.type != "cuda"):
        return Eager(run)
    stepping, reason = _fast(run)
    reasons = [r for r in run.ranks.gathered(reason) if r is not None]
    if stepping is not None and not reasons:
        return stepping
    if stepping is not None:
        stepping.close()
    return _instead(Eager(run), reasons[0])


def _fast(run: Run) -> tuple[Fast | None, str | None]:
    """The fast way, captured; or why there is none."""
    from pipeline.engine.parts import Unsupported

    try:
        stepping = Fast(run)
    except Unsupported as reason:
        return None, str(reason)
    try:
        stepping.warm()
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        stepping.close()
        return None, f"the capture failed ({str(error).splitlines()[0]})"
    return stepping, None


def _instead(stepping: Eager, reason: str) -> Eager:
    stepping.reason = reason
    return stepping
