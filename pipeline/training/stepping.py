"""How an optimiser step is done: eagerly, micro-batch by micro-batch, or over static shapes and CUDA graphs (pipeline/engine).

Library. `choose` takes the fast way where `train.engine` and the device allow it and says why where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.core.files import UserError
from pipeline.core.settings import Train
from pipeline.data.rows import Encoded, step_rows
from pipeline.methods.base import Method
from pipeline.models.base import autocast
from pipeline.objectives.base import Objective

if TYPE_CHECKING:
    from pipeline.engine.layout import Micro, Shapes
    from pipeline.engine.streams import Streams


@dataclass(frozen=True)
class Run:
    """What is trained, on what, and how.

    examples: one list of encoded examples a row; total: optimiser steps; dtype: of the arithmetic; pad_id: the token that fills rows up.
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

    def step_examples(self, step: int) -> list[Encoded]:
        """The examples of optimiser step `step` (from 0)."""
        return [e for r in step_rows(len(self.examples), self.settings.batch_size, self.seed, step) for e in self.examples[r]]


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

    def warm(self) -> None:
        """What is done once before the first step (capture). Raises RuntimeError where it cannot be done."""

    def step(self, step: int, factor: float) -> tuple[Any, int, int]:
        """(loss on the device, real tokens, padding) of optimiser step `step` at `factor` times the learning rate."""

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

    def __init__(self, run: Run) -> None:
        self.run = run
        self.reason: str | None = None
        self.notes: list[str] = []
        self.trained = [p for p in run.model.parameters() if p.requires_grad]
        self.optimizer = self._optimizer(run.method.optimizer_groups(run.model, run.settings.learning_rate))
        if run.settings.checkpointing:
            checkpoint_activations(run.model)

    def _optimizer(self, groups: list[dict[str, Any]]) -> Any:
        import torch

        for group in groups:
            group["base_lr"] = group["lr"]
        settings = self.run.settings
        options: dict[str, Any] = {"weight_decay": settings.weight_decay, "lr": settings.learning_rate}
        if settings.optimizer == "paged_adamw":
            if self.run.device.type == "cuda":
                from bitsandbytes.optim import PagedAdamW32bit

                return PagedAdamW32bit(groups, **options)
            self.notes.append("paged_adamw needs a GPU; plain AdamW ran on the CPU")
        return torch.optim.AdamW(groups, fused=True, **options)

    def warm(self) -> None:
        """Nothing to prepare."""

    def step(self, step: int, factor: float) -> tuple[Any, int, int]:
        import torch

        run = self.run
        run.model.train()
        losses, tokens, padding = [], 0, 0
        for batch in run.objective.batches(run.step_examples(step), run.settings, run.pad_id):
            tokens, padding = tokens + batch.tokens, padding + batch.input_ids.numel() - batch.tokens
            with autocast(run.device, run.dtype):
                loss = run.objective.loss(run.model, batch.to(run.device))
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.trained, run.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.step()
        run.method.after_step(run.model, step)
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum(), tokens, padding

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

    def __init__(self, run: Run) -> None:
        from pipeline.engine.bind import bind
        from pipeline.engine.parts import Unsupported
        from pipeline.engine.steps import ByAutograd, ByHand, Stepper

        settings, objective = run.settings, run.objective
        if not run.total:
            raise Unsupported("there is nothing to train")
        if run.method.acts_between_steps:
            raise Unsupported("the method acts between steps")
        if settings.checkpointing:
            raise Unsupported("activations are checkpointed")
        if objective.own_batches:
            raise Unsupported("the objective makes batches of its own")
        self.run = run
        self.notes: list[str] = []
        self.engine = "handwritten"
        self.reason: str | None = None
        buckets, streams = _shapes(run)
        groups = run.method.optimizer_groups(run.model, settings.learning_rate)
        try:
            if not objective.plain or len(groups) != 1 or set(groups[0]) - {"params", "lr"} or groups[0]["lr"] != settings.learning_rate:
                raise Unsupported("its loss or optimiser is its own")
            shapes = streams or buckets
            bound = bind(run.model, run.dtype, accumulate=shapes.accumulates, seed=run.seed)
            bound.serve(run.model)
            program: Any = ByHand(bound)
        except Unsupported as reason:
            program, shapes = ByAutograd(run.model, objective, groups, settings.learning_rate, run.device, run.dtype), buckets
            self.engine, self.reason = "captured", str(reason)
        program.buffer.weight_decay.fill_(settings.weight_decay)
        program.buffer.max_norm.fill_(settings.max_grad_norm)
        self.stepper = Stepper(program, shapes, run.pad_id, run.device)
        self.program = program
        self.widths: list[int] | None = sorted(self.stepper.inputs)
        self.streams = shapes is streams
        if settings.optimizer == "paged_adamw":
            self.notes.append("paged_adamw cannot be captured: the fast engine's AdamW ran, its state not paged")

    def warm(self) -> None:
        firsts: dict[int, Micro] = {}
        for step in range(self.run.total):
            for micro in self.stepper.shapes.micro_batches([self.run.step_examples(step)]):
                firsts.setdefault(micro.shape.width, micro)
            if len(firsts) == len(self.stepper.inputs):
                break
        self.stepper.warm(firsts)

    def step(self, step: int, factor: float) -> tuple[Any, int, int]:
        loss, tokens, padding = self.stepper.step([self.run.step_examples(step)], [self.run.settings.learning_rate * factor])
        return loss[0], tokens, padding

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

    from pipeline.engine.streams import shapes_of_run
    from pipeline.models.base import parameters

    settings, model = run.settings, run.model
    soft = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    has_kernel = run.device.type == "cuda" and run.dtype == torch.bfloat16
    streamable = not soft and (has_kernel or (settings.padding_free == "always" and run.device.type != "cuda"))
    orders = [step_rows(len(run.examples), settings.batch_size, run.seed, step) for step in range(run.total)]
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    return shapes_of_run(run.examples, settings, orders, run.total, streamable, layers, parameters(model)[1])


def checkpoint_activations(model: Any) -> None:
    """Keep each layer's input alone. Raises UserError where the model's layers cannot be gone through again."""
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"train.checkpointing=true does not go with this model ({' '.join(str(error).split())}); set it to false") from error


def choose(run: Run) -> Stepping:
    """The way to step, ready for the first step; its `reason` says why it is not the fast one where that was wanted.

    train.engine: auto (fast on CUDA), fast or eager.
    """
    engine = run.settings.engine
    if engine == "eager" or (engine == "auto" and run.device.type != "cuda"):
        return Eager(run)
    from pipeline.engine.parts import Unsupported

    try:
        stepping = Fast(run)
    except Unsupported as reason:
        return _instead(Eager(run), str(reason))
    try:
        stepping.warm()
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        stepping.close()
        return _instead(Eager(run), f"the capture failed ({str(error).splitlines()[0]})")
    return stepping


def _instead(stepping: Eager, reason: str) -> Eager:
    stepping.reason = reason
    return stepping
