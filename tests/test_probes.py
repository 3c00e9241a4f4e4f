"""The forgetting probes: pairs that are what they claim, and perplexity against a naive loop."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from pipeline import probes
from pipeline.model import load_model, load_tokenizer
from pipeline.probes import NOUNS, VERBS, Probe, agreement_pairs, cached, probe
from pipeline.settings import Precision

CPU = torch.device("cpu")
NUMBER = {noun: number for pair in NOUNS for number, noun in enumerate(pair)}
VERB = {verb: number for pair in VERBS for number, verb in enumerate(pair)}


def parsed(sentence: str) -> tuple[int, int, int]:
    """(number of the subject, of the noun in between, of the verb): 0 singular, 1 plural."""
    words = sentence.split()
    nouns = [NUMBER[w] for w in words if w in NUMBER]
    verb = next(VERB[w] for i, w in enumerate(words) if w in VERB and i > 3)
    return nouns[0], nouns[1], verb


def test_500_distinct_pairs():
    pairs = agreement_pairs(500)
    assert len(pairs) == 500
    assert len({good for good, _ in pairs}) == len({bad for _, bad in pairs}) == len({frozenset(p) for p in pairs}) == 500


def test_the_first_of_a_pair_agrees_and_the_second_differs_in_the_verb_alone():
    for good, bad in agreement_pairs(500):
        subject, between, verb = parsed(good)
        assert subject == verb != between, good
        assert parsed(bad) == (subject, between, 1 - verb), bad
        differing = [(a, b) for a, b in zip(good.split(), bad.split(), strict=True) if a != b]
        assert len(differing) == 1 and set(differing[0]) in [set(v) for v in VERBS]


@pytest.mark.parametrize("count", [500, 501, 20])
def test_half_of_the_subjects_are_plural(count):
    numbers = Counter(parsed(good)[0] for good, _ in agreement_pairs(count))
    assert abs(numbers[0] - numbers[1]) <= count % 2


def test_pairs_follow_the_seed_and_smaller_sets_are_nested():
    assert agreement_pairs(500) == agreement_pairs(500) != agreement_pairs(500, seed=1)
    assert agreement_pairs(40) == agreement_pairs(500)[:40]


def test_words_are_spread():
    pairs = agreement_pairs(500)
    assert {w for good, _ in pairs for w in good.split() if w in NUMBER} == set(NUMBER)
    assert {w for good, _ in pairs for w in good.split() if w in VERB} == set(VERB)


def test_news_has_200_sentences():
    lines = probes.NEWS.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 200 and len(set(lines)) == 200 and all(line == line.strip() != "" for line in lines)


@pytest.fixture(scope="module")
def english(tmp_path_factory) -> Path:
    """A tiny random model whose tokenizer tells the probes' words apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("english")
    sentences = [s for pair in agreement_pairs(500) for s in pair] + probes.NEWS.read_text(encoding="utf-8").splitlines()
    raw = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    words = sorted({w for s in sentences for w, _ in raw.pre_tokenizer.pre_tokenize_str(s)})
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<eos>", *words])}
    raw.model = models.WordLevel(vocabulary, unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=1, initializer_range=0.3,
    )).save_pretrained(folder)
    (folder / "manifest.json").write_text('{"sha256": "x"}')
    return folder


@pytest.fixture(scope="module")
def model(english):
    return load_model(english, Precision("fp32"), CPU)


def test_a_random_model_is_near_chance_on_the_pairs(model, english):
    found = probe(model, load_tokenizer(english), 5, 500, CPU, torch.float32)
    assert 0.4 < found.pairs < 0.6  # 4.5 standard errors of 500 fair coins


def test_perplexity_is_the_exponential_of_the_mean_nll_per_token(model, english):
    tokenizer = load_tokenizer(english)
    total = count = 0.0
    for text in probes.NEWS.read_text(encoding="utf-8").splitlines()[:12]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss  # the mean over the predicted tokens
        total += float(loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    found = probe(model, tokenizer, 12, 2, CPU, torch.float32)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_model_that_knows_the_verbs_ranks_every_pair_right_and_its_mirror_none(model, english, monkeypatch):
    tokenizer = load_tokenizer(english)
    good = {tuple(tokenizer(g)["input_ids"]) for g, _ in agreement_pairs(50)}
    for sign, share in ((1.0, 1.0), (-1.0, 0.0), (0.0, 0.0)):
        monkeypatch.setattr(probes, "choice_log_likelihoods", lambda _model, items, *_, sign=sign: [
            [sign if (*prompt, *choices[0]) in good else -sign] for prompt, choices in items])
        assert probe(model, tokenizer, 3, 50, CPU, torch.float32).pairs == share, "a tie is not right"


def test_a_probe_is_computed_once_for_a_key(tmp_path):
    made = []

    def compute() -> Probe:
        made.append(1)
        return Probe(12.5, 0.75)

    key = {"model": "abc", "texts": 5}
    assert cached(tmp_path, key, compute) == cached(tmp_path, dict(reversed(key.items())), compute) == Probe(12.5, 0.75)
    assert len(made) == 1
    cached(tmp_path, {**key, "model": "abd"}, compute)
    assert len(made) == 2
