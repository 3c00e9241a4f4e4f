"""One cell as transformers' Trainer and PEFT have it, in a process of its own: the plain stack of `python -m benchmarks.throughput plain`.

    python -m benchmarks.throughput_plain <result.json> experiments=data_size technique=lora seed=0 train_rows=100 …

The same rows, texts, steps, rates and adapter settings as the cell has. Fine-tuning is the Trainer's with bf16=True and its default optimiser (fused
AdamW), full fine-tuning over fp32 weights, QLoRA through prepare_model_for_kbit_training, step-by-step by two forward passes a step (Hsieh et al.,
2023). Choices are scored each as a sequence of its own in batches of similar length. Nothing is probed, and no adapters are mixed.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.speed_eval import plain_choose
from benchmarks.speed_peers import silence
from pipeline.core.compose import compose
from pipeline.core.files import write_json
from pipeline.measure.clock import Stopwatch, latency_s, now, process_start

IGNORED = -100
"""The label that transformers leaves out of the loss."""


def run(words: Sequence[str]) -> dict[str, Any]:
    """Seconds by phase and the test rows' accuracy of a cell."""
    import torch

    from pipeline.cell import inputs
    from pipeline.scoring.scorer import Scorer
    from pipeline.training.loop import total_steps

    silence()
    began = process_start()
    cfg = compose(words)
    parts = inputs.build_parts(cfg)
    rows, _, _ = inputs.training_rows(parts, _rows(inputs, parts, cfg))
    base = inputs.load_base(parts, inputs.Shared())
    encoder = inputs.load_encoder(parts, inputs.Shared(), base)
    task, watch = parts.settings.task, Stopwatch(parts.device)
    state = parts.method.prepare([parts.objective.label_example(row, task) for row in rows.train], cfg.seed, base)
    model = _model(parts, base)
    prompt = lambda text: parts.method.prompt(parts.objective.prompt(text), state)  # noqa: E731
    scorer = Scorer(model, encoder, task, prompt, parts.settings.evaluate.batch_tokens, parts.device, parts.dtype)
    seconds = {"load_s": watch.lap(), "train_s": 0.0}
    if parts.method.trains:
        examples = inputs.encoded(parts, encoder, rows.train, rows.rationales)
        seconds["load_s"] += watch.lap()
        _train(parts, model, examples, total_steps(parts.settings.train, len(examples)), encoder.pad_id)
        seconds["train_s"] = watch.lap()
    model.eval()

    def answering(**inputs: Any) -> Any:
        """Logits of the texts' own positions: a soft prompt's stand before them."""
        return SimpleNamespace(logits=model(**inputs).logits[:, -inputs["input_ids"].shape[1] :])

    def score(asked: Sequence[dict]) -> list[list[float]]:
        with torch.autocast(parts.device.type, torch.bfloat16, enabled=parts.dtype == torch.bfloat16):
            return plain_choose(answering, scorer.items(asked), parts.settings.evaluate.batch_tokens, encoder.pad_id, parts.device)

    if rows.validation:
        score(rows.validation)
    right = [row["choices"][max(range(len(values)), key=values.__getitem__)] == row["answer"] for row, values in zip(rows.test, score(rows.test), strict=True)]
    latency = latency_s(lambda row: score([row]), rows.test[: parts.settings.evaluate.latency_rows], parts.device)
    seconds["evaluate_s"] = watch.lap()
    return {"accuracy": sum(right) / max(1, len(right)), "latency_s": latency, "phases": {**seconds, "wall_s": now() - began}}


def _rows(inputs: Any, parts: Any, cfg: Any) -> Any:
    return dataclasses.replace(inputs.load_task(parts, cfg.seed, cfg.train_rows), rationales=inputs.load_taught(parts))


def _model(parts: Any, base: Any) -> Any:
    """The model as the documentation prepares it for training; a method that is none of PEFT's is the cell's own (which weights are trained)."""
    import torch

    if not parts.method.peft:
        model = parts.method.wrap(base)
        return model.float() if parts.method.trains else model
    from peft import get_peft_model, prepare_model_for_kbit_training

    if parts.precision in ("nf4", "int8"):
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(parts.cfg.seed)
    return get_peft_model(base, parts.method.config)


def _train(parts: Any, model: Any, examples: Sequence[Sequence[Any]], steps: int, pad_id: int) -> None:
    """By the Trainer: a row is a label, or a label and a rationale."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    settings, device = parts.settings.train, parts.device

    class Rows(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            return sum(float(weight) * model(**one).loss for weight, one in inputs)

    def collate(rows: Any) -> Any:
        return _batch(rows, pad_id)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=settings.batch_size, learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine", warmup_steps=round(steps * settings.warmup_share), weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm or 0.0, bf16=device.type == "cuda", use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda", remove_unused_columns=False, logging_strategy="no", save_strategy="no", report_to="none",
            disable_tqdm=True, seed=parts.cfg.seed,
        )
        trainer = Rows(model=model, args=arguments, train_dataset=[list(row) for row in examples], data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def _batch(rows: Sequence[Sequence[Any]], pad_id: int) -> list[tuple[float, dict[str, Any]]]:
    """(weight, padded batch) of each kind of example among the rows: labels, and rationales where there are some."""
    import torch

    batches = []
    for group in sorted({e.group for row in rows for e in row}, key=str):
        each = [e for row in rows for e in row if e.group == group]
        width = max(len(e.ids) for e in each)
        ids = torch.tensor([[*e.ids, *[pad_id] * (width - len(e.ids))] for e in each])
        labels = torch.tensor([[IGNORED] * e.start + list(e.ids[e.start :]) + [IGNORED] * (width - len(e.ids)) for e in each])
        mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in each])
        batches.append((each[0].weight, {"input_ids": ids, "attention_mask": mask, "labels": labels}))
    return batches


def main(words: list[str]) -> int:
    write_json(Path(words[0]), run(words[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
