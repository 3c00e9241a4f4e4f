"""How an optimiser step is done: eagerly, micro-batch by micro-batch, or over static shapes and CUDA graphs (pipeline/engine).

Library. `choose` takes the fast way where `train.engine` and the device allow it and says why where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.core.files import UserError
from pipeline.core.settings import Train
from pipeline.data.rows import Encoded, step_rows
from pipeline.methods.base import Method
from pipeline.models.base import autocast
from pipeline.objectives.base import Objective

if TYPE_CHECKING:
    from pipeline.engine.layout import Shapes
    from pipeline.engine.streams import Streams


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

    def __init__(self, model: Any, method: Method, objective: Objective, examples: Sequence[Sequence[Encoded]], settings: Train, seed: int, device: Any,
                 dtype: Any, pad_id: int) -> None:
        self.model, self.method, self.objective, self.examples, self.settings, self.seed = model, method, objective, examples, settings, seed
        self.device, self.dtype, self.pad_id = device, dtype, pad_id
        self.reason: str | None = None
        self.notes: list[str] = []
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self._optimizer(method.optimizer_groups(model, settings.lr))
        if settings.checkpointing:
            checkpoint_activations(model)

    def _optimizer(self, groups: list[dict[str, Any]]) -> Any:
        import torch

        for group in groups:
            group["base_lr"] = group["lr"]
        options: dict[str, Any] = {"weight_decay": self.settings.weight_decay, "lr": self.settings.lr}
        if self.settings.optimizer == "paged_adamw":
            if self.device.type == "cuda":
                from bitsandbytes.optim import PagedAdamW32bit

                return PagedAdamW32bit(groups, **options)
            self.notes.append("paged_adamw needs a GPU; plain AdamW ran on the CPU")
        return torch.optim.AdamW(groups, fused=True, **options)

    def warm(self) -> None:
        """Nothing to prepare."""

    def step(self, step: int, factor: float) -> tuple[Any, int, int]:
        import torch

        self.model.train()
        rows = step_rows(len(self.examples), self.settings.batch_size, self.seed, step)
        losses, tokens, padding = [], 0, 0
        for batch in self.objective.batches([e for r in rows for e in self.examples[r]], self.settings, self.pad_id):
            tokens, padding = tokens + batch.tokens, padding + batch.input_ids.numel() - batch.tokens
            with autocast(self.device, self.dtype):
                loss = self.objective.loss(self.model, batch.to(self.device))
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.step()
        self.method.after_step(self.model, step)
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum(), tokens, padding

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def close(self) -> None:
        """The optimiser's state goes with this object."""
        if self.settings.checkpointing:
            self.model.gradient_checkpointing_disable()


class Fast:
    """One run through pipeline/engine. Raises fast.bind.Unsupported where neither program takes the model."""

    def __init__(self, model: Any, method: Method, objective: Objective, examples: Sequence[Sequence[Encoded]], settings: Train, seed: int, device: Any,
                 dtype: Any, pad_id: int, total: int) -> None:
        from pipeline.engine.bind import bind
        from pipeline.engine.parts import Unsupported
        from pipeline.engine.steps import ByAutograd, ByHand, Stepper

        if not total:
            raise Unsupported("there is nothing to train")
        if method.acts_between_steps:
            raise Unsupported("the method acts between steps")
        if settings.checkpointing:
            raise Unsupported("activations are checkpointed")
        if objective.own_batches:
            raise Unsupported("the objective makes batches of its own")
        self.examples, self.settings, self.seed, self.lr = examples, settings, seed, settings.lr
        self.notes: list[str] = []
        self.engine = "handwritten"
        self.reason: str | None = None
        buckets, streams = self._shapes(model, device, dtype, total)
        groups = method.optimizer_groups(model, settings.lr)
        try:
            if not objective.plain or len(groups) != 1 or set(groups[0]) - {"params", "lr"} or groups[0]["lr"] != settings.lr:
                raise Unsupported("its loss or optimiser is its own")
            shapes = streams or buckets
            bound = bind(model, dtype, accumulate=shapes.accumulates, seed=seed)
            bound.serve(model)
            program: Any = ByHand(bound)
        except Unsupported as reason:
            program, shapes = ByAutograd(model, objective, groups, settings.lr, device, dtype), buckets
            self.engine, self.reason = "captured", str(reason)
        program.buffer.weight_decay.fill_(settings.weight_decay)
        program.buffer.max_norm.fill_(settings.max_grad_norm)
        self.stepper = Stepper(program, shapes, pad_id, device)
        self.program = program
        self.widths: list[int] | None = sorted(self.stepper.inputs)
        self.streams = shapes is streams
        if settings.optimizer == "paged_adamw":
            self.notes.append("paged_adamw cannot be captured: the fast engine's AdamW ran, its state not paged")

    def _shapes(self, model: Any, device: Any, dtype: Any, total: int) -> tuple[Shapes, Streams | None]:
        """Rows of equal width, and streams where they are wanted."""
        import torch

        from pipeline.engine.streams import shapes_of_run
        from pipeline.models.base import parameters

        settings = self.settings
        soft = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
        has_kernel = device.type == "cuda" and dtype == torch.bfloat16
        streamable = not soft and (has_kernel or (settings.padding_free == "always" and device.type != "cuda"))
        orders = [step_rows(len(self.examples), settings.batch_size, self.seed, step) for step in range(total)]
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
        return shapes_of_run(self.examples, settings, orders, total, streamable, layers, parameters(model)[1])

    def warm(self) -> None:
        self.stepper.warm()

    def step(self, step: int, factor: float) -> tuple[Any, int, int]:
        rows = step_rows(len(self.examples), self.settings.batch_size, self.seed, step)
        loss, tokens, padding = self.stepper.step([[e for r in rows for e in self.examples[r]]], [self.lr * factor])
        return loss[0], tokens, padding

    def state_dict(self) -> dict[str, Any]:
        return self.stepper.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stepper.buffer.load_state_dict(state)

    def close(self) -> None:
        self.stepper.close()
        self.program.release()


def checkpoint_activations(model: Any) -> None:
    """Keep each layer's input alone. Raises UserError where the model's layers cannot be gone through again."""
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"train.checkpointing=true does not go with this model ({' '.join(str(error).split())}); set it to false") from error


def choose(engine: str, eager: Callable[[], Eager], fast: Callable[[], Fast], device: Any) -> Stepping:
    """The way to step, ready for the first step; its `reason` says why it is not the fast one where that was wanted.

    engine: auto (fast on CUDA), fast or eager.
    """
    if engine == "eager" or (engine == "auto" and device.type != "cuda"):
        return eager()
    from pipeline.engine.parts import Unsupported

    try:
        stepping = fast()
    except Unsupported as reason:
        return _instead(eager(), str(reason))
    try:
        stepping.warm()
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        stepping.close()
        return _instead(eager(), f"the capture failed ({str(error).splitlines()[0]})")
    return stepping


def _instead(stepping: Eager, reason: str) -> Eager:
    stepping.reason = reason
    return stepping
