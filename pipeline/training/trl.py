"""The loop that TRL makes (GRPOTrainer, RLOOTrainer), for an objective that declares `trainer = "trl"`.

Library. Phases, memory, tokens, validation, schedule and optimiser groups are this project's. A killed run starts anew.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol, cast

from pipeline.core.files import UserError
from pipeline.core.settings import Task
from pipeline.data.conversations import turns_of
from pipeline.data.rows import Encoder
from pipeline.measure import turns
from pipeline.training.loop import Loop, Trained, lr_factor, stop_on_signals, validation_steps


class Rewarded(Protocol):
    """What TRL's loop asks of an objective; its examples carry their row and the encoder."""

    algorithm: str
    """grpo or rloo."""
    num_generations: int
    temperature: float
    beta: float

    def reward(self, completions: Sequence[Any], row: Sequence[dict], task: Task) -> list[float]:
        """What each sampled answer earns."""


class TrlLoop(Loop):
    """The run as TRL's trainer trains it. Raises UserError for a method that acts between steps."""

    def train(self) -> Trained:
        if self.run.method.acts_between_steps:
            raise UserError(f"{self.run.method.name} acts between steps, which TRL's loop has no place for; choose another method or objective")
        with self.meter.phase("startup"):
            import trl  # noqa: F401
        self.memory.start()
        with tempfile.TemporaryDirectory() as folder:
            with self.meter.phase("warmup"):
                trainer = self._trainer(folder)
            with turns.alone(), stop_on_signals(self._request_stop), self._bar() as bar, self.meter.phase("train"):
                self.energy.start()
                trainer.add_callback(self._callback(bar))
                if self.run.total:
                    trainer.train()
                self.energy.stop()
        memory = self.memory.stop()
        with self.meter.phase("warmup"):  # TRL's own setting up and clearing away
            self._release(trainer)
        if self._stop:
            raise KeyboardInterrupt
        self._put(self.state.best_weights)
        return Trained(self._work([]), memory, self.state.history, [*self.notes, *self._remarks()])

    def _release(self, trainer: Any) -> None:
        self.state.tokens = int(trainer.state.num_input_tokens_seen)
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        if "ref" in getattr(model, "peft_config", {}):
            model.delete_adapter("ref")
        trainer.accelerator.free_memory()

    def _engine(self) -> dict[str, Any]:
        return {"engine": "trl"}

    def _remarks(self) -> list[str]:
        loop = f"trained by TRL's {self.run.objective.name.upper()} loop; tokens are those of prompts and sampled answers"
        earned = [point["reward"] for point in self.state.history if "reward" in point]
        none = "no sampled answer was right, so nothing was learnt; begin at a fine-tuned cell: start=<cell>"
        return [loop, none] if earned and not max(earned) else [loop]

    def _trainer(self, folder: str) -> Any:
        """TRL's trainer, set up as the settings say."""
        import torch
        import trl
        from datasets import Dataset
        from transformers import PrinterCallback

        logging.getLogger("accelerate").setLevel(logging.ERROR)
        run, settings, ask = self.run, self.run.settings, cast(Rewarded, self.run.objective)
        kind = ask.algorithm.upper()
        questions: list[Any] = [row[0] for row in run.examples]
        encoder: Encoder = questions[0].encoder
        room = _room(questions, encoder)
        together = _together(settings.batch_size, settings.micro_batch_tokens // (ask.num_generations * (room + max(q.start for q in questions))))
        args = getattr(trl, f"{kind}Config")(
            output_dir=folder, max_steps=run.total, per_device_train_batch_size=together * ask.num_generations,
            gradient_accumulation_steps=settings.batch_size // together, num_generations=ask.num_generations, max_completion_length=room,
            temperature=ask.temperature, beta=ask.beta, learning_rate=settings.learning_rate, max_grad_norm=settings.max_grad_norm, seed=run.seed,
            bf16=run.dtype == torch.bfloat16, use_cpu=run.device.type == "cpu", gradient_checkpointing=False, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False, remove_unused_columns=False,
            generation_kwargs={"remove_invalid_values": True},  # numbers that are none end a CUDA process in sampling; the loss then says so
        )
        groups = run.method.optimizer_groups(run.model, settings.learning_rate)
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, run.total, settings.schedule, settings.warmup_share))
        data = Dataset.from_list([{"prompt": _asked(q.row["prompt"], encoder), "row": {k: q.row[k] for k in ("answer", "choices")}} for q in questions])

        def earned(completions: Sequence[Any], row: Sequence[dict], **_: Any) -> list[float]:
            return ask.reward(completions, row, encoder.task)

        trainer = getattr(trl, f"{kind}Trainer")(
            model=run.model, reward_funcs=earned, args=args, train_dataset=data, processing_class=encoder.tokenizer, optimizers=(optimizer, schedule),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _callback(self, bar: Any) -> Any:
        """What the loop does between steps: the curve, validation, and ending on a signal."""
        from transformers import TrainerCallback

        loop, marks = self, validation_steps(self.run.total, self.run.settings.validations)

        class Between(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
                if not logs or "loss" not in logs:
                    return
                if not all(math.isfinite(float(logs.get(key, 0.0))) for key in ("loss", "grad_norm")):
                    loop._mark_diverged("the loss or its gradient", state.global_step)
                    control.should_training_stop = True
                    return
                loop.state.step, loop.state.tokens = state.global_step, int(state.num_input_tokens_seen)
                loop.state.history.append({"step": state.global_step, "loss": float(logs["loss"]), "lr": float(logs["learning_rate"]),
                                           "reward": float(logs["reward"])})
                bar.update()
                loop.energy.tick()
                if state.global_step in marks:
                    loop._validate()
                    loop.run.model.train()
                control.should_training_stop = control.should_training_stop or loop._stop

        return Between()


def _asked(prompt: str, encoder: Encoder) -> Any:
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns_of(prompt)] if encoder.task.chat else prompt


def _room(questions: Sequence[Any], encoder: Encoder) -> int:
    """Tokens to sample: those of the longest choice, or as many as an answer is given at test."""
    if encoder.task.scoring == "generate":
        return encoder.task.max_new_tokens
    return max(len(encoder.answer(c)) for q in questions for c in q.row["choices"])


def _together(batch_size: int, fit: int) -> int:
    """Rows of one forward pass: the largest divisor of the batch that fits."""
    return max(n for n in range(1, batch_size + 1) if batch_size % n == 0 and n <= max(1, fit))
