"""What an alignment technique made the model forget: perplexity of news, grammar, and LAMBADA, all unrelated to any task here.

Library; docs/forgetting.md says what each probe means for which technique. A fresh machine has two probes: pipeline/scoring/news.txt
(200 sentences of the VADER paper's New York Times editorials, MIT) and subject-verb agreement pairs generated from a seed, as in
Linzen et al. (2016): a noun of the other number stands between subject and verb ("The keys to the cabinet are/is here."). The
third, LAMBADA (Paperno et al., 2016), the last word of a passage that only the whole passage gives away, is a file: paths.lambada.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core import locks
from pipeline.core.files import UserError, read_json, read_jsonl, write_json
from pipeline.core.settings import Evaluate, Precision, Settings
from pipeline.data.rows import Prefix, beginning, by_length, pad, source_of, sources
from pipeline.measure import turns
from pipeline.measure.machine import hardware
from pipeline.models import architecture
from pipeline.models.base import autocast, load_model, manifest, most_tokens, resolve
from pipeline.records.results import Forgetting
from pipeline.scoring.scorer import choice_log_likelihoods, logits_at

NEWS = Path(__file__).parent / "news.txt"
SEED = 0
BATCH_TOKENS = 1024  # every position is scored, so the logits are the memory
PASSAGE_TOKENS = 4096  # a passage's last word alone is scored

NOUNS = [
    ("author", "authors"), ("key", "keys"), ("teacher", "teachers"), ("farmer", "farmers"), ("engine", "engines"), ("picture", "pictures"),
    ("doctor", "doctors"), ("letter", "letters"), ("river", "rivers"), ("student", "students"), ("window", "windows"), ("manager", "managers"),
    ("painting", "paintings"), ("bridge", "bridges"), ("driver", "drivers"), ("report", "reports"), ("garden", "gardens"), ("pilot", "pilots"),
]
LINKS = ["near", "behind", "next to", "in front of", "beside", "above"]
VERBS = [("is", "are"), ("was", "were"), ("has", "have"), ("seems", "seem"), ("remains", "remain"), ("looks", "look")]
ENDS = {
    "is": ["very old.", "well known.", "in the city."], "was": ["very old.", "well known.", "in the city."],
    "has": ["changed a lot.", "been here for years."], "seems": ["very good.", "rather small."],
    "remains": ["in good shape.", "very popular."], "looks": ["very good.", "rather old."],
}


@dataclass(frozen=True)
class Probe:
    """What one model knows; the LAMBADA figures are None where its file is not there."""

    perplexity: float | None
    """Per token of the news sentences; None, as every figure, where what the model says is not finite."""
    pairs: float | None
    """Share of the agreement pairs whose grammatical sentence is the likelier."""
    lambada: float | None = None
    """Share of the passages whose last word is what the model would say (greedily, all its tokens)."""
    lambada_perplexity: float | None = None
    """Per last word of the passages."""


def agreement_pairs(count: int, seed: int = SEED) -> list[tuple[str, str]]:
    """`count` distinct (grammatical, ungrammatical) sentences, half with a plural subject."""
    rng = random.Random(seed)
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        plural = len(pairs) % 2
        subject, other = rng.sample(NOUNS, 2)
        verb = rng.choice(VERBS)
        head = f"The {subject[plural]} {rng.choice(LINKS)} the {other[1 - plural]}"
        end = rng.choice(ENDS[verb[0]])
        pairs.setdefault(f"{head} {verb[plural]} {end}", f"{head} {verb[1 - plural]} {end}")
    return list(pairs.items())


def read_passages(path: Path, count: int) -> list[tuple[str, str]]:
    """The first `count` LAMBADA passages of a JSONL file as (all but the last word, the last word); none if there is no file.

    Rows hold `context` and `continuation`, or the whole passage as `text`.

    Raises:
        UserError: a row with neither, or fewer rows than asked for.
    """
    if not count or not path.exists():
        return []
    rows = read_jsonl(path)
    if len(rows) < count:
        raise UserError(f"{path} has {len(rows)} passages; set evaluate.probe_lambada to at most that")
    passages = []
    for number, row in enumerate(rows[:count], 1):
        context, word = (row.get("context"), row.get("continuation")) if "text" not in row else str(row["text"]).rpartition(" ")[::2]
        if not (isinstance(context, str) and isinstance(word, str) and context.strip() and word.strip()):
            raise UserError(f"{path} row {number} has neither a text of two words nor context and continuation; fix the row or paths.lambada")
        passages.append((context.rstrip(), word.strip()))
    return passages


def probe(model: Any, tokenizer: Any, texts: int, pairs: int, device: Any, dtype: Any, passages: Sequence[tuple[str, str]] = ()) -> Probe:
    """All probes of a model as it stands. No task prompt is put before a sentence; a soft prompt stays attached. An encoder reads the first half of a news
    sentence, what a pair has in common before its verb, a passage without its last word; the decoder is asked for the rest."""
    start = architecture.start_id(model)

    def log_likelihoods(sentences: list[tuple[str, str]]) -> list[tuple[float, int]]:
        items = [_item(tokenizer, start, sentence, head) for sentence, head in sentences]
        sums = choice_log_likelihoods(model, items, BATCH_TOKENS, tokenizer.eos_token_id or 0, device, dtype)
        return [(value[0], len(scored)) for value, (_, (scored,)) in zip(sums, items, strict=True)]

    model.eval()
    news = log_likelihoods([(s, s[: len(s) // 2].rpartition(" ")[0]) for s in NEWS.read_text(encoding="utf-8").splitlines()[:texts]])
    good_bad = agreement_pairs(pairs)
    scored = log_likelihoods([(s, os.path.commonprefix(pair).rpartition(" ")[0]) for pair in good_bad for s in pair])
    right = sum(scored[2 * i][0] > scored[2 * i + 1][0] for i in range(len(good_bad)))
    known = all(math.isfinite(value) for value, _ in scored)
    last = last_words(model, tokenizer, passages, device, dtype) if passages else (None, None)
    return Probe(_perplexity(-sum(v for v, _ in news) / sum(n for _, n in news)), right / len(good_bad) if known else None, *last)


def _item(tokenizer: Any, start: int | None, text: str, head: str) -> tuple[list[int], list[list[int]]]:
    """(what is given of a text, [what is scored of it]): its first token and the others; with an encoder, which reads `head`, what comes after that."""
    if start is None:
        ids = tokenizer(text)["input_ids"]
        return ids[:1], [ids[1:]]
    return Prefix([start], tokenizer(head)["input_ids"]), [tokenizer(text[len(head) :].strip(), add_special_tokens=False)["input_ids"]]


def _perplexity(nats: float) -> float | None:
    """e to the nats; None where they are not finite, or it is beyond what a float holds."""
    return math.exp(nats) if math.isfinite(nats) and nats < math.log(sys.float_info.max) else None


def last_words(model: Any, tokenizer: Any, passages: Sequence[tuple[str, str]], device: Any, dtype: Any) -> tuple[float | None, float | None]:
    """(accuracy, perplexity per word) of the passages' last words, as lm-evaluation-harness's lambada_openai has them; None: not finite."""
    import torch

    room, start = most_tokens(model, 10**9), architecture.start_id(model)
    words = [tokenizer(" " + word, add_special_tokens=False)["input_ids"] for _, word in passages]
    heads = [beginning(tokenizer, context)[-(room - len(word)):] if start is None else Prefix([start], tokenizer(context)["input_ids"][-room:])
             for (context, _), word in zip(passages, words, strict=True)]
    nats, hits = 0.0, 0
    with torch.inference_mode(), autocast(device, dtype):
        for part in by_length([len(source_of(h)) + len(h) + len(w) for h, w in zip(heads, words, strict=True)], PASSAGE_TOKENS):
            turns.point()
            ids = pad([heads[i] + words[i][:-1] for i in part], tokenizer.eos_token_id or 0).to(device)
            at = [(row, len(heads[i]) - 1 + k, token) for row, i in enumerate(part) for k, token in enumerate(words[i])]
            rows, cols, targets = torch.tensor(at, device=device).T
            read = None if start is None else {k: v.to(device) for k, v in sources([source_of(heads[i]) for i in part], tokenizer.eos_token_id or 0).items()}
            logits = logits_at(model, ids, rows, cols, read)
            nats -= float(torch.log_softmax(logits, -1).gather(1, targets[:, None]).double().sum())
            missed = torch.zeros(len(part), device=device).index_add_(0, rows, (logits.argmax(-1) != targets).float())
            hits += int((missed == 0).sum())
    return hits / len(passages) if math.isfinite(nats) else None, _perplexity(nats / len(passages))


class Probing:
    """The untouched base's probes, in the cell's precision and in 16 bits, and what a model lost against them.

    Args:
        base: the untouched base, on its device.
    """

    def __init__(self, cfg: DictConfig, settings: Settings, tokenizer: Any, base: Any) -> None:
        self.settings: Evaluate = settings.evaluate
        self.trusted = settings.model.trust_remote_code
        self.tokenizer, self.device = tokenizer, base.device
        precision, self.dtype = resolve(settings.precision, base.device)
        path = Path(cfg.paths.lambada)
        self.passages = read_passages(path, self.settings.probe_lambada)
        lacking = self.settings.probe_lambada and not self.passages
        self.note = f"LAMBADA was not probed: {path} is not there (docs/forgetting.md says where to get it)" if lacking else None
        folder, work = Path(cfg.paths.models) / cfg.model.name, Path(cfg.paths.work) / "probes"
        key = {"model": manifest(folder)["sha256"], "texts": self.settings.probe_texts, "pairs": self.settings.probe_pairs, "passages": self.passages,
               "hardware": hardware(self.device), "precision": vars(settings.precision) | {"name": precision}}
        half = {**key, "precision": "bf16"}
        self.base = cached(work, half if precision == "bf16" else key, lambda: self._probe(base, self.dtype))
        self.half = cached(work, half, lambda: self._probe_16bit(folder))

    def _probe(self, model: Any, dtype: Any) -> Probe:
        return probe(model, self.tokenizer, self.settings.probe_texts, self.settings.probe_pairs, self.device, dtype, self.passages)

    def _probe_16bit(self, folder: Path) -> Probe:
        import torch

        return self._probe(load_model(folder, Precision("bf16"), self.device, trust_remote_code=self.trusted), torch.bfloat16)

    def forgetting(self, model: Any) -> Forgetting:
        """A model as it is served, against the base."""
        after, base, half = self._probe(model, self.dtype), self.base, self.half
        sizes = [f"{self.settings.probe_texts} news sentences", f"{self.settings.probe_pairs} agreement pairs"]
        if architecture.has_encoder(model):
            sizes = [f"{sizes[0]} (their second halves, after the encoder read the first)", f"{sizes[1]} (from the verb on)"]
        sizes += [f"{len(self.passages)} LAMBADA passages"] if self.passages else []
        return Forgetting(
            after.perplexity, base.perplexity, after.pairs, base.pairs, half.perplexity, half.pairs, ", ".join(sizes), after.lambada, base.lambada,
            half.lambada, after.lambada_perplexity, base.lambada_perplexity, half.lambada_perplexity,
        )


def cached(folder: Path, key: dict[str, Any], compute: Callable[[], Probe]) -> Probe:
    """The untouched base's probe, computed once for a model, precision, probe size and machine."""
    digest = hashlib.sha256(json.dumps({**key, "news": NEWS.read_text(encoding="utf-8")}, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{digest}.json"
    if path.exists():
        return Probe(**read_json(path))
    with contextlib.ExitStack() as stack:
        with turns.away(waiting=True):  # of several cells one computes it
            stack.enter_context(locks.held(path.with_suffix(".lock"), locks.FOREVER))
        if path.exists():
            return Probe(**read_json(path))
        result = compute()
        write_json(path, vars(result))
    return result
