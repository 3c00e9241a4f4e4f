"""The forgetting probes: pairs that are what they claim, and perplexity against a naive loop."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.core.files import UserError, write_jsonl
from pipeline.core.settings import Evaluate, Model, Precision
from pipeline.models.base import load_model, load_tokenizer
from pipeline.scoring import probes
from pipeline.scoring.probes import NOUNS, VERBS, Probe, Probing, agreement_pairs, cached, last_words, probe, read_passages

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
    actual = probe(model, load_tokenizer(english), 5, 500, CPU, torch.float32)
    assert 0.4 < actual.pairs < 0.6  # 4.5 standard errors of 500 fair coins


def test_perplexity_is_the_exponential_of_the_mean_nll_per_token(model, english):
    tokenizer = load_tokenizer(english)
    total = count = 0.0
    for text in probes.NEWS.read_text(encoding="utf-8").splitlines()[:12]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss  # the mean over the predicted tokens
        total += float(loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    actual = probe(model, tokenizer, 12, 2, CPU, torch.float32)
    assert actual.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


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


def test_lambada_rows_come_in_two_layouts(tmp_path):
    path = tmp_path / "lambada.jsonl"
    write_jsonl(path, [{"text": "She looked at the sea"}, {"context": "He opened the ", "continuation": "door"}])
    assert read_passages(path, 2) == [("She looked at the", "sea"), ("He opened the", "door")]
    assert read_passages(path, 1) == [("She looked at the", "sea")]
    assert read_passages(path, 0) == read_passages(tmp_path / "none.jsonl", 2) == []
    with pytest.raises(UserError, match="has 2 passages; set evaluate.probe_lambada"):
        read_passages(path, 3)
    for row in ({"text": "sea"}, {"context": "He"}, {"question": "?"}):
        write_jsonl(path, [row])
        with pytest.raises(UserError, match="row 1 has neither"):
            read_passages(path, 1)


PASSAGES = [("The key to the garden", "is old"), ("The author near the farmers", "seems"), ("The", "teachers"), ("The pilot has been here for", "years")]


def test_last_words_against_a_naive_loop(model, english):
    """Greedy decoding says the word or not; its probability is the product over its tokens."""
    tokenizer = load_tokenizer(english)
    nats = hits = 0.0
    for context, word in PASSAGES:
        ids, wanted = tokenizer(context)["input_ids"], tokenizer(word)["input_ids"]
        said = model.generate(torch.tensor([ids]), max_new_tokens=len(wanted), do_sample=False, eos_token_id=None, pad_token_id=1)[0, len(ids):]
        hits += said.tolist() == wanted
        with torch.no_grad():
            logits = model(torch.tensor([ids + wanted])).logits[0].log_softmax(-1)
        nats -= sum(float(logits[len(ids) - 1 + k, token]) for k, token in enumerate(wanted))
    accuracy, perplexity = last_words(model, tokenizer, PASSAGES, CPU, torch.float32)
    assert accuracy == hits / len(PASSAGES)
    assert perplexity == pytest.approx(math.exp(nats / len(PASSAGES)), rel=1e-4)


def test_a_model_that_says_the_words_has_all_of_them(model, english):
    """The words that it would say itself, of one and of two tokens."""
    tokenizer = load_tokenizer(english)
    own = []
    for context, length in (("The river", 1), ("The letter above the", 2), ("The engine behind the students", 1)):
        ids = tokenizer(context)["input_ids"]
        said = model.generate(torch.tensor([ids]), max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=1)[0, len(ids):]
        own.append((context, tokenizer.decode(said)))
    assert last_words(model, tokenizer, own, CPU, torch.float32)[0] == 1.0
    wrong = [(context, "garden is" if word != "garden is" else "is garden") for context, word in own]
    assert last_words(model, tokenizer, wrong, CPU, torch.float32)[0] == 0.0


def test_without_the_file_lambada_is_null_and_a_note_says_so(english, model, tmp_path):
    from omegaconf import OmegaConf

    settings = SimpleNamespace(evaluate=Evaluate(512, probe_texts=2, probe_pairs=2, probe_lambada=2), precision=Precision("fp32"), model=Model("m"))
    cfg = OmegaConf.create({"paths": {"lambada": f"{tmp_path}/none.jsonl", "models": str(english.parent), "work": str(tmp_path)},
                            "model": {"name": english.name}})
    probing = Probing(cfg, settings, load_tokenizer(english), model)
    assert "none.jsonl is not there" in probing.note
    actual = probing.forgetting(model)
    assert actual.lambada is actual.lambada_base is actual.lambada_perplexity is None
    assert actual.perplexity == actual.perplexity_base != actual.perplexity_base_16bit
    assert actual.probes == "2 news sentences, 2 agreement pairs"
