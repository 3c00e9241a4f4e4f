"""Reinforcement learning from a verifiable reward: sampled answers that are right are made likelier. conf/objective/grpo.yaml, rloo.yaml.

The loop is TRL's (GRPOTrainer, RLOOTrainer); phases, memory, tokens, validation, schedule and optimiser groups are this project's. An answer
earns 1 if what is extracted from it is the row's, else 0, so the model must be right now and then from the start: start=<a fine-tuned cell>.
A killed run starts anew.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.files import UserError
from pipeline.core.settings import Task
from pipeline.data.rows import Encoded, Encoder
from pipeline.objectives.base import Objective, PreparedExamples, TrainingContext
from pipeline.scoring.answers import canonical, extract
from pipeline.training.loop import Loop, Trained, lr_factor, validation_steps


@dataclass(frozen=True)
class Question(Encoded):
    """A row's example, with what sampling and rewarding need."""

    row: Any = None
    encoder: Any = None


@dataclass(frozen=True)
class Grpo(Objective):
    """Group-relative policy optimisation (Shao et al., 2024), or REINFORCE with the other samples' mean as baseline (RLOO, Ahmadian et al., 2024).

    A step takes train.batch_size rows and num_generations sampled answers of each; losses and advantages are TRL's defaults.
    """

    prepares = True
    trainer = "trl"

    algorithm: str
    num_generations: int
    temperature: float
    beta: float = 0.0
    """Weight of the KL to the model as training starts with it; above 0 only for an adapter."""

    def __post_init__(self) -> None:
        if self.algorithm not in ("grpo", "rloo"):
            raise UserError(f"objective.algorithm is {self.algorithm!r}; choose grpo or rloo")
        if self.num_generations < 2:
            raise UserError(f"objective.num_generations is {self.num_generations}; answers are compared within a row's own, so at least 2")
        if not self.temperature > 0 or self.beta < 0:
            raise UserError(f"objective.temperature is {self.temperature} and beta {self.beta}; the first must be above 0, the second at least 0")

    @property
    def name(self) -> str:
        return self.algorithm

    def prepared(self, examples: list[list[Encoded]], context: TrainingContext) -> PreparedExamples:
        if importlib.util.find_spec("trl") is None:
            raise UserError(f"objective={self.algorithm} trains with TRL, which is not installed; run: pip install 'trl>=1.16,<1.17'")
        if self.beta and not hasattr(context.model, "peft_config"):
            raise UserError(f"objective.beta is {self.beta}, but only an adapter keeps the model it started from to compare with; set 0 or choose method=lora")
        questions = [Question(**vars(e), row=row, encoder=context.encoder) for row, (e, *_) in zip(context.rows, examples, strict=True)]
        return PreparedExamples([[q] for q in questions])

    def loop(self) -> Any:
        return TrlLoop

    def hyperparameters(self) -> dict[str, Any]:
        return {"num_generations": self.num_generations, "temperature": self.temperature, "beta": self.beta}


def answer_in(text: str, row: dict, task: Task) -> str | None:
    """The answer in a sampled text: for a choice the one that it begins with, else what the task extracts."""
    if task.scoring == "generate":
        return extract(text, task.answer_pattern)
    start = text.strip().casefold()
    return max((c for c in row["choices"] if start.startswith(c.casefold())), key=len, default=None)


def reward(completions: Sequence[Any], row: Sequence[dict], task: Task) -> list[float]:
    """1 for a right answer, 0 for any other; a completion is a text or, in a chat, a list of one message."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    answers = [answer_in(text, one, task) for text, one in zip(texts, row, strict=True)]
    return [float(a is not None and canonical(a) == canonical(one["answer"])) for a, one in zip(answers, row, strict=True)]


class TrlLoop(Loop):
    """The run that TRL's trainer makes of the same arguments. Raises UserError for a method that acts between steps."""

    objective: Grpo

    def run(self) -> Trained:
        if self.method.acts_between_steps:
            raise UserError(f"{self.method.name} acts between steps, which TRL's loop has no place for; choose another method or objective")
        with self.meter.phase("startup"):
            import trl  # noqa: F401
        self.memory.start()
        with tempfile.TemporaryDirectory() as folder:
            with self.meter.phase("warmup"):
                trainer = self._trainer(folder)
            with self._signals(), self._bar() as bar, self.meter.phase("train"):
                self.energy.start()
                trainer.add_callback(self._callback(bar))
                if self.total:
                    trainer.train()
                self.energy.stop()
        memory = self.memory.stop()
        with self.meter.phase("warmup"):  # TRL's own setting up and clearing away
            self._release(trainer)
        if self._stop:
            raise KeyboardInterrupt
        self._select()
        return Trained(self._work([]), memory, self.state.history, [*self.notes, *self._told()])

    def _release(self, trainer: Any) -> None:
        self.state.tokens = int(trainer.state.num_input_tokens_seen)
        self.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        if "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")
        trainer.accelerator.free_memory()

    def _engine(self) -> dict[str, Any]:
        return {"engine": "trl"}

    def _told(self) -> list[str]:
        own = f"trained by TRL's {self.objective.algorithm.upper()} loop; tokens are those of prompts and sampled answers"
        earned = [point["reward"] for point in self.state.history if "reward" in point]
        none = "no sampled answer was right, so nothing was learnt; begin at a fine-tuned cell: start=<cell>"
        return [own, none] if earned and not max(earned) else [own]

    def _trainer(self, folder: str) -> Any:
        """TRL's trainer, set up as the settings say."""
        import torch
        import trl
        from datasets import Dataset
        from transformers import PrinterCallback

        logging.getLogger("accelerate").setLevel(logging.ERROR)
        settings, ask, kind = self.settings, self.objective, self.objective.algorithm.upper()
        questions: list[Any] = [row[0] for row in self.examples]
        encoder: Encoder = questions[0].encoder
        room = _room(questions, encoder)
        together = _together(settings.batch_size, settings.micro_batch_tokens // (ask.num_generations * (room + max(q.start for q in questions))))
        args = getattr(trl, f"{kind}Config")(
            output_dir=folder, max_steps=self.total, per_device_train_batch_size=together * ask.num_generations,
            gradient_accumulation_steps=settings.batch_size // together, num_generations=ask.num_generations, max_completion_length=room,
            temperature=ask.temperature, beta=ask.beta, learning_rate=settings.lr, max_grad_norm=settings.max_grad_norm, seed=self.seed,
            bf16=self.dtype == torch.bfloat16, use_cpu=self.device.type == "cpu", gradient_checkpointing=False, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False, remove_unused_columns=False,
            generation_kwargs={"remove_invalid_values": True},  # numbers that are none end a CUDA process in sampling; the loss then says so
        )
        groups = self.method.optimizer_groups(self.model, settings.lr)
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, self.total, settings.schedule, settings.warmup_share))
        data = Dataset.from_list([{"prompt": _asked(q.row["prompt"], encoder), "row": {k: q.row[k] for k in ("answer", "choices")}} for q in questions])

        def earned(completions: Sequence[Any], row: Sequence[dict], **_: Any) -> list[float]:
            return reward(completions, row, encoder.task)

        trainer = getattr(trl, f"{kind}Trainer")(
            model=self.model, reward_funcs=earned, args=args, train_dataset=data, processing_class=encoder.tokenizer, optimizers=(optimizer, schedule),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _callback(self, bar: Any) -> Any:
        """What the loop does between steps: the curve, validation, and ending on a signal."""
        from transformers import TrainerCallback

        loop, marks = self, validation_steps(self.total, self.settings.validations)

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
                    loop._validate(bar)
                    loop.model.train()
                control.should_training_stop = control.should_training_stop or loop._stop

        return Between()


def _asked(prompt: str, encoder: Encoder) -> Any:
    return [{"role": "user", "content": prompt}] if encoder.task.format == "chat" else prompt


def _room(questions: Sequence[Any], encoder: Encoder) -> int:
    """Tokens to sample: those of the longest choice, or as many as an answer is given at test."""
    if encoder.task.scoring == "generate":
        return encoder.task.max_new_tokens
    return max(len(encoder.answer(c)) for q in questions for c in q.row["choices"])


def _together(batch_size: int, fit: int) -> int:
    """Rows of one forward pass: the largest divisor of the batch that fits."""
    return max(n for n in range(1, batch_size + 1) if batch_size % n == 0 and n <= max(1, fit))
