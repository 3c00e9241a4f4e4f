"""Single checks of a model, a task and a technique that are to go together: each looks at one thing that makes numbers wrong in silence.

Library of pipeline/cell/preflight.py. A check takes what it judges and nothing else, so that a test can give it something broken.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.settings import Task
from pipeline.data.rows import Encoded, Encoder, Example, collate, source_of
from pipeline.methods.base import Method
from pipeline.models.base import autocast
from pipeline.objectives.base import Objective
from pipeline.scoring.scorer import Scorer, logits_of
from pipeline.training.stepping import Run, choose

TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.1, "nf4": 0.1}
"""Nats a token by which two ways to the same loss may differ, of a larger loss as a share of it, by the arithmetic: sums in another order, weights
rounded once more; LLM.int8() rounds inputs by what a whole batch holds."""
FURTHEST = 2.5
"""Times the tolerance that one row of several may be away."""
TOKENS_A_WORD = (0.7, 2.5)
"""Fewest and most, of mostly ASCII text, a punctuation mark counting as a word. English has 1.0 to 1.6 with the usual ones; another model's gave 6, and one
that transformers read as another class gave 0.2."""
MOST_UNKNOWN = 0.05
"""Share of unknown tokens."""
LEAST_VOCABULARY = 0.8
"""Tokens to an embedding row: tables are padded, by less than this."""
WORD = re.compile(r"\w+|[^\w\s]")
SHAKEN = 0.01
"""Deviation of what is added to trained parameters, so that an adapter that starts as nothing is something."""


@dataclass(frozen=True)
class Finding:
    """ok: whether the check passed. said: the outcome; of one that failed what is wrong, and the key or file to change."""

    check: str
    ok: bool
    said: str


def tokenizer(words: Any, embeddings: int, texts: Sequence[str]) -> Finding:
    """Whether a tokenizer is this model's. embeddings: rows of the model's table; texts: the task's."""
    ids = [i for text in texts for i in words(text, add_special_tokens=False)["input_ids"]]
    per_word = len(ids) / max(1, sum(len(WORD.findall(text)) for text in texts))
    ascii_share = sum(text.isascii() for text in texts) / max(1, len(texts))
    unknown = sum(i == words.unk_token_id for i in ids) / max(1, len(ids))
    fix = "put the tokenizer that belongs to the weights into the model's folder and run pipeline.base_model again"
    if max(ids, default=0) >= embeddings:
        return Finding("tokenizer", False, f"it gives token {max(ids)}, and the model has {embeddings:,} embeddings; {fix}")
    if len(words) < LEAST_VOCABULARY * embeddings:
        return Finding("tokenizer", False, f"it has {len(words):,} tokens, and the model {embeddings:,} embeddings; {fix}")
    if ascii_share > 0.9 and not TOKENS_A_WORD[0] <= per_word <= TOKENS_A_WORD[1]:
        usual = " to ".join(map(str, TOKENS_A_WORD))
        return Finding("tokenizer", False, f"it gives {per_word:.1f} tokens a word, and one that knows the language {usual}; {fix}")
    if unknown > MOST_UNKNOWN:
        return Finding("tokenizer", False, f"{unknown:.0%} of the task's tokens are unknown to it; {fix}")
    return Finding("tokenizer", True, f"{per_word:.2f} tokens a word, {len(words):,} tokens for {embeddings:,} embeddings")


def trained_as_scored(scorer: Scorer, objective: Objective, rows: Sequence[dict], rationales: dict[str, dict]) -> Finding:
    """Whether the tokens that are trained on are those that are scored, row by row."""
    encoder, task, name = scorer.encoder, scorer.task, "text"
    for row in rows:
        example = _label(objective, row, task, rationales)
        trained = encoder.example(example)
        prompt, choices = scorer.items([{**row, "reasoned": example.prefill}])[0]
        scored = [*prompt, *(choices[row["choices"].index(row["answer"])] if choices else encoder.answer(row["answer"], ends=True))]
        if list(trained.source) != source_of(prompt):
            return Finding(name, False, f"row {row['id']!r} is read otherwise by the encoder when it is scored; check task.format and the chat template")
        if list(trained.ids) != scored:
            at = next((i for i, (a, b) in enumerate(zip(trained.ids, scored, strict=False)) if a != b), min(len(trained.ids), len(scored)))
            one, other = (encoder.tokenizer.decode(ids[max(0, at - 2) : at + 4]) for ids in (list(trained.ids), scored))
            where = f"row {row['id']!r} differs from its token {at} on: {one!r} is trained, {other!r} scored"
            return Finding(name, False, f"{where}; check task.format, task.separator and the tokenizer's chat template")
        begin = encoder.tokenizer.bos_token_id
        if begin is not None and (trained.source or trained.ids)[:2] == (begin, begin):
            return Finding(name, False, f"row {row['id']!r} begins with two {encoder.tokenizer.bos_token!r}: the chat template and the tokenizer each add one; "
                           "set add_bos_token=false in the model's tokenizer_config.json")
    return Finding(name, True, f"{len(rows)} rows are scored in the tokens that they are trained in")


def _label(objective: Objective, row: dict, task: Task, rationales: dict[str, dict]) -> Example:
    examples = objective.examples(row, task, rationales.get(row["id"]))
    return next((e for e in examples if e.answer == row["answer"]), objective.label_example(row, task))


def labels(encoder: Encoder, examples: Sequence[Example]) -> Finding:
    """Whether the loss falls on the answers' tokens, on all of them and on no others."""
    for example in examples:
        encoded = encoder.example(example)
        answer = encoder.answer(example.answer, example.ends)
        if not answer:
            return Finding("labels", False, f"the answer {example.answer!r} has no token; change the rows, or choose a model whose tokenizer knows it")
        batch = collate([encoded], {encoded.group: 1}, encoder.pad_id)
        learnt = [(int(c) + 1, int(t)) for c, t in zip(batch.cols, batch.targets, strict=True)]
        first = len(encoded.ids) - len(answer)
        if learnt != list(enumerate(answer, first)):
            trained = encoder.tokenizer.decode([t for _, t in learnt])
            return Finding("labels", False, f"the answer is {example.answer!r}, and the loss falls on {trained!r}; check task.separator and task.format")
        if squeezed(encoder.tokenizer.decode(answer, skip_special_tokens=True)) != squeezed(example.answer):
            read = encoder.tokenizer.decode(answer)
            return Finding("labels", False, f"the answer {example.answer!r} comes back from its tokens as {read!r}; the tokenizer lacks its letters")
    return Finding("labels", True, f"the loss of {len(examples)} examples falls on their answers' tokens alone")


def squeezed(text: str) -> str:
    """Without spaces and case, which tokenizers may drop."""
    return re.sub(r"\s+", "", text).casefold()


def losses(model: Any, parts: Sequence[Sequence[Encoded]], pad_id: int, device: Any, dtype: Any) -> list[float]:
    """Nats a labelled token of every example, those of a part in one padded batch."""
    import torch
    import torch.nn.functional as F

    per_token: list[float] = []
    model.eval()
    for part in parts:
        batch = collate(part, dict.fromkeys((e.group for e in part), 1), pad_id).to(device)
        with torch.no_grad(), autocast(device, dtype):
            nats = F.cross_entropy(logits_of(model, batch), batch.targets, reduction="none")
        sums = torch.zeros(len(part), device=device).index_add(0, batch.rows, nats)
        per_token += [float(total) / (len(e.ids) - e.start) for total, e in zip(sums, part, strict=True)]
    return per_token


def neighbours(alone: Sequence[float], together: Sequence[float], precision: str, mixes: bool = False) -> Finding:
    """Whether rows have the loss among others, padded, that they have alone; both from `losses`. mixes: they need not, as the method's note says.

    Another batch is another kernel: 0.05 in the mean of eight rows and 0.11 at most were seen (Qwen2.5-0.5B, H200).
    """
    apart, mean, ok, limits = _compared(alone, together, precision)
    if not ok:
        said = f"a row's loss changes by {apart:.3g} nats a token with the other rows of its batch, {mean:.3g} in the mean ({limits})"
        if mixes:
            return Finding("neighbours", True, f"{said}, as the method has it")
        return Finding("neighbours", False, f"{said}: padding or a router reads across rows; choose another technique, or train.batch_size=1")
    return Finding("neighbours", True, f"{len(alone)} rows have the same loss alone and padded among others ({apart:.1g} nats a token apart at most)")


def _compared(one: Sequence[float], other: Sequence[float], precision: str) -> tuple[float, float, bool, str]:
    """(the furthest row's difference, the rows' mean, whether both are within the tolerance, the tolerances in words).

    The loss of one row with one labelled token is that of one logit, which bf16 keeps to 0.06 (of 8 to 16) or 0.125 (of 16 to 32). So the rows' mean is
    held to the tolerance, and the furthest row to two and a half times that, which is what choice scoring allows (engine/reuse.py).
    """
    limit, apart = TOLERANCE[precision], furthest(one, other)
    mean = sum(abs(a - b) / max(1.0, abs(a)) for a, b in zip(one, other, strict=True)) / max(1, len(one))
    return apart, mean, apart <= FURTHEST * limit and mean <= limit, f"tolerance {FURTHEST * limit:g}, {limit:g}"


def furthest(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference, of numbers above 1 as a share of the first; NaN if one is."""
    apart = [abs(a - b) / max(1.0, abs(a)) for a, b in zip(one, other, strict=True)]
    return next((x for x in apart if x != x), max(apart, default=0.0))


def gradients(model: Any, loss: Callable[[], Any]) -> Finding:
    """Whether every trained parameter gets a gradient once all are a little away from where they start; leaves them there.

    Args:
        loss: the loss of a batch, as a scalar that can be gone back through.
    """
    import torch

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        return Finding("gradients", False, "nothing is trained; check method.config.target_modules, or choose another technique")
    started = _backward(model, loss, trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += SHAKEN * torch.randn_like(parameter)
    after = _backward(model, loss, trained)
    for name, wrong in ((name, after[name]) for name in trained if after[name] != "moves"):
        others = sum(state != "moves" for state in after.values()) - 1
        more = f", nor do {others} others" if others else ""
        return Finding("gradients", False, f"{name} {wrong}{more}: it would stay as it is; choose other method.config.target_modules or another technique")
    if "moves" not in started.values():
        return Finding("gradients", False, "no trained parameter has a gradient at the start, so no step would change any; choose another initialisation")
    return Finding("gradients", True, f"each of {len(trained)} trained tensors gets one")


def _backward(model: Any, loss: Callable[[], Any], trained: dict[str, Any]) -> dict[str, str]:
    """By parameter what becomes of it: moves, or why not."""
    model.train()
    for parameter in trained.values():
        parameter.grad = None
    value = loss()
    if value.requires_grad:
        value.backward()
    outcomes = {}
    for name, parameter in trained.items():
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            outcomes[name] = "is not reached from the loss"
        elif not bool(gradient.isfinite().all()):
            outcomes[name] = "gets a gradient that is not finite"
        else:
            outcomes[name] = "moves" if bool(gradient.any()) else "gets a gradient of zeros"
    return outcomes


def merged(method: Method, model: Any, parts: Sequence[Sequence[Encoded]], pad_id: int, device: Any, dtype: Any, precision: str) -> Finding:
    """Whether the adapter folded into the weights answers as it does beside them; consumes the model.

    16-bit weights are made fp32 for it: what is asked is whether the merge is the right one. In bf16 sound ones were 0.13 to 0.28 nats apart on single rows, of
    adapters much larger than their base once they are shaken (RandLoRA, WaveFT, KaSA; 3e-5 in fp32), and wrong ones 0.8 and more. What rounding costs a
    trained adapter is measured by `pipeline.evaluate split=merged`. Rounded weights (`precision` int8, nf4) stay as they are.
    """
    import torch

    if precision == "bf16":
        model, dtype, precision = _in_fp32(model), torch.float32, "fp32"
    attached = losses(model, parts, pad_id, device, dtype)
    folded = losses(method.merged(model), parts, pad_id, device, dtype)
    apart, mean, ok, limits = _compared(attached, folded, precision)
    if not ok:
        said = f"merged into the base the adapter's losses are {apart:.3g} nats a token apart from those beside it, {mean:.3g} in the mean ({limits})"
        return Finding("merged", False, f"{said}; set method.merge=false and serve it attached, or choose other method.config.target_modules")
    return Finding("merged", True, f"attached and merged are {apart:.1g} nats a token apart at most ({limits})")


def _in_fp32(model: Any) -> Any:
    """The model, its weights fp32, and so what a layer remembers of its dtype (AdaMSS's casts its input to it)."""
    import torch

    for module in model.float().modules():
        if isinstance(vars(module).get("dtype"), torch.dtype):
            module.dtype = torch.float32
    return model


def engine(run: Run, examples: Sequence[Sequence[Encoded]], precision: str) -> Finding:
    """Which engine will train, and whether its first loss (padded or one after another, as it will have them) is that of the rows taken one by one.

    Nothing is changed: the step is done at a learning rate of 0.
    """
    flat = [e for row in examples for e in row]
    plain = run.objective.plain
    wanted = [_one_by_one(run, flat) for _ in range(2)] if plain else []
    stepping = choose(dataclasses.replace(run, examples=examples, total=1))
    padding_free = ", rows one after another without padding" if stepping.streams else ""
    said = f"{stepping.engine}{padding_free}{f', because {stepping.reason}' if stepping.reason else ''}"
    try:
        if not plain:
            return Finding("engine", True, said)
        if abs(wanted[0] - wanted[1]) > 1e-6 * abs(wanted[0]):
            return Finding("engine", True, f"{said} (its loss is drawn: dropout or experts)")
        loss = float(stepping.step(0, 0.0)[0])
    finally:
        stepping.close()
    if not furthest(wanted[:1], [loss]) <= TOLERANCE[precision]:
        wrong = f"{said}: its first loss is {loss:.4f}, that of the rows one by one {wanted[0]:.4f} (tolerance {TOLERANCE[precision]})"
        return Finding("engine", False, f"{wrong}; set train.padding_free=never or train.engine=eager, and report it")
    return Finding("engine", True, f"{said}; its first loss is that of the rows one by one")


def _one_by_one(run: Run, flat: Sequence[Encoded]) -> float:
    """The loss of a step, its examples one at a time, in training mode."""
    import torch

    counts: dict[str, int] = {}
    for e in flat:
        counts[e.group] = counts.get(e.group, 0) + len(e.ids) - e.start
    run.model.train()
    total = 0.0
    for e in flat:
        with torch.no_grad(), autocast(run.device, run.dtype):
            total += float(run.objective.loss(run.model, collate([e], counts, run.pad_id).to(run.device)))
    return total
