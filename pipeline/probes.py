"""What fine-tuning made the model forget: perplexity of news sentences and grammar, both unrelated to any task here.

Library. A fresh machine has both probes: pipeline/news.txt (200 sentences of the VADER paper's New York Times
editorials, MIT) and subject-verb agreement pairs generated from a seed, as in Linzen et al. (2016): a noun of the
other number stands between subject and verb ("The keys to the cabinet are/is here.").
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import read_json, write_json
from pipeline.scoring import choice_log_likelihoods

NEWS = Path(__file__).parent / "news.txt"
SEED = 0
BATCH_TOKENS = 1024  # every position is scored here, so the logits are the memory

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
    """perplexity: per token of the news sentences; pairs: share of pairs whose grammatical sentence is the likelier."""

    perplexity: float
    pairs: float


def agreement_pairs(count: int, seed: int = SEED) -> list[tuple[str, str]]:
    """`count` distinct (grammatical, ungrammatical) sentences, half with a plural subject."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        plural = len(found) % 2
        subject, other = rng.sample(NOUNS, 2)
        verb = rng.choice(VERBS)
        head = f"The {subject[plural]} {rng.choice(LINKS)} the {other[1 - plural]}"
        end = rng.choice(ENDS[verb[0]])
        found.setdefault(f"{head} {verb[plural]} {end}", f"{head} {verb[1 - plural]} {end}")
    return list(found.items())


def probe(model: Any, tokenizer: Any, texts: int, pairs: int, device: Any, dtype: Any) -> Probe:
    """Both probes of a model as it stands. No task prompt is put before a sentence; a soft prompt stays attached."""

    def log_likelihoods(sentences: list[str]) -> list[tuple[float, int]]:
        encoded = [tokenizer(s)["input_ids"] for s in sentences]
        items = [(ids[:1], [ids[1:]]) for ids in encoded]
        sums = choice_log_likelihoods(model, items, BATCH_TOKENS, tokenizer.eos_token_id or 0, device, dtype)
        return [(value[0], len(ids) - 1) for value, ids in zip(sums, encoded, strict=True)]

    model.eval()
    news = log_likelihoods(NEWS.read_text(encoding="utf-8").splitlines()[:texts])
    good_bad = agreement_pairs(pairs)
    scored = log_likelihoods([s for pair in good_bad for s in pair])
    right = sum(scored[2 * i][0] > scored[2 * i + 1][0] for i in range(len(good_bad)))
    return Probe(math.exp(-sum(v for v, _ in news) / sum(n for _, n in news)), right / len(good_bad))


def cached(folder: Path, key: dict[str, Any], compute: Callable[[], Probe]) -> Probe:
    """The untouched base's probe, computed once for a model, precision, probe size and machine."""
    digest = hashlib.sha256(json.dumps({**key, "news": NEWS.read_text(encoding="utf-8")}, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{digest}.json"
    if path.exists():
        return Probe(**read_json(path))
    found = compute()
    write_json(path, vars(found))
    return found
