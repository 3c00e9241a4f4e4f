"""The peers: transformers' Trainer with PEFT, as their documentation shows it, and with every public switch that helps.

Library of `python -m benchmarks.speed`. Peer (a), "plain": LoRA over a base loaded in bf16, full fine-tuning with fp32 weights, both with
bf16=True; QLoRA through prepare_model_for_kbit_training; the Trainer's default optimiser (fused AdamW). Peer (b), "tuned": the same and
Liger kernels, flash attention if it is installed (else SDPA, the default), no check for nan losses; "liger-compile": torch_compile on top,
"compile": torch_compile in Liger's place.
Steps are timed inside the Trainer, between two optimiser steps; its start and end are left out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.speed_workloads import RATIONALE_WEIGHT, Workload, adapter_config, base_model, labels
from pipeline.measure.clock import Stopwatch
from pipeline.measure.memory import PeakMemory

if TYPE_CHECKING:
    import torch

PEERS_B = {"liger": "tuned", "compile": "compile", "liger+compile": "liger-compile"}
"""What the benchmark's word peer_b says -> the kind of the peer."""
COMPILED = ("compile", "liger-compile")


@dataclass
class Run:
    """One side's one run."""

    setup_s: float
    """Model, adapter, optimiser objects."""
    warmup_s: float
    """Compilation, capture, and the steps before the timed ones."""
    timed_s: float
    """The timed steps, device synchronised at both ends."""
    losses: list[float]
    """Of every step, warm-up included."""
    peak_bytes: int | None
    """GPU: the allocator's peak reserved over warm-up and timed steps; CPU: peak resident set."""
    baseline_bytes: int | None
    """The same counter before the first step, model loaded."""
    peak_allocated_bytes: int | None = None
    times_s: list[float] = field(default_factory=list)
    """CPU: every timed step, where a clock between two steps costs nothing. A GPU is not asked to wait there."""
    notes: list[str] = field(default_factory=list)


def silence() -> None:
    """No bars, hints or warnings of the peers' libraries."""
    from transformers.utils import logging as hints

    hints.set_verbosity_error()
    hints.disable_progress_bar()
    for name in ("accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(peft|transformers|accelerate|bitsandbytes|torch)\b.*")


def peer_model(workload: Workload, device: Any, attention: str = "sdpa") -> Any:
    """The model as the documentation prepares it for training."""
    import torch

    model = base_model(workload, device, attention)
    config = adapter_config(workload)
    if config is None:
        return model.float()
    from peft import get_peft_model, prepare_model_for_kbit_training

    if workload.technique == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(workload.seed)
    return get_peft_model(model, config)


def switches(kind: str, device: Any) -> tuple[dict[str, Any], str, list[str]]:
    """(training arguments, attention implementation, notes) of a peer."""
    if kind == "plain":
        return {}, "sdpa", []
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    liger = kind != "compile" and device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    options = {"use_liger_kernel": liger, "optim": "adamw_torch_fused", "logging_nan_inf_filter": False, "torch_compile": kind in COMPILED}
    notes = [] if liger or kind == "compile" else ["Liger kernels are not installed or have no device here; peer (b) ran without them"]
    return options, "flash_attention_2" if flash else "sdpa", notes


def arguments(workload: Workload, device: Any, folder: str, **more: Any) -> Any:
    """TrainingArguments without logs, checkpoints or bars."""
    from transformers import TrainingArguments

    pairs = workload.technique == "step_by_step"
    return TrainingArguments(
        output_dir=folder, max_steps=workload.total, per_device_train_batch_size=workload.batch // 2 if pairs else workload.batch,
        per_device_eval_batch_size=workload.batch, learning_rate=workload.lr, lr_scheduler_type="cosine", weight_decay=0.0, max_grad_norm=1.0,
        bf16=workload.dtype == "bf16", use_cpu=device.type == "cpu", dataloader_pin_memory=device.type == "cuda", remove_unused_columns=not pairs,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, seed=workload.seed, **more,
    )


def dataset(batches: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Rows of input_ids and labels [T], in the order of the batches."""
    return [{"input_ids": ids, "labels": targets} for batch in batches for ids, targets in zip(batch, labels(batch), strict=True)]


def pairs(batches: Sequence[torch.Tensor]) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Step-by-step rows: the first half of a batch are labels, the second rationales."""
    made = []
    for batch in batches:
        rows, half = dataset([batch]), len(batch) // 2
        made += [{"pred": label, "expl": rationale} for label, rationale in zip(rows[:half], rows[half:], strict=True)]
    return made


def pair_collator(features: Sequence[dict[str, dict[str, torch.Tensor]]]) -> dict[str, dict[str, torch.Tensor]]:
    """As the TaskPrefixDataCollator of the authors' code (Hsieh et al., 2023): a batch for either task."""
    import torch

    return {task: {key: torch.stack([f[task][key] for f in features]) for key in features[0][task]} for task in ("pred", "expl")}


def trainer_class(workload: Workload) -> Any:
    """The Trainer, its rows in the given order and its losses kept on the device."""
    from transformers import Trainer

    class Kept(Trainer):
        def __init__(self, **keywords: Any) -> None:
            super().__init__(**keywords)
            self.kept: list[Any] = []

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return range(workload.total * self.args.per_device_train_batch_size)

        def training_step(self, *args: Any, **keywords: Any) -> Any:
            loss = super().training_step(*args, **keywords)
            self.kept.append(loss.detach())
            return loss

    class TaskPrefix(Kept):
        """As the TaskPrefixTrainer of the authors' code: a forward pass for either task, the two losses summed by weight."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            return model(**inputs["pred"]).loss + RATIONALE_WEIGHT * model(**inputs["expl"]).loss

    return TaskPrefix if workload.technique == "step_by_step" else Kept


def make_trainer(workload: Workload, device: Any, model: Any, folder: str, more: dict[str, Any], **keywords: Any) -> Any:
    """A quiet Trainer over the workload's batches."""
    from transformers import PrinterCallback, ProgressCallback, default_data_collator

    batches = workload.batches(workload.total)
    coupled = workload.technique == "step_by_step"
    trainer = trainer_class(workload)(
        model=model, args=arguments(workload, device, folder, **more), train_dataset=pairs(batches) if coupled else dataset(batches),
        data_collator=pair_collator if coupled else default_data_collator, **keywords,
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer


@contextlib.contextmanager
def unpatched() -> Iterator[None]:
    """Put transformers' Llama module back as it was: Liger replaces its rotary function, norm and MLP for all later models of the process."""
    from transformers.models.llama import modeling_llama

    names, forward = dict(vars(modeling_llama)), modeling_llama.LlamaForCausalLM.forward
    try:
        yield
    finally:
        vars(modeling_llama).update(names)
        modeling_llama.LlamaForCausalLM.forward = forward  # type: ignore[method-assign]


def run_peer(workload: Workload, kind: str, device: Any) -> Run:
    """Train once and read time, memory and losses from inside the Trainer. Later models are not touched by the peer's switches."""
    with unpatched():
        return _train(workload, kind, device)


def _train(workload: Workload, kind: str, device: Any) -> Run:
    silence()
    watch = Stopwatch(device)
    more, attention, notes = switches(kind, device)
    model = peer_model(workload, device, attention)
    with tempfile.TemporaryDirectory() as folder:
        clock = _clock(workload, device)
        trainer = make_trainer(workload, device, model, folder, more, callbacks=[clock])
        run = clock.run
        run.setup_s, run.notes = watch.lap(), notes
        trainer.train()
    run.losses = [float(loss) for loss in trainer.kept]
    trainer.accelerator.free_memory()
    return run


def _clock(workload: Workload, device: Any) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.run = Run(0.0, 0.0, 0.0, [], None, None)
            self.memory = PeakMemory(device)

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.memory.start()
            self.watch, self.lap = Stopwatch(device), Stopwatch()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if device.type == "cpu" and state.global_step > workload.warmup:
                self.run.times_s.append(self.lap.lap())
            if state.global_step == workload.warmup:
                self.run.warmup_s = self.watch.lap()
                self.lap.lap()
            if state.global_step == workload.total:
                self.run.timed_s = self.watch.lap()
                memory = self.memory.stop()
                self.run.peak_bytes, self.run.baseline_bytes = memory.peak_bytes, memory.baseline_bytes
                self.run.peak_allocated_bytes = memory.peak_allocated_bytes

    return Clock()
