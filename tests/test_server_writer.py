"""A writer behind a real HTTP server, one that behaves and one that does not: what is tried again, what is paid, and where the key is not."""

from __future__ import annotations

import email.utils
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from chat_server import serving
from openai import _base_client

from pipeline import rationales, train
from pipeline.core.compose import ROOT
from pipeline.core.files import UserError, read_json, read_jsonl, write_json, write_jsonl
from pipeline.teachers import rationales as teachers_rationales
from pipeline.teachers.server_writer import ServerWriter

KEY = "sk-verysecret0123456789"
QUICK = {"timeout_s": 0.4}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.01)
    with serving() as running:
        yield running


def writer(server, folder, **changes):
    return ServerWriter(**{"cache": str(folder), "base_url": server.url, "model": "m", "max_new_tokens": 8, "patience": QUICK, **changes})


def asking(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def lines(folder):
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


def first_time(behaviour):
    return lambda number, handler: behaviour(handler) if number == 1 else False


# one that behaves


def test_texts_come_in_order_are_kept_and_cost_nothing_again(server, tmp_path):
    mine = writer(server, tmp_path)
    assert mine.write(asking("a", "b", "a", "c")) == ["Said: a", "Said: b", "Said: a", "Said: c"]
    assert sorted(server.paid) == ["a", "b", "c"], "what is asked twice is paid once"
    assert server.asked[0] == {"model": "m", "max_tokens": 8, "temperature": 0.0, "messages": server.asked[0]["messages"]}
    assert {h["authorization"] for h in server.headers} == {f"Bearer {KEY}"} and set(server.paths) == {"/v1/chat/completions"}
    again = writer(server, tmp_path)
    assert again.write(asking("c", "a")) == ["Said: c", "Said: a"] and len(server.asked) == 3
    spent = again.about()
    assert (spent["answers"], spent["prompt_tokens"], spent["completion_tokens"], again.spent.written) == (2, 20, 10, 0)
    assert spent["seconds"] == pytest.approx(sum(one["seconds"] for one in lines(tmp_path) if one["text"] != "Said: b"), abs=1e-3) and spent["seconds"] > 0


def test_another_model_setting_or_seed_is_another_text(server, tmp_path):
    for changes in ({}, {"model": "n"}, {"max_new_tokens": 9}, {"temperature": 0.5}, {"extra": {"stop": ["x"]}}, {"api": "completions"}):
        writer(server, tmp_path, **changes).write(asking("a"))
    assert len(server.asked) == 6
    assert server.asked[3]["seed"] == 0 and "top_p" not in server.asked[3] and server.asked[4]["stop"] == ["x"]
    sparse = writer(server, tmp_path, temperature=0.5, top_p=0.9, extra={"seed": None}).body([], 1)
    assert sparse == {"model": "m", "max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "messages": []}
    writer(server, tmp_path, temperature=0.5).write(asking("a"), seed=1)
    writer(server, tmp_path).write(asking("a"), seed=1)
    assert len(server.asked) == 7, "the seed counts where there is sampling"


def test_plain_completions(server, tmp_path):
    mine = writer(server, tmp_path, api="completions", key_variable=None)
    assert mine.write([[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]]) == ["Said: q a\n\nr"]
    assert server.paths == ["/v1/completions"] and server.asked[0]["stop"] == ["\n\n"] and "authorization" not in server.headers[0]


def test_requests_under_way_are_bounded(server, tmp_path):
    server.behave = lambda number, handler: time.sleep(0.03) or False
    writer(server, tmp_path, concurrency=3).write(asking(*"abcdefghi"))
    assert server.most_together == 3


def test_requests_a_minute(server, tmp_path):
    begin = time.monotonic()
    writer(server, tmp_path, requests_per_minute=3000).write(asking(*"abcdef"))
    assert time.monotonic() - begin >= 5 * 0.02


def test_price_and_tokens_that_are_not_told(server, tmp_path):
    prices = {"input_price": 2.0, "output_price": 10.0, "currency": "EUR"}
    assert writer(server, tmp_path, **prices).about()["price"] == 0
    mine = writer(server, tmp_path, **prices)
    mine.write(asking("a", "b"))
    assert (mine.about()["price"], mine.about()["currency"]) == (pytest.approx((20 * 2 + 10 * 10) / 1e6), "EUR")
    server.behave = lambda number, handler: handler.send(200, {"choices": [{"message": {"content": None}, "finish_reason": "length"}]})
    assert mine.write(asking("c")) == [""], "a model that says nothing has answered"
    assert (mine.about()["price"], mine.about()["prompt_tokens"], mine.about()["cut"]) == (None, None, 1)


# one that does not


def cut_json(handler):
    return handler.send(200, b'{"choices": [{"message": {"content": "Sa')


def drip(handler):
    handler.send(200, b"{", length=500)
    for _ in range(30):
        time.sleep(0.05)
        handler.wfile.write(b" ")
        handler.wfile.flush()
    return True


def hang_up(handler):
    handler.close_connection = True
    handler.connection.close()
    return True


def late(handler):
    time.sleep(0.6)
    return True


@pytest.mark.parametrize("behaviour", [
    lambda h: h.send(429, {"error": {"message": "slow down"}}, Retry_After="0"), lambda h: h.send(500, b"oops", "text/plain"),
    lambda h: h.send(503, b"<html>busy</html>", "text/html"), lambda h: h.send(408, {}), cut_json,
    lambda h: h.send(200, {"choices": []}), lambda h: h.send(200, {"choices": [{"message": {"content": 7}}]}), lambda h: h.send(200, [1]),
    lambda h: h.send(200, b"<html>log in first</html>", "text/html"), lambda h: h.send(200, {"error": {"message": "model is loading"}}),
    lambda h: h.send(200, b'{"choices"', length=400) and hang_up(h), lambda h: h.send(200, b"\x1f\x8bnot", Content_Encoding="gzip"), hang_up, late, drip,
], ids=["429", "500", "503", "408", "cut", "no choice", "no text", "list", "html", "error in 200", "hangs up half-way", "bad gzip", "hangs up", "late", "drip"])
def test_what_may_pass_is_tried_again(server, tmp_path, behaviour):
    server.behave = first_time(behaviour)
    assert writer(server, tmp_path).write(asking("a")) == ["Said: a"]
    assert len(server.asked) == 2 and server.paid == ["a"] and len(lines(tmp_path)) == 1


@pytest.mark.parametrize("wait", ["0.3", pytest.param("date", marks=pytest.mark.slow)])
def test_retry_after_is_waited_for_by_all(server, tmp_path, wait):
    asked = []

    def behave(number, handler):
        asked.append(time.time())
        after = email.utils.formatdate(time.time() + 1.3, usegmt=True) if wait == "date" else wait
        return number == 1 and handler.send(429, {}, Retry_After=after)

    server.behave = behave
    assert writer(server, tmp_path, concurrency=1).write(asking("a", "b")) == ["Said: a", "Said: b"]
    assert asked[1] - asked[0] >= 0.3 and len(asked) == 3


def test_an_hour_is_not_waited_for(server, tmp_path):
    server.behave = lambda number, handler: handler.send(429, {}, Retry_After="3600")
    with pytest.raises(UserError, match="asks to wait for 3600 s.*writer.patience.patience_s"):
        writer(server, tmp_path).write(asking("a"))
    assert len(server.asked) == 1


def test_a_server_that_stays_down_is_given_up_and_what_was_answered_kept(server, tmp_path):
    server.behave = lambda number, handler: number > 2 and handler.send(500, f"no {KEY}".encode(), "text/plain")
    with pytest.raises(UserError, match=r"gave no answer in 3 attempts \(the last: 500\); what was answered is kept"):
        writer(server, tmp_path, concurrency=1, patience={**QUICK, "attempts": 3}).write(asking(*"abcd"))
    assert len(server.asked) == 5 and [one["text"] for one in lines(tmp_path)] == ["Said: a", "Said: b"]


def test_no_server_at_all(server, tmp_path):
    server.server_close()
    with pytest.raises(UserError, match="ConnectError"):
        writer(server, tmp_path, patience={**QUICK, "attempts": 2}).write(asking("a"))


@pytest.mark.parametrize(("status", "body", "message"), [
    (400, {"error": {"message": f"bad temperature, {KEY}"}}, "refuses the request .400, bad temperature, ….; fix"),
    (401, {"error": {"message": f"Incorrect API key {KEY[:8]}"}}, "refuses .401. the key in OPENAI_API_KEY"),
    (403, b"no", "refuses .403. the key in OPENAI_API_KEY"), (404, {"error": {"message": "no model m"}}, "does not know that path or model .404, no model m"),
    (422, {"detail": "x"}, "refuses the request .422"), (302, b"", "refuses the request .302"),
    (429, {"error": {"code": "insufficient_quota", "message": "pay"}}, "has no credit left"),
])
def test_what_will_not_pass_is_asked_once(server, tmp_path, status, body, message):
    server.behave = lambda number, handler: handler.send(status, body, Location="http://127.0.0.1:1/")
    with pytest.raises(UserError, match=message) as caught:
        writer(server, tmp_path, concurrency=1).write(asking("a", "b"))
    assert len(server.asked) == 1 and KEY[:8] not in str(caught.value)


# interruptions


def test_an_interruption_keeps_what_was_under_way_and_going_on_pays_for_the_rest_alone(interruptible, server, tmp_path):
    texts = [f"q{i}" for i in range(20)]

    def behave(number, handler):
        if number == 8:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        return False

    server.behave = behave
    with pytest.raises(KeyboardInterrupt):
        writer(server, tmp_path, concurrency=3).write(asking(*texts))
    before = len(server.asked)
    assert 8 <= before <= 11 and len(lines(tmp_path)) == before == len(server.paid)
    assert writer(server, tmp_path, concurrency=3).write(asking(*texts)) == [f"Said: {t}" for t in texts]
    assert sorted(server.paid) == sorted(texts), "every one was paid for once"


def test_a_process_that_is_killed_loses_what_was_under_way_at_most(server, tmp_path):
    code = f"""
        from pipeline.teachers.server_writer import ServerWriter
        texts = [[{{"role": "user", "content": f"q{{i}}"}}] for i in range(12)]
        ServerWriter(cache={str(tmp_path)!r}, base_url={server.url!r}, model="m", max_new_tokens=8, concurrency=2).write(texts)
    """
    reached = threading.Event()

    def behave(number, handler):
        if number > 6 and not reached.is_set():
            reached.set()
            time.sleep(0.3)
        return False

    server.behave = behave
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT)
    assert reached.wait(30)
    child.kill()
    child.wait()
    texts = [f"q{i}" for i in range(12)]
    assert writer(server, tmp_path).write(asking(*texts)) == [f"Said: {t}" for t in texts]
    assert len(server.asked) <= 12 + 2


def test_a_line_that_was_cut_off_is_asked_for_again_and_the_others_stay(server, tmp_path):
    writer(server, tmp_path, concurrency=1).write(asking("a", "b", "c"))
    path = next(tmp_path.glob("*.jsonl"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert writer(server, tmp_path).write(asking("a", "b", "c")) == ["Said: a", "Said: b", "Said: c"]
    assert server.paid == ["a", "b", "c", "c"] and path.read_bytes().startswith(whole[:-20])
    writer(server, tmp_path).write(asking("a", "b", "c"))
    assert len(server.paid) == 4


# bad input, and the key


@pytest.mark.parametrize(("changes", "message"), [
    ({"api": "chats"}, "writer.api"), ({"concurrency": 0}, "writer.concurrency"), ({"requests_per_minute": 0}, "writer.requests_per_minute"),
    ({"input_price": 1.0}, "go together"), ({"max_new_tokens": 0}, "writer.max_new_tokens"), ({"temperature": -1.0}, "writer.temperature"),
    ({"top_p": 0.0}, "writer.top_p"), ({"patience": {"attempts": 0}}, "writer.patience.attempts"),
])
def test_settings_out_of_range(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        ServerWriter(**{"cache": str(tmp_path), "base_url": "http://h/v1", "model": "m", "max_new_tokens": 8, **changes})
    with pytest.raises(UserError, match="writer.model"):
        ServerWriter(cache=str(tmp_path), base_url="http://h/v1", max_new_tokens=8).check()


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_teacher_behind_a_server_from_end_to_end(server, tmp_path, capsys, caplog):
    caplog.set_level("DEBUG")
    texts = {"a good film": "positive", "a bad film": "negative", "a film": "negative"}
    data = tmp_path / "data" / "vader_movies"
    for split in teachers_rationales.SPLITS:
        write_jsonl(data / f"{split}.jsonl", [
            {"id": f"{split}-{i}", "prompt": f"Review: {t} ({split})", "answer": a, "choices": ["negative", "positive"], "fields": {}}
            for i, (t, a) in enumerate(texts.items())])
    write_json(data / "manifest.json", {})
    server.reply = lambda asked: "No idea." if "bad" in asked else "The film is good. So the answer is Positive."
    command = [
        "task=vader_movies", "teacher=server", *[f"paths.{k}={tmp_path / k}" for k in ("data", "work", "rationales")], f"writer.base_url={server.url}",
        "writer.model=m", "teacher.demonstrations.k=0", "writer.input_price=1.0", "writer.output_price=2.0", "writer.currency=USD",
    ]
    assert rationales.main(command) == 0
    folder = tmp_path / "rationales" / "vader_movies" / "server"
    rows = read_jsonl(folder / "rationales.jsonl")
    assert rows[:3] == [
        {"id": "train-0", "split": "train", "rationale": "The film is good.", "answer": "positive", "correct": True},
        {"id": "train-1", "split": "train", "rationale": "", "answer": None, "correct": False},
        {"id": "train-2", "split": "train", "rationale": "The film is good.", "answer": "positive", "correct": False},
    ]
    manifest = read_json(folder / "manifest.json")
    assert manifest["unparsable"] == 3 and manifest["accuracy"]["test"] == 0.3333 and manifest["seconds"] > 0
    output = manifest["writer"]
    assert (output["server"], output["model"], output["answers"], output["prompt_tokens"], output["price"]) == (server.url, "m", 9, 90, pytest.approx(180e-6))
    assert [{"role": "user", "content": "Options: negative, positive.\nReview: a good film (train)"}] in [one["messages"] for one in server.asked]
    before = (folder / "manifest.json").read_bytes()
    assert rationales.main(command) == 0 and len(server.asked) == 9
    assert (folder / "manifest.json").read_bytes() == before, "what is kept from before costs what it cost"
    said = capsys.readouterr()
    assert "0 of 9 texts written now" in said.out and "3 of 9 rows without an answer" in said.out
    for stored in (everything(tmp_path).decode(), said.out, said.err, caplog.text, repr(writer(server, tmp_path))):
        assert KEY not in stored


@pytest.mark.slow
def test_the_key_is_in_no_result_and_not_in_mlflow(server, overrides, tmp_path):
    server.reply = lambda asked: f"Read. So the answer is {'positive' if 'fine' in asked or 'lovely' in asked else 'negative'}."
    own = [o for o in overrides if not o.startswith(("paths.rationales", "teacher=", "tracking="))]
    command = [
        *own, f"paths.rationales={tmp_path}/rationales", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"tracking.artifacts={tmp_path}/kept",
        "experiment=mine", "teacher=server", f"writer.base_url={server.url}", "writer.model=m", "teacher.demonstrations.k=0", "train_rows=16",
    ]
    assert rationales.main(command) == 0 and train.main([*command, "technique=teacher"]) == 0
    result = read_json(tmp_path / "results" / "mine" / "teacher-s0-n16" / "result.json")
    assert result["scores"]["test"]["accuracy"] == 1 and (result["teacher"]["name"], result["teacher"]["rows"]) == ("server", 16)
    assert len((tmp_path / "mlflow.db").read_bytes()) > 10_000 and KEY.encode() not in everything(tmp_path)
