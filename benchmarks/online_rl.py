"""Steps a second of reinforcement learning on drawn texts: our loop with captured decoding against TRL's own loop.

    python -m benchmarks.online_rl [shape=135m] [algorithm=rloo] [beta=0.0] [batch=8] [samples=8] [prompt=64] [new=32] [steps=40] [warmup=5]
                                   [sides=ours,inexact,trl] [out=benchmarks/results/online_rl.json]

Both sides train LoRA (r 16, all linear layers) on the same seeded random base (benchmarks/speed_workloads.py) and the same prompts, with the same rate,
clipping and samples a step (inexact: ours with objective.exact=false). A text's reward is the share of its tokens with an even number: 0.5 at the
start, and higher as a side learns, so that equal learning shows as equal rewards. TRL runs as its documentation has it: GRPOTrainer or
RLOOTrainer, bf16, transformers' generate, fused AdamW. Timed are `steps` steps after `warmup`, device synchronised at both ends; ours captures in
its warm-up, whose seconds are told. Prints a line a side and keeps its figures as soon as it has ended.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed_peers import silence
from benchmarks.speed_workloads import ALPHA, RANK, SHAPES, Workload, adapter_config, base_model
from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import read_json, write_json
from pipeline.core.settings import Task, Train
from pipeline.data.rows import Encoded, Encoder
from pipeline.measure.clock import Stopwatch
from pipeline.measure.machine import hardware
from pipeline.measure.memory import PeakMemory
from pipeline.objectives.base import Online, Policy, Sample, drawn_later
from pipeline.objectives.grpo import Grpo

RESULTS = Path(__file__).parent / "results" / "online_rl.json"
LR = 5e-3
ENDS = 5
"""Steps at the beginning and at the end whose mean reward is told."""


@dataclass(frozen=True)
class Work:
    shape: str = "135m"
    algorithm: str = "rloo"
    beta: float = 0.0
    batch: int = 8
    samples: int = 8
    prompt: int = 64
    new: int = 32
    steps: int = 40
    warmup: int = 5
    sides: str = "ours,inexact,trl"

    @property
    def total(self) -> int:
        return self.warmup + self.steps

    @property
    def name(self) -> str:
        return f"{self.algorithm}-{self.shape}-{self.batch}x{self.samples}-{self.prompt}+{self.new}" + (f"-kl{self.beta:g}" if self.beta else "")

    def workload(self) -> Workload:
        return Workload("lora", self.shape, self.batch, self.prompt)

    def prompts(self) -> list[list[int]]:
        """Of all steps, [prompt] tokens each; the last two numbers of the vocabulary are the padding's and the end's."""
        import torch

        shape = (self.total * self.batch, self.prompt)
        drawn: list[list[int]] = torch.randint(SHAPES[self.shape]["vocab_size"] - 2, shape, generator=torch.Generator().manual_seed(0)).tolist()
        return drawn


def tokenizer_of(words: int) -> Any:
    """A word for every token: "7" is token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({str(i): i for i in range(words)}, unk_token="0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=str(words - 2), eos_token=str(words - 1), padding_side="left")


def reward(text: str) -> float:
    """Share of even tokens."""
    numbers = [int(word) for word in text.split()]
    return sum(n % 2 == 0 for n in numbers) / max(1, len(numbers))


@dataclass
class Side:
    step_s: float
    warmup_s: float
    rewards: list[float]
    peak_bytes: int | None
    engine: str
    sampling_gap: float | None = None
    """Most nats by which a drawn token's log p differs between decoding and training's forward pass."""


def ours(work: Work, device: Any, exact: bool = True) -> Side:
    """Our loop."""
    import torch

    from pipeline.methods.peft_adapter import PeftAdapter
    from pipeline.training.loop import lr_factor
    from pipeline.training.online import OnlineRun, Rollouts
    from pipeline.training.stepping import Run, choose

    watch, memory = Stopwatch(device), PeakMemory(device)
    model = base_model(work.workload(), device).requires_grad_(False)
    torch.manual_seed(0)
    method = PeftAdapter(adapter_config(work.workload()))
    model = method.wrap(model)
    encoder = Encoder(tokenizer_of(SHAPES[work.shape]["vocab_size"]), Task("t", "generate", max_new_tokens=work.new), work.prompt + work.new, "error")
    objective = Grpo(work.algorithm, work.samples, 1.0, beta=work.beta)  # type: ignore[arg-type]
    rewards: list[float] = []

    def judge(samples: Sequence[Sample], policy: Policy) -> tuple[list[Encoded], dict[str, float]]:
        values, apart = [reward(sample.text) for sample in samples], None
        rewards.append(sum(values) / len(values))
        if work.beta or policy.watched:
            mine, theirs = policy.log_p(samples), policy.reference(samples)
            apart = [r - p for p, r in zip(mine, theirs, strict=True)] if theirs else None
        return objective.weighted(samples, values, apart if work.beta else None), {}

    prompts = work.prompts()
    rows = [{"id": str(i), "prompt": "", "choices": None} for i in range(len(prompts))]
    online = Online(encoder, rows, work.samples, 1.0, work.new, 1 << 16, judge, exact)
    later = drawn_later([[Encoded((*ids, 0), len(ids))] for ids in prompts], work.samples, work.new)
    settings = Train(LR, 1, work.batch, work.batch * work.samples * (work.prompt + work.new + 8), engine="auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    run = Run(model, method, objective, later, settings, 0, work.total, device, dtype, encoder.pad_id, online=online)
    rollouts = Rollouts(run, online)
    memory.start()
    stepping = choose(OnlineRun(**vars(run), rollouts=rollouts))
    rollouts.begin([])
    for step in range(work.total):
        if step == work.warmup:
            warmup = watch.lap()
        stepping.step(step, lr_factor(step, work.total, "cosine", 0.0))
    seconds = watch.lap()
    gaps = [seen["sampling_gap"] for seen in rollouts.seen.values() if "sampling_gap" in seen]
    side = Side(seconds / work.steps, warmup, rewards, memory.stop().peak_bytes, stepping.engine, max(gaps, default=None))
    stepping.close()
    rollouts.close()
    return side


def trl_s(work: Work, device: Any) -> Side:
    """TRL's trainer."""
    import trl
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import PrinterCallback, TrainerCallback

    silence()
    watch, memory = Stopwatch(device), PeakMemory(device)
    import torch

    tokenizer = tokenizer_of(SHAPES[work.shape]["vocab_size"])
    model = base_model(work.workload(), device)
    model.config.pad_token_id, model.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    model = get_peft_model(model, adapter_config(work.workload()))
    rewards: list[float] = []

    def earned(completions: Sequence[str], **_: Any) -> list[float]:
        values = [reward(text) for text in completions]
        rewards.append(sum(values) / len(values))
        return values

    class Clock(TrainerCallback):
        warmup_s = timed_s = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == work.warmup:
                self.warmup_s = watch.lap()
            if state.global_step == work.total:
                self.timed_s = watch.lap()

    kind, clock = work.algorithm.upper(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(trl, f"{kind}Config")(
            output_dir=folder, max_steps=work.total, per_device_train_batch_size=work.batch * work.samples, num_generations=work.samples,
            max_completion_length=work.new, temperature=1.0, beta=work.beta, learning_rate=LR, lr_scheduler_type="cosine", warmup_steps=0,
            max_grad_norm=1.0, bf16=device.type == "cuda", use_cpu=device.type == "cpu", gradient_checkpointing=False, optim="adamw_torch_fused",
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, shuffle_dataset=False, seed=0,
        )
        data = Dataset.from_list([{"prompt": " ".join(map(str, ids))} for ids in work.prompts()])
        memory.start()
        trainer = getattr(trl, f"{kind}Trainer")(model=model, reward_funcs=earned, args=args, train_dataset=data, processing_class=tokenizer,
                                                 callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Side(clock.timed_s / work.steps, clock.warmup_s, rewards, memory.stop().peak_bytes, "trl")


SIDES: dict[str, Callable[[Work, Any], Side]] = {"ours": ours, "inexact": functools.partial(ours, exact=False), "trl": trl_s}


def table(path: Path) -> str:
    """Markdown: of every measurement that has both sides, steps a second, their ratio and the rewards."""
    made = ["| loop | texts a step | ours | TRL | times as many steps | reward, ours | reward, TRL | memory, ours and TRL | log p apart, nats | device |",
            "| --- | --- | --: | --: | --: | --- | --- | --- | --: | --- |"]
    for one, mine in ((one, mine) for one in read_json(path).values() for mine in ("ours", "inexact") if {mine, "trl"} <= set(one)):
        work, sides = Work(**{key: value for key, value in one["work"].items() if key not in ("lora", "lr")}), (one[mine], one["trl"])
        steps = [f"{1000 * side['step_s']:.0f} ms" for side in sides]
        rewards = ["{:.3f} to {:.3f}".format(*_ends(side["rewards"])) for side in sides]
        peaks = " and ".join(f"{side['peak_bytes'] / 2**30:.1f}" if side["peak_bytes"] else "not measured" for side in sides) + " GiB"
        texts = f"{work.batch} x {work.samples} of {work.prompt} + {work.new} tokens"
        name = f"{work.algorithm.upper()}, {work.shape}{', objective.exact=false' if mine == 'inexact' else ''}"
        columns = [name, texts, *steps, f"{sides[1]['step_s'] / sides[0]['step_s']:.1f}x", *rewards, peaks,
                   _gap(sides[0]["sampling_gap"]), one["hardware"].get("gpu") or one["hardware"]["cpu"]]
        made.append(f"| {' | '.join(columns)} |")
    return "\n".join(made)


def _gap(nats: float) -> str:
    return f"{nats:.3f}" if nats else "0"


def _ends(rewards: Sequence[float]) -> tuple[float, float]:
    """Mean reward of the first and of the last steps."""
    return sum(rewards[:ENDS]) / len(rewards[:ENDS]), sum(rewards[-ENDS:]) / len(rewards[-ENDS:])


def run(words: Sequence[str]) -> int:
    """Print a line a side, and keep the figures."""
    from pipeline.models.base import device_of

    types = {name: type(value) for name, value in dataclasses.asdict(Work()).items()}
    values = key_values(words, (*types, "out"), "benchmarks.online_rl")
    out = Path(values.pop("out", RESULTS))
    work, device = Work(**{key: types[key](value) for key, value in values.items()}), device_of("auto")
    kept: dict[str, Any] = {"work": dataclasses.asdict(work) | {"lora": [RANK, ALPHA], "lr": LR}, "hardware": hardware(device.type)}
    print(f"{work.name}: {work.batch * work.samples} texts a step; {kept['hardware'].get('gpu') or 'CPU'}", flush=True)
    for name in work.sides.split(","):
        side = SIDES[name](work, device)
        kept[name] = dataclasses.asdict(side)
        first, last = _ends(side.rewards)
        peak = f"{side.peak_bytes / 2**30:.1f} GiB" if side.peak_bytes else "not measured"
        gap = f", drawn and trained log p at most {side.sampling_gap:.2g} nats apart" if side.sampling_gap is not None else ""
        print(f"{name:7} ({side.engine}) {1000 * side.step_s:8.1f} ms a step ({1 / side.step_s:.2f} steps/s), warm-up {side.warmup_s:.1f} s, "
              f"reward {first:.3f} -> {last:.3f}, peak {peak}{gap}", flush=True)
        every = read_json(out) if out.exists() else {}
        write_json(out, every | {f"{work.name}-{device.type}": kept})
    for name in {"ours", "inexact"} & kept.keys() if "trl" in kept else ():
        print(f"{name} makes {kept['trl']['step_s'] / kept[name]['step_s']:.1f} times as many steps a second")
    return 0


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
