"""A local model that writes: greedy and drawn texts, chat templates, prompts that do not fit, and the file of answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.core.files import UserError
from pipeline.teachers.local_writer import LocalWriter
from pipeline.teachers.writers import Cache, Completion

PROMPTS = [[{"role": "user", "content": t}] for t in ("the film", "a lovely story with the cast and the plot", "poor", "the film of the actor")]


def local(tiny, folder: Path, **changes) -> LocalWriter:
    return LocalWriter(**{"cache": str(folder), "models": str(tiny / "models"), "model": "smollm2_135m", "device": "cpu", "max_new_tokens": 6, **changes})


def test_greedy_is_the_model_s_own_continuation_and_kept(tiny, tmp_path):
    writer = local(tiny, tmp_path)
    texts = writer.write(PROMPTS)
    tokenizer, model = writer._loaded
    for messages, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(messages[0]["content"], return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0, ids.shape[1]:]
        assert tokenizer.decode(out, skip_special_tokens=True).strip() == text
    again = local(tiny, tmp_path)
    assert again.write(PROMPTS[::-1]) == texts[::-1] and "_loaded" not in again.__dict__, "what is kept needs no model"
    assert again.about()["seconds"] == pytest.approx(writer.about()["seconds"]) and again.about()["completion_tokens"] == writer.about()["completion_tokens"]


def test_what_is_drawn_depends_on_seed_and_prompt_alone(tiny, tmp_path):
    hot = {"temperature": 1.5}
    texts = local(tiny, tmp_path / "a", **hot).write(PROMPTS, seed=1)
    alone = local(tiny, tmp_path / "b", batch_tokens=1, **hot)
    assert [alone.write([one], seed=1)[0] for one in PROMPTS[::-1]] == texts[::-1]
    assert local(tiny, tmp_path / "a", **hot).write(PROMPTS, seed=2) != texts


def test_noise_draws_from_the_softened_distribution(tiny, tmp_path):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4000, 1)
    names = [str(i) for i in range(4000)]
    for changes, expected in (
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]), ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),
        ({"temperature": 1.0, "top_p": 0.7}, [0.625, 0.375, 0, 0]),
    ):
        picked = local(tiny, tmp_path, **changes)._noise(names)(torch.zeros(4000, 1, dtype=torch.long), logits).argmax(-1)
        assert torch.bincount(picked, minlength=4) / 4000 == pytest.approx(torch.tensor(expected), abs=0.03)


def test_turns_without_a_template_are_joined_and_a_text_ends_where_the_next_would_begin(tiny, tmp_path):
    writer = local(tiny, tmp_path)
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert writer.rendered([*turns, {"role": "assistant", "content": "a"}, turns[1]]) == "s\n\nu a\n\nu"
    writer._tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    assert writer.rendered(turns) == "<system>s<user>u<assistant>"
    refuses = "{% if m.role == 'system' %}{{ raise_exception('none here') }}{% endif %}"
    writer._tokenizer.chat_template = "{% for m in messages %}" + refuses + "<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert writer.rendered(turns) == "<user>s\n\nu"
    writer._tokenizer.chat_template = None
    words = writer._tokenizer("film ] plot", add_special_tokens=False)["input_ids"]
    assert replace(writer, separator="]")._answer(words, 3, 0.5) == Completion("film", 0.5, 3, 3, False)
    assert writer._answer([*words, 1, 1, 1], 3, 0.5).completion_tokens == 4


def test_a_prompt_that_is_too_long_and_a_model_that_is_not_there(tiny, tmp_path):
    with pytest.raises(UserError, match="the longest prompt takes 251 tokens and writer.max_new_tokens=6 more, but smollm2_135m reads 256; lower"):
        local(tiny, tmp_path).write([[{"role": "user", "content": "film " * 251}]])
    with pytest.raises(UserError, match="run: python -m pipeline.base_model model=local model.source.path=<its folder> model.name=other"):
        local(tiny, tmp_path, model="other").check()
    with pytest.raises(UserError, match="precision.name"):
        local(tiny, tmp_path, precision="fp8").check()


def test_answers_stay_whatever_happens_after_them(tiny, tmp_path):
    class Broken(LocalWriter):
        def _answer(self, *args):
            if len(Path(next(tmp_path.glob("*.jsonl"))).read_text().splitlines()) == 2:
                raise KeyboardInterrupt
            return super()._answer(*args)

    with pytest.raises(KeyboardInterrupt):
        Broken(**{f: getattr(local(tiny, tmp_path), f) for f in ("cache", "models", "model", "device", "max_new_tokens")}, batch_tokens=1).write(PROMPTS)
    writer = local(tiny, tmp_path)
    texts = writer.write(PROMPTS)
    assert writer.spent.written == 2 and texts == local(tiny, tmp_path / "new").write(PROMPTS)


def test_a_cache_passes_over_what_it_cannot_read(tmp_path):
    path = tmp_path / "deep" / "c.jsonl"
    with Cache.open(path) as cache:
        cache.add("a", Completion("ä\n\u2028", 1.0))
    path.write_bytes(path.read_bytes() + b'[1]\n{"key": "x"}\n\n{"key": "b", "text": "cut')
    with Cache.open(path) as cache:
        assert cache["a"] == Completion("ä\n\u2028", 1.0) and "b" not in cache and "x" not in cache
        cache.add("b", Completion("whole", 1.0))
    with Cache.open(path) as cache:
        assert cache["b"].text == "whole"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), Cache.open(tmp_path / "file" / "c.jsonl"):
        pass


@pytest.mark.gpu
def test_a_gpu_writes_and_draws_the_same(tiny, tmp_path):
    many = [[{"role": "user", "content": f"{PROMPTS[i % 4][0]['content']} {'film ' * (i % 7)}"}] for i in range(40)]
    for changes in ({}, {"temperature": 1.0}):
        texts = [local(tiny, tmp_path / device, device=device, precision="fp32", **changes).write(many) for device in ("cpu", "cuda")]
        assert sum(a == b for a, b in zip(*texts, strict=True)) >= 38, "a near tie may fall the other way"
