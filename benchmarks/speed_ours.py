"""Our side of the speed benchmarks: what `python -m benchmarks.speed` measures against the peers.

Library. `Ours` trains one workload, `packed_sweep` several LoRA trials at once, `choose` and `generate` answer rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.speed_workloads import RATIONALE_WEIGHT, Workload, adapter_config, base_model
from pipeline.core.settings import Train
from pipeline.data.rows import Batch, Encoded
from pipeline.measure.clock import Stopwatch
from pipeline.models.base import autocast
from pipeline.scoring.scorer import choice_log_likelihoods
from pipeline.scoring.scorer import generate as generate_texts
from pipeline.training.loop import lr_factor

if TYPE_CHECKING:
    import torch

    from benchmarks.speed_sweep import Found, Trial


def training_batch(workload: Workload, ids: torch.Tensor) -> Batch:
    """The step's batch of token ids [B, T]: every token but a row's first is predicted, weights as the objective sets them.

    Step-by-step: the first half of the rows are labels, the second rationales; a group's loss is a mean over its own tokens.
    """
    import torch

    rows, cols = (x.reshape(-1) for x in torch.meshgrid(torch.arange(len(ids)), torch.arange(ids.shape[1] - 1), indexing="ij"))
    weights = torch.full((len(rows),), 1.0 / len(rows))
    if workload.technique == "step_by_step":
        weights = torch.where(rows < len(ids) // 2, 1.0, RATIONALE_WEIGHT) / (len(rows) / 2)
    return Batch(ids, rows, cols, ids[:, 1:].reshape(-1), weights, ids.numel())


def our_model(workload: Workload, device: Any) -> Any:
    """The model as the technique's method prepares it for training."""
    import torch

    from pipeline.methods.full import Full
    from pipeline.methods.peft_adapter import PeftAdapter

    model = base_model(workload, device).requires_grad_(False)
    torch.manual_seed(workload.seed)
    return (Full() if workload.trains_base else PeftAdapter(adapter_config(workload))).wrap(model)


def examples(workload: Workload, ids: torch.Tensor) -> list[Encoded]:
    """The rows of a step as the engine takes them; the same labels and weights as `training_batch`."""
    rows = [tuple(row) for row in ids.tolist()]
    if workload.technique != "step_by_step":
        return [Encoded(row, 1) for row in rows]
    half = len(rows) // 2
    return [*(Encoded(row, 1) for row in rows[:half]), *(Encoded(row, 1, "rationale", RATIONALE_WEIGHT) for row in rows[half:])]


def open_stepper(workload: Workload, model: Any, steps: Sequence[list[Encoded]], device: Any) -> Any:
    """The fast engine on this model, all rows of a step in one micro-batch."""
    from pipeline.engine.bind import bind
    from pipeline.engine.layout import Shapes
    from pipeline.engine.steps import ByHand, Stepper

    program = ByHand(bind(model, workload.torch_dtype()))
    program.buffer.weight_decay.zero_()
    return Stepper(program, Shapes([[step] for step in steps], workload.batch * (workload.length + 8), 1), 0, device)


class Ours:
    """One training run of a workload, a fresh model each: the engine that train.engine=auto takes on this device."""

    def __init__(self, workload: Workload, device: Any) -> None:
        import torch

        from pipeline.objectives.labels import Labels

        self.workload, self.device = workload, device
        self.model = our_model(workload, device).train()
        self.objective = Labels()
        self.step = 0
        self.stepper = None
        if device.type == "cuda":
            self.encoded = [examples(workload, ids) for ids in workload.batches(workload.total)]
            self.stepper = open_stepper(workload, self.model, self.encoded, device)
            return
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=workload.lr, weight_decay=0.0, fused=True)
        self.batches = [training_batch(workload, ids) for ids in workload.batches(workload.total)]

    def warm(self) -> float:
        """Seconds of getting ready to step (compilation, capture); weights and optimiser are as before."""
        watch = Stopwatch(self.device)
        if self.stepper:
            self.stepper.warm()
        return watch.lap()

    def steps(self, count: int) -> list[float]:
        """The losses of the next `count` steps; the device has done them at return."""
        losses = [self._captured() if self.stepper else self._eager() for _ in range(count)]
        return [float(loss) for loss in losses]

    def close(self) -> list[str]:
        """Let go of the device's memory. Returns notes for the result (why a step was not captured)."""
        if self.stepper:
            self.stepper.close()
        self.__dict__.clear()
        return []

    def _rate(self) -> float:
        rate = self.workload.lr * lr_factor(self.step, self.workload.total, "cosine", 0.0)
        self.step += 1
        return rate

    def _captured(self) -> Any:
        assert self.stepper is not None
        rows = self.encoded[self.step]
        return self.stepper.step([rows], [self._rate()])[0][0]

    def _eager(self) -> Any:
        import torch

        with autocast(self.device, self.workload.torch_dtype()):
            loss = self.objective.loss(self.model, self.batches[self.step].to(self.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def packed_sweep(workload: Workload, trials: Sequence[Trial], validation: Sequence[torch.Tensor], device: Any) -> list[Found]:
    """Train all trials at once and validate them; from the bare workload (the base is built inside) to one result a trial.

    workload: LoRA; its steps + warm-up are a trial's steps (none is left out of the time). A trial's batches are
    `trial.workload(workload).batches(total)`; validation: token ids [B, T] by batch, scored by the mean loss of every token.
    """
    import torch

    from benchmarks.speed_sweep import Found
    from pipeline.engine.layout import OpenShapes
    from pipeline.methods.peft_adapter import PeftAdapter
    from pipeline.training.adapter_init import AdapterInitializer
    from pipeline.training.pack import Job, Pack, Running, Scored

    base = base_model(workload, device).requires_grad_(False)
    initializer, sizes = AdapterInitializer(base), [trial.workload(workload) for trial in trials]
    methods = [PeftAdapter(adapter_config(size)) for size in sizes]
    steps = [[examples(size, ids) for ids in size.batches(size.total)] for size in sizes]
    rows = [(ids[:1], [ids[1:]]) for batch in validation for ids in batch.tolist()]
    rank, tokens = max(trial.r for trial in trials), len(trials) * workload.batch * (workload.length + 8)
    shapes = OpenShapes([[row] for row in steps[0][0]], len(trials), workload.batch, tokens, 1)

    def score(pack: Pack, running: list[Running]) -> list[Scored]:
        sums = pack.choice_log_likelihoods(running, rows, tokens)
        losses = [-sum(one[0] for one in adapter) / sum(len(choices[0]) for _, choices in rows) for adapter in sums]
        return [Scored(-loss, loss, loss) for loss in losses]

    def settings(size: Workload) -> Train:
        return Train(lr=size.lr, epochs=1, batch_size=size.batch, micro_batch_tokens=tokens, warmup_share=0.0, validations=0, progress=False)

    jobs = [
        Job(trial.number, steps[k].__getitem__, functools.partial(initializer.make, methods[k], sizes[k].seed), sizes[k].total, settings(sizes[k]))
        for k, trial in enumerate(trials)
    ]
    ended: list[Running] = []
    with initializer.template(methods[0], initializer.names(methods[0]), rank) as template:
        pack = Pack(template, len(trials), rank, shapes, 0, device, workload.torch_dtype(), score)
    pack.warm()
    pack.run(lambda count: [jobs.pop(0) for _ in range(min(count, len(jobs)))], ended.append)
    pack.close()
    del base, initializer, template, pack
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return [Found(run.job.name, [h["loss"] for h in run.history], run.scores) for run in sorted(ended, key=lambda run: run.job.name)]


def choose(model: Any, items: Sequence[tuple[list[int], list[list[int]]]], batch_tokens: int, pad_id: int, device: Any, dtype: Any) -> list[list[float]]:
    """Log-likelihood of every choice (nats) by row, as pipeline.scoring.scorer gives them."""
    return choice_log_likelihoods(model, items, batch_tokens, pad_id, device, dtype)


def generate(model: Any, prompts: Sequence[list[int]], new_tokens: int, batch_tokens: int, tokenizer: Any, pad_id: int, device: Any, dtype: Any) -> list[str]:
    """Greedy continuations as text by row, as pipeline.scoring.scorer gives them."""
    return generate_texts(model, prompts, new_tokens, batch_tokens, tokenizer, pad_id, device, dtype)
