"""Conversations: both forms read alike, the template's own tokens around them, loss on assistant tokens alone."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
from test_prepare import own_task

from pipeline import prepare, train
from pipeline.core.files import UserError, read_json, write_json, write_jsonl
from pipeline.core.settings import Task
from pipeline.data.conversations import Conversation, Template, answered, normalised, reworded, transcript
from pipeline.data.rows import Encoder, collate, read_rows
from pipeline.methods.none import FewShot
from pipeline.objectives.labels import Labels

OPENAI = [
    {"role": "system", "content": "the film"}, {"role": "user", "content": "a plot"}, {"role": "assistant", "content": "fine"},
    {"role": "user", "content": [{"type": "text", "text": "the cast"}]}, {"role": "assistant", "content": "poor story"},
]
SHAREGPT = [{"from": name, "value": OPENAI[i]["content"] if i != 3 else "the cast"} for i, name in enumerate(("system", "human", "gpt", "human", "gpt"))]
CHATML = (
    "{% for m in messages %}[ {{ m['role'] }} {{ m['content'] }} ] {% endfor %}{% if add_generation_prompt %}[ assistant {% endif %}"
)
THINKING = (
    "{% for m in messages %}[ {{ m['role'] }} {% if loop.last and m['role'] == 'assistant' %}label rationale {% endif %}{{ m['content'] }} ] {% endfor %}"
    "{% if add_generation_prompt %}[ assistant {% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


def chatting(tokenizer, template):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = template
    return chat


def encoder(tokenizer, template=CHATML, **changes):
    return Encoder(chatting(tokenizer, template), Task("t", "generate", **{"messages": "messages", **changes}), 128, "error")


def text(words, ids):
    return " ".join(words.convert_ids_to_tokens(list(ids)))


def test_both_forms_become_the_same_turns():
    assert normalised(OPENAI, "row 1", "m") == normalised(SHAREGPT, "row 1", "m") == normalised(json.dumps(SHAREGPT), "row 1", "m")
    assert [t["role"] for t in normalised(OPENAI, "row 1", "m")] == ["system", "user", "assistant", "user", "assistant"]


def test_tools_are_kept_as_text():
    said = normalised([
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": '{"at": "Oslo"}'}}]},
        {"role": "tool", "content": "rain"}, {"role": "tool", "content": "wind"}, {"role": "assistant", "content": "Rain."},
    ], "row 1", "m", tools=[{"name": "look"}])
    assert said[0] == {"role": "system", "content": 'Tools:\n{"name": "look"}'}
    assert said[2]["content"] == '<tool_call>\n{"name": "look", "arguments": {"at": "Oslo"}}\n</tool_call>'
    assert said[3] == {"role": "user", "content": "<tool_response>\nrain\n</tool_response>\n<tool_response>\nwind\n</tool_response>"}
    assert said[4] == {"role": "assistant", "content": "Rain."} and len(said) == 5


@pytest.mark.parametrize(("value", "said"), [
    ("hello", "no conversation in m"), ([], "no conversation in m"), ([{"role": "wizard", "content": "x"}], "turn 1 of m, the role 'wizard'"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "a part that is no text"),
    ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "a tool call without a name"),
])
def test_what_is_no_conversation_is_named(value, said):
    with pytest.raises(UserError, match=said):
        normalised(value, "row 3 of train", "m")


def test_an_assistant_that_speaks_first_is_left_out_and_a_default_system_turn_comes_first():
    said = normalised([{"from": "gpt", "value": "hi"}, *SHAREGPT[1:3]], "row 1", "m", system="the film")
    assert said == normalised(OPENAI[:3], "row 1", "m")


def test_every_assistant_turn_is_learnt_after_the_prompt_that_asks_for_it(tokenizer):
    turns = normalised(OPENAI, "row 1", "m")
    row = {"id": "1", "prompt": Conversation(turns[:-1]), "answer": "poor story", "choices": None}
    chat = encoder(tokenizer)
    examples = [chat.example(e) for e in Labels().examples(row, chat.task, None)]
    found = [(text(chat.tokenizer, e.ids[: e.start]), text(chat.tokenizer, e.ids[e.start :])) for e in examples]
    asked = "[ <unk> the film ] [ <unk> a plot ] [ <unk>"
    assert found == [(f"{asked} fine ] [ <unk> the cast ] [ <unk>", "poor story <eos>"), (asked, "fine <eos>")]
    batch = collate(examples, {"label": sum(len(e.ids) - e.start for e in examples)}, 0)
    assert text(chat.tokenizer, batch.targets) == "poor story <eos> fine <eos>", "no token of the system or the user"
    silent = [{**turn, "weight": 0} if i == 2 else turn for i, turn in enumerate(turns)]
    assert answered(Conversation(silent[:-1])) == []


def test_what_a_template_puts_before_an_answer_is_prompt_and_never_learnt(tokenizer):
    chat = encoder(tokenizer, THINKING)
    prompt = Conversation(normalised(OPENAI, "row 1", "m")[:-1])
    assert text(chat.tokenizer, chat.prompt(prompt)).endswith("[ <unk> the cast ] [ <unk> label rationale")
    assert text(chat.tokenizer, chat.answer("poor", ends=True)) == "poor <eos>"


def test_the_templates_own_token_closes_an_answer(tokenizer):
    known = chatting(tokenizer, CHATML)
    known.add_tokens(["]"], special_tokens=True)
    assert Template(known).end_id == known.convert_tokens_to_ids("]") != known.eos_token_id
    assert Template(chatting(tokenizer, CHATML.replace(" ]", ""))).end_id == tokenizer.eos_token_id


def test_a_template_without_a_system_turn_has_it_with_the_user(tokenizer):
    chat = encoder(tokenizer, NO_SYSTEM)
    prompt = Conversation(normalised(OPENAI, "row 1", "m")[:2])
    assert text(chat.tokenizer, chat.prompt(prompt)) == "[ <unk> the film a plot ] [ <unk>"


def test_demonstrations_stand_in_the_last_user_turn():
    prompt = Conversation(normalised(OPENAI, "row 1", "m")[:-1])
    shown = FewShot(1).prompt(prompt, [{"prompt": "q", "answer": "a"}])
    assert isinstance(shown, Conversation) and shown.turns[-1]["content"] == "q a\n\nthe cast" and shown.turns[:-1] == prompt.turns[:-1]
    assert reworded("plain", str.upper) == "PLAIN" and copy.deepcopy(shown).turns == shown.turns


def test_without_a_template_the_transcript_is_the_prompt(tokenizer):
    task = {"messages": "messages", "format": "transcript"}
    plain = Encoder(tokenizer, Task("t", "generate", **task), 128, "error")
    prompt = Conversation(normalised(OPENAI, "row 1", "m")[:2])
    assert plain.prompt(prompt) == tokenizer("System: the film\nUser: a plot\nAssistant:")["input_ids"]
    assert plain.said(" fine\nlines\nUser: and the cast?\nAssistant: poor") == " fine\nlines"
    assert encoder(tokenizer).said("so\nUser: x") == Encoder(tokenizer, Task("t", "generate"), 128, "error").said("so\nUser: x") == "so\nUser: x"
    with pytest.raises(UserError, match="choose task.format=transcript"):
        Encoder(tokenizer, Task("t", "generate", messages="messages"), 128, "error")


CHATS = """
name: chats
source: {type: files, files: FILE}
messages: conversation
scoring: generate
split: {validation: 1, test: 1}
"""


def test_a_file_of_conversations_makes_a_task(tmp_path, capsys):
    asked = [[("human", f"question {n}"), ("gpt", f"word {n}"), ("human", "bye")] for n in range(6)]
    rows = [{"conversation": [*SHAREGPT[:3], *({"from": a, "value": b} for a, b in more)], "source": "here"} for more in asked]
    rows += [{"conversation": SHAREGPT[:2], "source": "no answer"}]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare.main(own_task(tmp_path, CHATS.replace("FILE", str(file)))) == 0
    assert "unlabelled 1" in capsys.readouterr().out
    (row,) = read_rows(tmp_path / "data" / "chats" / "test.jsonl")
    number = row["answer"].removeprefix("word ")
    assert row["prompt"].turns[-1] == {"role": "user", "content": f"question {number}"} and row["fields"] == {"source": "here"}
    assert row["prompt"] == transcript(row["messages"]) and f"word {number}" not in row["prompt"]


@pytest.mark.parametrize(("yaml", "said"), [
    (CHATS + 'prompt: "{source}"\n', "both say what is asked"), (CHATS.replace("messages: conversation", 'answer: "{a}"'), "'task.prompt' is missing"),
    (CHATS.replace("messages: conversation", 'prompt: "{a}"\nanswer: "{b}"\nsystem: be kind'), "task.system' needs the model's chat template"),
])
def test_keys_that_do_not_go_together(tmp_path, capsys, yaml, said):
    assert prepare.main(own_task(tmp_path, yaml)) == 2
    assert said in capsys.readouterr().err


def test_a_system_turn_before_a_prompt_of_text(tmp_path):
    file = tmp_path / "q.csv"
    file.write_text("a,b\n" + "".join(f"question {n},word\n" for n in range(6)))
    yaml = CHATS.replace("FILE", str(file)).replace("messages: conversation", 'format: chat\nprompt: "{a}"\nanswer: "{b}"\nsystem: "Be kind."')
    assert prepare.main(own_task(tmp_path, yaml)) == 0
    (row,) = read_rows(tmp_path / "data" / "chats" / "test.jsonl")
    assert [t["role"] for t in row["prompt"].turns] == ["system", "user"] and row["prompt"].turns[0]["content"] == "Be kind."
    assert row["answer"] == "word"


def test_the_shipped_conversations(tmp_path):
    assert prepare.main(["task=chats", f"paths.data={tmp_path}"]) == 0
    rows = read_rows(tmp_path / "chats" / "train.jsonl")
    assert {len(row["prompt"].turns) for row in rows} == {2, 4} and all(row["prompt"].turns[-1]["role"] == "user" for row in rows)


def test_a_cell_learns_and_is_judged_on_conversations(tiny, overrides, tmp_path):
    """Trained on both assistant turns, in the tokens that are scored (preflight holds both together)."""
    words = [("fine film", "positive"), ("poor plot", "negative"), ("lovely cast", "positive"), ("awful score", "negative")]
    pairs = zip(words * 5, words[1:] * 5 + words[:1] * 5, strict=True)
    turns = [[("system", "sentiment ."), *((role, text) for said in pair for role, text in zip(("user", "assistant"), said, strict=True))] for pair in pairs]
    turns = [[{"role": role, "content": text} for role, text in said] for said in turns]
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / "data" / "vader_movies" / f"{split}.jsonl", [
            {"id": f"{split}-{n}", "prompt": transcript(said[:-1]), "answer": said[-1]["content"], "choices": None, "fields": {}, "messages": said[:-1]}
            for n, said in enumerate(turns)])
    write_json(tmp_path / "data" / "vader_movies" / "manifest.json", {"task": "vader_movies"})
    shutil.copytree(tiny / "models", tmp_path / "models")
    for file in (tmp_path / "models").glob("*/tokenizer_config.json"):
        write_json(file, {**read_json(file), "chat_template": "{% for m in messages %}{{ m['content'] }} : {% endfor %}"})
    words_of = [*overrides, f"paths.data={tmp_path}/data", f"paths.models={tmp_path}/models", "technique=lora", "+task.messages=turns", "task.prompt=''",
                "task.scoring=generate", "task.transfer=[]", "train_rows=16", "train.steps=60", "train.lr=0.01", "preflight=true",
                "+task.max_new_tokens=3"]
    assert train.main(words_of) == 0
    result = next((tmp_path / "results").rglob("result.json"))
    assert read_json(result)["scores"]["test"]["accuracy"] >= 0.9
