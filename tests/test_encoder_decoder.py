"""Bases whose prompt an encoder reads: tokens, scores, texts and losses against transformers' own, the paper's multi-task loss, the probes of forgetting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_rows
from encoder_decoder_models import CPU, T5S, adapted, encoder_of, loaded, naive, overridden, stored

from pipeline import base_model
from pipeline.core.files import UserError
from pipeline.data.rows import Encoder, Prefix, collate, labelled_tokens, step_batches
from pipeline.models import architecture
from pipeline.models.base import load_tokenizer
from pipeline.objectives.labels import Labels
from pipeline.objectives.step_by_step import StepByStep
from pipeline.scoring import probes
from pipeline.scoring.reading import Reasoning
from pipeline.scoring.scorer import Scorer, choice_log_likelihoods, generate


@pytest.fixture(scope="module")
def folder_of(tiny, tmp_path_factory) -> Any:
    """Name of a shape in tests/architectures.py -> a model's folder."""
    root = tmp_path_factory.mktemp("encoder_decoders")
    return lambda name: stored(root, name, tiny / "models" / "smollm2_135m")


# what a base is


def test_a_base_says_what_it_is(folder_of, base):
    assert [architecture.start_id(loaded(folder_of(name))) for name in T5S] == [0, 0, 0]
    assert architecture.of_folder(folder_of("t5")).auto == "AutoModelForSeq2SeqLM" and architecture.has_encoder(loaded(folder_of("t5")))
    assert architecture.of(base) is architecture.DECODER and architecture.start_id(base) is None


@pytest.mark.parametrize("name", T5S)
def test_the_start_token_is_the_one_that_the_model_shifts_in(folder_of, name):
    model = loaded(folder_of(name))
    model.config.pad_token_id = 0
    assert model._shift_right(torch.tensor([[5, 6]]))[0, 0] == architecture.start_id(model)


def test_a_registered_model_answers_as_before(folder_of, overrides, tmp_path):
    """Of T5 v1.1 the output layer is no copy of the embeddings and its states are not scaled: both survive being stored."""
    source = folder_of("t5-v1_1")
    model = loaded(source)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path / "user")
    load_tokenizer(source).save_pretrained(tmp_path / "user")
    words = [*overridden(overrides, tmp_path / "user"), f"paths.models={tmp_path}/models", "model.name=new"]
    assert base_model.main(words) == 0
    ids = architecture.inputs(model, torch.tensor([[5, 6, 7]]))
    assert torch.equal(loaded(tmp_path / "models" / "new")(**ids).logits, model(**ids).logits)


# tokens and batches


def test_a_prompt_goes_to_the_encoder_and_the_answer_after_the_start_token(folder_of):
    model = loaded(folder_of("t5"))
    encoder = encoder_of(model, folder_of("t5"), separator=" ")
    example = encoder.example(Labels().label_example({"prompt": "Review: fine", "answer": "positive"}, encoder.task))
    words = encoder.tokenizer("Review: fine")["input_ids"]
    assert (example.source, example.ids, example.start) == (tuple(words), (0, *encoder.tokenizer("positive", add_special_tokens=False)["input_ids"]), 1)
    assert example.tokens == len(words) + 2


def test_what_is_too_long_is_cut_in_the_encoder(folder_of):
    encoder = encoder_of(loaded(folder_of("t5")), folder_of("t5"))
    short = Encoder(encoder.tokenizer, encoder.task, 3, "truncate", 0)
    prompt = short.fit(short.prompt("the film of a story"), 5)
    assert isinstance(prompt, Prefix) and prompt == [0] and prompt.source == encoder.prompt("of a story").source
    assert "1 texts of them longer than 3 tokens" in short.check("them")
    encoder.max_length = 3
    encoder.fit(encoder.prompt("the film of a story"), 5)
    with pytest.raises(UserError, match=r"raise train\.max_length"):
        encoder.check("them")


def examples_of(encoder: Encoder, objective: Any, count: int = 6) -> list:
    rationale = {"rationale": "The words are positive.", "correct": True}
    return [[encoder.example(e) for e in objective.examples(row, encoder.task, rationale)] for row in make_rows(count, 7, "train")]


@pytest.mark.parametrize("name", T5S)
def test_the_loss_is_transformers_own(folder_of, name):
    model = loaded(folder_of(name))
    encoder = encoder_of(model, folder_of(name), scoring="generate")
    flat = [e for row in examples_of(encoder, Labels()) for e in row]
    batch = collate(flat, labelled_tokens(flat), encoder.pad_id)
    assert len({len(e.source) for e in flat}) > 1, "padding shows nothing otherwise"
    expected = [model(input_ids=torch.tensor([e.source]), labels=torch.tensor([e.ids[1:]])).loss * (len(e.ids) - 1) for e in flat] \
        if name != "t5gemma" else [own_loss(model, e) for e in flat]
    assert float(Labels().loss(model, batch)) == pytest.approx(float(sum(expected)) / sum(len(e.ids) - 1 for e in flat), rel=1e-5)


def own_loss(model: Any, example: Any) -> torch.Tensor:
    """Of one row, from all its logits: T5Gemma's own loss shifts the labels that its decoder has been shifted for already."""
    logits = model(input_ids=torch.tensor([example.source]), decoder_input_ids=torch.tensor([example.ids[:-1]])).logits
    return torch.nn.functional.cross_entropy(logits[0], torch.tensor(example.ids[1:]), reduction="sum")


# the paper's loss


def papers_loss(model: Any, tokenizer: Any, rows: list[dict], rationales: list[str], weight: float) -> torch.Tensor:
    """L = L_label + λ · L_rationale (Hsieh et al., 2023, equation 5): the means over tokens of two batches of one model, as their code feeds them,
    'predict: ' and 'explain: ' before the input, targets that end with the end token."""
    total = torch.zeros(())
    for prefix, targets, share in (("predict: ", [row["answer"] for row in rows], 1.0), ("explain: ", rationales, weight)):
        texts = [tokenizer(prefix + row["prompt"])["input_ids"] for row in rows]
        labels = [tokenizer(target)["input_ids"] + [tokenizer.eos_token_id] for target in targets]
        width, longest = max(map(len, texts)), max(map(len, labels))
        fed = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in texts])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts])
        total = total + share * model(input_ids=fed, attention_mask=mask, labels=torch.tensor([ids + [-100] * (longest - len(ids)) for ids in labels])).loss
    return total


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("micro_batch_tokens", [4096, 40])
def test_step_by_step_is_the_papers_loss(folder_of, weight, micro_batch_tokens):
    model = loaded(folder_of("t5-v1_1")).requires_grad_(True)
    encoder = encoder_of(model, folder_of("t5-v1_1"), scoring="generate")
    objective = StepByStep(rationale_weight=weight, predict_prefix="predict: ", explain_prefix="explain: ")
    rows = make_rows(6, 7, "train")
    texts = [("The words are positive." if i % 2 else "The plot. The words are negative.") for i in range(len(rows))]
    flat = [encoder.example(e) for row, text in zip(rows, texts, strict=True)
            for e in objective.examples(row, encoder.task, {"rationale": text, "correct": True})]
    settings: Any = SimpleNamespace(micro_batch_tokens=micro_batch_tokens)
    batches = list(step_batches(flat, settings, encoder.pad_id))
    ours = sum(objective.loss(model, batch) for batch in batches)
    theirs = papers_loss(model, encoder.tokenizer, rows, texts, weight)
    assert (len(batches) > 1) is (micro_batch_tokens < 100)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for one, other in zip(gradients(model, ours), gradients(model, theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def gradients(model: Any, loss: Any) -> list[torch.Tensor]:
    return [g for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) if g is not None]


# scores and texts


def items_of(encoder: Encoder) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts of mixed lengths; choices of one to three tokens, some the beginning of others."""
    choices = [encoder.answer(text) for text in ("positive", "negative", "positive film", "positive film of", "the")]
    return [(encoder.prompt(row["prompt"]), choices[: 2 + i % 4]) for i, row in enumerate(make_rows(7, 9, "test"))]


@pytest.mark.parametrize("kind", ["base", "lora", "prompt", "prefix"])
@pytest.mark.parametrize("name", ["t5", "t5gemma"])
def test_choices_have_the_decoders_log_likelihoods(folder_of, name, kind):
    model = adapted(loaded(folder_of(name)), kind)
    encoder = encoder_of(model, folder_of(name))
    items = items_of(encoder)
    expected = [[naive(model, prompt, choice) for choice in choices] for prompt, choices in items]
    for batch_tokens in (4096, 30):
        scores = choice_log_likelihoods(model, items, batch_tokens, encoder.pad_id, CPU, torch.float32)
        assert [pytest.approx(e, abs=1e-4) for e in expected] == scores
    begun = [(prompt + encoder.continuation("the film"), choices) for prompt, choices in items]
    scores = choice_log_likelihoods(model, begun, 60, encoder.pad_id, CPU, torch.float32)
    assert scores == [pytest.approx([naive(model, p, c) for c in choices], abs=1e-4) for p, choices in begun]


def test_the_encoder_reads_a_row_once(folder_of):
    model = loaded(folder_of("t5"))
    items, rows = items_of(encoder_of(model, folder_of("t5"))), []
    hook = model.get_encoder().register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    choice_log_likelihoods(model, items, 60, 1, CPU, torch.float32)
    hook.remove()
    assert sum(rows) == len(items) and len(rows) > 1


@pytest.mark.parametrize("kind", ["base", "lora", "prompt", "prefix"])
@pytest.mark.parametrize("name", ["t5", "t5gemma"])
def test_texts_are_the_likeliest_tokens_one_by_one(folder_of, name, kind):
    model = adapted(loaded(folder_of(name)), kind)
    encoder = encoder_of(model, folder_of(name))
    prompts = [encoder.prompt(row["prompt"]) for row in make_rows(5, 9, "test")]
    prompts[1] = prompts[1] + encoder.continuation("the film")
    written = []
    for prompt in prompts:
        said: list[int] = []
        while len(said) < 4 and (not said or said[-1] != encoder.end_id):
            fed = torch.tensor([[*prompt, *said]])
            with torch.no_grad():
                out = model(input_ids=torch.tensor([prompt.source]), attention_mask=torch.ones(1, len(prompt.source), dtype=torch.long), decoder_input_ids=fed)
            said.append(int(out.logits[0, -1].argmax()))
        written.append(encoder.tokenizer.decode(said, skip_special_tokens=True))
    for batch_tokens in (4096, 20):
        assert generate(model, prompts, 4, batch_tokens, encoder.tokenizer, encoder.pad_id, CPU, torch.float32, end=encoder.end_id) == written


def test_a_reasoning_model_goes_on_after_its_reasoning(folder_of):
    model = loaded(folder_of("t5"))
    encoder = encoder_of(model, folder_of("t5"))
    scorer = Scorer(model, encoder, encoder.task, lambda p: p, 4096, CPU, torch.float32, reasoning=Reasoning(3, "The words are"))
    row = make_rows(1, 9, "test")[0]
    (one,) = scorer.predict([row])
    prompt = encoder.prompt(row["prompt"]) + encoder.continuation(one["reasoning"])
    assert one["scores"] == {c: pytest.approx(naive(model, prompt, encoder.answer(c)), abs=1e-4) for c in row["choices"]}


# probes


def test_probes_ask_the_decoder_for_what_comes_after_what_the_encoder_read(folder_of):
    model, tokenizer = loaded(folder_of("t5")), load_tokenizer(folder_of("t5"))
    found = probes.probe(model, tokenizer, 5, 6, CPU, torch.float32, [("the film and a", "plot"), ("a", "story")])
    news = probes.NEWS.read_text(encoding="utf-8").splitlines()[:5]
    halves = [(s[: len(s) // 2].rpartition(" ")[0], s) for s in news]
    nats, tokens = 0.0, 0
    for head, sentence in halves:
        ids = tokenizer(sentence[len(head) :].strip(), add_special_tokens=False)["input_ids"]
        nats, tokens = nats - naive(model, Prefix([0], tokenizer(head)["input_ids"]), ids), tokens + len(ids)
    assert found.perplexity == pytest.approx(torch.tensor(nats / tokens).exp().item(), rel=1e-4)
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("plot", "story")]
    last = [naive(model, Prefix([0], tokenizer(text)["input_ids"]), ids) for text, ids in zip(("the film and a", "a"), words, strict=True)]
    assert found.lambada_perplexity == pytest.approx(torch.tensor(-sum(last) / 2).exp().item(), rel=1e-4)
    assert found.pairs is not None and 0 <= found.pairs <= 1
