"""The evaluation benchmark: answering rows with a base model, ours against the usual loops over transformers.

Library of `python -m benchmarks.speed`. The peer's rows are sorted by length and batched to the same number of tokens in the same
precision. Choice scoring: every choice a sequence of its own, log-softmax over all logits, as lm-evaluation-harness does. Generation:
model.generate, greedy. Rows and weights are a prepared task's and model's where they are there, else seeded random ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import speed_ours, speed_stats
from benchmarks.speed_limits import answer_flops, distance
from benchmarks.speed_run import Settings, clear, failure, limited
from benchmarks.speed_targets import EvalRow
from benchmarks.speed_workloads import SHAPES, Workload, base_model
from pipeline.core.files import UserError, read_jsonl
from pipeline.data.rows import by_length, pad
from pipeline.measure.clock import Stopwatch
from pipeline.measure.memory import PeakMemory

Items = list[tuple[list[int], list[list[int]]]]
FIRST = 64
"""Rows that either side answers first, outside the time."""
EXPLAINED = 500
"""Most generated answers that differ and are looked into."""


@dataclass(frozen=True)
class Source:
    """A model's folder (prepared, or by pipeline.export) and a prepared task's; random weights and rows where one is missing."""

    model: Path = Path("models/smollm2_135m")
    task: Path = Path("data/vader_movies_5")

    @property
    def real(self) -> bool:
        return (self.model / "config.json").exists() and (self.task / "manifest.json").exists()

    def tokenizer(self) -> Any:
        """The model's own; None for random weights."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model) if self.real else None

    def load(self, row: EvalRow, device: Any) -> Any:
        """The frozen model in the row's precision."""
        if self.real:
            from transformers import AutoModelForCausalLM

            from pipeline.core.settings import Precision, build
            from pipeline.models.base import load_model

            return load_model(self.model, build(Precision, {"name": row.dtype}, "precision"), device, AutoModelForCausalLM.from_pretrained(self.model))
        return base_model(Workload("full", row.shape, 1, 8, dtype=row.dtype), device).requires_grad_(False)

    def items(self, row: EvalRow) -> Items:
        """(prompt ids, [choice ids, …]) of the row's number of rows. Raises UserError where the task has fewer."""
        return _task_items(self, row) if self.real else _random_items(row)


def _task_items(source: Source, row: EvalRow) -> Items:
    from pipeline.core.settings import Task, build
    from pipeline.data.rows import Encoder
    from pipeline.scoring.scorer import Scorer

    rows = [r for split in ("test", "validation", "train") for r in read_jsonl(source.task / f"{split}.jsonl")]
    if len(rows) < row.rows:
        raise UserError(f"{source.task} has {len(rows)} rows, {row.id} answers {row.rows}; prepare a larger task")
    task = build(Task, {"name": source.task.name, "scoring": row.scoring, "max_new_tokens": row.new_tokens}, "task")
    return Scorer(None, Encoder(source.tokenizer(), task, 512, "truncate"), task, lambda prompt: prompt, 0, None, None).items(rows[: row.rows])


def _random_items(row: EvalRow) -> Items:
    rng, top = random.Random(0), SHAPES[row.shape]["vocab_size"]

    def draw(low: int, high: int) -> list[int]:
        return [rng.randrange(1, top) for _ in range(rng.randint(low, high))]

    return [(draw(24, 96), [draw(1, 4) for _ in range(5)] if row.scoring == "choice" else []) for _ in range(row.rows)]


@dataclass(frozen=True)
class Ids:
    """Stands in for a tokenizer where answers are kept as token ids, so that no side's time holds decoding."""

    eos_token_id: int

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        """Ids up to the end of the text, as words."""
        texts = []
        for ids in rows.tolist():
            texts.append(" ".join(map(str, ids[: ids.index(self.eos_token_id)] if self.eos_token_id in ids else ids)))
        return texts


def plain_choose(model: Any, items: Items, batch_tokens: int, pad_id: int, device: Any) -> list[list[float]]:
    """Log-likelihood of every choice, each choice a sequence of its own, from the logits of all positions."""
    import torch

    likelihoods: list[list[float]] = [[0.0] * len(choices) for _, choices in items]
    flat = [(i, c, prompt, choice) for i, (prompt, choices) in enumerate(items) for c, choice in enumerate(choices)]
    with torch.inference_mode():
        for part in by_length([len(p) + len(c) - 1 for _, _, p, c in flat], batch_tokens):
            rows = [flat[i] for i in part]
            ids = pad([(p + c)[:-1] for _, _, p, c in rows], pad_id)
            lengths = torch.tensor([len(p) + len(c) - 1 for _, _, p, c in rows])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            scores = torch.log_softmax(logits, -1, dtype=torch.float32)
            reads = [(place, len(prompt) - 1 + i, token) for place, (_, _, prompt, choice) in enumerate(rows) for i, token in enumerate(choice)]
            places, cols, targets = (torch.tensor(values, device=device) for values in zip(*reads, strict=True))
            sums = torch.zeros(len(rows), device=device).index_add_(0, places, scores[places, cols, targets])
            for (item, choice, _, _), value in zip(rows, sums.tolist(), strict=True):
                likelihoods[item][choice] = value
    return likelihoods


def plain_generate(model: Any, prompts: Sequence[list[int]], new_tokens: int, batch_tokens: int, tokenizer: Any, pad_id: int, device: Any) -> list[str]:
    """Greedy continuations by model.generate, left-padded batches of similar length."""
    import torch

    texts = [""] * len(prompts)
    with torch.inference_mode():
        for part in by_length([len(p) + new_tokens for p in prompts], batch_tokens):
            ids = pad([prompts[i] for i in part], pad_id, left=True)
            lengths = torch.tensor([len(prompts[i]) for i in part])
            mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long()
            out = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            for index, text in zip(part, tokenizer.batch_decode(out[:, ids.shape[1] :]), strict=True):
                texts[index] = text
    return texts


def answer(side: str, row: EvalRow, model: Any, items: Items, end: int, device: Any) -> list[Any]:
    """The side's answers: scores of the choices, or ids as words. `end` closes a text and pads."""
    if row.scoring == "choice":
        if side == "ours":
            return speed_ours.choose(model, items, row.batch_tokens, end, device, model.dtype)
        return plain_choose(model, items, row.batch_tokens, end, device)
    prompts = [prompt for prompt, _ in items]
    if side == "ours":
        return speed_ours.generate(model, prompts, row.new_tokens, row.batch_tokens, Ids(end), end, device, model.dtype)
    return plain_generate(model, prompts, row.new_tokens, row.batch_tokens, Ids(end), end, device)


def measure(row: EvalRow, settings: Settings, source: Source) -> dict[str, Any]:
    """The row's result: both sides in turn, `repeats` times, each on a model loaded anew."""
    from benchmarks.speed_peers import silence

    silence()
    items, tokenizer = source.items(row), source.tokenizer()
    end = (tokenizer.eos_token_id if tokenizer else None) or 0
    sides: dict[str, dict[str, list[Any]]] = {side: {"walls_s": [], "warmup_s": [], "peak_bytes": []} for side in ("plain", "ours")}
    answers: dict[str, list[Any]] = {}
    record: dict[str, Any] = {"id": row.id, "what": row.what, "required": row.required, "aim": row.aim, "figure": "wall_s"}
    record["workload"] = _about(row, source, items)
    try:
        with limited(settings.limit_s):
            for repeat in range(settings.repeats):
                for side, measured in sides.items():
                    answers[side] = _once(side, row, source, items, end, settings.device, measured)
                    print(f"  {repeat + 1}/{settings.repeats} {side}: {measured['walls_s'][-1]:.2f} s for {len(items)} rows", flush=True)
    except Exception as error:
        record["error"] = failure(error)
    finally:
        clear(settings.device)
    for key, side in (("over", "plain"), ("under", "ours")):
        if sides[side]["walls_s"]:
            wall = speed_stats.summary(sides[side]["walls_s"])
            limit = distance(_flops(row, items), None, wall["median"], settings.rates[row.dtype])
            record[key] = {"kind": side, "wall_s": wall, "rows_per_s": len(items) / wall["median"], "limit": limit, **sides[side]}
    if len(answers) == 2:
        record |= speed_stats.ratio(sides["plain"]["walls_s"], sides["ours"]["walls_s"])
        try:
            record["answers"] = compare(row, items, answers, source, settings.device, tokenizer)
            if record["answers"]["different"]:
                record["answers"]["peer_rebatched"] = rebatched(row, items, answers["plain"], end, source, settings.device, tokenizer)
        finally:
            clear(settings.device)
    return record


def _once(side: str, row: EvalRow, source: Source, items: Items, end: int, device: Any, answers: dict[str, list[Any]]) -> list[Any]:
    model = source.load(row, device)
    memory, watch = PeakMemory(device), Stopwatch(device)
    memory.start()
    watch.lap()
    answer(side, row, model, items[:FIRST], end, device)
    answers["warmup_s"].append(watch.lap())
    answered = answer(side, row, model, items, end, device)
    answers["walls_s"].append(watch.lap())
    answers["peak_bytes"].append(memory.stop().peak_bytes)
    del model
    clear(device)
    return answered


def _about(row: EvalRow, source: Source, items: Items) -> dict[str, Any]:
    return {
        "scoring": row.scoring, "rows": len(items), "batch_tokens": row.batch_tokens, "new_tokens": row.new_tokens, "dtype": row.dtype,
        "prompt_tokens": sum(len(p) for p, _ in items), "choice_tokens": sum(len(c) for _, choices in items for c in choices),
        "model": source.model.name if source.real else f"random {row.shape}", "task": source.task.name if source.real else "random tokens",
    }


def _flops(row: EvalRow, items: Items) -> int:
    """Each prompt once, and each extra token once; logits where a token is read."""
    prompts, count = sum(len(p) for p, _ in items), len(items)
    extra = sum(len(c) - 1 for _, choices in items for c in choices) if row.scoring == "choice" else count * row.new_tokens
    return answer_flops(row.shape, prompts + extra, count + extra)


def compare(row: EvalRow, items: Items, answers: dict[str, list[Any]], source: Source, device: Any, tokenizer: Any) -> dict[str, Any]:
    """The share of identical answers, and how near the peer itself was to the other answer where they differ."""
    ours, plain = answers["ours"], answers["plain"]
    different = differing(row, ours, plain, tokenizer)
    compared: dict[str, Any] = {"identical": 1 - len(different) / len(items), "different": len(different)}
    if row.scoring == "choice":
        return compared | {"largest_margin_nats": max((max(plain[i]) - plain[i][_best(ours[i])] for i in different), default=None)}
    outputs = [i for i, (a, b) in enumerate(zip(ours, plain, strict=True)) if a != b]
    margins = _margins(row, items, ours, plain, different[:EXPLAINED], source, device) if different else []
    return compared | {"identical_outputs": 1 - len(outputs) / len(items), "explained": len(margins), "largest_margin_logits": max(margins, default=None)}


def differing(row: EvalRow, some: list[Any], other: list[Any], tokenizer: Any) -> list[int]:
    """Places of the rows that two sides answer differently: another choice, or another text once the answer is taken out of it."""
    answers = [[_best(one) if row.scoring == "choice" else _text(one, tokenizer) for one in side] for side in (some, other)]
    return [i for i, (a, b) in enumerate(zip(*answers, strict=True)) if a != b]


def rebatched(row: EvalRow, items: Items, plain: list[Any], end: int, source: Source, device: Any, tokenizer: Any) -> float:
    """The share of answers that the peer itself gives again in batches of half as many tokens: what rounding alone leaves the same."""
    model = source.load(row, device)
    again = answer("plain", replace(row, batch_tokens=row.batch_tokens // 2), model, items, end, device)
    return 1 - len(differing(row, plain, again, tokenizer)) / len(items)


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _text(words: str, tokenizer: Any) -> str | None:
    """The answer as the scorer takes it from a generated text; the ids themselves without a tokenizer."""
    from pipeline.scoring.reading import canonical, extract

    if tokenizer is None:
        return words
    answer = extract(tokenizer.decode([int(w) for w in words.split()]), None)
    return None if answer is None else canonical(answer)


def _margins(row: EvalRow, items: Items, ours: list[str], plain: list[str], which: list[int], source: Source, device: Any) -> list[float]:
    """Where the two texts part: how far apart the two tokens' logits are in the model (0 if one text just ends)."""
    import torch

    model, margins = source.load(row, device), []
    for index in which:
        a, b = ([int(w) for w in side[index].split()] for side in (ours, plain))
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if at is None:
            margins.append(0.0)
            continue
        with torch.inference_mode():
            logits = model(torch.tensor([items[index][0] + b[:at]], device=device)).logits[0, -1].float()
        margins.append(abs(float(logits[a[at]] - logits[b[at]])))
    return margins
